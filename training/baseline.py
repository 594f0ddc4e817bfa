"""A random forest beside the network: the same training patches, the same patches to be scored on."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from common.errors import DatasetError
from common.ground import spatial_block_ids
from common.machine import available_cores
from common.patches import PatchPair, patch_footprints
from common.scores import scores_of_labelled
from common.vectors import has_vector_library
from evaluation.forest import count_patches, draw_pixels, fit_forest
from evaluation.matrices import paired_gap, sum_by_block
from model_training import scores
from training.folds import default_block_size, same_places, whole_places
from training.samples import PatchDataset, SampleIndex
from training.settings import TrainingConfig

log = logging.getLogger("semanticseg4eo")

LEAST_SECONDS = 60  # of a training that gets a forest beside it
SHARE = 0.1  # of the training's time that the forests may take


class ForestSize(NamedTuple):
    """How large a forest is."""

    trees: int
    pixels: int  # that it learns from, at most


# the first that fits into the time is taken; far apart, so that equal runs take the same
SIZES = (
    ForestSize(100, 200_000),
    ForestSize(100, 50_000),
    ForestSize(50, 20_000),
    ForestSize(20, 10_000),
)
# nanoseconds of one core, measured once on an Intel server of 2023 and rounded up:
GROWING = 50.0  # per tree, and n log2(n) sqrt(features) of n pixels
PASSING = 20.0  # per tree, pixel that is predicted, and log2(n)
FILTERING = 60.0  # per band and pixel of a patch that is read


class Task(NamedTuple):
    """What one forest learns from, and what it is scored on, by the name of the scores."""

    train: SampleIndex
    scored: Mapping[str, SampleIndex]


@dataclass(frozen=True)
class Network:
    """What the network made of patches, in the order in which the forests are scored on them."""

    matrices: np.ndarray  # (P, K, K)
    blocks: np.ndarray  # (P,) the block of each, 0, 1...


def ground_blocks(pairs: Sequence[PatchPair], least: int = 0) -> np.ndarray:
    """The block of the ground, 0, 1..., that each patch lies in; without a place it is one itself.

    Where there are fewer than ``least``, each place is one.
    """
    if not has_vector_library("each patch counts as a block of ground"):
        return np.arange(len(pairs))
    try:
        footprints = patch_footprints(pairs)
    except DatasetError:  # which --fold_by block would report
        return np.arange(len(pairs))
    blocks = spatial_block_ids(footprints, default_block_size(footprints))
    places = same_places(footprints)
    blocks = whole_places(blocks, places)
    return places if blocks.max() + 1 < least else blocks


def estimated_seconds(size: ForestSize, tasks: Iterable[Task], cores: int) -> float:
    """How long forests of a size take, by a rule and no clock: a resumed run decides alike."""
    total = 0.0
    for train, scored in tasks:
        bands, *side = train.shape
        indices = train, *scored.values()
        patches = sum(len(index.pairs) for index in indices)
        pixels = max(2, min(size.pixels, int(train.counts.sum())))
        depth = math.log2(pixels)
        predicted = sum(int(index.counts.sum()) for index in scored.values())
        growing = GROWING * pixels * depth * math.sqrt(2 * bands)
        total += size.trees * (growing + PASSING * depth * predicted)
        total += FILTERING * bands * math.prod(side) * patches
    return total * 1e-9 / cores


def choose_size(tasks: Sequence[Task], seconds: float, cores: int) -> ForestSize | None:
    """The largest forests that fit into a tenth of the training's time; None if none does."""
    for size in SIZES:
        if estimated_seconds(size, tasks, cores) <= SHARE * seconds:
            return size
    return None


def reader(config: TrainingConfig, index: SampleIndex) -> Callable:
    """What gives image, valid pixels and labels of a patch by its number."""
    patches = PatchDataset(index, config.ignore_index)
    return lambda number: patches[int(number)][0]


def baseline_report(
    config: TrainingConfig,
    names: Sequence[str],
    tasks: Sequence[Task],
    networks: Mapping[str, Network],
    histories: Iterable[Sequence[dict]],
) -> dict:
    """Train forests and compare them with the network.

    Args:
        config: Of the run.
        names: Of the classes.
        tasks: A forest each.
        networks: Of the network, by the names of the tasks' scores.
        histories: The epochs of all models that were trained.

    Returns:
        The key ``baseline`` of a report; nothing where the forest is left out, which a line says.
    """
    if config.no_baseline:
        return {}
    seconds = sum(row["seconds"] for rows in histories for row in rows)
    if seconds < LEAST_SECONDS and not config.learning_curve:
        log.info(
            "no random forest beside the network: training took less than a minute"
        )
        return {}
    cores = available_cores()
    size = choose_size(tasks, seconds, cores)
    if size is None and config.learning_curve:
        size = SIZES[-1]
    if size is None:
        text = "no random forest beside the network: a small one would take more than a tenth of the training's time"
        log.info(text)
        return {}
    return {"baseline": compare(config, names, tasks, networks, size, cores)}


def compare(
    config: TrainingConfig,
    names: Sequence[str],
    tasks: Sequence[Task],
    networks: Mapping[str, Network],
    size: ForestSize,
    cores: int,
) -> dict:
    """Forests of a size, their scores and how much better the network is; see ``baseline_report``."""
    started, drawn, found = time.perf_counter(), [], {key: [] for key in networks}
    for train, scored in tasks:
        pixels = draw_pixels(
            reader(config, train), train.counts, size.pixels, config.seed
        )
        drawn.append(len(pixels.labels))
        forest = fit_forest(pixels, size.trees, config.seed, cores)
        for key, index in scored.items():
            shape = len(index.pairs), config.label_classes
            read = reader(config, index)
            found[key].append(count_patches(forest, read, *shape, cores))
    seconds = time.perf_counter() - started
    report = {
        "kind": "random forest",
        "trees": size.trees,
        "pixels": max(drawn),
        "seconds": seconds,
    }
    log.info(
        "random forest: %d trees on %d pixels, %.1f s", size.trees, max(drawn), seconds
    )

    binary = config.mode == "binary"
    measure = partial(scores_of_labelled, names=names, binary=binary)
    report["difference"] = {}
    for key, network in networks.items():
        matrices = np.concatenate(found[key])
        report[key] = scores(matrices.sum(axis=0), names, binary)
        sums = [sum_by_block(m, network.blocks) for m in (network.matrices, matrices)]
        report["difference"][key] = {
            "blocks": int(sums[0].any(axis=(1, 2)).sum()),
            **paired_gap(*sums, measure, config.seed),
        }
    return report
