"""Where windows lie, their weights, and how rows and columns are shared out."""

from __future__ import annotations

import json
from itertools import pairwise
from math import ceil

import numpy as np
import pytest
from prediction_helpers import BELLS, WINDOWS

from prediction import tiling
from prediction.tiling import (
    Extent,
    WindowLayout,
    lay_windows,
    remaining,
    split_columns,
    split_rows,
    window_weights,
)

# --- sliding window ---------------------------------------------------------------------


@pytest.mark.parametrize(("patch_size", "overlap"), WINDOWS)
def test_weights_are_positive_and_sum_to_one_over_every_length(patch_size, overlap):
    for length in range(1, 211):
        layout = lay_windows(length, patch_size, overlap)
        total = np.zeros(max(length, layout.size))
        for start, weights in zip(layout.starts, layout.weights, strict=True):
            assert (weights > 0).all()
            total[start : start + layout.size] += weights
        np.testing.assert_allclose(total, 1, rtol=1e-6)


@pytest.mark.parametrize(("patch_size", "overlap"), WINDOWS)
def test_the_last_window_ends_at_the_edge_and_none_is_there_twice(patch_size, overlap):
    stride = patch_size - overlap
    for length in range(patch_size, 211):
        starts = lay_windows(length, patch_size, overlap).starts
        assert starts[-1] + patch_size == length
        steps = np.diff(starts)
        assert (steps[:-1] == stride).all()
        assert ((steps > 0) & (steps <= stride)).all()
        assert len(starts) == ceil((length - patch_size) / stride) + 1


@pytest.mark.parametrize(
    ("length", "patch_size", "size"),
    [(1, 512, 32), (32, 512, 32), (33, 512, 64), (98, 100, 100), (511, 512, 512)],
)
def test_a_side_shorter_than_a_patch_gets_one_window_of_a_multiple_of_32(
    length, patch_size, size
):
    layout = lay_windows(length, patch_size, patch_size // 4)
    assert isinstance(layout, WindowLayout)
    assert (layout.starts, layout.size) == ([0], size)


@pytest.mark.parametrize("form", BELLS)
@pytest.mark.parametrize(("patch_size", "overlap"), WINDOWS)
def test_weights_of_every_blend_are_positive_and_sum_to_one(form, patch_size, overlap):
    for length in (1, 31, 33, 64, 99, 100, 101, 187, 210):
        layout = lay_windows(length, patch_size, overlap, form)
        assert layout.weights.dtype == np.float32 and (layout.weights > 0).all()
        total = np.zeros(max(length, layout.size))
        for start, weights in zip(layout.starts, layout.weights, strict=True):
            total[start : start + layout.size] += weights
        np.testing.assert_allclose(total, 1, rtol=1e-6)


@pytest.mark.parametrize("form", ["hann", "gaussian", "linear"])
def test_weights_rise_to_the_middle_of_a_window_and_are_symmetric(form):
    weights = window_weights(64, form)
    assert (np.diff(weights[:32]) > 0).all()
    np.testing.assert_allclose(weights, weights[::-1], rtol=1e-12)


# --- parts of a scene -------------------------------------------------------------------


SIDES = [(1, 32, 0), (40, 64, 16), (300, 32, 8), (301, 64, 48), (1000, 64, 16)]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
@pytest.mark.parametrize("side", SIDES)
def test_batches_hold_every_window_once_and_are_the_same_for_every_part(
    side, batch_size
):
    layout = lay_windows(*side)
    groups = tiling.batch_groups(layout, batch_size, 0, layout.length)
    together = np.concatenate(groups).tolist()
    assert together == list(range(len(layout.starts)))
    sizes = [len(group) for group in groups]
    assert max(sizes) <= batch_size and max(sizes) - min(sizes) <= 1
    assert len(groups) == ceil(len(layout.starts) / batch_size)
    whole = [group.tolist() for group in groups]
    for first in range(0, layout.length, 23):
        for last in {min(first + step, layout.length) for step in (1, 50, 400)}:
            part = tiling.batch_groups(layout, batch_size, first, last)
            part = [group.tolist() for group in part]
            assert all(group in whole for group in part)
            needed = {
                number
                for number, start in enumerate(layout.starts)
                if start < last and start + layout.size > first
            }
            assert needed <= {number for group in part for number in group}
            assert all(needed & set(group) for group in part)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("side", SIDES)
def test_pieces_of_columns_follow_each_other_without_gap(side, batch_size):
    layout = lay_windows(*side)
    most = len(tiling.batch_groups(layout, batch_size, 0, layout.length))
    for pieces in (1, 2, 3, 7, 1000):
        whole = split_columns(layout, batch_size, pieces, 0, layout.length)
        assert len(whole) == min(pieces, most)
        first, last = layout.length // 5, layout.length - layout.length // 3
        part = split_columns(layout, batch_size, pieces, first, last)
        assert (part[0][0], part[-1][1]) == (first, last)
        assert all(left < right for left, right in part)
        cuts = whole
        assert cuts[0][0] == 0 and cuts[-1][1] == layout.length
        assert all(one[1] == other[0] for one, other in pairwise(cuts))
        assert all(left < right for left, right in cuts)
        assert json.loads(json.dumps(cuts)) == [list(cut) for cut in cuts]


@pytest.mark.parametrize("side", SIDES)
def test_shares_of_rows_follow_each_other_without_gap(side):
    layout = lay_windows(*side)
    for top, bottom in (
        (0, layout.length),
        (layout.length // 3, layout.length * 2 // 3 + 1),
    ):
        for of in (1, 2, 3, 50):
            shares = [
                split_rows(layout, top, bottom, number, of) for number in range(of)
            ]
            rows = [row for share in shares if share for row in range(*share)]
            assert rows == list(range(top, bottom))
            assert shares[0] and all(
                share is None or share[0] < share[1] for share in shares
            )
            inner = {share[0] for share in shares if share} - {top}
            assert inner <= set(layout.starts)


@pytest.mark.parametrize("seed", range(30))
def test_what_remains_of_a_part_is_what_no_finished_part_holds(seed):
    rng = np.random.default_rng(seed)
    part = Extent(5, 40, 10, 20)
    done = []
    for _ in range(rng.integers(0, 8)):
        top, bottom = np.sort(rng.choice(50, 2, replace=False)).tolist()
        columns = [(10, 20), (0, 30), (10, 15), (20, 30)][rng.integers(4)]
        done.append(Extent(top, bottom, *columns))
    found = remaining(done, part)
    missing = {
        row
        for row in range(5, 40)
        if not any(
            d.top <= row < d.bottom and d.left <= 10 and d.right >= 20 for d in done
        )
    }
    rows = [row for left in found for row in range(left.top, left.bottom)]
    assert rows == sorted(missing)
    assert all(left[2:] == (10, 20) and left.top < left.bottom for left in found)
    assert all(one.bottom < other.top for one, other in pairwise(found))
