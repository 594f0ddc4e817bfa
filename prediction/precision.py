"""The precision of ``--precision auto``: tried on some windows of the scene."""

from __future__ import annotations

import logging

import numpy as np
import torch
from rasterio.windows import Window
from torch import Tensor

from common.devices import native_precisions, shared_threads
from common.machine import bounded_map
from common.rasters import Source, window_within
from prediction.blending import reflect_beyond
from prediction.jobs import SceneJob, count_workers
from prediction.layers import classify
from prediction.predictor import Predictor

log = logging.getLogger("semanticseg4eo")

PROBES = 3  # windows in which a lower precision must keep the classes
KEPT_CLASSES = 0.999  # share of the pixels that must keep their class


def probe_windows(job: SceneJob) -> list[tuple[np.ndarray, np.ndarray]]:
    """Some windows with valid pixels, drawn from the whole scene: (image, valid) each."""
    down, across = job.layouts
    scene, bands = job.scene, job.bands
    high, wide = scene.block_shapes[bands[0] - 1]

    def block_start(start: int, block: int, size: int) -> int:
        """A window that begins with a block touches fewer of them."""
        return start // block * block if block <= size else start

    columns, windows, source = len(across.starts), [], Source(scene, bands)
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
        inside = window_within(window, scene.width, scene.height)
        image, valid = source.read(inside)
        if valid.any():
            shape = down.size, across.size
            windows.append(
                (reflect_beyond(image, *shape), reflect_beyond(valid, *shape))
            )
        if len(windows) == PROBES:
            break
    return windows


def choose_precision(job: SceneJob) -> str:
    """The precision of ``--precision auto`` for a scene.

    The first that the hardware computes natively and in which the classes of some windows stay as
    in float32; scenes of a few windows are not worth the trial.
    """
    config, models = job.config, job.models
    native = native_precisions(models.device)
    few = job.windows < 5 * PROBES
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
