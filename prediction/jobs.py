"""A scene that is to be mapped, and how: files, options, memory, workers."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path

import numpy as np
import rasterio
import torch
from affine import Affine

from common import VERSION
from common.colours import Colour
from common.devices import free_memory
from common.errors import RasterError
from common.files import describe_file, describe_files, fingerprint
from common.ground import pixel_areas
from common.mask_options import Mask
from common.masks import coverage_lines, open_mask
from common.nodata import mask_shares, nodata_advice
from common.rasters import (
    Source,
    files_of_raster,
    open_raster,
    require_georeference,
)
from common.sieve import centre_pixel, fewest_pixels
from common.sources import require_whole
from common.text import distance_text
from common.vectors import files_of_vector
from prediction.area import Area, find_area, missed_text, whole_scene
from prediction.dates import require_one_grid
from prediction.ensemble import (
    Models,
    distance_of_training,
    match_bands,
    warn_of_differences,
)
from prediction.layers import Layer, bytes_of, list_layers
from prediction.reader import READ_ROWS_MOST, rows_at_once, warn_of_high_blocks
from prediction.settings import PredictionConfig
from prediction.tasks import Task
from prediction.tiling import WindowLayout, lay_windows

log = logging.getLogger("semanticseg4eo")

OPEN_ROWS = 5e8  # bytes of the rows in work on the CPU, without --max_memory
STORED_AHEAD = {"cpu": 1, "cuda": 3, "mps": 1}  # finished parts that wait to be stored
UNEVEN = 0.05  # from which the sizes of a map's pixels are told to differ
MOST_WORKERS = 4  # windows in work at a time on the CPU: each takes memory


@dataclass(frozen=True)
class SceneJob:
    """A scene that is to be mapped, with the files, models and options of it."""

    task: Task
    config: PredictionConfig
    models: Models
    scene: rasterio.DatasetReader
    bands: list[int]
    layers: dict[str, Layer]
    run: dict  # all that the result depends on, as JSON; see ``make_manifest``
    area: Area  # what of the scene is mapped
    further: tuple[
        tuple[rasterio.DatasetReader, list[int]], ...
    ] = ()  # dates, their bands

    @property
    def dates(self) -> list[tuple[rasterio.DatasetReader, list[int]]]:
        """All scenes that the map is made of, with their bands."""
        return [(self.scene, self.bands), *self.further]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the map."""
        return self.area.extent.shape

    @property
    def transform(self) -> Affine:
        """From the pixels of the map to the ground."""
        return self.scene.transform * Affine.translation(
            self.area.extent.left, self.area.extent.top
        )

    @property
    def names(self) -> list[str]:
        return self.models.first.class_names

    @property
    def codes(self) -> list[int | str]:
        """What the labels held for the classes; of an ensemble, the first model's labels."""
        return self.models.first.class_codes

    @property
    def values(self) -> Sequence[int] | None:
        """What a map of codes holds for the classes; None: their numbers."""
        held = self.layers["classes"].values
        return held and held.values

    @property
    def colours(self) -> list[Colour]:
        """Those of the classes; of an ensemble, the first model's."""
        return self.models.first.class_colours

    @property
    def rasters(self) -> list[Path]:
        """The rasters that are written, the map first."""
        return [self.task.beside(layer.ending) for layer in self.layers.values()]

    @property
    def masks(self) -> list[Mask | None]:
        """``--mask`` of each date."""
        return [self.config.mask_of(Path(scene).stem) for scene in self.task.scenes]

    @cached_property
    def sources(self) -> list[Source]:
        """The bands of each date, to be read with their validity."""
        nodata, masks = self.config.nodata, self.masks
        return [
            Source(*date, nodata=nodata, mask=mask)
            for date, mask in zip(self.dates, masks)
        ]

    @cached_property
    def pixel_areas(self) -> np.ndarray | None:
        """Square metres of a pixel in each row of the map, (H,); None if unknown."""
        areas, extent = pixel_areas(self.scene), self.area.extent
        return None if areas is None else areas[extent.top : extent.bottom]

    def fewest_pixels(self, name: str) -> int:
        """Pixels of the smallest area that ``sieve`` or ``min_area`` leaves; 0 without it."""
        square_metres = getattr(self.config, name)
        if not square_metres:
            return 0
        pixel = centre_pixel(self.scene.name, self.pixel_areas, f"--{name}")
        return fewest_pixels(square_metres, pixel)

    @cached_property
    def layouts(self) -> tuple[WindowLayout, WindowLayout]:
        """Where windows lie along the rows and along the columns."""
        options = self.config.patch_size, self.config.shared, self.config.blend
        down, across = (lay_windows(side, *options) for side in self.scene.shape)
        return down, across

    @cached_property
    def windows(self) -> list[tuple[int, int]]:
        """Row and column of the first pixel of the windows that reach into the map."""
        top, bottom, left, right = self.area.extent
        down, across = self.layouts
        rows = [y for y in down.starts if y + down.size > top and y < bottom]
        columns = [x for x in across.starts if x + across.size > left and x < right]
        return list(product(rows, columns))

    @cached_property
    def training_distance(self) -> float | None:
        """Metres from a window to the nearest training patch, see ``distance_of_training``."""
        sides = [min(one.size, n) for one, n in zip(self.layouts, self.scene.shape)]
        starts = np.array(self.windows)[:, ::-1]
        boxes = np.concatenate([starts, starts + sides[::-1]], axis=1)
        return distance_of_training(self.scene, boxes, self.models)

    @property
    def requested(self) -> dict:
        """The part of ``run`` that files and options determine."""
        return {
            "version": VERSION,
            "scene": describe_scene(self.scene, self.bands),
            "dates": [describe_scene(*date) for date in self.further],
            "area": describe_area(self.config.area),
            "masks": [describe_mask(mask) for mask in self.masks if mask],
            "models": describe_models(self.models),
            "device": self.models.device.type,
            "options": fingerprint(self.config),
        }

    @property
    def tags(self) -> dict[str, str]:
        """Metadata of every output."""
        configs = [checkpoint.config for checkpoint in self.models.checkpoints]
        models = [f"{c.model_name} {c.encoder_name or ''}".strip() for c in configs]
        return {
            "SOFTWARE": f"SemanticSeg4EO {VERSION}",
            "MODEL": ", ".join(dict.fromkeys(models)),
            "MODEL_FILES": ", ".join(Path(file).name for file in self.models.files),
            "NORMALIZATION": self.models.first.normalization.rule,
            "PRECISION": self.run["precision"],
        }


def describe_models(models: Models) -> list[dict]:
    """The checkpoints in ``run``."""
    return [describe_file(file) for file in models.files]


def describe_scene(scene: rasterio.DatasetReader, bands: Sequence[int]) -> dict:
    """A scene in ``run``: its files, size and bands."""
    return {
        "name": scene.name,
        "shape": list(scene.shape),
        "bands": list(bands),
        "files": describe_files(files_of_raster(scene.name)),
    }


def describe_mask(mask: Mask) -> dict[str, str]:
    """The files of ``--mask`` in ``run``."""
    return describe_files(files_of_raster(mask.path))


def describe_area(source: str | None) -> dict[str, str]:
    """The files of ``--area`` in ``run``."""
    return describe_files(files_of_vector(source)) if source else {}


@contextmanager
def open_scenes(task: Task) -> Iterator[list[rasterio.DatasetReader]]:
    """The scene of a task and the dates that are combined with it, opened."""
    with ExitStack() as opened:
        yield [opened.enter_context(open_raster(scene)) for scene in task.scenes]


def prepare_scene(
    task: Task,
    config: PredictionConfig,
    models: Models,
    scenes: Sequence[rasterio.DatasetReader],
) -> SceneJob:
    """Check the scenes of a map and its outputs; ``run`` of the job is still empty.

    Raises:
        RasterError: A scene is cut off, does not fit the model, would be written over, lies outside
            the area or its mask, or on another pixel grid than the first.
    """
    for file in task.scenes:
        require_whole(file)
    require_one_grid(scenes)
    scene, *others = scenes
    bands, *further = (match_bands(one, config, models) for one in scenes)
    area = find_area(config.area, scene) if config.area else whole_scene(scene)
    if area is None or not area.pixels:
        raise RasterError(missed_text(config.area, scene.name, area is not None))
    first = models.first
    classes = first.class_names, len(models.files), first.class_codes
    layers = list_layers(config, *classes)
    job = SceneJob(
        task,
        config,
        models,
        scene,
        bands,
        layers,
        {},
        area,
        tuple(zip(others, further)),
    )
    for mask in filter(None, job.masks):
        require_whole(mask.path)
    for source in job.sources if config.own_masks else ():
        name = source.dataset.name
        coverage_lines(source.mask.path, {name: source.mask.covered})
    outputs = {path.resolve() for path in job.rasters}
    for one in scenes:
        if overwritten := outputs & {Path(file).resolve() for file in one.files}:
            raise RasterError(
                f"{overwritten.pop()} is a part of {one.name}; name another"
            )
    if scene.crs is None and (task.polygons or config.suggest):
        require_georeference(scene)  # nobody could tell where they lie
    for option in options_by_centre(config):
        centre_pixel(scene.name, job.pixel_areas, option)
    return job


def options_by_centre(config: PredictionConfig) -> list[str]:
    """The options in use whose metres are pixels by the one at the centre of the map."""
    names = ("sieve", "min_area", "simplify")
    return [f"--{name}" for name in names if getattr(config, name)]


def report_coverage(tasks: Sequence[Task], config: PredictionConfig) -> None:
    """Log the scenes that the one ``--mask`` of all does not cover.

    Raises:
        RasterError: It cannot be read, or has no ground in common with any of them.
    """
    if config.mask is None or config.own_masks:
        return
    mask, covered = config.mask_of(""), {}
    for name in dict.fromkeys(scene for task in tasks for scene in task.scenes):
        with ExitStack() as opened:
            try:
                scene = opened.enter_context(open_raster(name))
                require_georeference(scene)
            except RasterError:
                continue  # reported when it is mapped
            covered[name] = opened.enter_context(open_mask(mask, scene)).covered
    for line in coverage_lines(mask.path, covered):
        log.warning(line)


def warn_of_scenes(job: SceneJob) -> None:
    """Log what of the scenes makes the map slow or poor, and what is unlike the training's data."""
    scene = job.scene
    for source in job.sources:
        warn_of_high_blocks(source)
    if not (scene.crs or scene.gcps[1] or scene.rpcs):
        log.warning("warning: %s has no CRS, so its map has none", scene.name)
    for source in job.sources:
        for text in filter(None, (*nodata_advice(source), mask_shares(source))):
            log.warning(text)
    if options := options_by_centre(job.config):
        warn_of_uneven_pixels(scene.name, job.pixel_areas, options)
    for name in ("sieve", "min_area"):
        if job.fewest_pixels(name) == 1:
            log.warning(
                "warning: --%s %g changes nothing: a pixel of %s is %.4g square metres",
                name, getattr(job.config, name), scene.name,
                centre_pixel(scene.name, job.pixel_areas, f"--{name}"),
            )  # fmt: skip
    warn_of_differences(job.sources, job.models)
    if (metres := job.training_distance) is not None:
        log.info(
            "the windows of %s lie %s from the nearest training patch (median, of the centres)",
            scene.name, distance_text(metres),
        )  # fmt: skip


def warn_of_uneven_pixels(name: str, areas: np.ndarray, options: Sequence[str]) -> None:
    """Log that pixels of a map are far larger or smaller than the one at its centre.

    Args:
        name: The scene.
        areas: Square metres of a pixel in each row of the map, (H,).
        options: Those that count by the one at the centre.
    """
    there = areas[areas > 0]  # on the Earth
    shares = np.array([there.min(), there.max()]) / areas[len(areas) // 2]
    if np.abs(shares - 1).max() > UNEVEN:
        log.warning(
            "warning: pixels of %s have %.0f to %.0f %% of the area of the one at the centre, by "
            "which %s counts",
            name, *(100 * shares), " and ".join(options),
        )  # fmt: skip


def count_pieces(job: SceneJob) -> int:
    """Into how many pieces of columns a scene is cut for its rows in work to fit into memory."""
    return math.ceil(open_rows(job) / row_limit(job))


def row_limit(job: SceneJob) -> float:
    """Bytes that the rows in work may take.

    In pieces of columns high blocks would be decoded once for each of them.
    """
    if job.config.max_memory:
        return job.config.max_memory * 1e9
    limit = free_memory(job.models.device) / 8
    high = rows_at_once(job.sources[0]) > READ_ROWS_MOST
    cpu = job.models.device.type == "cpu"
    return min(limit, OPEN_ROWS) if cpu and not high else limit


def open_rows(job: SceneJob) -> int:
    """Bytes that the rows in work of a scene take in its whole width."""
    source, size = job.sources[0], job.layouts[0].size
    image = source.dtype.itemsize * len(source.bands) + 1
    channels = job.models.first.config.num_classes + 1
    # high blocks have memory of their own: see ``rows_at_once``
    column = image * (size + 3 * min(rows_at_once(source), READ_ROWS_MOST))
    parts = 2 + STORED_AHEAD[job.models.device.type]
    column += size * (2 * 4 * channels + parts * (4 + bytes_of(job.layers)))
    return column * job.shape[1] * len(job.dates)


def count_workers(job: SceneJob) -> int:
    """Batches to predict at a time: on the CPU several, one per core.

    A core with a window of its own waits for no other core, neither within a pass nor where reading
    and writing take their share; a compiled model gets all cores for one batch.
    """
    if job.models.device.type != "cpu" or job.config.compile:
        return 1
    return min(torch.get_num_threads(), MOST_WORKERS)
