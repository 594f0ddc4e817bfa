"""A whole export: checkpoints opened, one file written, what catalogues read beside it."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

from common.files import models_text, require_folder, require_new_files
from exporting.card import write_card
from exporting.deepness import deepness_metadata
from exporting.graph import ProbabilityGraph
from exporting.onnx_file import BATCH, require_libraries, write_onnx
from exporting.settings import ExportConfig
from exporting.stac import write_item
from exporting.subject import load_subject
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
    side, bands = config.patch_size, subject.first.config.in_channels
    write_onnx(
        subject.onnx,
        ProbabilityGraph(subject.checkpoints),
        (bands, side, side),
        trial_images(subject.first, side),
        deepness_metadata(subject),
    )
    write_item(subject, item, config.overwrite)
    written = write_card(subject, card, config.overwrite)
    return [subject.onnx, item, *([card] if written else [])]


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
