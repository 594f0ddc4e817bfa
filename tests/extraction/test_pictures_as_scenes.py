"""PNG and JPEG pairs without a location: extraction, training, prediction."""

from __future__ import annotations

import warnings

import geopandas
import numpy as np
import pytest
import rasterio
from helpers import QUICK, run_main
from rasterio.errors import NotGeoreferencedWarning
from site_helpers import run

import Predict_large_image
from common.labels import class_names_of

SIDE = 48


def write_picture(path, pixels: np.ndarray) -> None:
    """Pixels (C, H, W) uint8 as a PNG or JPEG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    driver = "PNG" if path.suffix == ".png" else "JPEG"
    count, height, width = pixels.shape
    profile = {"count": count, "height": height, "width": width, "dtype": "uint8"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(path, "w", driver=driver, **profile) as file:
            file.write(pixels)


def painting(number: int) -> np.ndarray:
    """A picture (3, H, W): its left half dark, its right half bright."""
    pixels = np.random.default_rng(number).integers(
        0, 60, (3, SIDE, 2 * SIDE), np.uint8
    )
    pixels[:, :, SIDE:] += 150
    return pixels


@pytest.fixture
def folder(tmp_path):
    """Pictures with painted labels: green on the left, red on the right."""
    label = np.zeros((3, SIDE, 2 * SIDE), np.uint8)
    label[1, :, :SIDE], label[0, :, SIDE:] = 255, 255
    for number in range(4):
        write_picture(tmp_path / "in" / f"Image_{number}.png", painting(number))
        write_picture(tmp_path / "in" / f"Label_{number}.png", label)
    return tmp_path / "in"


def words(folder, *more) -> list:
    pattern = "--label_pattern", "Label_<id>.png"
    values = "--label_values", "00ff00=field,ff0000=roof"
    out = folder.parent / "out"
    start = "batch", "--data_dir", folder, "--output", out, "--patch_size", 24
    return [*start, *pattern, *values, *more]


def test_pictures_become_patches_a_model_and_a_map(folder, tmp_path, capsys):
    assert run(*words(folder, "--split_by", "scene")) == 0
    assert "warning" not in capsys.readouterr().err
    images = sorted((tmp_path / "out" / "Patch").glob("*/images/*.tif"))
    assert len(images) == 4 * 2 * 4
    by_split = {split: set() for split in ("train", "validation", "test")}
    for path in images:
        by_split[path.parent.parent.name].add(path.name.split("_")[0])
        with (
            rasterio.open(path) as file,
            rasterio.open(path.parent.parent / "labels" / path.name) as label,
        ):
            assert file.crs is None and class_names_of(label) == ["field", "roof"]
            column = round(file.transform.c)
            expected = painting(int(path.name[0]))[
                :, round(file.transform.f) :, column:
            ]
            assert np.array_equal(file.read(), expected[:, :24, :24])
            assert (label.read(1) == (column >= SIDE)).all()
    assert sum(map(len, by_split.values())) == 4  # a scene lies in one split
    cells = geopandas.read_file(
        tmp_path / "out" / "Patch" / "cells.gpkg", layer="cells"
    )
    assert cells.crs is None and cells.union_all().area == pytest.approx(
        cells.area.sum()
    )

    models = tmp_path / "models"
    options = "--dataset_root", tmp_path / "out", "--save_dir", models, "--epochs", 2
    status, _, err = run_main(*QUICK, *options)
    assert status == 0, err
    model = str(models / "model_final_model.pth")
    given = [
        "--model",
        model,
        "--input",
        str(folder),
        "--output",
        str(tmp_path / "maps"),
    ]
    write_picture(folder / "Image_9.jpg", painting(9))
    (folder / "Label_0.png").rename(tmp_path / "kept.png")
    for path in folder.glob("Label_*"):
        path.unlink()
    assert Predict_large_image.main([*given, "--device", "cpu"]) == 0
    maps = sorted(path.name for path in (tmp_path / "maps").glob("*.tif"))
    assert maps == [f"Image_{number}_prediction.tif" for number in (0, 1, 2, 3, 9)]


def test_cells_of_a_picture_that_overlap_go_to_one_split(folder, tmp_path, capsys):
    for path in folder.glob("*_[123].png"):
        path.unlink()
    assert run(*words(folder, "--stride", "12", "--save_metadata")) == 0
    assert "touch or overlap" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--split_by", "block"], "has no location, which --split_by block needs"),
        (["--buffer", "5"], "has no location, which --buffer needs"),
        (["--grid", "cells.gpkg"], "cells.gpkg"),
    ],
)
def test_what_needs_a_location_is_refused(folder, capsys, more, expected):
    assert run(*words(folder, *more)) == 1
    assert expected in capsys.readouterr().err.splitlines()[-1]


def test_a_label_that_is_a_jpeg_is_said_to_have_other_values(folder, capsys):
    for path in list(folder.glob("Label_*.png")):
        with rasterio.open(path) as file:
            write_picture(path.with_suffix(".jpg"), file.read())
        path.unlink()
    assert run(*words(folder), "--label_pattern", "Label_<id>.jpg", "--other", "x") == 0
    lines = [li for li in capsys.readouterr().err.splitlines() if "is a JPEG" in li]
    assert len(lines) == 1 and "export labels as PNG" in lines[0]


def test_a_label_of_another_size_is_refused(folder, capsys):
    write_picture(folder / "Label_2.png", np.zeros((3, SIDE, SIDE), np.uint8))
    assert run(*words(folder)) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "Label_2.png is 48 x 48 pixels, but" in line and "48 x 96" in line


def test_a_tiff_without_a_crs_is_still_refused(folder, capsys):
    with rasterio.open(folder / "Image_1.png") as file:
        pixels = file.read()
    (folder / "Image_1.png").unlink()
    profile = {"count": 3, "height": SIDE, "width": 2 * SIDE, "dtype": "uint8"}
    with rasterio.open(folder / "Image_1.tif", "w", driver="GTiff", **profile) as file:
        file.write(pixels)
    # a picture beside scenes is one of them
    options = "--skip_unmatched", "--label_values", "1,2"
    assert run(*words(folder)[:-2], *options) == 1
    assert "Image_1.tif has no CRS" in capsys.readouterr().err.splitlines()[-1]
