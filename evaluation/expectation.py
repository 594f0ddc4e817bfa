"""How right each class of a map is expected to be, by the test of the models that made it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.files import list_models
from evaluation.reading import statistics_of_map
from evaluation.settings import EvaluationConfig
from model_training import load_checkpoint

log = logging.getLogger("semanticseg4eo")

USUAL = 0.8  # of a class that nothing is known of


def expected_accuracies(config: EvaluationConfig, names: Sequence[str]) -> list[float]:
    """The user's accuracy of each class in the test split of the map's models, else 0.8.

    The models are ``--model``, or those that the map's statistics name.

    Raises:
        SegmentationError: A model or the statistics cannot be read.
    """
    files = list_models([config.model]) if config.model else models_of_map(config.map)
    known: dict[str, list[float]] = {}
    for file in files:
        metadata = load_checkpoint(file).metadata
        test = (metadata.get("performance_metrics") or {}).get("test") or {}
        for entry in test.get("per_class", []):
            if entry["precision"] is not None:
                name = entry["name"].strip().casefold()
                known.setdefault(name, []).append(entry["precision"])
    unknown = [name for name in names if name.strip().casefold() not in known]
    if unknown:
        log.info(
            "no test says how right these classes are, %g is taken: %s",
            USUAL,
            ", ".join(unknown),
        )
    return [
        float(np.mean(known.get(name.strip().casefold(), [USUAL]))) for name in names
    ]


def models_of_map(path: str) -> list[str]:
    """The checkpoints that the statistics beside a map name, those that are there."""
    statistics, found = statistics_of_map(path)
    if found is None:
        log.info("no %s names the model of the map; --model does", statistics)
        return []
    named = found.get("model") or []
    absent = [file for file in named if not Path(file).is_file()]
    if absent:
        text = "%s, which %s names as the model of the map, is not there; --model says where it is"
        log.warning(text, absent[0], statistics)
    return [file for file in named if file not in absent]
