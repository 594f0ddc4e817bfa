"""``--learning_curve``: which patches it takes, how long it trains, what it reports."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ENCODER, QUICK, interrupt, run_main, settings, write_dataset

from common.distributed import ProcessGroup
from common.errors import DatasetError
from common.patches import list_pairs
from training import baseline
from training.curve import part_run, plan_curve
from training.outputs import clear_former_run
from training.preflight import measure_run
from training.run import TrainingRun, make_stepper
from training.samples import index_samples

ALONE = ProcessGroup()


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    root = write_dataset(tmp_path_factory.mktemp("curve"), 12, 1, 0, bands=1)
    return index_samples(list_pairs(root, "train"), 2, 255)


def test_the_fewer_patches_are_some_of_the_more(index):
    plan = plan_curve(settings(), index, ALONE)
    assert list(plan) == [25, 50]
    assert len(plan[25]) == 3 and len(plan[50]) == 6
    assert {*plan[25]} < {*plan[50]}
    again = plan_curve(settings(), index, ALONE)
    assert all(np.array_equal(plan[share], again[share]) for share in plan)


def test_places_and_blocks_are_not_parted(index, monkeypatch):
    groups = np.repeat(np.arange(4), 3)
    monkeypatch.setattr("training.curve.ground_blocks", lambda pairs, least: groups)
    for chosen in plan_curve(settings(), index, ALONE).values():
        taken = np.bincount(groups[chosen], minlength=4)
        assert {*taken} == {0, 3}


def test_single_places_are_drawn_where_blocks_are_few(index):
    assert len(set(baseline.ground_blocks(index.pairs))) == 3
    assert len(set(baseline.ground_blocks(index.pairs, 8))) == 12


def test_too_few_patches_are_an_error(index):
    message = r"--learning_curve: 25 % of the 2 training patches would hold fewer"
    with pytest.raises(DatasetError, match=message):
        plan_curve(settings(batch_size=1), index.subset([0, 1]), ALONE)


@pytest.mark.parametrize(
    "whole, part, options, epochs",
    [
        (12, 3, {"batch_size": 3}, 40),
        (12, 3, {}, 30),  # 3 batches of 4, and one of 3
        (9, 5, {}, 20),  # 4 + 4 and 4: one patch alone is left out
        (12, 6, {"accumulate": 2}, 20),  # of 2 + 1 batches, and of 2
        (2, 1, {"batch_size": 1}, 20),
    ],
)
def test_a_part_gets_as_many_steps_as_the_whole(index, whole, part, options, epochs):
    config = settings(epochs=10, patience=5, warmup_epochs=1, **options)
    some = index.subset(range(whole))
    run = TrainingRun(config, some, None, Path("run"), [], 10, SimpleNamespace())
    found = part_run(run, 25, np.arange(part))
    assert found.epochs == found.config.epochs == epochs
    assert found.config.patience == epochs // 2
    assert found.config.warmup_epochs == epochs // 10
    assert found.save_dir == Path("run/curve_25") and len(found.train.pairs) == part


def test_a_plateau_of_a_part_is_as_many_steps_long_as_that_of_the_whole(index):
    config, device = settings(scheduler="plateau", batch_size=3), torch.device("cpu")
    run = TrainingRun(config, index, None, Path("run"), [], 10, device)
    part = part_run(run, 25, np.arange(3))
    for one, patience in ((run, 5), (part, 20)):
        one.model = torch.nn.Linear(1, 1)
        assert make_stepper(one, 1)[1].patience == patience


def test_a_part_too_small_for_the_batches_is_refused_before_the_training(index):
    two = ProcessGroup(0, 2)
    message = "25 % of the 12 training patches are 3, too few for batches .* in 2 proc"
    with pytest.raises(DatasetError, match=message):
        plan_curve(settings(batch_size=2), index, two)
    assert plan_curve(settings(batch_size=2), index, ALONE)


@pytest.mark.slow
def test_a_curve_is_trained_reported_and_resumed(tmp_path, small_forest, monkeypatch):
    place, root = tmp_path / "run", write_dataset(tmp_path, 8, 1, 2, bands=3)
    monkeypatch.setattr(baseline, "LEAST_SECONDS", 1e9)  # asked for, there is a forest
    given = ["--dataset_root", root, "--save_dir", place, *QUICK, "--learning_curve"]
    status, out, err = run_main(*given)
    assert status == 0, err
    report = json.loads((place / "model_metrics.json").read_text())
    curve = report["learning_curve"]
    assert curve["scored_on"] == "test"
    shares = [(point["percent"], point["patches"]) for point in curve["points"]]
    assert shares == [(25, 2), (50, 4), (100, 8)]
    # the whole is the final model, as it stands above
    assert curve["points"][-1]["network"]["iou"] == report["test"]["iou"]
    half = curve["points"][1]["network"]["iou"]
    assert curve["gain"]["iou"]["value"] == pytest.approx(report["test"]["iou"] - half)
    assert all(0 <= point["forest"]["iou"] <= 1 for point in curve["points"])
    assert "test" in report["baseline"]
    assert "Learning curve, IoU on test" in out
    assert (place / "model_learning_curve.png").is_file()
    assert (place / "curve_50" / "model_best_combined.pth").is_file()

    calls = interrupt(monkeypatch, "training.epochs.train_epoch", 1)
    status, _, err = run_main(*given, "--resume", "--no_baseline")
    assert status == 0 and not calls  # all of it is there
    again = json.loads((place / "model_metrics.json").read_text())["learning_curve"]
    assert again["gain"] == curve["gain"] and "forest" not in again["points"][0]

    clear_former_run(settings(save_dir=str(place), overwrite=True))
    assert not list(place.iterdir())


def test_check_counts_all_epochs_of_the_parts(index, monkeypatch):
    # 4, 4 and 2 epochs of 2, 4 and 8 patches, in each of which files are written
    monkeypatch.setattr("training.preflight.writing_seconds", lambda *_: 1e4)
    config = settings(model="linknet", encoder_name=ENCODER, device="cpu", epochs=2)
    some, device = index.subset(range(8)), torch.device("cpu")
    run = TrainingRun(config, some, some, Path("run"), [], 2, device)
    found = measure_run(run, {25: np.arange(2), 50: np.arange(4)})
    assert found["total_seconds"] == pytest.approx(10 * 1e4, rel=0.01)


def test_check_refuses_parts_too_small_for_the_batch_size_that_it_finds(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "training.preflight.settle_batch_size",
        lambda config, *_: replace(config, batch_size=4),
    )
    root = write_dataset(tmp_path, 4, 1, 0, bands=1)
    given = ("--dataset_root", root, "--save_dir", tmp_path / "new", *QUICK)
    more = ("--learning_curve", "--batch_size", "auto", "--check")
    status, _, err = run_main(*given, *more)
    assert status == 1
    assert "--learning_curve: 25 % of the 4 training patches are 1, too few" in err


def test_folds_have_no_learning_curve(binary_data, tmp_path):
    given = ("--dataset_root", binary_data, "--save_dir", tmp_path / "new", *QUICK)
    status, _, err = run_main(*given, "--learning_curve", "--val_strategy", "kfold")
    assert status == 2
    assert "--learning_curve with --val_strategy kfold: expected split" in err
