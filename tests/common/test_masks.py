"""Masks read onto the pixels of a scene."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import rasterio
from pyproj import Geod
from rasterio.crs import CRS
from rasterio.enums import ColorInterp
from rasterio.transform import Affine, from_origin
from rasterio.warp import transform as transform_points
from rasterio.windows import Window

from common.errors import OptionError, RasterError
from common.mask_options import Mask, MaskOptions, MaskRule
from common.masks import (
    CLOUD,
    FILL,
    VALID,
    MaskReader,
    classify,
    grown,
    open_mask,
    report_text,
)

UTM = CRS.from_epsg(32632)
SCENE = from_origin(700_000, 4_900_000, 10, 10)


def write_mask(
    path: Path, pixels: np.ndarray, metres=10.0, shift=(0, 0), **more
) -> str:
    """A mask whose corner lies so many metres right of and below the scene's."""
    corner = 700_000 + shift[0], 4_900_000 - shift[1]
    profile = {
        "height": pixels.shape[0], "width": pixels.shape[1], "count": 1, "dtype": pixels.dtype,
        "crs": UTM, "transform": from_origin(*corner, metres, metres),
    }  # fmt: skip
    with rasterio.open(path, "w", **profile | more) as file:
        file.write(pixels, 1)
    return str(path)


def valid_pixels(
    path: str, rule: MaskRule, window=None, buffer=(0.0, 0.0), size=(8, 8)
):
    """The valid pixels of a scene of 8 x 8, and what was counted."""
    with MaskReader(path, rule, UTM, SCENE, size, buffer=buffer) as reader:
        return reader.read(window or Window(0, 0, *size)), reader.counts


@pytest.mark.parametrize(
    "rule, expected",
    [
        (MaskRule(values=(3, 9)), [VALID, VALID, CLOUD, CLOUD]),
        (MaskRule(values=(3,), fill_values=(0,)), [FILL, VALID, CLOUD, VALID]),
        (MaskRule(keep=(1,)), [CLOUD, VALID, CLOUD, CLOUD]),
        (MaskRule(bits=(1, 3)), [VALID, VALID, CLOUD, CLOUD]),
        (MaskRule(bits=(3,), fill_bits=(0,)), [VALID, FILL, FILL, FILL]),
    ],
)
def test_rules_say_what_a_value_means(rule, expected):
    assert classify(np.array([0, 1, 3, 9], np.uint8), rule).tolist() == expected


def test_clouds_grow_by_a_disc():
    cloud = np.zeros((7, 7), bool)
    cloud[3, 3] = True
    y, x = np.mgrid[-3:4, -3:4]
    assert (grown(cloud, (2, 2)) == (np.hypot(x, y) <= 2)).all()
    assert (grown(cloud, (0.9, 0.9)) == cloud).all()


@pytest.mark.parametrize("latitude", [1, 45, 68])
def test_a_buffer_is_in_metres_in_every_direction_where_pixels_are_in_degrees(
    tmp_path, latitude
):
    size, metres = 101, 100.0
    transform = from_origin(10, latitude, 1e-4, 1e-4)
    cloud = np.zeros((size, size), np.uint8)
    cloud[50, 50] = 1
    place = {"crs": "EPSG:4326", "transform": transform}
    path = write_mask(tmp_path / "mask.tif", cloud, **place)
    with rasterio.open(path) as scene:
        mask = Mask(path, MaskRule(values=(1,)), metres)
        with open_mask(mask, scene) as reader:
            valid = reader.read(Window(0, 0, size, size))
    column, row = np.meshgrid(np.arange(size) + 0.5, np.arange(size) + 0.5)
    lon, lat = transform * (column.ravel(), row.ravel())
    middle = (
        np.full(lon.size, lon[lon.size // 2]),
        np.full(lon.size, lat[lon.size // 2]),
    )
    away = Geod(ellps="WGS84").inv(*middle, lon, lat)[2].reshape(size, size)
    assert not valid[away <= 0.99 * metres].any()
    assert valid[away >= 1.02 * metres].all()


def test_a_mask_on_other_pixels_is_read_by_the_nearest(tmp_path):
    pixels = np.arange(16, dtype=np.uint8).reshape(4, 4)
    path = write_mask(tmp_path / "m.tif", pixels, 20)
    valid, _ = valid_pixels(path, MaskRule(values=(5, 10)))
    assert (valid == ~np.isin(np.kron(pixels, np.ones((2, 2))), (5, 10))).all()


def worst(bad: np.ndarray, counts: float, first: float, size: int) -> np.ndarray:
    """Which pixels of a scene hold a bad one, also in part, if each is as wide as so many.

    The scene begins so many pixels right of the corner of the mask, and below.
    """
    ends = [first + counts * np.array([i, i + 1]) for i in range(size)]
    sides = [slice(int(a + 1e-6), math.ceil(b - 1e-6)) for a, b in ends]
    return np.array([[bad[rows, columns].any() for columns in sides] for rows in sides])


@pytest.mark.parametrize("at_once", [2**22, 100, 1])
@pytest.mark.parametrize(
    "metres, first", [(5, 0), (4, 3), (3, 5.5), (0.7, 12), (0.1, 20), (9.5, 0.3)]
)
def test_all_of_the_smaller_pixels_of_a_mask_count(
    tmp_path, monkeypatch, metres, first, at_once
):
    monkeypatch.setattr("common.coarsening.AT_ONCE", at_once)
    rng = np.random.default_rng(3)
    side = round(8 * 10 / metres + first + 30)
    pixels = np.zeros((side, side), np.uint8)
    pixels[tuple(rng.integers(0, side, (2, 30)))] = 1
    pixels[tuple(rng.integers(0, side, (2, 5)))] = 2
    shift = -first * metres, -first * metres
    path = write_mask(tmp_path / "m.tif", pixels, metres, shift, nodata=2)
    rule = MaskRule(values=(1,))
    valid, _ = valid_pixels(path, rule)
    assert (~valid == worst(pixels > 0, 10 / metres, first, 8)).all()
    parts = [valid_pixels(path, rule, Window(x, 0, 3, 8))[0] for x in (0, 3, 5)]
    assert (parts[2] == valid[:, 5:]).all()
    assert (np.hstack(parts[:2]) == valid[:, :6]).all()
    bits, _ = valid_pixels(path, MaskRule(bits=(0,)))
    assert (~bits == worst(pixels > 0, 10 / metres, first, 8)).all()


def test_smaller_pixels_of_a_mask_that_ends_within_the_scene(tmp_path):
    pixels = np.zeros((8, 8), np.uint8)
    pixels[7, 0] = pixels[1, 1] = 1
    path = write_mask(tmp_path / "m.tif", pixels, 5, (15, 0))
    valid, counts = valid_pixels(path, MaskRule(values=(1,)))
    assert np.argwhere(~valid).tolist() == [[0, 2], [3, 1]]
    assert counts == {"pixels": 64, "masked": 2, "beyond": 48}


def test_smaller_pixels_of_a_mask_in_another_crs(tmp_path):
    rng = np.random.default_rng(4)
    x, y = transform_points(UTM, "EPSG:4326", [700_000], [4_900_000])
    place = from_origin(x[0] - 3e-4, y[0] + 2e-4, 2e-5, 2e-5)
    pixels = (rng.random((80, 100)) < 0.003).astype(np.uint8)
    path = write_mask(tmp_path / "m.tif", pixels, crs="EPSG:4326", transform=place)
    valid, _ = valid_pixels(path, MaskRule(values=(1,)))
    rows, columns = np.nonzero(pixels)
    x, y = place * (columns + 0.5, rows + 0.5)
    column, row = ~SCENE * tuple(
        map(np.array, transform_points("EPSG:4326", UTM, x, y))
    )
    centres = np.zeros((8, 8), bool)
    seen = (column > 0) & (column < 8) & (row > 0) & (row < 8)
    centres[row[seen].astype(int), column[seen].astype(int)] = True
    assert centres.any() and not valid[centres].any()
    assert (~valid).sum() <= 2 * centres.sum()
    halves = [
        valid_pixels(path, MaskRule(values=(1,)), Window(0, t, 8, 4))[0] for t in (0, 4)
    ]
    assert (np.concatenate(halves) == valid).all()


@pytest.mark.parametrize("kind", ["internal", "alpha"])
def test_what_the_mask_of_a_finer_mask_hides_is_invalid_and_does_not_grow(
    tmp_path, kind
):
    path = mask_within(tmp_path / "m.tif", kind, transform=SCENE * Affine.scale(0.5))
    valid, counts = valid_pixels(path, MaskRule(values=(1,)))
    assert np.argwhere(~valid).tolist() == [[0, 0], [0, 1], [1, 0]]
    assert counts == {"pixels": 64, "masked": 3, "beyond": 60}
    grown_too, _ = valid_pixels(path, MaskRule(values=(1,)), buffer=(1.0, 1.0))
    # the cloud of a pixel grows, also where fill is in it; fill alone does not
    assert np.argwhere(~grown_too).tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1]]


def test_a_mask_in_another_crs_is_read(tmp_path):
    degrees = from_origin(11.0, 45.0, 0.5, 0.5)
    pixels = np.array([[1, 2], [1, 2]], np.uint8)
    path = write_mask(tmp_path / "m.tif", pixels, crs="EPSG:4326", transform=degrees)
    valid, counts = valid_pixels(path, MaskRule(keep=(2,)))
    assert valid.all() and counts["beyond"] == 0  # the scene lies near 11.5 E, 44.2 N
    valid, _ = valid_pixels(path, MaskRule(keep=(1,)))
    assert not valid.any()


def test_nodata_of_the_mask_is_invalid_and_what_lies_beyond_is_valid(tmp_path):
    pixels = np.zeros((4, 4), np.uint8)
    pixels[1, 1], pixels[2, 2] = 255, 1
    path = write_mask(tmp_path / "m.tif", pixels, nodata=255)
    valid, counts = valid_pixels(path, MaskRule(values=(1,)))
    assert np.argwhere(~valid).tolist() == [[1, 1], [2, 2]]
    assert counts == {"pixels": 64, "masked": 2, "beyond": 48}


def test_a_buffer_crosses_the_edges_of_windows_but_not_from_fill(tmp_path):
    pixels = np.zeros((8, 8), np.uint8)
    pixels[3, 4], pixels[6, 6] = 1, 255
    path = write_mask(tmp_path / "m.tif", pixels, nodata=255)
    whole, _ = valid_pixels(path, MaskRule(values=(1,)), buffer=(2.0, 2.0))
    parts = [
        valid_pixels(path, MaskRule(values=(1,)), Window(0, top, 8, 2), (2.0, 2.0))[0]
        for top in range(0, 8, 2)
    ]
    assert (np.concatenate(parts) == whole).all()
    assert not whole[5, 4] and not whole[3, 2] and whole[7, 6]


@pytest.mark.parametrize(
    "more, rule, words",
    [
        ({"crs": None}, MaskRule(values=(1,)), "has no CRS"),
        ({"dtype": "float32"}, MaskRule(bits=(1,)), "whole numbers"),
    ],
)
def test_masks_that_cannot_be_used_are_refused(tmp_path, more, rule, words):
    path = write_mask(tmp_path / "m.tif", np.zeros((4, 4), np.uint8), **more)
    with pytest.raises(RasterError, match=words):
        valid_pixels(path, rule)


def test_a_mask_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(RasterError, match="Cannot read the mask"):
        valid_pixels(str(tmp_path / "none.tif"), MaskRule(values=(1,)))


@pytest.mark.parametrize(
    "given, expected",
    [
        ({"mask_values": "3, 8"}, MaskRule(values=(3, 8))),
        ({"keep_values": "1"}, MaskRule(keep=(1,))),
        ({"mask_bits": "3,4"}, MaskRule(bits=(3, 4))),
    ],
)
def test_options_state_a_rule(given, expected):
    assert MaskOptions(mask="m.tif", **given).mask_rule == expected


@pytest.mark.parametrize(
    "given, words",
    [
        ({"mask": "m.tif"}, "--mask m.tif: expected one of"),
        ({"mask": "m.tif", "mask_values": "1", "mask_bits": "1"}, "expected one of"),
        ({"mask_values": "1"}, "--mask_values 1: expected --mask with it"),
        (
            {"mask": "m.tif", "mask_values": "1,a"},
            "--mask_values '1,a': expected whole",
        ),
        ({"mask": "m.tif", "mask_bits": "63"}, "numbers from 0 to 62"),
    ],
)
def test_options_that_cannot_be_right_are_refused(given, words):
    with pytest.raises(OptionError, match=words):
        MaskOptions(**given)


@pytest.mark.parametrize("nodata", [0, 1])
def test_a_value_that_a_rule_names_is_no_nodata(tmp_path, nodata):
    pixels = np.zeros((8, 8), np.uint8)
    pixels[:2] = 1
    path = write_mask(tmp_path / "mask.tif", pixels, nodata=nodata)
    rules = {0: MaskRule(keep=(0,)), 1: MaskRule(values=(1,))}
    with MaskReader(path, rules[nodata], UTM, SCENE, (8, 8)) as reader:
        assert np.array_equal(reader.read(Window(0, 0, 8, 8)), pixels == 0)
        said = report_text("mask.tif", [reader.summary()])
    assert f"mask.tif; its nodata value {nodata} is named, so it counts" in said


def test_nodata_that_a_rule_does_not_name_is_invalid(tmp_path):
    pixels = np.zeros((8, 8), np.uint8)
    pixels[:2] = 1
    path = write_mask(tmp_path / "mask.tif", pixels, nodata=0)
    with MaskReader(path, MaskRule(values=(1,)), UTM, SCENE, (8, 8)) as reader:
        assert not reader.read(Window(0, 0, 8, 8)).any()
        assert "named" not in report_text("m", [reader.summary()])


def test_clouds_that_the_mask_declares_as_nodata_grow(tmp_path):
    pixels = np.zeros((8, 8), np.uint8)
    pixels[:2] = 1
    path = write_mask(tmp_path / "mask.tif", pixels, nodata=1)
    valid, _ = valid_pixels(path, MaskRule(values=(1,)), buffer=(1.0, 1.0))
    assert not valid[:3].any() and valid[3:].all()


def mask_within(path: Path, kind: str, **more) -> str:
    """A mask of 4 x 4 zeros but for two values 1, of which one pixel is masked by itself."""
    values, own = np.zeros((4, 4), np.uint8), np.full((4, 4), 255, np.uint8)
    values[0, 3] = values[1, 1] = 1
    own[1, 1] = own[2, 0] = 0
    count = 2 if kind == "alpha" else 1
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=kind == "internal"):
        write_mask(path, values, count=count, **more)
        with rasterio.open(path, "r+") as file:
            if kind == "alpha":
                file.write(own, 2)
                file.colorinterp = ColorInterp.gray, ColorInterp.alpha
            else:
                file.write_mask(own)
    return str(path)


@pytest.mark.parametrize("kind", ["internal", "beside", "alpha"])
@pytest.mark.parametrize("nodata", [None, 7])
def test_what_the_mask_of_a_mask_hides_is_invalid(tmp_path, kind, nodata):
    path = mask_within(tmp_path / "m.tif", kind, nodata=nodata)
    assert (tmp_path / "m.tif.msk").exists() == (kind == "beside")
    for rule in (MaskRule(values=(1,)), MaskRule(keep=(0,)), MaskRule(bits=(0,))):
        valid, counts = valid_pixels(path, rule)
        assert np.argwhere(~valid).tolist() == [[0, 3], [1, 1], [2, 0]]
        assert counts == {"pixels": 64, "masked": 3, "beyond": 48}


def test_what_the_mask_of_a_mask_hides_does_not_grow(tmp_path):
    path = mask_within(tmp_path / "m.tif", "internal")
    valid, _ = valid_pixels(path, MaskRule(values=(1,)), buffer=(1.0, 1.0))
    assert not valid[0, 2] and not valid[1, 3]
    assert valid[1, 0] and valid[1, 2] and valid[3, 0]


def test_a_mask_with_an_alpha_band_in_another_crs_has_its_edge(tmp_path):
    place = {"crs": "EPSG:4326", "transform": from_origin(11.0, 45.0, 0.5, 0.5)}
    clear = np.zeros((2, 2), np.uint8)
    path = tmp_path / "m.tif"
    write_mask(path, clear, count=2, **place)
    with rasterio.open(path, "r+") as file:
        file.write(np.array([[255, 255], [255, 0]], np.uint8), 2)
        file.colorinterp = ColorInterp.gray, ColorInterp.alpha
    # the scene lies in the lower right pixel
    valid, counts = valid_pixels(str(path), MaskRule(values=(1,)))
    assert not valid.any() and counts["beyond"] == 0
