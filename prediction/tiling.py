"""Where windows lie on a scene, which weights they have, which rows and columns they need."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from common.windows import window_starts
from prediction.settings import SIDE_MULTIPLE


@dataclass(frozen=True)
class WindowLayout:
    """The windows along one side of a scene, and how they are blended."""

    length: int  # pixels of the scene
    size: int  # pixels of a window
    starts: list[int]
    weights: np.ndarray  # (windows, size) float32; over the scene they sum to one
    weight_ids: list[int]  # for each window the first one with its weights


class Extent(NamedTuple):
    """A part of a scene in pixels: first row, row after the last, columns likewise."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.bottom - self.top, self.right - self.left

    def moved(self, rows: int, columns: int) -> Extent:
        """The same in pixels that count from elsewhere."""
        return Extent(
            self.top + rows,
            self.bottom + rows,
            self.left + columns,
            self.right + columns,
        )


def window_weights(size: int, blend: str) -> np.ndarray:
    """The weights (size,) along a side of a window, positive everywhere.

    Args:
        size: Pixels; the weights are those of their centres.
        blend: ``hann``, ``gaussian`` (standard deviation an eighth of the window), ``linear`` (a
            triangle), or ``none`` (all alike).
    """
    centre = (np.arange(size) + 0.5) / size
    if blend == "hann":
        return np.sin(np.pi * centre) ** 2
    if blend == "gaussian":
        return np.exp(-0.5 * ((centre - 0.5) * 8) ** 2)
    return 1 - np.abs(2 * centre - 1) if blend == "linear" else np.ones(size)


def lay_windows(
    length: int, patch_size: int, overlap: int, blend: str = "hann"
) -> WindowLayout:
    """Lay windows along a side of a scene.

    The weights of a window are divided by the sum of all windows' there. A side shorter than a
    patch gets one window.

    Args:
        length: Pixels of the scene along this side.
        patch_size: Largest side of a window in pixels.
        overlap: Pixels shared by neighbours; the last window, which ends at the edge, shares more.
        blend: See ``window_weights``.
    """
    rounded = -(-length // SIDE_MULTIPLE) * SIDE_MULTIPLE
    size = min(patch_size, rounded)
    starts = window_starts(length, size, patch_size - overlap)
    ramp = window_weights(size, blend)
    total = np.zeros(max(length, size))
    for start in starts:
        total[start : start + size] += ramp
    weights = np.stack([ramp / total[start : start + size] for start in starts])
    weights = weights.astype(np.float32)
    _, first, which = np.unique(weights, axis=0, return_index=True, return_inverse=True)
    return WindowLayout(length, size, starts, weights, first[which.ravel()].tolist())


def batch_groups(
    layout: WindowLayout, batch_size: int, first: int, last: int
) -> list[np.ndarray]:
    """The windows of one row that are predicted together, by number.

    They are the same whatever part of the row is asked for: no result depends on how a scene is
    shared out.

    Args:
        layout: Of the columns.
        batch_size: Windows of the largest batch.
        first: Batches that end left of this pixel are left out.
        last: And those that begin at this pixel or right of it.
    """
    count = len(layout.starts)
    groups = np.array_split(np.arange(count), math.ceil(count / batch_size))
    return [
        group
        for group in groups
        if layout.starts[group[0]] < last
        and layout.starts[group[-1]] + layout.size > first
    ]


def split_columns(
    layout: WindowLayout, batch_size: int, pieces: int, first: int, last: int
) -> list[tuple[int, int]]:
    """Share the columns between two out into pieces (left, right) of whole batches."""
    groups = batch_groups(layout, batch_size, first, last)
    shares = np.array_split(np.arange(len(groups)), min(pieces, len(groups)))
    lefts = [layout.starts[groups[share[0]][0]] for share in shares]
    return list(pairwise([first, *(left for left in lefts if left > first), last]))


def split_rows(
    layout: WindowLayout, top: int, bottom: int, number: int, of: int
) -> tuple[int, int] | None:
    """One of several equal shares of the rows between two, in whole window rows."""
    cuts = [top, *(start for start in layout.starts if top < start < bottom)]
    share = np.array_split(np.arange(len(cuts)), of)[number]
    if not len(share):
        return None
    return cuts[share[0]], [*cuts, bottom][share[-1] + 1]


def finished_by(down: WindowLayout, row: int, part: Extent) -> Extent:
    """The rows of a part to which no window after a row of windows adds."""
    ends = [*down.starts[1:], down.length]
    top, bottom = max(down.starts[row], part.top), min(ends[row], part.bottom)
    return part._replace(top=top, bottom=max(top, bottom))


def extent_to_read(
    layouts: tuple[WindowLayout, WindowLayout], part: Extent, batch_size: int
) -> Extent:
    """The part of a scene that the windows over a part, and their batches, cover."""
    down, across = layouts
    tops = [
        top for top in down.starts if top + down.size > part.top and top < part.bottom
    ]
    groups = batch_groups(across, batch_size, part.left, part.right)
    right = across.starts[groups[-1][-1]] + across.size
    return Extent(
        tops[0],
        min(tops[-1] + down.size, down.length),
        across.starts[groups[0][0]],
        min(right, across.length),
    )


def remaining(parts: Sequence[Extent], part: Extent) -> list[Extent]:
    """What of a part is not yet finished, as row ranges over all its columns."""
    missing = np.ones(part.bottom - part.top + 2, bool)
    missing[[0, -1]] = False
    for done in parts:
        if done.left <= part.left and done.right >= part.right:
            first, last = (
                max(row - part.top, 0) + 1 for row in (done.top, done.bottom)
            )
            missing[first:last] = False
    edges = np.flatnonzero(missing[1:] != missing[:-1]) + part.top
    return [
        part._replace(top=int(a), bottom=int(b)) for a, b in zip(*[iter(edges)] * 2)
    ]
