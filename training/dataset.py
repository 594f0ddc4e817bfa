"""The splits of a dataset as a training needs them."""

from __future__ import annotations

import logging
import math

import numpy as np

from common import SPLITS
from common.architectures import default_class_names
from common.errors import DatasetError
from common.patches import list_pairs
from common.tiffs import tiff_header
from training.samples import PatchCache, SampleIndex, index_samples
from training.settings import TrainingConfig

log = logging.getLogger("semanticseg4eo")


def needed_splits(config: TrainingConfig) -> tuple[str, ...]:
    """The splits that a run cannot do without."""
    return ("train", "validation") if config.val_strategy == "split" else ("train",)


def require_patches(config: TrainingConfig) -> None:
    """Check that all splits are there before any patch is read, which takes long.

    Raises:
        DatasetError: A split without patches, a patch without its partner, or one that is cut off.
    """
    for split in SPLITS:
        needed = split in needed_splits(config)
        for pair in list_pairs(config.dataset_root, split, needed):
            tiff_header(pair.image)
            tiff_header(pair.label, may_be_empty=True)


def index_split(
    config: TrainingConfig,
    split: str,
    like: SampleIndex | None,
    cache: PatchCache | None = None,
    required=True,
):
    """The index of a split, or None when it is not required and has no patches."""
    pairs = list_pairs(config.dataset_root, split, required)
    if not pairs:
        if split == "test":
            log.info("no test split, and so no test score")
        return None
    index = index_samples(pairs, config.label_classes, config.ignore_index, like, cache)
    require_usable(config, split, index)
    bands, *size = index.shape
    unlabelled = 1 - index.counts.sum() / (len(pairs) * math.prod(size))
    line = "%-10s %5d patches of %d x %d pixels, %d bands, %.1f %% of the pixels unlabelled"
    log.info(line, split, len(pairs), *size, bands, 100 * unlabelled)
    return index


def require_usable(config: TrainingConfig, split: str, index: SampleIndex) -> None:
    """Raise DatasetError where a split has other bands than asked for, or no label."""
    bands = index.shape[0]
    if config.in_channels not in (None, bands):
        raise DatasetError(
            f"--in_channels {config.in_channels}, but the patches in {config.dataset_root} have "
            f"{bands} bands"
        )
    if index.counts.sum() == 0:
        raise DatasetError(
            f"No patch of the {split} split has a labelled pixel that is valid in the image; check "
            "the nodata values of both, and --ignore_index"
        )


def require_several_classes(index: SampleIndex) -> None:
    """Raise DatasetError when all labelled pixels are of one class."""
    present = np.flatnonzero(index.counts.sum(axis=0))
    if len(present) < 2:
        raise DatasetError(
            f"All labelled training pixels are class {present[0]}: there is nothing to learn "
            "(255 means unlabelled; if it is a class, extract with --label_values 0,255)"
        )


def names_for(config: TrainingConfig, index: SampleIndex) -> list[str]:
    """Class names: given, else stored with the labels, else numbers."""
    if config.class_names:
        return [name.strip() for name in config.class_names.split(",")]
    stored = index.class_names
    if stored and len(stored) == config.label_classes:
        return stored
    return default_class_names(1 if config.mode == "binary" else config.classes)
