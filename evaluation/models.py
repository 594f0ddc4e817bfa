"""A model examined on the patches of any dataset, as a training examines it on its test split."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import groupby, islice

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common import UNLABELLED
from common.architectures import default_class_names
from common.devices import allow_tf32, pick_device, require_deterministic_cublas
from common.errors import CheckpointError, DatasetError, RasterError
from common.files import list_models, models_text
from common.interruption import until_stopped
from common.labels import class_names_of
from common.patches import (
    PatchPair,
    list_pairs,
    patch_bands,
    patch_pixel_sides,
    patch_pixel_size,
    read_patch,
)
from common.rasters import open_raster
from common.scores import scores
from common.text import number_dates
from evaluation.boundaries import BoundaryScores
from evaluation.reports import TestCollector, watch_boundaries
from evaluation.settings import EvaluationConfig, reach_in_pixels
from model_training import Checkpoint, load_checkpoint, normalize

log = logging.getLogger("semanticseg4eo")

BATCH = 8  # patches at once


class Patches:
    """The patches of a split, with their labels as the classes of a model."""

    def __init__(self, pairs: Sequence[PatchPair], checkpoint: Checkpoint):
        """Compare the dataset's class names with the model's.

        Raises:
            DatasetError: They differ, and not only in their order.
        """
        self.pairs, self.checkpoint = list(pairs), checkpoint
        self.ignore_index = checkpoint.metadata.get("ignore_index", UNLABELLED)
        self.names = checkpoint.class_names
        with open_raster(self.pairs[0].label) as file:
            stored = class_names_of(file) or self.names
        absent = [name for name in stored if name not in self.names]
        nameless = self.names == default_class_names(checkpoint.config.num_classes)
        if absent and not (nameless and len(stored) == len(self.names)):
            raise DatasetError(
                f"The labels in {self.pairs[0].label.parent} have the class {absent[0]!r}, which the "
                f"model does not know ({', '.join(self.names[:24])})"
            )
        numbers = range(len(stored)) if absent else map(self.names.index, stored)
        self.order = np.array(list(numbers))

    def read(self, pair: PatchPair) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Image, valid pixels and labels of a patch, as ``read_patch`` gives them.

        Raises:
            SegmentationError: It cannot be used, or has other bands or classes than the model.
        """
        image, valid, mask = read_patch(pair, self.ignore_index)
        self._require_bands(pair, len(image))
        known = mask != self.ignore_index
        strange = np.unique(mask[known & ((mask < 0) | (mask >= len(self.order)))])
        if strange.size:
            raise DatasetError(
                f"{pair.label} holds {', '.join(map(str, strange[:8]))}: the model's classes are 0.."
                f"{len(self.order) - 1}, and {self.ignore_index} is unlabelled"
            )
        mask[known] = self.order[mask[known]]
        return image, valid, mask

    def _require_bands(self, pair: PatchPair, bands: int) -> None:
        expected = self.checkpoint.config.in_channels
        if bands != expected:
            raise RasterError(
                f"{pair.image} has {bands} bands, but the model takes {expected}"
            )
        known = self.checkpoint.metadata.get("band_descriptions") or [None]
        with open_raster(pair.image) as file:
            found = [file.descriptions[band - 1] for band in patch_bands(file)]
        if all(known) and all(found) and number_dates(found) != number_dates(known):
            raise RasterError(
                f"The bands of {pair.image} are {', '.join(found)}, but the model was trained on "
                f"{', '.join(known)}"
            )


def examine(config: EvaluationConfig) -> tuple[dict, TestCollector, Patches]:
    """Examine a model on a split of a dataset, in float32.

    Returns:
        The report as plain numbers for JSON, with the scores under the name of the split; what it
        is made from; the patches.

    Raises:
        SegmentationError: Model or patches cannot be used, or do not fit each other.
    """
    device = pick_device(config.device)
    require_deterministic_cublas()
    if device.type == "cuda":
        allow_tf32("fp32")
    files = list_models([config.model])
    if len(files) > 1:
        raise CheckpointError(
            f"{config.model} holds {len(files)} folds ({files[0]}, ...); name the checkpoint of one, since each "
            "is examined alone"
        )
    if text := models_text([config.model], files):
        log.info(text)
    checkpoint = load_checkpoint(files[0], device)
    patches = Patches(list_pairs(config.dataset_root, config.split), checkpoint)
    counts = count_labels(patches)
    metres = patch_pixel_size(patches.pairs)
    sides = patch_pixel_sides(patches.pairs)
    reach = reach_in_pixels(config.boundary_tolerance, sides)
    boundaries = BoundaryScores(counts.shape[1], reach)
    watch = watch_boundaries(boundaries)
    collector = TestCollector(patches.pairs, counts, checkpoint.temperature)
    for logits, masks in predictions(patches, device):
        collector(logits, masks)
        watch(logits, masks)
    matrix, binary = (
        np.sum(collector.matrices, axis=0),
        checkpoint.config.mode == "binary",
    )
    found = scores(matrix, patches.names, binary)
    found["boundary"] = boundaries.report(patches.names, metres)
    report = {
        "model": files[0],
        "dataset_root": config.dataset_root,
        "split": config.split,
        "patches": len(patches.pairs),
        config.split: found,
        "calibration": collector.calibration(),
        "class_names": patches.names,
    }
    return report, collector, patches


def count_labels(patches: Patches) -> np.ndarray:
    """The labelled pixels of each patch, (patches, classes).

    Raises:
        SegmentationError: A patch cannot be used, or none has a label.
    """
    classes = len(patches.names)
    counts = []
    for pair in _progress(patches.pairs, "reading patches"):
        mask = patches.read(pair)[2]
        counts.append(
            np.bincount(mask[mask != patches.ignore_index], minlength=classes)
        )
    if not np.any(counts):
        raise DatasetError(
            f"No patch in {patches.pairs[0].label.parent} has a labelled pixel that is valid in the "
            "image; check the nodata values of both"
        )
    return np.stack(counts)


def predictions(
    patches: Patches, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits (N, K, H, W) and masks (N, H, W) of all patches, in order."""
    checkpoint = patches.checkpoint
    model = checkpoint.model.eval()
    pairs = _progress(patches.pairs, "examining")
    read = (patches.read(pair) for pair in pairs)
    for _, alike in groupby(read, key=lambda patch: patch[2].shape):
        while batch := list(islice(alike, BATCH)):
            images = [
                normalize(image, valid, checkpoint.normalization)
                for image, valid, _ in batch
            ]
            masks = torch.from_numpy(np.stack([mask for *_, mask in batch]))
            with torch.inference_mode():
                yield model(torch.stack(images).to(device)).float(), masks.to(device)


def _progress(pairs: Sequence[PatchPair], what: str) -> Iterator[PatchPair]:
    return until_stopped(tqdm(pairs, what, unit="patch", leave=False, disable=None))
