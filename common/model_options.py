"""Options about models that prediction and export share, and whether several models go together."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from common.errors import CheckpointError, OptionError
from common.options import setting
from common.sensors import plain_name
from common.text import split_dates

log = logging.getLogger("semanticseg4eo")

THRESHOLD = 0.5


def model_setting():
    """``--model`` of prediction and export."""
    return setting(
        help="checkpoints (.pth) that main.py wrote, or a folder of a k-fold run; several are "
        "averaged",
        group="files", nargs="+", may_change=True,
    )  # fmt: skip


def threshold_setting(group: str):
    """``--threshold`` of prediction and export."""
    return setting(
        THRESHOLD, "least foreground probability of a binary map, 0 to 1", group,
        least=0, most=1,
    )  # fmt: skip


def require_alike(files: Sequence[str], checkpoints: Sequence) -> None:
    """Raise CheckpointError unless models can be averaged.

    Codes of classes may differ, which is warned of: the result has those of the first.

    Args:
        files: Their names.
        checkpoints: ``model_training.Checkpoint`` of each.
    """
    first = checkpoints[0]
    for file, other in zip(files, checkpoints):
        for what, a, b in (
            ("bands", first.config.in_channels, other.config.in_channels),
            ("outputs", first.config.num_classes, other.config.num_classes),
            ("class names", first.class_names, other.class_names),
        ):
            if a != b:
                raise CheckpointError(
                    f"{file} has {what} {b}, but {files[0]} has {a}; they cannot be averaged"
                )
        bands = [one.metadata.get("band_descriptions") or [] for one in (first, other)]
        if in_another_order(*bands):
            raise CheckpointError(
                f"{file} takes the bands {', '.join(bands[1])}, but {files[0]} "
                f"{', '.join(bands[0])}; models of another order of bands cannot be averaged: leave "
                "one out"
            )
    _compare_codes(files, checkpoints)


def _compare_codes(files: Sequence[str], checkpoints: Sequence) -> None:
    """Warn, in one line, of models whose classes have other codes than those of the first."""
    first = checkpoints[0]
    for file, other in zip(files, checkpoints):
        if other.class_codes != first.class_codes:
            log.warning(
                "warning: the classes of %s have the codes %s, those of %s %s; the result has the "
                "latter",
                file, _codes_text(other), files[0], _codes_text(first),
            )  # fmt: skip
            return


def _codes_text(checkpoint) -> str:
    codes = list(map(str, checkpoint.class_codes))
    return ", ".join(codes[:6]) + ", ..." * (len(codes) > 6)


def in_another_order(first: Sequence[str | None], other: Sequence[str | None]) -> bool:
    """Whether two models take a band of one name at different places; no, where one has no names."""
    if not all(first) or not all(other):
        return False
    one, two = (
        [(plain_name(name), date) for name, date in split_dates(names)]
        for names in (first, other)
    )
    return any(a != b and a in two for a, b in zip(one, two))


def require_threshold_fits(threshold: float, file: str, config) -> None:
    """Raise OptionError where ``--threshold`` is given for a model of several classes.

    Args:
        threshold: Its value.
        file: The model's name.
        config: Its ``ModelConfig``.
    """
    if config.mode == "multiclass" and threshold != THRESHOLD:
        raise OptionError(
            f"--threshold {threshold}: {file} has {config.num_classes} classes, and a threshold is "
            "for binary models"
        )
