"""``--learning_curve``: which patches it takes, how long it trains, what it reports."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import QUICK, interrupt, run_main, settings, write_dataset

from common.distributed import ProcessGroup
from common.errors import DatasetError
from common.patches import list_pairs
from training import baseline
from training.curve import part_run, plan_curve
from training.outputs import clear_former_run
from training.preflight import trainings
from training.run import TrainingRun
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


def test_a_part_gets_as_many_steps_as_the_whole(index, tmp_path):
    config = settings(epochs=10, patience=5, warmup_epochs=1)
    run = TrainingRun(config, index, None, tmp_path, [], 10, SimpleNamespace())
    part = part_run(run, 25, np.arange(3))
    assert part.epochs == part.config.epochs == 40
    assert part.config.patience == 20 and part.config.warmup_epochs == 4
    assert part.save_dir == tmp_path / "curve_25" and len(part.train.pairs) == 3


def test_a_part_too_small_for_the_batches_is_refused_before_the_training(index):
    two = ProcessGroup(0, 2)
    message = "50 % of the 12 training patches are 6, too few for batches .* in 2 proc"
    with pytest.raises(DatasetError, match=message):
        plan_curve(settings(batch_size=2), index, two)
    assert plan_curve(settings(batch_size=2), index, ALONE)


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


def test_check_counts_the_trainings_of_the_parts():
    assert trainings(settings(learning_curve=True)) == 3 * trainings(settings())


def test_folds_have_no_learning_curve(binary_data, tmp_path):
    given = ("--dataset_root", binary_data, "--save_dir", tmp_path / "new", *QUICK)
    status, _, err = run_main(*given, "--learning_curve", "--val_strategy", "kfold")
    assert status == 2
    assert "--learning_curve with --val_strategy kfold: expected split" in err
