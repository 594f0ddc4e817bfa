"""Sliding a window over a scene: exact with toy predictors."""

from __future__ import annotations

import weakref
from itertools import combinations
from math import ceil

import numpy as np
import pytest
import torch
from prediction_helpers import (
    BELLS,
    SHAPES,
    WINDOWS,
    array_blocks,
    blend,
    everywhere,
    identity,
    in_torch,
    offsets,
    place_dependent,
    whole_scene,
)

from prediction.blending import blended_rows
from prediction.reader import RowBlock
from prediction.tiling import Extent, lay_windows


@pytest.mark.parametrize(("patch_size", "overlap"), WINDOWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_an_identity_predictor_gives_the_image_back(shape, patch_size, overlap):
    image = np.random.default_rng(1).random((2, *shape), np.float32)
    result, valid = blend(image, identity, patch_size, overlap)
    assert valid.shape == shape and valid.all()
    # float32 rounds each of the sums of 32 x 32 windows at overlap 31
    np.testing.assert_allclose(result, image, rtol=1e-6 if overlap < 31 else 1e-5)


@pytest.mark.parametrize(("patch_size", "overlap"), WINDOWS)
def test_a_constant_predictor_gives_the_constant(patch_size, overlap):
    image = np.zeros((1, 150, 83), np.float32)
    result, _ = blend(
        image, lambda images: np.full_like(images, 0.7), patch_size, overlap
    )
    np.testing.assert_allclose(result, 0.7, rtol=1e-6 if overlap < 31 else 1e-5)


@pytest.mark.parametrize(("patch_size", "overlap"), WINDOWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_streaming_equals_holding_the_whole_scene(shape, patch_size, overlap):
    image = np.random.default_rng(2).random((2, *shape), np.float32)
    result, _ = blend(image, place_dependent, patch_size, overlap)
    expected = whole_scene(image, place_dependent, patch_size, overlap)
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5)


def test_rows_come_from_top_to_bottom_each_once():
    image = np.arange(150, dtype=np.float32)[None, :, None].repeat(40, axis=2)
    result, _ = blend(image, identity, 48, 16)  # checks the order
    np.testing.assert_allclose(result, image, rtol=2e-6)


def test_rows_are_given_as_soon_as_no_further_window_adds_to_them():
    image, reached = np.zeros((1, 320, 32), np.float32), []

    def source():
        part = Extent(0, 320, 0, 32)
        for block in array_blocks(image, everywhere((320, 32)), part, range(0, 320, 8)):
            reached.append(block.bottom)
            yield block

    layouts = lay_windows(320, 32, 8), lay_windows(32, 32, 8)
    extent = Extent(0, 320, 0, 32)
    for done, _, _ in blended_rows(source(), in_torch(identity), layouts, extent, 1):
        # two batches, which are rows here, are cut ahead
        assert reached[-1] == min(done.top + 2 * 24 + 32, 320)
        assert done.bottom == min(done.top + 24, 320) or done.bottom == 320


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 100])
def test_the_batch_size_changes_nothing(batch_size):
    image = np.random.default_rng(3).random((2, 90, 150), np.float32)
    sizes = []

    def predict(images):
        sizes.append(len(images))
        return place_dependent(images)

    result, _ = blend(image, predict, 32, 8, batch_size=batch_size)
    expected, _ = blend(image, place_dependent, 32, 8, batch_size=4)
    np.testing.assert_array_equal(result, expected)
    across, down = len(offsets(150, 32, 24)), len(offsets(90, 32, 24))
    assert max(sizes) == min(batch_size, across)
    assert sum(sizes) == across * down


def test_windows_without_a_valid_pixel_are_not_predicted():
    image = np.random.default_rng(4).random((1, 128, 160), np.float32)
    valid = np.zeros((128, 160), bool)
    valid[40:50, 100:110] = True
    count = 0

    def predict(images):
        nonlocal count
        count += len(images)
        return images

    result, seen = blend(image, predict, 32, 0, valid)
    assert count == 1  # the block lies in the window at row 32 and column 96
    np.testing.assert_array_equal(seen, valid)
    np.testing.assert_allclose(result[:, valid], image[:, valid], rtol=2e-6)
    assert (result[:, :32] == 0).all() and (result[:, :, :96] == 0).all()


def test_a_scene_without_a_valid_pixel_is_never_predicted():
    def predict(images):
        raise AssertionError("predicted a window without a valid pixel")

    image = np.ones((2, 70, 50), np.float32)
    result, valid = blend(image, predict, 32, 8, np.zeros((70, 50), bool))
    assert not valid.any() and not result.any()


@pytest.mark.parametrize("seed", range(6))
def test_valid_pixels_beside_nodata_are_exact(seed):
    rng = np.random.default_rng(seed)
    image = rng.random((2, 120, 140), np.float32)
    valid = np.zeros((120, 140), bool)
    for _ in range(3):
        top, left = rng.integers(0, 110, 2)
        valid[top : top + 40, left : left + rng.integers(1, 30)] = True
    valid &= rng.random((120, 140)) > 0.3
    result, seen = blend(image, identity, 32, 12, valid)
    np.testing.assert_array_equal(seen, valid)
    np.testing.assert_allclose(result[:, valid], image[:, valid], rtol=2e-6)


def test_only_the_rows_that_windows_look_at_stay_in_memory():
    alive, most = 0, 0

    def forget(rows):
        nonlocal alive
        alive -= rows

    def source():
        nonlocal alive, most
        for top in range(0, 4096, 32):
            image = torch.ones(2, 32, 256)
            weakref.finalize(image, forget, 32)
            alive += 32
            most = max(most, alive)
            yield RowBlock(top, image, *[everywhere((32, 256))] * 2)

    layouts = lay_windows(4096, 64, 16), lay_windows(256, 64, 16)
    extent = Extent(0, 4096, 0, 256)
    stores = set()
    for _, part, _ in blended_rows(source(), in_torch(identity), layouts, extent, 2):
        assert part.all()
        stores.add(part.untyped_storage().nbytes())
    # a window, the blocks that begin and end beside it, and the next row of batches
    assert most <= 64 + 4 * 32
    assert stores == {2 * 64 * 256 * 4}


@pytest.mark.parametrize("form", BELLS)
@pytest.mark.parametrize(("patch_size", "overlap"), [(32, 8), (45, 11), (64, 48)])
def test_every_blend_equals_that_of_the_whole_scene_in_memory(
    form, patch_size, overlap
):
    image = np.random.default_rng(2).random((2, 143, 101), np.float32)
    result, _ = blend(image, place_dependent, patch_size, overlap, form=form)
    expected = whole_scene(image, place_dependent, patch_size, overlap, form)
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-6)


def test_blends_differ_and_none_is_the_plain_mean():
    image = np.random.default_rng(8).random((1, 40, 110), np.float32)
    results = {
        form: blend(image, place_dependent, 64, 32, form=form)[0] for form in BELLS
    }
    for one, other in combinations(results, 2):
        assert abs(results[one] - results[other]).max() > 1e-3
    # 110 columns: windows at 0, 32 and 46
    padded = np.pad(image, [(0, 0), (0, 24), (0, 0)], mode="reflect")
    windows = [
        place_dependent(padded[None, :, :, left : left + 64])[0, :, :40]
        for left in (0, 32, 46)
    ]
    pixel = [windows[0][..., 50], windows[1][..., 18], windows[2][..., 4]]
    np.testing.assert_allclose(
        results["none"][..., 50], np.mean(pixel, axis=0), rtol=1e-5
    )


@pytest.mark.parametrize("seed", range(20))
def test_a_part_of_a_scene_is_what_the_whole_holds_there_to_the_last_bit(seed):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(20, 200, 2)
    patch_size = int(rng.integers(32, 70))
    overlap = int(rng.integers(0, patch_size * 3 // 4))
    batch_size = int(rng.integers(1, 6))
    form = str(rng.choice(list(BELLS)))
    image = rng.random((2, height, width), np.float32)
    valid = everywhere((height, width))
    for _ in range(2):  # holes of nodata, some of them larger than a window
        row, column = rng.integers(0, [height, width])
        valid[row : row + 60, column : column + 80] = False

    def part(extent, cuts):
        return blend(
            image, place_dependent, patch_size, overlap, valid, batch_size, extent,
            cuts, form,
        )  # fmt: skip

    whole, known = part(None, ())
    np.testing.assert_array_equal(known, valid)
    for _ in range(6):
        top, bottom = np.sort(rng.choice(height + 1, 2, replace=False)).tolist()
        left, right = np.sort(rng.choice(width + 1, 2, replace=False)).tolist()
        cuts = rng.integers(0, height, rng.integers(0, 30)).tolist()
        found, seen = part(Extent(top, bottom, left, right), cuts)
        np.testing.assert_array_equal(found, whole[:, top:bottom, left:right])
        np.testing.assert_array_equal(seen, valid[top:bottom, left:right])


@pytest.mark.parametrize(("patch_size", "overlap"), WINDOWS)
def test_no_more_windows_are_predicted_than_the_overlap_needs(patch_size, overlap):
    image, count = np.zeros((1, 150, 203), np.float32), 0

    def predict(images):
        nonlocal count
        count += len(images)
        return images

    blend(image, predict, patch_size, overlap)
    stride = patch_size - overlap
    assert count == np.prod([ceil((n - patch_size) / stride) + 1 for n in (150, 203)])


def test_what_a_network_gives_for_nodata_reaches_no_pixel():
    image = np.random.default_rng(4).random((1, 96, 96), np.float32)
    valid = everywhere((96, 96))
    valid[:40] = False
    image[:, ~valid] = np.nan
    result, seen = blend(image, identity, 32, 8, valid)
    np.testing.assert_array_equal(seen, valid)
    np.testing.assert_allclose(result[:, valid], image[:, valid], rtol=2e-6)
