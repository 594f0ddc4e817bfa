"""Which device a run gets."""

from __future__ import annotations

import pytest
import torch

from common.devices import local_device, pick_device
from common.errors import OptionError, SegmentationError


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


def test_a_device_that_does_not_exist_is_a_wrong_option():
    with pytest.raises(OptionError, match="--device gpu"):
        pick_device("gpu")


def test_a_device_that_computes_nothing_is_a_wrong_option():
    with pytest.raises(SegmentationError, match="--device meta"):
        pick_device("meta")
