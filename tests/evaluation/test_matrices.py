"""Scores over folds and blocks: means, intervals, differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.scores import HEADLINES
from evaluation.matrices import (
    block_bootstrap,
    fold_statistics,
    fold_summary,
    score_gap,
)
from model_training import (
    scores,
)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


# --- training -------------------------------------------------------------------------------


def test_fold_summary_gives_mean_deviation_and_t_interval():
    from scipy import stats

    values = [0.5, 0.7, 0.9, 0.6]
    keys = ("iou", "f1", "mean_iou", "mean_f1", "overall_accuracy", "kappa")
    summary = fold_summary([dict.fromkeys(keys, value) for value in values])
    assert set(summary) == set(keys)
    found = summary["kappa"]
    assert found["values"] == values
    assert found["mean"] == pytest.approx(np.mean(values))
    assert found["std"] == pytest.approx(np.std(values, ddof=1))
    expected = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert found["interval_95"] == pytest.approx(expected)


def test_folds_without_a_score_are_left_out_of_the_summary():
    keys = ("iou", "f1", "mean_iou", "mean_f1", "overall_accuracy", "kappa")
    summary = fold_summary(
        [dict.fromkeys(keys, 0.5), dict.fromkeys(keys, None) | {"f1": 0.7}]
    )
    assert summary["iou"]["values"] == [0.5]
    assert summary["iou"]["std"] is None and summary["iou"]["interval_95"] is None
    assert summary["f1"]["values"] == [0.5, 0.7]


# --- helpers --------------------------------------------------------------------------------


def measure(matrix: np.ndarray) -> dict:
    return scores(matrix, ["a", "b", "c"], binary=False)


def random_matrices(count: int = 12, classes: int = 3, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 50, (count, classes, classes))


# --- statistics -----------------------------------------------------------------------------


def test_statistics_over_folds_agree_with_scipy():
    from scipy import stats

    values = [0.5, 0.7, 0.65, 0.8]
    found = fold_statistics(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert found["mean"] == pytest.approx(np.mean(values))
    assert found["std"] == pytest.approx(np.std(values, ddof=1))
    assert found["interval_95"] == pytest.approx([expected.low, expected.high])
    one = fold_statistics([0.5])
    assert (one["mean"], one["std"], one["interval_95"]) == (0.5, None, None)


def test_bootstrap_agrees_with_a_plain_loop():
    matrices, repeats = random_matrices(), 200
    found = block_bootstrap(matrices, measure, 3, repeats)
    rng = np.random.default_rng(3)
    results = []
    for times in rng.multinomial(12, np.full(12, 1 / 12), repeats):
        total = np.zeros((3, 3), int)
        for matrix, count in zip(matrices, times):
            for _ in range(count):
                total += matrix
        results.append(measure(total))
    for key in HEADLINES:
        expected = np.percentile([result[key] for result in results], [2.5, 97.5])
        assert found[key] == pytest.approx(expected.tolist())


def test_bootstrap_agrees_with_scipy():
    from scipy import stats

    matrices = random_matrices(30)

    def accuracy(chosen):
        chosen = matrices[chosen.astype(int)].sum(axis=0)
        return np.trace(chosen) / chosen.sum()

    expected = stats.bootstrap(
        (np.arange(30),),
        accuracy,
        n_resamples=2000,
        vectorized=False,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    found = block_bootstrap(matrices, measure, 0, 2000)["overall_accuracy"]
    assert found == pytest.approx([expected.low, expected.high], abs=0.003)


def test_bootstrap_interval_holds_the_pooled_score_and_depends_on_the_seed_alone():
    matrices = random_matrices(40)
    found = block_bootstrap(matrices, measure, 1)
    assert found == block_bootstrap(matrices, measure, 1)
    assert found != block_bootstrap(matrices, measure, 2)
    low, high = found["kappa"]
    assert low < measure(matrices.sum(axis=0))["kappa"] < high


def test_equal_blocks_have_a_bootstrap_interval_of_no_width():
    matrix = random_matrices(1)[0]
    low, high = block_bootstrap(np.tile(matrix, (9, 1, 1)), measure, 0)["iou"]
    assert low == pytest.approx(high) == pytest.approx(measure(matrix)["iou"])


def test_one_block_has_no_interval():
    assert set(block_bootstrap(random_matrices(1), measure, 0).values()) == {None}


def test_a_score_that_no_draw_has_gets_no_interval():
    empty = np.zeros((4, 3, 3), int)
    assert set(block_bootstrap(empty, measure, 0).values()) == {None}


def test_bootstrap_of_a_difference_draws_the_same_blocks_for_both():
    first, second = random_matrices(20), random_matrices(20, seed=1)
    stacked = np.stack([first, second], axis=1)  # (G, 2, K, K)
    found = block_bootstrap(stacked, lambda pair: score_gap(*map(measure, pair)), 0)
    times = np.random.default_rng(0).multinomial(20, np.full(20, 1 / 20), 1000)
    gaps = [
        measure(np.tensordot(t, first, 1))["f1"]
        - measure(np.tensordot(t, second, 1))["f1"]
        for t in times
    ]
    assert found["f1"] == pytest.approx(np.percentile(gaps, [2.5, 97.5]).tolist())
