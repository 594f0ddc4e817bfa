"""The splits of a dataset as a training needs them."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

import numpy as np

from common import SPLITS
from common.architectures import default_class_names
from common.balance import absent_classes
from common.colours import Colour, complete_colours, has_equal
from common.distributed import ProcessGroup
from common.errors import DatasetError
from common.label_values import parse_names
from common.legends import asked_colours, missing_advice
from common.patches import list_pairs, partly_nodata_advice
from common.tiffs import tiff_header
from training.loaders import EpochBatchSampler
from training.samples import PatchCache, SampleIndex, index_samples
from training.settings import TrainingConfig

if TYPE_CHECKING:
    from common.console import Problems

log = logging.getLogger("semanticseg4eo")

FEW_STEPS = 10  # of an epoch: the schedule and the best epoch are then coarse
FEW_PIXELS = (
    1000  # of one patch or two, which say little about the confidence elsewhere
)


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
    problems: Problems | None = None,
) -> SampleIndex | None:
    """The index of a split, or None when it is not required and has no patches.

    ``problems`` is that of ``index_samples``.
    """
    pairs = list_pairs(config.dataset_root, split, required)
    if not pairs:
        if split == "test":
            log.info("no test split, and so no test score")
        return None
    classes, ignored = config.label_classes, config.ignore_index
    index = index_samples(pairs, classes, ignored, like, cache, problems)
    if index is None:  # the problems say why
        return None
    require_usable(config, split, index)
    bands, *size = index.shape
    line = "%-10s %5d patches of %d x %d pixels, %d bands, %s"
    log.info(line, split, len(pairs), *size, bands, unlabelled_text(index))
    return index


def unlabelled_text(index: SampleIndex) -> str:
    """The share of an index's pixels without a class, in words."""
    pixels = len(index.pairs) * math.prod(index.shape[1:])
    missing = pixels - index.counts.sum()
    if not missing:
        return "no pixel unlabelled"
    share = 100 * missing / pixels
    text = f"{share:.1f} %" if share >= 0.05 else "less than 0.1 %"
    return f"{text} of the pixels unlabelled"


def log_weak_spots(
    config: TrainingConfig,
    train: SampleIndex,
    validation: SampleIndex | None,
    test: SampleIndex | None,
    group: ProcessGroup,
) -> None:
    """Log what a run can do but should not be trusted with, a line each.

    That is pixels that are nodata in some bands alone, classes without a pixel in a split or without
    a colour among others, few steps per epoch, and few pixels to fit the temperature on. K-fold has
    all its patches in ``train``.
    """
    names = names_for(config, train)
    if text := partly_nodata_advice(train.pairs):
        log.info(text)
    if text := colour_advice(config, train):
        log.info(text)
    for index, split in zip((train, validation, test), SPLITS):
        if index and (
            text := absent_classes(split, names, index.counts.sum(axis=0).tolist())
        ):
            log.warning(text)
    sampler = EpochBatchSampler(len(train.pairs), config.batch_size, config.seed, group)
    steps = math.ceil(len(sampler) / config.accumulate)
    if steps < FEW_STEPS:
        text = "few steps of the weights per epoch (%d): lower %s, or cut more patches"
        log.warning(text, steps, "--batch_size or --accumulate")
    labelled = int((validation or train).counts.sum())
    if labelled < FEW_PIXELS and not config.no_calibration:
        text = "the temperature is fitted on %d pixels alone: label more, or give %s"
        log.warning(text, labelled, "--no_calibration")


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
            f"All labelled training pixels are class {present[0]}: there is nothing to learn; where "
            "another class is the label's nodata value, or 255, name all classes in --label_values "
            "of the extraction (as 0,1 or 0,255)"
        )


def names_for(config: TrainingConfig, index: SampleIndex) -> list[str]:
    """Class names: given, else stored with the labels, else numbers."""
    if config.class_names:
        return parse_names(config.class_names, "--class_names")
    stored = index.class_names
    if stored and len(stored) == config.label_classes:
        return stored
    return default_class_names(1 if config.mode == "binary" else config.classes)


def codes_for(config: TrainingConfig, index: SampleIndex) -> list[int | str] | None:
    """What the labels held for the classes; None unless the patches say it for each."""
    codes = index.class_codes or []
    return codes if len(codes) == config.label_classes else None


def colours_for(config: TrainingConfig, index: SampleIndex) -> list[Colour]:
    """Class colours: given, else stored with the labels, else of the palette."""
    return complete_colours(_known_colours(config, index), names_for(config, index))


def _known_colours(config: TrainingConfig, index: SampleIndex) -> list[Colour | None]:
    """Those that the user or the labels say, in class order; None where nobody does."""
    count = config.label_classes
    if not config.class_colors:
        return (index.class_colours or [])[:count]
    codes = (index.class_codes or range(count))[:count]
    # values that training has and the extraction did not
    codes = [*codes, *[None] * (count - len(codes))]
    return asked_colours(config.class_colors, names_for(config, index), codes)


def colour_advice(config: TrainingConfig, index: SampleIndex) -> str | None:
    """Which classes get colours of the palette though others are given."""
    known = _known_colours(config, index)
    if config.class_colors:
        return missing_advice(config.class_colors, known, names_for(config, index))
    if has_equal(known):
        return (
            "the colour table of the labels has one colour for several classes: not used; give "
            "--class_colors"
        )
    return None
