"""``--learning_curve``: what fewer training patches would have given."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np

from common.distributed import ProcessGroup
from common.errors import DatasetError
from common.machine import available_cores
from common.scores import HEADLINES, scores_of_labelled
from evaluation.figures import draw_learning_curve
from evaluation.matrices import paired_gap, sum_by_block
from evaluation.reports import PatchMatrices
from model_training import load_checkpoint
from training.assessment import evaluate_split
from training.baseline import (
    SIZES,
    Network,
    Task,
    choose_size,
    compare,
    ground_blocks,
)
from training.epochs import fit
from training.folds import inner_split
from training.loaders import EpochBatchSampler
from training.run import TrainingRun, build
from training.samples import SampleIndex
from training.settings import TrainingConfig

log = logging.getLogger("semanticseg4eo")

FEWEST_GROUPS = (
    8  # that are halved twice: where blocks are fewer, single places are drawn
)


def plan_curve(
    config: TrainingConfig, train: SampleIndex, group: ProcessGroup
) -> dict[int, np.ndarray]:
    """The patches of 25 and 50 % of the training split, by percent: whole groups, the fewer of the more.

    Raises:
        DatasetError: The patches cannot be halved twice, or a part is too small for the batches.
    """
    groups = ground_blocks(train.pairs, FEWEST_GROUPS)
    chosen, plan = np.arange(len(train.pairs)), {}
    for share in (50, 25):
        try:
            chosen, _ = inner_split(chosen, groups, train.counts, config.seed, 0.5)
        except DatasetError:
            chosen = chosen[:0]
        if np.count_nonzero(train.counts[chosen].sum(axis=0)) < 2:
            raise DatasetError(
                f"--learning_curve: {share} % of the {len(train.pairs)} training patches would "
                "hold fewer than two classes; leave it out, or label more patches"
            )
        plan[share] = np.sort(chosen)
        require_batches(config, share, len(chosen), len(train.pairs), group)
    return dict(sorted(plan.items()))


def require_batches(
    config: TrainingConfig, share: int, part: int, whole: int, group: ProcessGroup
) -> None:
    """Raise DatasetError where a part gives a process a single patch to normalize over, the whole not."""
    if config.batch_size == "auto":
        return  # asked again with the size that is found

    def smallest(count: int) -> int:
        sampler = EpochBatchSampler(count, config.batch_size, config.seed, group)
        last = sampler.used % sampler.joint or min(sampler.used, sampler.joint)
        return last // group.size

    if smallest(part) < min(2, smallest(whole)):
        processes = f"{group.size} process{'es' * (group.size > 1)}"
        raise DatasetError(
            f"--learning_curve: {share} % of the {whole} training patches are {part}, too few for "
            f"batches of --batch_size {config.batch_size} in {processes}; leave it out, "
            "or label more patches"
        )


def part_run(run: TrainingRun, share: int, chosen: np.ndarray) -> TrainingRun:
    """A run like another on some of its patches, with as many steps of the weights in all."""

    def steps(patches: int) -> int:
        given = patches, run.config.batch_size, run.config.seed, run.group
        return math.ceil(len(EpochBatchSampler(*given)) / run.config.accumulate)

    # not the ratio of patches: the last batch of an epoch may be small, or left out
    times = steps(len(run.train.pairs)) / steps(len(chosen))
    numbers = "epochs", "patience", "warmup_epochs", "freeze_encoder_epochs"
    longer = {key: math.ceil(times * getattr(run.config, key)) for key in numbers}
    config = replace(run.config, **longer)
    return TrainingRun(
        config, run.train.subset(chosen), run.validation, run.save_dir / f"curve_{share}",
        run.names, config.epochs, run.device, run.group, times=times,
    )  # fmt: skip


def learning_curve(
    run: TrainingRun, test: SampleIndex | None, plan: Mapping[int, np.ndarray]
) -> dict:
    """Train on parts of the patches, compare with a finished run on all; the picture is written.

    Returns:
        The key ``learning_curve`` of a report: "scored_on", "points" and "gain".
    """
    runs = {}
    for share, chosen in plan.items():
        log.info("learning curve: %d %% of the training patches", share)
        runs[share] = part_run(run, share, chosen)
        build(runs[share])
        fit(runs[share])
    return run.group.broadcast(measure_curve, runs | {100: run}, test)


def measure_curve(runs: Mapping[int, TrainingRun], test: SampleIndex | None) -> dict:
    """See ``learning_curve``; ``runs`` are by percent."""
    run = runs[100]
    key, index = ("test", test) if test else ("validation", run.validation)
    blocks, cores = ground_blocks(index.pairs), available_cores()
    tasks = [Task(part.train, {key: index}) for part in runs.values()]
    seconds = sum(row["seconds"] for one in runs.values() for row in one.history.rows)
    size = choose_size(tasks, seconds, cores) or SIZES[-1]

    binary = run.config.mode == "binary"
    measure = partial(scores_of_labelled, names=run.names, binary=binary)
    points, sums = [], {}
    for (share, part), task in zip(runs.items(), tasks):
        best = load_checkpoint(part.save_dir / "model_best_combined.pth", part.device)
        part.model.load_state_dict(best.model.state_dict())
        seen = PatchMatrices(part.config.label_classes)
        evaluate_split(part, index, seen)
        sums[share] = sum_by_block(seen.stacked(), blocks)
        found = measure(sums[share].sum(axis=0))
        point = {"percent": share, "patches": len(part.train.pairs)}
        point["network"] = {name: found[name] for name in HEADLINES}
        if not run.config.no_baseline:
            network = {key: Network(seen.stacked(), blocks)}
            forest = compare(part.config, run.names, [task], network, size, cores)
            gaps = forest["difference"][key]
            point["forest"] = {name: gaps[name]["scores"][1] for name in HEADLINES}
        points.append(point)
    gain = paired_gap(sums[100], sums[50], measure, run.config.seed)
    gain["blocks"] = int(sums[100].any(axis=(1, 2)).sum())
    curve = {"scored_on": key, "points": points, "gain": gain}
    draw_learning_curve(run.save_dir / "model_learning_curve.png", curve)
    return curve
