"""Every output as a real QGIS shows it to somebody who opens it: ``python -m pytest -m qgis tests``.

QGIS runs in a process of its own, in the system's Python. ``QGIS_ROOT`` names another folder than
/usr that holds it, as that of Debian's packages unpacked without being installed.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from helpers import CRS, ENCODER, ORIGIN, PIXEL, ROOT, cell, grid, write_raster

import Patch_extraction
import Predict_large_image
from common.architectures import ModelConfig
from common.styles import RAMP, ramp_colours
from extraction.places import SPLIT_COLOURS
from model_training import Normalization, build_model, save_checkpoint

QGIS = Path(os.environ.get("QGIS_ROOT", "/usr"))
PACKAGES = QGIS / "lib/python3/dist-packages"
pytestmark = [
    pytest.mark.qgis,
    pytest.mark.skipif(
        not (PACKAGES / "qgis").is_dir(),
        reason=f"no QGIS in {QGIS}; install python3-qgis, or name its folder in QGIS_ROOT",
    ),
]

NAMES = ["water", "forêt & bois", "<bare> soil"]
SIDE = 64
NODATA = 20  # rows of the scenes


def hexes(colours) -> list[str]:
    return ["#{:02x}{:02x}{:02x}".format(*colour) for colour in colours]


def show(files: list[Path]) -> dict[str, dict]:
    """What QGIS shows of files, by their names; see qgis_probe.py."""
    surroundings = {"QGIS_ROOT": QGIS, "QT_QPA_PLATFORM": "offscreen"}
    if "QGIS_ROOT" in os.environ:  # nothing of it is where the system looks
        libraries = QGIS / "lib" / f"{platform.machine()}-linux-gnu"
        around = [libraries, libraries / "blas", libraries / "lapack", QGIS / "lib"]
        surroundings |= {
            "LD_LIBRARY_PATH": ":".join(map(str, around)),
            "PYTHONPATH": PACKAGES,
            "QT_PLUGIN_PATH": libraries / "qt5/plugins",
            "GDAL_DATA": QGIS / "share/gdal",
            "PROJ_LIB": QGIS / "share/proj",
        }
    command = ["/usr/bin/python3", ROOT / "tests" / "qgis_probe.py", *files]
    found = subprocess.run(
        list(map(str, command)),
        env=os.environ | {key: str(value) for key, value in surroundings.items()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    views = [json.loads(line) for line in found.stdout.splitlines()]
    return {view.pop("file"): view for view in views}


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> dict:
    """What QGIS shows of two scenes side by side mapped, of combined dates, and of a dataset.

    With "the map's own", the colour table of a map.
    """
    folder = tmp_path_factory.mktemp("outputs")
    rng = np.random.default_rng(0)
    scenes = []
    for number in range(2):
        pixels = rng.integers(1, 10_000, (3, SIDE, SIDE), np.uint16)
        pixels[:, :NODATA] = 0
        place = (ORIGIN[0] + number * SIDE * PIXEL, ORIGIN[1])
        path = folder / "scenes" / f"tile{number}.tif"
        scenes.append(write_raster(path, pixels, nodata=0, origin=place))
    torch.manual_seed(1)
    config = ModelConfig("pspnet", 3, len(NAMES), ENCODER)
    numbers = Normalization("dataset", (0.0,) * 3, (1e4,) * 3)
    model = build_model(config)
    save_checkpoint(folder / "m.pth", model, config, numbers, {"class_names": NAMES})

    def predict(*words) -> None:
        usual = ("--patch_size", 32, "--overlap", 8, "--device", "cpu")
        options = map(str, ("--model", folder / "m.pth", *usual, *words))
        assert Predict_large_image.main(list(options)) == 0

    maps, dates = folder / "maps", folder / "dates.tif"
    layers = ("--save_confidence", "--suggest", 3, "--cell_size", 10)
    predict("--input", *scenes, "--output", maps, "--polygons", maps, *layers)
    twice = [scenes[0], scenes[0]]
    predict("--input", *twice, "--output", dates, "--combine", "mean")

    label = rng.integers(0, 2, (SIDE, SIDE), np.uint8)
    write_raster(folder / "label.tif", label)
    cells = [cell(x, y, 10) for y in range(NODATA, 60, 10) for x in range(0, 60, 10)]
    grid(cells, CRS).to_file(folder / "grid.gpkg")
    options = {"image": scenes[0], "label": folder / "label.tif", "output": folder}
    options |= {"grid": folder / "grid.gpkg", "patch_size": 10, "workers": 1}
    words = [str(word) for name in options for word in (f"--{name}", options[name])]
    assert Patch_extraction.main(["extract", *words]) == 0
    files = [*maps.glob("*.tif"), *maps.glob("*.gpkg"), maps / "mosaic.vrt"]
    files += [dates, folder / "dates_dates.tif", folder / "Patch" / "cells.gpkg"]
    with rasterio.open(dates) as file:
        table = file.colormap(1)
    colours = [table[number][:3] for number in range(len(NAMES))]
    views = show(files)
    assert len(views) == len(files) == 14 and all(v["valid"] for v in views.values())
    return views | {"the map's own": colours}


def pairs(view: dict) -> list:
    return [[label, colour] for _, label, colour in view["classes"]]


@pytest.mark.parametrize("name", ["tile0_prediction.tif", "mosaic.vrt", "dates.tif"])
def test_a_map_shows_its_classes_and_nothing_where_it_has_none(shown, name):
    view, colours = shown[name], hexes(shown["the map's own"])
    assert view["renderer"] == "paletted" and view["style"]
    expected = [[number, *pair] for number, pair in enumerate(zip(NAMES, colours))]
    assert view["classes"] == expected
    assert set(view["colours"]) <= set(colours)
    # two scenes are half as high as wide, which leaves room above and below
    assert view["transparent"] >= NODATA / SIDE - 0.02


def test_gdal_reads_the_attribute_table_of_a_map(shown):
    view = shown["tile0_prediction.tif"]
    of_class = ["Value", "Class", "Class_code", "Class_name"]
    assert view["columns"] == [*of_class, "Red", "Green", "Blue"]
    assert view["rows"] == [
        [*[str(number)] * 3, name, *map(str, colour)]
        for number, (name, colour) in enumerate(zip(NAMES, shown["the map's own"]))
    ]


@pytest.mark.parametrize(
    ("name", "limits"),
    [
        ("tile0_prediction_confidence.tif", [0, 1]),
        ("tile1_prediction_uncertainty.tif", [0, 1]),
        ("dates_dates.tif", [1, 2]),
    ],
)
def test_a_layer_is_a_ramp_of_its_whole_range_with_nodata_transparent(
    shown, name, limits
):
    view = shown[name]
    assert view["renderer"] == "singlebandpseudocolor" and view["style"]
    assert view["range"] == limits
    values, colours = zip(*view["ramp"])
    np.testing.assert_allclose(values, np.linspace(*limits, len(RAMP)))
    assert list(colours) == hexes(RAMP)
    assert view["transparent"] == pytest.approx(NODATA / SIDE, abs=0.02)


@pytest.mark.parametrize("number", [0, 1])
def test_polygons_beside_a_map_of_their_name_have_a_style_of_their_own(shown, number):
    view = shown[f"tile{number}_prediction.gpkg"]
    assert view["renderer"] == "categorizedSymbol" and view["column"] == "class_name"
    assert view["classes"] == [
        [name, name, colour]
        for name, colour in zip(NAMES, hexes(shown["the map's own"]))
    ]
    assert "Provider" in view["message"]  # not the .qml, which is that of the map
    assert view["layers"] == [f"tile{number}_prediction"]  # no question which one


@pytest.mark.parametrize("number", [0, 1])
def test_suggested_cells_are_drawn_by_rank(shown, number):
    view = shown[f"tile{number}_prediction_suggestions.gpkg"]
    assert [label for label, _ in pairs(view)] == ["1", "2", "3"]
    colours = hexes(ramp_colours(3)[::-1])
    assert [colour for _, colour in pairs(view)] == colours
    assert set(colours) <= set(view["colours"])


def test_cells_are_coloured_by_split(shown):
    view = shown["cells.gpkg"]
    assert view["renderer"] == "categorizedSymbol" and view["column"] == "split"
    colours = hexes(SPLIT_COLOURS.values())
    assert pairs(view) == [list(pair) for pair in zip(SPLIT_COLOURS, colours)]
    assert view["layers"] == ["cells"]
    assert set(colours) <= set(view["colours"])
