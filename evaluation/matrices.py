"""Scores over folds and blocks: means, intervals, differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from common.scores import HEADLINES


def fold_statistics(values: Sequence[float], least: float = 0.0) -> dict:
    """Mean, standard deviation (n - 1) and 95 % t-interval of one score over folds.

    The interval ends at what is possible, ``least`` to 1.
    """
    from scipy import stats

    mean, count = float(np.mean(values)), len(values)
    deviation = interval = None
    if count > 1:
        deviation = float(np.std(values, ddof=1))
        half = float(stats.t.ppf(0.975, count - 1)) * deviation / math.sqrt(count)
        interval = [max(least, mean - half), min(1.0, mean + half)]
    return {
        "mean": mean,
        "std": deviation,
        "interval_95": interval,
        "values": list(values),
    }


def known_values(results: Sequence[dict]) -> dict[str, list[float]]:
    """The values of each score over several results, without those that lack it."""
    return {
        key: [result[key] for result in results if result[key] is not None]
        for key in HEADLINES
    }


def fold_summary(results: Sequence[dict]) -> dict:
    """``fold_statistics`` of each score that at least one fold has."""
    known = known_values(results).items()
    return {
        key: fold_statistics(values, -1.0 if key == "kappa" else 0.0)
        for key, values in known
        if values
    }


def block_bootstrap(
    matrices: np.ndarray, measure: Callable, seed: int, repeats: int = 1000
) -> dict:
    """95 % percentile interval of each score of summed matrices, by resampling blocks.

    Blocks are drawn with replacement, as many as there are; pixels and patches are not, since
    neighbours are alike. A draw may lack a class that few blocks hold; its means are then over
    the others.

    Args:
        matrices: (G, ..., K, K) confusion matrices of G blocks; those without a labelled pixel are
            not drawn.
        measure: Gives the scores of a sum of them by name, such as ``scores`` does.
        seed: Of the draws; the same blocks are drawn for the same G and seed.
        repeats: Number of draws.

    Returns:
        [low, high] for each of ``HEADLINES``; None where there is but one block or no draw has the
        score.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    matrices = np.asarray(matrices, np.float64)
    matrices = matrices[matrices.any(axis=tuple(range(1, matrices.ndim)))]
    count = len(matrices)
    if count < 2:
        return dict.fromkeys(HEADLINES)
    rng = np.random.default_rng(seed)
    times = rng.multinomial(count, np.full(count, 1 / count), repeats)  # (repeats, G)
    results = [
        measure(total) for total in np.tensordot(times.astype(float), matrices, 1)
    ]
    return {
        key: np.percentile(values, [2.5, 97.5]).tolist() if values else None
        for key, values in known_values(results).items()
    }


def score_gap(first: dict, second: dict) -> dict:
    """By how much each score of the first is better; None where one of them is missing."""
    return {
        key: None if None in (first[key], second[key]) else first[key] - second[key]
        for key in HEADLINES
    }


def sum_by_block(matrices: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """Add up the confusion matrices (P, K, K) of patches whose blocks are 0..G-1: (G, K, K)."""
    sums = np.zeros((blocks.max() + 1, *matrices.shape[1:]), np.int64)
    np.add.at(sums, blocks, matrices)
    return sums


def paired_gap(
    first: np.ndarray, second: np.ndarray, measure: Callable, seed: int
) -> dict:
    """By how much the scores of one are better than those of another on the same ground.

    Args:
        first: (G, K, K) confusion matrices by block.
        second: Those of the other.
        measure: See ``block_bootstrap``.
        seed: Likewise.

    Returns:
        "scores" (of both), "value" and "interval_95" of each score; the same blocks are drawn for
        both.
    """
    whole = [measure(matrices.sum(axis=0)) for matrices in (first, second)]
    gaps = score_gap(*whole)
    pairs = np.stack([first, second], axis=1)
    intervals = block_bootstrap(
        pairs, lambda pair: score_gap(*map(measure, pair)), seed
    )
    return {
        key: {
            "scores": [one[key] for one in whole],
            "value": gaps[key],
            "interval_95": intervals[key],
        }
        for key in HEADLINES
    }
