"""Which device a run gets."""

from __future__ import annotations

import pytest
import torch

from common.devices import (
    allow_tf32,
    free_memory,
    local_device,
    native_precision,
    pick_device,
    to_device,
)
from common.errors import OptionError, SegmentationError
from training.loop import training_precision


def test_the_device_defaults_to_the_gpu_where_there_is_one():
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert pick_device(None).type == expected
    assert pick_device("cpu").type == "cpu"


@pytest.mark.parametrize(
    ("name", "rank", "expected"),
    [
        (None, None, 0),
        ("cuda", None, 0),
        ("cuda:2", None, 2),
        (None, 3, 3),
        ("cuda", 3, 3),
    ],
)
def test_a_process_takes_its_own_gpu_and_makes_it_the_present_one(
    monkeypatch, name, rank, expected
):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", taken.append, raising=False)
    if rank is not None:
        monkeypatch.setenv("WORLD_SIZE", "8")
        monkeypatch.setenv("LOCAL_RANK", str(rank))
    assert local_device(name) == torch.device("cuda", expected)
    assert taken == [expected]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_an_error():
    with pytest.raises(SegmentationError, match="--device cuda.*--device cpu"):
        pick_device("cuda")


def test_a_gpu_that_this_build_ignores_is_reported(monkeypatch, tmp_path, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr("common.devices.NVIDIA_DRIVER", [str(tmp_path / "driver")])
    pick_device(None)
    assert "built for the CPU alone" not in caplog.text
    (tmp_path / "driver").touch()
    pick_device(None)
    assert "built for the CPU alone" in caplog.text
    with pytest.raises(SegmentationError, match="built for the CPU alone"):
        pick_device("cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    with pytest.raises(SegmentationError, match="has 0 GPUs; use"):
        pick_device("cuda")


def test_a_gpu_of_apple_computes_in_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(SegmentationError, match="--device mps.*--device cpu"):
        pick_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    device = pick_device("mps")
    assert device.type == "mps" and native_precision(device) == "fp32"
    assert training_precision("auto", device) == "fp32"
    for amp in ("fp16", "bf16"):
        with pytest.raises(OptionError, match="auto or off on mps"):
            training_precision(amp, device)


@pytest.mark.parametrize(
    ("kind", "dtype", "sent", "waits"),
    [
        ("mps", torch.float64, torch.float32, True),
        ("mps", torch.uint16, torch.float32, True),
        ("mps", torch.int16, torch.int16, True),
        ("cuda", torch.float64, torch.float64, False),
        ("cpu", torch.uint16, torch.uint16, True),
    ],
)
def test_only_a_gpu_of_nvidia_copies_without_waiting(
    monkeypatch, kind, dtype, sent, waits
):
    def to(tensor, device, non_blocking):
        return device.type, tensor.dtype, not non_blocking

    tensor = torch.ones(2).to(dtype)
    monkeypatch.setattr(torch.Tensor, "to", to)
    assert to_device(tensor, torch.device(kind)) == (kind, sent, waits)


def test_torchrun_knows_no_gpu_of_apple(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(OptionError, match="--device mps.*cuda or cpu"):
        local_device("mps")


def test_what_pytorch_keeps_of_a_gpu_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 200)
    assert free_memory(torch.device("cuda", 0)) == 1300


def test_tf32_is_on_only_where_it_is_asked_for():
    kinds = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [kind.allow_tf32 for kind in kinds]
    for precision, expected in (("tf32", True), ("fp32", False), ("bf16", False)):
        allow_tf32(precision)
        # PyTorch's export to ONNX reads them too, and fails where they cannot be read
        assert [kind.allow_tf32 for kind in kinds] == [expected] * 2
    for kind, value in zip(kinds, before):
        kind.allow_tf32 = value


def test_a_device_that_does_not_exist_is_a_wrong_option():
    with pytest.raises(OptionError, match="--device gpu"):
        pick_device("gpu")


def test_a_device_that_computes_nothing_is_a_wrong_option():
    with pytest.raises(SegmentationError, match="--device meta"):
        pick_device("meta")
