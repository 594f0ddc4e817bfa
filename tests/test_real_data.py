"""The whole chain on real scenes: extract, train for an epoch, map the scene, look at the files.

The scenes are not part of the project; where ``../shared/data`` is absent these tests skip.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import rasterio
from helpers import ENCODER

import main
import Patch_extraction
import Predict_large_image

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("real_pictures"),
    pytest.mark.skipif(not DATA.is_dir(), reason="no real scenes in ../shared/data"),
]
QUICK = ("--epochs", 1, "--num_workers", 0, "--batch_size", 8, "--device", "cpu")
SMALL = ("--model", "linknet", "--encoder_name", ENCODER)


def run(script, *words) -> None:
    assert script.main([str(word) for word in words]) == 0


def train(root: Path, models: Path, *words) -> Path:
    run(main, "--dataset_root", root, "--save_dir", models, *SMALL, *QUICK, *words)
    return models / "model_final_model.pth"


def map_scene(model: Path, scene: Path, output: Path, classes: int) -> None:
    """Map it and compare the files with the scene."""
    options = ("--patch_size", 256, "--overlap", 64, "--save_confidence", "--quicklook")
    run(Predict_large_image, *("--model", model, "--input", scene), *options,
        "--output", output)  # fmt: skip
    with rasterio.open(scene) as source, rasterio.open(output) as result:
        assert result.crs == source.crs
        assert result.transform == source.transform
        assert result.shape == source.shape
        found = np.unique(result.read(1, masked=True).compressed())
    assert len(found) and found.max() < classes
    for ending in ("_confidence.tif", "_statistics.json", "_quicklook.png"):
        assert output.with_name(output.stem + ending).stat().st_size > 0


@pytest.mark.parametrize(
    ("name", "grid", "values", "size"),
    [
        ("zion-landsat8", "grid_wgs84.gpkg", "1,2,3,4,5,6,7,8", 64),
        ("nc-landsat7", "grid.shp", "1,2,3,4,5,6,7", 64),
        ("potomac-naip-landsat", "grid.shp", "1,2,3,4,5,6", 64),
        ("rstoolbox-s2-sparse", "grid.shp", "1,2,3,4", 32),
        ("spacenet-atlanta-pan", "grid.shp", "0,1", 64),
    ],
)
def test_a_scene_goes_from_grid_to_map(tmp_path, name, grid, values, size):
    folder, classes = DATA / name, len(values.split(","))
    run(
        Patch_extraction,
        "extract",
        *("--image", folder / "image.tif", "--label", folder / "label.tif"),
        *("--grid", folder / grid, "--output", tmp_path, "--patch_size", size),
        *("--label_values", values, "--min_valid", 0.1),
    )
    mode = ("--mode", "multiclass", "--classes", classes)
    model = train(tmp_path, tmp_path / "models", *(mode if classes > 2 else ()))
    map_scene(model, folder / "image.tif", tmp_path / "map.tif", classes)


@pytest.mark.parametrize(
    ("name", "classes", "count"),
    [("amazon-forest-s2rgb", 2, 6), ("enmap-potsdam-chips", 7, 18)],
)
def test_chips_are_trained_on_and_mapped(tmp_path, name, classes, count):
    chips = sorted((DATA / name / "chips" / "images").iterdir())[:count]
    for index, chip in enumerate(chips):
        split = "validation" if index % 3 == 2 else "train"
        for kind in ("images", "labels"):
            target = tmp_path / split / kind / chip.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(DATA / name / "chips" / kind / chip.name, target)
    mode = ("--mode", "multiclass", "--classes", classes) if classes > 2 else ()
    model = train(tmp_path, tmp_path / "models", *mode)
    map_scene(model, chips[0], tmp_path / "map.tif", classes)
