"""Variation of training patches: symmetries of the square, radiometry.

What varies is drawn on the host, from the generator of a patch; values are changed on the device, for
a batch at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Symmetry(NamedTuple):
    """A symmetry of the square, since a scene seen from above has no upright."""

    turns: int = 0  # by quarters, before it is mirrored
    mirrored: bool = False


def random_symmetry(shape: tuple[int, int], rng: np.random.Generator) -> Symmetry:
    """One of the eight; of the four that keep the shape where (height, width) differ."""
    quarter = 1 if shape[0] == shape[1] else 2
    return Symmetry(quarter * int(rng.integers(4)) % 4, bool(rng.integers(2)))


def turn_patches(stacked: Tensor, symmetries: Sequence[Symmetry]) -> Tensor:
    """Turn and mirror each of some patches (N, ..., H, W), in place."""
    for patch, (turns, mirrored) in zip(stacked, symmetries):
        if turns or mirrored:
            turned = patch.rot90(turns, (-2, -1)) if turns else patch
            patch.copy_(turned.flip(-1) if mirrored else turned)
    return stacked


class Radiometry(NamedTuple):
    """How the values of a normalized patch differ on another day."""

    contrast: float = 1.0  # around 0.5
    brightness: float = 0.0
    noise: float = 0.0  # standard deviation
    noise_seed: int = 0
    lost_band: int = -1  # counted from 0; -1 for none


def random_radiometry(bands: int, rng: np.random.Generator) -> Radiometry:
    """Brightness and contrast as haze and sun change them, alike in all bands; noise, a lost band."""
    drawn = Radiometry()
    if rng.random() < 0.5:
        contrast, brightness = rng.uniform(0.85, 1.15), rng.uniform(-0.05, 0.05)
        drawn = drawn._replace(contrast=contrast, brightness=brightness)
    if rng.random() < 0.3:
        deviation, seed = rng.uniform(0, 0.02), int(rng.integers(2**31))
        drawn = drawn._replace(noise=deviation, noise_seed=seed)
    if bands > 1 and rng.random() < 0.1:
        drawn = drawn._replace(lost_band=int(rng.integers(bands)))
    return drawn


class Variation(NamedTuple):
    """How a patch is varied in one draw."""

    symmetry: Symmetry
    radiometry: Radiometry | None  # None: the values stay


def radiometry_table(drawn: Sequence[Radiometry], bands: int) -> np.ndarray:
    """A row (2 + bands) float32 for each patch: factor, offset, and 0 for a lost band, else 1."""
    table = np.ones((len(drawn), 2 + bands), np.float32)
    for row, one in zip(table, drawn):
        row[:2] = one.contrast, 0.5 - 0.5 * one.contrast + one.brightness
        if one.lost_band >= 0:
            row[2 + one.lost_band] = 0
    return table


def jitter_radiometry(
    images: Tensor, valid: Tensor, drawn: Sequence[Radiometry], table: Tensor
) -> Tensor:
    """Vary the values of normalized patches, in place.

    Args:
        images: (N, C, H, W) float32 in [0, 1].
        valid: (N, H, W) bool; invalid pixels stay 0.
        drawn: Of each patch.
        table: The same as ``radiometry_table`` gives it, on the device of the images.

    Returns:
        The images. Noise is that of the device's generator: a CPU and a GPU draw other numbers.
    """
    factor, offset, kept = (
        part[..., None, None] for part in table.split((1, 1, images.shape[1]), 1)
    )
    images.mul_(factor).add_(offset)
    for image, one in zip(images, drawn):
        if one.noise:
            generator = torch.Generator(images.device).manual_seed(one.noise_seed)
            noise = torch.empty_like(image).normal_(0, one.noise, generator=generator)
            image += noise
    return images.mul_(kept).clamp_(0, 1).masked_fill_(~valid[:, None], 0)
