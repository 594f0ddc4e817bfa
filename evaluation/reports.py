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
from evaluation.figures import draw_bars, draw_matrix, score_size
from model_training import confusion_matrix, predict_classes


class PatchMatrices:
    """Collects the confusion matrix (K, K) of each patch while patches are evaluated."""

    def __init__(self, classes: int):
        self.classes = classes
        self.matrices: list[np.ndarray] = []

    def __call__(self, logits: Tensor, masks: Tensor) -> None:
        for guess, mask in zip(predict_classes(logits), masks):
            matrix = confusion_matrix(guess, mask, self.classes)
            self.matrices.append(matrix.cpu().numpy())

    def stacked(self) -> np.ndarray:
        """Those of all patches, (P, K, K)."""
        return np.stack(self.matrices)


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


def _draw_runs(
    axes, runs: Sequence[list[dict]], *measures: tuple[str, str, str]
) -> None:
    """Draw measures over epochs: a colour per fold and a line style per measure.

    Args:
        axes: Where.
        runs: The history of each fold, or the only one, whose measures have the colours.
        measures: The key in a row of a history, the name, and the line style of each.
    """
    from matplotlib import colormaps

    many = len(runs) > 1
    wide = colormaps["tab10"].colors
    if len(runs) > len(wide):
        wide = colormaps["turbo"](np.linspace(0.05, 0.95, len(runs)))
    for number, history in enumerate(runs):
        for place, (key, name, line) in enumerate(measures):
            if key not in history[0]:
                continue
            values = [np.nan if row[key] is None else row[key] for row in history]
            epochs = [row["epoch"] for row in history]
            style = {"marker": ".", "color": wide[number if many else place]}
            if many:
                style |= {"linestyle": line, "markersize": 3}
            axes.plot(epochs, values, label=None if many else name, **style)
    if many and axes.has_data():
        for number in range(len(runs)):
            axes.plot([], [], color=wide[number], label=f"fold {number + 1}")
        for _, name, line in measures:
            axes.plot([], [], color="grey", linestyle=line, label=name)


def plot_training(target: Path, report: dict) -> None:
    """Draw a report: loss and score curves, bars per class, confusion matrix.

    Bars and matrix are those of the test split, else pooled over the folds, else of what a fold
    holds out, else of validation; a run that is not finished has only curves.
    """
    from matplotlib.figure import Figure

    sources = ("test", "pooled", "held_out", "validation")
    source = next((key for key in sources if key in report), None)
    runs = [r["history"] for r in report.get("folds", [])] or [report["history"]]
    width, *heights = 7.0, 5.0
    if source:
        width, height = score_size(report[source])
        heights.append(height)
    figure = Figure(figsize=(2 * width, sum(heights)), layout="constrained")
    places = figure.subplots(len(heights), 2, height_ratios=heights)
    losses, curves, *below = places.ravel()
    _draw_runs(
        losses, runs, ("train_loss", "training", "--"), ("val_loss", "validation", "-")
    )
    scores = (
        ("val_iou", "IoU", "-"),
        ("val_f1", "F1", "--"),
        ("val_kappa", "kappa", ":"),
    )
    _draw_runs(curves, runs, *scores)
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
            columns = 1 if len(runs) == 1 else 2
            axes.legend(frameon=False, fontsize=9, ncols=columns)
    if source:
        bars, table = below
        draw_bars(bars, report[source], source)
        draw_matrix(figure, table, report[source], source)
    save_figure(figure, target)
