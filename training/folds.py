"""Folds of whole groups of patches: at random, by blocks or by columns."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from common.errors import DatasetError
from common.ground import pairs_within, spatial_block_ids, typical_patch_side
from common.patches import patch_footprints
from training.samples import SampleIndex
from training.settings import TrainingConfig

if TYPE_CHECKING:
    from geopandas import GeoSeries

log = logging.getLogger("semanticseg4eo")

# pixels of a class that stand for it where folds are drawn
DRAWN_PIXELS = 1000


def spatial_groups(
    footprints: GeoSeries, fold_by: str, block_size: float | None, n_splits: int
) -> np.ndarray:
    """The number, 0, 1..., of the group that each patch belongs to; a group is in one fold.

    Args:
        footprints: Of the patches, in metres.
        fold_by: "block" for square blocks, "column" for one upright strip of the area per fold,
            all of about as many patches.
        block_size: Side of the blocks in metres; None for four times that of a patch.
        n_splits: Number of strips.

    Raises:
        DatasetError: Fewer eastings than strips.
    """
    if fold_by == "column":
        return _strips(footprints.centroid.x.to_numpy(), n_splits)
    size = block_size or 4 * typical_patch_side(footprints)
    groups = spatial_block_ids(footprints, size)
    origin = "" if block_size else ", four times the side of a patch (--block_size)"
    log.info("%d blocks of %.6g m%s", groups.max() + 1, size, origin)
    return groups


def _strips(eastings: np.ndarray, count: int) -> np.ndarray:
    """Contiguous strips, by the middle rank of each easting, so that equal ones stay together."""
    from scipy.stats import rankdata

    places = (rankdata(eastings) - 0.5) / len(eastings)
    found, strips = np.unique((places * count).astype(int), return_inverse=True)
    if len(found) < count:
        raise DatasetError(
            f"The patches lie in too few columns for {count} strips; lower --n_splits, or give "
            "--fold_by block"
        )
    return strips


def make_folds(
    groups: np.ndarray, class_counts: np.ndarray, n_splits: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Folds of whole groups, alike in number of patches and in shares of each class.

    StratifiedGroupKFold wants one class per sample, but a patch holds several: it is given pixels
    instead, some of each class drawn at random, so that rare classes count as much as others. Of
    several draws the most balanced folds are kept.

    Args:
        groups: (P,) the group of each patch.
        class_counts: (P, K) labelled pixels.
        n_splits: Number of folds.
        seed: Of the draws.

    Returns:
        Per fold the indices of the other patches, and of its own.

    Raises:
        DatasetError: Fewer groups than folds.
    """
    names, groups = np.unique(groups, return_inverse=True)
    if len(names) < n_splits:
        raise DatasetError(
            f"{len(names)} groups of patches cannot make {n_splits} folds; give a smaller "
            "--block_size, or lower --n_splits"
        )
    content = group_counts(groups, class_counts)
    rng = np.random.default_rng(seed)
    draws = min(20, max(1, 4_000 // len(content)))
    drawn = [_draw_folds(content, n_splits, rng) for _ in range(draws)]
    best = min(drawn, key=lambda folds: imbalance(content, folds, n_splits))[groups]
    return [
        (np.flatnonzero(best != fold), np.flatnonzero(best == fold))
        for fold in range(n_splits)
    ]


def group_counts(parts: np.ndarray, class_counts: np.ndarray) -> np.ndarray:
    """What each part 0, 1... holds, (parts, 1 + K) int64: patches, then pixels of each class."""
    content = np.zeros((parts.max() + 1, 1 + class_counts.shape[1]), np.int64)
    np.add.at(content[:, 0], parts, 1)
    np.add.at(content[:, 1:], parts, class_counts)
    return content


def _draw_folds(content: np.ndarray, n_splits: int, rng) -> np.ndarray:
    """A fold per group of a ``group_counts``, balanced by pixels drawn of each class."""
    from sklearn.model_selection import StratifiedGroupKFold

    # in an order of ours: up to scikit-learn 1.7 its shuffle=True undoes the stratification
    order = rng.permutation(len(content))
    samples = content[order]
    for column in samples.T[1:]:
        total = column.sum()
        if total:
            column[:] = rng.multinomial(min(total, DRAWN_PIXELS), column / total)
    group, label = np.nonzero(samples)
    group, label = (np.repeat(ids, samples[group, label]) for ids in (group, label))
    folds = np.empty(len(content), int)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # a class of fewer pixels than folds
        splits = StratifiedGroupKFold(n_splits).split(label, label, group)
        for number, (_, held_out) in enumerate(splits):
            folds[order[group[held_out]]] = number
    return folds


def imbalance(content: np.ndarray, folds: np.ndarray, n_splits: int) -> float:
    """How unlike folds are: 0 where all have equal shares of patches and of every class.

    Args:
        content: (G, 1 + K) of each group: patches, then pixels of each class.
        folds: (G,) the fold of each.
        n_splits: Number of folds.

    Returns:
        The sum of deviations from equal shares, patches weighing as much as all classes together;
        and 10 for each fold without a class that enough groups hold.
    """
    present = content.any(axis=0)
    content = content[:, present]
    shares = np.zeros((n_splits, content.shape[1]))
    np.add.at(shares, folds, content / content.sum(axis=0))
    weights = np.ones(content.shape[1])
    weights[0] = max(1, len(weights) - 1)
    missing = (shares == 0) & ((content > 0).sum(axis=0) >= n_splits)
    gaps = np.abs(shares - 1 / n_splits) * weights
    return float(gaps.sum() + 10 * missing.sum())


def drop_near(
    inner: np.ndarray, outer: np.ndarray, footprints: GeoSeries, buffer: float
) -> np.ndarray:
    """Those of the patches to train on that keep their distance from patches to be examined.

    Args:
        inner: Indices of the training patches.
        outer: Indices of the others.
        footprints: Of all patches, in metres.
        buffer: What is nearer, in metres, leaves; at 0 what shares ground.

    Raises:
        DatasetError: None is left.
    """
    both = np.concatenate([inner, outer])
    parts = np.repeat([0, 1], [len(inner), len(outer)])
    near = pairs_within(footprints.iloc[both], parts, buffer)[:, 0]
    kept = np.delete(inner, np.unique(near))
    if not len(kept):
        raise DatasetError(
            f"All {len(inner)} training patches of a fold share ground with a patch that it is "
            f"examined on, or lie nearer than --buffer {buffer:g} m to one; lower --buffer, or give "
            "a larger --block_size"
        )
    return kept


def inner_split(
    inner: np.ndarray,
    groups: np.ndarray,
    class_counts: np.ndarray,
    seed: int,
    share: float = 0.15,
) -> tuple[np.ndarray, np.ndarray]:
    """Part a fold's training patches into those to learn from, and whole groups to stop early by.

    The training is parted into folds of about ``share`` of its patches, and the one that is most
    like the whole is taken.

    Args:
        inner: Indices of the training patches.
        groups: (P,) the group of every patch, also of those outside.
        class_counts: (P, K) labelled pixels, likewise.
        seed: Of the draws.
        share: Of the patches that go to validation.

    Returns:
        Indices for training and for validation.

    Raises:
        DatasetError: One of the two would have no labelled pixel.
    """
    counts = class_counts[inner]
    parts = min(round(1 / share), len(np.unique(groups[inner])))
    halves = make_folds(groups[inner], counts, parts, seed) if parts > 1 else []
    halves = [pair for pair in halves if all(counts[part].any() for part in pair)]
    if not halves:
        raise DatasetError(
            f"The labelled pixels of a fold's {len(inner)} training patches all lie in one place, "
            "so none can be set aside for early stopping; lower --n_splits, --block_size or "
            "--buffer, or label more patches"
        )

    def cost(pair) -> float:
        sums = np.stack([np.r_[len(part), counts[part].sum(axis=0)] for part in pair])
        sums = sums[:, sums.any(axis=0)]
        gaps = np.abs(sums[1] / sums.sum(axis=0) - share)
        return gaps[0] * (len(gaps) - 1) + gaps[1:].sum() + 10 * (sums[0] == 0).sum()

    train, validation = min(halves, key=cost)
    return inner[train], inner[validation]


@dataclass(frozen=True)
class Fold:
    """Indices of the patches that a fold learns from, stops early by, and is reported for."""

    train: np.ndarray
    validation: np.ndarray
    held_out: np.ndarray


def plan_folds(
    config: TrainingConfig,
    fold_by: str,
    pooled: SampleIndex,
    footprints: GeoSeries | None,
    blocks: np.ndarray | None,
) -> list[Fold]:
    """Folds by "random", "block" or "column", each with validation patches of its own.

    Args:
        config: How many folds, the buffer and the seed.
        fold_by: By what.
        pooled: All patches.
        footprints: Where they lie, in metres; not needed at random.
        blocks: (P,) the block of each; likewise.

    Raises:
        DatasetError: Too few groups, or nothing left to train on.
    """
    counts, n_splits = pooled.counts, config.n_splits
    groups = units = np.arange(len(pooled.pairs))
    if fold_by != "random":
        groups = units = blocks
    if fold_by == "column":
        groups = spatial_groups(footprints, fold_by, None, n_splits)
    folds = []
    for inner, outer in make_folds(groups, counts, n_splits, config.seed):
        near = len(inner)
        if fold_by != "random":
            inner = drop_near(inner, outer, footprints, config.buffer)
        train, validation = inner_split(inner, units, counts, config.seed)
        if fold_by != "random":
            train = drop_near(train, validation, footprints, config.buffer)
        near -= len(train) + len(validation)
        if not counts[train].any():
            raise DatasetError(
                f"Fold {len(folds) + 1} has no labelled pixel to train on; lower --n_splits or "
                "--buffer"
            )
        folds.append(Fold(train, validation, outer))
        log.info(
            "%s fold %d: %d patches held out, %d to train on, %d to stop early by, %d too near",
            *(fold_by, len(folds), len(outer), len(train), len(validation), near),
        )
    return folds


def plan_all_folds(
    config: TrainingConfig, pooled: SampleIndex
) -> tuple[dict[str, list[Fold]], np.ndarray]:
    """The folds of ``--fold_by`` by kind, two kinds for ``both``, and the block of each patch.

    Raises:
        DatasetError: See ``plan_folds``.
    """
    if len(pooled.pairs) < config.n_splits:
        raise DatasetError(
            f"{len(pooled.pairs)} patches cannot make {config.n_splits} folds; lower --n_splits"
        )
    footprints, blocks = None, np.arange(len(pooled.pairs))
    if config.fold_by != "random":
        footprints = patch_footprints(pooled.pairs)
        blocks = spatial_groups(footprints, "block", config.block_size, config.n_splits)
    kinds = ("random", "block") if config.fold_by == "both" else (config.fold_by,)
    plans = {
        kind: plan_folds(config, kind, pooled, footprints, blocks) for kind in kinds
    }
    return plans, blocks
