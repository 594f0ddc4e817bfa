"""Scenes, models and surroundings of the tests of prediction."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from prediction_helpers import (
    DESCRIPTIONS,
    LAYERS,
    PixelModel,
    make_pixel_model,
    noise,
    small_network,
    write_scene,
)
from torch import nn

from common.architectures import ModelConfig
from model_training import Normalization, build_model, save_checkpoint
from prediction.predictor import Predictor
from prediction.rowstore import RowStore


@pytest.fixture(autouse=True)
def _small_network():
    with small_network():
        yield


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def land(models) -> PixelModel:
    """Four classes of three bands, with names and band descriptions."""
    return make_pixel_model(
        models / "land.pth",
        [[6, -3, 0], [-2, 7, 1], [0, -4, 6], [1, 1, -5]],
        [0.5, -1.5, 0, 1],
        class_names=["water", "forêt", "bare soil", "town"],
        band_descriptions=list(DESCRIPTIONS),
    )


@pytest.fixture(scope="session")
def water(models) -> PixelModel:
    """A binary model of three bands."""
    return make_pixel_model(models / "water.pth", [[3, -4, 2]], [-0.4])


@pytest.fixture(scope="session")
def spatial(models) -> Path:
    """A three-class network of random weights that looks far beyond a pixel."""
    torch.manual_seed(3)
    config = ModelConfig("unet-dropout", 3, 3, None)
    with small_network():
        model = build_model(config)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.rand(4, 3, 64, 64))  # gives the layers statistics
        model.network.head.weight *= 8
    path = models / "spatial.pth"
    numbers = Normalization("dataset", (0,) * 3, (10_000,) * 3)
    save_checkpoint(path, model, config, numbers, {})
    return path


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Networks this small are faster on one thread when the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _logging_as_before():
    """A script points the root logger at the stderr of one test; undo that."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


@pytest.fixture
def batches(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes (N, C, h, w) of all batches that a run predicts."""
    shapes: list[tuple[int, ...]] = []
    predict = Predictor.__call__

    def recorded(predictor, images, valid):
        shapes.append(tuple(images.shape))
        return predict(predictor, images, valid)

    monkeypatch.setattr(Predictor, "__call__", recorded)
    return shapes


@pytest.fixture
def scene(tmp_path) -> Path:
    """100 x 90 pixels of noise with a corner of declared nodata."""
    pixels = noise(100, 90)
    pixels[:, :20, :25] = 0
    return write_scene(tmp_path / "scene.tif", pixels, DESCRIPTIONS, nodata=0)


@pytest.fixture
def partial(tmp_path) -> Path:
    """An unfinished map of 90 x 41 pixels of which nothing is there yet."""
    folder = tmp_path / ".map.tif-partial"
    RowStore.begin(folder, {"what": "a test"}, LAYERS, (90, 41))
    return folder


@pytest.fixture
def tall_scene(tmp_path) -> Path:
    """300 x 100 pixels: 6 windows down, 2 across."""
    pixels = noise(300, 100)
    pixels[:, 100:180, :70] = 0
    return write_scene(tmp_path / "tall.tif", pixels, nodata=0)
