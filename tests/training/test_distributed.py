"""The processes of torchrun: a group of PyTorch's, gradients averaged, losses per process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    QUICK,
    ROOT,
    Outcome,
    run_main,
    same_weights,
    torchrun,
    train,
    write_dataset,
)
from torch.utils.data import DataLoader

from common.devices import native_precision
from common.distributed import (
    LOST_PROCESS,
    ProcessGroup,
    has_unused_parameters,
    init_distributed,
    torch_errors,
    translate_torch_error,
)
from common.errors import DatasetError, SegmentationError
from common.patches import list_pairs
from model_training import ModelConfig, Normalization, build_model, load_checkpoint
from training.loaders import make_loader
from training.samples import PatchDataset, index_samples
from training.settings import TrainingConfig

CPU, RULE = torch.device("cpu"), Normalization("image")
# main.py, whose unet-dropout is a network without batch norm and dropout
POINTWISE = """
import sys
from torch import nn
import model_training

def build(config, weights):
    return nn.Sequential(
        nn.Conv2d(config.in_channels, 16, 1), nn.ReLU(), nn.Conv2d(16, config.num_classes, 1)
    )

model_training.BUILDERS["unet-dropout"] = build
import main
sys.exit(main.main(sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data"), 8, 4, 2, bands=3)


# --- one process ----------------------------------------------------------------------------


def test_without_torchrun_there_is_no_group_of_pytorch():
    with init_distributed() as group:
        assert not torch.distributed.is_initialized()
        assert group.is_main_process and group.size == 1
        assert group.broadcast(max, 3, 5) == 5
        numbers = torch.ones(2)
        group.all_reduce(numbers)
        group.barrier()
        assert numbers.tolist() == [1, 1]


def test_one_process_of_torchrun_is_a_group(one_of_one):
    with init_distributed() as group:
        assert torch.distributed.is_initialized()
        assert group.is_main_process and group.size == 1 and group.store
        assert group.broadcast(max, 3, 5) == 5
        numbers = torch.ones(2)
        group.all_reduce(numbers)
        assert numbers.tolist() == [1, 1]
    assert not torch.distributed.is_initialized()


def test_one_process_of_torchrun_gives_the_numbers_of_a_run_without_it(
    data, tmp_path, one_of_one, monkeypatch
):
    options = ("--epochs", 2, "--accumulate", 2, "--batch_size", 2)
    options = (*options, "--freeze_encoder_epochs", 1)
    grouped = train(data, tmp_path / "grouped", *options)
    monkeypatch.delenv("WORLD_SIZE")
    alone = train(data, tmp_path / "alone", *options)
    assert same_weights(grouped.checkpoint("last"), alone.checkpoint("last"))
    assert grouped.report["validation"] == alone.report["validation"]


def test_decoders_that_leave_encoder_layers_unused_are_known():
    for name, unused in (("linknet", False), ("pspnet", True)):
        model = build_model(ModelConfig(name, 3, 2, "tu-mobilenetv3_small_050"))
        assert has_unused_parameters(model, CPU, 3) is unused
        assert model.training
        assert all(parameter.grad is None for parameter in model.parameters())


def test_too_few_patches_for_the_processes_are_an_error(data):
    index = index_samples(list_pairs(data, "train"), 2, 255)
    dataset = PatchDataset(index.subset([0]), 255)
    config = TrainingConfig(dataset_root="data", model="unet")
    with pytest.raises(DatasetError, match="too few for 2 processes"):
        make_loader(dataset, RULE, config, ProcessGroup(1, 2), CPU, training=True)


def test_each_process_evaluates_batches_of_its_own(data):
    index = index_samples(list_pairs(data, "train"), 2, 255)
    dataset = PatchDataset(index, 255)
    config = TrainingConfig(dataset_root="data", model="unet", batch_size=3)
    parts = [
        [
            i
            for batch in make_loader(dataset, RULE, config, group, CPU).batch_sampler
            for i in batch
        ]
        for group in (ProcessGroup(0, 2), ProcessGroup(1, 2))
    ]
    assert parts == [[0, 1, 2, 6, 7], [3, 4, 5]]


# --- errors of torch ------------------------------------------------------------------------


class Unreadable(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index):
        raise DatasetError("patch_3.tif cannot be read")


class Killed(Unreadable):
    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        (Unreadable(), "^patch_3.tif cannot be read$"),
        (Killed(), "reads patches was killed .*; lower --batch_size$"),
    ],
)
def test_errors_of_processes_that_read_patches_are_one_line(dataset, words):
    with (
        pytest.raises(SegmentationError, match=words),
        torch_errors(CPU, "--batch_size"),
    ):
        list(DataLoader(dataset, num_workers=1))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB"),
            "The memory of cpu is too small; lower --batch_size",
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"),
            "The memory of cpu is too small; lower --batch_size",
        ),
        (torch.distributed.DistNetworkError("recv failed"), LOST_PROCESS),
        (
            RuntimeError("Pin memory thread exited unexpectedly"),
            "A process that reads patches was killed (out of memory?); lower --batch_size",
        ),
        (
            RuntimeError("[gloo/transport/tcp/pair.cc:5] Connection closed"),
            LOST_PROCESS,
        ),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (SegmentationError("No images found"), None),
    ],
)
def test_errors_of_torch_say_what_to_do(error, expected):
    assert translate_torch_error(error, CPU, "--batch_size") == expected
    with (
        pytest.raises(SegmentationError if expected else type(error)) as caught,
        torch_errors(CPU, "--batch_size"),
    ):
        raise error
    assert str(caught.value) == (expected or str(error))


def test_what_a_gpu_of_apple_cannot_compute_is_named():
    error = RuntimeError("Adaptive pool MPS: input sizes must be divisible\nmore")
    message = translate_torch_error(error, torch.device("mps"), "--batch_size")
    assert message == (
        "mps cannot compute this model (Adaptive pool MPS: input sizes must be divisible); "
        "use --device cpu"
    )
    assert translate_torch_error(error, CPU, "--batch_size") is None


# --- two processes --------------------------------------------------------------------------


def words(root: Path, save_dir: Path, *options) -> list[str]:
    given = ("--dataset_root", root, "--save_dir", save_dir, *QUICK, *options)
    return [str(word) for word in given]


def train_in_two(root: Path, save_dir: Path, *options, script="main.py") -> Outcome:
    """Train by two processes of torchrun; it must succeed."""
    run = torchrun(2, [str(ROOT / script), *words(root, save_dir, *options)])
    out, err = run.communicate(timeout=300)
    assert run.returncode == 0, err
    return Outcome(0, save_dir, out, err)


@pytest.fixture(scope="module")
def pointwise(tmp_path_factory):
    """A script that trains a network without batch norm."""
    script = tmp_path_factory.mktemp("script") / "pointwise.py"
    path = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
    script.write_text(path + POINTWISE)
    return script


WITHOUT_NORM = ("--model", "unet-dropout", "--encoder_name", "resnet34", "--loss", "ce")


def train_pointwise(script: Path, root: Path, save_dir: Path, *options) -> Outcome:
    import sys

    arguments = words(root, save_dir, *options)
    done = subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True, check=True
    )
    return Outcome(0, save_dir, done.stdout, done.stderr)


@pytest.mark.slow
def test_two_processes_without_batch_norm_have_the_losses_of_one(
    data, tmp_path, pointwise
):
    options = (*WITHOUT_NORM, "--epochs", 4, "--amp", "off", "--accumulate", 2)
    options = (*options, "--mode", "multiclass", "--learning_rate", 0.01)
    alone = train_pointwise(
        pointwise, data, tmp_path / "1", *options, "--batch_size", 4
    )
    two = train_in_two(
        data, tmp_path / "2", *options, "--batch_size", 2, script=pointwise
    )
    for key in ("train_loss", "val_loss"):
        losses = [[row[key] for row in run.report["history"]] for run in (alone, two)]
        assert losses[0][-1] < losses[0][0]
        assert losses[1] == pytest.approx(losses[0], abs=1e-4)


@pytest.mark.slow
def test_the_validation_matrix_of_two_processes_is_that_of_one(
    data, tmp_path, pointwise
):
    """Steps of no size: the weights stay equal."""
    options = (*WITHOUT_NORM, "--learning_rate", 1e-30, "--weight_decay", 0)
    options = (*options, "--amp", "off", "--mode", "multiclass", "--batch_size", 2)
    alone = train_pointwise(pointwise, data, tmp_path / "1", *options)
    two = train_in_two(data, tmp_path / "2", *options, script=pointwise)
    assert same_weights(alone.checkpoint("last"), two.checkpoint("last"))
    for name in ("best_loss", "final_model"):
        matrices = [
            run.metadata(name)["performance_metrics"]["validation"]["confusion_matrix"]
            for run in (alone, two)
        ]
        assert matrices[0] == matrices[1]
        assert np.sum(matrices[0]) == 4 * 32 * 32


@pytest.mark.slow
def test_two_processes_converge_as_one_does(tmp_path):
    """The defaults, with batch norm over half a batch each."""
    root = write_dataset(tmp_path / "data", 16, 8, 0, bands=3, size=64)
    options = ("--model", "unet", "--encoder_name", "resnet18", "--epochs", 12)
    alone = train(root, tmp_path / "1", *options, "--batch_size", 8)
    two = train_in_two(root, tmp_path / "2", *options)
    ends = [run.report["history"][-1]["val_loss"] for run in (alone, two)]
    starts = [run.report["history"][0]["val_loss"] for run in (alone, two)]
    assert max(ends) < 0.5 * min(starts)
    assert ends[1] == pytest.approx(ends[0], rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("amp", ["auto", "bf16"])
def test_two_processes_train_by_default_options_and_report_once(data, tmp_path, amp):
    if amp == "bf16" and native_precision(CPU) == "bf16":
        pytest.skip("auto is bf16 here")
    done = train_in_two(data, tmp_path, "--amp", amp, "--num_workers", "auto")
    assert done.out.count("Validation") == 1 and done.err.count("epoch    1/1") == 1
    assert np.sum(done.report["test"]["confusion_matrix"]) == 2 * 32 * 32
    load_checkpoint(tmp_path / "model_final_model.pth")


@pytest.mark.slow
def test_two_processes_cross_validate(data, tmp_path):
    folds = ("--val_strategy", "kfold", "--n_splits", 2, "--num_workers", 1)
    done = train_in_two(data, tmp_path, *folds)
    assert np.sum(done.report["pooled"]["confusion_matrix"]) == 12 * 32 * 32
    assert len(done.report["folds"]) == 2
    for folder in ("fold_1", "fold_2", "."):
        load_checkpoint(tmp_path / folder / "model_final_model.pth")


def worker_processes(run: subprocess.Popen) -> list[int]:
    """The processes that a torchrun has started, the main one first."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            parts = entry.read_bytes().split(b"\0")
            parent = (entry.parent / "stat").read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue
        if int(parent) == run.pid:
            rank = next(int(p[5:]) for p in parts if p.startswith(b"RANK="))
            found.append((rank, int(entry.parent.name)))
    return [process for _, process in sorted(found)]


def kill_after_an_epoch(state: Path, endless: list[str], rank: int) -> None:
    """Train by two processes, and kill one when it has stored an epoch more."""
    before = state.stat().st_mtime_ns if state.exists() else None
    run = torchrun(2, [str(ROOT / "main.py"), *endless])
    until = time.monotonic() + 240
    while not state.exists() or state.stat().st_mtime_ns == before:
        assert time.monotonic() < until and run.poll() is None
        time.sleep(0.1)
    os.kill(worker_processes(run)[rank], signal.SIGKILL)
    _, err = run.communicate(timeout=120)
    assert run.returncode != 0
    ours = [line for line in err.splitlines() if line.startswith(("error:", "interru"))]
    assert len(ours) <= 1
    assert all("--resume" in line for line in ours)
    assert 'main.py", line' not in err  # the only traceback is torchrun's own
    for file in state.parent.glob("*.pth"):
        load_checkpoint(file)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_a_killed_process_ends_the_run_which_can_be_resumed(data, tmp_path):
    options = ("--patience", 0, "--scheduler", "none")
    endless = words(data, tmp_path, *options, "--epochs", 1000, "--resume")
    for rank in (0, 1):  # the other one in the run that goes on
        kill_after_an_epoch(tmp_path / "model_last.pth", endless, rank)
    rows = torch.load(tmp_path / "model_last.pth", weights_only=True)
    done_before = len(rows["training_state"]["rows"])
    epochs = done_before + 2
    done = train_in_two(data, tmp_path, *options, "--epochs", epochs, "--resume")
    assert f"resuming after epoch {done_before} of {epochs}" in done.err
    assert len(done.report["history"]) == epochs
    assert not list(tmp_path.glob(".*"))
    whole = train_in_two(data, tmp_path / "whole", *options, "--epochs", epochs)
    assert same_weights(done.checkpoint("last"), whole.checkpoint("last"))


@pytest.mark.slow
def test_another_number_of_processes_cannot_resume_a_run(data, tmp_path):
    train_in_two(data, tmp_path)
    status, _, err = run_main(*words(data, tmp_path, "--resume"))
    assert status == 1
    assert "another processes (2, now 1)" in err.splitlines()[-1]
    assert json.loads((tmp_path / "model_metrics.json").read_text())
