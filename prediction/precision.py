"""The precision of ``--precision auto``: tried on some windows of the scene."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import torch
from rasterio.windows import Window
from torch import Tensor

from common.devices import native_precisions, shared_threads
from common.machine import bounded_map
from common.windows import window_within
from prediction.area import whole_scene
from prediction.blending import reflect_beyond
from prediction.jobs import SceneJob, count_workers
from prediction.layers import classify
from prediction.predictor import Predictor

log = logging.getLogger("semanticseg4eo")

PROBES = 3  # windows in which a lower precision must keep the classes
KEPT_CLASSES = 0.999  # share of the pixels that must keep their class


def probe_windows(job: SceneJob) -> list[list[np.ndarray]]:
    """Some windows with valid pixels, drawn from the whole scene: (image, valid) each."""
    down, across = job.layouts
    size = down.size, across.size
    windows = []
    for number in np.random.default_rng(0).permutation(len(job.windows))[:25].tolist():
        row, column = job.windows[number]
        window = Window(column, row, across.size, down.size)
        inside = window_within(window, job.scene.width, job.scene.height)
        image, valid = job.sources[0].read(inside)
        if valid.any():
            windows.append([reflect_beyond(array, *size) for array in (image, valid)])
        if len(windows) == PROBES:
            break
    return windows


def choose_precision(job: SceneJob) -> str:
    """The precision of ``--precision auto`` for a scene.

    The first that the hardware computes natively and in which the classes of some windows stay as
    in float32; scenes of a few windows are not worth the trial. A part of a scene gets that of the
    whole.
    """
    config, models = job.config, job.models
    job = replace(job, area=whole_scene(job.scene))
    native = native_precisions(models.device)
    few = len(job.windows) < 5 * PROBES
    if not native or few:
        return "fp32"
    probes = [
        [torch.from_numpy(array)[None].to(models.device) for array in probe]
        for probe in probe_windows(job)
    ]
    workers = count_workers(job)

    def classes(precision: str) -> list[Tensor]:
        options = models.checkpoints, models.device, precision, config.tta
        predictor = Predictor(*options)

        def predict(probe) -> Tensor:
            image, mask = probe
            return classify(predictor(image, mask)[0], config.threshold)[0][mask[0]]

        with shared_threads(workers):
            return list(bounded_map(predict, probes, workers, ahead=0))

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
