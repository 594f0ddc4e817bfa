"""Map a scene of any size with a trained model, or with several.

    python Predict_large_image.py --model trained_models/model_final_model.pth \\
        --input scene.tif --output map.tif --save_confidence --quicklook

leaves ``map.tif`` with a class per pixel on the scene's own pixel grid, beside it the confidence,
the statistics as JSON and a picture. A window slides over the scene; where windows overlap, their
probabilities are blended with weights that sum to one. Only the rows that later windows still add
to are in memory: threads read ahead of them, others store what is finished and write the maps.

Contents, in order: settings, windows, reading, blending, layers, statistics, unfinished maps,
output files, processes, prediction of a scene, command line.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import operator
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from queue import LifoQueue
from typing import TYPE_CHECKING, NamedTuple
from xml.etree import ElementTree

import numpy as np
import rasterio
import rasterio.shutil
from rasterio.windows import Window

import model_training
import rasters
from rasters import (
    OptionError,
    RasterError,
    SegmentationError,
    require,
    setting,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

log = logging.getLogger("semanticseg4eo")

BLOCK = 256  # side of the outputs' tiles in pixels
SIDE_MULTIPLE = 32  # a scene smaller than a patch is padded to a multiple of this
READ_ROWS = 128  # rows that are read at once from a scene of thin blocks
READ_ROWS_MOST = 1024  # and from one of high blocks
READ_COLUMNS = 2048  # columns of tiles that are read at once, by all threads together
COUNTED_ROWS = 64  # rows whose statistics are counted at once
DECIDED_ROWS = 128  # rows whose classes are chosen at once
PROBES = 3  # windows that tell whether a lower precision keeps the classes
KEPT_CLASSES = 0.999  # share of the pixels that must keep their class
# each block of a scene is read once: its cache only has to hold those of one reading
GDAL_OPTIONS = rasters.GDAL_OPTIONS | {"GDAL_CACHEMAX": 64 * 2**20}
FURTHER_LAYERS = ("confidence", "uncertainty", "probabilities")
OPEN_ROWS = (
    5e8  # bytes of the rows in work on the CPU, unless --max_memory says another
)
BATCH_SIZES = {"cpu": 1, "cuda": 32}  # of --batch_size auto
STORED_AHEAD = {"cpu": 1, "cuda": 3}  # finished parts that wait to be stored
LONGEST_NAME = 255  # bytes of a file's name that file systems allow
MOST_WORKERS = 4  # windows in work at a time on the CPU: each takes memory
READ_AHEAD = {"cpu": 0, "cuda": 1}  # rows of blocks in work beside the present one
MOST_READERS = 16  # threads that read a scene
# formats that several threads read: others have threads of their own (JPEG 2000), or blocks
# that are not those of the files behind them (VRT)
READ_BY_SEVERAL = ("GTiff",)


# --- settings -------------------------------------------------------------------------------


@dataclass(frozen=True)
class PredictionConfig:
    """Every setting of a prediction; the options are made from these fields."""

    model: Sequence[str] = setting(
        help="checkpoints (.pth) that main.py wrote, or a folder of a k-fold run; several are "
        "averaged",
        group="files",
        nargs="+",
    )
    input: Sequence[str] = setting(
        help="scenes, anything that GDAL reads, or folders of them",
        group="files",
        nargs="+",
    )
    output: str = setting(
        help="class map to write (.tif); a folder when there are several scenes",
        group="files",
    )
    resume: bool = setting(
        False, "go on with a map that was interrupted, from its last rows", "files"
    )
    format: str = setting(
        "gtiff", "of all maps: gtiff, or cog (cloud-optimized, with overviews)", "outputs",
        choices=("gtiff", "cog"),
    )  # fmt: skip
    save_confidence: bool = setting(
        False, "write OUTPUT_confidence.tif: probability of the class", "outputs"
    )
    save_uncertainty: bool = setting(
        False,
        "write OUTPUT_uncertainty.tif: entropy and, of several models, their disagreement",
        "outputs",
    )
    save_probabilities: bool = setting(
        False,
        "write OUTPUT_probabilities.tif: a band per class, in 254 steps",
        "outputs",
    )
    quicklook: bool = setting(
        False, "write OUTPUT_quicklook.png: scene, map and legend", "outputs"
    )
    polygons: str | None = setting(
        None,
        "areas of one class as polygons: a .gpkg, a folder when there are several scenes",
        "outputs",
        shown="none",
    )
    min_area: float = setting(
        0.0,
        "smallest polygon in square metres; smaller ones join their largest neighbour",
        "outputs",
    )
    model_name: str | None = setting(
        None, "architecture, of a checkpoint that does not say", "model",
        shown="the checkpoint's",
    )  # fmt: skip
    encoder_name: str | None = setting(
        None, "encoder, likewise", "model", shown="the checkpoint's"
    )
    in_channels: int | None = setting(
        None, "bands that the model takes", "model", shown="the checkpoint's"
    )
    num_classes: int | None = setting(
        None, "classes of the model; 1 or 2 of a binary one", "model",
        shown="the checkpoint's",
    )  # fmt: skip
    bands: str | None = setting(
        None,
        "bands to feed, in the order of training: numbers from 1 or band descriptions",
        "scene",
        shown="all but alpha",
    )
    patch_size: int = setting(512, "side of the sliding window in pixels", "window")
    overlap: int = setting(
        128, "pixels that neighbouring windows share; 25-50 %% of the window", "window"
    )
    blend: str = setting(
        "hann", "weights where windows overlap; none is their plain mean", "window",
        choices=("hann", "gaussian", "linear", "none"),
    )  # fmt: skip
    tta: str = setting(
        "none", "average over 4 mirrored (flip) or 8 turned (d4) views", "window",
        choices=tuple(model_training.VIEWS),
    )  # fmt: skip
    threshold: float = setting(
        0.5, "least foreground probability of a binary map, 0 to 1", "window"
    )
    device: str | None = setting(
        None, "cpu, cuda, cuda:1...", "speed", shown="cuda where there is one, else cpu"
    )  # fmt: skip
    precision: str = setting(
        "auto", "of the forward pass; auto is the fastest that keeps 99.9 %% of the classes",
        "speed", choices=model_training.PRECISIONS,
    )  # fmt: skip
    batch_size: str = setting(
        "auto", "windows per step; halved when memory runs out", "speed"
    )
    compile: bool = setting(
        False, "compile the model first: a minute that pays on long jobs", "speed"
    )
    max_memory: float | None = setting(
        None, "GB for the rows in work; wider scenes are mapped in several columns",
        "speed", shown="0.5 on the CPU, at most an eighth of what is free",
    )  # fmt: skip

    def __post_init__(self):
        size, overlap = self.patch_size, self.overlap
        require(size >= SIDE_MULTIPLE, "--patch_size", size, f"{SIDE_MULTIPLE} or more")
        require(
            0 <= overlap < size,
            "--overlap",
            overlap,
            f"0 to {size - 1}, less than --patch_size {size}",
        )
        fine = rasters.number_or_auto(self.batch_size, 1)
        require(fine, "--batch_size", self.batch_size, "at least 1, or auto")
        require(0 <= self.threshold <= 1, "--threshold", self.threshold, "0 to 1")
        area = self.min_area
        require(0 <= area < math.inf, "--min_area", area, "0 or more square metres")
        fine = self.polygons or not area
        require(fine, "--min_area", area, "--polygons beside it")
        memory = self.max_memory
        fine = memory is None or 1e-6 <= memory < math.inf
        require(fine, "--max_memory", memory, "more than 0 GB, at least 0.000001")
        for name in ("in_channels", "num_classes"):
            value = getattr(self, name)
            fine = value is None or 1 <= value <= 65535
            require(fine, f"--{name}", value, "1 to 65535")

    @property
    def described(self) -> dict:
        """What the options say of the model."""
        names = ("model_name", "encoder_name", "in_channels", "num_classes")
        given = {name: getattr(self, name) for name in names}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class Task:
    """One scene and the files that come of it."""

    scene: str
    output: Path
    polygons: Path | None = None

    def beside(self, ending: str) -> Path:
        """The path of a further file, named after the map."""
        stem = self.output.stem
        return self.output if ending == ".tif" else self.output.with_name(stem + ending)

    @property
    def partial(self) -> Path:
        """The hidden folder of the unfinished map."""
        return self.output.with_name(f".{self.output.name}-partial")


def list_scenes(given: Sequence[str]) -> list[str]:
    """The scenes that ``--input`` names; a folder stands for those in it.

    Raises:
        RasterError: A folder without scenes.
    """
    scenes = []
    for text in given:
        if not Path(text).is_dir():
            scenes.append(text)
            continue
        found = sorted(
            str(path)
            for path in Path(text).iterdir()
            if path.suffix.lower() in rasters.SCENE_SUFFIXES
            and path.is_file()
            and not path.name.startswith(".")
        )
        if not found:
            raise RasterError(
                f"No scenes in {text} (looked for {', '.join(rasters.SCENE_SUFFIXES)})"
            )
        scenes += found
    return scenes


def list_tasks(config: PredictionConfig) -> list[Task]:
    """The scenes to map and the names of their maps.

    Raises:
        OptionError: An output that is no .tif, a folder that is a file, an output that is an input.
        RasterError: A folder without scenes, or two scenes of one name.
    """
    scenes, output = list_scenes(config.input), Path(config.output)
    folders = any(Path(text).is_dir() for text in config.input)
    if len(scenes) > 1 or folders or output.is_dir():
        tiff = output.suffix.lower() in rasters.TIFF_SUFFIXES
        fine = output.is_dir() or not (output.exists() or tiff)
        require(fine, "--output", output, "a folder for several scenes")
        tasks = [Task(s, output / f"{Path(s).stem}_prediction.tif") for s in scenes]
        if folder := config.polygons:
            fine = Path(folder).suffix != ".gpkg"
            require(fine, "--polygons", folder, "a folder for several scenes")
            tasks = [
                replace(task, polygons=Path(folder) / f"{task.output.stem}.gpkg")
                for task in tasks
            ]
    else:
        fine = output.suffix.lower() in rasters.TIFF_SUFFIXES
        require(fine, "--output", output, "a name that ends in .tif")
        polygons = config.polygons and Path(config.polygons)
        fine = not polygons or polygons.suffix == ".gpkg"
        require(fine, "--polygons", polygons, "a name that ends in .gpkg")
        tasks = [Task(scenes[0], output, polygons or None)]
    require_names(tasks, config)
    return tasks


def require_readable(scene: str) -> None:
    """Raise RasterError unless a scene can be opened and all of it is there."""
    rasters.open_raster(scene).close()
    rasters.require_whole(scene)


def require_names(tasks: Sequence[Task], config: PredictionConfig) -> None:
    """Raise what ``list_tasks`` raises for maps of names that cannot be."""
    written: dict[Path, str] = {}
    for task in tasks:
        other = written.setdefault(task.output, task.scene)
        if other is not task.scene:
            raise RasterError(
                f"{other} and {task.scene} would both be mapped to {task.output}"
            )
    for task in tasks:
        name = task.output.name
        longest = os.fsencode(task.beside("_probabilities.tif").name)
        fine = len(longest) <= LONGEST_NAME
        require(
            fine,
            "--output",
            name,
            "a shorter name, which the maps beside it begin with",
        )
    scenes = [task.scene for task in tasks]
    inputs = {Path(file).resolve() for file in (*scenes, *config.model)}
    for task in tasks:
        for ending in (".tif", *(f"_{name}.tif" for name in FURTHER_LAYERS)):
            path = task.beside(ending)
            require(path.resolve() not in inputs, "--output", path, "not an input")


def require_folders(tasks: Sequence[Task]) -> None:
    """Raise SegmentationError where maps cannot be written."""
    for task in tasks:
        rasters.require_folder("--output", task.output.parent)
        if task.polygons:
            rasters.require_folder("--polygons", task.polygons.parent)


# --- windows --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """The windows along one side of a scene, and how they are blended."""

    length: int  # pixels of the scene
    size: int  # pixels of a window
    starts: list[int]
    weights: np.ndarray  # (windows, size) float32; over the scene they sum to one
    kinds: list[int]  # for each window the first one with its weights


class Region(NamedTuple):
    """A part of a scene in pixels: first row, row after the last, columns likewise."""

    top: int
    bottom: int
    left: int
    right: int


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


def make_axis(length: int, patch_size: int, overlap: int, blend: str = "hann") -> Axis:
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
    starts = rasters.window_starts(length, size, patch_size - overlap)
    ramp = window_weights(size, blend)
    total = np.zeros(max(length, size))
    for start in starts:
        total[start : start + size] += ramp
    weights = np.stack([ramp / total[start : start + size] for start in starts])
    weights = weights.astype(np.float32)
    _, first, which = np.unique(weights, axis=0, return_index=True, return_inverse=True)
    return Axis(length, size, starts, weights, first[which.ravel()].tolist())


def batches(axis: Axis, batch_size: int, first: int, last: int) -> list[np.ndarray]:
    """The windows of one row that are predicted together, as numbers along ``axis``.

    They are the same whatever part of the row is asked for, so that no result depends on how
    a scene is shared out.

    Args:
        axis: The columns.
        batch_size: Windows of the largest batch.
        first: Batches that end left of this pixel are left out.
        last: And those that begin at this pixel or right of it.
    """
    count = len(axis.starts)
    groups = np.array_split(np.arange(count), math.ceil(count / batch_size))
    return [
        group
        for group in groups
        if axis.starts[group[0]] < last and axis.starts[group[-1]] + axis.size > first
    ]


def split_columns(axis: Axis, batch_size: int, pieces: int) -> list[tuple[int, int]]:
    """Share the columns of a scene out into pieces (left, right) of whole batches."""
    groups = batches(axis, batch_size, 0, axis.length)
    shares = np.array_split(np.arange(len(groups)), min(pieces, len(groups)))
    lefts = [axis.starts[groups[share[0]][0]] for share in shares]
    return list(zip(lefts, [*lefts[1:], axis.length]))


def split_rows(
    axis: Axis, top: int, bottom: int, number: int, of: int
) -> tuple[int, int] | None:
    """One of several equal shares of the rows between two, in whole window rows."""
    cuts = [top, *(start for start in axis.starts if top < start < bottom)]
    share = np.array_split(np.arange(len(cuts)), of)[number]
    if not len(share):
        return None
    return cuts[share[0]], [*cuts, bottom][share[-1] + 1]


# --- reading --------------------------------------------------------------------------------


class Chunk(NamedTuple):
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


class Readers:
    """Threads that read a scene, each with a dataset of its own: GDAL's bear one thread each."""

    def __init__(self, scene: rasterio.DatasetReader, bands: Sequence[int], count: int):
        """Open the scene ``count`` times; once unless it is of ``READ_BY_SEVERAL``."""
        self.scene = scene
        self.bands = list(bands)
        self.dtype = rasters.validity(scene, bands).dtype
        self.count = count if scene.driver in READ_BY_SEVERAL else 1
        self.opened = ExitStack()
        # the last one first: it can have decoded the block of which the next rows are wanted
        self.datasets: LifoQueue = LifoQueue()
        self.datasets.put(scene)
        for _ in range(self.count - 1):
            dataset = self.opened.enter_context(rasters.open_raster(scene.name))
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
                pixels, valid = rasters.read_image(dataset, window, self.bands)
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
        pieces = self._pieces(Region(top, firsts[-1], left, right))
        return self.pool.map(read, pieces)

    def _pieces(self, part: Region) -> list[Window]:
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


def read_chunks(
    readers: Readers, device: torch.device, part: Region
) -> Iterator[Chunk]:
    """Read a part of a scene from top to bottom.

    Blocks higher than ``READ_ROWS`` come in several chunks, so that rows can be dropped one by one.

    Raises:
        RasterError: A block cannot be read.
    """
    import torch

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

    def finished(filling: Iterator, chunks: list) -> Iterator[Chunk]:
        deque(filling, 0)
        while chunks:
            high, image, mask = chunks.pop(0)
            if on_gpu:
                with torch.cuda.stream(upload):
                    image = image.to(device)
                image.record_stream(torch.cuda.default_stream(device))
            yield Chunk(high, image, mask)

    inner = range((part.top // step + 1) * step, part.bottom, step)
    for top, bottom in pairwise([part.top, *inner, part.bottom]):
        waiting.append(begin(top, bottom))
        if len(waiting) > READ_AHEAD[device.type]:
            yield from finished(*waiting.popleft())
    while waiting:
        yield from finished(*waiting.popleft())


@cache
def own_stream(device: torch.device, purpose: str) -> torch.cuda.Stream:
    """A queue of a GPU for what goes on beside the forward passes.

    There is one for each purpose, since PyTorch keeps freed memory for the queue that had it.
    """
    import torch

    return torch.cuda.Stream(device)


@contextmanager
def ahead(items: Iterable) -> Iterator[Iterator]:
    """Have a thread fetch the next item while the present one is worked on."""
    end, source = object(), iter(items)

    def fetched(pool):
        waiting = pool.submit(next, source, end)
        while (item := waiting.result()) is not end:
            waiting = pool.submit(next, source, end)
            yield item

    with ThreadPoolExecutor(1) as pool:
        yield fetched(pool)


class OpenChunks:
    """The chunks that windows still look at, between two columns of a scene."""

    def __init__(self, chunks: Iterator[Chunk], left: int):
        self.chunks = chunks
        self.left = left
        self.kept: deque[Chunk] = deque()

    def move(self, top: int, bottom: int) -> None:
        """Drop what lies above ``top`` and fetch what is missing down to ``bottom``."""
        while self.kept and self.kept[0].bottom <= top:
            self.kept.popleft()
        while not self.kept or self.kept[-1].bottom < bottom:
            self.kept.append(next(self.chunks))

    def pieces(self, part: Region) -> list[Tensor]:
        """A part that is there, (C, n, w) from top to bottom, nothing copied."""
        return [
            chunk.image[:, rows, columns] for chunk, rows, columns in self._cut(part)
        ]

    def valid(self, part: Region) -> np.ndarray:
        """(h, w) bool of a part that is there."""
        return np.concatenate(
            [chunk.valid[rows, columns] for chunk, rows, columns in self._cut(part)]
        )

    def _cut(self, part: Region):
        columns = slice(part.left - self.left, part.right - self.left)
        for chunk in self.kept:
            if chunk.top < part.bottom and chunk.bottom > part.top:
                first = max(0, part.top - chunk.top)
                yield chunk, slice(first, part.bottom - chunk.top), columns


def reflect_beyond(array, height: int, width: int):
    """Extend an array or tensor (..., h, w) downwards and to the right by reflection."""
    for axis, size in ((-2, height), (-1, width)):
        length = array.shape[axis]
        if length < size:
            places = np.pad(np.arange(length), (0, size - length), mode="reflect")
            array = array[..., places, :] if axis == -2 else array[..., places]
    return array


# --- blending -------------------------------------------------------------------------------

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


def join_pieces(windows: Sequence[Sequence[Tensor]], size: tuple[int, int]) -> Tensor:
    """Windows (N, C, h, w) float32 of their pieces, reflected to ``size``, channels last."""
    import torch

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


def finished_by(down: Axis, row: int, region: Region) -> Region:
    """The rows of a region that no window after a row of windows adds to."""
    ends = [*down.starts[1:], down.length]
    top, bottom = max(down.starts[row], region.top), min(ends[row], region.bottom)
    return region._replace(top=top, bottom=max(top, bottom))


def cut_batches(
    source: Iterator[Chunk], axes: tuple[Axis, Axis], region: Region, batch_size: int
) -> Iterator[Batch]:
    """Cut the windows over a region out of its rows, in order; a row has at least one batch."""
    import torch

    down, across = axes
    size = down.size, across.size
    *_, left, right = region_to_read(axes, region, batch_size)
    chunks = OpenChunks(source, left)
    groups = batches(across, batch_size, region.left, region.right)
    for row, top in enumerate(down.starts):
        if top + down.size <= region.top or top >= region.bottom:
            continue
        bottom = min(top + down.size, down.length)
        chunks.move(top, bottom)
        for group in groups:
            columns, windows, masks = [], [], []
            for column in group:
                start = across.starts[column]
                part = Region(top, bottom, start, min(start + across.size, right))
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
    source: Iterator[Chunk],
    predict: Predict,
    axes: tuple[Axis, Axis],
    region: Region,
    channels: int,
    batch_size: int = 4,
    device="cpu",
    workers: int = 1,
) -> Iterator[tuple[Region, Tensor, np.ndarray]]:
    """Slide a window over a part of a scene and yield its rows from top to bottom, each once.

    Every pixel gets all windows that cover it, also those that reach beyond the part, in the order
    of rows and columns: parts of a scene hold exactly what the whole would.

    Args:
        source: The rows of ``region_to_read``.
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
    import torch

    down, across = axes
    row_weights = torch.from_numpy(down.weights).to(device)
    column_weights = torch.from_numpy(across.weights).to(device)

    @cache
    def outer(row: int, column: int) -> Tensor:
        return torch.outer(row_weights[row], column_weights[column])

    def window_weight(row: int, column: int) -> Tensor:
        return outer(down.kinds[row], across.kinds[column])

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


def region_to_read(axes: tuple[Axis, Axis], region: Region, batch_size: int) -> Region:
    """The part of a scene that the windows over a region, and their batches, look at."""
    down, across = axes
    tops = [
        top
        for top in down.starts
        if top + down.size > region.top and top < region.bottom
    ]
    groups = batches(across, batch_size, region.left, region.right)
    right = across.starts[groups[-1][-1]] + across.size
    return Region(
        tops[0],
        min(tops[-1] + down.size, down.length),
        across.starts[groups[0][0]],
        min(right, across.length),
    )


# --- layers ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """One of the rasters that come of a scene."""

    name: str
    dtype: str
    nodata: float
    bands: list[str]  # what they are
    scale: float = 1.0  # value = stored number x scale

    @property
    def ending(self) -> str:
        """What its file name has after the map's."""
        return ".tif" if self.name == "classes" else f"_{self.name}.tif"


def list_layers(config: PredictionConfig, names: Sequence[str], models: int):
    """The layers of a map that are asked for, the classes first."""
    nodata = map_nodata(len(names))
    dtype = "uint8" if nodata == 255 else "uint16"
    layers = [Layer("classes", dtype, nodata, ["class"])]
    if config.save_confidence:
        bands = ["probability of the class"]
        layers.append(Layer("confidence", "float32", -1, bands))
    if config.save_uncertainty:
        bands = ["entropy of the probabilities, 0 to 1"]
        if models > 1:
            bands.append("disagreement of the models (mutual information), 0 to 1")
        layers.append(Layer("uncertainty", "float32", -1, bands))
    if config.save_probabilities:
        bands = [f"probability of {name}" for name in names]
        layers.append(Layer("probabilities", "uint8", 255, bands, scale=1 / 254))
    return {layer.name: layer for layer in layers}


def map_nodata(label_classes: int) -> int:
    """The value of invalid pixels in a map: 255, or 65535 past 255 classes."""
    return 255 if label_classes <= 255 else 65535


def few_rows(tensor: Tensor, rows: int) -> Iterator[slice]:
    """All rows (n, w) of a tensor, on the CPU some at a time, which then stay in its cache."""
    step = rows if tensor.device.type == "cpu" else max(1, len(tensor))
    for first in range(0, len(tensor), step):
        yield slice(first, first + step)


def decide(probabilities: Tensor, threshold: float = 0.5) -> tuple[Tensor, Tensor]:
    """The class of each pixel, and its probability.

    Args:
        probabilities: (K, H, W) float32; K = 1 is the foreground alone.
        threshold: Least probability of the foreground (K = 1).

    Returns:
        classes (H, W) uint8 (int32 past 255 classes), the first where several are as likely, and
        confidence (H, W) float32.
    """
    import torch

    if len(probabilities) == 1:
        foreground = probabilities[0]
        # blended weights sum to one but for the last bit
        classes = foreground >= threshold - 1e-6
        confidence = torch.where(classes, foreground, 1 - foreground)
        return classes.to(torch.uint8), confidence.clamp(max=1)
    small = len(probabilities) <= 255
    classes = torch.zeros_like(
        probabilities[0], dtype=torch.uint8 if small else torch.int32
    )
    confidence = probabilities[0].clone()
    # torch's argmax takes ten times as long on the CPU
    for rows in few_rows(classes, DECIDED_ROWS):
        chosen, most = classes[rows], confidence[rows]
        for number in range(1, len(probabilities)):
            other = probabilities[number, rows]
            better = other > most
            better = better.view(torch.uint8) if small else better.to(torch.int32)
            torch.maximum(chosen, better * number, out=chosen)  # numbers grow
            torch.maximum(most, other, out=most)
    return classes, confidence.clamp_(max=1)


def derive(
    blended: Tensor, layers: dict[str, Layer], classes: int, threshold: float
) -> dict[str, Tensor]:
    """Classes, confidence and the other layers, (bands, H, W) each, of blended probabilities.

    Args:
        blended: (K, H, W); behind the classes the models' mean own entropy, where it is needed.
        layers: Those that are wanted.
        classes: K without that.
        threshold: Of a binary map.
    """
    import torch

    probabilities = blended[:classes]
    chosen, confidence = decide(probabilities, threshold)
    result = {"classes": chosen[None], "confidence": confidence[None]}
    if "uncertainty" in layers:
        entropy = model_training.entropy(probabilities.clamp(0, 1)).clamp_(0, 1)
        bands = [entropy]
        if (
            len(blended) > classes
        ):  # Houlsby et al. 2011: entropy of the mean - mean entropy
            bands.append((entropy - blended[classes]).clamp_(0, 1))
        result["uncertainty"] = torch.stack(bands)
    if "probabilities" in layers:
        if classes == 1:
            probabilities = torch.cat([1 - probabilities, probabilities])
        scaled = (probabilities.clamp(0, 1) * 254).round_()
        result["probabilities"] = scaled.to(torch.uint8)
    return result


def mask_layers(
    tensors: dict[str, Tensor], valid: np.ndarray, layers: dict[str, Layer]
) -> dict[str, np.ndarray]:
    """Layers as they are written: in their dtype, nodata where not ``valid``; overwrites them."""
    import torch

    if not valid.all():
        invalid = torch.from_numpy(~valid).to(tensors["classes"].device)
        for name, layer in layers.items():
            tensors[name].masked_fill_(invalid, layer.nodata)
    return {
        name: tensors[name].cpu().numpy().astype(layer.dtype, copy=False)
        for name, layer in layers.items()
    }


# --- statistics -----------------------------------------------------------------------------


BINS = 1000  # of the confidence between 0 and 1
# of one, in which confidences are added up: whole numbers have the same sum in any order
PARTS = 2**20


def tally(
    classes: Tensor, confidence: Tensor, valid: np.ndarray, count: int
) -> np.ndarray:
    """Count the confidence of a part of a map.

    Args:
        classes: (n, w) below ``count``.
        confidence: (n, w), 0 to 1.
        valid: (n, w) bool; other pixels do not count.
        count: Classes of the map.

    Returns:
        (BINS + count,) int64: the pixels in each bin, and the sum over each class in ``PARTS``;
        those of several parts can be added.

    Raises:
        SegmentationError: A probability that is not a number.
    """
    import torch

    total = torch.zeros(BINS + count, dtype=torch.int64)
    every = valid.all()
    for rows in few_rows(classes, COUNTED_ROWS):
        chosen, values = classes[rows].flatten(), confidence[rows].flatten()
        if not every:  # the others come into the first bin, and out of it again
            invalid = torch.from_numpy(~valid[rows]).to(values.device).flatten()
            values = values.masked_fill(invalid, 0)
            total[0] -= int(invalid.sum())
        if not torch.isfinite(values.sum()):
            raise SegmentationError(
                "The model gives probabilities that are not numbers; are the scene's values "
                "absurd, did the training diverge, or is --precision fp16 too coarse for it?"
            )
        bins = (values * BINS).to(torch.int32).clamp_(max=BINS - 1)
        total[:BINS] += torch.bincount(bins, minlength=BINS).cpu()
        parts = (values * PARTS).round_().to(torch.float64)
        total[BINS:] += torch.bincount(chosen, parts, minlength=count).long().cpu()
    return total.numpy()


class Statistics:
    """What a map adds up to."""

    def __init__(self, names: Sequence[str], areas: np.ndarray | None):
        """``areas`` (H,): square metres of a pixel in each row, None if unknown."""
        self.names = list(names)
        self.areas = areas
        self.alike = areas is None or areas.min() == areas.max()
        self.row = 0
        self.total = 0
        self.pixels = np.zeros(len(self.names), np.int64)
        self.area = np.zeros(len(self.names))
        self.tally = np.zeros(BINS + len(self.names), np.int64)  # of all parts

    def add(self, classes: np.ndarray) -> None:
        """Count the next rows of a map, (n, W)."""
        count = len(self.names)
        for some in [classes] if self.alike else classes:
            pixels = np.bincount(some.ravel(), minlength=count)[:count]
            self.pixels += pixels
            if self.areas is not None:
                self.area += pixels * self.areas[self.row]
            self.row += 1 if some.ndim == 1 else len(some)
        self.total += classes.size

    def report(self) -> dict:
        """Pixels, shares, areas and confidence, as plain numbers for JSON."""
        mapped = int(self.pixels.sum())
        histogram, sums = self.tally[:BINS], self.tally[BINS:] / PARTS
        classes = []
        for number, name in enumerate(self.names):
            pixels = int(self.pixels[number])
            entry = {"class": number, "name": name, "pixels": pixels}
            entry["share"] = pixels / mapped if mapped else None
            known = self.areas is not None
            entry["area_ha"] = float(self.area[number]) / 1e4 if known else None
            mean = float(sums[number]) / pixels if pixels else None
            classes.append(entry | {"mean_confidence": mean})
        summary = None
        if mapped:
            reached = np.cumsum(histogram) / mapped
            summary = {"mean": float(sums.sum()) / mapped}
            for key, share in (("p10", 0.1), ("median", 0.5), ("p90", 0.9)):
                place = int(np.searchsorted(reached, share))
                summary[key] = (place + 0.5) / BINS
            summary["share_below_0.5"] = float(histogram[: BINS // 2].sum()) / mapped
        return {
            "pixels": self.total,
            "mapped_pixels": mapped,
            "nodata_pixels": self.total - mapped,
            "classes": classes,
            "confidence": summary,
        }


def report_text(report: dict) -> str:
    """The statistics as aligned text, a line per class."""
    width = max(12, *(len(entry["name"]) + 2 for entry in report["classes"]))
    head = f"{'class':>5}  {'name':{width}}{'pixels':>14}{'share':>9}{'area (ha)':>15}"
    lines = [f"{report['output']}", head + f"{'confidence':>12}"]

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    for entry in report["classes"]:
        lines.append(
            f"{entry['class']:>5}  {entry['name']:{width}}{entry['pixels']:>14,}"
            f"{number(entry['share'], '.2%'):>9}{number(entry['area_ha'], ',.2f'):>15}"
            f"{number(entry['mean_confidence'], '.3f'):>12}"
        )
    nodata = report["nodata_pixels"] / report["pixels"]
    lines.append(f"nodata {report['nodata_pixels']:,} pixels ({nodata:.2%})")
    summary = report["confidence"]
    if summary:
        lines.append(
            f"confidence: mean {summary['mean']:.3f}, median {summary['median']:.3f}, 80 % between "
            f"{summary['p10']:.3f} and {summary['p90']:.3f}, "
            f"{summary['share_below_0.5']:.2%} of the pixels below 0.5"
        )
    return "\n".join(lines)


# --- unfinished maps ------------------------------------------------------------------------


def bytes_of(layers: dict[str, Layer]) -> int:
    """Bytes of a pixel in all layers."""
    return sum(np.dtype(one.dtype).itemsize * len(one.bands) for one in layers.values())


def require_room(folder: Path, layers: dict[str, Layer], shape) -> int:
    """The bytes that an unfinished map of shape (H, W) takes in a folder.

    Raises:
        SegmentationError: The disk does not hold them.
    """
    needed = bytes_of(layers) * shape[0] * shape[1]
    places = folder.absolute(), *folder.absolute().parents
    free = shutil.disk_usage(next(path for path in places if path.exists())).free
    # what is there of a former run is gone on with, or dropped
    for path in folder.glob("*.raw"):
        status = path.stat()
        free += getattr(status, "st_blocks", status.st_size / 512) * 512  # no holes
    if needed > free:
        raise SegmentationError(
            f"{folder.parent} has {free / 1e9:.1f} GB free, but the unfinished map takes "
            f"{needed / 1e9:.1f} GB; free some, or write elsewhere"
        )
    return needed


class Unfinished:
    """Finished rows of a map on disk: what an interrupted run goes on from.

    In a hidden folder lie ``run.json`` (what is being made), a raw file per layer in the order
    (row, band, column), and a ``done-N.txt`` per process with a line for every part of the scene
    that is safely in them: its four sides and its ``tally``. Output files are always made from
    there, from the first row to the last: they do not depend on who found which row when. A thread
    may read while another one writes.
    """

    def __init__(self, folder: Path, layers: dict[str, Layer], shape, number: int = 0):
        """Open what ``begin`` has made, as process ``number``; shape is (H, W)."""
        self.layers = layers
        self.height, self.width = shape
        self.covered = np.zeros(self.height, np.int64)  # finished columns of each row
        self.opened = ExitStack()

        def unbuffered(name: str, mode: str):
            file = open(folder / name, mode, buffering=0)  # noqa: SIM115
            return self.opened.enter_context(file)

        self.files = {name: unbuffered(f"{name}.raw", "r+b") for name in layers}
        self.sources = {name: unbuffered(f"{name}.raw", "rb") for name in layers}
        self.journal = unbuffered(f"done-{number}.txt", "ab")

    @staticmethod
    def begin(folder: Path, run: dict, layers: dict[str, Layer], shape) -> None:
        """Make the folder of a map of which nothing is there yet."""
        if folder.exists():
            if (folder / "run.json").exists():
                log.info("the unfinished map in %s is dropped", folder)
            Unfinished.drop(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in layers:
            (folder / f"{name}.raw").touch()
        rasters.write_json(folder / "run.json", run)

    @staticmethod
    def drop(folder: Path) -> None:
        """Empty the folder; a kill amid it leaves nothing that looks like a run to go on with."""
        (folder / "run.json").unlink(missing_ok=True)
        for path in folder.glob("*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    @staticmethod
    def finished_parts(folder: Path) -> list[Finished]:
        """The parts that are there, the journals of former processes joined into one."""
        journals = sorted(folder.glob("done-*.txt"))
        parts = [part for journal in journals for part in read_journal(journal)]
        parts = list(dict.fromkeys(parts))  # two tell the same after a kill right here
        with rasters.whole_file(folder / "done-0.txt") as file:
            file.write_text("".join(map(_journal_line, parts)))
        for journal in journals:
            if journal.name != "done-0.txt":
                journal.unlink()
        return parts

    def mark(self, part: Region) -> None:
        """Count a part as finished."""
        self.covered[part.top : part.bottom] += part.right - part.left

    def write(
        self, part: Region, arrays: dict[str, np.ndarray], counted: np.ndarray
    ) -> None:
        """Store a part, {layer: (bands, n, w)} and its ``tally``, safely."""
        for name, array in arrays.items():
            file, pixel = self.files[name], array.itemsize
            rows = np.ascontiguousarray(array.swapaxes(0, 1))
            bands = len(array)
            if array.shape[2] == self.width:
                pieces = [(part.top * bands * self.width, rows)]
            else:
                pieces = [
                    (((part.top + row) * bands + band) * self.width + part.left, line)
                    for row, lines in enumerate(rows)
                    for band, line in enumerate(lines)
                ]
            for place, piece in pieces:
                file.seek(place * pixel)
                _write_all(file, memoryview(piece).cast("B"))
            os.fsync(file.fileno())
        line = _journal_line(Finished(part, tuple(counted.tolist())))
        _write_all(self.journal, memoryview(line.encode()))
        os.fsync(self.journal.fileno())
        self.mark(part)

    def read(self, name: str, top: int, bottom: int) -> np.ndarray:
        """Finished rows of a layer, (bands, n, W)."""
        layer, file = self.layers[name], self.sources[name]
        rows = np.empty((bottom - top, len(layer.bands), self.width), layer.dtype)
        file.seek(top * rows[0].nbytes)
        data = memoryview(rows).cast("B")
        while data:
            if not (count := file.readinto(data)):
                raise SegmentationError(
                    f"{file.name} is cut off; leave --resume out to start anew"
                )
            data = data[count:]
        return rows.swapaxes(0, 1)


class Finished(NamedTuple):
    """A part of a map that is safely stored."""

    part: Region
    tally: tuple[int, ...]  # of its confidence


def _journal_line(finished: Finished) -> str:
    return " ".join(map(str, finished.part + finished.tally)) + "\n"


def read_journal(path: Path) -> list[Finished]:
    """The finished parts that a journal tells of."""
    lines = path.read_text().splitlines(keepends=True)
    # a line without an end is of a process that was killed while it wrote
    numbers = [tuple(map(int, line.split())) for line in lines if line.endswith("\n")]
    return [Finished(Region(*line[:4]), line[4:]) for line in numbers]


def _write_all(file, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]


def remaining(parts: Sequence[Region], part: Region) -> list[Region]:
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


# --- output files ---------------------------------------------------------------------------


class Maps:
    """Puts finished rows into the output files, in order and as whole rows of blocks."""

    def __init__(self, unfinished: Unfinished, files: dict, statistics: Statistics):
        self.unfinished = unfinished
        self.files = files
        self.statistics = statistics
        self.row = 0

    def advance(self) -> None:
        """Write what has become whole since."""
        rows, height = self.unfinished, self.unfinished.height
        open_rows = np.flatnonzero(rows.covered[self.row :] < rows.width)
        ready = self.row + int(open_rows[0]) if len(open_rows) else height
        while (bottom := min(self.row + BLOCK, height)) <= ready and self.row < height:
            window = Window(0, self.row, rows.width, bottom - self.row)
            for name, file in self.files.items():
                array = rows.read(name, self.row, bottom)
                file.write(array, window=window)
                if name == "classes":
                    for row in range(0, len(array[0]), COUNTED_ROWS):
                        self.statistics.add(array[0, row : row + COUNTED_ROWS])
            self.row = bottom


def map_profile(scene: rasterio.DatasetReader, layer: Layer) -> dict:
    """What an output is created with."""
    profile = {
        "width": scene.width,
        "height": scene.height,
        "count": len(layer.bands),
        "dtype": layer.dtype,
        "nodata": layer.nodata,
        "tiled": True,
        "blockxsize": BLOCK,
        "blockysize": BLOCK,
        "compress": "deflate",
        "interleave": "band",
        "bigtiff": "if_safer",
    }
    if layer.dtype == "float32":
        profile["predictor"] = 3
    points, points_crs = scene.gcps
    if points and points_crs and scene.crs is None:
        return profile | {"gcps": points, "crs": points_crs}
    return profile | {"crs": scene.crs, "transform": scene.transform}


@contextmanager
def open_outputs(job: Job, folder: Path) -> Iterator[dict]:
    """The output files of a scene to write to, by layer; unfinished ones lie in ``folder``.

    All appear under their names when all are complete. GeoTIFF has no place for the names of
    categories that other programs look into, so they lie also in GDAL's ``.aux.xml``.
    """
    task, layers, names = job.task, job.layers, job.names
    with ExitStack() as finished:
        parts = {
            name: finished.enter_context(
                rasters.whole_file(task.beside(layer.ending), folder)
            )
            for name, layer in layers.items()
        }
        plain = parts
        if job.config.format == "cog":
            plain = {name: folder / f"{name}.tif" for name in layers}
        with ExitStack() as unfinished:
            files = {}
            for name, layer in layers.items():
                file = rasters.create_tiff(plain[name], **map_profile(job.scene, layer))
                files[name] = file = unfinished.enter_context(file)
                file.update_tags(**job.tags, **rasters.class_name_tags(names))
                file.descriptions = layer.bands
                file.scales = [layer.scale] * len(layer.bands)
            colours = enumerate(rasters.class_colours(len(names)))
            files["classes"].write_colormap(
                1, {number: (*rgb, 255) for number, rgb in colours}
            )
            yield files
        if job.config.format == "cog":
            for name, layer in layers.items():
                make_cog(plain[name], parts[name], layer)
        add_categories(Path(f"{parts['classes']}.aux.xml"), names)


def make_cog(plain: Path, target: Path, layer: Layer) -> None:
    """Make a cloud-optimized GeoTIFF of a plain one, with overviews."""
    options = {
        "COMPRESS": "DEFLATE",
        "PREDICTOR": "FLOATING_POINT" if layer.dtype == "float32" else "NO",
        "OVERVIEW_RESAMPLING": "MODE" if layer.name == "classes" else "AVERAGE",
        "BIGTIFF": "IF_SAFER",
    }
    rasterio.shutil.copy(plain, target, driver="COG", **options)
    rasters.require_whole_tiff(target)


def add_categories(path: Path, names: Sequence[str]) -> None:
    """Put the category names of band 1 into GDAL's auxiliary metadata, there or not yet."""
    root = ElementTree.Element("PAMDataset")
    if path.exists():  # GDAL has put there what a GeoTIFF cannot hold
        root = ElementTree.parse(path).getroot()
    band = ElementTree.SubElement(root, "PAMRasterBand", band="1")
    categories = ElementTree.SubElement(band, "CategoryNames")
    for name in names:
        ElementTree.SubElement(categories, "Category").text = name
    ElementTree.ElementTree(root).write(path, encoding="utf-8")


# --- prediction of a scene ------------------------------------------------------------------


@dataclass(frozen=True)
class Models:
    """The checkpoints of a run, on their device."""

    files: list[str]
    checkpoints: list[model_training.Checkpoint]
    device: torch.device
    make_predictor: Callable[[str], model_training.Predictor]  # from a precision

    @property
    def first(self) -> model_training.Checkpoint:
        return self.checkpoints[0]


def list_models(given: Sequence[str]) -> list[str]:
    """The checkpoints that ``--model`` names.

    A folder stands for the final models of the folds in it; without folds for its own final
    model, and without one for all its checkpoints.

    Raises:
        CheckpointError: A folder without checkpoints.
    """
    files: list[str] = []
    for text in given:
        folder = Path(text)
        if not folder.is_dir():
            files.append(text)
            continue
        found = (
            sorted(folder.glob("fold_*/model_final_model.pth"), key=_fold_number)
            or sorted(folder.glob("model_final_model.pth"))
            or sorted(p for p in folder.glob("*.pth") if p.name != "model_last.pth")
        )
        if not found:
            raise model_training.CheckpointError(
                f"No checkpoints (.pth) in {folder}, nor in folders fold_N of it"
            )
        files += map(str, found)
    return files


def _fold_number(path: Path) -> tuple[int, str]:
    number = path.parent.name.removeprefix("fold_")
    return (int(number) if number.isdecimal() else 0), number


def load_models(config: PredictionConfig) -> Models:
    """Open all checkpoints of a run.

    Raises:
        CheckpointError: One cannot be used, contradicts an option, or does not go with the first.
    """
    device = model_training.own_device(config.device)
    files = list_models(config.model)
    checkpoints = [
        model_training.load_checkpoint(file, device, config.described) for file in files
    ]
    checkpoints = [
        replace(
            one,
            model=model_training.fold_normalization(one.model, one.config.in_channels),
        )
        for one in checkpoints
    ]
    if one_thread_each(config, device):
        for checkpoint in checkpoints:
            model_training.speed_up_pointwise(checkpoint.model)
    first = checkpoints[0]
    for file, other in zip(files, checkpoints):
        for what, a, b in (
            ("bands", first.config.in_channels, other.config.in_channels),
            ("outputs", first.config.num_classes, other.config.num_classes),
            ("class names", first.class_names, other.class_names),
        ):
            if a != b:
                raise model_training.CheckpointError(
                    f"{file} has {what} {b}, but {files[0]} has {a}; they cannot be averaged"
                )
    if (
        first.config.mode == "multiclass"
        and config.threshold != PredictionConfig.threshold
    ):
        raise OptionError(
            f"--threshold {config.threshold}: {files[0]} has {first.config.num_classes} classes, "
            "and a threshold is for binary models"
        )
    if config.precision == "fp16" and device.type == "cpu":
        raise OptionError("--precision fp16: for GPUs; take auto, bf16 or fp32")
    disagreement = config.save_uncertainty and len(files) > 1

    @cache
    def make_predictor(precision: str) -> model_training.Predictor:
        return model_training.Predictor(
            checkpoints, device, precision, config.tta, disagreement,
            batch_size_of(config, device) if config.compile else 0,
        )  # fmt: skip

    return Models(files, checkpoints, device, make_predictor)


def one_thread_each(config: PredictionConfig, device) -> bool:
    """Whether windows are predicted by oneDNN, each in a thread of its own."""
    import torch

    if device.type != "cpu" or config.compile:
        return False
    native = model_training.native_precisions(device)
    known = config.precision != "bf16" or "bf16" in native
    return known and torch.backends.mkldnn.is_available()


def batch_size_of(config: PredictionConfig, device) -> int:
    """Windows per step."""
    auto = config.batch_size == "auto"
    return BATCH_SIZES[device.type] if auto else int(config.batch_size)


def match_bands(
    scene: rasterio.DatasetReader, config: PredictionConfig, models: Models
) -> list[int]:
    """The bands of a scene that the model gets.

    Raises:
        RasterError: Not as many as the model takes.
    """
    bands = rasters.select_bands(scene, config.bands)
    expected = models.first.config.in_channels
    trained = [
        names if all(names) else []
        for checkpoint in models.checkpoints
        for names in [checkpoint.metadata.get("band_descriptions") or []]
    ]
    if len(bands) != expected:
        known = f" ({', '.join(trained[0])})" if trained[0] else ""
        raise RasterError(
            f"{scene.name} gives {len(bands)} bands, but {models.files[0]} takes {expected}{known}; "
            "select them with --bands"
        )
    ours = [scene.descriptions[band - 1] for band in bands]
    for file, names in zip(models.files, trained):
        if all(ours) and names and ours != list(names):
            log.warning(
                "warning: the bands of %s are %s, but %s was trained on %s; --bands orders them",
                scene.name, ", ".join(ours), file, ", ".join(names),
            )  # fmt: skip
            break
    return bands


def sample_pixels(scene: rasterio.DatasetReader, bands: Sequence[int]) -> np.ndarray:
    """Valid pixels (M, C) of small windows spread over a scene."""
    size, samples = 64, []
    # the middle and towards the corners, like the five on a die
    for down, across in ((3, 3), (1, 1), (1, 5), (5, 1), (5, 5)):
        row = max(0, scene.height - size) * down // 6
        column = max(0, scene.width - size) * across // 6
        window = Window(column, row, size, size)
        image, valid = rasters.read_image(scene, window, bands)
        samples.append(image[:, valid].T)
    return np.concatenate(samples)


def warn_of_strange_values(scene, bands: Sequence[int], models: Models) -> None:
    """Warn, once, of bands whose values are not those that a model was trained on.

    That is where over a quarter of the pixels (in training: 2 %) lie outside the training
    percentiles, or where all of them lie within a tenth of that range.
    """
    pixels = sample_pixels(scene, bands)
    for file, checkpoint in zip(models.files, models.checkpoints):
        normalization = checkpoint.normalization
        if normalization.rule != "dataset" or not len(pixels):
            continue
        low, high = np.array(normalization.low), np.array(normalization.high)
        outside = ((pixels < low) | (pixels > high)).mean(axis=0)
        span = np.diff(np.percentile(pixels, [1, 99], axis=0), axis=0)[0]
        strange = np.flatnonzero((outside > 0.25) | (span < 0.1 * (high - low)))
        if not len(strange):
            continue
        middle = np.median(pixels, axis=0)
        told = [
            f"{bands[i]} (median {middle[i]:.4g}, trained on {low[i]:.4g} to {high[i]:.4g})"
            for i in strange[:4]
        ]
        more = f" and {len(strange) - 4} more" if len(strange) > 4 else ""
        log.warning(
            "warning: %s has other values than %s was trained on, in band %s%s; same sensor, units "
            "and processing?",
            scene.name, file, ", ".join(told), more,
        )  # fmt: skip
        return


def probe_windows(scene, bands: Sequence[int], axes) -> list[tuple]:
    """Some windows with valid pixels, drawn from the whole scene: (image, valid) each."""
    down, across = axes
    high, wide = scene.block_shapes[bands[0] - 1]

    def block_start(start: int, block: int, size: int) -> int:
        """A window that begins with a block touches fewer of them."""
        return start // block * block if block <= size else start

    columns, windows = len(across.starts), []
    order = np.random.default_rng(0).permutation(len(down.starts) * columns)
    corners = [
        (
            block_start(down.starts[number // columns], high, down.size),
            block_start(across.starts[number % columns], wide, across.size),
        )
        for number in order[:25].tolist()
    ]
    for top, left in dict.fromkeys(corners):
        window = Window(left, top, across.size, down.size)
        inside = rasters.window_within(window, scene.width, scene.height)
        image, valid = rasters.read_image(scene, inside, bands)
        if valid.any():
            shape = down.size, across.size
            windows.append(
                (reflect_beyond(image, *shape), reflect_beyond(valid, *shape))
            )
        if len(windows) == PROBES:
            break
    return windows


def choose_precision(job: Job) -> str:
    """The precision of ``--precision auto`` for a scene.

    The first that the hardware computes natively in which the classes of some windows stay as they
    are in float32; scenes of a few windows are not worth the trial.
    """
    import torch

    config, models, axes = job.config, job.models, job.axes
    native = model_training.native_precisions(models.device)
    few = len(axes[0].starts) * len(axes[1].starts) < 5 * PROBES
    if not native or few:
        return "fp32"
    probes = [
        [torch.from_numpy(array)[None].to(models.device) for array in probe]
        for probe in probe_windows(job.scene, job.bands, axes)
    ]

    workers = count_workers(job)

    def classes(precision: str) -> list[Tensor]:
        options = models.checkpoints, models.device, precision, config.tta
        predictor = model_training.Predictor(*options)

        def predict(probe) -> Tensor:
            image, mask = probe
            return decide(predictor(image, mask)[0], config.threshold)[0][mask[0]]

        with shared_threads(workers), ThreadPoolExecutor(workers) as pool:
            return list(pool.map(predict, probes))

    exact = classes("fp32")
    total = sum(map(len, exact))
    for precision in native:
        pairs = zip(exact, classes(precision))
        same = sum(int((one == other).sum()) for one, other in pairs)
        if same >= KEPT_CLASSES * total:
            if precision != native[0]:
                log.info("computing in %s", precision)
            return precision
        log.info(
            "%s changes the class of %.2f %% of the pixels",
            precision, 100 * (1 - same / total),
        )  # fmt: skip
    log.info("computing in fp32")
    return "fp32"


def free_memory(device) -> int:
    """Bytes that this process can still take on a device."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    return rasters.free_memory()


def count_pieces(job: Job) -> int:
    """Into how many pieces of columns a scene is cut to keep its open rows in memory."""
    return math.ceil(open_rows(job) / row_limit(job))


def row_limit(job: Job) -> float:
    """Bytes that open rows may take."""
    if job.config.max_memory:
        return job.config.max_memory * 1e9
    limit = free_memory(job.models.device) / 8
    return min(limit, OPEN_ROWS) if job.models.device.type == "cpu" else limit


def open_rows(job: Job) -> int:
    """Bytes that the open rows of a scene take in its whole width."""
    scene, bands, size = job.scene, job.bands, job.axes[0].size
    image = rasters.validity(scene, bands).dtype.itemsize * len(bands) + 1
    channels = job.models.first.config.num_classes + 1
    column = image * (size + 3 * rows_at_once(scene, bands[0]))
    parts = 2 + STORED_AHEAD[job.models.device.type]
    column += size * (2 * 4 * channels + parts * (4 + bytes_of(job.layers)))
    return column * scene.width


RESULT_OPTIONS = (
    "bands", "patch_size", "overlap", "blend", "tta", "threshold", "precision", "batch_size",
    "compile", "format", "save_confidence", "save_uncertainty", "save_probabilities",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A scene that is to be mapped, and how."""

    task: Task
    config: PredictionConfig
    models: Models
    scene: rasterio.DatasetReader
    bands: list[int]
    layers: dict[str, Layer]
    run: dict  # all that the result depends on, as JSON; see plan_run

    @property
    def names(self) -> list[str]:
        return self.models.first.class_names

    @cached_property
    def axes(self) -> tuple[Axis, Axis]:
        """Where windows lie, along the rows and the columns."""
        options = self.config.patch_size, self.config.overlap, self.config.blend
        down, across = (make_axis(side, *options) for side in self.scene.shape)
        return down, across

    @property
    def asked(self) -> dict:
        """The part of ``run`` that files and options tell."""
        return {
            "version": rasters.VERSION,
            "scene": describe_file(self.task.scene)
            | {"shape": list(self.scene.shape), "bands": self.bands},
            "models": [describe_file(file) for file in self.models.files],
            "device": self.models.device.type,
            "options": {name: getattr(self.config, name) for name in RESULT_OPTIONS},
        }

    @property
    def tags(self) -> dict[str, str]:
        """Metadata of every output."""
        configs = [checkpoint.config for checkpoint in self.models.checkpoints]
        models = [f"{c.model_name} {c.encoder_name or ''}".strip() for c in configs]
        return {
            "SOFTWARE": f"SemanticSeg4EO {rasters.VERSION}",
            "MODEL": ", ".join(dict.fromkeys(models)),
            "MODEL_FILES": ", ".join(Path(file).name for file in self.models.files),
            "NORMALIZATION": self.models.first.normalization.rule,
            "PRECISION": self.run["precision"],
        }


def frame_job(task: Task, config: PredictionConfig, models: Models, scene) -> Job:
    """Look at a scene and its outputs; the ``run`` is still to be planned.

    Raises:
        RasterError: The scene is cut off, does not fit the model, or would be written over.
    """
    rasters.require_whole(task.scene)
    bands = match_bands(scene, config, models)
    layers = list_layers(config, models.first.class_names, len(models.files))
    job = Job(task, config, models, scene, bands, layers, {})
    outputs = {path.resolve() for path in written(job)}
    if overwritten := outputs & {Path(file).resolve() for file in scene.files}:
        raise RasterError(
            f"{overwritten.pop()} is a part of {task.scene}; name another"
        )
    if scene.crs is None and not scene.gcps[1]:
        log.warning("warning: %s has no CRS, so its map has none", scene.name)
        if config.min_area:
            raise RasterError(f"--min_area: {scene.name} has no CRS to measure in")
    return job


def written(job: Job) -> list[Path]:
    """The rasters that come of a scene."""
    return [job.task.beside(layer.ending) for layer in job.layers.values()]


def plan_run(job: Job) -> tuple[dict, bool]:
    """Decide how a scene is mapped: all that its result depends on, as JSON.

    Returns:
        The run, and whether it has been finished already (``--resume``).

    Raises:
        SegmentationError: The disk does not hold it, or ``--resume`` finds another run.
    """
    config, models, scene, asked = job.config, job.models, job.scene, job.asked
    former = former_run(job) if config.resume else None
    if not (former and former[1]):
        require_room(job.task.partial, job.layers, scene.shape)
    if former:
        return former
    warn_of_strange_values(scene, job.bands, models)
    batch_size = batch_size_of(config, models.device)
    run = asked | {
        "precision": config.precision,
        "batch_size": batch_size,
        "columns": split_columns(job.axes[1], batch_size, count_pieces(job)),
    }
    if config.precision == "auto":
        run["precision"] = choose_precision(job)
    return run, False


def describe_file(path: str) -> dict:
    """What tells a file from another one of its name; only the name where GDAL alone can see it."""
    if not os.path.isfile(path):
        return {"name": path}
    status = os.stat(path)
    return {"name": path, "bytes": status.st_size, "modified": status.st_mtime}


def former_run(job: Job) -> tuple[dict, bool] | None:
    """The run that ``--resume`` goes on with, and whether it is finished; None without one.

    Raises:
        SegmentationError: It was another one.
    """
    task, asked, finished = job.task, job.asked, False
    place = task.partial / "run.json"
    if place.exists():
        run = json.loads(place.read_text())
    else:
        place = task.beside("_statistics.json")
        expected = [place, *(task.polygons,) * bool(task.polygons), *written(job)]
        if job.config.quicklook:
            expected.append(task.beside("_quicklook.png"))
        if not all(path.exists() for path in expected):
            return None
        run, finished = json.loads(place.read_text()).get("run") or {}, True
    for name, value in asked["options"].items():
        if (former := run.get("options", {}).get(name)) != value:
            raise SegmentationError(
                f"--resume: {place} is of a run with --{name} {former}, not {value}; give the "
                "same options, or leave --resume out to start anew"
            )
    for name in ("scene", "models", "device", "version"):
        if run.get(name) != asked[name]:
            raise SegmentationError(
                f"--resume: {place} is of a run with another {name.removesuffix('s')} "
                f"({run.get(name)}); leave --resume out to start anew"
            )
    return run, finished


def map_scene(
    task: Task, config: PredictionConfig, models: Models, team: model_training.Team
) -> dict:
    """Map one scene and write all that was asked for.

    Returns:
        The statistics; those of the first process count.

    Raises:
        SegmentationError: The scene does not fit the model, or into memory, or cannot be read.
    """
    import torch

    with rasters.open_raster(task.scene) as scene:
        job = frame_job(task, config, models, scene)
        run, finished = team.share(lambda: plan_run(job))
        job = replace(job, run=run)
        if finished:
            log.info("%s is there already", task.output)
            if team.leads and task.partial.exists():  # killed while it was dropped
                with rasters.sole_run("--output", task.output, task.partial):
                    Unfinished.drop(task.partial)
                task.partial.rmdir()
            return json.loads(task.beside("_statistics.json").read_text())
        with ExitStack() as stack:
            if team.leads:
                sole_run = rasters.sole_run("--output", task.output, task.partial)
                stack.enter_context(sole_run)
                endings = ("_statistics.json", "_quicklook.png")
                further = [task.polygons] if task.polygons else []
                rasters.drop_unfinished([*map(task.beside, endings), *further])
            try:
                statistics = compute(job, team)
                return finish(job, statistics) if team.leads else {}
            except Exception as error:
                if team.size == 1:
                    with suppress(OSError):  # the error that ends the run is told
                        Unfinished.drop(task.partial)
                        task.partial.rmdir()
                if isinstance(error, torch.OutOfMemoryError):
                    raise SegmentationError(
                        f"The memory of {models.device} does not hold the open rows of "
                        f"{task.scene}; lower --batch_size or --max_memory"
                    ) from error
                raise


def finish(job: Job, statistics: Statistics) -> dict:
    """Write what is made of the finished maps, the statistics last; these."""
    task, config = job.task, job.config
    report = {"scene": task.scene, "output": str(task.output)}
    if not statistics.pixels.any():
        log.warning(
            "warning: %s has no valid pixel, so its map is nodata alone; is its nodata value right?",
            task.scene,
        )
    report |= {"model": job.models.files} | statistics.report() | {"run": job.run}
    if task.polygons:
        rasters.write_polygons(task.output, task.polygons, job.names, config.min_area)
    if config.quicklook:
        draw_quicklook(task, job.names, config.save_confidence)
    rasters.write_json(task.beside("_statistics.json"), report)
    Unfinished.drop(task.partial)
    task.partial.rmdir()
    return report


def compute(job: Job, team: model_training.Team) -> Statistics:
    """Predict what is not there yet of a scene, and write its maps (the first process does)."""
    folder, shape = job.task.partial, job.scene.shape

    def begin() -> list[Finished]:
        if job.config.resume and (folder / "run.json").exists():
            rasters.drop_unfinished(folder / path.name for path in written(job))
            return Unfinished.finished_parts(folder)
        Unfinished.begin(folder, job.run, job.layers, shape)
        return []

    former = team.share(begin)
    parts = [finished.part for finished in former]
    if not (folder / "run.json").exists():
        raise SegmentationError(
            f"{folder} is not there for process {team.rank}; --output must lie in a folder that "
            "all processes share"
        )
    statistics = Statistics(job.names, rasters.pixel_areas(job.scene))
    with ExitStack() as stack:
        rows = Unfinished(folder, job.layers, shape, team.rank)
        stack.enter_context(rows.opened)
        maps = None
        if team.leads:
            for part, counted in former:
                rows.mark(part)
                statistics.tally += counted
            outputs = open_outputs(job, folder)
            maps = Maps(rows, stack.enter_context(outputs), statistics)
        mine = []
        for left, right in job.run["columns"]:
            for open_part in remaining(parts, Region(0, shape[0], left, right)):
                share = split_rows(
                    job.axes[0], open_part.top, open_part.bottom, team.rank, team.size
                )
                if share:
                    mine.append(Region(*share, left, right))
        predict_parts(job, mine, rows, maps)
        team.wait()
        if maps:
            for number in range(1, team.size):
                for part, counted in read_journal(folder / f"done-{number}.txt"):
                    rows.mark(part)
                    statistics.tally += counted
            maps.advance()
    return statistics


def count_workers(job: Job) -> int:
    """Batches to predict at a time: on the CPU several, as many as the cores can.

    Each core at its own window waits for no other one, neither within a pass, nor where reading and
    writing take their share of the cores; a compiled model has all cores for one.
    """
    import torch

    if job.models.device.type != "cpu" or job.config.compile:
        return 1
    return min(torch.get_num_threads(), MOST_WORKERS)


def count_readers(device: torch.device) -> int:
    """Threads that read a scene at a time; two cores are left to those that feed a GPU."""
    cores = rasters.own_cores() - 2 * (device.type == "cuda")
    return min(max(1, cores), MOST_READERS)


@contextmanager
def shared_threads(workers: int) -> Iterator[None]:
    """Share torch's threads among workers."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // workers))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class InOrder:
    """A thread that does what it is given in order, while a few things wait at most."""

    def __init__(self, most: int):
        self.most = most
        self.pool = ThreadPoolExecutor(1)
        self.waiting: deque = deque()

    def do(self, function: Callable, *arguments) -> None:
        """Raises what an earlier one has raised."""
        while len(self.waiting) >= self.most:
            self.waiting.popleft().result()
        self.waiting.append(self.pool.submit(function, *arguments))

    def finish(self) -> None:
        """Wait for all; raises what one of them has raised."""
        while self.waiting:
            self.waiting.popleft().result()


@contextmanager
def beside_passes(
    device: torch.device, after: torch.cuda.Event | None
) -> Iterator[None]:
    """Compute and copy back beside the forward passes of a GPU, after an event among them."""
    if device.type == "cpu":
        yield
        return
    import torch

    torch.cuda.set_device(device)  # a new thread has the first one
    stream = own_stream(device, "download")
    after.wait(stream)
    with torch.cuda.stream(stream):
        yield


def predict_parts(
    job: Job, parts: Sequence[Region], rows: Unfinished, maps: Maps | None
) -> None:
    """Predict parts of a scene and store them; threads read ahead, store, and write the maps."""
    import torch
    from tqdm import tqdm

    predictor = job.models.make_predictor(job.run["precision"])
    batch_size, device = job.run["batch_size"], job.models.device
    on_gpu = device.type == "cuda"
    bar = tqdm(
        total=sum(part.bottom - part.top for part in parts),
        desc=Path(job.task.scene).name,
        unit="row",
        disable=None if maps else True,
    )
    workers = count_workers(job)
    with ExitStack() as stack:
        stack.enter_context(bar)
        stack.enter_context(shared_threads(workers))
        readers = Readers(job.scene, job.bands, count_readers(device))
        stack.enter_context(readers.opened)
        storing, writing = InOrder(STORED_AHEAD[device.type]), InOrder(1)
        for thread in (writing, storing):  # storing ends first: it has more to write
            stack.enter_context(thread.pool)

        def store(part: Region, tensors, valid, derived) -> None:
            with beside_passes(device, derived):
                both = tensors["classes"][0], tensors["confidence"][0]
                counted = tally(*both, valid, len(job.names))
                arrays = mask_layers(tensors, valid, job.layers)
            rows.write(part, arrays, counted)
            if maps:
                maps.statistics.tally += counted
                writing.do(maps.advance)

        if maps:
            writing.do(maps.advance)
        for part in parts:
            needed = region_to_read(job.axes, part, batch_size)
            with (
                ahead(read_chunks(readers, device, needed)) as chunks,
                closing(
                    blended_rows(
                        chunks, predictor, job.axes, part, predictor.channels,
                        batch_size, device, workers,
                    )
                ) as blended,
            ):  # fmt: skip
                for done, probabilities, valid in blended:
                    tensors = derive(
                        probabilities,
                        job.layers,
                        predictor.classes,
                        job.config.threshold,
                    )
                    derived = None
                    if on_gpu:
                        derived = torch.cuda.current_stream(device).record_event()
                    storing.do(store, done, tensors, valid, derived)
                    bar.update(done.bottom - done.top)
        storing.finish()
        writing.finish()


def draw_quicklook(task: Task, names: Sequence[str], confidence: bool) -> Path:
    """Draw scene, map with legend and, when there is one, confidence; the PNG."""
    with rasters.open_raster(task.scene) as scene:
        shown = rasters.rgb_bands(scene.descriptions, scene.colorinterp)
        picture = rasters.stretch(*rasters.overview(scene, shown))
    with rasters.open_raster(task.output) as raster:
        classes, _ = rasters.overview(raster, [1])
    panels = [
        {"title": f"scene (bands {', '.join(map(str, shown))})", "picture": picture},
        {"title": "map", "picture": rasters.colour_map(classes[0], len(names))},
    ]
    if confidence:
        with rasters.open_raster(task.beside("_confidence.tif")) as raster:
            values, valid = rasters.overview(raster, [1])
        values = np.where(valid, values[0], np.nan)
        panels.append({"title": "confidence", "picture": values, "limits": (0, 1)})
    target = task.beside("_quicklook.png")
    colours = rasters.class_colours(len(names))
    figure = rasters.draw_panels(panels, list(zip(names, colours)), task.output.name)
    rasters.save_figure(figure, target)
    return target


# --- looking ahead --------------------------------------------------------------------------


def check_scenes(config: PredictionConfig) -> tuple[rasters.Faults, dict]:
    """Look at all that a run would look at, and do none of its work.

    Returns:
        What stands against the run, a line each; and, when nothing does, what it will take:
        "scenes" that are not finished, with their "pixels" and "windows", "window_seconds"
        (measured on a batch), "memory" in bytes (of the GPU, else of this process), "unfinished"
        (bytes on disk of the largest map in work) and "maps" (of all, without compression), and
        the "precision".
    """
    faults = rasters.Faults()
    models = faults.attempt(load_models, config)
    if not models:  # the loading ends with the first fault
        for file in faults.attempt(list_models, config.model) or []:
            options = file, "cpu", config.described
            faults.attempt(model_training.load_checkpoint, *options)
    tasks = faults.attempt(list_tasks, config) or []
    faults.attempt(require_folders, tasks)
    if not (models and tasks):
        for scene in faults.attempt(list_scenes, config.input) or []:
            faults.attempt(require_readable, scene)
        return faults, {}
    outlook = dict.fromkeys(("scenes", "pixels", "windows", "unfinished", "maps"), 0)
    for task in tasks:
        measure = "memory" not in outlook
        found = faults.attempt(check_scene, task, config, models, measure) or {}
        for key, number in found.items():
            more = max if key == "unfinished" else operator.add
            outlook[key] = more(outlook[key], number) if key in outlook else number
    return faults, outlook


def check_scene(
    task: Task, config: PredictionConfig, models: Models, measure: bool
) -> dict:
    """Raise what would be raised before the work on a scene; its numbers for ``check_scenes``.

    A scene that ``--resume`` finds finished has none. Those of ``measure_windows`` come when asked for.
    """
    if task.partial.exists():  # another run may be at it
        with rasters.sole_run("--output", task.output, task.partial):
            pass
    with rasters.open_raster(task.scene) as scene:
        job = frame_job(task, config, models, scene)
        if config.resume and (former := former_run(job)) and former[1]:
            return {}
        warn_of_strange_values(scene, job.bands, models)
        unfinished = require_room(task.partial, job.layers, scene.shape)
        pixels = scene.height * scene.width
        return {
            "scenes": 1,
            "pixels": pixels,
            "windows": math.prod(len(axis.starts) for axis in job.axes),
            "unfinished": unfinished,
            "maps": bytes_of(job.layers) * pixels,
        } | (measure_windows(job) if measure else {})


def measure_windows(job: Job) -> dict:
    """Predict a batch of a scene: the "window_seconds", "memory" and "precision" of a run."""
    import torch

    config, models, device = job.config, job.models, job.models.device
    auto = config.precision == "auto"
    precision = choose_precision(job) if auto else config.precision
    probes = probe_windows(job.scene, job.bands, job.axes)
    rows = min(open_rows(job), row_limit(job))
    if not probes:
        return {}  # nothing but nodata: the next scene may have more
    count, workers = batch_size_of(config, device), count_workers(job)
    images, masks = (
        torch.from_numpy(np.stack([array] * count)).to(device) for array in probes[0]
    )
    predictor = models.make_predictor(precision)

    def predict(_) -> float:
        return predictor(images, masks).sum().item()

    with shared_threads(workers), ThreadPoolExecutor(workers) as pool:
        for _ in range(2):  # libraries warm up in the first
            started = time.perf_counter()
            list(pool.map(predict, range(workers)))
            seconds = time.perf_counter() - started
    memory = model_training.peak_memory(device)
    return {
        "window_seconds": seconds / (workers * count),
        "memory": memory and memory + rows,
        "precision": precision,
    }


# --- command line ---------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="Predict_large_image.py",
        description=__doc__.split("\n")[0],
        allow_abbrev=False,
    )
    rasters.add_settings(parser, PredictionConfig)
    about = parser.add_argument_group("about")
    about.add_argument(
        "--check",
        action="store_true",
        help="look at all files and options, predict a batch, tell what stands against the run and "
        "what it will take, and end",
    )
    about.add_argument(
        "--debug", action="store_true", help="show the traceback of any error"
    )
    return parser


def predict_scenes(config: PredictionConfig) -> int:
    """Map all scenes; those that cannot be mapped are told and left out.

    Several processes share each scene out by rows; when there are as many scenes as processes,
    or more, each maps some of the scenes by itself.

    Returns:
        How many scenes failed.
    """
    tasks = list_tasks(config)
    require_folders(tasks)
    if len(tasks) == 1:
        require_readable(tasks[0].scene)  # before the model is loaded
    model_training.keep_memory()
    with model_training.join_team() as team:
        models = load_models(config)
        if 1 < team.size <= len(tasks):
            tasks, helpers = tasks[team.rank :: team.size], model_training.Team()
        else:
            helpers = team
        failed = 0
        for task in tasks:
            try:
                report = map_scene(task, config, models, helpers)
            except (SegmentationError, OSError) as error:
                if len(tasks) == 1 or helpers.size > 1:
                    raise
                failed += 1
                print(f"error: {error}", file=sys.stderr)
            else:
                if helpers.leads:
                    print(report_text(report), flush=True)
    if failed:
        print(f"error: {failed} of {len(tasks)} scenes not mapped", file=sys.stderr)
    return failed


def check(config: PredictionConfig) -> int:
    """Tell what stands against a run, or what it will take; the exit status."""
    faults, outlook = check_scenes(config)
    if faults.tell() or not rasters.leads():
        return 1 if faults else 0
    print(
        f"scenes        {outlook['scenes']}, {outlook['pixels'] / 1e6:.1f} megapixels"
    )
    print(
        f"windows       {outlook['windows']} of {config.patch_size} x {config.patch_size}"
    )
    if "window_seconds" in outlook:
        seconds = outlook["windows"] * outlook["window_seconds"]
        time_left = model_training.duration(seconds)
        print(f"time          {time_left} at most, in {outlook['precision']}")
    if outlook.get("memory"):
        print(f"memory        {outlook['memory'] / 1e9:.1f} GB")
    maps, unfinished = (f"{outlook[k] / 1e9:.2f}" for k in ("maps", "unfinished"))
    print(
        f"disk          {maps} GB at most, and {unfinished} GB while a scene is mapped"
    )
    print("Nothing stands against this run.")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 could not be done, 2 wrong command line, 130 interrupted."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    rasters.show_messages()
    try:
        config = rasters.settings_from(PredictionConfig, arguments)
        with rasters.ending_as_ctrl_c(), rasterio.Env(**GDAL_OPTIONS):
            if arguments.check:
                return check(config)
            return 1 if predict_scenes(config) else 0
    except OptionError as error:
        if arguments.debug:
            raise
        parser.error(str(error))
    except (SegmentationError, OSError, MemoryError) as error:
        if arguments.debug:
            raise
        print(
            f"error: {rasters.explain(error, '--patch_size or --max_memory')}",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("interrupted; --resume goes on with an unfinished map", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
