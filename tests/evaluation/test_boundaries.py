"""Boundaries of classes: which pixels they are, and which of them have a counterpart."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from evaluation.boundaries import BoundaryScores, class_boundary, within
from evaluation.tables import boundary_line


def halves(edge: int, shape=(12, 40)) -> np.ndarray:
    """Class 0 left of a column, class 1 from there on."""
    return np.tile((np.arange(shape[1]) >= edge).astype(np.int16), (shape[0], 1))


def scores_of(guess, truth, tolerance=2.0, classes=2) -> dict:
    counter = BoundaryScores(classes, (tolerance, tolerance))
    counter.add(guess, truth)
    return counter.report([str(number) for number in range(classes)], 10.0)


@pytest.mark.parametrize("shift, expected", [(0, 1), (2, 1), (3, 0)])
def test_a_boundary_is_right_up_to_the_tolerance(shift, expected):
    report = scores_of(halves(20 + shift), halves(20))
    assert [entry["f1"] for entry in report["per_class"]] == [expected, expected]
    assert report["tolerance_metres"] == 20


def test_precision_and_recall_by_hand():
    truth = np.zeros((9, 9), np.int16)
    truth[2:4, 2:4] = 1  # four boundary pixels
    guess = truth.copy()
    guess[8, 8] = 1  # one more, far away
    (_, entry) = scores_of(guess, truth, 1.0)["per_class"]
    assert entry == {"name": "1", "precision": 4 / 5, "recall": 1, "f1": pytest.approx(8 / 9)}  # fmt: skip


def test_the_edges_of_the_map_and_of_the_labels_are_no_boundary():
    inside = np.zeros((6, 6), bool)
    inside[:3] = True
    known = np.ones((6, 6), bool)
    known[3:] = False
    assert not class_boundary(inside, known).any()
    known[3:, 0] = True
    assert np.argwhere(class_boundary(inside, known)).tolist() == [[2, 0]]


def test_a_class_without_a_boundary_has_no_score_and_one_on_one_side_scores_zero():
    truth = halves(6, (12, 12))
    guess = np.where(truth == 1, 2, truth)
    report = scores_of(guess, truth, classes=4)
    assert [entry["f1"] for entry in report["per_class"]] == [1, 0, 0, None]
    assert report["mean_f1"] == pytest.approx(1 / 3)


def test_labels_that_lie_apart_judge_no_boundary():
    truth = halves(20)
    truth[:, 18:22] = -1  # nobody draws along the edge
    report = scores_of(halves(15), truth)
    nothing = {"precision": None, "recall": None, "f1": None}
    assert report["per_class"] == [{"name": name} | nothing for name in "01"]
    assert report["mean_f1"] is None
    assert "labels of two classes touch" in boundary_line(report)
    assert "2 pixels (20 m)" in boundary_line(scores_of(halves(15), halves(20)))


@pytest.mark.parametrize("reach", [(3, 1), (4.4, 2.2), (12, 6), (2.5, 8)])
def test_a_tolerance_reaches_other_numbers_of_pixels_across_and_down(reach):
    rng = np.random.default_rng(2)
    boundary = rng.random((60, 50)) > 0.99
    across, down = reach
    away = ndimage.distance_transform_edt(~boundary, sampling=(1 / down, 1 / across))
    most = 1 + (5e-3 if max(reach) >= 6 else 1e-9)
    assert (within(boundary, reach) == (away <= most)).all()
    assert BoundaryScores(2, reach).halo > down


@pytest.mark.parametrize("tolerance", [0, 1.5, 2, 5, 5.9, 8])
def test_counts_are_those_of_distances_computed_otherwise(tolerance):
    rng = np.random.default_rng(1)
    guess, truth = (rng.integers(0, 40, (2, 60, 50)) // 39).astype(np.int16)
    truth[:5, :9] = -1
    counter = BoundaryScores(2, (tolerance, tolerance))
    counter.add(guess, truth)
    known = truth >= 0
    for number in (0, 1):
        edges = []
        for array in (truth, guess):
            inside, other = known & (array == number), known & (array != number)
            cross = ndimage.generate_binary_structure(2, 1)
            edges.append(inside & ndimage.binary_dilation(other, cross))
        drawn, found = edges
        expected = [
            drawn.sum(), found.sum(),
            (drawn & (ndimage.distance_transform_edt(~found) <= tolerance)).sum(),
            (found & (ndimage.distance_transform_edt(~drawn) <= tolerance)).sum(),
        ]  # fmt: skip
        assert counter.counts[number].tolist() == expected
