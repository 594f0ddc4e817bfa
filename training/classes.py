"""Which classes a run learns: as its options say, else as its dataset does."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from common.architectures import is_background
from common.errors import DatasetError
from common.label_values import parse_names
from common.labels import class_codes_of, class_names_of
from common.patches import list_pairs, present_splits
from common.rasters import open_raster
from common.text import listed
from training.settings import TrainingConfig

log = logging.getLogger("semanticseg4eo")

FALLBACK = {"mode": "binary", "classes": 2}  # where neither options nor dataset say


def settle_classes(config: TrainingConfig) -> TrainingConfig:
    """The settings with ``mode`` and ``classes``, from the names that the dataset stores.

    Two classes are a binary dataset where the first is background; forest and water are two classes.
    A dataset that stores no names leaves what the options say, or a binary run.

    Raises:
        DatasetError: An option contradicts the dataset.
        OptionError: The options do not fit each other.
    """
    stored, codes = stored_classes(config.dataset_root)
    if stored is None:
        return settle_without_dataset(config)
    where = f"the labels in {config.dataset_root} hold {_listed(stored)}"
    number = config.classes or len(stored)
    if number != len(stored):
        raise DatasetError(
            f"--classes {number}, but {where}; leave --classes out (--no-classes beside --settings)"
        )
    if config.mode == "binary" and number != 2:
        raise DatasetError(
            f"--mode binary, but {where}; leave --mode out (--no-mode beside --settings), or extract "
            "two classes"
        )
    names = parse_names(config.class_names, "--class_names")
    if names and len(names) != number:
        raise DatasetError(f"--class_names has {len(names)} names, but {where}")
    background = (codes or [""])[0] == 0 or is_background(stored[0])
    binary = number == 2 and background
    mode = config.mode or ("binary" if binary else "multiclass")
    if not (config.mode and config.classes):
        log.info("%s classes: %s", mode, _listed(stored))
    return replace(config, mode=mode, classes=number)


def settle_without_dataset(config: TrainingConfig) -> TrainingConfig:
    """The settings with ``mode`` and ``classes`` from other options, else a binary run."""
    named = len(parse_names(config.class_names, "--class_names"))
    number = config.classes or named or FALLBACK["classes"]
    mode = config.mode or (FALLBACK["mode"] if number == 2 else "multiclass")
    return replace(config, mode=mode, classes=number)


def stored_classes(
    dataset_root: str | Path,
) -> tuple[list[str] | None, list[int | str] | None]:
    """What the labels of a dataset store of its classes, by the first patch of its training split.

    Returns:
        Their names and the codes that they had in the label; None where none are stored.

    Raises:
        SegmentationError: There is no such patch, it cannot be read, or that of another split stores
            other names.
    """
    with open_raster(list_pairs(dataset_root, "train")[0].label) as file:
        names, codes = class_names_of(file), class_codes_of(file)
    for split in present_splits(dataset_root):
        label = list_pairs(dataset_root, split)[0].label
        with open_raster(label) as file:
            others = class_names_of(file)
        if names and others and others != names:
            raise DatasetError(
                f"{label} holds {_listed(others)}, but train/ {_listed(names)}; extract both with "
                "the same --label_values"
            )
    return names, codes


def _listed(names: list[str]) -> str:
    more = ", ..." if len(names) > 6 else ""
    return f"{len(names)} classes ({listed(names[:6])}{more})"
