"""Folds of whole groups of patches: at random, by blocks, by columns or by values."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from common.balance import absent_classes, uneven_shares, unit_shares
from common.errors import DatasetError
from common.ground import (
    overlap_fraction,
    pairs_within,
    spatial_block_ids,
    typical_patch_side,
)
from common.patches import patch_footprints
from training.dataset import names_for
from training.fold_groups import report_shared_ground, value_groups
from training.samples import SampleIndex
from training.settings import TrainingConfig

if TYPE_CHECKING:
    from geopandas import GeoSeries

log = logging.getLogger("semanticseg4eo")

DRAWN_PIXELS = 1000  # of each class, by which folds are made alike
ONE_PLACE = 0.8  # of the smaller patch's ground in common


def same_places(footprints: GeoSeries) -> np.ndarray:
    """A number per patch, 0, 1...; patches of one place, as those of several dates, have the same."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    pairs = footprints.sindex.query(footprints, predicate="intersects").T
    pairs = pairs[pairs[:, 0] < pairs[:, 1]]
    left, right = pairs[overlap_fraction(footprints, pairs) > ONE_PLACE].T
    links = (np.ones(len(left)), (left, right))
    graph = coo_array(links, (len(footprints), len(footprints)))
    return connected_components(graph, directed=False)[1]


def whole_places(groups: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Groups 0, 1... that part no place: its patches are in the group of the first of them."""
    chosen = groups[np.unique(places, return_index=True)[1]][places]
    return np.unique(chosen, return_inverse=True)[1]


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
    size = block_size or default_block_size(footprints)
    groups = spatial_block_ids(footprints, size)
    origin = "" if block_size else ", four times the side of a patch (--block_size)"
    log.info("%d blocks of %.6g m%s", groups.max() + 1, size, origin)
    return groups


def default_block_size(footprints: GeoSeries) -> float:
    """The side of a block in metres where ``--block_size`` says none."""
    return 4 * typical_patch_side(footprints)


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

    StratifiedGroupKFold expects one class per sample, but a patch holds several: it is given
    pixels instead, some of each class drawn at random, so that rare classes count as much as
    others.

    Args:
        groups: (P,) the group of each patch.
        class_counts: (P, K) labelled pixels.
        n_splits: Number of folds.
        seed: Of the draw.

    Returns:
        Per fold the indices of the other patches, and of its own.

    Raises:
        DatasetError: Fewer groups than folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    names, groups = np.unique(groups, return_inverse=True)
    if len(names) < n_splits:
        raise DatasetError(
            f"{len(names)} groups of patches cannot make {n_splits} folds; give a smaller "
            "--block_size, or lower --n_splits"
        )
    rng = np.random.default_rng(seed)
    # in an order of our own: up to scikit-learn 1.7 its shuffle=True undoes the stratification
    order = rng.permutation(len(names))
    samples = group_counts(groups, class_counts)[order]
    for column in samples.T[1:]:
        if (total := column.sum()) > DRAWN_PIXELS:
            column[:] = rng.multinomial(DRAWN_PIXELS, column / total)
    group, label = np.nonzero(samples)
    group, label = (np.repeat(ids, samples[group, label]) for ids in (group, label))
    made = []
    with warnings.catch_warnings():
        # that a class has fewer pixels than there are folds
        warnings.simplefilter("ignore", UserWarning)
        for _, held_out in StratifiedGroupKFold(n_splits).split(label, label, group):
            inside = np.isin(groups, order[group[held_out]])
            made.append((np.flatnonzero(~inside), np.flatnonzero(inside)))
    return made


def group_counts(groups: np.ndarray, class_counts: np.ndarray) -> np.ndarray:
    """What each group 0, 1... holds, (groups, 1 + K) int64: patches, then pixels of each class."""
    content = np.zeros((groups.max() + 1, 1 + class_counts.shape[1]), np.int64)
    np.add.at(content[:, 0], groups, 1)
    np.add.at(content[:, 1:], groups, class_counts)
    return content


def drop_near(
    train: np.ndarray, test: np.ndarray, footprints: GeoSeries, buffer: float
) -> np.ndarray:
    """The training patches that keep their distance from the patches that a model is tested on.

    Args:
        train: Indices of the training patches.
        test: Indices of the others.
        footprints: Of all patches, in metres.
        buffer: In metres; patches nearer than that are dropped, at 0 those that share ground.

    Raises:
        DatasetError: None is left.
    """
    both = np.concatenate([train, test])
    parts = np.repeat([0, 1], [len(train), len(test)])
    dropped = np.unique(pairs_within(footprints.iloc[both], parts, buffer)[:, 0])
    kept = np.delete(train, dropped)
    if not len(kept):
        raise DatasetError(
            f"All {len(train)} training patches of a fold share ground with a patch that the fold "
            f"is tested on, or lie nearer than --buffer {buffer:g} m to one; lower --buffer, or "
            "give a larger --block_size"
        )
    return kept


def inner_split(
    indices: np.ndarray,
    groups: np.ndarray,
    class_counts: np.ndarray,
    seed: int,
    share: float = 0.15,
) -> tuple[np.ndarray, np.ndarray]:
    """Divide a fold's training patches into those to learn from, and whole groups to validate on.

    They are divided into folds of about ``share`` of the patches, and the fold that is most like
    the whole is taken.

    Args:
        indices: The training patches.
        groups: (P,) the group of every patch, also of those outside.
        class_counts: (P, K) labelled pixels, likewise.
        seed: Of the draw.
        share: Of the patches that go to validation.

    Returns:
        Indices for training and for validation.

    Raises:
        DatasetError: One of the two would have no labelled pixel.
    """
    counts = class_counts[indices]
    n_splits = min(round(1 / share), len(np.unique(groups[indices])))
    pairs = make_folds(groups[indices], counts, n_splits, seed) if n_splits > 1 else []
    pairs = [pair for pair in pairs if all(counts[part].any() for part in pair)]
    if not pairs:
        raise DatasetError(
            f"The labelled pixels of a fold's {len(indices)} training patches all lie in one place, "
            "so none can be set aside for validation; lower --n_splits, --block_size or --buffer, "
            "or label more patches"
        )
    shares = unit_shares(np.c_[np.ones(len(counts)), counts])
    # the training part must hold every class, the validation part should
    required = np.array([[True], [False]])

    def unevenness(pair) -> float:
        sums = np.stack([shares[part].sum(axis=0) for part in pair])
        lacking = np.count_nonzero(sums[1] <= 1e-12)
        return uneven_shares(sums, [1 - share, share], required) + lacking

    train, validation = min(pairs, key=unevenness)
    return indices[train], indices[validation]


@dataclass(frozen=True)
class Fold:
    """Indices of the patches that a fold trains on, validates on, and is tested on."""

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
    """Folds of one kind, each with validation patches of its own.

    Args:
        config: How many folds, the buffer and the seed.
        fold_by: "random", "block", "column", or "value" for those of ``value_groups``.
        pooled: All patches.
        footprints: Where they lie, in metres; None, for "random" alone, where that is unknown.
        blocks: (P,) the block, or the value, of each; not needed at random.

    Raises:
        DatasetError: Too few groups, or nothing left to train on.
    """
    counts, n_splits = pooled.counts, config.n_splits
    places = np.arange(len(pooled.pairs))
    if footprints is not None:
        places = same_places(footprints)
    groups = units = places
    if fold_by == "value":
        groups = units = blocks
    elif fold_by != "random":
        groups = units = whole_places(blocks, places)
    if fold_by == "column":
        strips = spatial_groups(footprints, fold_by, None, n_splits)
        groups = whole_places(strips, places)
    # values are kept apart by a buffer alone: all dates of a place share its ground
    apart = fold_by in ("block", "column") or bool(fold_by == "value" and config.buffer)
    label = config.fold_values if fold_by == "value" else fold_by
    folds = []
    for others, held_out in make_folds(groups, counts, n_splits, config.seed):
        kept = others
        if apart:
            kept = drop_near(others, held_out, footprints, config.buffer)
        one_value = fold_by == "value" and len(np.unique(units[kept])) == 1
        if one_value:
            text = "fold %d trains and validates on one %s"
            log.info(text, len(folds) + 1, label)
        inner = places if one_value else units
        train, validation = inner_split(kept, inner, counts, config.seed)
        if apart:
            train = drop_near(train, validation, footprints, config.buffer)
        if not counts[train].any():
            raise DatasetError(
                f"Fold {len(folds) + 1} has no labelled pixel to train on; lower --n_splits or "
                "--buffer"
            )
        folds.append(Fold(train, validation, held_out))
        dropped = len(others) - len(train) - len(validation)
        log.info(
            "%s fold %d: %d patches held out, %d for training, %d for validation, %d dropped",
            *(label, len(folds), len(held_out), len(train), len(validation), dropped),
        )
    return folds


def plan_all_folds(
    config: TrainingConfig, pooled: SampleIndex
) -> tuple[dict[str, list[Fold]], np.ndarray]:
    """The folds by kind, two kinds for ``--fold_by both``, and the block or value of each patch.

    Raises:
        DatasetError: See ``plan_folds``.
    """
    if len(pooled.pairs) < config.n_splits:
        raise DatasetError(
            f"{len(pooled.pairs)} patches cannot make {config.n_splits} folds; lower --n_splits"
        )
    footprints = known_footprints(config, pooled)
    if config.fold_values is not None:
        blocks = value_groups(config, pooled.pairs)
        report_shared_ground(config, blocks, footprints)
        folds = plan_folds(config, "value", pooled, footprints, blocks)
        report_absent(config, pooled, folds)
        return {"value": folds}, blocks
    if config.fold_by != "random":
        blocks = spatial_groups(footprints, "block", config.block_size, config.n_splits)
        blocks = whole_places(blocks, same_places(footprints))
    elif footprints is None:
        blocks = np.arange(len(pooled.pairs))
    else:
        blocks = same_places(footprints)
        if dates := len(blocks) - blocks.max() - 1:
            text = "%d patches show the place of another one and stay in its fold"
            log.info(text, dates)
    kinds = ("random", "block") if config.fold_by == "both" else (config.fold_by,)
    plans = {
        kind: plan_folds(config, kind, pooled, footprints, blocks) for kind in kinds
    }
    for folds in plans.values():
        report_absent(config, pooled, folds)
    return plans, blocks


def report_absent(
    config: TrainingConfig, pooled: SampleIndex, folds: Sequence[Fold]
) -> None:
    """Log which folds choose their best epoch without which classes, of those that there are."""
    anywhere, names = pooled.counts.any(axis=0), names_for(config, pooled)
    found: dict[str, list[int]] = {}
    for number, fold in enumerate(folds, start=1):
        pixels = np.where(anywhere, pooled.counts[fold.validation].sum(axis=0), 1)
        if text := absent_classes("validation", names, pixels.tolist()):
            found.setdefault(text, []).append(number)
    for text, numbers in found.items():
        log.warning("fold %s: %s", ", ".join(map(str, numbers)), text)


def fewest_patches(plans: Mapping[str, Sequence[Fold]]) -> int:
    """How many patches the fold that has the fewest trains on."""
    return min(len(fold.train) for folds in plans.values() for fold in folds)


def known_footprints(config: TrainingConfig, pooled: SampleIndex) -> GeoSeries | None:
    """Where patches lie; None for folds at random, or by values, where that is unknown.

    Raises:
        DatasetError: It is unknown for other folds.
    """
    try:
        return patch_footprints(pooled.pairs)
    except DatasetError:
        if config.fold_by not in ("random", "scene") or config.buffer:
            raise
        log.info("patches without a known place: each counts as a place of its own")
        return None
