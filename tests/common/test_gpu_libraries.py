"""What is told to the libraries of a GPU, and what their errors mean."""

from __future__ import annotations

import threading

import pytest
import torch

from common.distributed import ProcessGroup, init_distributed, translate_torch_error
from prediction.predictor import Predictor

GPU = torch.device("cuda:0")
SCARCE = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(h)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("FIND was unable to find an engine to execute this computation"),
)  # fmt: skip


@pytest.mark.fault(27)
@pytest.mark.parametrize("error", SCARCE, ids=lambda error: str(error)[:24])
def test_memory_that_runs_out_within_a_library_of_cuda_is_known(error):
    message = translate_torch_error(error, GPU, "--batch_size")
    assert message == "The memory of cuda:0 is too small; lower --batch_size"
    predictor = object.__new__(Predictor)
    predictor.compile_batch = 0
    predictor._require_scarcity(error)  # it does not raise: batches are halved


def test_nccl_is_told_its_gpu(monkeypatch):
    """It would guess one at the first barrier, and warn in every run."""
    found = {}
    monkeypatch.setenv("WORLD_SIZE", "1")
    store = torch.distributed.HashStore()
    monkeypatch.setattr(
        "common.distributed.rendezvous", lambda *_, **__: iter([(store, 0, 1)])
    )
    dist = "torch.distributed."
    monkeypatch.setattr(
        f"{dist}init_process_group", lambda name, **more: found.update(more, name=name)
    )
    monkeypatch.setattr(
        f"{dist}new_group", lambda backend, timeout: f"group of {backend}"
    )
    monkeypatch.setattr(f"{dist}barrier", lambda: None)
    monkeypatch.setattr(f"{dist}destroy_process_group", lambda: None)
    for device, backend in ((GPU, "nccl"), (None, "gloo")):
        with init_distributed(device) as group:
            assert found["name"] == backend
            # signals are agreed on by the CPU, whose collectives wait for no GPU
            assert group.control == ("group of gloo" if device else None)
            assert found["device_id"] == device


def test_a_process_that_is_early_waits_outside_of_the_collective(monkeypatch):
    """A collective would end it after two hours, though nobody is lost."""
    store, entered = torch.distributed.HashStore(), []
    monkeypatch.setattr("torch.distributed.barrier", lambda: entered.append("barrier"))
    early = ProcessGroup(0, 2, store)
    waiting = threading.Thread(target=early.barrier)
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive() and not entered
    ProcessGroup(1, 2, store).barrier()
    waiting.join(10)
    assert entered == ["barrier"] * 2
