"""How models get to a device that is not the CPU."""

from __future__ import annotations

import pytest
import torch
from helpers import write_model

from common.errors import SegmentationError
from prediction import ensemble
from prediction.settings import PredictionConfig


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> PredictionConfig:
    """The settings of a prediction on a device that is not the CPU, as far as models go."""
    write_model(tmp_path / "m.pth")
    monkeypatch.setattr(ensemble, "local_device", lambda _: torch.device("meta"))
    return PredictionConfig([str(tmp_path / "m.pth")], "s.tif", "o.tif")


def test_models_are_fused_on_the_cpu_where_float32_is_not_rounded(
    elsewhere, monkeypatch
):
    plain, places = ensemble.fuse_batch_norm, []

    def fuse(model, in_channels):
        places.append(next(model.parameters()).device.type)
        return plain(model, in_channels)

    monkeypatch.setattr(ensemble, "fuse_batch_norm", fuse)
    (checkpoint,) = ensemble.load_models(elsewhere).checkpoints
    assert places == ["cpu"]
    assert next(checkpoint.model.parameters()).device.type == "meta"
    modules = checkpoint.model.modules()
    assert not any(isinstance(one, torch.nn.BatchNorm2d) for one in modules)


def test_a_gpu_without_memory_for_the_models_is_one_line(elsewhere, monkeypatch):
    plain = torch.nn.Module.to

    def to(model, *arguments, **options):
        if torch.device("meta") in arguments:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(model, *arguments, **options)

    monkeypatch.setattr(torch.nn.Module, "to", to)
    with pytest.raises(SegmentationError, match="^The memory of meta is too small; .*"):
        ensemble.load_models(elsewhere)
