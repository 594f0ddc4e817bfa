"""What turns windows into probabilities: normalization, views, temperature, memory that runs out."""

from __future__ import annotations

import logging
import weakref

import numpy as np
import pytest
import rasterio
import torch
from prediction_helpers import (
    CPU,
    PixelModel,
    confidence_of,
    entropy_share,
    forward,
    image_rule,
    make_model,
    noise,
    read_map,
    run,
    whole_scene,
    write_legacy,
    write_scene,
)
from torch import nn

from common.architectures import TTA_TRANSFORMS, ModelConfig
from common.errors import SegmentationError
from model_training import Checkpoint, Normalization, load_checkpoint
from prediction.predictor import Predictor

# --- normalization ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "number"),
    [("metadata", int), ("config", np.int64)],
    ids=["first", "second"],
)
def test_a_checkpoint_without_statistics_is_predicted_by_the_image_rule(
    land, tmp_path, key, number
):
    legacy = write_legacy(tmp_path / "legacy.pth", land, key, number)
    pixels = noise(64, 64) // 2
    pixels[:, :, 40:] = 65535  # brighter than all, and no part of the percentile
    scene = write_scene(tmp_path / "scene.tif", pixels, nodata=65535)
    assert run(legacy, scene, tmp_path / "map.tif", "--save_confidence") == 0
    confidence = read_map(tmp_path / "map_confidence.tif")[:, :40]
    expected = land.classify(image_rule(pixels[:, :, :40]))
    np.testing.assert_allclose(confidence, expected.max(axis=0), atol=2e-6)
    other = land.probabilities(pixels[:, :, :40]).max(axis=0)
    assert abs(confidence - other).max() > 0.1
    with rasterio.open(tmp_path / "map.tif") as file:
        assert file.tags()["NORMALIZATION"] == "image"


def test_the_image_rule_takes_its_percentile_in_every_window(land, tmp_path):
    legacy = write_legacy(tmp_path / "legacy.pth", land, "metadata")
    pixels = noise(50, 96)
    pixels[:, :, 48:] //= 3
    scene = write_scene(tmp_path / "scene.tif", pixels)
    window = ("--patch_size", "50", "--overlap", "20")
    output = tmp_path / "map.tif"
    assert run(legacy, scene, output, *window, "--save_confidence") == 0
    expected = whole_scene(
        pixels.astype(np.float32),
        lambda images: land.classify(image_rule(images[0]))[None],
        50,
        20,
    )
    confidence = read_map(tmp_path / "map_confidence.tif")
    np.testing.assert_allclose(confidence, expected.max(axis=0), atol=3e-6)


def test_values_beyond_the_training_percentiles_are_clipped(land, tmp_path):
    pixels = np.full((3, 32, 32), 20_000, np.float32)
    pixels[:, :16] = -500
    scene = write_scene(tmp_path / "scene.tif", pixels)
    assert run(land.path, scene, tmp_path / "map.tif", "--save_confidence") == 0
    confidence = read_map(tmp_path / "map_confidence.tif")
    for rows, value in ((slice(16), 0.0), (slice(16, None), 1.0)):
        expected = land.classify(np.full((3, 1, 1), value)).max()
        np.testing.assert_allclose(confidence[rows], expected, atol=2e-6)


# --- views ------------------------------------------------------------------------------


TURNED = {
    "flip": [lambda a: a, np.fliplr, np.flipud, lambda a: np.flipud(np.fliplr(a))],
    "d4": [
        lambda a: a,
        np.fliplr,
        np.flipud,
        lambda a: np.flipud(np.fliplr(a)),
        lambda a: np.swapaxes(a, 0, 1),
        lambda a: np.fliplr(np.swapaxes(a, 0, 1)),
        lambda a: np.flipud(np.swapaxes(a, 0, 1)),
        lambda a: np.flipud(np.fliplr(np.swapaxes(a, 0, 1))),
    ],
}


def averaged(predict, image: np.ndarray, views: str) -> np.ndarray:
    """The mean (K, H, W) over views of (C, H, W), each turned back by what undoes it."""
    height, width = image.shape[1:]
    places = np.arange(height * width).reshape(height, width)
    total = 0
    for turn in TURNED[views]:
        view = np.moveaxis(turn(np.moveaxis(image, 0, -1)), -1, 0)
        result = predict(view)
        back = np.empty((len(result), height * width))
        back[:, turn(places).ravel()] = result.reshape(len(result), -1)
        total = total + back.reshape(-1, height, width)
    return total / len(TURNED[views])


@pytest.mark.parametrize("views", TURNED)
@pytest.mark.parametrize("shape", [(64, 64), (64, 96)])
def test_views_are_averaged(spatial, tmp_path, views, shape):
    pixels = noise(*shape)
    scene = write_scene(tmp_path / "scene.tif", pixels)
    window = ("--patch_size", "96", "--tta", views, "--save_confidence")
    assert run(spatial, scene, tmp_path / "map.tif", *window) == 0
    expected = averaged(lambda view: forward(spatial, view), pixels / 10_000, views)
    found = confidence_of(tmp_path)
    np.testing.assert_allclose(found, expected.max(axis=0), atol=1e-5)
    plain = forward(spatial, pixels / 10_000)
    assert abs(found - plain.max(axis=0)).max() > 1e-3


def test_the_views_of_d4_are_eight_different_ones_and_flip_four_of_them():
    image = torch.arange(6.0).reshape(1, 2, 3)
    seen = set()
    for turns, mirrored in TTA_TRANSFORMS["d4"]:
        view = (image.flip(-1) if mirrored else image).rot90(turns, (-2, -1))
        seen.add(tuple(map(tuple, view[0].tolist())))
    assert len(seen) == 8
    assert set(TTA_TRANSFORMS["flip"]) < set(TTA_TRANSFORMS["d4"])
    assert TTA_TRANSFORMS["none"] == [(0, False)]


@pytest.mark.parametrize("views", ["none", "d4"])
def test_d4_maps_a_turned_scene_as_the_turned_map(spatial, views):
    checkpoint = load_checkpoint(spatial)
    predict = Predictor([checkpoint], CPU, tta=views)
    image = torch.from_numpy(noise(64, 64)).float()[None]
    valid = torch.rand(1, 64, 64) > 0.1
    straight = predict(image, valid)
    turned = predict(
        image.rot90(1, (-2, -1)).flip(-1), valid.rot90(1, (-2, -1)).flip(-1)
    )
    difference = (turned - straight.rot90(1, (-2, -1)).flip(-1)).abs().max()
    assert (difference < 1e-5) == (views == "d4")


def test_a_pixel_model_is_the_same_in_every_view(land, scene, tmp_path):
    found = []
    for views in ("none", "flip", "d4"):
        options = ("--tta", views, "--save_confidence", "--overwrite")
        assert run(land.path, scene, tmp_path / "map.tif", *options) == 0
        found.append(confidence_of(tmp_path))
    np.testing.assert_allclose(found[1], found[0], atol=1e-6)
    np.testing.assert_allclose(found[2], found[0], atol=1e-6)


@pytest.mark.fault(20)
def test_views_of_several_models_with_uncertainty(spatial, land, tmp_path):
    checkpoints = [load_checkpoint(spatial)] * 2
    predict = Predictor(checkpoints, CPU, tta="flip", expected_entropy=True)
    image = noise(64, 64)
    found = predict(torch.from_numpy(image)[None], None)[0].numpy()
    mean = averaged(lambda view: forward(spatial, view), image / 10_000, "flip")
    assert found.shape == (4, 64, 64)
    np.testing.assert_allclose(found[:3], mean, atol=1e-5)
    np.testing.assert_allclose(found[3], entropy_share(mean), atol=1e-5)


# --- temperature ------------------------------------------------------------------------


def test_logits_are_divided_by_the_temperature_of_their_model(tmp_path):
    rng = np.random.default_rng(2)
    low, high = np.zeros(3), np.full(3, 10_000.0)
    sure = make_model(
        tmp_path / "sure.pth", rng.normal(0, 5, (3, 3)), np.zeros(3), low, high,
        temperature=2.0,
    )  # fmt: skip
    plain = make_model(
        tmp_path / "plain.pth", rng.normal(0, 5, (3, 3)), np.zeros(3), low, high
    )
    halved = PixelModel(sure.path, sure.weights / 2, sure.bias / 2, low, high)
    pixels = noise(70, 90)
    scene = write_scene(tmp_path / "scene.tif", pixels)
    assert run(sure.path, scene, tmp_path / "map.tif", "--save_confidence") == 0
    expected = halved.probabilities(pixels)
    np.testing.assert_allclose(confidence_of(tmp_path), expected.max(axis=0), atol=3e-6)
    both = [sure.path, plain.path]
    options = ("--save_confidence", "--overwrite")
    assert run(both, scene, tmp_path / "map.tif", *options) == 0
    mean = (expected + plain.probabilities(pixels)) / 2
    np.testing.assert_allclose(confidence_of(tmp_path), mean.max(axis=0), atol=3e-6)


def test_the_threshold_of_a_binary_model_is_a_calibrated_probability(tmp_path):
    low, high = np.zeros(3), np.full(3, 10_000.0)
    weights, bias = [[6.0, -5.0, 1.0]], [-1.0]
    sure = make_model(tmp_path / "sure.pth", weights, bias, low, high, temperature=2.0)
    halved = PixelModel(sure.path, sure.weights / 2, sure.bias / 2, low, high)
    pixels = noise(64, 64)
    scene = write_scene(tmp_path / "scene.tif", pixels)
    for threshold in (0.3, 0.5):
        options = ("--threshold", str(threshold), "--overwrite")
        assert run(sure.path, scene, tmp_path / "map.tif", *options) == 0
        found = read_map(tmp_path / "map.tif")
        foreground = halved.probabilities(pixels)[0]
        clear = abs(foreground - threshold) > 1e-5
        np.testing.assert_array_equal(found[clear], foreground[clear] >= threshold)


# --- lack of memory ---------------------------------------------------------------------


class Greedy(nn.Module):
    """A network whose memory holds some windows and no more."""

    def __init__(self, most: int, error: Exception):
        super().__init__()
        self.most, self.error, self.seen = most, error, []

    def forward(self, images):
        self.seen.append(len(images))
        if len(images) > self.most:
            raise self.error
        return images[:, :2] * 3


def predictor_of(network: nn.Module, **options) -> Predictor:
    config = ModelConfig("unet-dropout", 3, 2, None)
    numbers = Normalization("dataset", (0.0,) * 3, (1.0,) * 3)
    return Predictor([Checkpoint(network, config, numbers, {})], CPU, **options)


SCARCE = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    RuntimeError(
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"
    ),
    MemoryError(),
]


@pytest.mark.parametrize("error", SCARCE, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("masked", [False, True])
def test_a_batch_that_does_not_fit_is_halved_until_it_does_and_stays_so(
    monkeypatch, error, masked
):
    messages = []

    def info(text, *values):
        messages.append(text % values)

    monkeypatch.setattr(logging.getLogger("semanticseg4eo"), "info", info)
    images = torch.rand(7, 3, 32, 32)
    valid = torch.rand(7, 32, 32) > 0.5 if masked else None
    plenty = predictor_of(Greedy(100, error))(images, valid)
    network = Greedy(2, error)
    predict = predictor_of(network)
    assert torch.equal(predict(images, valid), plenty)
    assert network.seen == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    assert len(messages) == 2 and "batches of 1 from here on" in messages[-1]
    assert torch.equal(predict(images, valid), plenty)
    assert network.seen[9:] == [1] * 7 and len(messages) == 2


def test_a_run_goes_on_in_smaller_batches(
    spatial, scene, tmp_path, monkeypatch, capsys
):
    expected = tmp_path / "expected.tif"
    assert run(spatial, scene, expected, "--batch_size", "1") == 0
    average = Predictor._average_views

    def greedy(self, network, scaled, temperature):
        if len(scaled) > 1:
            raise SCARCE[0]
        return average(self, network, scaled, temperature)

    monkeypatch.setattr(Predictor, "_average_views", greedy)
    capsys.readouterr()
    assert run(spatial, scene, tmp_path / "map.tif", "--batch_size", "2") == 0
    assert capsys.readouterr().err.count("memory ran out: batches of 1") == 1
    np.testing.assert_array_equal(read_map(tmp_path / "map.tif"), read_map(expected))


def test_a_window_that_does_not_fit_alone_is_an_error_that_says_what_to_lower(
    spatial, scene, tmp_path, monkeypatch, capsys
):
    predict = predictor_of(Greedy(0, SCARCE[1]))
    with pytest.raises(SegmentationError, match="--patch_size"):
        predict(torch.rand(4, 3, 32, 32), None)

    def greedy(self, network, scaled, temperature):
        raise SCARCE[1]

    monkeypatch.setattr(Predictor, "_average_views", greedy)
    folder = tmp_path / "out"
    capsys.readouterr()
    assert run(spatial, scene, folder / "map.tif") == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and "64 x 64" in last and "--patch_size" in last
    assert not folder.exists()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x5 and 6x7)"),
        ValueError("something else"),
        NotImplementedError("no kernel for this"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_other_errors_of_a_network_are_not_swallowed(error):
    network = Greedy(0, error)
    with pytest.raises(type(error)) as caught:
        predictor_of(network)(torch.rand(4, 3, 32, 32), None)
    assert caught.value is error and network.seen == [4]


def test_nothing_of_the_failed_batch_is_held_when_the_smaller_one_runs():
    class Holding(Greedy):
        def forward(self, images):
            self.seen.append(len(images))
            if len(images) > 1:
                taken = torch.ones(10)
                self.last = weakref.ref(taken)
                raise RuntimeError("can't allocate memory")
            assert self.last() is None
            return images[:, :2]

    predictor_of(Holding(0, SCARCE[0]))(torch.rand(2, 3, 32, 32), None)


# --- compiling --------------------------------------------------------------------------


def test_a_compiled_network_sees_batches_of_one_size(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda network, **options: network)
    network = Greedy(100, SCARCE[0])
    predict = predictor_of(network, compile_batch=4)
    plain = predictor_of(Greedy(100, SCARCE[0]))
    images, valid = torch.rand(4, 3, 32, 32), torch.rand(4, 32, 32) > 0.5
    for count in (4, 3, 1):
        for masks in (None, valid[:count]):
            expected = plain(images[:count], masks)
            assert torch.equal(predict(images[:count], masks), expected)
    assert set(network.seen) == {4}


def test_a_compiled_network_short_of_memory_is_halved_too(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda network, **options: network)
    network = Greedy(2, SCARCE[0])
    predict = predictor_of(network, compile_batch=4)
    images = torch.rand(5, 3, 32, 32)
    assert predict(images, None).shape == (5, 2, 32, 32)
    assert set(network.seen[1:]) == {2}
