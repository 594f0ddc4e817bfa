"""``--only_fold``: folds trained by themselves, gathered by the same command without it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import rasterio
from helpers import QUICK, interrupt, run_main, train

from common.errors import SegmentationError
from common.files import exclusive_lock
from training import cross_validation
from training.experiment import run_experiment

MORE = (
    *("--val_strategy", "kfold", "--n_splits", 3),
    *("--mode", "multiclass", "--classes", 4),
)


def words(root, save_dir, *more) -> list:
    return ["--dataset_root", root, "--save_dir", save_dir, *QUICK, *MORE, *more]


def without_times(report) -> object:
    """A report without what differs between two equal runs."""
    if isinstance(report, dict):
        left = {key: without_times(value) for key, value in report.items()}
        return {
            k: v for k, v in left.items() if k not in ("seconds", "settings", "command")
        }
    return [without_times(v) for v in report] if isinstance(report, list) else report


@pytest.mark.slow
def test_folds_trained_alone_are_gathered_to_the_report_of_a_whole_run(
    multiclass_data, tmp_path, monkeypatch, small_forest
):
    """The forest's scores included, which belong to all folds together."""
    whole = train(multiclass_data, tmp_path / "whole", *MORE)
    tmp_path = tmp_path / "parts"
    fitted, fit = [], cross_validation.fit
    monkeypatch.setattr(
        cross_validation,
        "fit",
        lambda run: fitted.append(run.save_dir.name) or fit(run),
    )
    for number in (3, 1):  # in any order; the second is missing
        status, out, err = run_main(
            *words(multiclass_data, tmp_path, "--only_fold", number)
        )
        assert status == 0, err
        assert "Held out" in out and f"fold_{number}/model_final_model.pth" in out
        fold = json.loads(
            (tmp_path / f"fold_{number}" / "model_metrics.json").read_text()
        )
        assert without_times(fold) == without_times(
            whole.report["folds"][number - 1]
        ) | {"val_strategy": "kfold"}
    assert fitted == ["fold_3", "fold_1"]
    assert not (tmp_path / "fold_2").exists()
    assert not (tmp_path / "model_metrics.json").exists()
    status, out, err = run_main(*words(multiclass_data, tmp_path))
    assert status == 0, err
    assert "gathering what --only_fold has trained: fold_1, fold_3" in err
    assert err.count("resuming after epoch") == 2 and "no run to resume in" in err
    report = json.loads((tmp_path / "model_metrics.json").read_text())
    assert without_times(report) == without_times(whole.report)
    assert report["baseline"]["difference"].keys() == {"pooled", "test"}
    assert (tmp_path / "model_final_model.pth").is_file()
    # a finished run is not gathered again
    status, _, err = run_main(*words(multiclass_data, tmp_path))
    assert status == 1 and "holds a finished run" in err
    status, _, err = run_main(*words(multiclass_data, tmp_path, "--only_fold", 1))
    assert status == 1 and "--only_fold needs another --save_dir" in err


def test_folds_of_other_settings_are_not_gathered(multiclass_data, tmp_path):
    status, _, err = run_main(*words(multiclass_data, tmp_path, "--only_fold", 2))
    assert status == 0, err
    before = sorted(tmp_path.rglob("*"))
    status, _, err = run_main(
        *words(multiclass_data, tmp_path, "--learning_rate", 0.01)
    )
    assert status == 1 and "another learning_rate" in err
    assert "start again with --overwrite" in err
    assert {*before} <= {*tmp_path.rglob("*")}
    # the same fold again
    status, _, err = run_main(*words(multiclass_data, tmp_path, "--only_fold", 2))
    assert status == 1 and "fold_2 holds a finished run" in err
    again = ("--only_fold", 2, "--overwrite")
    assert run_main(*words(multiclass_data, tmp_path, *again))[0] == 0


def test_folds_of_other_images_are_not_gathered(multiclass_data, tmp_path):
    root = shutil.copytree(multiclass_data, tmp_path / "data")
    given = words(root, tmp_path / "run")
    assert run_main(*given, "--only_fold", 1)[0] == 0
    for image in root.rglob("images/*.tif"):
        with rasterio.open(image, "r+") as file:
            file.write(file.read() * 2)
    status, _, err = run_main(*given)
    assert status == 1 and "another pixel_values" in err.splitlines()[-1]


def test_a_fold_that_another_job_trains_is_not_touched(multiclass_data, tmp_path):
    fold = tmp_path / "fold_1"
    with exclusive_lock("--save_dir", fold, fold):
        for more in ((), ("--only_fold", 1)):
            status, _, err = run_main(*words(multiclass_data, tmp_path, *more))
            assert status == 1 and "Another run into" in err and "fold_1" in err
        status, _, err = run_main(*words(multiclass_data, tmp_path, "--only_fold", 2))
        assert status == 0, err


@pytest.mark.slow
def test_a_fold_of_a_running_whole_run_is_not_replaced(
    multiclass_data, tmp_path, monkeypatch
):
    """Nor one that it has finished, nor one that is still to come."""
    tried, fit = [], cross_validation.fit

    def fit_beside_jobs(run):
        if run.save_dir.name == "fold_2":
            for number in (1, 2, 3):
                job = replace(run.config, only_fold=number, overwrite=True)
                with pytest.raises(SegmentationError, match=f"fold_{number} is under"):
                    run_experiment(job)
                tried.append(number)
        return fit(run)

    monkeypatch.setattr(cross_validation, "fit", fit_beside_jobs)
    status, _, err = run_main(*words(multiclass_data, tmp_path))
    assert status == 0, err
    assert tried == [1, 2, 3]
    assert not list(tmp_path.rglob(".lock"))
    assert (tmp_path / "fold_1" / "model_final_model.pth").is_file()


def test_jobs_of_several_folds_work_side_by_side(
    multiclass_data, tmp_path, monkeypatch
):
    def fit_beside_another(run):
        with monkeypatch.context() as patch:
            patch.setattr(cross_validation, "fit", fit)
            same = replace(run.config, overwrite=True)
            with pytest.raises(SegmentationError, match="fold_1 is under way"):
                run_experiment(same)
            assert run_experiment(replace(run.config, only_fold=2))["held_out"]
        return fit(run)

    fit = cross_validation.fit
    monkeypatch.setattr(cross_validation, "fit", fit_beside_another)
    status, _, err = run_main(*words(multiclass_data, tmp_path, "--only_fold", 1))
    assert status == 0, err


def test_settings_of_all_finished_folds_are_compared_before_any_training(
    multiclass_data, tmp_path, monkeypatch
):
    given = words(multiclass_data, tmp_path)
    assert run_main(*given, "--only_fold", 2)[0] == 0
    assert run_main(*given, "--only_fold", 3, "--seed", 7)[0] == 0
    calls = interrupt(monkeypatch, "training.cross_validation.fit", 99)
    for check in ((), ("--check",)):  # the missing fold 1 would be trained first
        status, _, err = run_main(*given, *check)
        assert status == 1 and not calls
        (line,) = [one for one in err.splitlines() if "error" in one]
        assert f"{tmp_path / 'fold_3'}" in line and "another seed (7, now 42)" in line


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("--only_fold", 4), "--only_fold 4: expected 1 to 3, as --n_splits says"),
        (("--only_fold", 0), "--only_fold 0: expected 1 or more"),
        (("--only_fold", 1, "--fold_by", "both"), "--only_fold with --fold_by both"),
        (("--only_fold", 1, "--val_strategy", "split"), "--val_strategy kfold with it"),
    ],
)
def test_what_is_no_fold_is_refused(multiclass_data, tmp_path, options, error):
    status, _, err = run_main(*words(multiclass_data, tmp_path / "new", *options))
    assert status == 2 and error in err
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_overwrite_begins_anew_instead_of_gathering(multiclass_data, tmp_path):
    given = words(multiclass_data, tmp_path)
    assert run_main(*given, "--only_fold", 1)[0] == 0
    other = ("--learning_rate", 0.01)
    fold = tmp_path / "fold_2"
    with exclusive_lock("--save_dir", fold, fold):  # a job that trains this one
        assert run_main(*given, *other, "--overwrite")[0] == 1
    status, _, err = run_main(*given, *other, "--overwrite")
    assert status == 0 and "gathering" not in err


@pytest.mark.slow
def test_an_interrupted_gathering_is_continued_by_the_same_command(
    multiclass_data, tmp_path, monkeypatch
):
    given = words(multiclass_data, tmp_path)
    for number in (1, 2, 3):
        assert run_main(*given, "--only_fold", number)[0] == 0
    with monkeypatch.context() as patch:
        interrupt(patch, "training.cross_validation.median_rates", 1)
        interrupt(patch, "training.cross_validation.block_bootstrap", 1)
        assert run_main(*given)[0] == 130
    status, _, err = run_main(*given)
    assert status == 0 and "gathering" in err


def test_folds_of_both_kinds_are_not_gathered(multiclass_data, tmp_path):
    assert run_main(*words(multiclass_data, tmp_path, "--only_fold", 1))[0] == 0
    both = words(multiclass_data, tmp_path, "--fold_by", "both")
    status, _, err = run_main(*both)
    assert status == 1 and "holds an unfinished run" in err
