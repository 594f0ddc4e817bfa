"""How many classes stay when windows have another size than the patches of the training.

    python tests/benchmarks/windows.py

cuts the demo's scene into patches of 64 pixels, trains a few networks on a part of them, and maps
the scene in windows of several sizes. The table gives, for each network and size, the accuracy
outside the training patches, and the share of the pixels that keep the class which windows of the
training's size give them: by all of the map, and by the trial of ``prediction.window``.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import rasterio

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from examples.demo import synthesize_scene

TRAINED, SIZES = 64, (64, 128, 256, 512)
NETWORKS = ("tu-mobilenetv3_small_050", "timm-efficientnet-b0", "resnet18")


def run(script: str, *words) -> str:
    """A script's stderr."""
    command = [sys.executable, str(ROOT / script), *map(str, words)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stderr


def pixels(path: Path) -> np.ndarray:
    with rasterio.open(path) as file:
        return file.read(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--size", type=int, default=2048, help="side of the scene")
    given = parser.parse_args()
    print("| encoder | window | accuracy | keeps its class | by the trial |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scene = synthesize_scene(folder / "scene", size=given.size, seed=1)
        truth = pixels(scene.label)
        words = (
            "--image",
            scene.image,
            "--label",
            scene.label,
            "--patch_size",
            TRAINED,
        )
        split = ("--train_ratio", 0.15, "--val_ratio", 0.05, "--test_ratio", 0.8)
        run(
            "Patch_extraction.py",
            "extract",
            *words,
            *split,
            "--output",
            folder / "data",
        )
        for encoder in NETWORKS:
            place = folder / encoder
            run(
                "main.py", "--mode", "multiclass", "--classes", 6, "--model", "unet",
                "--encoder_name", encoder, "--dataset_root", folder / "data", "--epochs",
                given.epochs, "--batch_size", 16, "--save_dir", place,
            )  # fmt: skip
            maps = {}
            for size in SIZES:
                output = place / f"{size}.tif"
                told = run(
                    "Predict_large_image.py", "--model", place / "model_final_model.pth",
                    "--input", scene.image, "--output", output, "--patch_size", size,
                )  # fmt: skip
                maps[size] = pixels(output)
                known = (maps[size] != 255) & (truth < 6)
                accuracy = (maps[size] == truth)[known].mean()
                kept = (maps[size] == maps[TRAINED])[maps[size] != 255].mean()
                warned = re.search(r"only (\d+) % of the pixels keep", told)
                trial = f"{warned[1]} %" if warned else "90 % or more"
                print(
                    f"| {encoder} | {size} | {accuracy:.3f} | {kept:.1%} | {trial} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
