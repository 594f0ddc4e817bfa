"""Nodata that a scene declares, that an option gives, and fill that nobody declares."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import write_geotiff

from common.errors import RasterError
from common.nodata import nodata_advice
from common.rasters import Source, open_raster

fault = pytest.mark.fault(57)


def bytes_of_land(height: int = 400, width: int = 300) -> np.ndarray:
    """Noise (3, height, width) of 1..254."""
    rng = np.random.default_rng(3)
    return rng.integers(1, 255, (3, height, width)).astype(np.uint8)


def corner(pixels: np.ndarray, share: float) -> np.ndarray:
    """The mask of a triangle at the upper left that takes a share of an image."""
    height, width = pixels.shape[1:]
    row, column = np.mgrid[:height, :width]
    return row / height + column / width < np.sqrt(2 * share)


def advice(path, nodata=None) -> tuple[str | None, str | None]:
    with open_raster(path) as file:
        return nodata_advice(Source(file, nodata=nodata))


@fault
@pytest.mark.parametrize("value", [0, 255])
@pytest.mark.parametrize("share", [0.03, 0.31])
def test_fill_that_is_not_declared_is_reported(tmp_path, value, share):
    pixels = bytes_of_land()
    pixels[:, corner(pixels, share)] = value
    path = write_geotiff(tmp_path / "a.tif", pixels)
    partly, fill = advice(path)
    assert partly is None
    found = (pixels == value).all(axis=0).mean()
    assert f"about {found:.1%} of {path}, in large areas at its border" in fill
    assert f"holds {value} in all bands" in fill
    assert f"give --nodata={value}" in fill
    assert advice(path, nodata=value) == (None, None)
    declared = write_geotiff(tmp_path / "b.tif", pixels, nodata=value)
    assert advice(declared) == (None, None)


@fault
def test_fill_of_several_values_is_masked(tmp_path):
    pixels = bytes_of_land()
    pixels[:, corner(pixels, 0.2)] = np.array([7, 8, 9])[:, None]
    _, fill = advice(write_geotiff(tmp_path / "a.tif", pixels))
    assert "(7, 8, 9) in its bands" in fill and "--nodata" not in fill


@fault
@pytest.mark.parametrize("place", ["middle", "scattered", "small", "noise", "rows"])
def test_what_is_no_fill_is_not_reported(tmp_path, place):
    """Constant areas inside, many small ones, one below 2 %, and areas that are not constant."""
    pixels = bytes_of_land()
    if place == "middle":
        pixels[:, 60:340, 60:240] = 255
    elif place == "scattered":
        pixels[:, np.random.default_rng(0).random(pixels.shape[1:]) < 0.4] = 255
    elif place == "small":
        pixels[:, corner(pixels, 0.015)] = 255
    elif place == "noise":
        pixels[:, :, :100] = np.random.default_rng(0).integers(254, 256, (400, 100))
    else:
        pixels[:, ::4] = 255
    assert advice(write_geotiff(tmp_path / "a.tif", pixels)) == (None, None)


@fault
def test_a_given_nodata_value_acts_as_a_declared_one(tmp_path):
    pixels = bytes_of_land(20, 20)
    pixels[:, :5] = 255
    pixels[0, 5] = 255
    with (
        open_raster(write_geotiff(tmp_path / "a.tif", pixels)) as file,
        open_raster(write_geotiff(tmp_path / "b.tif", pixels, nodata=255)) as declared,
    ):
        given = Source(file, nodata=255)
        expected = Source(declared)
        np.testing.assert_array_equal(given.read()[1], expected.read()[1])
        assert not expected.read()[1][:5].any() and expected.read()[1][5:].all()
        # it takes the place of the declared one
        assert Source(declared, nodata=0).read()[1].all()
        with pytest.raises(RasterError, match="--nodata -9999: .*uint8"):
            Source(file, nodata=-9999)
