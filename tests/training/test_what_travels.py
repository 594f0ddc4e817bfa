"""What checkpoints know of their scenes: sensor, dates, nodata, type, and where patches lie."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import rasterio
import rasterio.shutil
import torch
from helpers import (
    CRS,
    ORIGIN,
    PIXEL,
    QUICK,
    interrupt,
    make_patch,
    run_main,
    train,
    write_dataset,
    write_raster,
)

import Patch_extraction
from common import SPLITS
from common.patches import joint_headers, list_pairs
from training.samples import index_samples

KEYS = ("sensor", "acquired", "nodata", "data_type", "places")
UNKNOWN = dict.fromkeys(KEYS)


def origin_of_checkpoint(path: Path) -> dict:
    """What a checkpoint holds of its dataset, opened without running code."""
    metadata = torch.load(path, weights_only=True)["metadata"]
    return {key: metadata[key] for key in KEYS}


def bounds_of(data: Path, split: str) -> list[list[float]]:
    """Where the images of a split lie, by rasterio."""
    found = []
    for pair in list_pairs(data, split):
        with rasterio.open(pair.image) as file:
            found.append(list(file.bounds))
    return found


def places_of(data: Path) -> list[dict]:
    return [
        {"crs": CRS, "split": split, "bounds": bounds_of(data, split)}
        for split in SPLITS
    ]


def origin_of(data: Path, split: str = "train") -> dict:
    """What the patches of a split say together."""
    return joint_headers(index_samples(list_pairs(data, split), 2, 255).headers)


def write_pair(
    data: Path,
    name: str,
    split: str = "train",
    dtype: str = "uint16",
    place: dict | None = None,
    **more,
) -> None:
    """One more patch of a dataset; ``more`` is how its image is written."""
    image, label = make_patch(np.random.default_rng(1), bands=3)
    place = place or {"origin": (ORIGIN[0], ORIGIN[1] + 9000)}
    folder = data / "Patch" / split
    write_raster(folder / "images" / name, image.astype(dtype), **place, **more)
    write_raster(folder / "labels" / name, label, **place)


@pytest.fixture(scope="module")
def travelled(tmp_path_factory) -> tuple[Path, Path]:
    """A dataset cut from a VRT with the tags of a stacked scene, and what was trained on it."""
    folder = tmp_path_factory.mktemp("travelled")
    image, label = make_patch(np.random.default_rng(0), bands=3, size=(128, 128))
    tags = {"sensor": "Sentinel-2A", "acquired": "2021-07-09,2021-06-19"}
    write_raster(folder / "pixels.tif", image, nodata=0, tags=tags)
    rasterio.shutil.copy(folder / "pixels.tif", folder / "scene.vrt", driver="VRT")
    write_raster(folder / "label.tif", label)
    words = ["extract", "--image", folder / "scene.vrt", "--output", folder / "data"]
    words += ["--label", folder / "label.tif", "--patch_size", 32]
    assert Patch_extraction.main(list(map(str, words))) == 0
    train(folder / "data", folder / "models")
    return folder / "data", folder / "models"


def test_tags_of_a_scene_are_those_of_its_image_patches(travelled):
    pair = list_pairs(travelled[0], "train")[0]
    with rasterio.open(pair.image) as image, rasterio.open(pair.label) as label:
        tags = image.tags()
        assert tags["sensor"] == "Sentinel-2A"
        assert tags["acquired"] == "2021-06-19,2021-07-09"
        assert not {"sensor", "acquired"} & label.tags().keys()


def test_every_checkpoint_knows_what_scene_and_patches_say(travelled):
    data, models = travelled
    expected = {
        "sensor": "Sentinel-2A",
        "acquired": ["2021-06-19", "2021-07-09"],
        "nodata": [0.0, 0.0, 0.0],
        "data_type": "uint16",
        "places": places_of(data),
    }
    files = sorted(models.glob("*.pth"))
    assert len(files) >= 4
    for file in files:
        assert origin_of_checkpoint(file) == expected, file


def test_a_resumed_run_knows_the_same(travelled, tmp_path, monkeypatch):
    data, models = travelled
    with monkeypatch.context() as patch:
        interrupt(patch, "training.assessment.export", 1)
        stopped = run_main("--dataset_root", data, "--save_dir", tmp_path, *QUICK)
    assert stopped[0] and not (tmp_path / "model_final_model.pth").exists()
    train(data, tmp_path, "--resume")
    found = origin_of_checkpoint(tmp_path / "model_final_model.pth")
    assert found == origin_of_checkpoint(models / "model_final_model.pth")


def test_all_models_of_k_fold_know_all_patches_by_their_folder(
    binary_data, binary_kfold
):
    files = sorted(binary_kfold.save_dir.rglob("model_*.pth"))
    assert {file.parent.name for file in files} >= {"fold_1", "fold_3"}
    expected = places_of(binary_data)
    assert [len(place["bounds"]) for place in expected] == [6, 3, 2]
    for file in files:
        found = origin_of_checkpoint(file)
        assert found["places"] == expected, file
        assert found["data_type"] == "uint16" and found["sensor"] is None


def test_what_nobody_says_is_none(tmp_path):
    data = write_dataset(tmp_path, 2, 0, 0, bands=3)
    for pair in list_pairs(data, "train"):
        image, _ = make_patch(np.random.default_rng(0), bands=3)
        with rasterio.open(
            pair.image, "w", driver="GTiff", count=3, height=32, width=32, dtype="uint16",
            transform=rasterio.Affine(1, 0, 32, 0, 1, 0),
        ) as file:  # fmt: skip
            file.write(image)
    known = {"data_type": "uint16", "nodata": [None] * 3}
    assert origin_of(data) == UNKNOWN | known


def test_patches_of_two_crs_are_listed_apart(tmp_path):
    data = write_dataset(tmp_path, 2, 0, 0, bands=3)
    expected = bounds_of(data, "train")
    other = (400_000.0, 4_500_000.0)
    write_pair(data, "patch_x.tif", place={"crs": "EPSG:32632", "origin": other})
    right, below = other[0] + 32 * PIXEL, other[1] - 32 * PIXEL
    assert origin_of(data)["places"] == [
        {"crs": CRS, "split": "train", "bounds": expected},
        {
            "crs": "EPSG:32632",
            "split": "train",
            "bounds": [[other[0], below, right, other[1]]],
        },
    ]


@pytest.mark.parametrize(
    "more, expected",
    [
        ({"nodata": 0}, {"nodata": [0.0] * 3, "data_type": "uint16"}),
        ({"nodata": 7}, {"nodata": None, "data_type": "uint16"}),
        ({}, {"nodata": None, "data_type": "uint16"}),
        ({"nodata": 0, "dtype": "int16"}, {"nodata": [0.0] * 3, "data_type": None}),
    ],
)
def test_nodata_and_type_are_none_where_patches_differ(tmp_path, more, expected):
    data = write_dataset(tmp_path, 2, 0, 0, bands=3, nodata=0)
    write_pair(data, "patch_x.tif", **more)
    found = origin_of(data)
    assert {key: found[key] for key in expected} == expected


def test_nodata_that_is_no_number_is_alike_in_all_patches(tmp_path):
    data = write_dataset(tmp_path, 2, 0, 0, bands=3, dtype="float32", nodata=math.nan)
    found = origin_of(data)["nodata"]
    assert len(found) == 3 and all(map(math.isnan, found))


def test_sensors_and_dates_are_those_of_all_splits(tmp_path):
    data = write_dataset(tmp_path, 0, 0, 0)
    for number, split in enumerate(SPLITS, start=1):
        tags = {"sensor": f"Landsat {number}", "acquired": f"2021-06-0{number}"}
        write_pair(data, "patch.tif", split, tags=tags)
    first, *others = (index_samples(list_pairs(data, s), 2, 255) for s in SPLITS)
    for whole in (first.beside(*others), (first + others[0]).beside(others[1], None)):
        found = joint_headers(whole.subset([0]).headers)
        assert found["sensor"] == "Landsat 1,Landsat 2,Landsat 3"
        assert found["acquired"] == ["2021-06-01", "2021-06-02", "2021-06-03"]
        assert [place["split"] for place in found["places"]] == list(SPLITS)
