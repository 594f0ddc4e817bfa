"""main.py --check."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace

import pytest
from helpers import (
    QUICK,
    TINY,
    patch_everywhere,
    run_main,
    settings,
    write_dataset,
)

import model_training
import training.dataset
from model_training import build_model
from training import preflight
from training.preflight import check_experiment, weights_advice
from training.samples import PatchDataset
from training.settings import TrainingConfig


def check(*options) -> tuple[int, str, str]:
    return run_main(*QUICK, *options, "--check")


def test_a_check_tells_what_a_run_will_take_and_leaves_nothing(data, tmp_path):
    out = tmp_path / "out"
    where = "--dataset_root", data, "--save_dir", out
    status, told, err = check(*where, "--model", "unet")
    assert status == 0 and "error" not in err
    assert "patches       8 train, 4 validation" in told
    assert "advice        try --pretrained" in told
    assert told.splitlines()[-1] == "No problems found."
    assert not out.exists()


def test_what_a_check_says_of_time_and_memory_is_measured(data, tmp_path):
    config = TrainingConfig(
        dataset_root=str(data), model="linknet", encoder_name=TINY[3],
        save_dir=str(tmp_path / "out"), device="cpu", epochs=7,
    )  # fmt: skip
    problems, found = check_experiment(config)
    assert not problems and found["patches"] == {"train": 8, "validation": 4}
    assert found["total_seconds"] > 7 * found["epoch_seconds"]  # reading comes first
    model = build_model(config.model_config(3))
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["memory"] > 1e8
    folds = {"val_strategy": "kfold", "n_splits": 2}
    _, more = check_experiment(replace(config, **folds))
    assert more["total_seconds"] > 7 * more["epoch_seconds"] * 2


def test_a_run_of_one_step_is_measured_too(data, tmp_path):
    """A schedule that is stepped with each batch has one step, and two are measured."""
    options = ("--scheduler", "onecycle", "--batch_size", 8, "--epochs", 1)
    status, told, err = check("--dataset_root", data, "--save_dir", tmp_path, *options)
    assert status == 0, err
    assert told.splitlines()[-1] == "No problems found."


@pytest.mark.parametrize(
    "changes, advised",
    [
        ({}, True),
        ({"encoder_name": "resnet18"}, True),
        ({"encoder_name": "tu-resnet18"}, True),
        ({"encoder_name": "dpn92"}, False),  # without weights of ImageNet
        ({"model": "linknet"}, False),  # measured: none
        ({"encoder_depth": 3}, False),  # not measured
        ({"pretrained": True}, False),
        ({"encoder_weights": "some.pth"}, False),
        ({"start_from": "some.pth"}, False),
    ],
)
def test_pretrained_weights_are_advised_where_they_help(changes, advised):
    advice = weights_advice(settings(**({"model": "unet"} | changes)))
    assert bool(advice) == advised
    assert not advised or "--pretrained" in advice


@pytest.mark.slow
@pytest.mark.fault(31)
def test_reading_and_writing_of_an_epoch_are_in_its_time(data, tmp_path, monkeypatch):
    config = settings(
        dataset_root=str(data), save_dir=str(tmp_path / "new" / "out"), batch_size=4
    )

    def slowed(function):
        def slow(*arguments, **options):
            time.sleep(0.2)
            return function(*arguments, **options)

        return slow

    reading = PatchDataset.__getitem__
    with monkeypatch.context() as patch:
        patch.setattr(PatchDataset, "__getitem__", slowed(reading))
        _, found = check_experiment(config)
    assert found["epoch_seconds"] >= 12 * 0.2  # 8 patches to train on, 4 to validate
    writing = model_training.save_checkpoint
    with monkeypatch.context() as patch:
        patch_everywhere(patch, "model_training.save_checkpoint", slowed(writing))
        _, found = check_experiment(config)
    assert found["epoch_seconds"] >= 4 * 0.2
    assert not (tmp_path / "new").exists()


def test_a_check_measures_the_steps_with_the_algorithms_of_a_training(
    data, tmp_path, monkeypatch
):
    order = []

    @contextlib.contextmanager
    def deterministic(device):
        order.append("begin")
        yield
        order.append("end")

    def noted(*arguments):
        order.append("train")
        return train(*arguments)

    train = preflight.train_one_epoch
    monkeypatch.setattr(preflight, "deterministic", deterministic)
    monkeypatch.setattr(preflight, "train_one_epoch", noted)
    config = settings(dataset_root=str(data), save_dir=str(tmp_path), batch_size=4)
    check_experiment(config)
    assert order == ["begin", "train", "end"] * 2


@pytest.mark.fault(31)
def test_a_cache_that_does_not_fit_is_seen(data, tmp_path, monkeypatch):
    patch_everywhere(monkeypatch, "common.machine.free_memory", lambda: 5000)
    out = ("--save_dir", tmp_path / "out", "--cache", "ram")
    status, _, err = check("--dataset_root", data, *out)
    assert status == 1 and "do not fit in memory; leave --cache ram out" in err


@pytest.mark.fault(34)
def test_a_check_reads_the_splits_as_a_run_does(data, tmp_path, monkeypatch):
    asked, index_split = [], training.dataset.index_split

    def noted(config, split, *rest):
        asked.append(split)
        return index_split(config, split, *rest)

    patch_everywhere(monkeypatch, "training.dataset.index_split", noted)
    given = ("--dataset_root", data, "--save_dir", tmp_path / "out")
    assert check(*given)[0] == 0
    assert asked == ["train", "validation", "test"]


def test_a_check_tells_all_faults_at_once(tmp_path):
    root = write_dataset(tmp_path / "data", 4, 2, 0, bands=3)
    names = sorted((root / "Patch" / "train" / "images").iterdir())
    names[0].write_bytes(names[0].read_bytes()[:900])
    label = root / "Patch" / "validation" / "labels"
    strange = min(label.iterdir())
    made = write_dataset(tmp_path / "more", 4, 2, 0, bands=3, classes=5)
    other = made / "Patch" / "validation" / "labels"
    strange.write_bytes(min(other.iterdir()).read_bytes())
    before = {path: path.read_bytes() for path in root.rglob("*.tif")}
    options = ("--dataset_root", root, "--save_dir", tmp_path / "out")
    status, told, err = check(*options, "--in_channels", 4, "--area_estimation")
    assert status == 1 and told == ""
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == len(set(lines))
    for words in (
        names[0].name, f"{strange.name} holds", "--in_channels 4", "--area_estimation",
    ):  # fmt: skip
        assert any(words in line for line in lines), words
    assert not (tmp_path / "out").exists()
    assert before == {path: path.read_bytes() for path in root.rglob("*.tif")}


@pytest.mark.fault(34)
def test_a_split_of_which_no_patch_can_be_read_is_a_line_for_each(tmp_path):
    root = write_dataset(tmp_path / "data", 3, 2, 0, bands=3)
    names = sorted((root / "Patch" / "validation" / "images").iterdir())
    for path in names:
        path.write_bytes(path.read_bytes()[:900])
    out = ("--dataset_root", root, "--save_dir", tmp_path / "out")
    status, _, err = check(*out)
    assert status == 1 and "Traceback" not in err
    assert all(path.name in err for path in names)


def test_a_check_plans_the_folds(data, tmp_path):
    options = ("--dataset_root", data, "--save_dir", tmp_path / "out")
    folds = ("--val_strategy", "kfold", "--n_splits", 50)
    status, _, err = check(*options, *folds)
    assert status == 1 and "12 patches cannot make 50 folds" in err
