"""The random forest that networks are measured against."""

from __future__ import annotations

import numpy as np
import pytest

from evaluation import forest as module
from evaluation.forest import (
    balanced_draw,
    count_patches,
    draw_pixels,
    fit_forest,
    pixel_features,
    predict_pixels,
)

CLASSES = 2


def make_patches(count: int, seed: int = 0, side: int = 24) -> list[tuple]:
    """Patches of three bands, whose class is whether the second is above a threshold."""
    rng, patches = np.random.default_rng(seed), []
    for _ in range(count):
        image = rng.integers(0, 1000, (3, side, side), dtype=np.uint16)
        valid = rng.random((side, side)) > 0.1
        mask = np.where(valid, image[1] > 600, 255)
        mask[:3] = 255  # unlabelled
        patches.append((image, valid, mask))
    return patches


def counts_of(patches: list[tuple]) -> np.ndarray:
    """(P, K) labelled pixels."""
    return np.stack(
        [np.bincount(m[m < CLASSES], minlength=CLASSES) for *_, m in patches]
    )


def grow(patches: list[tuple], cores: int = 1, trees: int = 10):
    pixels = draw_pixels(patches.__getitem__, counts_of(patches), 3_000, seed=0)
    return fit_forest(pixels, trees, 0, cores)


# --- features -------------------------------------------------------------------------------


def test_features_are_bands_and_means_of_the_valid_pixels_around():
    image, valid, _ = make_patches(1, side=9)[0]
    image = image.astype(np.float32)
    image[:, ~valid] = np.nan  # as they may be stored
    places = np.flatnonzero(valid)
    found = pixel_features(image, valid, places)
    padded = np.pad(image, ((0, 0), (2, 2), (2, 2)), constant_values=np.nan)
    for values, place in zip(found, places):
        row, column = divmod(place, 9)
        around = padded[:, row : row + 5, column : column + 5]
        means = np.nanmean(around, axis=(1, 2))
        np.testing.assert_allclose(values, [*image[:, row, column], *means], rtol=1e-5)


def test_features_are_finite_for_numbers_beyond_float32():
    image = np.full((1, 6, 6), 1e300)
    places = np.arange(36)
    assert np.isfinite(pixel_features(image, np.ones((6, 6), bool), places)).all()


# --- the draw -------------------------------------------------------------------------------


def test_classes_are_drawn_alike_and_patches_give_their_share():
    counts = np.array([[1000, 500], [3000, 500], [0, 1000]])
    drawn = balanced_draw(counts, 400)
    np.testing.assert_array_equal(drawn, [[50, 50], [150, 50], [0, 100]])


def test_what_a_rare_class_cannot_give_goes_to_the_others():
    counts = np.array([[10_000, 7, 0, 900], [10_000, 3, 0, 100]])
    drawn = balanced_draw(counts, 3_010)
    np.testing.assert_array_equal(drawn.sum(axis=0), [2_000, 10, 0, 1_000])
    assert (drawn <= counts).all()


def test_all_pixels_are_drawn_where_they_are_few():
    counts = np.array([[5, 7], [0, 3]])
    np.testing.assert_array_equal(balanced_draw(counts, 1_000), counts)


def test_only_labelled_pixels_are_drawn_and_no_patch_is_read_for_nothing():
    patches = make_patches(3)
    patches[1][2][:] = 255
    read = []
    values, labels, _ = draw_pixels(
        lambda number: read.append(int(number)) or patches[number],
        counts_of(patches),
        200,
        seed=0,
    )
    assert read == [0, 2] and values.shape == (200, 6)
    np.testing.assert_array_equal(values[:, 1] > 600, labels == 1)


def test_classes_weigh_as_they_do_in_the_patches():
    """Here 3 : 1, of which as many are drawn; overlapping classes are then told as often."""
    rng = np.random.default_rng(0)
    mask = (rng.random((60, 60)) < 0.25).astype(int)
    image = rng.normal(mask, 2.0)[None]
    patch = image, np.ones((60, 60), bool), mask
    counts = np.bincount(mask.ravel())[None]
    pixels = draw_pixels(lambda _: patch, counts, 1_000, seed=0)
    assert np.bincount(pixels.labels).tolist() == [500, 500]
    shares = np.bincount(pixels.labels, pixels.weights)
    np.testing.assert_allclose(shares, counts[0])
    matrix = count_patches(
        fit_forest(pixels, 20, 0, 1), lambda _: patch, 1, CLASSES, 1
    )[0]
    assert matrix[:, 1].sum() < 0.3 * matrix.sum()


# --- the forest -----------------------------------------------------------------------------


def test_a_threshold_of_a_band_is_found():
    tested = make_patches(3, seed=1)
    forest = grow(make_patches(4))
    matrices = count_patches(forest, tested.__getitem__, 3, CLASSES, 1)
    np.testing.assert_array_equal(matrices.sum(axis=2), counts_of(tested))
    assert np.trace(matrices.sum(axis=0)) > 0.99 * matrices.sum()


def test_a_forest_is_the_same_for_any_number_of_cores_and_blocks(monkeypatch):
    """Labels at random: many trees are nearly even, and the last bit of a sum would decide."""
    rng, patches = np.random.default_rng(0), make_patches(3)
    noisy = [
        (image, valid, np.where(mask < 255, rng.integers(0, 2, mask.shape), 255))
        for image, valid, mask in patches
    ]
    one, two = grow(noisy, 1, trees=7), grow(noisy, 3, trees=7)
    assert len(one.estimators_) == len(two.estimators_) == 7
    first = count_patches(one, noisy.__getitem__, 3, CLASSES, 1)
    monkeypatch.setattr(module, "BLOCK", 200)
    np.testing.assert_array_equal(
        count_patches(two, noisy.__getitem__, 3, CLASSES, 3), first
    )


def test_pixels_are_predicted_as_the_library_does():
    rng, forest = np.random.default_rng(3), grow(make_patches(2), trees=9)
    features = rng.normal(0, 3, (500, forest.n_features_in_))
    np.testing.assert_array_equal(
        predict_pixels(forest, features), forest.predict(features)
    )


def test_classes_that_the_training_lacks_are_never_predicted_and_keep_their_place():
    patches = [(i, v, np.where(m == 1, 2, m)) for i, v, m in make_patches(2)]
    counts = np.stack([np.bincount(m[m < 3], minlength=3) for *_, m in patches])
    pixels = draw_pixels(patches.__getitem__, counts, 3_000, seed=0)
    forest = fit_forest(pixels, 5, 0, 1)
    matrix = count_patches(forest, patches.__getitem__, 2, 3, 1).sum(axis=0)
    assert not matrix[1].any() and not matrix[:, 1].any() and matrix[2, 2] > 0


def test_a_patch_without_labels_has_an_empty_matrix():
    image, valid, mask = make_patches(1)[0]
    blank = [(image, valid, np.full_like(mask, 255))]
    matrices = count_patches(grow(make_patches(1)), blank.__getitem__, 1, CLASSES, 1)
    assert matrices.shape == (1, CLASSES, CLASSES) and not matrices.any()


def test_a_requested_stop_ends_between_trees(monkeypatch):
    looks = []

    def stop():
        looks.append(1)
        if len(looks) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("common.interruption.stop_if_requested", stop)
    patches = make_patches(1)
    pixels = draw_pixels(patches.__getitem__, counts_of(patches), 100, seed=0)
    looks.clear()
    with pytest.raises(KeyboardInterrupt):
        fit_forest(pixels, 50, 0, 1)
