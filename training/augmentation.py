"""Variation of training patches: symmetries of the square, radiometry."""

from __future__ import annotations

import numpy as np


def random_d4(image, valid, mask, rng: np.random.Generator):
    """A symmetry of the square, since a scene seen from above has no upright.

    Patches that are not square keep their shape (four symmetries).

    Args:
        image: (C, H, W).
        valid: (H, W).
        mask: (H, W).
        rng: The source of all choices.

    Returns:
        The three as views, turned by quarters and mirrored.
    """
    quarter = 1 if mask.shape[0] == mask.shape[1] else 2
    turns, flip = quarter * int(rng.integers(4)), bool(rng.integers(2))

    def turn(array):
        array = np.rot90(array, turns, axes=(-2, -1))
        return array[..., ::-1] if flip else array

    return turn(image), turn(valid), turn(mask)


def jitter_radiometry(image, valid, rng: np.random.Generator) -> np.ndarray:
    """Vary the values of a normalized patch, (C, H, W) float32 in [0, 1], as another day would.

    Brightness and contrast change alike in all bands, as haze and sun do; noise and band dropout
    do not. Pixels where ``valid`` (H, W) is False stay 0.
    """
    if rng.random() < 0.5:
        contrast, brightness = rng.uniform(0.85, 1.15), rng.uniform(-0.05, 0.05)
        image = (image - 0.5) * contrast + 0.5 + brightness
    if rng.random() < 0.3:
        image = image + rng.normal(0, rng.uniform(0, 0.02), image.shape)
    if len(image) > 1 and rng.random() < 0.1:
        image = image.copy()
        image[rng.integers(len(image))] = 0
    return np.where(valid, np.clip(image, 0, 1), 0).astype(np.float32)
