"""A whole export: checkpoints opened, one file written, what catalogues read beside it."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from common.files import (
    atomic_write,
    models_text,
    require_folder,
    require_new_files,
    write_json,
)
from exporting.card import card_text
from exporting.deepness import deepness_metadata
from exporting.graph import ProbabilityGraph
from exporting.onnx_file import BATCH, require_libraries, write_onnx
from exporting.settings import ExportConfig
from exporting.stac import stac_item
from exporting.subject import ExportSubject, load_subject
from model_training import Checkpoint

log = logging.getLogger("semanticseg4eo")


def export_model(config: ExportConfig) -> list[Path]:
    """Write the file that the options ask for, its STAC item and its card.

    Returns:
        The files that were written; a card that is there already is kept.

    Raises:
        SegmentationError: A library is missing, a file is there already, or the models cannot be
            exported.
        OptionError: An option does not fit the models.
    """
    require_libraries()
    subject = load_subject(config)
    if text := models_text(config.model, subject.files):
        log.info(text)
    require_folder("--output", subject.onnx.parent)
    item, card = (subject.onnx.with_suffix(suffix) for suffix in (".json", ".md"))
    require_new_files([subject.onnx, item], config.overwrite)
    kept = card.exists() and not config.overwrite  # a person may have filled it in
    if kept:
        log.info("%s is kept as it is; --overwrite makes it anew", card)
    files = [subject.onnx, item, *([] if kept else [card])]
    with ExitStack() as stack:
        # all are complete before the first, the ONNX file, gets its name
        parts = {f: stack.enter_context(atomic_write(f)) for f in reversed(files)}
        write_file(subject, parts[subject.onnx])
        write_json(parts[item], stac_item(subject, parts[subject.onnx]))
        if not kept:
            parts[card].write_text(card_text(subject), encoding="utf-8")
    return files


def write_file(subject: ExportSubject, target: Path) -> None:
    """Write the ONNX file of a subject."""
    side, bands = subject.config.patch_size, subject.first.config.in_channels
    write_onnx(
        target,
        ProbabilityGraph(subject.checkpoints),
        (bands, side, side),
        trial_images(subject.first, side),
        deepness_metadata(subject),
    )


def trial_images(checkpoint: Checkpoint, side: int) -> Tensor:
    """Images of random values around those of the training, some pixels without data.

    Args:
        checkpoint: The model that they are for.
        side: Of the images, in pixels.
    """
    generator = torch.Generator().manual_seed(0)
    low, high = (
        torch.tensor(numbers, dtype=torch.float32)[:, None, None]
        for numbers in (checkpoint.normalization.low, checkpoint.normalization.high)
    )
    shares = torch.rand(BATCH, len(low), side, side, generator=generator)
    images = low + (high - low) * (1.2 * shares - 0.1)
    images[0, 0, : side // 4, : side // 3] = torch.nan
    images[-1, -1, side // 2 :, side // 2] = torch.inf
    return images
