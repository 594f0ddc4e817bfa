"""Runs of k-fold cross-validation."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from helpers import (
    QUICK,
    Outcome,
    run_main,
    train,
    write_dataset,
    write_raster,
)
from training_helpers import count_pixels, drawn_folds, origin_of, pooled_pixels

from common.patches import list_pairs, read_patch
from evaluation.matrices import fold_summary
from evaluation.tables import report_text
from model_training import (
    load_checkpoint,
)


def fold_reports(run: Outcome) -> list[dict]:
    return [
        json.loads((run.save_dir / f"fold_{n}" / "model_metrics.json").read_text())
        for n in (1, 2, 3)
    ]


def test_pooled_scores_count_every_pixel_once(kfold_run):
    report = kfold_run.report
    matrices = [fold["held_out"]["confusion_matrix"] for fold in report["folds"]]
    assert report["pooled"]["confusion_matrix"] == np.sum(matrices, axis=0).tolist()
    rows = 32 if report["settings"]["mode"] == "binary" else 25
    assert np.sum(matrices) == 9 * rows * 32


def test_each_fold_reports_as_its_own_file_does(kfold_run):
    assert kfold_run.report["folds"] == fold_reports(kfold_run)


@pytest.mark.parametrize("mode", ["binary", "multiclass"])
def test_a_fold_is_reported_for_what_it_never_saw(mode, request):
    run = request.getfixturevalue(f"{mode}_kfold")
    root = request.getfixturevalue(f"{mode}_data")
    pairs, folds = drawn_folds(run, root)
    seen = []
    for number, (fold, report) in enumerate(zip(folds, fold_reports(run)), start=1):
        parts = (fold.train, fold.validation, fold.held_out)
        assert np.array_equal(np.sort(np.concatenate(parts)), range(9))
        file = run.save_dir / f"fold_{number}" / "model_final_model.pth"
        for key, part in (("held_out", fold.held_out), ("validation", fold.validation)):
            matrix = count_pixels(file, [pairs[i] for i in part])
            assert report[key]["confusion_matrix"] == matrix.tolist()
        seen += fold.held_out.tolist()
    assert sorted(seen) == list(range(9))


def test_the_summary_is_that_of_the_folds(kfold_run):
    from scipy import stats

    report = kfold_run.report
    for key, found in report["summary"].items():
        values = [fold["held_out"][key] for fold in report["folds"]]
        assert found["values"] == values
        assert found["mean"] == pytest.approx(np.mean(values))
        assert found["std"] == pytest.approx(np.std(values, ddof=1))
        half = stats.t.ppf(0.975, 2) * stats.sem(values)
        low, high = found["interval_95"]
        assert (low, high) == pytest.approx(
            (np.mean(values) - half, np.mean(values) + half)
        )
        assert re.search(rf"^{key} +{found['mean']:.3f} ", kfold_run.out, re.MULTILINE)


def test_the_final_model_is_trained_for_the_epochs_that_the_folds_found_best(kfold_run):
    report = kfold_run.report
    best = [fold["best_epoch"]["combined"] for fold in report["folds"]]
    assert report["final_epochs"] == sorted(best)[1]
    assert len(report["history"]) == report["final_epochs"]


def test_folds_are_normalized_by_their_own_training_patches(binary_kfold, binary_data):
    pairs, folds = drawn_folds(binary_kfold, binary_data)
    patches = [pooled_pixels_of(pair) for pair in pairs]
    for number, fold in enumerate(folds, start=1):
        file = binary_kfold.save_dir / f"fold_{number}" / "model_best_loss.pth"
        pixels = np.concatenate([patches[i] for i in fold.train])
        expected = np.percentile(pixels, 1, axis=0)
        assert load_checkpoint(file).normalization.low == pytest.approx(expected)


def pooled_pixels_of(pair) -> np.ndarray:
    image, valid, _ = read_patch(pair)
    return image[:, valid].T


def test_the_final_model_of_kfold_sees_train_and_validation_but_never_test(
    binary_kfold, binary_data
):
    stored = binary_kfold.metadata()["normalization_statistics"]
    pixels = pooled_pixels(binary_data, "train", "validation")
    assert stored["high"] == pytest.approx(np.percentile(pixels, 99, axis=0))


@pytest.mark.parametrize("mode", ["binary", "multiclass"])
def test_test_scores_of_kfold_are_those_of_the_final_model(mode, request):
    run = request.getfixturevalue(f"{mode}_kfold")
    root = request.getfixturevalue(f"{mode}_data")
    matrix = count_pixels(
        run.save_dir / "model_final_model.pth", list_pairs(root, "test")
    )
    assert run.report["test"]["confusion_matrix"] == matrix.tolist()


def test_kfold_needs_train_alone(tmp_path):
    root = write_dataset(tmp_path / "data", 6, 0, 0)
    done = train(root, tmp_path / "out", "--val_strategy", "kfold", "--n_splits", 2)
    assert len(done.report["folds"]) == 2 and "test" not in done.report


@pytest.mark.slow
def test_a_fold_without_a_label_has_no_score_and_breaks_nothing(tmp_path):
    root = write_dataset(tmp_path / "data", 4, 0, 0, bands=3)
    file = min(root.rglob("labels/*.tif"))
    write_raster(file, np.full((32, 32), 255, np.uint8), origin=origin_of(file))
    folds = ("--val_strategy", "kfold", "--n_splits", 4)
    done = train(root, tmp_path / "out", *folds)
    scores = [fold["held_out"]["mean_iou"] for fold in done.report["folds"]]
    assert scores.count(None) == 1
    known = [value for value in scores if value is not None]
    assert done.report["summary"]["mean_iou"]["values"] == known
    assert np.sum(done.report["pooled"]["confusion_matrix"]) == 3 * 32 * 32


def test_more_folds_than_patches_is_an_error(tmp_path):
    root = write_dataset(tmp_path / "data", 2, 1, 0)
    status, _, err = run_main("--dataset_root", root, *QUICK, "--val_strategy", "kfold")
    assert status == 1
    assert "3 patches cannot make 5 folds" in err


def test_a_score_that_only_one_fold_has_is_printed(capsys):
    keys = ("iou", "f1", "mean_iou", "mean_f1", "overall_accuracy", "kappa")
    folds = [dict.fromkeys(keys, 0.25), dict.fromkeys(keys, None)]
    print(report_text({"summary": fold_summary(folds)}))
    assert "0.250" in capsys.readouterr().out
