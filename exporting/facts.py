"""What the STAC item and the card of a model both say: bands, classes, training, ground, time.

All of it comes from the checkpoints. What they do not hold is None, or left out; nothing is guessed.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING

from common import SPLITS
from common.architectures import ARCHITECTURES, ModelConfig
from common.colours import hex_of_colour
from common.places import training_places
from common.sensors import common_names, sensor_of
from common.text import split_dates
from exporting.footprint import outline_of
from model_training import Checkpoint

if TYPE_CHECKING:
    from exporting.subject import ExportSubject

# the options of a training that say how a model came to be; none that names a place of a machine
TRAINING_OPTIONS = (
    "epochs", "epochs_run", "batch_size", "accumulate", "learning_rate", "weight_decay",
    "scheduler", "warmup_epochs", "freeze_encoder_epochs", "clip_grad", "patience", "loss",
    "use_class_weights", "dropout_rate", "data_augmentation", "val_strategy", "n_splits",
    "fold_by", "fold_column", "block_size", "buffer", "normalization_from", "seed",
    "best_val_loss", "best_val_iou",
)  # fmt: skip
FOLD_OPTIONS = {
    "n_splits",
    "fold_by",
    "fold_column",
    "block_size",
    "buffer",
}  # without folds they do nothing


@dataclass(frozen=True)
class ClassEntry:
    """A class as catalogues describe it."""

    value: int  # its number: the place of its probability, or 0 and 1 of a binary model
    label: str  # letters, digits, - and _ alone, unlike all others
    name: str
    code: int | str  # what labels held for it
    colour: str  # as #rrggbb


def plain_label(text: str, otherwise: str) -> str:
    """A text in ASCII letters, digits, - and _; accents go, other signs become _."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^0-9A-Za-z-]+", "_", ascii_text).strip("_") or otherwise


def numbered(names: Sequence[str]) -> list[str]:
    """Names as they are where all differ; else each with the number of its place, from 1."""
    if len(set(names)) == len(names):
        return list(names)
    return [f"{name}_{place}" for place, name in enumerate(names, start=1)]


def band_names(subject: ExportSubject) -> list[str]:
    """A name for each band, all different: the description, or its number without one."""
    first = subject.first
    stored = (
        first.metadata.get("band_descriptions") or [None] * first.config.in_channels
    )
    return numbered([text or f"band_{n}" for n, text in enumerate(stored, start=1)])


def band_words(subject: ExportSubject) -> list[str | None]:
    """What each band is, in the words of ``common.sensors``; None where it is not certain."""
    first = subject.first
    stored = (
        first.metadata.get("band_descriptions") or [None] * first.config.in_channels
    )
    plain = [name for name, _ in split_dates(stored)]
    options = first.metadata.get("training_params") or {}
    said = options.get("sensor") or ",".join(sensors(subject))
    words = common_names(plain, sensor_of(said))
    return [None if word == "?" else word for word in words]


def class_entries(subject: ExportSubject) -> list[ClassEntry]:
    first = subject.first
    names = first.class_names
    labels = numbered([plain_label(name, f"class_{i}") for i, name in enumerate(names)])
    colours = map(hex_of_colour, first.class_colours)
    columns = zip(range(len(names)), labels, names, first.class_codes, colours)
    return [ClassEntry(*columns) for columns in columns]


def member_names(subject: ExportSubject) -> list[str]:
    """The checkpoints by name, with as many of their folders as tell them apart."""
    paths = [Path(file).resolve().parts[1:] for file in subject.files]
    for count in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-count:]) for parts in paths]
        if len(set(names)) == len(set(paths)):
            break
    return names


def architecture(checkpoint: Checkpoint) -> str:
    """As "unet++ with resnet34", or "unet with resnet18 of 3 levels"."""
    config = checkpoint.config
    encoder = f" with {config.encoder_name}" if config.encoder_name else ""
    whole = config.encoder_depth == ModelConfig.encoder_depth
    levels = "" if whole else f" of {config.encoder_depth} levels"
    return f"{config.model_name}{encoder}{levels}"


def architectures(subject: ExportSubject) -> str:
    return ", ".join(dict.fromkeys(map(architecture, subject.checkpoints)))


def sensors(subject: ExportSubject) -> list[str]:
    """What the images were taken by, as their scenes say it."""
    texts = (one.metadata.get("sensor") or "" for one in subject.checkpoints)
    return sorted({name.strip() for text in texts for name in text.split(",")} - {""})


def acquired(subject: ExportSubject) -> list[date]:
    """The days on which the images were taken, in order; none where nobody knows them all."""
    known = [checkpoint.metadata.get("acquired") for checkpoint in subject.checkpoints]
    if not all(known):
        return []
    return sorted({date.fromisoformat(day) for days in known for day in days})


def trained_at(subject: ExportSubject) -> datetime:
    """When the last of the checkpoints was written, by the file's own time."""
    last = max(os.stat(file).st_mtime for file in subject.files)
    return datetime.fromtimestamp(round(last), UTC)


def places(subject: ExportSubject) -> list[dict]:
    """Where the patches of all models lie, once each; none where a checkpoint does not say it."""
    return _once_each(c.metadata.get("places") for c in subject.checkpoints)


def training_ground(subject: ExportSubject):
    """Where the training patches lie, in WGS 84; None where a checkpoint does not say it."""
    trained = _once_each(training_places(c.metadata) for c in subject.checkpoints)
    return outline_of(trained, SPLITS)


def _once_each(lists: Iterable[list | None]) -> list:
    """What lists hold, without repetition; nothing where one of them is empty."""
    lists = list(lists)
    found = []
    for one in itertools.chain.from_iterable(lists if all(lists) else []):
        if one not in found:
            found.append(one)
    return found


def limits(checkpoint: Checkpoint) -> tuple[list[float], list[float]]:
    """The values of each band that become 0 and 1 in the network's input."""
    return list(checkpoint.normalization.low), list(checkpoint.normalization.high)


def training_options(checkpoint: Checkpoint) -> dict:
    """How a model was trained, as far as its file says it."""
    known = checkpoint.metadata.get("training_params") or {}
    idle = set() if known.get("val_strategy") == "kfold" else FOLD_OPTIONS
    if known.get("fold_column") is not None:  # which draws the folds
        idle = idle | {"fold_by"}
    if not ARCHITECTURES[checkpoint.config.model_name].has_dropout:
        idle = idle | {"dropout_rate"}
    names = (name for name in TRAINING_OPTIONS if name not in idle)
    plain = {name: plain_value(known.get(name)) for name in names}
    return {name: value for name, value in plain.items() if value is not None}


def plain_value(value) -> float | int | str | None:
    """A value as JSON holds it; None for what it cannot, as the infinity of earlier checkpoints."""
    value = value.item() if hasattr(value, "item") else value  # a scalar of NumPy
    finite = not isinstance(value, float) or math.isfinite(value)
    return value if finite and isinstance(value, float | int | str) else None


def origin(checkpoint: Checkpoint) -> str | None:
    """What the weights were before the training; "" for random ones, None where nobody knows.

    A file is named without its folder.
    """
    started = checkpoint.metadata.get("started_from")
    if started:
        return f"{file_name(started['file'])} (SHA-256 {started['sha256']})"
    pretrained = checkpoint.metadata.get("pretrained")
    if not pretrained:
        return None if pretrained is None else ""
    options = checkpoint.metadata.get("training_params") or {}
    return file_name(options.get("encoder_weights") or "imagenet")


def file_name(path: str) -> str:
    """Without the folders, of any system."""
    return PureWindowsPath(path).name
