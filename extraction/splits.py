"""The split of each patch: at random or by blocks, repeat coverage kept together."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from common import SPLITS
from common.balance import uneven_shares, unit_shares
from common.errors import DatasetError
from common.ground import (
    overlap_fraction,
    pairs_within,
    spatial_block_ids,
    typical_patch_side,
)
from extraction.journal import Skipped, class_counts
from extraction.settings import ExtractionOptions

if TYPE_CHECKING:
    from geopandas import GeoSeries

log = logging.getLogger("semanticseg4eo")


def split_counts(count: int, ratios: Sequence[float]) -> list[int]:
    """Whole numbers that sum to ``count`` and are nearest to the ratios (largest remainder)."""
    exact = [count * ratio for ratio in ratios]
    counts = [math.floor(value + 1e-9) for value in exact]
    by_remainder = sorted(range(len(ratios)), key=lambda i: counts[i] - exact[i])
    for index in by_remainder[: count - sum(counts)]:
        counts[index] += 1
    return counts


def random_splits(count: int, ratios: Sequence[float], seed: int) -> list[str]:
    """A split for each of ``count`` places, drawn at random with a seed."""
    names = np.repeat(SPLITS, split_counts(count, ratios))
    return np.random.default_rng(seed).permutation(names).tolist()


def balance_blocks(
    content: np.ndarray, ratios: Sequence[float], seed: int
) -> list[str]:
    """A split for each block, so that patches and every class are shared by the ratios.

    ``uneven_shares`` is lowered by moving and swapping blocks until no step helps, from several
    random beginnings. A class that enough blocks hold must be in every split.

    Args:
        content: (blocks, 1 + classes): patches, then pixels of each class.
        ratios: Shares of training, validation and test.
        seed: Of the beginnings.
    """
    used = np.flatnonzero(ratios)
    wanted = np.asarray(ratios)[used] / np.sum(ratios)
    shares = unit_shares(content)
    required = (shares > 0).sum(axis=0) >= len(used)

    def cost(sums: np.ndarray) -> float:
        return uneven_shares(sums, wanted, required)

    rng = np.random.default_rng(seed)
    best, lowest = None, math.inf
    for _ in range(max(3, min(20, 10_000 // len(shares)))):
        chosen = rng.choice(len(wanted), len(shares), p=wanted)
        sums = np.stack([shares[chosen == s].sum(axis=0) for s in range(len(wanted))])
        current, before = cost(sums), math.inf
        while current < before - 1e-9:
            before = current
            for block in rng.permutation(len(shares)):
                # move it to another split, or swap it with another block
                other = rng.integers(len(shares))
                steps = [{block: split} for split in range(len(used))]
                steps.append({block: chosen[other], other: chosen[block]})
                for step in steps:
                    moved = sums.copy()
                    for index, split in step.items():
                        moved[chosen[index]] -= shares[index]
                        moved[split] += shares[index]
                    if (value := cost(moved)) < current - 1e-9:
                        sums, current = moved, value
                        for index, split in step.items():
                            chosen[index] = split
        if current < lowest:
            best, lowest = chosen.copy(), current
    return [SPLITS[used[split]] for split in best]


def link_repeat_coverage(footprints: GeoSeries, scenes: Sequence[int]) -> np.ndarray:
    """A number per patch; patches of several scenes that show one place have the same.

    Two patches do when, between their two scenes, each has most of its ground in common with the
    other and with none more.

    Args:
        footprints: The ground of each patch.
        scenes: The scene that each comes from.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    count, scenes = len(footprints), np.asarray(scenes)
    pairs = footprints.sindex.query(footprints, predicate="intersects").T
    pairs = pairs[scenes[pairs[:, 0]] != scenes[pairs[:, 1]]]
    shared = overlap_fraction(footprints, pairs)
    pairs, shared = pairs[shared > 0.5], shared[shared > 0.5]
    # of each patch, the best partner in each other scene
    order = np.argsort(-shared, kind="stable")
    best: dict[tuple[int, int], int] = {}
    for left, right in pairs[order].tolist():
        best.setdefault((left, int(scenes[right])), right)
    links = [
        (left, right)
        for (left, _), right in best.items()
        if best.get((right, int(scenes[left]))) == left
    ]
    left, right = np.array(links, int).reshape(-1, 2).T
    graph = coo_array((np.ones(len(left)), (left, right)), (count, count))
    return connected_components(graph, directed=False)[1]


def assign_splits(
    records: Sequence[dict], ground: GeoSeries, config: ExtractionOptions
):
    """Put patches into splits.

    Args:
        records: Of the patches; "scene" and "class_pixels" are used.
        ground: Their footprints, in metres.
        config: How.

    Returns:
        A split per patch, and {index: Skipped} of the patches to be dropped.
    """
    if config.split_by == "random":
        scenes = {record["scene"]: number for number, record in enumerate(records)}
        places = link_repeat_coverage(
            ground, [scenes[record["scene"]] for record in records]
        )
        drawn = random_splits(places.max() + 1, config.ratios, config.seed)
        splits = [drawn[place] for place in places]
    else:
        splits = _block_splits(records, ground, config)
    dropped: dict[int, Skipped] = {}
    parts = [SPLITS.index(split) for split in splits]
    overlapping = pairs_within(ground, parts, 0)
    if config.split_by == "block":
        reason = Skipped("shares ground with another split")
        dropped |= {int(i): reason for i, _ in overlapping}
    elif config.buffer == 0:
        touching = pairs_within(ground, parts, 1e-3 * typical_patch_side(ground))
        if len(touching):
            log.warning(
                "%d of %d patches touch or overlap a patch of another split, so scores will be too "
                "good; --split_by block keeps neighbours together",
                len(np.unique(touching)),
                len(records),
            )
    if config.buffer:
        reason = Skipped(f"nearer than {config.buffer:g} m to another split")
        near = pairs_within(ground, parts, config.buffer)
        dropped |= {int(i): reason for i, _ in near}
    return splits, dropped


def _block_splits(records, ground: GeoSeries, config: ExtractionOptions) -> list[str]:
    """Splits by square blocks; a patch belongs where its centre lies."""
    size = config.block_size or 4 * typical_patch_side(ground)
    numbers = spatial_block_ids(ground, size)
    pixels = class_counts(records)
    content = np.zeros((numbers.max() + 1, 1 + pixels.shape[1]))
    np.add.at(content[:, 0], numbers, 1)
    np.add.at(content[:, 1:], numbers, pixels)
    if len(content) < np.count_nonzero(config.ratios):
        raise DatasetError(
            f"The cells lie in {len(content)} blocks of {size:g} m, too few for the splits; give a "
            "smaller --block_size"
        )
    drawn = balance_blocks(content, config.ratios, config.seed)
    return [drawn[number] for number in numbers]
