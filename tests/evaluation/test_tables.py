"""Scores and areas as text, and the reliability as a picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from evaluation_helpers import logits_and_truth
from matplotlib.figure import Figure

from common.scores import HEADLINES, scores
from evaluation.calibration import Calibration
from evaluation.figures import plot_reliability
from evaluation.tables import (
    baseline_table,
    curve_text,
    score_table,
    side_by_side,
    verdict,
)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


# --- the two side by side -------------------------------------------------------------------


def entry(value: float | None) -> dict:
    interval = None if value is None else [value - 0.02, value + 0.02]
    return {
        "pooled": dict.fromkeys(HEADLINES, value),
        "intervals": dict.fromkeys(HEADLINES, interval),
    }


def gap(value: float | None, interval: list | None) -> dict:
    return {"iou": {"value": value, "interval_95": interval}}


def test_side_by_side_tells_the_optimism():
    text = side_by_side(entry(0.8), entry(0.65), gap(0.15, [0.1, 0.2]))
    assert "kappa             0.800 [0.780, 0.820]  0.650 [0.630, 0.670]" in text
    last = text.splitlines()[-1]
    assert last.startswith("optimism of iou 0.150 [0.100, 0.200]: what random folds")


def test_side_by_side_claims_no_optimism_that_may_be_chance():
    text = side_by_side(entry(0.8), entry(0.7), gap(0.1, [-0.1, 0.3]))
    assert text.endswith(
        "0.100 [-0.100, 0.300]: too few blocks to distinguish it from chance"
    )


def test_side_by_side_claims_no_optimism_where_there_is_none():
    assert "not better here" in side_by_side(entry(0.5), entry(0.6), gap(-0.1, None))


def test_side_by_side_stands_missing_scores():
    text = side_by_side(entry(None), entry(0.6), gap(None, None))
    assert "optimism" not in text
    assert "nan" not in text.lower()


# --- the forest beside the network ----------------------------------------------------------


TRY = "docs/training.md says what to try"


@pytest.mark.parametrize(
    ("interval", "blocks", "expected"),
    [
        ([0.01, 0.2], 12, "the network is better (12 blocks of ground)"),
        (
            [-0.2, -0.01],
            3,
            f"the forest is better (3 blocks of ground, too few to trust): {TRY}",
        ),
        ([-0.1, 0.2], 12, "12 blocks of ground cannot tell which of the two is better"),
        (None, 1, "1 block of ground cannot tell which of the two is better"),
    ],
)
def test_no_more_is_said_of_network_and_forest_than_blocks_tell(
    interval, blocks, expected
):
    assert verdict({"iou": {"interval_95": interval}, "blocks": blocks}) == expected


def test_the_forest_is_shown_score_by_score():
    network, forest = (
        scores(np.array([[90, 10], [10, right]]), ["a", "b"], binary=True)
        for right in (50, 5)
    )
    gaps = {
        key: {
            "scores": [network[key], forest[key]],
            "value": 0.25,
            "interval_95": [-0.1, 0.5],
        }
        for key in HEADLINES
    }
    gaps["kappa"] = {"scores": [0.5, None], "value": None, "interval_95": None}
    baseline = {"test": forest, "difference": {"test": gaps | {"blocks": 20}}}
    lines = baseline_table(network, baseline, "test").splitlines()
    assert lines[0].split() == ["network", "forest", "difference"]
    numbers = [0.714, 0.2, 0.25]
    assert [float(cell) for cell in lines[1].split()[2:5]] == numbers
    assert lines[1].endswith("+0.250 [-0.100, +0.500]")
    kappa = next(line for line in lines if line.startswith("kappa"))
    assert kappa.split()[-1] == "-"
    assert len(lines) == 7


def curve_of(interval, blocks=12) -> dict:
    points = [
        {"percent": percent, "patches": percent // 5, "network": {"iou": percent / 200}}
        for percent in (25, 50, 100)
    ]
    gain = {"iou": {"value": 0.25, "interval_95": interval}, "blocks": blocks}
    return {"scored_on": "test", "points": points, "gain": gain}


@pytest.mark.parametrize(
    ("interval", "blocks", "expected"),
    [
        ([0.1, 0.4], 12, "more labels like these would probably help"),
        ([-0.4, -0.1], 12, "more labels like these would hardly help"),
        ([0.1, 0.4], 9, "cannot be told from these patches"),
        ([-0.1, 0.4], 12, "cannot be told from these patches"),
        (None, 1, "cannot be told from these patches"),
    ],
)
def test_a_learning_curve_says_no_more_than_blocks_tell(interval, blocks, expected):
    lines = curve_text(curve_of(interval, blocks)).splitlines()
    assert lines[-1].endswith(expected)
    assert lines[-1].startswith("IoU from half of the patches to all +0.250")
    assert [line.split() for line in lines[:2]] == [
        ["patches", "network"],
        ["25", "%", "5", "0.125"],
    ]


# --- text and figures -----------------------------------------------------------------------


def test_score_table_is_aligned_and_names_the_accuracies():
    names = ["water", "a rather long name of a class"]
    result = scores(np.array([[1_234_567, 30], [200, 10]]), names, binary=True)
    lines = score_table(result).splitlines()
    assert len({len(line) for line in lines[:4]}) == 1
    heads = ["pixels", "user's acc.", "producer's acc.", "F1", "IoU"]
    places = [lines[0].index(head) + len(head) for head in heads]
    assert [place for place in places if lines[1][place - 1] == " "] == []
    assert lines[1].split() == ["water", "1,234,597", *["1.000"] * 4]
    assert lines[2].split()[-5:] == ["210", "0.250", "0.048", "0.080", "0.042"]
    assert lines[4] == "overall accuracy 1.000, kappa 0.080"


def test_score_table_shows_absent_classes_as_dashes():
    result = scores(np.diag([5, 0]), ["a", "b"], binary=False)
    lines = score_table(result).splitlines()
    assert lines[2].split() == ["b", "0", "-", "-", "-", "-"]
    assert lines[4] == "overall accuracy 1.000, kappa -"


def test_reliability_is_drawn_before_and_after(tmp_path, real_pictures):
    logits, truth = logits_and_truth(np.random.default_rng(0), 5_000, 4, 3)
    curves = {}
    for name, temperature in (("before", 1), ("after", 3)):
        calibration = Calibration()
        calibration.add(logits, truth, temperature)
        curves[name] = calibration.report()
    axes = Figure().subplots()
    plot_reliability(axes, curves | {"none": Calibration().report()})
    _, labels = axes.get_legend_handles_labels()
    assert len(labels) == 3 and labels[1].startswith("before: ECE 0.1")
    assert axes.lines[2].get_xdata()[-1] == curves["after"]["confidence"][-1]
    axes.figure.savefig(tmp_path / "reliability.png")
