"""How near an epoch of training comes to the bare passes over data that is in memory already.

    python tests/benchmarks/training.py

cuts the demo's scene into patches of 224 pixels and 10 bands, and trains a U-Net (resnet18, batches
of 4) on them for a few epochs, validation included, in several ways, each in a process of its own:
the toolkit as a user runs it, a bare loop at the same precision (normalized tensors in memory,
channels-last, nothing but passes, loss and steps), and the plain float32 loop that people write
first. What counts are the ratios of patches per second; the first epoch, in which libraries warm
up, does not. A GPU is used when there is one.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from common.devices import autocast, native_precision, pick_device
from common.machine import available_cores
from common.patches import list_pairs
from model_training import dataset_normalization
from training.loaders import collate, to_input
from training.samples import (
    DecodedPatch,
    PatchDataset,
    Sample,
    SampleIndex,
    index_samples,
)

SIDE, BANDS, CLASSES, BATCH = 224, 10, 6, 4
WAYS = ("toolkit", "bare", "plain")


def make_patches(folder: Path, train: int, validation: int) -> None:
    """Patches out of the demo's scene, at random places."""
    import rasterio
    from affine import Affine

    from examples.demo import synthesize_scene

    scene = synthesize_scene(folder / "scene", size=1400, seed=1)
    with rasterio.open(scene.image) as image, rasterio.open(scene.label) as label:
        pixels, truth, profile = image.read(), label.read(1), image.profile
        nodata = label.nodata
    profile |= {"height": SIDE, "width": SIDE, "tiled": False, "compress": "deflate"}
    profile.pop("blockxsize", None), profile.pop("blockysize", None)
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("validation", validation)):
        for kind in ("images", "labels"):
            (folder / "Patch" / split / kind).mkdir(parents=True)
        for number in range(count):
            row, column = (int(v) for v in rng.integers(0, 1400 - SIDE, 2))
            cut = (..., slice(row, row + SIDE), slice(column, column + SIDE))
            place = Affine.translation(column, row) * Affine.scale(1)
            where = {"transform": profile["transform"] * place}
            name = f"patch_{number}.tif"
            target = folder / "Patch" / split / "images" / name
            with rasterio.open(target, "w", **profile | where) as file:
                file.write(pixels[cut])
            one = {"count": 1, "dtype": "uint8", "nodata": nodata}
            target = folder / "Patch" / split / "labels" / name
            with rasterio.open(target, "w", **profile | where | one) as file:
                file.write(truth[cut].astype(np.uint8), 1)


def toolkit_epochs(
    folder: Path, epochs: int, options: list[str], env: dict | None = None
) -> list[float]:
    """Seconds of each epoch of main.py, all that it writes included."""
    command = [
        *(sys.executable, ROOT / "main.py", "--mode", "multiclass"),
        *("--classes", CLASSES, "--model", "unet", "--encoder_name", "resnet18"),
        *("--batch_size", BATCH, "--epochs", epochs, "--patience", 0),
        *("--dataset_root", folder, "--save_dir", folder / "models", "--overwrite"),
        *options,
    ]
    subprocess.run([str(word) for word in command], check=True, env=env)
    with open(folder / "models" / "model_training_log.csv", newline="") as file:
        return [float(row["seconds"]) for row in csv.DictReader(file)]


def loop_epochs(folder: Path, epochs: int, bare: bool) -> list[float]:
    """Seconds of each epoch of a loop over tensors in memory."""
    import segmentation_models_pytorch as smp
    import torch

    device = pick_device(None)
    precision = native_precision(device) if bare else "fp32"
    layout = torch.channels_last if bare else torch.contiguous_format
    data = {}
    for split in ("train", "validation"):
        index = index_samples(list_pairs(folder, split), CLASSES, 255)
        if split == "train":
            scale = dataset_normalization(index.samples)
        dataset = PatchDataset(index, 255)
        batch = collate([dataset[i] for i in range(len(dataset))])
        images, masks = to_input(batch, scale, device)
        data[split] = images.contiguous(memory_format=layout), masks
    torch.manual_seed(0)
    model = smp.Unet(
        "resnet18", encoder_weights=None, in_channels=BANDS, classes=CLASSES
    )
    model.to(device, memory_format=layout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    dice = smp.losses.DiceLoss("multiclass", ignore_index=255)
    entropy = torch.nn.CrossEntropyLoss(ignore_index=255)

    def loss(images, masks):
        with autocast(device, precision):
            logits = model(images)
        logits = logits.float()
        return dice(logits, masks) + entropy(logits, masks)

    def parts(split: str, shuffled: bool):
        images, masks = data[split]
        order = torch.randperm(len(images)) if shuffled else torch.arange(len(images))
        for part in order.to(device).split(BATCH):
            yield images[part], masks[part]

    seconds = []
    for _ in range(epochs):
        started = time.perf_counter()
        model.train()
        total = 0.0
        for images, masks in parts("train", True):
            optimizer.zero_grad()
            value = loss(images, masks)
            value.backward()
            optimizer.step()
            total += value.item()
        model.eval()
        with torch.inference_mode():
            total += sum(loss(*batch).item() for batch in parts("validation", False))
        seconds.append(time.perf_counter() - started)
    return seconds


def measure(folder: Path, way: str, epochs: int, options: list[str]) -> list[float]:
    """Seconds of each epoch of one way, but for the first."""
    if way == "toolkit":
        return toolkit_epochs(folder, epochs, options)[1:]
    command = [sys.executable, __file__, "--way", way, "--folder", folder]
    command = [str(word) for word in (*command, "--epochs", epochs)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])[1:]


def feeding_times(batches: int = 20, size: int = 32) -> dict[str, float]:
    """CPU milliseconds of this thread per patch, for each kind of variation: the median batch."""
    rng = np.random.default_rng(0)
    image = rng.integers(1, 10_000, (size, BANDS, SIDE, SIDE)).astype(np.uint16)
    mask = rng.integers(0, CLASSES, (size, SIDE, SIDE)).astype(np.uint8)
    valid = np.ones(mask.shape, bool)
    decoded = list(map(DecodedPatch, image, valid, mask))
    counts, samples = np.zeros((size, CLASSES)), [image[0, :, 0].T] * size
    index = SampleIndex(
        [None] * size, counts, samples, image.shape[1:], (), None, decoded
    )
    found = {}
    for kind in ("none", "symmetries", "full"):
        dataset, times = PatchDataset(index, 255, kind), []
        for batch in range(batches):
            started = time.thread_time()
            collate([dataset[Sample(i, batch * size + i)] for i in range(size)])
            times.append(time.thread_time() - started)
        found[kind] = statistics.median(times) / size * 1000
    return found


THREADS = {  # how threads that wait for each other do so
    "as main.py sets it": {},
    "asleep": {"OMP_WAIT_POLICY": "passive"},
    "PyTorch's default": {"OMP_WAIT_POLICY": ""},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
BUSY_OPTIONS = ("--encoder_name", "timm-mobilenetv3_small_minimal_100")


@contextlib.contextmanager
def other_work(processes: int):
    """So many processes that compute without end."""
    command = [sys.executable, "-c", "while True: pass"]
    running = [subprocess.Popen(command) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def busy_seconds(folder: Path, epochs: int, rounds: int) -> dict[tuple, float]:
    """The median epoch of a small network, alone and beside a busy process per core."""
    times = {(kind, busy): [] for kind in THREADS for busy in (False, True)}
    for _ in range(rounds):
        for kind, busy in times:
            with other_work(available_cores() if busy else 0):
                env = os.environ | THREADS[kind]
                found = toolkit_epochs(folder, epochs, [*BUSY_OPTIONS], env)
            times[kind, busy] += found[1:]
    return {key: statistics.median(values) for key, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--train", type=int, default=240, help="training patches")
    parser.add_argument("--validation", type=int, default=60, help="validation patches")
    parser.add_argument("--epochs", type=int, default=4, help="epochs of each way")
    parser.add_argument(
        "--rounds", type=int, default=1, help="times that all is measured"
    )
    parser.add_argument("--options", default="", help="more options of main.py")
    parser.add_argument(
        "--busy", action="store_true", help="epochs beside other work on all cores"
    )
    parser.add_argument("--feed", action="store_true", help="work of the host alone")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=WAYS[1:], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way:
        print(json.dumps(loop_epochs(given.folder, given.epochs, given.way == "bare")))
        return
    if given.feed:
        print("| --data_augmentation | ms per patch |\n|---|---|")
        for kind, milliseconds in feeding_times().items():
            print(f"| {kind} | {milliseconds:.3f} |")
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if given.busy:
            make_patches(folder, 24, 8)
            found = busy_seconds(folder, given.epochs, given.rounds)
            usual = found["PyTorch's default", False]
            print("| threads | alone | beside other work |\n|---|---|---|")
            for kind in THREADS:
                row = (f"{found[kind, busy] / usual:.2f}" for busy in (False, True))
                print(f"| {kind} | {' | '.join(row)} |")
            return
        make_patches(folder, given.train, given.validation)
        found = {way: [] for way in WAYS}
        for _ in range(given.rounds):
            for way in WAYS:
                options = given.options.split()
                found[way] += measure(folder, way, given.epochs, options)
    patches = given.train + given.validation
    speed = {way: patches / statistics.median(times) for way, times in found.items()}
    print("| way | patches/s | toolkit / this |\n|---|---|---|")
    for way in WAYS:
        print(f"| {way} | {speed[way]:.1f} | {speed['toolkit'] / speed[way]:.2f} |")


if __name__ == "__main__":
    main()
