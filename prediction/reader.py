"""A scene read from top to bottom by several threads, as rows for the windows."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import accumulate, pairwise
from queue import LifoQueue
from typing import NamedTuple

import numpy as np
import rasterio
import torch
from rasterio.windows import Window
from torch import Tensor

from common import rasters
from common.devices import own_stream
from common.machine import available_cores
from common.rasters import open_raster, read_image, validity
from prediction.tiling import Extent

# each block of a scene is read once: its cache only has to hold those of one reading
GDAL_OPTIONS = rasters.GDAL_OPTIONS | {"GDAL_CACHEMAX": 64 * 2**20}
READ_ROWS = 128  # rows that are read at once from a scene of thin blocks
READ_ROWS_MOST = 1024  # and from one of high blocks
READ_COLUMNS = 2048  # columns of tiles that are read at once, by all threads together
READ_AHEAD = {"cpu": 0, "cuda": 1}  # rows of blocks in work beside the present one
MOST_READERS = 16  # threads that read a scene
# formats that several threads read: others have threads of their own (JPEG 2000), or blocks
# that are not those of the files behind them (VRT)
READ_BY_SEVERAL = ("GTiff",)


class RowBlock(NamedTuple):
    """Some rows of a scene."""

    top: int
    image: Tensor  # (C, n, w) in the scene's dtype, on the device
    valid: np.ndarray  # (n, w) bool

    @property
    def bottom(self) -> int:
        return self.top + len(self.valid)


def rows_at_once(scene: rasterio.DatasetReader, band: int) -> int:
    """How many rows to read together, so that each block of the file is decoded once."""
    block = scene.block_shapes[band - 1][0]
    return min(max(READ_ROWS // block, 1) * block, READ_ROWS_MOST)


class ParallelReader:
    """Threads that read a scene, each with a dataset of its own: GDAL's bear one thread each."""

    def __init__(self, scene: rasterio.DatasetReader, bands: Sequence[int], count: int):
        """Open the scene ``count`` times; once unless it is of ``READ_BY_SEVERAL``."""
        self.scene = scene
        self.bands = list(bands)
        self.dtype = validity(scene, bands).dtype
        self.count = count if scene.driver in READ_BY_SEVERAL else 1
        self.opened = ExitStack()
        # the last one first: it can have decoded the block of which the next rows are wanted
        self.datasets: LifoQueue = LifoQueue()
        self.datasets.put(scene)
        for _ in range(self.count - 1):
            dataset = self.opened.enter_context(open_raster(scene.name))
            self.datasets.put(dataset)
        self.pool = self.opened.enter_context(ThreadPoolExecutor(self.count))

    def fill(
        self, top: int, left: int, images: Sequence, masks: Sequence
    ) -> Iterator[None]:
        """Begin to fill arrays that follow each other downwards from a pixel of the scene.

        Args:
            top: First row.
            left: First column.
            images: (C, n, w) each.
            masks: (n, w) each, for the validity.

        Returns:
            What ends when they are full, and raises what a thread has raised.
        """
        heights = [len(mask) for mask in masks]
        firsts = list(accumulate(heights, initial=top))

        def read(window: Window) -> None:
            dataset = self.datasets.get()
            try:
                pixels, valid = read_image(dataset, window, self.bands)
            finally:
                self.datasets.put(dataset)
            columns = slice(window.col_off - left, window.col_off + window.width - left)
            for first, image, mask in zip(firsts, images, masks):
                begin = max(window.row_off, first)
                end = min(window.row_off + window.height, first + len(mask))
                if begin < end:
                    rows = slice(begin - first, end - first)
                    source = slice(begin - window.row_off, end - window.row_off)
                    image[:, rows, columns] = pixels[:, source]
                    mask[rows, columns] = valid[source]

        right = left + masks[0].shape[1]
        pieces = self._pieces(Extent(top, firsts[-1], left, right))
        return self.pool.map(read, pieces)

    def _pieces(self, part: Extent) -> list[Window]:
        """Some tiles each, so that no array is as large as a row of them, or some strips."""
        high, wide = self.scene.block_shapes[self.bands[0] - 1]
        rows, columns = part.bottom, part.right
        if wide < self.scene.width:
            columns = max(READ_COLUMNS // self.count // wide, 1) * wide
        else:
            rows = math.ceil((part.bottom - part.top) / self.count / high) * high

        def cut(first: int, last: int, step: int):
            inner = range((first // step + 1) * step, last, step)
            return pairwise([first, *inner, last])

        return [
            Window(left, top, right - left, bottom - top)
            for top, bottom in cut(part.top, part.bottom, rows)
            for left, right in cut(part.left, part.right, columns)
        ]


def read_row_blocks(
    readers: ParallelReader, device: torch.device, part: Extent
) -> Iterator[RowBlock]:
    """Read a part of a scene from top to bottom.

    Blocks higher than ``READ_ROWS`` come in several chunks, so that rows can be dropped one by one.

    Raises:
        RasterError: A block cannot be read.
    """
    on_gpu = device.type == "cuda"
    dtype = torch.from_numpy(np.empty(0, readers.dtype)).dtype
    bands, width = len(readers.bands), part.right - part.left
    step = rows_at_once(readers.scene, readers.bands[0])
    waiting: deque = deque()
    if on_gpu:
        torch.cuda.set_device(device)  # a new thread has the first one
        upload = own_stream(device, "upload")

    def begin(top: int, bottom: int):
        cuts = [*range(top, bottom, READ_ROWS), bottom]
        heights = [low - high for high, low in pairwise(cuts)]
        # a GPU copies faster from memory that stays in its place
        images = [
            torch.empty(bands, height, width, dtype=dtype, pin_memory=on_gpu)
            for height in heights
        ]
        masks = [np.empty((height, width), bool) for height in heights]
        arrays = [image.numpy() for image in images]
        filling = readers.fill(top, part.left, arrays, masks)
        return filling, list(zip(cuts, images, masks))

    def finished(filling: Iterator, chunks: list) -> Iterator[RowBlock]:
        deque(filling, 0)
        while chunks:
            high, image, mask = chunks.pop(0)
            if on_gpu:
                with torch.cuda.stream(upload):
                    image = image.to(device)
                image.record_stream(torch.cuda.default_stream(device))
            yield RowBlock(high, image, mask)

    inner = range((part.top // step + 1) * step, part.bottom, step)
    for top, bottom in pairwise([part.top, *inner, part.bottom]):
        waiting.append(begin(top, bottom))
        if len(waiting) > READ_AHEAD[device.type]:
            yield from finished(*waiting.popleft())
    while waiting:
        yield from finished(*waiting.popleft())


class RowBuffer:
    """The chunks that windows still look at, between two columns of a scene."""

    def __init__(self, chunks: Iterator[RowBlock], left: int):
        self.chunks = chunks
        self.left = left
        self.kept: deque[RowBlock] = deque()

    def move(self, top: int, bottom: int) -> None:
        """Drop what lies above ``top`` and fetch what is missing down to ``bottom``."""
        while self.kept and self.kept[0].bottom <= top:
            self.kept.popleft()
        while not self.kept or self.kept[-1].bottom < bottom:
            self.kept.append(next(self.chunks))

    def pieces(self, part: Extent) -> list[Tensor]:
        """A part that is there, (C, n, w) from top to bottom, nothing copied."""
        return [
            chunk.image[:, rows, columns] for chunk, rows, columns in self._cut(part)
        ]

    def valid(self, part: Extent) -> np.ndarray:
        """(h, w) bool of a part that is there."""
        return np.concatenate(
            [chunk.valid[rows, columns] for chunk, rows, columns in self._cut(part)]
        )

    def _cut(self, part: Extent):
        columns = slice(part.left - self.left, part.right - self.left)
        for chunk in self.kept:
            if chunk.top < part.bottom and chunk.bottom > part.top:
                first = max(0, part.top - chunk.top)
                yield chunk, slice(first, part.bottom - chunk.top), columns


def count_readers(device: torch.device) -> int:
    """Threads that read a scene at a time; two cores are left to those that feed a GPU."""
    cores = available_cores() - 2 * (device.type == "cuda")
    return min(max(1, cores), MOST_READERS)
