"""The plot of a training: curves of one run and of folds, scores of few and of many classes."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from helpers import patch_everywhere

from evaluation.reports import plot_training


@pytest.fixture
def drawn(monkeypatch):
    """The figures of reports, which are not stored."""

    def draw(report):
        kept = []
        patch_everywhere(
            monkeypatch,
            "common.pictures.save_figure",
            lambda figure, _: kept.append(figure),
        )
        plot_training(None, report)
        return kept[0]

    return draw


def history(shift: float = 0.0, *missing: str) -> list[dict]:
    keys = {"train_loss", "val_loss", "val_iou", "val_f1", "val_kappa"} - {*missing}
    rows = range(1, 4)
    return [{"epoch": e, **{key: e / 10 + shift for key in keys}} for e in rows]


def keys_of(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.mark.parametrize("count", [2, 5, 10, 15])
def test_each_fold_has_a_colour_and_each_measure_a_line_style(drawn, count):
    folds = [{"history": history(number / 100)} for number in range(count)]
    figure = drawn({"folds": folds, "history": history(0, "val_loss")})
    for axes, measures in (
        (figure.axes[0], ["training", "validation"]),
        (figure.axes[1], ["IoU", "F1", "kappa"]),
    ):
        curves = [line for line in axes.lines if len(line.get_xdata()) == 3]
        colours = [tuple(line.get_color()) for line in curves]
        each = len(measures)
        assert len(curves) == each * count
        assert len(set(colours)) == count
        for number in range(count):
            of_fold = slice(each * number, each * (number + 1))
            assert len(set(colours[of_fold])) == 1
            assert len({line.get_linestyle() for line in curves[of_fold]}) == each
        assert keys_of(axes) == [f"fold {k + 1}" for k in range(count)] + measures
        drawn_as = dict(zip(keys_of(axes), axes.get_legend().get_lines()))
        for number in range(count):
            key = drawn_as[f"fold {number + 1}"]
            assert tuple(key.get_color()) == colours[each * number]


def test_the_measures_of_one_run_have_a_colour_each(drawn):
    report = {"history": history(), "best_epoch": {"combined": 2}}
    losses, curves = drawn(report).axes
    assert keys_of(losses) == ["training", "validation"]
    assert keys_of(curves) == ["IoU", "F1", "kappa", "final model: epoch 2"]
    assert len({tuple(line.get_color()) for line in curves.lines[:3]}) == 3
    without = history(0, "val_loss", "val_iou", "val_f1", "val_kappa")
    losses, curves = drawn({"history": without}).axes
    assert keys_of(losses) == ["training"] and not curves.has_data()


@pytest.mark.parametrize("count", [2, 6, 12, 36])
def test_names_of_classes_beside_scores_do_not_cover_each_other(drawn, count):
    names = [f"Temporary grassland of many years, flowers {k}" for k in range(count)]
    result = {
        "per_class": [{"name": name, "iou": 0.5, "f1": None} for name in names],
        "confusion_matrix": np.eye(count).tolist(),
        "mean_iou": 0.5,
    }
    figure = drawn({"history": history(), "test": result})
    figure.set_layout_engine("none")  # takes long, and only makes more room
    figure.draw_without_rendering()
    bars, matrix = figure.axes[2:4]
    for labels, way in (
        (bars.get_xticklabels(), "x0"),
        (matrix.get_xticklabels(), "x0"),
        (matrix.get_yticklabels(), "y0"),
    ):
        assert len(labels) == count
        line = labels[0].get_fontsize() * figure.dpi / 72
        starts = sorted(getattr(t.get_window_extent(), way) for t in labels)
        assert min(b - a for a, b in pairwise(starts)) >= line
