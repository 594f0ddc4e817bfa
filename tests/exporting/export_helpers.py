"""What the tests of exports share: small checkpoints, scenes with pixels that have no data."""

from __future__ import annotations

import contextlib
import io
import logging
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from exports import settled
from torch import nn

import Export_model
from common.architectures import ModelConfig
from exporting.settings import ExportConfig
from exporting.subject import ExportSubject, load_subject
from model_training import Checkpoint, Normalization, build_model, save_checkpoint

BANDS, SIDE = 3, 32
LOW, HIGH = (100.0, 0.0, 50.0), (9000.0, 8000.0, 50.0)  # the last band was constant
NAMES = ("water", "forêt", "bare soil")


@cache
def network(name: str, outputs: int, seed: int, encoder: str | None) -> nn.Module:
    """A network of random weights, made once."""
    torch.manual_seed(seed)
    model = build_model(ModelConfig(name, BANDS, outputs, encoder))
    return settled(model, BANDS, SIDE, momentum=1.0)


def make_checkpoint(
    name: str = "pixel", outputs: int = 3, seed: int = 0, encoder=None, temperature=0.2, **metadata
) -> Checkpoint:  # fmt: skip
    """A model of random weights with sharp probabilities."""
    names = list(NAMES[:outputs]) if outputs > 1 else ["land", "water"]
    metadata = {"pixel_size": 10.0, "class_names": names} | metadata
    model = network(name, outputs, seed, encoder)
    config = ModelConfig(name, BANDS, outputs, encoder)
    rule = Normalization("dataset", LOW, HIGH)
    return Checkpoint(model, config, rule, metadata, temperature)


def write_checkpoint(path: Path, *model, **described) -> Path:
    """Such a model as a file."""
    made = make_checkpoint(*model, **described)
    metadata = made.metadata | {"temperature": made.temperature}
    save_checkpoint(path, made.model, made.config, made.normalization, metadata)
    return path


def subject_of(*files: Path, **options) -> ExportSubject:
    """What would be exported of some checkpoints."""
    output = str(files[0].with_suffix(".onnx"))
    given = {"output": output, "patch_size": SIDE} | options
    return load_subject(ExportConfig(model=list(map(str, files)), **given))


def random_scene(height: int = SIDE, width: int = SIDE, seed: int = 0) -> np.ndarray:
    """(BANDS, height, width) uint16 of 1 to 10,000."""
    rng = np.random.default_rng(seed)
    return rng.integers(1, 10_001, (BANDS, height, width)).astype(np.uint16)


class Outcome(NamedTuple):
    """What the script left."""

    status: int
    out: str
    err: str


def run_export(*words) -> Outcome:
    """Exit status, stdout and stderr of ``Export_model.main``."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = Export_model.main(list(map(str, words)))
        except SystemExit as ended:
            status = ended.code
        finally:
            logging.getLogger().handlers.clear()  # they hold the redirected stderr
    return Outcome(status, out.getvalue(), err.getvalue())
