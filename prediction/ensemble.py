"""The checkpoints of a run, and whether a scene fits them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import rasterio
import torch
from rasterio.windows import Window

from common.devices import free_memory, local_device
from common.distributed import torch_errors
from common.errors import OptionError, RasterError
from common.files import list_models, models_text
from common.ground import pixel_size
from common.map_classes import values_of_codes
from common.model_options import require_alike, require_threshold_fits
from common.places import centre_distances, training_places
from common.rasters import Source, band_scaling, select_bands
from common.text import number_dates
from model_training import Checkpoint, load_checkpoint
from prediction.predictor import Predictor, fuse_batch_norm, route_pointwise_to_onednn
from prediction.settings import PredictionConfig

log = logging.getLogger("semanticseg4eo")

OTHER_RESOLUTION = (
    1.25  # ratio of pixel sizes from which a scene is unlike the training
)
BATCH_SIZES = {"cpu": 1, "cuda": 32, "mps": 4}  # of --batch_size auto, at most
CLASS_ARRAYS = 6  # float32, of all classes, that a batch in work and its results take


@dataclass(frozen=True)
class Models:
    """The checkpoints of a run, on their device."""

    files: list[str]
    checkpoints: list[Checkpoint]
    device: torch.device
    make_predictor: Callable[[str, int], Predictor]  # from precision and batch size

    @property
    def first(self) -> Checkpoint:
        return self.checkpoints[0]


def load_models(config: PredictionConfig) -> Models:
    """Open all checkpoints of a run.

    Raises:
        CheckpointError: One cannot be used, contradicts an option, or does not fit the first.
    """
    device = local_device(config.device)
    files = list_models(config.model)
    if text := models_text(config.model, files):
        log.info(text)
    # on the CPU, where float32 is not rounded (TF32), which would hide whether fusing is exact
    checkpoints = [load_checkpoint(file, "cpu", config.described) for file in files]
    with torch_errors(device, "the number of models, or take --device cpu"):
        checkpoints = [
            replace(
                one,
                model=fuse_batch_norm(one.model, one.config.in_channels).to(device),
            )
            for one in checkpoints
        ]
    if runs_on_onednn(config, device):
        for checkpoint in checkpoints:
            route_pointwise_to_onednn(checkpoint.model)
    first = checkpoints[0]
    require_alike(files, checkpoints)
    if config.write_codes:
        values_of_codes(first.class_codes)  # raises before any work
    require_threshold_fits(config.threshold, files[0], first.config)
    kinds = {"fp16": ("cuda",), "tf32": ("cuda",), "bf16": ("cpu", "cuda")}
    if device.type not in kinds.get(config.precision, (device.type,)):
        raise OptionError(
            f"--precision {config.precision}: not on {device.type}; take auto or fp32"
        )
    expected_entropy = config.save_uncertainty and len(files) > 1

    @cache
    def make_predictor(precision: str, batch_size: int) -> Predictor:
        return Predictor(
            checkpoints, device, precision, config.tta, expected_entropy,
            batch_size if config.compile else 0,
        )  # fmt: skip

    return Models(files, checkpoints, device, make_predictor)


def distance_of_training(
    scene: rasterio.DatasetReader, boxes: np.ndarray, models: Models
) -> float | None:
    """The median distance from parts of a scene to the nearest training patch of any model.

    Args:
        scene: Any raster.
        boxes: (N, 4) left, top, right, bottom of the parts, in its pixels.
        models: Of the run.

    Returns:
        Metres between centres; None where a model, or the scene, does not tell where it lies.
    """
    others: list[dict] = []
    for checkpoint in models.checkpoints:
        trained = training_places(checkpoint.metadata)
        if not trained:
            return None
        others += trained
    centres = np.stack([boxes[:, ::2].mean(axis=1), boxes[:, 1::2].mean(axis=1)])
    x, y = scene.transform * tuple(centres)
    crs = scene.crs.to_wkt() if scene.crs else None
    here = {"crs": crs, "bounds": np.stack([x, y, x, y], axis=1)}
    distances = centre_distances([here], others)
    return None if distances is None else float(np.median(distances))


def patch_side(models: Models) -> int | None:
    """The side of the training patches, the smallest of all models; None if none tells."""
    stored = [
        checkpoint.metadata.get("input_size") for checkpoint in models.checkpoints
    ]
    sides = [
        min(sides[-2:])
        for sides in stored
        if isinstance(sides, (list, tuple))
        and len(sides) > 1
        and all(isinstance(side, int) and side > 0 for side in sides[-2:])
    ]
    return min(sides) if sides else None


def cell_side(config: PredictionConfig, models: Models) -> int:
    """The side in pixels of the cells of ``--suggest``.

    Raises:
        OptionError: It is not given, and no model tells that of its patches.
    """
    if side := config.cell_size or patch_side(models):
        return side
    raise OptionError(
        f"--suggest {config.suggest}: {models.files[0]} does not tell the size of its training "
        "patches; give --cell_size"
    )


def runs_on_onednn(config: PredictionConfig, device: torch.device) -> bool:
    """Whether oneDNN predicts the windows, each in a thread of its own."""
    on_cpu = device.type == "cpu" and not config.compile
    return on_cpu and torch.backends.mkldnn.is_available()


def batch_size_of(config: PredictionConfig, models: Models) -> int:
    """Windows per step.

    With ``auto`` beside a GPU at most as many as a quarter of its free memory holds the logits and
    probabilities of, which many classes make the largest part.
    """
    device = models.device
    if config.batch_size != "auto":
        return int(config.batch_size)
    most = BATCH_SIZES[device.type]
    classes = models.first.config.num_classes + 1
    window = CLASS_ARRAYS * 4 * classes * config.patch_size**2
    fitting = most if most == 1 else free_memory(device) // 4 // window
    return max(1, min(most, fitting))


def match_bands(
    scene: rasterio.DatasetReader, config: PredictionConfig, models: Models
) -> list[int]:
    """The bands of a scene that the model gets.

    Raises:
        RasterError: Not as many as the model takes.
    """
    bands = select_bands(scene, config.bands)
    expected = models.first.config.in_channels
    if len(bands) != expected:
        trained = trained_bands(models)[0]
        known = f" ({', '.join(trained)})" if trained else ""
        raise RasterError(
            f"{scene.name} gives {len(bands)} bands, but {models.files[0]} takes {expected}{known}; "
            "select them with --bands"
        )
    return bands


def trained_bands(models: Models) -> list[list[str]]:
    """The descriptions of the bands that each model was trained on; empty where one has none."""
    return [
        names if all(names) else []
        for checkpoint in models.checkpoints
        for names in [checkpoint.metadata.get("band_descriptions") or []]
    ]


def warn_of_bands(source: Source, models: Models) -> None:
    """Warn, once, of bands with other descriptions than those of the training patches."""
    scene = source.dataset
    ours = [scene.descriptions[band - 1] for band in source.bands]
    for file, names in zip(models.files, trained_bands(models)):
        if all(ours) and names and number_dates(ours) != number_dates(names):
            log.warning(
                "warning: the bands of %s are %s, but %s was trained on %s; --bands orders them",
                scene.name, ", ".join(ours), file, ", ".join(names),
            )  # fmt: skip
            return


def sample_pixels(source: Source) -> np.ndarray:
    """Valid pixels (M, C) of small windows spread over a scene."""
    size, samples, scene = 64, [], source.dataset
    # the middle and towards the corners, like the five on a die
    for down, across in ((3, 3), (1, 1), (1, 5), (5, 1), (5, 5)):
        row = max(0, scene.height - size) * down // 6
        column = max(0, scene.width - size) * across // 6
        window = Window(column, row, size, size)
        image, valid = source.read(window)
        samples.append(image[:, valid].T)
    return np.concatenate(samples)


def warn_of_resolution(scene: rasterio.DatasetReader, models: Models) -> None:
    """Warn, once, of a scene whose pixels are larger or smaller than those of the training."""
    size = pixel_size(scene)
    for file, checkpoint in zip(models.files, models.checkpoints):
        trained = checkpoint.metadata.get("pixel_size")
        if not (size and trained):
            continue
        if max(size / trained, trained / size) > OTHER_RESOLUTION:
            log.warning(
                "warning: the pixels of %s measure %.3g m, but %s was trained on %.3g m; objects "
                "appear in another size, so resample the scene first (gdalwarp -tr)",
                scene.name, size, file, trained,
            )  # fmt: skip
            return


def warn_of_strange_values(source: Source, models: Models) -> None:
    """Warn, once, of bands whose values are unlike those that a model was trained on.

    That is where more than a quarter of the pixels (in training: 2 %) lie outside the training
    percentiles, where nearly all of them lie within a tenth of that range, or where the median has
    moved by more than the training's interquartile range.
    """
    pixels, scene, bands = sample_pixels(source), source.dataset, source.bands
    for file, checkpoint in zip(models.files, models.checkpoints):
        normalization = checkpoint.normalization
        if normalization.rule != "dataset" or not len(pixels):
            continue
        low, high = np.array(normalization.low), np.array(normalization.high)
        quartiles = checkpoint.metadata.get("band_quartiles")
        outside = ((pixels < low) | (pixels > high)).mean(axis=0)
        span = np.diff(np.percentile(pixels, [1, 99], axis=0), axis=0)[0]
        middle = np.median(pixels, axis=0)
        second, moved = middle, np.zeros(len(bands), bool)
        if quartiles:
            first, second, third = np.array(quartiles).T
            # of a band that is nearly constant any move is larger than the range
            moved = np.abs(middle - second) > np.maximum(
                third - first, 0.1 * (high - low)
            )
        strange = []
        for i, band in enumerate(bands):
            trained = f"trained on {low[i]:.4g} to {high[i]:.4g}"
            if outside[i] > 0.25:
                strange.append(
                    f"{band} ({outside[i]:.0%} of the pixels outside, {trained})"
                )
            elif moved[i]:
                strange.append(
                    f"{band} (median {middle[i]:.4g}, in training {second[i]:.4g})"
                )
            elif span[i] < 0.1 * (high[i] - low[i]):
                strange.append(f"{band} (nearly constant, {middle[i]:.4g}, {trained})")
        if not strange:
            continue
        named, left = strange[:4], len(strange) - 4
        more = f" and {left} more" if left > 0 else ""
        log.warning(
            "warning: %s has other values than %s was trained on, in band %s%s; same sensor, units "
            "and processing?",
            scene.name, file, ", ".join(named), more,
        )  # fmt: skip
        return


def warn_of_scaling(source: Source, models: Models) -> None:
    """Warn, once, of tags of scale and offset that differ from those of the training patches."""
    scene, ours = source.dataset, band_scaling(source.dataset, source.bands)
    for file, checkpoint in zip(models.files, models.checkpoints):
        known = (
            checkpoint.metadata.get(f"band_{key}") for key in ("scales", "offsets")
        )
        for what, values, trained in zip(("scale", "offset"), ours or (), known):
            if not trained or np.allclose(values, trained, rtol=1e-6, atol=1e-12):
                continue
            log.warning(
                "warning: the bands of %s have the %s %s, but %s was trained on %s; equal numbers "
                "mean other values, so convert the scene first",
                scene.name, what, _shortly(values), file, _shortly(trained),
            )  # fmt: skip
            return


def _shortly(values: Sequence[float]) -> str:
    """Numbers of bands, or the one that all of them are."""
    return ", ".join(dict.fromkeys(f"{value:g}" for value in values))


def warn_of_differences(dates: Sequence[Source], models: Models) -> None:
    """Warn of all in which the dates of a map are unlike the training patches."""
    for source in dates:
        warn_of_bands(source, models)
        warn_of_strange_values(source, models)
        warn_of_scaling(source, models)
    warn_of_resolution(dates[0].dataset, models)
