"""Windows: overlap with a raster, starts, bounds."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from rasterio.windows import Window

from common.windows import pixel_bounds, window_starts, window_within


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        (Window(1, 2, 3, 4), Window(1, 2, 3, 4)),
        (Window(-2, -3, 5, 5), Window(0, 0, 3, 2)),
        (Window(8, 4, 5, 5), Window(8, 4, 2, 2)),
        (Window(-5, -5, 50, 50), Window(0, 0, 10, 6)),
        (Window(10, 0, 2, 2), None),
        (Window(0, -2, 2, 2), None),
        (Window(3, 3, 0, 2), None),
    ],
)
def test_window_within_is_the_overlap_with_the_raster_or_none(window, expected):
    assert window_within(window, 10, 6) == expected


@pytest.mark.parametrize("patch_size", [1, 3, 8, 32])
@pytest.mark.parametrize("overlap", [0, 1, 2, 16])
def test_windows_cover_every_length_once_each_and_end_at_the_edge(patch_size, overlap):
    stride = max(1, patch_size - overlap)
    for length in range(1, 100):
        starts = window_starts(length, patch_size, stride)
        assert starts == sorted(set(starts))
        assert starts[0] == 0
        assert all(b - a <= stride for a, b in pairwise(starts))
        if length >= patch_size:
            assert starts[-1] + patch_size == length
            assert len(starts) == math.ceil((length - patch_size) / stride) + 1
        else:
            assert starts == [0]


def test_a_pixel_belongs_to_bounds_that_hold_its_centre():
    assert pixel_bounds((0.25, 1.75, 3.25, 4.75)) == Window(0, 2, 3, 3)
    assert pixel_bounds((-2.25, -0.75, 1, 2)) == Window(-2, -1, 3, 3)


def test_adjacent_cells_share_no_pixel_and_leave_no_gap():
    rng = np.random.default_rng(0)
    halves = np.arange(-6, 7) / 2
    for edges in (halves, *np.sort(rng.uniform(-20, 20, (200, 12)))):
        cells = [
            pixel_bounds((left, left, right, right)) for left, right in pairwise(edges)
        ]
        for one, other in pairwise(cells):
            assert one.col_off + one.width == other.col_off
            assert one.row_off + one.height == other.row_off


@pytest.mark.parametrize("edge", [-3, 0, 7, 7.5])
def test_projection_noise_moves_no_edge(edge):
    windows = {
        pixel_bounds((edge + noise, edge - noise, 20 + noise, 20 - noise))
        for noise in (-4e-4, -1e-9, 0, 1e-9, 4e-4)
    }
    assert len(windows) == 1
