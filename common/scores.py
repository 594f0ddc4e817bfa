"""Accuracy measures of a confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# the scores that are reported for every epoch and, over folds, with an interval
HEADLINES = ("iou", "f1", "mean_iou", "mean_f1", "overall_accuracy", "kappa")


def scores(
    matrix: np.ndarray,
    names: Sequence[str],
    binary: bool,
    of: np.ndarray | None = None,
) -> dict:
    """Accuracy measures of a confusion matrix, as plain numbers for JSON.

    Recall is the producer's accuracy, precision the user's. A class that is absent from both
    truth and prediction has no score (None), and means are over the others; one that is present
    only in the prediction scores 0. ``iou`` and ``f1`` are what models are chosen by: those of
    the foreground when ``binary``, else the means.

    Args:
        matrix: (K, K) counts, rows are truth.
        names: K class names.
        binary: The second class is the foreground.
        of: (K,) bool, the classes that have scores; by default all that are present.
    """
    matrix = np.asarray(matrix, np.float64)
    hits, truth, predicted = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    total = matrix.sum()

    def ratio(part, whole):
        return np.divide(part, whole, out=np.full(len(hits), np.nan), where=whole > 0)

    present = truth + predicted > 0 if of is None else of
    measures = {
        "iou": ratio(hits, truth + predicted - hits),
        "f1": ratio(2 * hits, truth + predicted),
        "precision": np.nan_to_num(ratio(hits, predicted)),
        "recall": np.nan_to_num(ratio(hits, truth)),
    }
    measures = {key: np.where(present, v, np.nan) for key, v in measures.items()}

    def plain(value: float) -> float | None:
        return None if np.isnan(value) else float(value)

    means = {
        f"mean_{key}": plain(values[present].mean() if present.any() else np.nan)
        for key, values in measures.items()
    }
    accuracy = hits.sum() / total if total else np.nan
    chance = (truth * predicted).sum() / total**2 if total else np.nan
    kappa = (accuracy - chance) / (1 - chance) if total and chance < 1 else np.nan
    return {
        "iou": plain(measures["iou"][1]) if binary else means["mean_iou"],
        "f1": plain(measures["f1"][1]) if binary else means["mean_f1"],
        **means,
        "overall_accuracy": plain(accuracy),
        "kappa": plain(kappa),
        "per_class": [
            {"name": name, "pixels": int(truth[i])}
            | {key: plain(values[i]) for key, values in measures.items()}
            for i, name in enumerate(names)
        ],
        "confusion_matrix": matrix.astype(int).tolist(),
    }


def scores_of_labelled(matrix: np.ndarray, names: Sequence[str], binary: bool) -> dict:
    """``scores`` of the classes that the labels hold, to compare models on the same labels.

    A class that one of the models maps and the labels do not hold lowers no mean, which a single pixel
    of it would do otherwise.
    """
    return scores(matrix, names, binary, of=np.asarray(matrix).sum(axis=1) > 0)
