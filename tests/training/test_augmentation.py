"""Variation of training patches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import (
    IGNORE,
    symmetries,
)

from training.augmentation import (
    Radiometry,
    jitter_radiometry,
    radiometry_table,
    random_radiometry,
    random_symmetry,
    turn_patches,
)


def vary(image, valid, mask, draws: int = 300):
    """Draws of a patch, varied as one batch."""
    symmetries, drawn = [], []
    for seed in range(draws):
        rng = np.random.default_rng(seed)
        symmetries.append(random_symmetry(mask.shape, rng))
        drawn.append(random_radiometry(len(image), rng))
    images, known, masks = (
        turn_patches(torch.from_numpy(np.stack([array] * draws)), symmetries)
        for array in (image, valid, mask)
    )
    table = torch.from_numpy(radiometry_table(drawn, len(image)))
    jittered = jitter_radiometry(images, known, drawn, table).numpy()
    yield from zip(jittered, known.numpy(), masks.numpy())


@pytest.mark.parametrize(("shape", "count"), [((5, 5), 8), ((4, 6), 4)])
def test_every_symmetry_that_keeps_the_shape_is_reached(shape, count):
    mask = np.arange(np.prod(shape)).reshape(shape)
    image = np.full((2, *shape), 0.5, np.float32)
    reached = set()
    for varied, _, turned in vary(image, np.ones(shape, bool), mask):
        assert turned.shape == shape and varied.shape == image.shape
        reached.add(turned.tobytes())
    assert len(reached) == count
    assert reached <= set(symmetries(mask))


@pytest.mark.parametrize("shape", [(8, 8), (6, 10)])
def test_image_mask_and_validity_move_together(shape):
    rng = np.random.default_rng(1)
    mask = rng.integers(0, 2, shape)
    valid = rng.random(shape) < 0.8
    mask[~valid] = IGNORE
    image = np.where(mask == 1, 0.8, 0.2).astype(np.float32)
    image = np.stack([image] * 3) * valid
    for varied, known, turned in vary(image, valid, mask, 100):
        np.testing.assert_array_equal(known, turned != IGNORE)
        brightest = varied.max(axis=0)  # a band may have dropped out
        np.testing.assert_array_equal(brightest > 0.5, turned == 1)
        assert not varied[:, ~known].any()


def test_augmented_images_stay_float32_between_0_and_1():
    image = np.random.default_rng(2).random((3, 8, 8)).astype(np.float32)
    for varied, _, _ in vary(image, np.ones((8, 8), bool), np.zeros((8, 8), int), 100):
        assert varied.dtype == np.float32
        assert varied.min() >= 0 and varied.max() <= 1


def test_brightness_noise_and_band_dropout_all_happen_and_sometimes_none_does():
    image = np.full((3, 8, 8), 0.4, np.float32)
    kinds = set()
    for varied, _, _ in vary(image, np.ones((8, 8), bool), np.zeros((8, 8), int)):
        lost = ~varied.any(axis=(1, 2))
        assert lost.sum() <= 1
        kept = varied[~lost]
        flat = np.ptp(kept) < 1e-6  # alike in all bands and pixels
        kinds |= {"dropout"} if lost.any() else set()
        kinds.add(("same" if np.allclose(kept, 0.4) else "light") if flat else "noise")
    assert kinds == {"dropout", "light", "noise", "same"}


def test_the_only_band_is_never_dropped():
    image = np.full((1, 4, 4), 0.5, np.float32)
    for varied, _, _ in vary(image, np.ones((4, 4), bool), np.zeros((4, 4), int)):
        assert varied.any()


def test_noise_depends_on_its_seed_alone():
    images = torch.full((3, 2, 8, 8), 0.5)
    one, other = (
        Radiometry(noise=0.01, noise_seed=1),
        Radiometry(noise=0.01, noise_seed=2),
    )
    drawn = [one, other, one]
    table = torch.from_numpy(radiometry_table(drawn, 2))
    valid = torch.ones(3, 8, 8, dtype=torch.bool)
    varied = jitter_radiometry(images, valid, drawn, table)
    assert torch.equal(varied[0], varied[2]) and not torch.equal(varied[0], varied[1])
    assert varied[0].std() == pytest.approx(0.01, rel=0.3)


def test_contrast_and_brightness_follow_their_formula():
    images = torch.rand(1, 3, 4, 4) * 0.5 + 0.25
    drawn = [Radiometry(contrast=1.1, brightness=-0.03, lost_band=1)]
    table = torch.from_numpy(radiometry_table(drawn, 3))
    expected = (images - 0.5) * 1.1 + 0.5 - 0.03
    expected[:, 1] = 0
    valid = torch.ones(1, 4, 4, dtype=torch.bool)
    varied = jitter_radiometry(images.clone(), valid, drawn, table)
    torch.testing.assert_close(varied, expected)
