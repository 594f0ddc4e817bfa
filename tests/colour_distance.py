"""How different colours look, to a usual eye and with deuteranopia."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

# linear sRGB to XYZ of the white point D65 (IEC 61966-2-1)
TO_XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)
# deuteranopia in linear sRGB (Machado, Oliveira and Fernandes 2009, severity 1.0)
DEUTERANOPIA = np.array(
    [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ]
)


def lab(colour: Sequence[float], seen: np.ndarray | None = None) -> np.ndarray:
    """CIELAB of a colour of sRGB, 0 to 255 each, as seen through a matrix."""
    share = np.asarray(colour, float) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    if seen is not None:
        linear = np.clip(seen @ linear, 0, 1)
    relative = TO_XYZ @ linear / TO_XYZ.sum(axis=1)
    x, y, z = np.where(
        relative > (6 / 29) ** 3,
        np.cbrt(relative),
        relative / (3 * (6 / 29) ** 2) + 4 / 29,
    )
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def ciede2000(first: Sequence[float], second: Sequence[float]) -> float:
    """The difference of two colours in CIELAB (Sharma, Wu and Dalal 2005, their equations)."""
    (light, a, b), (other_light, other_a, other_b) = first, second
    chroma = (np.hypot(a, b) + np.hypot(other_a, other_b)) / 2
    stretch = 1.5 - 0.5 * np.sqrt(chroma**7 / (chroma**7 + 25.0**7))
    a, other_a = stretch * a, stretch * other_a
    c, other_c = np.hypot(a, b), np.hypot(other_a, other_b)
    hue, other_hue = (
        np.degrees(np.arctan2(y, x)) % 360 for x, y in ((a, b), (other_a, other_b))
    )
    # the shorter way round the circle; a grey has no hue
    turn = (other_hue - hue + 180) % 360 - 180 if c * other_c else 0.0
    mean_hue = hue + turn / 2 if c * other_c else hue + other_hue
    mean_light, mean_c = (light + other_light) / 2, (c + other_c) / 2

    def cosine(degrees: float) -> float:
        return np.cos(np.radians(degrees))

    weight = (
        1
        - 0.17 * cosine(mean_hue - 30)
        + 0.24 * cosine(2 * mean_hue)
        + 0.32 * cosine(3 * mean_hue + 6)
        - 0.20 * cosine(4 * mean_hue - 63)
    )
    off = (mean_light - 50) ** 2
    of_light = (other_light - light) / (1 + 0.015 * off / np.sqrt(20 + off))
    of_chroma = (other_c - c) / (1 + 0.045 * mean_c)
    of_hue = 2 * np.sqrt(c * other_c) * np.sin(np.radians(turn / 2))
    of_hue /= 1 + 0.015 * mean_c * weight
    rotation = 60 * np.exp(-((((mean_hue % 360) - 275) / 25) ** 2))
    rotation = -np.sin(np.radians(rotation)) * 2
    rotation *= np.sqrt(mean_c**7 / (mean_c**7 + 25.0**7))
    square = of_light**2 + of_chroma**2 + of_hue**2 + rotation * of_chroma * of_hue
    return float(np.sqrt(square))


def distance(first, second, seen: np.ndarray | None = None) -> float:
    """CIEDE2000 of two colours of sRGB."""
    return ciede2000(lab(first, seen), lab(second, seen))


def smallest(colours: Sequence, seen: np.ndarray | None = None) -> float:
    """Of all pairs of colours, the distance of the most alike."""
    shades = [lab(colour, seen) for colour in colours]
    return min(ciede2000(*pair) for pair in combinations(shades, 2))
