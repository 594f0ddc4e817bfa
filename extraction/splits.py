"""The split of each patch: at random, by blocks or by scenes, given ones among them."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from heapq import heappop, heappush
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

MISSED_SHARE = 0.1  # of all patches; what a split may have more or less than asked for


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
    count, scenes = len(footprints), np.asarray(scenes)
    if len(np.unique(scenes)) < 2:
        return np.arange(count)
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    # a patch that holds most of another holds its centre; neighbours would be many more
    inside, around = footprints.sindex.query(
        footprints.centroid, predicate="intersects"
    )
    lower, upper = np.sort([inside, around], axis=0)
    pairs = np.stack(divmod(np.unique(lower * count + upper), count), axis=1)
    pairs = pairs[scenes[pairs[:, 0]] != scenes[pairs[:, 1]]]
    shared = overlap_fraction(footprints, pairs)
    pairs, shared = pairs[shared > 0.5], shared[shared > 0.5]
    pairs, shared = np.concatenate([pairs, pairs[:, ::-1]]), np.tile(shared, 2)
    # of each patch, the best partner in each other scene
    order = np.lexsort([pairs[:, 1], pairs[:, 0], -shared])
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
    records: Sequence[dict],
    ground: GeoSeries,
    config: ExtractionOptions,
    given: Mapping[str, str],
):
    """Put patches into splits.

    Args:
        records: Of the patches; "name", "scene" and "class_pixels" are used.
        ground: Their footprints, in metres.
        config: How.
        given: The splits of patches, by name, that are not drawn.

    Returns:
        A split per patch, and {index: Skipped} of the patches to be dropped.

    Raises:
        DatasetError: There are too few blocks, or a split loses all of its patches.
    """
    parts = np.array([SPLITS.index(given.get(r["name"], "train")) for r in records])
    fixed = np.array([record["name"] in given for record in records])
    names = [record["scene"] for record in records]
    scenes = np.unique(names, return_inverse=True)[1]
    by = config.split_by
    if by == "random" or (by == "block" and fixed.any()):
        places = link_repeat_coverage(ground, scenes)
        parts, fixed = follow_dates(parts, fixed, places)
    counts, ratios = np.bincount(parts[fixed], minlength=3), np.array(config.ratios)
    wanted = ratios + (counts - ratios * counts.sum()) / len(records)
    free = np.flatnonzero(~fixed)
    if len(free):
        if by == "random":
            units = np.unique(places[free], return_inverse=True)[1]
            drawn = random_splits(units.max() + 1, config.ratios, config.seed)
        else:
            needed = np.count_nonzero((counts == 0) & (ratios > 0))
            size = config.block_size or 4 * typical_patch_side(ground)
            groups = scenes if by == "scene" else spatial_block_ids(ground, size)
            units, content = _content([records[i] for i in free], groups[free])
            _require_enough(by, len(content), needed, size)
            drawn = balance_blocks(content, config.ratios, config.seed)
        parts[free] = [SPLITS.index(drawn[unit]) for unit in units]
    lost = _leave_out_near(parts, ground, wanted, fixed, config)
    _require_shares(parts, lost, fixed, config)
    reason = (
        f"nearer than {config.buffer:g} m to another split"
        if config.buffer
        else "shares ground with another split"
    )
    splits = [SPLITS[part] for part in parts]
    return splits, dict.fromkeys(lost, Skipped(reason))


def follow_dates(parts: np.ndarray, fixed: np.ndarray, places: np.ndarray):
    """Patches whose place has a given split on another date get it too.

    Args:
        parts: The number of the split of each patch.
        fixed: Whether it is given.
        places: A number per patch, by ``link_repeat_coverage``.

    Returns:
        ``parts`` and ``fixed`` with them.
    """
    known = np.full(places.max() + 1, -1)
    rows = np.flatnonzero(fixed)[::-1]  # of several splits of a place the first counts
    known[places[rows]] = parts[rows]
    found = known[places]
    return np.where(fixed | (found < 0), parts, found), fixed | (found >= 0)


def _leave_out_near(
    parts: np.ndarray,
    ground: GeoSeries,
    wanted: Sequence[float],
    fixed: np.ndarray,
    config: ExtractionOptions,
) -> set[int]:
    """The patches to drop since they share ground with another split, or lie too near to it.

    Without blocks and buffer these are the neighbours of a test area alone, and others are logged.
    """
    apart = config.split_by == "block" or config.buffer
    lost: set[int] = set()
    if apart or config.test_area:
        pairs = pairs_within(ground, parts, config.buffer)
        pairs = pairs if apart else pairs[fixed[pairs].any(axis=1)]
        lost = leave_out_drawn(parts, pairs, wanted, fixed)
    if not apart:
        left = np.delete(np.arange(len(parts)), list(lost))
        _warn_of_touching(parts[left], ground.iloc[left], fixed[left], config.split_by)
    return lost


def _warn_of_touching(
    parts: np.ndarray, ground: GeoSeries, fixed: np.ndarray, split_by: str
) -> None:
    """Log how many patches touch another split, where such patches are not dropped."""
    touching = pairs_within(ground, parts, 1e-3 * typical_patch_side(ground))
    if not len(touching):
        return
    if split_by == "scene":
        meaning = "scores hold for new scenes of these places, not for new places"
    elif fixed.all():
        meaning = "scores will be too good; --buffer keeps a distance"
    else:
        meaning = "scores will be too good; --split_by block or scene keeps neighbours together"
    log.warning(
        "%d of %d patches touch or overlap a patch of another split, so %s",
        *(len(np.unique(touching)), len(parts), meaning),
    )


def leave_out_drawn(
    parts: np.ndarray, pairs: np.ndarray, wanted: Sequence[float], fixed: np.ndarray
) -> set[int]:
    """The patches to drop by ``leave_out``, drawn ones wherever one is in a pair with a given one.

    Args:
        parts: See ``leave_out``.
        pairs: Likewise.
        wanted: The share of each split.
        fixed: Whether the split of a patch is given.
    """
    mixed = pairs[fixed[pairs].sum(axis=1) == 1]
    drawn = np.unique(mixed[~fixed[mixed]])
    left = np.delete(np.arange(len(parts)), drawn)
    rest = pairs[~np.isin(pairs, drawn).any(axis=1)]
    more = leave_out(parts[left], np.searchsorted(left, rest), wanted)
    return {*drawn.tolist(), *left[list(more)].tolist()}


def leave_out(
    parts: np.ndarray, pairs: np.ndarray, ratios: Sequence[float]
) -> set[int]:
    """The patches to drop so that no pair stays whole and the splits keep their shares.

    Patches without a pair stay. Of the others, the split that lacks most keeps one in turn, and
    its partners go: the one with the fewest partners, which is next to one kept before. None
    of those that go could have stayed.

    Args:
        parts: The number of the split of each patch.
        pairs: (M, 2) patches of different splits that cannot both stay.
        ratios: The share of each split.
    """
    partners: dict[int, list[int]] = {}
    for one, other in pairs.tolist():
        partners.setdefault(one, []).append(other)
        partners.setdefault(other, []).append(one)
    alone = np.delete(parts, list(partners))
    kept = np.bincount(alone, minlength=len(ratios)).tolist()
    remaining = {patch: len(others) for patch, others in partners.items()}
    queues: list[list] = [[] for _ in ratios]
    for patch, count in remaining.items():
        heappush(queues[parts[patch]], (count, patch))
    dropped: set[int] = set()
    while remaining:
        for queue in queues:  # entries that are out of date
            while queue and remaining.get(queue[0][1]) != queue[0][0]:
                heappop(queue)
        waiting = [split for split, queue in enumerate(queues) if queue]
        # a patch whose partners are all gone costs nothing
        split = min(waiting, key=lambda s: (queues[s][0][0] > 0, kept[s] / ratios[s]))
        patch = heappop(queues[split])[1]
        del remaining[patch]
        kept[split] += 1
        for other in partners[patch]:
            if remaining.pop(other, None) is None:
                continue
            dropped.add(other)
            for third in partners[other]:
                if third in remaining:
                    remaining[third] -= 1
                    heappush(queues[parts[third]], (remaining[third], third))
    return dropped


def _require_shares(
    parts: np.ndarray,
    lost: set[int],
    fixed: np.ndarray,
    config: ExtractionOptions,
) -> None:
    """Log where splits miss their shares of what is drawn by more than whole patches explain.

    Patches that are ``fixed``, whose split is given, do not count.

    Raises:
        DatasetError: A split has lost all of its patches.
    """
    blocks, scenes = (config.split_by == kind for kind in ("block", "scene"))
    if lost:
        ways = ["lower --buffer"] * bool(config.buffer)
        remedy = " or ".join(ways + ["raise --block_size"] * blocks)
    elif blocks:
        remedy = "lower --block_size"
    elif scenes:
        remedy = "whole scenes go to one split"
    else:
        remedy = "all dates of a place go to one split"
    left = np.bincount(np.delete(parts, list(lost)), minlength=len(SPLITS))
    for split in np.unique(parts):
        if not left[split]:
            raise DatasetError(
                f"No {SPLITS[split]} patch is left ({len(lost)} of {len(parts)} share ground with "
                f"another split or lie too near to it); {remedy}"
            )
    rows = np.delete(np.arange(len(parts)), list(lost))
    left = np.bincount(parts[rows][~fixed[rows]], minlength=len(SPLITS))
    possible = split_counts(int(left.sum()), config.ratios)
    if np.abs(left - possible).max() > MISSED_SHARE * left.sum():
        found, asked = (", ".join(map(str, c)) for c in (left.tolist(), possible))
        log.warning("splits of %s patches, not of %s: %s", found, asked, remedy)


def _content(
    records: Sequence[dict], groups: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What the blocks, or scenes, of some patches hold.

    Returns:
        The number, 0, 1..., of the group of each patch; and (groups, 1 + classes) patches and
        pixels, as ``balance_blocks`` takes them.
    """
    numbers = np.unique(groups, return_inverse=True)[1]
    pixels = class_counts(records)
    content = np.zeros((numbers.max() + 1, 1 + pixels.shape[1]))
    np.add.at(content[:, 0], numbers, 1)
    np.add.at(content[:, 1:], numbers, pixels)
    return numbers, content


def _require_enough(split_by: str, found: int, needed: int, size: float) -> None:
    """Raise DatasetError where blocks, or scenes, are fewer than splits."""
    if found < needed and split_by == "scene":
        raise DatasetError(
            f"--split_by scene: {found} scenes are too few for {needed} splits; give more, or a "
            "ratio of 0 for a split that you do not need"
        )
    if found < needed:
        raise DatasetError(
            f"The cells lie in {found} blocks of {size:g} m, too few for the splits; give a smaller "
            "--block_size"
        )
