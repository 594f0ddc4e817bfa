"""Options about models that prediction and export share, and whether several models go together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common.earlier_models import DESCRIPTION
from common.errors import CheckpointError, OptionError
from common.options import setting

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


@dataclass(frozen=True, kw_only=True)
class DescriptionOptions:
    """What the user says of a model whose file does not describe it."""

    model_name: str | None = setting(
        None, "architecture, of a checkpoint that does not name it", "model",
        shown="the checkpoint's", may_change=True,
    )  # fmt: skip
    encoder_name: str | None = setting(
        None, "encoder, likewise", "model", shown="the checkpoint's", may_change=True
    )
    in_channels: int | None = setting(
        None, "bands that the model takes", "model", shown="the checkpoint's",
        least=1, most=65535, may_change=True,
    )  # fmt: skip
    num_classes: int | None = setting(
        None, "classes of the model; 1 or 2 of a binary one", "model",
        shown="the checkpoint's", least=1, most=65535, may_change=True,
    )  # fmt: skip

    @property
    def described(self) -> dict:
        """What the options say of the model."""
        given = {name: getattr(self, name) for name in DESCRIPTION}
        return {name: value for name, value in given.items() if value is not None}


def require_alike(files: Sequence[str], checkpoints: Sequence) -> None:
    """Raise CheckpointError unless models can be averaged.

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
