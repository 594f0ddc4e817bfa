"""A scene read from top to bottom, ahead of the windows."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, closing
from itertools import pairwise
from queue import Queue
from typing import NamedTuple

import numpy as np
import torch
from rasterio.windows import Window
from torch import Tensor

from common.devices import own_stream, to_device
from common.machine import bounded_map, free_memory
from common.rasters import Source, open_raster
from prediction.area import Area, whole_scene
from prediction.tiling import Extent

log = logging.getLogger("semanticseg4eo")

# each block of a scene is read once: its cache only has to hold those of one reading
GDAL_CACHE = 64 * 2**20
READ_ROWS = 128  # rows that are read at once from a scene of thin blocks
READ_ROWS_MOST = 1024  # and from one of high blocks that do not fit into memory
READ_AT_A_TIME = {
    "cpu": 1,
    "cuda": 2,
    "mps": 1,
}  # rows of blocks, each by a dataset of its own


class RowBlock(NamedTuple):
    """Some rows of a scene."""

    top: int
    image: Tensor  # (C, n, w) in the scene's dtype, on the device
    valid: np.ndarray  # (n, w) bool
    wanted: np.ndarray  # (n, w) bool: of these, those in the area that is mapped

    @property
    def bottom(self) -> int:
        return self.top + len(self.valid)


def rows_at_once(source: Source) -> int:
    """How many rows to read together, so that each block of the file is decoded once.

    Where a quarter of the free memory does not hold a row of high blocks, it is
    ``READ_ROWS_MOST``, and these are decoded several times.
    """
    block = block_height(source)
    rows = max(READ_ROWS // block, 1) * block
    pixel = source.dtype.itemsize * len(source.bands)
    fits = rows * source.dataset.width * pixel <= free_memory() / 4
    return rows if rows <= READ_ROWS_MOST or fits else READ_ROWS_MOST


def block_height(source: Source) -> int:
    """Rows of the blocks that a scene is stored in."""
    scene = source.dataset
    return min(scene.block_shapes[source.bands[0] - 1][0], scene.height)


def warn_of_high_blocks(source: Source) -> None:
    """Warn of a scene whose blocks are decoded several times."""
    block = block_height(source)
    if (step := rows_at_once(source)) < block:
        log.warning(
            "warning: %s is stored in strips of %d rows, too large for the free memory, so each "
            "is decoded %d times; in tiles it is read faster (gdal_translate -co TILED=YES)",
            source.dataset.name, block, math.ceil(block / step),
        )  # fmt: skip


class SceneReader:
    """Datasets of one scene that are read at a time; each is decoded by GDAL's own threads."""

    def __init__(
        self,
        source: Source,
        count: int,
        area: Area | None = None,
    ):
        """Open the scene ``count`` times: a dataset of GDAL's serves one thread.

        Args:
            source: Bands of an open raster.
            count: How many threads may read at a time.
            area: What of it is mapped; all by default.
        """
        self.source, self.scene, self.bands = source, source.dataset, source.bands
        self.area = area or whole_scene(self.scene)
        self.dtype = torch.from_numpy(np.empty(0, source.dtype)).dtype
        self.count = count
        self.opened = ExitStack()
        self.sources: Queue = Queue()
        self.sources.put(source)
        for _ in range(count - 1):
            dataset = self.opened.enter_context(open_raster(self.scene.name))
            self.sources.put(source.reopened(dataset))

    def read(self, part: Extent, pin_memory: bool = False) -> RowBlock:
        """Read a part of the scene.

        Raises:
            RasterError: A block of the file cannot be read.
        """
        height, width = part.bottom - part.top, part.right - part.left
        window = Window(part.left, part.top, width, height)
        source = self.sources.get()
        try:
            shape = len(source.bands_read), height, width
            image = torch.empty(shape, dtype=self.dtype, pin_memory=pin_memory)
            _, valid = source.read(window, out=image.numpy())
        finally:
            self.sources.put(source)
        wanted = valid & self.area.inside(part) if self.area.polygons else valid
        return RowBlock(part.top, image[: len(self.bands)], valid, wanted)


def cut_at_multiples(first: int, last: int, step: int) -> list[tuple[int, int]]:
    """Cut a range at the multiples of ``step``: (first, last) of each part."""
    inner = range((first // step + 1) * step, last, step)
    return list(pairwise([first, *inner, last]))


def read_row_blocks(
    reader: SceneReader, device: torch.device, part: Extent
) -> Iterator[RowBlock]:
    """Read a part of a scene from top to bottom, ahead of what is taken.

    Raises:
        RasterError: A block of the file cannot be read.
    """
    cuda = device.type == "cuda"

    def read(rows: tuple[int, int]) -> RowBlock:
        if cuda:  # pragma: no cover - GPU
            torch.cuda.set_device(device)  # a new thread has the first one
        # a GPU copies faster from memory that is pinned to its place
        block = reader.read(Extent(*rows, part.left, part.right), pin_memory=cuda)
        return upload(block, device)

    step = rows_at_once(reader.source)
    ranges = cut_at_multiples(part.top, part.bottom, step)
    high = step > READ_ROWS_MOST  # of which memory is not to hold two
    workers, ahead = (1, 0) if high else (reader.count, 1)
    with closing(bounded_map(read, ranges, workers, ahead)) as blocks:
        yield from blocks


def upload(block: RowBlock, device: torch.device) -> RowBlock:
    """A block whose image is on a device; to a GPU it is copied beside the forward passes."""
    if device.type != "cuda":
        return block._replace(image=to_device(block.image, device))
    with torch.cuda.stream(own_stream(device, "upload")):
        image = block.image.to(device)
    image.record_stream(torch.cuda.default_stream(device))
    return block._replace(image=image)


class RowBuffer:
    """The rows that later windows still need, between two columns of a scene."""

    def __init__(self, blocks: Iterator[RowBlock], left: int):
        """Take the rows from ``blocks``, which begin at column ``left`` of the scene."""
        self.blocks = blocks
        self.left = left
        self.kept: deque[RowBlock] = deque()

    def move(self, top: int, bottom: int) -> None:
        """Drop what lies above ``top`` and fetch what is missing down to ``bottom``."""
        while self.kept and self.kept[0].bottom <= top:
            self.kept.popleft()
        while not self.kept or self.kept[-1].bottom < bottom:
            self.kept.append(next(self.blocks))

    def images(self, part: Extent) -> list[Tensor]:
        """A part that is there as views (C, n, w), from top to bottom; nothing is copied."""
        return [
            block.image[:, rows, columns] for block, rows, columns in self._cut(part)
        ]

    def valid(self, part: Extent) -> np.ndarray:
        """Validity (h, w) bool of a part that is there."""
        return np.concatenate(
            [block.valid[rows, columns] for block, rows, columns in self._cut(part)]
        )

    def wanted(self, part: Extent) -> np.ndarray:
        """What is valid and mapped of a part that is there, (h, w) bool."""
        return np.concatenate(
            [block.wanted[rows, columns] for block, rows, columns in self._cut(part)]
        )

    def _cut(self, part: Extent) -> Iterator[tuple[RowBlock, slice, slice]]:
        columns = slice(part.left - self.left, part.right - self.left)
        for block in self.kept:
            if block.top < part.bottom and block.bottom > part.top:
                first = max(0, part.top - block.top)
                yield block, slice(first, part.bottom - block.top), columns
