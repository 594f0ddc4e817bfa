"""K-fold cross-validation, then a final model on all of its patches."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.distributed import ProcessGroup
from common.patches import PatchPair, distance_between
from common.scores import scores_of_labelled
from evaluation.matrices import (
    block_bootstrap,
    fold_summary,
    paired_gap,
    sum_by_block,
)
from evaluation.reports import plot_training
from model_training import scores
from training.assessment import HeldOutCollector, calibrate, evaluate_test, export
from training.audit import audit_folds
from training.baseline import Network, Task, baseline_report, ground_blocks
from training.batch_size import settle_batch_size
from training.dataset import (
    colours_for,
    index_split,
    log_weak_spots,
    names_for,
    require_several_classes,
)
from training.epochs import fit
from training.folds import Fold, fewest_patches, plan_all_folds
from training.outputs import clear_former_run
from training.resume import drop_outdated
from training.run import TrainingRun, build
from training.samples import SampleIndex, make_cache
from training.scaling import require_start_units, require_units
from training.settings import TrainingConfig
from training.start import (
    Start,
    find_start,
    keep_copy,
    report_start,
    require_same_start,
)
from training.weights import initial_model

log = logging.getLogger("semanticseg4eo")


class FoldResults(NamedTuple):
    """Folds of one kind, and what their models made of the patches that they did not see."""

    folds: Sequence[Fold]
    matrices: np.ndarray  # (P, K, K) of each patch
    blocks: np.ndarray  # (P,) the block or value of each
    held_out: Sequence[HeldOutCollector]  # of each fold


def train_folds(
    config: TrainingConfig,
    pooled: SampleIndex,
    folds: Sequence[Fold],
    save_dir: Path,
    names,
    device,
    group: ProcessGroup,
) -> tuple[list[dict], np.ndarray, list[HeldOutCollector]]:
    """Train a model per fold and evaluate it, once, on the patches that the fold holds out.

    Returns:
        A report per fold, the confusion matrix of each patch (P, K, K) by the model that did not
        see it, and what else was collected of such patches per fold.
    """
    classes = config.label_classes
    matrices = np.zeros((len(pooled.pairs), classes, classes), np.int64)
    reports, collected = [], []
    for number, fold in enumerate(folds, start=1):
        log.info("fold %d of %d", number, len(folds))
        place = save_dir / f"fold_{number}"
        report, held_out = train_fold(config, pooled, fold, place, names, device, group)
        reports.append(report)
        matrices[fold.held_out] = group.broadcast(held_out.stacked)
        collected.append(held_out)
    return reports, matrices, collected


def train_fold(
    config: TrainingConfig,
    pooled: SampleIndex,
    fold: Fold,
    place: Path,
    names,
    device,
    group: ProcessGroup,
) -> tuple[dict, HeldOutCollector]:
    """Train the model of a fold, evaluate it on what the fold holds out: its report, and that."""
    train, validation = pooled.subset(fold.train), pooled.subset(fold.validation)
    run = TrainingRun(
        config, train, validation, place, names, config.epochs, device, group
    )
    build(run)
    fit(run)
    # one share of the pixels in all folds, since the temperature is fitted on all together
    held_out = HeldOutCollector(
        pooled.subset(fold.held_out),
        pooled.counts.sum(),
        config.seed,
        config.label_audit,
    )
    return group.broadcast(export, run, None, held_out), held_out


class Prepared(NamedTuple):
    """What a cross-validation begins with."""

    config: TrainingConfig  # with the batch size that was found
    pooled: SampleIndex  # all patches but those of the test
    test: SampleIndex | None
    names: list[str]
    plans: dict[str, list[Fold]]  # by kind
    blocks: np.ndarray  # (P,) block or value of each patch
    start: Start | None


def cross_validate(
    config: TrainingConfig, device, group: ProcessGroup
) -> tuple[TrainingConfig, dict]:
    """K-fold cross-validation over train/ and validation/, then a final model on all of it.

    Each fold chooses its best epoch by validation patches of its own and is evaluated, once, on
    what it holds out. With ``--fold_by both`` the folds at random come first, for comparison. The
    final model is trained for the median of the epochs that the (other) folds found best, by the
    schedule that these had; test/, where there is one, evaluates that model alone.

    Returns:
        The settings with the batch size that was found, and the report.
    """
    prepared = prepare_folds(config, device, group)
    config, pooled, test, names, plans, blocks, _ = prepared
    if config.only_fold is not None:
        return config, train_only_fold(prepared, device, group)

    def measure(matrix: np.ndarray) -> dict:
        return scores(matrix, names, config.mode == "binary")

    save_dir, both = Path(config.save_dir), len(plans) == 2
    results, per_block = {}, {}
    for kind, folds in plans.items():
        place = save_dir / kind if both else save_dir
        # what was collected of the last kind stays
        reports, matrices, collected = train_folds(
            config, pooled, folds, place, names, device, group
        )
        per_block[kind] = sums = sum_by_block(matrices, blocks)
        results[kind] = {
            "folds": reports,
            "summary": fold_summary([r["held_out"] for r in reports]),
            "pooled": measure(matrices.sum(axis=0)),
            "pooled_distance_m": distance_between([_pairs(pooled, f) for f in folds]),
            "intervals": block_bootstrap(sums, measure, config.seed),
        }
    final = train_final(config, pooled, names, reports, device, group)
    report = {
        "class_names": names,
        **results[kind],
        "blocks": None if kind == "random" else len(sums),
        "final_epochs": final.epochs,
        "history": final.history.rows,
    }
    if both:
        report["random"] = results["random"]
        report["optimism"] = paired_gap(
            per_block["random"],
            per_block["block"],
            partial(scores_of_labelled, names=names, binary=config.mode == "binary"),
            config.seed,
        )
    found = FoldResults(folds, matrices, blocks, collected)
    return config, group.broadcast(export_folds, final, report, found, test)


def prepare_folds(config: TrainingConfig, device, group: ProcessGroup) -> Prepared:
    """Read and check all that a cross-validation needs, and clear the place of a former one."""
    cache = make_cache(config)
    pooled = index_split(config, "train", None, cache)
    more = index_split(config, "validation", pooled, cache, required=False)
    pooled = pooled + more if more else pooled
    test = index_split(config, "test", pooled, required=False)
    require_several_classes(pooled)
    pooled = pooled.beside(test)
    names = names_for(config, pooled)
    plans, blocks = plan_all_folds(config, pooled)

    # what cannot be built is an error before the former run is gone
    colours_for(config, pooled)
    start = find_start(config, pooled)
    require_same_start(config, start)
    initial_model(config, pooled, config.resume, start)
    require_units(config, pooled)
    require_start_units(config, pooled, start)
    fewest = fewest_patches(plans)
    config = settle_batch_size(config, pooled, fewest, device, group)
    group.broadcast(clear_former_run, config)
    group.broadcast(keep_copy, config)
    if group.is_main_process:
        report_start(start, names, config.mode == "binary")
        log_weak_spots(config, pooled, None, test, group)
    return Prepared(config, pooled, test, names, plans, blocks, start)


def train_only_fold(prepared: Prepared, device, group: ProcessGroup) -> dict:
    """Train the fold of ``--only_fold``; its report."""
    config, pooled, _, names, plans, _, start = prepared
    (folds,) = plans.values()
    fold, place = folds[config.only_fold - 1], Path(config.run_dir)
    log.info("fold %d of %d alone", config.only_fold, len(folds))
    report, _ = train_fold(config, pooled, fold, place, names, device, group)
    return report | ({"started_from": start.record} if start else {})


def train_final(
    config: TrainingConfig,
    pooled: SampleIndex,
    names: list[str],
    folds: Sequence[dict],
    device,
    group: ProcessGroup,
) -> TrainingRun:
    """Train on all patches, for as many epochs as the folds, by their reports, found best."""
    epochs = round(float(np.median([r["best_epoch"]["combined"] for r in folds])))
    log.info("final model: all %d patches, %d epochs", len(pooled.pairs), epochs)
    place = Path(config.save_dir)
    final = TrainingRun(config, pooled, None, place, names, epochs, device, group)
    if config.scheduler == "plateau":  # which no validation loss can step here
        final.rates = median_rates([r["history"] for r in folds], epochs)
    group.broadcast(drop_outdated, final)
    build(final)
    fit(final)
    return final


def _pairs(pooled: SampleIndex, fold: Fold) -> tuple[list[PatchPair], list[PatchPair]]:
    """The patches that a fold holds out, and those that it trains on."""
    held_out, train = (
        [pooled.pairs[n] for n in some] for some in (fold.held_out, fold.train)
    )
    return held_out, train


def median_rates(histories: Sequence[list[dict]], epochs: int) -> list[float]:
    """The learning rate of each epoch: the median over the folds that came so far."""
    columns = [
        [h[e]["learning_rate"] for h in histories if len(h) > e] for e in range(epochs)
    ]
    return [float(np.median(column)) for column in columns]


def export_folds(
    final: TrainingRun,
    report: dict,
    found: FoldResults,
    test: SampleIndex | None,
) -> dict:
    """Calibrate the final model of k-fold, evaluate it, write it and the plot; its report.

    The forest beside it is the last.
    """
    for criterion in ("loss", "iou"):  # what the checkpoint stores of its validation
        best = [fold["best"][criterion] for fold in report["folds"]]
        final.history.best[criterion] = float(np.mean(best))
    calibrate(final, [held_out.sample for held_out in found.held_out])
    tests, tested = evaluate_test(final, test)
    report = report | tests
    kept = {key: report[key] for key in ("summary", "pooled", "test") if key in report}
    final.save("final_model", kept)
    doubts = [held_out.doubts for held_out in found.held_out]
    audit_folds(final, found.folds, doubts, test)
    plot_training(final.save_dir / "model_training_plot.png", report)
    return report | fold_baseline(final, report, found, test, tested)


def fold_baseline(
    final: TrainingRun,
    report: dict,
    found: FoldResults,
    test: SampleIndex | None,
    tested: np.ndarray | None,
) -> dict:
    """``baseline_report`` of k-fold: a forest per fold, and one on all patches for the test.

    Where folds are drawn at random, whose blocks are single places, those of the ground count.
    """
    pooled, config = final.train, final.config
    at_random = config.fold_by == "random" and config.fold_values is None
    blocks = ground_blocks(pooled.pairs) if at_random else found.blocks
    tasks = [
        Task(pooled.subset(fold.train), {"pooled": pooled.subset(fold.held_out)})
        for fold in found.folds
    ]
    order = np.concatenate([fold.held_out for fold in found.folds])
    networks = {"pooled": Network(found.matrices[order], blocks[order])}
    if test:
        tasks.append(Task(pooled, {"test": test}))
        networks["test"] = Network(tested, ground_blocks(test.pairs))
    histories = [fold["history"] for fold in report["folds"]] + [report["history"]]
    return baseline_report(config, final.names, tasks, networks, histories)
