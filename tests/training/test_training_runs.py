"""Runs that are stopped, gone on with, shared by processes, or computed in another precision."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import (
    QUICK,
    ROOT,
    TINY,
    patch_everywhere,
    run_main,
    same_weights,
    train,
    write_dataset,
)

from common.devices import native_precision
from common.errors import OptionError
from model_training import build_loss, build_model, load_checkpoint
from training import epochs, loop
from training.epochs import epoch_line
from training.loop import Stepper, train_one_epoch, training_precision
from training.preflight import check_experiment
from training.settings import TrainingConfig

SCRIPT = str(ROOT / "main.py")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data"), 8, 4, 0, bands=3)


def rows_of(folder: Path, *left_out: str) -> list[dict]:
    with open(folder / "model_training_log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in left_out} for row in rows]


def stopped_in(epoch: int, monkeypatch, data, save_dir, *options) -> tuple:
    """A run that Ctrl-C ends in the validation of an epoch."""
    calls, plain = [], loop.evaluate

    def evaluate(*arguments, **more):
        calls.append(1)
        if len(calls) == epoch:
            raise KeyboardInterrupt
        return plain(*arguments, **more)

    with monkeypatch.context() as patch:
        patch_everywhere(patch, "training.loop.evaluate", evaluate)
        given = ("--dataset_root", data, "--save_dir", save_dir, *QUICK, *options)
        return run_main(*given)


# --- stopped and gone on with ---------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--scheduler", "plateau", "--data_augmentation"),
        ("--scheduler", "onecycle", "--accumulate", 2, "--clip_grad", 0.5),
        ("--warmup_epochs", 2, "--model", "unet-dropout", "--dropout_rate", 0.5),
        ("--freeze_encoder_epochs", 2, "--amp", "bf16", "--cache", "off"),
    ],
    ids=lambda options: " ".join(map(str, options)) or "defaults",
)
def test_a_run_that_goes_on_ends_as_one_that_was_never_stopped(
    data, tmp_path, monkeypatch, options
):
    if "unet-dropout" in options:  # it has no encoder to choose
        monkeypatch.setattr(sys.modules[__name__], "QUICK", QUICK[len(TINY) :])
        options = (*options, "--batch_size", 4)
    options = (*QUICK, "--epochs", 4, *options)
    whole = tmp_path / "whole"
    arguments = ("--dataset_root", data, *options)
    status, _, err = run_main(*arguments, "--save_dir", whole)
    assert status == 0, err
    status, _, err = stopped_in(3, monkeypatch, data, tmp_path / "parts", *options)
    assert status == 130 and "--resume continues the run" in err
    assert not (tmp_path / "parts" / "model_final_model.pth").exists()
    assert len(rows_of(tmp_path / "parts")) == 2
    more = ("--save_dir", tmp_path / "parts", "--resume")
    status, _, err = run_main(*arguments, *more)
    assert status == 0 and "resuming after epoch 2 of 4" in err
    for name in ("final_model", "best_combined", "best_loss", "last"):
        files = [tmp_path / run / f"model_{name}.pth" for run in ("whole", "parts")]
        one, other = (torch.load(file, weights_only=True) for file in files)
        assert same_weights(one, other)
    assert rows_of(whole, "seconds") == rows_of(tmp_path / "parts", "seconds")


def test_folds_go_on_too(data, tmp_path, monkeypatch):
    options = ("--val_strategy", "kfold", "--n_splits", 2, "--epochs", 2)
    whole = train(data, tmp_path / "whole", *options)
    # two epochs, validation and held-out patches of the first fold, an epoch of the second
    stopped_in(6, monkeypatch, data, tmp_path / "parts", *options)
    assert (tmp_path / "parts" / "fold_1" / "model_final_model.pth").exists()
    assert not (tmp_path / "parts" / "fold_2" / "model_final_model.pth").exists()
    done = train(data, tmp_path / "parts", *options, "--resume")
    assert same_weights(done.checkpoint(), whole.checkpoint())
    assert done.report["pooled"] == whole.report["pooled"]


def test_epochs_can_be_added_where_no_learning_rate_depends_on_them(data, tmp_path):
    options = ("--scheduler", "none")
    whole = train(data, tmp_path / "whole", *options, "--epochs", 3)
    train(data, tmp_path / "parts", *options, "--epochs", 2)
    done = train(data, tmp_path / "parts", *options, "--epochs", 3, "--resume")
    assert same_weights(done.checkpoint("last"), whole.checkpoint("last"))


def test_resume_without_a_run_starts_one(data, tmp_path):
    done = train(data, tmp_path, "--resume")
    assert "no run to resume" in done.err


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("--learning_rate", 0.5), r"another learning_rate (0.001, now 0.5)"),
        (("--epochs", 3), "another epochs (2, now 3)"),
        (("--seed", 1), "another seed"),
        (("--amp", "bf16"), "another amp"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_run_with_other_settings_is_not_gone_on_with(data, tmp_path, change, named):
    options = ("--dataset_root", data, "--save_dir", tmp_path, *QUICK, "--epochs", 2)
    assert run_main(*options, "--amp", "off")[0] == 0
    before = (tmp_path / "model_last.pth").read_bytes()
    status, _, err = run_main(*options, "--amp", "off", *change, "--resume")
    assert status == 1 and named in err.splitlines()[-1]
    assert (tmp_path / "model_last.pth").read_bytes() == before


def test_a_run_with_other_patches_is_not_gone_on_with(data, tmp_path):
    train(data, tmp_path)
    other = write_dataset(tmp_path / "other", 7, 4, 0, bands=3)
    given = ("--dataset_root", other, "--save_dir", tmp_path, *QUICK, "--resume")
    status, _, err = run_main(*given)
    assert status == 1 and "another patches" in err


def test_a_checkpoint_without_a_state_is_not_gone_on_with(data, tmp_path):
    train(data, tmp_path)
    (tmp_path / "model_best_loss.pth").replace(tmp_path / "model_last.pth")
    given = ("--dataset_root", data, "--save_dir", tmp_path, *QUICK, "--resume")
    status, _, err = run_main(*given)
    assert status == 1 and "does not hold the state of a run" in err


def test_the_last_state_is_a_model_too(data, tmp_path):
    done = train(data, tmp_path)
    assert set(done.checkpoint("last")) == {
        *("model_state_dict", "metadata", "training_state")
    }
    load_checkpoint(tmp_path / "model_last.pth")


def test_log_plot_and_state_are_there_after_every_epoch(data, tmp_path, monkeypatch):
    """The plot where an epoch takes a minute."""
    monkeypatch.setattr(epochs, "PLOT_SECONDS", 0)
    seen, plain = [], train_one_epoch

    def epoch(*arguments, **more):
        times = {
            name: (tmp_path / name).stat().st_mtime_ns
            for name in ("model_training_plot.png", "model_last.pth")
            if (tmp_path / name).exists()
        }
        rows = len(rows_of(tmp_path)) if times else 0
        seen.append((rows, times))
        return plain(*arguments, **more)

    patch_everywhere(monkeypatch, "training.loop.train_one_epoch", epoch)
    train(data, tmp_path, "--epochs", 3)
    assert [rows for rows, _ in seen] == [0, 1, 2]
    assert all(seen[1][1][name] < seen[2][1][name] for name in seen[1][1])
    assert len(seen[1][1]) == 2


def test_short_epochs_draw_no_plot_until_the_end(data, tmp_path, monkeypatch):
    drawn = []
    patch_everywhere(
        monkeypatch,
        "evaluation.reports.plot_training",
        lambda *call: drawn.append(call),
    )
    train(data, tmp_path, "--epochs", 3)
    assert len(drawn) == 1 and len(drawn[0][1]["history"]) == 3


def test_the_line_of_an_epoch_tells_the_time_left():
    rows = [
        {"epoch": number, "train_loss": 1.0, "learning_rate": 1e-3, "seconds": seconds}
        for number, seconds in ((1, 99.0), (2, 10.0), (3, 20.0))
    ]
    assert epoch_line(rows, 9, []).endswith("20.0 s  left 1:30")
    assert epoch_line(rows[:1], 100, []).endswith("left 2:43:21")


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name
)
def test_a_signal_leaves_the_best_model_and_no_final_one(data, tmp_path, number):
    words = ("--dataset_root", data, "--save_dir", tmp_path, *QUICK, "--epochs", 500)
    run = subprocess.Popen(
        [sys.executable, SCRIPT, *map(str, words), "--patience", "0"],
        stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    until = time.monotonic() + 120
    while not (tmp_path / "model_last.pth").exists():
        assert time.monotonic() < until and run.poll() is None
        time.sleep(0.1)
    run.send_signal(number)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("interrupted; the best model so far is")
    load_checkpoint(tmp_path / "model_best_combined.pth")
    load_checkpoint(tmp_path / "model_last.pth")
    assert not (tmp_path / "model_final_model.pth").exists()
    assert not list(tmp_path.glob(".*"))


# --- precision and steps --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("amp", "expected"), [("off", torch.float32), ("bf16", torch.bfloat16)]
)
def test_amp_is_the_precision_of_the_passes(data, tmp_path, monkeypatch, amp, expected):
    kinds, plain = set(), torch.nn.functional.conv2d

    def conv2d(images, weight, *arguments, **more):
        result = plain(images, weight, *arguments, **more)
        if torch.is_grad_enabled():
            kinds.add(result.dtype)
            assert weight.dtype == torch.float32
        return result

    monkeypatch.setattr(torch.nn.functional, "conv2d", conv2d)
    train(data, tmp_path, "--amp", amp)
    assert expected in kinds
    assert amp == "bf16" or kinds == {torch.float32}


def test_auto_is_the_native_precision():
    assert training_precision("auto", CPU) == native_precision(CPU)
    assert training_precision("off", CPU) == "fp32"
    with pytest.raises(OptionError, match="--amp fp16"):
        training_precision("fp16", CPU)


def test_batches_add_up_to_a_step_as_one_large_batch_does():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(10, 2, 8, 8, generator=generator)
    masks = torch.randint(0, 3, (10, 8, 8), generator=generator)
    loss = build_loss("ce", "multiclass", 255)
    weights = []
    for size, accumulate in ((4, 1), (2, 2)):
        torch.manual_seed(0)
        network = torch.nn.Conv2d(2, 3, 1)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        stepper = Stepper(optimizer, scaler, accumulate=accumulate)
        batches = list(zip(images.split(size), masks.split(size)))
        train_one_epoch(network, batches, loss, stepper, CPU)
        weights.append(network.weight.detach())
    torch.testing.assert_close(*weights)


def test_a_schedule_counts_steps_not_batches(data, tmp_path, monkeypatch):
    totals, plain = [], torch.optim.lr_scheduler.OneCycleLR.__init__

    def begin(self, *arguments, **more):
        totals.append(more["total_steps"])
        plain(self, *arguments, **more)

    monkeypatch.setattr(torch.optim.lr_scheduler.OneCycleLR, "__init__", begin)
    options = ("--scheduler", "onecycle", "--epochs", 2, "--batch_size", 2)
    train(data, tmp_path, *options, "--accumulate", 3)  # 4 batches: 2 steps
    assert totals == [4]


# --- preflight ------------------------------------------------------------------------------


def check(*options) -> tuple[int, str, str]:
    return run_main(*QUICK, *options, "--check")


def test_a_check_tells_what_a_run_will_take_and_leaves_nothing(data, tmp_path):
    out = tmp_path / "out"
    status, told, err = check("--dataset_root", data, "--save_dir", out)
    assert status == 0 and "error" not in err
    assert "patches       8 train, 4 validation" in told
    assert told.splitlines()[-1] == "No problems found."
    assert not out.exists()


def test_what_a_check_says_of_time_and_memory_is_measured(data, tmp_path):
    config = TrainingConfig(
        dataset_root=str(data), model="linknet", encoder_name=TINY[3],
        save_dir=str(tmp_path / "out"), device="cpu", epochs=7,
    )  # fmt: skip
    problems, found = check_experiment(config)
    assert not problems and found["patches"] == {"train": 8, "validation": 4}
    assert found["total_seconds"] == pytest.approx(7 * found["epoch_seconds"])
    model = build_model(config.model_config(3))
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["memory"] > 1e8
    folds = {"val_strategy": "kfold", "n_splits": 2}
    _, more = check_experiment(replace(config, **folds))
    assert more["total_seconds"] == pytest.approx(7 * more["epoch_seconds"] * 2)


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


def test_a_check_plans_the_folds(data, tmp_path):
    options = ("--dataset_root", data, "--save_dir", tmp_path / "out")
    folds = ("--val_strategy", "kfold", "--n_splits", 50)
    status, _, err = check(*options, *folds)
    assert status == 1 and "12 patches cannot make 50 folds" in err
