"""Runs that are interrupted and resumed."""

from __future__ import annotations

import contextlib
import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import rasterio
import torch
from helpers import (
    QUICK,
    ROOT,
    TINY,
    Outcome,
    patch_everywhere,
    run_main,
    same_weights,
    settings,
    train,
    write_dataset,
)

from common.distributed import ProcessGroup
from model_training import load_checkpoint
from training import epochs, loop
from training.epochs import epoch_line
from training.loop import train_one_epoch
from training.resume import KNOWN_SINCE_2_0, drop_outdated
from training.run import TrainingRun

SCRIPT = str(ROOT / "main.py")


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


# --- interrupted and resumed ----------------------------------------------------------------


def slow(*options):
    return pytest.param(options, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "options",
    [
        (),
        slow("--scheduler", "plateau", "--data_augmentation"),
        ("--scheduler", "onecycle", "--accumulate", 2, "--clip_grad", 0.5),
        slow("--warmup_epochs", 2, "--model", "unet-dropout", "--dropout_rate", 0.5),
        slow("--freeze_encoder_epochs", 2, "--amp", "bf16", "--cache", "off"),
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_folds_that_go_on_with_more_patience_give_a_final_model_of_more_epochs(
    small_data, tmp_path, monkeypatch
):
    def kfold(patience, scores, *more) -> Outcome:
        given = iter(scores)
        monkeypatch.setattr(epochs, "combined_score", lambda _: next(given))
        options = ("--val_strategy", "kfold", "--n_splits", 2, "--epochs", 3)
        return train(small_data, tmp_path, *options, "--patience", patience, *more)

    assert kfold(1, (0.2, 0.1) * 2).report["final_epochs"] == 1
    stored = torch.load(tmp_path / "model_last.pth", weights_only=True)
    stored["training_state"]["run_fingerprint"]["epochs"] = 1  # as 1.1 did
    torch.save(stored, tmp_path / "model_last.pth")
    done = kfold(5, (0.3, 0.3), "--resume")
    assert "resuming after epoch 1 of 3" in done.err
    assert done.report["final_epochs"] == len(done.report["history"]) == 3


@pytest.mark.parametrize(
    ("number", "rates", "stays"),
    [
        (2, [], True),
        (3, [], True),
        (1, [], False),
        (3, [0.2, 0.1, 0.1], True),
        (3, [0.2, 0.2, 0.1], False),
    ],
)
def test_a_final_model_that_the_folds_want_otherwise_is_begun_anew(
    tmp_path, number, rates, stays
):
    file = tmp_path / "model_last.pth"
    rows = [{"learning_rate": 0.2}, {"learning_rate": 0.1}]
    state = {"rows": rows, "run_fingerprint": {"epochs": 3}}
    torch.save({"training_state": state}, file)
    config = settings(resume=True)
    drop_outdated(TrainingRun(config, None, None, tmp_path, [], number, "cpu", rates=rates))  # fmt: skip
    assert file.exists() == stays


@pytest.mark.slow
def test_epochs_can_be_added_where_no_learning_rate_depends_on_them(data, tmp_path):
    options = ("--scheduler", "none")
    whole = train(data, tmp_path / "whole", *options, "--epochs", 3)
    train(data, tmp_path / "parts", *options, "--epochs", 2)
    options = (*options, "--cache", "off")  # which changes no pixel
    done = train(data, tmp_path / "parts", *options, "--epochs", 3, "--resume")
    assert same_weights(done.checkpoint("last"), whole.checkpoint("last"))


@pytest.mark.parametrize(
    ("before", "now", "used"),
    [
        (["bf16"], [], "fp32"),
        (["bf16"], ["fp16"], "fp16"),
        (["fp16"], ["bf16", "fp16"], "fp16"),
        ([], ["bf16"], "fp32"),
    ],
)
def test_a_run_goes_on_where_the_device_computes_in_another_precision(
    small_data, tmp_path, monkeypatch, before, now, used
):
    options = ("--scheduler", "none", "--epochs")
    native = "common.devices.native_precisions"
    patch_everywhere(monkeypatch, native, lambda device: before)
    train(small_data, tmp_path, *options, 1)
    stored = torch.load(tmp_path / "model_last.pth", weights_only=True)
    if scaler := stored["training_state"]["scaler"]:
        scaler["scale"] = 8.0
    torch.save(stored, tmp_path / "model_last.pth")
    patch_everywhere(monkeypatch, native, lambda device: now)
    err = train(small_data, tmp_path, *options, 2, "--resume").err
    assert ("the run began in bf16, in which cpu does not" in err) == ("bf16" in before)
    state = torch.load(tmp_path / "model_last.pth", weights_only=True)["training_state"]
    assert state["run_fingerprint"]["precision"] == used
    assert len(state["rows"]) == 2
    assert bool(state["scaler"]) == (used == "fp16")
    assert (state["scaler"].get("scale") == 8) == (before == ["fp16"])


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


@pytest.mark.parametrize(
    ("patches", "bands", "named"),
    [(7, 3, "patches"), (8, 4, "patch_shape ([3, 32, 32], now [4, 32, 32])")],
)
def test_a_run_with_other_patches_is_not_gone_on_with(
    data, tmp_path, patches, bands, named
):
    train(data, tmp_path)
    other = write_dataset(tmp_path / "other", patches, 4, 0, bands=bands)
    given = ("--dataset_root", other, "--save_dir", tmp_path, *QUICK, "--resume")
    status, _, err = run_main(*given)
    assert status == 1 and f"another {named}" in err


def doubled(file) -> None:
    file.write(file.read() * 2)


def turned(file) -> None:
    for band, name in enumerate(("B4", "B3", "B2"), start=1):
        file.set_band_description(band, name)


@pytest.mark.parametrize(
    ("change", "named"), [(doubled, "pixel_values"), (turned, "band_descriptions")]
)
def test_a_run_with_other_images_of_the_same_names_is_not_gone_on_with(
    data, tmp_path, change, named
):
    root = shutil.copytree(data, tmp_path / "data")
    train(root, tmp_path / "run")
    for image in root.rglob("images/*.tif"):
        with rasterio.open(image, "r+") as file:
            change(file)
    given = ("--dataset_root", root, "--save_dir", tmp_path / "run", *QUICK, "--resume")
    status, _, err = run_main(*given)
    assert status == 1 and f"another {named}" in err.splitlines()[-1]


def test_a_checkpoint_without_a_state_is_not_gone_on_with(data, tmp_path):
    train(data, tmp_path)
    (tmp_path / "model_best_loss.pth").replace(tmp_path / "model_last.pth")
    given = ("--dataset_root", data, "--save_dir", tmp_path, *QUICK, "--resume")
    status, _, err = run_main(*given)
    assert status == 1 and "does not hold the state of a run" in err


def as_version_1_1(save_dir: Path, **changes) -> None:
    """Store the state of a run as version 1.1 did."""
    file = save_dir / "model_last.pth"
    stored = torch.load(file, weights_only=True)
    state = stored["training_state"]
    state["belongs_to"] = state.pop("run_fingerprint") | changes
    for key in KNOWN_SINCE_2_0:
        del state["belongs_to"][key]
    torch.save(stored, file)


def test_a_run_of_version_1_1_is_resumed(data, tmp_path):
    train(data, tmp_path, "--epochs", 2, "--scheduler", "none")
    as_version_1_1(tmp_path)
    options = ("--scheduler", "none", "--resume", "--epochs", 3)
    assert "resuming after epoch 2 of 3" in train(data, tmp_path, *options).err


def test_a_run_of_version_1_1_by_several_processes_is_refused(
    data, tmp_path, monkeypatch
):
    train(data, tmp_path)
    as_version_1_1(tmp_path, processes=2)
    group = contextlib.nullcontext(ProcessGroup(0, 2))
    patch_everywhere(
        monkeypatch, "common.distributed.init_distributed", lambda _: group
    )
    given = ("--dataset_root", data, "--save_dir", tmp_path, *QUICK, "--resume")
    status, _, err = run_main(*given)
    assert status == 1
    assert "2 processes of version 1.1" in err and "start again with --overwrite" in err


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
@pytest.mark.slow
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
    assert run.returncode == 128 + number
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("interrupted; the best model so far is")
    load_checkpoint(tmp_path / "model_best_combined.pth")
    load_checkpoint(tmp_path / "model_last.pth")
    assert not (tmp_path / "model_final_model.pth").exists()
    assert not list(tmp_path.glob(".*"))
