"""What the tests of maps share: maps, labels and calls of the script."""

from __future__ import annotations

import contextlib
import io
import json
import logging
from pathlib import Path

import numpy as np
from helpers import ORIGIN, PIXEL, write_raster

import Evaluate_map
from common.labels import class_name_tags

NAMES = ["water", "forest", "town"]


def run(*words) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of the script."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = Evaluate_map.main([str(word) for word in words])
        except SystemExit as ended:
            status = ended.code or 0
        finally:
            logging.getLogger().handlers.clear()  # they hold the redirected stderr
    return status, out.getvalue(), err.getvalue()


def evaluate(folder: Path, *words) -> dict:
    """The report of a map against labels."""
    status, _, err = run(*words, "--output", folder / "evaluation", "--overwrite")
    assert status == 0, err
    return json.loads((folder / "evaluation" / "evaluation.json").read_text())


def write_map(path: Path, classes, names=NAMES, nodata: int = 255, **more) -> Path:
    """A map as prediction writes it."""
    tags = class_name_tags(names) if names else None
    return write_raster(path, np.asarray(classes, np.uint8), nodata, tags=tags, **more)


def random_pair(shape=(40, 60), seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A map and its labels that agree in seven of ten pixels."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 3, shape).astype(np.uint8)
    truth = truth.repeat(4, 0).repeat(4, 1)[: shape[0], : shape[1]]
    guess = np.where(rng.random(shape) < 0.7, truth, rng.integers(0, 3, shape))
    return guess.astype(np.uint8), truth


def centre(row: float, column: float) -> tuple[float, float]:
    """Where the middle of a pixel lies."""
    return ORIGIN[0] + (column + 0.5) * PIXEL, ORIGIN[1] - (row + 0.5) * PIXEL
