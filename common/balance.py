"""How patches and the pixels of each class are shared among parts (splits, folds)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from common.text import listed

# of a class without a pixel in a split: the split in words, and what follows
ABSENT = {
    "train": ("training", "the model cannot learn to map it"),
    "validation": ("validation", "the best epoch is chosen without it"),
    "test": ("test", "mapped there all the same, it counts as 0 in the means"),
}


def absent_classes(
    split: str, names: Sequence[str], pixels: Sequence[int]
) -> str | None:
    """A line on the classes without a pixel in a split; None where it holds all."""
    absent = [name for name, count in zip(names, pixels) if not count]
    if not absent:
        return None
    some = listed(absent[:8]) + (", ..." if len(absent) > 8 else "")
    what, meaning = ABSENT[split]
    return (
        f"{len(absent)} of {len(names)} classes without a {what} pixel ({some}): "
        f"{meaning}"
    )


def unit_shares(content: np.ndarray) -> np.ndarray:
    """What each unit (a block, a group of patches) holds, as shares of the whole.

    Args:
        content: (units, 1 + classes): patches, then pixels of each class.

    Returns:
        (units, 1 + classes that occur) float; each column sums to 1.
    """
    content = content[:, content.any(axis=0)]
    return content / content.sum(axis=0)


def uneven_shares(
    shares: np.ndarray, wanted: Sequence[float], required: np.ndarray
) -> float:
    """The criterion of an even draw: 0 where each part holds its share, else more.

    Args:
        shares: (parts, 1 + classes): of ``unit_shares``, the sums over the units of each part.
        wanted: (parts,) the share of everything that each part should hold.
        required: Bool, (1 + classes,) or of the shape of ``shares``: columns that no part
            may lack, as those that enough units hold.

    Returns:
        The sum of the deviations from the wanted shares, where patches weigh as much as all
        classes together; and 10 for each part without a class that it must hold.
    """
    gaps = np.abs(shares - np.asarray(wanted)[:, None])
    patches, classes = gaps[:, 0].sum(), gaps[:, 1:].sum()
    missing = np.count_nonzero((shares <= 1e-12) & required)
    return float(max(1, shares.shape[1] - 1) * patches + classes + 10 * missing)
