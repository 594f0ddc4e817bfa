"""Windows predicted in batches, their probabilities blended with weights that sum to one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from prediction.reader import RowBlock, RowBuffer
from prediction.tiling import (
    Extent,
    WindowLayout,
    batch_groups,
    extent_to_read,
    finished_by,
)

Predict = Callable[["Tensor", "Tensor | None"], "Tensor"]


class Batch(NamedTuple):
    """Windows of one row that are predicted together."""

    row: int  # along the axis of rows
    columns: list[int]  # along that of columns; without a valid pixel they are left out
    windows: list[list[Tensor]]  # their pieces from top to bottom, (C, n, w) each
    valid: Tensor | None  # (N, h, w) bool; None: all are
    seen: (
        np.ndarray | None
    )  # in the last batch of a row: validity of the rows it finishes


def reflect_beyond(array, height: int, width: int):
    """Extend an array or tensor (..., h, w) downwards and to the right by reflection."""
    for axis, size in ((-2, height), (-1, width)):
        length = array.shape[axis]
        if length < size:
            places = np.pad(np.arange(length), (0, size - length), mode="reflect")
            array = array[..., places, :] if axis == -2 else array[..., places]
    return array


def join_pieces(windows: Sequence[Sequence[Tensor]], size: tuple[int, int]) -> Tensor:
    """Windows (N, C, h, w) float32 of their pieces, reflected to ``size``, channels last."""
    first = windows[0][0]
    height, width = sum(piece.shape[1] for piece in windows[0]), first.shape[2]
    shape = len(windows), len(first), height, width
    images = torch.empty(
        shape,
        dtype=torch.float32,
        device=first.device,
        memory_format=torch.channels_last,
    )
    for image, pieces in zip(images, windows):
        top = 0
        for piece in pieces:
            image[:, top : top + piece.shape[1]] = piece
            top += piece.shape[1]
    return reflect_beyond(images, *size)


def cut_batches(
    source: Iterator[RowBlock],
    axes: tuple[WindowLayout, WindowLayout],
    region: Extent,
    batch_size: int,
) -> Iterator[Batch]:
    """Cut the windows over a region out of its rows, in order; a row has at least one batch."""
    down, across = axes
    size = down.size, across.size
    *_, left, right = extent_to_read(axes, region, batch_size)
    chunks = RowBuffer(source, left)
    groups = batch_groups(across, batch_size, region.left, region.right)
    for row, top in enumerate(down.starts):
        if top + down.size <= region.top or top >= region.bottom:
            continue
        bottom = min(top + down.size, down.length)
        chunks.move(top, bottom)
        for group in groups:
            columns, windows, masks = [], [], []
            for column in group:
                start = across.starts[column]
                part = Extent(top, bottom, start, min(start + across.size, right))
                mask = chunks.valid(part)
                if mask.any():
                    columns.append(int(column))
                    windows.append(chunks.pieces(part))
                    masks.append(reflect_beyond(mask, *size))
            valid = None
            if not all(mask.all() for mask in masks):
                device = windows[0][0].device
                valid = torch.from_numpy(np.stack(masks))
                if device.type == "cuda":
                    valid = valid.pin_memory().to(device, non_blocking=True)
            seen = None
            if group is groups[-1]:
                done = finished_by(down, row, region)
                seen = np.zeros((0, region.right - region.left), bool)
                if done.top < done.bottom:
                    seen = chunks.valid(done)
            yield Batch(row, columns, windows, valid, seen)


def predicted(
    cut: Iterator[Batch], predict: Predict, size: tuple[int, int], workers: int
) -> Iterator[tuple[Batch, Tensor | None]]:
    """Predict batches in threads, several at a time; they come in their order."""

    def one(batch: Batch):
        if not batch.windows:
            return None
        return predict(join_pieces(batch.windows, size), batch.valid)

    waiting: deque = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for batch in cut:
            waiting.append((batch, pool.submit(one, batch)))
            if len(waiting) > 2 * workers:
                batch, result = waiting.popleft()
                yield batch, result.result()
        for batch, result in waiting:
            yield batch, result.result()
    finally:
        pool.shutdown(cancel_futures=True)


def blended_rows(
    source: Iterator[RowBlock],
    predict: Predict,
    axes: tuple[WindowLayout, WindowLayout],
    region: Extent,
    channels: int,
    batch_size: int = 4,
    device="cpu",
    workers: int = 1,
) -> Iterator[tuple[Extent, Tensor, np.ndarray]]:
    """Slide a window over a part of a scene and yield its rows from top to bottom, each once.

    Every pixel gets all windows that cover it, also those that reach beyond the part, in the order
    of rows and columns: parts of a scene hold exactly what the whole would.

    Args:
        source: The rows of ``extent_to_read``.
        predict: Images (N, C, h, w) and valid (N, h, w), None if all are, to (N, K, h, w).
        axes: Rows and columns.
        region: The part.
        channels: K.
        batch_size: Windows that are predicted together.
        device: Where ``predict`` works.
        workers: Batches that are predicted at a time.

    Yields:
        The part that is finished, its blended probabilities (K, n, w), which are overwritten after
        the next step, and valid (n, w). A window without a valid pixel is not predicted; its
        pixels are zeros, not valid.
    """
    down, across = axes
    row_weights = torch.from_numpy(down.weights).to(device)
    column_weights = torch.from_numpy(across.weights).to(device)

    @cache
    def outer(row: int, column: int) -> Tensor:
        return torch.outer(row_weights[row], column_weights[column])

    def window_weight(row: int, column: int) -> Tensor:
        return outer(down.weight_ids[row], across.weight_ids[column])

    sums = torch.zeros(channels, down.size, region.right - region.left, device=device)
    cut, size = cut_batches(source, axes, region, batch_size), (down.size, across.size)
    for batch, results in predicted(cut, predict, size, workers):
        for number, column in enumerate(batch.columns):
            start = across.starts[column]
            first, last = (
                max(start, region.left),
                min(start + across.size, region.right),
            )
            if first < last:
                inside = slice(first - start, last - start)
                weight = window_weight(batch.row, column)[:, inside]
                columns = slice(first - region.left, last - region.left)
                sums[..., columns].addcmul_(results[number][..., inside], weight)
        if batch.seen is None:
            continue
        top, done = down.starts[batch.row], finished_by(down, batch.row, region)
        if done.top < done.bottom:
            yield done, sums[:, done.top - top : done.bottom - top], batch.seen
        following = [*down.starts, down.length][batch.row + 1]
        rest = max(0, down.size - (following - top))
        sums[:, :rest] = sums[:, down.size - rest :].clone()
        sums[:, rest:] = 0
