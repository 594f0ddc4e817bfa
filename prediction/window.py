"""The side of the sliding window: tried on some places of the scene, and found again by --resume."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace

import torch
from torch import Tensor

from common.devices import shared_threads, to_device
from common.distributed import torch_errors
from common.errors import SegmentationError
from common.files import fingerprint
from common.machine import bounded_map
from prediction.ensemble import Models, patch_side
from prediction.jobs import (
    SceneJob,
    count_workers,
    describe_models,
    open_scenes,
    prepare_scene,
)
from prediction.layers import classify
from prediction.precision import probe_windows
from prediction.predictor import Predictor
from prediction.settings import SCARCE, SIDE_MULTIPLE, PredictionConfig
from prediction.tasks import Task, recorded_run

log = logging.getLogger("semanticseg4eo")

SIZES = 512, 256  # tried where the training had other patches, the largest first
LEAST_WINDOWS = 9  # of the largest size; a smaller scene is not worth the trial
KEPT_CLASSES = (
    0.9  # share of the pixels that must keep the class of the training's size
)
MIDDLE = 128  # pixels along the side of the square in which classes are compared


def choose_windows(
    tasks: Sequence[Task],
    config: PredictionConfig,
    models: Models,
    every: Sequence[Task],
) -> list[PredictionConfig]:
    """The settings of each task, with a ``patch_size``.

    One that is given is kept, and so is that of a run that ``--resume`` continues. All others get
    that of the maps which other jobs have made, else what one trial finds.

    Args:
        tasks: Scenes to map.
        config: The settings of the run.
        models: Of the run.
        every: All scenes, of which other processes and jobs map some: the trial is on the first
            that can be read.

    Raises:
        OptionError: ``--overlap`` is not smaller than the window.
    """
    given = config.patch_size
    sizes = [recorded_size(task) if config.resume else None for task in tasks]
    if None in sizes:
        beside_others = (config.part or config.resume) and not given
        found = size_of_others(every, config, models) if beside_others else None
        found = found or try_windows(every, config, models)
        sizes = [size or found for size in sizes]
    return [replace(config, patch_size=given or size) for size in sizes]


def recorded_size(task: Task) -> int | None:
    """The window of the run that ``--resume`` continues, if there is one."""
    run = recorded_run(task) or {}
    return run.get("options", {}).get("patch_size")


def size_of_others(
    tasks: Sequence[Task], config: PredictionConfig, models: Models
) -> int | None:
    """The window of the first map that the same models and options made, or are making."""

    def but_for_window(options: dict) -> dict:
        return {key: value for key, value in options.items() if key != "patch_size"}

    described, options = describe_models(models), but_for_window(fingerprint(config))
    for task in tasks:
        run = recorded_run(task) or {}
        known = run.get("options", {})
        if run.get("models") == described and but_for_window(known) == options:
            size = known["patch_size"]
            log.info("windows of %d x %d pixels, as in %s", size, size, task.output)
            return size
    return None


def trained_size(models: Models) -> int | None:
    """The side of a window as large as the training patches; None if no model tells theirs."""
    side = patch_side(models)
    return side and max(side, SIDE_MULTIPLE)


def try_windows(tasks: Sequence[Task], config: PredictionConfig, models: Models) -> int:
    """The window for scenes, from a trial on the first that can be read.

    What keeps a scene from being read is reported when it is mapped.
    """
    trained, given = trained_size(models), config.patch_size
    if trained in (None, given):
        return given or SIZES[0]
    # a training on larger patches than all of these is its own last resort
    sizes = [given] if given else [s for s in SIZES if s > trained] or [SIZES[0]]
    largest = max(*SIZES, *sizes, trained)
    # that of a part of a scene is the window of the whole
    trial = replace(config, patch_size=largest, overlap=None, area=None)
    for task in tasks:
        with ExitStack() as stack:
            stack.enter_context(suppress(SegmentationError, OSError))
            stack.enter_context(torch_errors(models.device, SCARCE))
            scenes = stack.enter_context(open_scenes(task))
            job = prepare_scene(task, trial, models, scenes)
            few = len(job.windows) < LEAST_WINDOWS
            if given:
                warn_of_window(job, trained, given)
                return given
            return trained if few else largest_window(job, trained, sizes)
    return given or trained


def largest_window(job: SceneJob, trained: int, sizes: Sequence[int]) -> int:
    """The first of some sizes that keeps the classes of the training's, else that one."""
    if trained in sizes:
        return trained
    for size, kept in kept_classes(job, trained, sizes):
        text = "%.0f %% of the pixels keep their class in windows of %d, not of %d as in training"
        log.info(text, 100 * kept, size, trained)
        if kept >= KEPT_CLASSES:
            trained = size
            break
    log.info("windows of %d x %d pixels", trained, trained)
    return trained


def warn_of_window(job: SceneJob, trained: int, given: int) -> None:
    """Warn of a ``--patch_size`` in which a model finds other classes than in the training's."""
    for size, kept in kept_classes(job, trained, [given]):
        if kept < KEPT_CLASSES:
            log.warning(
                "warning: in windows of %d pixels only %.0f %% of the pixels keep the class that "
                "windows of the training's size give them; leave --patch_size out, or give "
                "--patch_size %d",
                size, 100 * kept, trained,
            )  # fmt: skip


def kept_classes(
    job: SceneJob, trained: int, sizes: Sequence[int]
) -> Iterator[tuple[int, float]]:
    """The share of pixels that keep, in windows of a size, the class of the training's size.

    Yields:
        (size, share) for each size, when it is asked for; nothing where no pixel is valid.
    """
    models, threshold = job.models, job.config.threshold
    predictor = Predictor(models.checkpoints, models.device)
    probes = [
        [to_device(torch.from_numpy(array), models.device) for array in probe]
        for probe in probe_windows(job)
    ]
    workers = count_workers(job)

    def classes(size: int) -> Tensor:
        def predict(probe: Sequence[Tensor]) -> Tensor:
            return middle_classes(predictor, *probe, size, threshold)

        with shared_threads(workers):
            return torch.cat(list(bounded_map(predict, probes, workers, ahead=0)))

    usual = classes(trained) if probes else ()
    if len(usual):
        for size in sizes:
            yield size, (classes(size) == usual).float().mean().item()


def middle_classes(
    predictor: Predictor, image: Tensor, valid: Tensor, size: int, threshold: float
) -> Tensor:
    """The classes (N,) of the valid pixels in the middle of a place, as windows of a size give them.

    Args:
        predictor: Takes the windows.
        image: (C, H, W) of the place.
        valid: (H, W).
        size: Of the windows; each gives the pixels of its own middle half.
        threshold: Least probability of the foreground of a binary model.
    """
    rows, columns = (windows_over_middle(length, size) for length in valid.shape)
    cuts = [(tall, wide) for tall, _ in rows for wide, _ in columns]
    masks = torch.stack([valid[cut] for cut in cuts])
    windows = predictor(torch.stack([image[:, *cut].float() for cut in cuts]), masks)

    def middle(arrays: Tensor) -> Tensor:
        pieces = iter(arrays)
        return torch.cat(
            [
                torch.cat([next(pieces)[..., tall, wide] for _, wide in columns], -1)
                for _, tall in rows
            ],
            -2,
        )

    return classify(middle(windows), threshold)[0][middle(masks)]


def windows_over_middle(length: int, size: int) -> list[tuple[slice, slice]]:
    """Windows along a side whose middle halves cover its middle, and what each gives of itself."""
    size, extent = min(size, length), min(MIDDLE, length // 2)
    step, first = size // 2, (length - extent) // 2
    windows = []
    for pixel in range(first, first + extent, step):
        start = min(max(pixel - (size - step) // 2, 0), length - size)
        inner = slice(pixel - start, pixel - start + min(step, first + extent - pixel))
        windows.append((slice(start, start + size), inner))
    return windows
