"""Estimates from a stratified sample: the papers' equations, by hand, and by many samples."""

from __future__ import annotations

import numpy as np
import pytest

from evaluation.areas import estimate_areas
from evaluation.estimation import (
    StratifiedSample,
    error_matrix,
    estimate,
    stratified_ratio,
)

A, B, C, D = range(4)
# the numerical example of Stehman 2014: strata, map and reference of forty points
STRATA = np.repeat([A, B, C, D], 10)
MAPPED = np.repeat([A, B, A, B, C, B, D], [7, 3, 1, 11, 6, 2, 10])
REFERENCE = np.array(
    [A] * 5 + [C, B, A, B, C] + [A] + [B] * 5 + [A, A, B, B]
    + [C] * 5 + [D, D, B, B, A] + [D] * 7 + [C, C, B]
)  # fmt: skip
SIZES = np.array([40_000, 30_000, 20_000, 10_000])


def sample_of(strata, sizes, mapped, reference, classes, by_class=False):
    arrays = map(np.asarray, (strata, sizes, mapped, reference))
    ones = np.ones(len(np.asarray(strata)))
    return StratifiedSample(*arrays, ones, classes, by_class)


def test_the_example_of_stehman_by_hand():
    found = estimate(sample_of(STRATA, SIZES, MAPPED, REFERENCE, 4), 1000.0)
    classes = found["per_class"]
    # shares of points in strata A to D, each times the share of its stratum
    assert classes[A]["share"]["value"] == pytest.approx(
        0.4 * 0.6 + 0.3 * 0.3 + 0.2 * 0.1
    )
    assert classes[C]["share"]["value"] == pytest.approx(
        0.4 * 0.2 + 0.2 * 0.5 + 0.1 * 0.2
    )
    hits = [(MAPPED == REFERENCE)[STRATA == h].mean() for h in range(4)]
    assert found["overall_accuracy"]["value"] == pytest.approx(
        np.dot(hits, SIZES) / 1e5
    )
    # equation 25: the variance of a share
    variance = sum(
        n**2 * (1 - 10 / n) * (REFERENCE == A)[STRATA == h].var(ddof=1) / 10
        for h, n in enumerate(SIZES)
    )
    error = np.sqrt(variance) / 1e5
    assert classes[A]["share"]["standard_error"] == pytest.approx(error)
    assert classes[A]["area_ha"]["standard_error"] == pytest.approx(1000 * error)
    low, high = classes[A]["share"]["interval_95"]
    assert (high - low) / 2 == pytest.approx(1.96 * error)


def test_the_example_of_stehman_gives_the_figures_of_the_paper():
    found = estimate(sample_of(STRATA, SIZES, MAPPED, REFERENCE, 4), None)
    classes = found["per_class"]
    for estimated, value, error in (
        (found["overall_accuracy"], 0.63, 0.085),
        (classes[A]["share"], 0.35, 0.082),
        (classes[C]["share"], 0.20, 0.064),
        (classes[B]["users_accuracy"], 0.574, 0.125),
        (classes[B]["producers_accuracy"], 0.794, 0.117),
    ):
        assert estimated["value"] == pytest.approx(value, abs=5e-4)
        assert estimated["standard_error"] == pytest.approx(error, abs=6e-4)


def test_a_ratio_of_stehman_by_his_equation_with_covariances():
    above, below = (MAPPED == B) & (REFERENCE == B), MAPPED == B
    sample = sample_of(STRATA, SIZES, MAPPED, REFERENCE, 4)
    ratio, variance = stratified_ratio(sample, above, below)
    totals = [
        sum(n * values[STRATA == h].mean() for h, n in enumerate(SIZES))
        for values in (above, below)
    ]
    assert ratio == pytest.approx(totals[0] / totals[1])
    expected = 0
    for h, n in enumerate(SIZES):
        here = STRATA == h
        (yy, yx), (_, xx) = np.cov(above[here], below[here])
        expected += n**2 * (1 - 10 / n) * (yy + ratio**2 * xx - 2 * ratio * yx) / 10
    assert variance == pytest.approx(expected / totals[1] ** 2)


def test_where_strata_are_the_classes_the_equations_are_those_of_olofsson():
    counts = np.array([[66, 0, 5, 4], [0, 55, 8, 12], [1, 0, 153, 11], [2, 1, 9, 313]])
    pixels = np.array([200_000, 150_000, 3_200_000, 6_450_000]) * 1000
    mapped, reference = np.divmod(np.repeat(np.arange(16), counts.ravel()), 4)
    found = estimate(sample_of(mapped, pixels, mapped, reference, 4, True), 9e8)
    expected = estimate_areas(counts.T, pixels, 900.0)
    by_hand = 0.02 * 66 / 75 + 0.015 * 55 / 75 + 0.32 * 153 / 165 + 0.645 * 313 / 325
    assert found["overall_accuracy"]["value"] == pytest.approx(by_hand)
    for one, other in zip(found["per_class"], expected["per_class"]):
        for key in ("share", "users_accuracy", "producers_accuracy", "area_ha"):
            for part in ("value", "standard_error", "interval_95"):
                assert one[key][part] == pytest.approx(other[key][part], rel=1e-5), key


def test_a_class_depends_on_its_own_stratum_and_areas_on_all():
    strata = np.array([0, 0, 0, 1, 2, 2])
    mapped, reference = strata, np.array([0, 0, 1, 1, 2, 0])
    found = estimate(sample_of(strata, [100, 50, 20], mapped, reference, 3, True), None)
    first, second, _ = found["per_class"]
    assert first["users_accuracy"]["interval_95"]
    assert second["users_accuracy"] == {
        "value": 1.0,
        "standard_error": None,
        "interval_95": None,
    }
    assert second["share"]["value"] is not None
    assert second["share"]["interval_95"] is None
    assert found["overall_accuracy"]["interval_95"] is None
    without = estimate(
        sample_of(strata[3:], [100, 50, 20], mapped[3:], reference[3:], 3, True), None
    )
    assert without["overall_accuracy"]["value"] is None
    assert without["per_class"][2]["users_accuracy"]["value"] == 0.5


def test_a_stratum_that_is_known_whole_adds_no_error():
    strata, reference = np.array([0, 0, 0, 1, 1]), np.array([0, 1, 0, 1, 0])
    found = estimate(sample_of(strata, [3, 2], strata, reference, 2, True), None)
    assert found["overall_accuracy"]["value"] == pytest.approx(3 / 5)
    assert found["overall_accuracy"]["standard_error"] == 0


def test_points_outside_the_map_are_no_part_of_its_accuracy():
    strata, mapped = np.zeros(6, int), np.array([0, 0, 1, 1, -1, -1])
    reference = np.array([0, 1, 1, 1, 0, 1])
    found = estimate(sample_of(strata, [600], mapped, reference, 2), None)
    assert found["overall_accuracy"]["value"] == pytest.approx(3 / 4)
    assert found["per_class"][1]["producers_accuracy"]["value"] == pytest.approx(2 / 3)
    assert found["per_class"][0]["share"]["value"] == pytest.approx(2 / 6)


def test_the_matrix_holds_points_and_shares_of_the_map():
    sample = sample_of([0, 0, 1, 1], [300, 100], [0, 0, 1, 1], [0, 1, 1, 1], 2, True)
    matrix = error_matrix(sample)
    assert matrix["points"] == [[1, 0], [1, 2]]
    assert np.array(matrix["shares"]) == pytest.approx(np.array([[3, 0], [3, 2]]) / 8)


@pytest.mark.parametrize(
    "other", [False, True], ids=["own strata", "strata of another map"]
)
def test_intervals_of_many_samples_hold_the_truth_as_often_as_they_promise(other):
    """A map of 3000 pixels whose truth is known, and 1000 samples of it."""
    rng = np.random.default_rng(7)
    truth = rng.choice(3, 3000, p=[0.5, 0.3, 0.2])
    mapped = np.where(rng.random(3000) < 0.75, truth, rng.integers(0, 3, 3000))
    strata = np.where(rng.random(3000) < 0.7, mapped, 0) if other else mapped
    sizes = np.bincount(strata)
    places = [np.flatnonzero(strata == h) for h in range(3)]
    right = truth == mapped
    expected = {"overall": right.mean()}
    for k in range(3):
        expected[f"share {k}"] = (truth == k).mean()
        expected[f"user {k}"] = right[mapped == k].mean()
        expected[f"producer {k}"] = right[truth == k].mean()
    values, errors, inside = ({key: [] for key in expected} for _ in range(3))
    for _ in range(1000):
        drawn = np.concatenate([rng.choice(p, 150, replace=False) for p in places])
        sample = sample_of(
            strata[drawn], sizes, mapped[drawn], truth[drawn], 3, not other
        )
        found = estimate(sample, None)
        one = {"overall": found["overall_accuracy"]}
        for k, entry in enumerate(found["per_class"]):
            one[f"share {k}"] = entry["share"]
            one[f"user {k}"] = entry["users_accuracy"]
            one[f"producer {k}"] = entry["producers_accuracy"]
        for key, result in one.items():
            low, high = result["interval_95"]
            values[key].append(result["value"])
            errors[key].append(result["standard_error"])
            inside[key].append(low <= expected[key] <= high)
    for key, true in expected.items():
        deviation = np.std(values[key])
        error = deviation / np.sqrt(1000)
        assert np.mean(values[key]) == pytest.approx(true, abs=4 * error), key
        assert np.mean(errors[key]) == pytest.approx(deviation, rel=0.08), key
        assert 0.9 <= np.mean(inside[key]) <= 0.97, key
    assert 0.93 <= np.mean(list(inside.values())) <= 0.965
