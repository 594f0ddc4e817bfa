"""Class maps of random or drawn areas, and what a plain reference makes of them."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

NODATA = 255


def noise(height=24, width=20, classes=3, seed=0, grain=1, nodata=0.15) -> np.ndarray:
    """Random classes in clumps of ``grain`` pixels, some of them nodata."""
    rng = np.random.default_rng(seed)
    cells = rng.integers(0, classes, (-(-height // grain), -(-width // grain)))
    cells[rng.random(cells.shape) < nodata] = NODATA
    return np.kron(cells, np.ones((grain, grain), int))[:height, :width]


def picture(text: str) -> np.ndarray:
    """Classes drawn with digits; a dot is nodata."""
    rows = [[NODATA if c == "." else int(c) for c in row] for row in text.split()]
    return np.array(rows)


def connected(classes: np.ndarray) -> list[np.ndarray]:
    """The connected areas of a map as masks, by first pixel."""
    found = []
    for value in np.unique(classes[classes != NODATA]):
        labels, count = ndimage.label(classes == value)
        found += [labels == number for number in range(1, count + 1)]
    return sorted(found, key=lambda mask: np.flatnonzero(mask)[0])


def sieved(classes: np.ndarray, fewest: int) -> np.ndarray:
    """The documented rule, one area at a time, the whole map labelled anew after each."""
    classes = classes.copy()
    while True:
        areas = connected(classes)
        areas.sort(key=np.count_nonzero)  # stable: then by first pixel
        for area in areas:
            if area.sum() >= fewest:
                return classes
            beside = ndimage.binary_dilation(area) & ~area
            others = [other for other in areas if (other & beside).any()]
            if others:
                break
        else:
            return classes
        value = {id(other): classes[other][0] for other in others}
        first = {id(other): np.flatnonzero(other)[0] for other in others}
        best = min(others, key=lambda o: (-o.sum(), value[id(o)], first[id(o)]))
        classes[area] = value[id(best)]
