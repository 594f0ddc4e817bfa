"""A scene that is to be mapped, and how: all that its result depends on."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import rasterio
import torch

from common import VERSION
from common.devices import free_memory
from common.errors import RasterError
from common.files import describe_file
from common.rasters import Source
from common.tiffs import require_complete
from prediction.ensemble import Models, match_bands
from prediction.layers import Layer, bytes_of, list_layers
from prediction.reader import rows_at_once
from prediction.settings import PredictionConfig
from prediction.tasks import Task
from prediction.tiling import WindowLayout, lay_windows

log = logging.getLogger("semanticseg4eo")

OPEN_ROWS = (
    5e8  # bytes of the rows in work on the CPU, unless --max_memory says another
)
STORED_AHEAD = {"cpu": 1, "cuda": 3}  # finished parts that wait to be stored
MOST_WORKERS = 4  # windows in work at a time on the CPU: each takes memory
RESULT_OPTIONS = (
    "bands", "patch_size", "overlap", "blend", "tta", "threshold", "precision", "batch_size",
    "compile", "format", "save_confidence", "save_uncertainty", "save_probabilities",
)  # fmt: skip


@dataclass(frozen=True)
class SceneJob:
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
    def axes(self) -> tuple[WindowLayout, WindowLayout]:
        """Where windows lie, along the rows and the columns."""
        options = self.config.patch_size, self.config.overlap, self.config.blend
        down, across = (lay_windows(side, *options) for side in self.scene.shape)
        return down, across

    @property
    def asked(self) -> dict:
        """The part of ``run`` that files and options tell."""
        return {
            "version": VERSION,
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
            "SOFTWARE": f"SemanticSeg4EO {VERSION}",
            "MODEL": ", ".join(dict.fromkeys(models)),
            "MODEL_FILES": ", ".join(Path(file).name for file in self.models.files),
            "NORMALIZATION": self.models.first.normalization.rule,
            "PRECISION": self.run["precision"],
        }


def prepare_scene(
    task: Task, config: PredictionConfig, models: Models, scene
) -> SceneJob:
    """Look at a scene and its outputs; the ``run`` is still to be planned.

    Raises:
        RasterError: The scene is cut off, does not fit the model, or would be written over.
    """
    require_complete(task.scene)
    bands = match_bands(scene, config, models)
    layers = list_layers(config, models.first.class_names, len(models.files))
    job = SceneJob(task, config, models, scene, bands, layers, {})
    outputs = {path.resolve() for path in output_rasters(job)}
    if overwritten := outputs & {Path(file).resolve() for file in scene.files}:
        raise RasterError(
            f"{overwritten.pop()} is a part of {task.scene}; name another"
        )
    if scene.crs is None and not scene.gcps[1]:
        log.warning("warning: %s has no CRS, so its map has none", scene.name)
        if config.min_area:
            raise RasterError(f"--min_area: {scene.name} has no CRS to measure in")
    return job


def output_rasters(job: SceneJob) -> list[Path]:
    """The rasters that come of a scene."""
    return [job.task.beside(layer.ending) for layer in job.layers.values()]


def count_pieces(job: SceneJob) -> int:
    """Into how many pieces of columns a scene is cut to keep its open rows in memory."""
    return math.ceil(open_rows(job) / row_limit(job))


def row_limit(job: SceneJob) -> float:
    """Bytes that open rows may take."""
    if job.config.max_memory:
        return job.config.max_memory * 1e9
    limit = free_memory(job.models.device) / 8
    return min(limit, OPEN_ROWS) if job.models.device.type == "cpu" else limit


def open_rows(job: SceneJob) -> int:
    """Bytes that the open rows of a scene take in its whole width."""
    scene, bands, size = job.scene, job.bands, job.axes[0].size
    image = Source(scene, bands).dtype.itemsize * len(bands) + 1
    channels = job.models.first.config.num_classes + 1
    column = image * (size + 3 * rows_at_once(scene, bands[0]))
    parts = 2 + STORED_AHEAD[job.models.device.type]
    column += size * (2 * 4 * channels + parts * (4 + bytes_of(job.layers)))
    return column * scene.width


def count_workers(job: SceneJob) -> int:
    """Batches to predict at a time: on the CPU several, as many as the cores can.

    Each core at its own window waits for no other one, neither within a pass, nor where reading and
    writing take their share of the cores; a compiled model has all cores for one.
    """
    if job.models.device.type != "cpu" or job.config.compile:
        return 1
    return min(torch.get_num_threads(), MOST_WORKERS)
