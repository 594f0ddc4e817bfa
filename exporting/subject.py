"""What is exported: the checkpoints of a run, and the ground that a pixel covers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.architectures import ARCHITECTURES
from common.errors import CheckpointError, OptionError, UndescribedError, require
from common.files import list_models
from common.model_options import require_alike, require_threshold_fits
from exporting.settings import ExportConfig
from model_training import Checkpoint, load_checkpoint

log = logging.getLogger("semanticseg4eo")

LIKE_SIZES = 1.01  # ratio of pixel sizes that count as equal


@dataclass(frozen=True)
class ExportSubject:
    """Checkpoints that become one file."""

    files: list[str]
    checkpoints: list[Checkpoint]
    config: ExportConfig
    resolution: float  # metres per pixel
    onnx: Path  # the file to be

    @property
    def first(self) -> Checkpoint:
        return self.checkpoints[0]


def load_subject(config: ExportConfig) -> ExportSubject:
    """Open all checkpoints of an export.

    Raises:
        CheckpointError: One cannot be used, does not fit the first, or does not say what an
            export needs.
        OptionError: An option does not fit the models.
    """
    files = list_models(config.model)
    checkpoints = list(map(_load, files))
    require_alike(files, checkpoints)
    first = checkpoints[0]
    require_threshold_fits(config.threshold, files[0], first.config)
    for file, checkpoint in zip(files, checkpoints):
        if checkpoint.normalization.rule != "dataset":
            raise CheckpointError(
                f"{file} normalizes by the percentile of each window (--normalization image, or an "
                "earlier version), which no ONNX file can repeat for other windows; train it again "
                "with --normalization dataset"
            )
        require_size(config.patch_size, file, checkpoint)
    warn_of_nodata(files, checkpoints)
    resolution = config.resolution or _trained_resolution(files, checkpoints)
    return ExportSubject(files, checkpoints, config, resolution, Path(config.output))


def _load(file: str) -> Checkpoint:
    try:
        return load_checkpoint(file)
    except UndescribedError as error:
        raise CheckpointError(
            f"{file} holds weights alone, without the normalization that the exported model needs; "
            "give a checkpoint that main.py wrote"
        ) from error


def require_size(size: int, file: str, checkpoint: Checkpoint) -> None:
    """Raise OptionError unless a network takes squares of this side without padding."""
    name = checkpoint.config.model_name
    entry = ARCHITECTURES[name]
    fine = size % entry.size_divisor == 0 and size >= entry.min_size
    multiple = f"a multiple of {entry.size_divisor}" * (entry.size_divisor > 1)
    least = f"at least {entry.min_size}" * (entry.min_size > 0)
    expected = ", ".join(filter(None, [multiple, least]))
    require(fine, "--patch_size", size, f"{expected} for the {name} in {file}")


def warn_of_nodata(files: Sequence[str], checkpoints: Sequence[Checkpoint]) -> None:
    """Warn of a model that may have seen nodata values which its file does not hold."""
    unknown = (
        f for f, c in zip(files, checkpoints) if c.metadata.get("nodata") is None
    )
    if file := next(unknown, None):
        log.warning(
            "warning: %s holds no nodata value of the training patches (they declare different ones, "
            "or it is of an older version): for this model only NaN and infinity are no data; make "
            "other such pixels NaN before the exported model sees them",
            file,
        )  # fmt: skip


def _trained_resolution(files: list[str], checkpoints: list[Checkpoint]) -> float:
    """The pixel size in metres that all models were trained on."""
    sizes = [checkpoint.metadata.get("pixel_size") for checkpoint in checkpoints]
    for file, size in zip(files, sizes):
        if not size:
            raise OptionError(
                f"--resolution is missing: {file} does not know the size of its pixels; give it in "
                "metres"
            )
        if max(size / sizes[0], sizes[0] / size) > LIKE_SIZES:
            raise CheckpointError(
                f"{file} was trained on pixels of {size:.4g} m, {files[0]} on {sizes[0]:.4g} m; give "
                "--resolution"
            )
    return sizes[0]
