"""What several files of these tests need."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from helpers import (
    Outcome,
)
from sklearn import metrics as reference

from common import UNLABELLED
from common.patches import list_pairs, read_patch
from common.rasters import open_raster
from model_training import (
    load_checkpoint,
    normalize,
)
from training.folds import (
    plan_folds,
)
from training.samples import index_samples
from training.settings import TrainingConfig

CHECKPOINTS = ("best_loss", "best_iou", "best_combined", "final_model")


OF_THE_TEST = ("model_reliability.png", "model_test_examples.png")
OF_THE_LABELS = ("model_patches.gpkg", "model_patches.png")


KFOLD = ("--val_strategy", "kfold", "--n_splits", 3)


def count_pixels(checkpoint: Path, pairs) -> np.ndarray:
    """The confusion matrix of a model on patches, counted by scikit-learn."""
    loaded = load_checkpoint(checkpoint)
    classes = loaded.config.label_classes
    matrix = np.zeros((classes, classes), int)
    for pair in pairs:
        image, valid, mask = read_patch(pair)
        image = normalize(image, valid, loaded.normalization)
        with torch.inference_mode():
            logits = loaded.model(image[None])[0]
        guess = logits[0] > 0 if classes == 2 else logits.argmax(dim=0)
        known = mask != UNLABELLED
        matrix += reference.confusion_matrix(
            mask[known], guess.numpy()[known].astype(int), labels=range(classes)
        )
    return matrix


def pooled_pixels(root: Path, *splits: str) -> np.ndarray:
    """The valid pixels (M, C) of splits."""
    found = []
    for pair in (pair for split in splits for pair in list_pairs(root, split)):
        image, valid, _ = read_patch(pair)
        found.append(image[:, valid].T)
    return np.concatenate(found)


def drawn_folds(run: Outcome, root: Path) -> tuple[list, list]:
    """All patches of a dataset, and the folds at random that a run drew of them."""
    pairs = list_pairs(root, "train") + list_pairs(root, "validation")
    config = TrainingConfig(**run.report["settings"])
    survey = index_samples(pairs, config.label_classes, config.ignore_index)
    return pairs, plan_folds(config, "random", survey, None, None)


def origin_of(file: Path) -> tuple[float, float]:
    with open_raster(file) as opened:
        return opened.transform.c, opened.transform.f


SIDE = 320.0  # metres, of the patches of ``ground``
