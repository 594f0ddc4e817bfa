"""The evaluation of a trained model: validation, calibration, test, areas; the final model's file."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from common.distributed import ProcessGroup
from common.files import write_json
from common.ground import pixel_areas
from common.patches import PatchPair, distance_between, read_patch
from common.rasters import open_raster
from evaluation.areas import estimate_areas
from evaluation.boundaries import BoundaryScores
from evaluation.calibration import LogitSample, fit_temperature
from evaluation.doubt import DoubtCollector
from evaluation.examples import draw_examples
from evaluation.figures import draw_calibration
from evaluation.reports import (
    PatchMatrices,
    TestCollector,
    plot_training,
    watch_boundaries,
)
from evaluation.settings import BOUNDARY_TOLERANCE
from model_training import (
    load_checkpoint,
    normalize,
    predict_classes,
    scores,
)
from training.audit import audit_split
from training.baseline import Network, Task, baseline_report, ground_blocks
from training.loop import evaluate
from training.run import TrainingRun
from training.samples import SampleIndex

log = logging.getLogger("semanticseg4eo")


def export(
    run: TrainingRun, test: SampleIndex | None, held_out: HeldOutCollector | None = None
) -> dict:
    """Take the best weights, evaluate them, write the final model and the plot.

    Args:
        run: A run that was fitted.
        test: Patches for the full evaluation.
        held_out: Those of a fold, which get scores alone.

    Returns:
        The report of the run: history, best epochs and the scores of the final model.
    """
    best = load_checkpoint(run.save_dir / "model_best_combined.pth", run.device)
    run.model.load_state_dict(best.model.state_dict())
    report = {
        "best_epoch": dict(run.history.best_epoch),
        "best": dict(run.history.best),
    }
    sample = LogitSample(run.validation.counts.sum(), seed=run.config.seed)
    validated = PatchMatrices(run.config.label_classes)
    report["validation"] = evaluate_split(run, run.validation, sample.add, validated)
    calibrate(run, [sample])
    if held_out:
        held_out.doubts.temperature = run.temperature or 1.0
        report["held_out"] = evaluate_split(run, held_out.index, held_out)
        report["held_out_names"] = [pair.name for pair in held_out.index.pairs]
    tests, tested = evaluate_test(run, test)
    report |= tests
    kinds = ("validation", "held_out", "test")
    run.save("final_model", {key: report[key] for key in kinds if key in report})
    if not held_out:
        audit_split(run, test)
    report["history"] = run.history.rows
    report["class_names"] = run.names
    if held_out:  # the report of a whole run gets more keys first
        path = run.save_dir / "model_metrics.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        # what ``--only_fold`` has noted stays until all folds are gathered
        noted = "val_strategy", "settings", "command", "started_from"
        kept = {key: known[key] for key in noted if key in known}
        write_json(path, report | kept)
    plot_training(run.save_dir / "model_training_plot.png", report)
    if held_out:  # the forest comes with all folds
        return report
    splits = {"validation": (run.validation, validated.stacked())}
    if test:
        splits["test"] = test, tested
    return report | split_baseline(run, splits)


def split_baseline(run: TrainingRun, splits: Mapping[str, tuple]) -> dict:
    """``baseline_report`` of a fixed split: patches, and matrices of the network, by split."""
    task = Task(run.train, {split: index for split, (index, _) in splits.items()})
    networks = {
        split: Network(matrices, ground_blocks(index.pairs))
        for split, (index, matrices) in splits.items()
    }
    history = [run.history.rows]
    return baseline_report(run.config, run.names, [task], networks, history)


def evaluate_split(run: TrainingRun, index: SampleIndex, *watches: Callable) -> dict:
    """Loss, scores and boundary scores of a run's model on some patches.

    In float32, by this process alone. ``watches`` are like the ``watch`` of ``evaluate``.
    """
    boundaries = BoundaryScores(
        run.model_config.label_classes, 2 * (BOUNDARY_TOLERANCE,)
    )
    watches = (watch_boundaries(boundaries), *watches)

    def watch_all(logits: Tensor, masks: Tensor) -> None:
        for one in watches:
            one(logits, masks)

    loss, matrix = evaluate(
        run.model,
        run.loader(index, group=ProcessGroup()),
        run.loss,
        run.device,
        run.model_config.label_classes,
        watch_all,
    )
    loss = loss if matrix.any() else None  # of no labelled pixel
    return {
        "loss": loss,
        **scores(matrix, run.names, run.config.mode == "binary"),
        "boundary": boundaries.report(run.names, index.pixel_size),
    }


def calibrate(run: TrainingRun, samples: Sequence[LogitSample]) -> None:
    """Fit a run's temperature on pixels that its model, or those of its folds, did not train on."""
    if run.config.no_calibration:
        return
    logits, target = map(np.concatenate, zip(*(sample.pixels() for sample in samples)))
    run.temperature = fit_temperature(logits, target)
    log.info(
        "temperature %.3f, from %d validation pixels", run.temperature, len(target)
    )


def evaluate_test(
    run: TrainingRun, test: SampleIndex | None
) -> tuple[dict, np.ndarray | None]:
    """Evaluate a run's model on test/: scores, calibration, areas if asked for, two pictures.

    Returns:
        The keys ``test``, ``test_distance_m``, ``calibration`` and ``areas`` of a report, and the
        confusion matrix of each patch, (P, K, K); nothing without patches.
    """
    if not test:
        return {}, None
    collector = TestCollector(test.pairs, test.counts, run.temperature or 1.0)
    report = {
        "test": evaluate_split(run, test, collector),
        "test_distance_m": distance_between([(test.pairs, run.train.pairs)]),
        "calibration": collector.calibration(),
    }
    if run.config.area_estimation:
        splits = [split for split in (run.train, run.validation, test) if split]
        ground, in_metres = map_patches(run, [p for s in splits for p in s.pairs])
        area = 1.0 if in_metres else None
        areas = estimate_areas(np.stack(collector.matrices), ground, area)
        for entry in areas["per_class"]:
            entry["name"] = run.names[entry["class"]]
        report["areas"] = areas
    draw_calibration(run.save_dir / "model_reliability.png", report["calibration"])
    pictures = run.save_dir / "model_test_examples.png"
    draw_examples(
        pictures, collector.examples, run.names, run.colours, run.config.ignore_index
    )
    return report, np.stack(collector.matrices)


def map_patches(
    run: TrainingRun, pairs: Sequence[PatchPair]
) -> tuple[np.ndarray, bool]:
    """How much ground each class has in a run's map of patches, labelled or not.

    Returns:
        (K,) square metres and True; pixels and False where a patch has no usable CRS.
    """
    classes = run.model_config.label_classes
    pixels, sizes = [], []
    run.model.eval()
    for pair in pairs:
        image, valid, _ = read_patch(pair, run.config.ignore_index)
        image = normalize(image, valid, run.normalization)[None].to(run.device)
        with torch.inference_mode():
            guess = predict_classes(run.model(image))[0].cpu().numpy()
        pixels.append(np.bincount(guess[valid], minlength=classes))
        with open_raster(pair.image) as file:
            areas = pixel_areas(file)
        sizes.append(None if areas is None else areas.mean())
    if None in sizes:
        return np.sum(pixels, axis=0), False
    return np.array(sizes) @ np.array(pixels), True


class HeldOutCollector:
    """Collects logits, confusion matrices and doubts while a fold's held-out patches are evaluated.

    Args:
        index: The patches that the fold holds out.
        labelled: Labelled pixels of all folds, of which the logits are a sample.
        seed: Of the sample.
        areas: Whether to collect the areas that contradict their label.
    """

    def __init__(self, index: SampleIndex, labelled: int, seed: int, areas=False):
        self.index, self.sample = index, LogitSample(labelled, seed=seed)
        self.doubts = DoubtCollector(index.pairs, index.counts.shape[1], areas=areas)

    def stacked(self) -> np.ndarray:
        """The confusion matrix of each patch, (P, K, K)."""
        return np.stack([record.matrix for record in self.doubts.records])

    def __call__(self, logits: Tensor, masks: Tensor) -> None:
        self.sample.add(logits, masks)
        self.doubts(logits, masks)
