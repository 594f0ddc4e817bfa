"""Logs and plots of a training, and what the evaluation of a test split collects."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from common.files import atomic_write
from common.patches import PatchPair
from common.pictures import save_figure
from evaluation.boundaries import BoundaryScores
from evaluation.calibration import Calibration
from evaluation.examples import Examples, patch_accuracy, worth_showing
from evaluation.figures import draw_bars, draw_matrix
from model_training import confusion_matrix, predict_classes


class TestCollector:
    """Collects calibration, examples and confusion matrices while test patches are evaluated."""

    def __init__(
        self,
        pairs: Sequence[PatchPair],
        counts: np.ndarray,
        temperature: float = 1.0,
    ):
        """``counts`` (patches, classes) are labelled pixels."""
        self.pairs, self.worth = pairs, worth_showing(counts)
        self.classes = counts.shape[1]
        self.temperature = temperature
        self.before, self.after = Calibration(), Calibration()
        self.examples = Examples()
        self.matrices = []  # (K, K) of each patch

    def __call__(self, logits: Tensor, masks: Tensor) -> None:
        self.before.add(logits, masks)
        self.after.add(logits, masks, self.temperature)
        for guess, mask in zip(predict_classes(logits), masks):
            number = len(self.matrices)
            matrix = confusion_matrix(guess, mask, self.classes)
            self.matrices.append(matrix.cpu().numpy())
            if self.worth[number]:
                guess, mask = guess.cpu().numpy(), mask.cpu().numpy()
                score = patch_accuracy(guess, mask, self.classes)
                self.examples.add(score, self.pairs[number], guess)

    def calibration(self) -> dict:
        """Temperature, errors of calibration and their bins, as plain numbers for JSON."""
        before, after = self.before.report(), self.after.report()
        return {
            "temperature": self.temperature,
            "ece_before": before["expected_calibration_error"],
            "ece_after": after["expected_calibration_error"],
            "before": before,
            "after": after,
        }


def watch_boundaries(boundaries: BoundaryScores) -> Callable[[Tensor, Tensor], None]:
    """What counts the boundaries of batches, from logits (N, K, H, W) and masks (N, H, W)."""

    def watch(logits: Tensor, masks: Tensor) -> None:
        guesses = predict_classes(logits).cpu().numpy()
        for guess, mask in zip(guesses, masks.cpu().numpy()):
            boundaries.add(guess, mask)

    return watch


def write_log(target: Path, rows: Sequence[dict]) -> None:
    """The epochs as CSV, a column per measure."""
    with atomic_write(target) as part, open(part, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def plot_training(target: Path, report: dict) -> None:
    """Draw a report: loss and score curves, bars per class, confusion matrix.

    Bars and matrix are those of the test split, else pooled over the folds, else of what a fold
    holds out, else of validation; a run that is not finished has only curves.
    """
    from matplotlib.figure import Figure

    sources = ("test", "pooled", "held_out", "validation")
    source = next((key for key in sources if key in report), None)
    runs = [r["history"] for r in report.get("folds", [])] or [report["history"]]
    rows = 2 if source else 1
    figure = Figure(figsize=(14, 5 * rows), layout="constrained")
    losses, curves, *below = figure.subplots(rows, 2).ravel()
    for number, history in enumerate(runs):
        epochs = [row["epoch"] for row in history]
        style = {"alpha": 1.0 if len(runs) == 1 else 0.6, "marker": "."}
        for axes, key, name, colour in (
            (losses, "train_loss", "training", "C0"),
            (losses, "val_loss", "validation", "C1"),
            (curves, "val_iou", "IoU", "C2"),
            (curves, "val_f1", "F1", "C3"),
            (curves, "val_kappa", "kappa", "C4"),
        ):
            if key in history[0]:
                values = [np.nan if row[key] is None else row[key] for row in history]
                label = None if number else name
                axes.plot(epochs, values, color=colour, label=label, **style)
    best = report.get("best_epoch", {}).get("combined")
    if best:
        curves.axvline(
            best, color="grey", linestyle=":", label=f"final model: epoch {best}"
        )
    losses.set(title="Loss", xlabel="epoch", ylabel="loss")
    title = "Validation scores" + (f", {len(runs)} folds" if len(runs) > 1 else "")
    curves.set(title=title, xlabel="epoch", ylim=(0, 1.02))
    for axes in (losses, curves):
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend(frameon=False)
    if source:
        bars, table = below
        draw_bars(bars, report[source], source)
        draw_matrix(figure, table, report[source], source)
    save_figure(figure, target)
