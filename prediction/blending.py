"""Windows predicted in batches, their probabilities blended with weights that sum to one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.devices import to_device
from common.machine import bounded_map
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
    """Windows of one row of windows that are predicted together."""

    row: int  # number of the row of windows
    columns: list[int]  # numbers of the windows in it that hold a pixel to map
    windows: list[list[Tensor]]  # each as views (C, n, w) from top to bottom
    valid: Tensor | None  # (N, h, w) bool; None: all are
    # in the last batch of a row: which of the pixels (n, w) that the row finishes are mapped
    finished: np.ndarray | None


def reflect_beyond(array, height: int, width: int):
    """Extend an array or tensor (..., h, w) downwards and to the right by reflection."""
    for axis, size in ((-2, height), (-1, width)):
        length = array.shape[axis]
        if length < size:
            places = np.pad(np.arange(length), (0, size - length), mode="reflect")
            array = array[..., places, :] if axis == -2 else array[..., places]
    return array


def stack_windows(windows: Sequence[Sequence[Tensor]], size: tuple[int, int]) -> Tensor:
    """Windows given as views, reflected to ``size``: (N, C, h, w) float32, channels last."""
    first = windows[0][0]
    height = sum(view.shape[1] for view in windows[0])
    shape = len(windows), len(first), height, first.shape[2]
    options = {"device": first.device, "memory_format": torch.channels_last}
    images = torch.empty(shape, dtype=torch.float32, **options)
    for image, views in zip(images, windows):
        torch.cat([view.float() for view in views], dim=1, out=image)
    return reflect_beyond(images, *size)


def cut_batches(
    source: Iterator[RowBlock],
    layouts: tuple[WindowLayout, WindowLayout],
    part: Extent,
    batch_size: int,
) -> Iterator[Batch]:
    """Cut the windows over a part of a scene out of its rows, in order.

    Each row of windows has at least one batch.
    """
    down, across = layouts
    size = down.size, across.size
    *_, left, right = extent_to_read(layouts, part, batch_size)
    rows = RowBuffer(source, left)
    groups = batch_groups(across, batch_size, part.left, part.right)
    for row, top in enumerate(down.starts):
        if top + down.size <= part.top or top >= part.bottom:
            continue
        bottom = min(top + down.size, down.length)
        rows.move(top, bottom)
        for group in groups:
            columns, windows, masks = [], [], []
            for column in group:
                start = across.starts[column]
                window = Extent(top, bottom, start, min(start + across.size, right))
                if rows.wanted(window).any():
                    mask = rows.valid(window)
                    columns.append(int(column))
                    windows.append(rows.images(window))
                    masks.append(reflect_beyond(mask, *size))
            valid = None
            if not all(mask.all() for mask in masks):
                device = windows[0][0].device
                valid = torch.from_numpy(np.stack(masks))
                if device.type == "cuda":  # pragma: no cover - GPU
                    valid = valid.pin_memory()
                valid = to_device(valid, device)
            finished = None
            if group is groups[-1]:
                done = finished_by(down, row, part)
                finished = np.zeros((0, part.right - part.left), bool)
                if done.top < done.bottom:
                    finished = rows.wanted(done)
            yield Batch(row, columns, windows, valid, finished)


def predict_batches(
    batches: Iterator[Batch], predict: Predict, size: tuple[int, int], workers: int
) -> Iterator[tuple[Batch, Tensor | None]]:
    """Predict batches in threads, several at a time; they come in their order."""

    def predict_one(batch: Batch) -> tuple[Batch, Tensor | None]:
        if not batch.windows:
            return batch, None
        return batch, predict(stack_windows(batch.windows, size), batch.valid)

    return bounded_map(predict_one, batches, workers, ahead=workers + 1)


def blended_rows(
    source: Iterator[RowBlock],
    predict: Predict,
    layouts: tuple[WindowLayout, WindowLayout],
    part: Extent,
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
        predict: From images (N, C, h, w) float32 and valid (N, h, w) bool, None where all are, to
            (N, K, h, w) float32.
        layouts: Of the windows along the rows and along the columns.
        part: Which part of the scene.
        channels: K.
        batch_size: Windows that are predicted together.
        device: Where ``predict`` works.
        workers: Batches that are predicted at a time.

    Yields:
        The part that is finished, its blended probabilities (K, n, w), which are overwritten after
        the next step, and which pixels are mapped (n, w): those that are valid and in the area. A
        window without one is not predicted.
    """
    down, across = layouts
    row_weights = torch.from_numpy(down.weights).to(device)
    column_weights = torch.from_numpy(across.weights).to(device)

    @cache
    def outer(row: int, column: int) -> Tensor:
        return torch.outer(row_weights[row], column_weights[column])

    sums = torch.zeros(channels, down.size, part.right - part.left, device=device)
    batches = cut_batches(source, layouts, part, batch_size)
    size = down.size, across.size
    for batch, results in predict_batches(batches, predict, size, workers):
        row_id = down.weight_ids[batch.row]
        for number, column in enumerate(batch.columns):
            start = across.starts[column]
            first, last = max(start, part.left), min(start + across.size, part.right)
            if first < last:
                inside = slice(first - start, last - start)
                weight = outer(row_id, across.weight_ids[column])[:, inside]
                columns = slice(first - part.left, last - part.left)
                sums[..., columns].addcmul_(results[number][..., inside], weight)
        if batch.finished is None:
            continue
        top, done = down.starts[batch.row], finished_by(down, batch.row, part)
        if done.top < done.bottom:
            yield done, sums[:, done.top - top : done.bottom - top], batch.finished
        following = [*down.starts, down.length][batch.row + 1]
        rest = max(0, down.size - (following - top))
        sums[:, :rest] = sums[:, down.size - rest :].clone()
        sums[:, rest:] = 0
