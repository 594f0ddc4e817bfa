"""Faults that users meet in an extraction: each row of a table is one of them."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
from affine import Affine
from faults import (
    LEGAL,
    SIDE,
    all_nodata,
    bad_block,
    check,
    cut_off,
    elsewhere,
    empty,
    full_disk,
    label_of,
    no_crs,
    nothing,
    nowhere,
    one_block_rows,
    output_rows,
    patches,
    patches_without_memory,
    read,
    rewrite,
    row,
    run,
    snapshot,
    table,
    text,
    unreadable_rows,
    valid_pixels,
)
from helpers import (
    CRS,
    ORIGIN,
    PIXEL,
    cell,
    grid,
)
from shapely import affinity
from shapely.geometry import LineString, Polygon, box


def all_nan(path: str) -> None:
    rewrite(path, lambda pixels: np.full(pixels.shape, np.nan, "float32"))


@table(
    *unreadable_rows("extract", "scene.tif", "label.tif"),
    *unreadable_rows("batch", "scenes/Image_1.tif", "scenes/Label_1.tif"),
)
def test_faults_of_rasters_that_cannot_be_read(place, capfd, monkeypatch, fault):
    check(capfd, monkeypatch, fault)


@table(
    *one_block_rows("extract", "scene.tif", "label.tif"),
    *one_block_rows("batch", "scenes/Image_1.tif", "scenes/Label_1.tif"),
)
def test_faults_of_headers_that_claim_more_than_there_can_be(
    place, capfd, monkeypatch, fault
):
    check(capfd, monkeypatch, fault)


def other_crs(path: str) -> None:
    """The same numbers in a CRS of another continent."""
    rewrite(path, crs="EPSG:32733")


@table(
    row("extract", "scene without CRS", partial(no_crs, "scene.tif"),
        r"scene.tif has no CRS; assign one"),
    row("extract", "label without CRS", partial(no_crs, "label.tif"),
        r"label.tif has no CRS; assign one"),
    row("batch", "scene without CRS", partial(no_crs, "scenes/Image_1.tif"),
        r"Image_1.tif has no CRS; assign one"),
    row("extract", "scene without georeferencing", partial(nowhere, "scene.tif"),
        r"scene.tif has no CRS; assign one"),
    row("extract", "label elsewhere", partial(elsewhere, "label.tif"),
        r"label.tif does not overlap scene.tif; .*CRS"),
    row("extract", "scene elsewhere", partial(elsewhere, "scene.tif"),
        r"No cell of grid.gpkg lies on scene.tif .*; check the CRS"),
    row("extract", "scene in the CRS of another continent", partial(other_crs, "scene.tif"),
        r"No cell of grid.gpkg lies on scene.tif .*; check the CRS"),
    row("extract", "label in the CRS of another continent", partial(other_crs, "label.tif"),
        r"label.tif does not overlap scene.tif; .*CRS"),
    row("extract", "wrong band count", nothing,
        r"--image_channels 4, but scene.tif has 3 bands; select them", "--image_channels 4"),
    row("extract", "band that is not there", nothing,
        r"--bands 4: scene.tif has bands 1 to 3", "--bands 1,4"),
    row("extract", "band of no such name", nothing,
        r"--bands 'B08': 0 bands of scene.tif have that description", "--bands B08"),
    row("batch", "scenes of other bands",
        lambda: (shutil.copy("scenes/Label_1.tif", "scenes/Label_2.tif"),
                 shutil.copy("scenes/Label_1.tif", "scenes/Image_2.tif")),
        r"Image_2.tif has 1 bands, but scenes/Image_1.tif 3; select them with --bands"),
    row("extract", "scene all nodata", partial(all_nodata, "scene.tif"),
        r"None of the 4 cells .*no valid pixel.*; check the nodata of scene.tif", late=True),
    row("extract", "scene all NaN", partial(all_nan, "scene.tif"),
        r"None of the 4 cells .*no valid pixel.*; check the nodata of scene.tif", late=True),
    row("extract", "unreadable block", partial(bad_block, "scene.tif"),
        r"Cannot read scene.tif: .*; copy or write it again", late=True),
    row("extract", "unreadable block of the label", partial(bad_block, "label.tif"),
        r"Cannot read label.tif: .*; copy or write it again", late=True),
)  # fmt: skip
def test_faults_of_rasters_that_do_not_fit(place, capfd, monkeypatch, fault):
    check(capfd, monkeypatch, fault)


@table(
    *output_rows("extract", "--output", "out"),
    *output_rows("batch", "--output", "out"),
    row("extract", "Patch is a file", lambda: (Path("out").mkdir(),
        Path("out/Patch").write_text("x")), r"out/Patch is a file, expected a folder; choose"),
    row("extract", "patches are there", lambda: shutil.copytree("data", "out"),
        r"out/Patch already holds patches; choose another --output, or give --overwrite"),
    row("batch", "no such folder", nothing, r"No folder nowhere; .*--data_dir",
        "--data_dir nowhere"),
)  # fmt: skip
def test_faults_of_outputs(place, capfd, monkeypatch, fault):
    check(capfd, monkeypatch, fault)


@pytest.mark.parametrize("kind", LEGAL)
def test_no_faults_of_legal_scenes_in_extraction(place, kind):
    LEGAL[kind]("scene.tif")
    pixels, profile = read("scene.tif")
    if kind == "rotated":  # then label and cells lie on the same pixels
        transform = profile["transform"]
        rewrite("label.tif", transform=transform)
        a, b, c, d, e, f = transform[:6]
        corners = [box(x, y, x + 32, y + 32) for y in (0, 32) for x in (0, 32)]
        cells = [affinity.affine_transform(s, (a, b, d, e, c, f)) for s in corners]
        grid(cells).to_file("grid.gpkg")
    assert run("extract", "--min_valid 0") == 0
    valid = valid_pixels(pixels, profile["nodata"])
    patches = list(Path().glob("out/Patch/*/images/*.tif"))
    assert patches
    for patch in patches:
        with rasterio.open(patch) as file:
            place = ~profile["transform"] * file.transform
            column, row = round(place.c), round(place.f)
            assert (column, row) == pytest.approx((place.c, place.f), abs=1e-6)
            assert place.a == pytest.approx(1) and place.b == pytest.approx(0, abs=1e-9)
            padded = np.pad(pixels, [(0, 0), (SIDE, SIDE), (SIDE, SIDE)])
            inside = np.pad(valid, SIDE)
            window = (slice(row + SIDE, row + SIDE + 32),) + (
                slice(column + SIDE, column + SIDE + 32),
            )
            mask = file.dataset_mask() > 0
            seen = valid_pixels(file.read(), file.nodata) & mask
            np.testing.assert_array_equal(seen, inside[window])
            np.testing.assert_array_equal(
                file.read()[:, seen], padded[(slice(None), *window)][:, seen]
            )
            assert file.dtypes[0] == pixels.dtype.name


def test_no_faults_of_a_label_on_another_pixel_grid(place):
    """It is warped, nearest neighbour."""
    expected, profile = read("label.tif")
    finer = profile["transform"] * Affine.scale(0.5)
    rewrite(
        "label.tif", lambda p: p.repeat(2, axis=1).repeat(2, axis=2), transform=finer
    )
    assert run("extract") == 0
    for path in Path("out").rglob("labels/*.tif"):
        with rasterio.open(path) as file:
            place = ~profile["transform"] * file.transform
            rows, columns = (slice(round(v), round(v) + 32) for v in (place.f, place.c))
            np.testing.assert_array_equal(file.read(1), expected[0, rows, columns])


@table(
    row("extract", "several bands", lambda: rewrite("label.tif", lambda p: p.repeat(3, 0)),
        r"label.tif is a picture, whose classes are colours.*; it holds 000000, 010101"),
    row("extract", "two bands", lambda: rewrite("label.tif", lambda p: p.repeat(2, 0)),
        r"label.tif has 2 bands; a label or a class map has one"),
    row("batch", "several bands",
        lambda: rewrite("scenes/Label_1.tif", lambda p: p.repeat(2, 0)),
        r"Label_1.tif has 2 bands; a label or a class map has one"),
    row("extract", "fractions", label_of([0, 1.5], "float32"),
        r"label.tif holds 1.5, which is not a class; labels are whole numbers", late=True),
    row("extract", "negative", label_of([0, -3], "int16"),
        r"label.tif holds -3: classes are 0 to 254.*; name .* with --label_values", late=True),
    row("extract", "too large", label_of([0, 1000], "int16"),
        r"label.tif holds 1000: classes are 0 to 254.*--label_values", late=True),
    row("extract", "all unlabelled", label_of(255),
        r"None of the 4 cells .*no labelled pixel.*; check the nodata", late=True),
    row("extract", "no such value", nothing, r"None of .* gives a patch .*no labelled pixel",
        "--label_values 7,8", late=True),
    row("extract", "more classes than names", label_of([0, 2]),
        r"--class_names names 2 classes, but label.tif holds class 2", "--class_names a,b",
        late=True),
    row("extract", "values of a label that are no numbers", nothing,
        r"--label_values a,b: expected whole numbers", "--label_values a,b", 2),
    row("extract", "a value twice", nothing,
        r"--label_values 1,1: the value 1 is given twice", "--label_values 1,1", 2),
    row("extract", "column of a raster", nothing,
        r"--label_column class: expected a vector label .*label.tif is a raster",
        "--label_column class", 2),
    row("extract", "no such column of a vector label", lambda: grid().to_file("label.gpkg"),
        r"Unknown --label_column 'idd'; did you mean 'id'",
        "--label label.gpkg --label_column idd", 2),
    row("extract", "values without a column", nothing,
        r"--label_values 1,2: expected --label_column with it",
        "--label grid.gpkg --label_values 1,2", 2),
    row("extract", "vector label elsewhere",
        lambda: grid([cell(1000, 1000)]).to_file("label.gpkg"),
        r"label.gpkg does not overlap scene.tif; check the CRS", "--label label.gpkg"),
)  # fmt: skip
def test_faults_of_labels(place, capfd, monkeypatch, fault):
    check(capfd, monkeypatch, fault)


def test_faults_of_a_label_of_one_class_are_reported(place, capfd):
    label_of(1)()
    assert run("extract") == 0
    assert "all labelled pixels are class 1" in capfd.readouterr().err


def drawn(cells, path="grid.gpkg", crs=CRS, **columns) -> Callable:
    def damage() -> None:
        Path(path).unlink(missing_ok=True)
        grid(cells, crs, **columns).to_file(path)

    return damage


def no_cells() -> None:
    grid().iloc[:0].to_file("grid.gpkg")


def no_geometry() -> None:
    Path("grid.csv").write_text("id,name\n1,a\n")


def without(suffix: str) -> Callable:
    return lambda: Path(f"grid.{suffix}").unlink()


@table(
    row("extract", "missing", lambda: os.unlink("grid.gpkg"),
        r"grid.gpkg cannot be read as a vector file: .*No such file"),
    row("extract", "empty file", lambda: empty("grid.gpkg"),
        r"grid.gpkg cannot be read as a vector file: .*; give"),
    row("extract", "text", lambda: text("grid.gpkg"),
        r"grid.gpkg cannot be read as a vector file: .*; give"),
    row("extract", "cut off", lambda: cut_off("grid.gpkg"),
        r"grid.gpkg cannot be read as a vector file: .*; give"),
    row("extract", "a raster", nothing,
        r"scene.tif cannot be read as a vector file: .*; give", "--grid scene.tif"),
    row("extract", "no cells", no_cells, r"grid.gpkg has no geometries; draw"),
    row("extract", "no geometry", no_geometry, r"grid.csv has no geometries; draw",
        "--grid grid.csv"),
    row("extract", "lines", drawn([LineString([(ORIGIN[0], ORIGIN[1]), (5e5, 4.6e6)])]),
        r"No cell of grid.gpkg lies on .*no polygon"),
    row("extract", "outside the scene", drawn([cell(500, 500)]),
        r"No cell of grid.gpkg lies on scene.tif .*outside the image.*; check the CRS"),
    row("extract", "in degrees without saying so", drawn([box(3, 41, 4, 42)]),
        r"No cell of grid.gpkg lies on scene.tif .*; check the CRS"),
    row("extract", "no CRS", drawn(None, "nocrs.gpkg", crs=None),
        r"nocrs.gpkg has no CRS; add it", "--grid nocrs.gpkg"),
    row("extract", "absurdly large cell", drawn([cell(0, 0, 5000)]),
        r"patch_001 of grid.gpkg covers 5000 x 5000 pixels.*; use a finer grid"),
    row("extract", "cells smaller than a pixel", drawn([cell(3.6, 3.6, 0.3)]),
        r"No cell of grid.gpkg lies on .*smaller than a pixel"),
    row("extract", "no .shx", without("shx"),
        r"grid.shp cannot be read as a vector file: .*grid\.shx.*; give .*beside it",
        "--grid grid.shp"),
    row("extract", "no .prj", without("prj"), r"grid.shp has no CRS; add it .*\.prj",
        "--grid grid.shp"),
    row("extract", "no column of ids", nothing,
        r"Unknown --id_column 'idd'; did you mean 'id'", "--id_column idd", 2),
    row("extract", "duplicate ids", drawn(None, id=[1, 2, 2, 3]),
        r"--id_column id: 1 ids are not unique, .* as '002'; name another",
        "--id_column id"),
    row("extract", "empty id", drawn(None, id=["a", "b", "", None]),
        r"--id_column id: 2 ids are not unique, empty.*; name another", "--id_column id"),
    row("extract", "ids too long", drawn(None, id=["n" * 300 + c for c in "abcd"]),
        r"--id_column id: 4 ids .* too long.*; name another", "--id_column id"),
    row("batch", "no grid of a scene", nothing,
        r"Files without a partner: .*Image_1.tif.*; add the missing",
        "--use_per_image_grid"),
    row("batch", "grid missing", nothing, r"none.gpkg cannot be read as a vector file",
        "--grid none.gpkg"),
)  # fmt: skip
def test_faults_of_grids(place, capfd, monkeypatch, fault):
    check(capfd, monkeypatch, fault)


def test_faults_of_ids_never_lead_out_of_the_output(place):
    before = snapshot(place)
    drawn(None, id=["../../../evil", "/tmp/evil", "a/b\\c", "..\x00.."[:2]])()
    assert run("extract") == 0
    (place / "grid.gpkg").write_bytes(before["grid.gpkg"])
    after = snapshot(place)
    assert all(name.startswith("out") for name in after.keys() - before.keys())
    assert all(after[name] == before[name] for name in before)
    assert len(patches()) == 4
    assert all(re.fullmatch(r"[\w.-]+", path.name) for path in patches())


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(without("dbf"), id="no .dbf"),
        pytest.param(
            drawn(None, "grid.shp", id=[7, 7, None, 1]), id="duplicate ids by default"
        ),
    ],
)
def test_no_faults_of_ids_that_can_be_done_without(place, damage):
    damage()
    assert run("extract", "--grid grid.shp") == 0
    assert [p.stem for p in sorted(patches(), key=lambda p: p.name)] == [
        f"patch_{number:03}" for number in (1, 2, 3, 4)
    ]


def test_no_faults_of_a_bow_tie_cell_whose_label_is_that_of_its_polygons(place):
    left, bottom, right, top = cell(0, 0).bounds
    bow_tie = Polygon([(left, top), (right, bottom), (right, top), (left, bottom)])
    drawn([bow_tie, cell(32, 32)])()
    assert run("extract") == 0
    (path,) = Path("out").rglob("labels/patch_001.tif")
    label = read(str(path))[0][0]
    assert 0.45 < (label == 255).mean() < 0.55


def test_no_faults_of_rotated_cells(place):
    turned = affinity.rotate(cell(16, 16), 45)
    drawn([turned, cell(0, 0)])()
    assert run("extract", "--patch_size 45 --min_valid 0") == 0
    (path,) = Path("out").rglob("labels/patch_001.tif")
    label = read(str(path))[0][0]
    assert 0.45 < (label == 255).mean() < 0.55


@pytest.mark.slow
def test_no_faults_of_a_hundred_thousand_cells(place):
    """Cells outside are passed over quickly, and so are the names of all."""
    x, y = np.meshgrid(np.arange(400) * 32, np.arange(250) * 32)

    left, top = ORIGIN[0] + x.ravel() * PIXEL, ORIGIN[1] - y.ravel() * PIXEL
    cells = shapely.box(left, top - 320, left + 320, top)
    geopandas.GeoDataFrame(geometry=cells, crs=CRS).to_file("many.fgb")
    started = time.process_time()
    assert run("extract", "--grid many.fgb") == 0
    assert time.process_time() - started < 40
    assert len(patches()) == 4


@table(
    row("extract", "ratios that do not sum to one", nothing,
        r"--test_ratio sum to 1.1: expected a sum of 1",
        "--train_ratio 0.85 --val_ratio 0.15 --test_ratio 0.1", 2),
    row("extract", "ratio above one", nothing,
        r"--train_ratio 1.2: expected 0 to 1", "--train_ratio 1.2 --val_ratio 0 --test_ratio -0.2", 2),
    row("extract", "stride beside a grid", nothing, r"--stride with --grid .*one of the two",
        "--stride 8", 2),
    row("extract", "overwrite and resume", nothing, r"--overwrite and --resume",
        "--overwrite --resume", 2),
    row("extract", "blocks at random", nothing, r"--block_size 100.0: .*--split_by block",
        "--block_size 100", 2),
    row("extract", "names and values of other numbers", nothing,
        r"--class_names a,b,c: expected 2 names", "--label_values 1,2 --class_names a,b,c", 2),
    row("extract", "unknown interpolation", nothing,
        r"--interpolation: invalid choice: 'cubik' .*cubic", "--interpolation cubik", 2),
    row("extract", "unknown option", nothing, r"--patchsize", "--patchsize 8", 2),
    row("extract", "no value", nothing, r"--seed\S*: expected one argument", "--seed", 2),
    row("batch", "pattern without an id", nothing,
        r"--image_pattern \*.tif: expected one <id> in it", "--image_pattern '*.tif'", 2),
    row("batch", "two kinds of grids", nothing, r"--use_per_image_grid with --grid",
        "--use_per_image_grid --grid grid.gpkg", 2),
    row("batch", "patterns that nothing fits", nothing, r"No file in scenes matches --image_pattern S_<id>",
        "--image_pattern 'S_<id>.tif'"),
)  # fmt: skip
def test_faults_of_options(place, capfd, monkeypatch, fault):
    check(capfd, monkeypatch, fault)


@table(
    row("extract", "memory of the machine", patches_without_memory,
        r"The memory .*Unable to allocate 7.45 GiB.*; lower --patch_size or --workers",
        late=True),
    row("extract", "disk full", full_disk,
        r"No space left on device.*; free some, or write elsewhere", late=True),
    row("batch", "disk full", full_disk,
        r"No space left on device.*; free some, or write elsewhere", late=True),
    row("extract", "cells nearer to each other than the buffer", nothing,
        r"No \w+ patch is left .*; lower --buffer", "--buffer 100000", late=True),
    row("extract", "one block for three splits", nothing,
        r"The cells lie in 1 blocks of 1e\+06 m, too few.*; give a smaller --block_size",
        "--split_by block --block_size 1000000", late=True),
    row("extract", "a run under way",
        lambda: Path("out/.Patch-partial/images").mkdir(parents=True),
        r"A run into out is under way or unfinished: --resume .*--overwrite"),
)  # fmt: skip
def test_faults_of_surroundings(place, capfd, monkeypatch, fault):
    check(capfd, monkeypatch, fault)
