"""Areas that are merged to a smallest one: the classes of a map, whatever the strips."""

from __future__ import annotations

import numpy as np
import pytest
from area_helpers import NODATA, connected, noise, picture, sieved
from scipy import ndimage

from common.errors import RasterError
from common.sieve import (
    Areas,
    MapRows,
    centre_pixel,
    fewest_pixels,
    sieve,
    sieved_strips,
)

STRIPS = [1, 3, 7, 100]


def sieved_map(classes: np.ndarray, fewest: int, strip: int) -> np.ndarray:
    """What the strips of a map (H, W) are after a sieve."""
    known = np.where(classes == NODATA, -1, classes).astype(np.int32)
    rows = MapRows(lambda top, bottom: known[top:bottom], len(known))
    tops, parts = zip(*sieved_strips(rows, fewest, strip))
    assert list(tops) == list(range(0, len(classes), strip))
    found = np.concatenate(parts)
    return np.where(found < 0, NODATA, found)


@pytest.mark.parametrize("strip", STRIPS)
@pytest.mark.parametrize("grain, fewest", [(1, 1), (1, 2), (1, 60), (2, 9), (3, 30)])
def test_a_sieved_map_follows_the_rule_in_strips_of_any_height(strip, grain, fewest):
    classes = noise(18, 15, 4, 5, grain, nodata=0.25)
    found = sieved_map(classes, fewest, strip)
    np.testing.assert_array_equal(found, sieved(classes, fewest))


@pytest.mark.parametrize("fewest", [3, 12, 100])
def test_nothing_below_the_limit_is_left_but_islands_in_nodata(fewest):
    islands = 0
    for seed in range(4):
        classes = noise(60, 50, 5, seed, nodata=0.4)
        found = sieved_map(classes, fewest, 16)
        np.testing.assert_array_equal(found == NODATA, classes == NODATA)
        for area in connected(found):
            if area.sum() < fewest:
                beside = ndimage.binary_dilation(area) & ~area
                assert (found[beside] == NODATA).all()
                islands += 1
    assert islands


def test_an_area_reaches_its_limit_with_neighbours_that_are_small_too():
    classes = picture(
        "0123 1032 2301 3210"
    )  # GDAL's sieve finds no large neighbour here
    assert len(np.unique(sieved_map(classes, 16, 2))) == 1


def test_a_long_chain_of_areas_is_sieved():
    count = 200_000
    rng = np.random.default_rng(0)
    pixels = rng.integers(1, 30, count)
    classes = (np.arange(count) % 2).astype(np.int32)
    last = np.zeros(count, np.int32)
    areas = Areas(classes, pixels, pixels * 100.0, last)
    chained = np.stack([np.arange(count - 1), np.arange(1, count)])
    heirs, _ = sieve(areas, chained, 10)
    sums = np.bincount(heirs, pixels)
    assert sums.sum() == pixels.sum()
    assert sums[sums > 0].min() >= 10


def test_square_metres_are_pixels_by_the_one_at_the_centre():
    areas = np.array([80.0, 90, 100, 110, 120])
    pixel = centre_pixel("map.tif", areas, "--sieve")
    assert pixel == 100
    found = [fewest_pixels(metres, pixel) for metres in (1e-320, 99, 100, 101, 1000)]
    assert found == [1, 1, 1, 2, 10]
    assert fewest_pixels(0.3, 0.1) == 3  # which is 2.9999999999999996
    assert fewest_pixels(1e300, pixel) > 2**60


@pytest.mark.parametrize("areas", [None, np.zeros(3), np.full(3, np.nan)])
def test_a_map_whose_pixels_have_no_known_size_is_refused(areas):
    with pytest.raises(RasterError, match="map.tif has no CRS .* --sieve cannot"):
        centre_pixel("map.tif", areas, "--sieve")
