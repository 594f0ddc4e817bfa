"""Predict_large_image.py: exact with toy predictors, then whole runs whose files are reopened.

Most runs use a U-Net whose weights are set by hand so that it is a linear classifier of single
pixels: NumPy alone knows its map. Where windows matter, a second network looks at neighbours.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import tracemalloc
import zipfile
from dataclasses import dataclass
from functools import cache
from math import ceil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from rasterio.control import GroundControlPoint
from rasterio.drivers import raster_driver_extensions
from rasterio.enums import ColorInterp
from rasterio.transform import Affine, from_origin
from rasterio.windows import Window

import model_training
import Predict_large_image as prediction
import rasters
from Predict_large_image import Axis, Statistics, blended_rows, decide, make_axis

ROOT = Path(prediction.__file__).parent
CRS = "EPSG:32631"
TRANSFORM = from_origin(431_240, 4_912_560, 10, 10)
RGBA = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]
DESCRIPTIONS = ("B02 blue", "B03 green", "B04 red")


# --- helpers: scenes ------------------------------------------------------------------------


def noise(height: int, width: int, bands: int = 3, seed: int = 0) -> np.ndarray:
    """(bands, height, width) uint16 between 1 and 10,000; 0 is free to mean nodata."""
    rng = np.random.default_rng(seed)
    return rng.integers(1, 10_001, (bands, height, width)).astype(np.uint16)


def write_scene(
    path: Path,
    pixels: np.ndarray,
    descriptions=None,
    colours=None,
    mask=None,
    **profile,
) -> Path:
    """Write (C, H, W) pixels as a GeoTIFF with a CRS and an off-origin transform."""
    count, height, width = pixels.shape
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = {"dtype": pixels.dtype, "crs": CRS, "transform": TRANSFORM} | profile
    shape = {"count": count, "height": height, "width": width}
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(path, "w", **({"driver": "GTiff"} | shape | profile)) as file,
    ):
        if descriptions:
            file.descriptions = descriptions
        if colours:
            file.colorinterp = colours
        file.write(pixels)
        if mask is not None:
            file.write_mask(mask)
    return path


def cut_off(path: Path) -> Path:
    """Write a scene whose header is whole but whose lower half is missing."""
    write_scene(path, noise(200, 40), tiled=True, blockxsize=16, blockysize=16)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def read_map(path: Path) -> np.ndarray:
    with rasterio.open(path) as file:
        return file.read(1)


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


# --- helpers: models ------------------------------------------------------------------------


@dataclass(frozen=True)
class PixelModel:
    """A classifier of single pixels: its checkpoint and the numbers that define it."""

    path: Path
    weights: np.ndarray  # (K, C)
    bias: np.ndarray  # (K,)
    low: np.ndarray  # (C,)
    high: np.ndarray  # (C,)

    def probabilities(self, image: np.ndarray) -> np.ndarray:
        """(K, H, W) float64 for an image (C, H, W) in the file's values."""
        low, high = self.low[:, None, None], self.high[:, None, None]
        return self.classify(np.clip((image - low) / (high - low), 0, 1))

    def classify(self, scaled: np.ndarray) -> np.ndarray:
        """(K, H, W) float64 for an image (C, H, W) that is already between 0 and 1."""
        logits = np.tensordot(self.weights, scaled, 1) + self.bias[:, None, None]
        if len(self.weights) == 1:
            return 1 / (1 + np.exp(-logits))
        powers = np.exp(logits - logits.max(axis=0))
        return powers / powers.sum(axis=0)


def linear_network(weights: np.ndarray, bias: np.ndarray):
    """A ``unet-dropout`` that computes ``weights @ pixel + bias`` and sees no neighbour.

    All kernels are zero but the centres of those on the way from the input over the first skip
    connection to the head, which hand each band on unchanged.
    """
    import torch
    from torch import nn

    classes, bands = weights.shape
    config = model_training.ModelConfig("unet-dropout", bands, classes, None)
    model = model_training.build_model(config)
    network = model.network
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.fill_(1)
                layer.running_var.fill_(1 - layer.eps)
        skip = network.head.in_channels  # those of the level below come first
        for block, first in ((network.down[0], 0), (network.up[-1], skip)):
            one, two = (layer for layer in block if isinstance(layer, nn.Conv2d))
            for band in range(bands):
                one.weight[band, first + band, 1, 1] = 1
                two.weight[band, band, 1, 1] = 1
        network.head.weight[:, :bands, 0, 0] = torch.tensor(weights)
        network.head.bias[:] = torch.tensor(bias)
    return model, config


def make_pixel_model(path: Path, weights, bias, **metadata) -> PixelModel:
    weights, bias = np.array(weights, np.float32), np.array(bias, np.float32)
    bands = weights.shape[1]
    low = np.linspace(100, 900, bands)
    high = np.linspace(9500, 8000, bands)
    model, config = linear_network(weights, bias)
    numbers = model_training.Normalization("dataset", tuple(low), tuple(high))
    model_training.save_checkpoint(path, model, config, numbers, metadata)
    return PixelModel(path, weights, bias, low, high)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def land(models) -> PixelModel:
    """Four classes of three bands, with names and band descriptions."""
    return make_pixel_model(
        models / "land.pth",
        [[6, -3, 0], [-2, 7, 1], [0, -4, 6], [1, 1, -5]],
        [0.5, -1.5, 0, 1],
        class_names=["water", "forêt", "bare soil", "town"],
        band_descriptions=list(DESCRIPTIONS),
    )


@pytest.fixture(scope="module")
def water(models) -> PixelModel:
    """A binary model of three bands."""
    return make_pixel_model(models / "water.pth", [[3, -4, 2]], [-0.4])


@pytest.fixture(scope="module")
def spatial(models) -> Path:
    """A three-class network of random weights that looks far beyond a pixel."""
    import torch
    from torch import nn

    torch.manual_seed(3)
    config = model_training.ModelConfig("unet-dropout", 3, 3, None)
    model = model_training.build_model(config)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.rand(4, 3, 64, 64))  # gives the layers statistics
        model.network.head.weight *= 8
    path = models / "spatial.pth"
    numbers = model_training.Normalization("dataset", (0,) * 3, (10_000,) * 3)
    model_training.save_checkpoint(path, model, config, numbers, {})
    return path


@cache
def load_model(checkpoint: Path):
    return model_training.load_checkpoint(checkpoint).model


def forward(checkpoint: Path, scaled: np.ndarray) -> np.ndarray:
    """(K, H, W) probabilities of one image (C, H, W) between 0 and 1, straight from the model."""
    import torch

    model = load_model(checkpoint)
    with torch.inference_mode():
        logits = model(torch.from_numpy(scaled.astype(np.float32))[None])
    return logits.softmax(dim=1)[0].numpy()


def run(model: Path, scene, output, *options: str) -> int:
    """The exit status of a prediction on the CPU, with small windows unless told otherwise."""
    scenes = scene if isinstance(scene, list) else [scene]
    command = ["--model", model, "--input", *scenes, "--output", output]
    chosen = [*map(str, command), *options]
    defaults = {"--device": "cpu", "--patch_size": "64", "--overlap": "16"}
    for option, value in defaults.items():
        if option not in options:
            chosen += [option, value]
    return prediction.main(chosen)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Networks this small are faster on one thread when the machine is busy."""
    import torch

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
    make = prediction.model_predictor

    def recording(*arguments):
        predict = make(*arguments)

        def recorded(images):
            shapes.append(images.shape)
            return predict(images)

        return recorded

    monkeypatch.setattr(prediction, "model_predictor", recording)
    return shapes


@pytest.fixture
def scene(tmp_path) -> Path:
    """100 x 90 pixels of noise with a corner of declared nodata."""
    pixels = noise(100, 90)
    pixels[:, :20, :25] = 0
    return write_scene(tmp_path / "scene.tif", pixels, DESCRIPTIONS, nodata=0)


# --- helpers: toy predictors ----------------------------------------------------------------


def array_reader(image: np.ndarray, valid: np.ndarray):
    """What ``blended_rows`` reads an array with; beyond the scene all is NaN and invalid."""

    def read(window: Window):
        height, width = int(window.height), int(window.width)
        part = np.full((len(image), height, width), np.nan, np.float32)
        seen = np.zeros((height, width), bool)
        rows = slice(window.row_off, window.row_off + height)
        columns = slice(window.col_off, window.col_off + width)
        inside = image[:, rows, columns]
        part[:, : inside.shape[1], : inside.shape[2]] = inside
        seen[: inside.shape[1], : inside.shape[2]] = valid[rows, columns]
        return part, seen

    return read


def blend(image, predict, patch_size, overlap, valid=None, batch_size=4):
    """The whole scene (K, H, W) and its validity (H, W) out of ``blended_rows``."""
    shape = image.shape[1:]
    valid = np.ones(shape, bool) if valid is None else valid
    axes = tuple(make_axis(side, patch_size, overlap) for side in shape)
    read = array_reader(image, valid)
    rows = list(blended_rows(read, predict, axes, len(image), batch_size))
    return (
        np.concatenate([part for part, _ in rows], axis=1),
        np.concatenate([seen for _, seen in rows]),
    )


def identity(images: np.ndarray) -> np.ndarray:
    return images


def place_dependent(images: np.ndarray) -> np.ndarray:
    """Results that depend on the place in the window and on the rest of the window."""
    down, across = (np.linspace(0, 1, side) for side in images.shape[-2:])
    shift = np.nan_to_num(images).mean(axis=(-2, -1), keepdims=True)
    return (images * across + down[:, None] - shift).astype(np.float32)


def offsets(length: int, size: int, stride: int) -> list[int]:
    """The windows along a side, counted on by hand."""
    found = [0]
    while found[-1] + size < length:
        found.append(min(found[-1] + stride, length - size))
    return found


def whole_scene(image, predict, patch_size, overlap):
    """The blended result with everything in memory, in double precision."""
    height, width = image.shape[1:]
    tall, wide = (min(patch_size, ceil(s / 32) * 32) for s in (height, width))
    bell = [np.sin(np.pi * (np.arange(s) + 0.5) / s) ** 2 for s in (tall, wide)]
    weight = bell[0][:, None] * bell[1]
    read = array_reader(image, np.ones((height, width), bool))
    sums, total = 0, np.zeros((height, width))
    stride = patch_size - overlap
    for top in offsets(height, tall, stride):
        for left in offsets(width, wide, stride):
            part, _ = read(Window(left, top, wide, tall))
            result = predict(part[None])[0].astype(np.float64) * weight
            if isinstance(sums, int):
                sums = np.zeros((len(result), height, width))
            inside = (slice(top, top + tall), slice(left, left + wide))
            rows, columns = total[inside].shape
            sums[:, inside[0], inside[1]] += result[:, :rows, :columns]
            total[inside] += weight[:rows, :columns]
    return sums / total


SHAPES = [
    (1, 1), (1, 70), (5, 7), (31, 33), (32, 32), (33, 65), (64, 64), (65, 64), (97, 130), (101, 53),
    (128, 45), (143, 71),
]  # fmt: skip
WINDOWS = [(32, 0), (32, 8), (32, 31), (45, 11), (64, 32), (64, 48), (100, 25)]


# --- sliding window -------------------------------------------------------------------------


@pytest.mark.parametrize(("patch_size", "overlap"), WINDOWS)
def test_weights_are_positive_and_sum_to_one_over_every_length(patch_size, overlap):
    for length in range(1, 211):
        axis = make_axis(length, patch_size, overlap)
        total = np.zeros(max(length, axis.size))
        for start, weights in zip(axis.starts, axis.weights, strict=True):
            assert (weights > 0).all()
            total[start : start + axis.size] += weights
        np.testing.assert_allclose(total, 1, rtol=1e-6)


@pytest.mark.parametrize(("patch_size", "overlap"), WINDOWS)
def test_the_last_window_ends_at_the_edge_and_none_is_there_twice(patch_size, overlap):
    stride = patch_size - overlap
    for length in range(patch_size, 211):
        starts = make_axis(length, patch_size, overlap).starts
        assert starts[-1] + patch_size == length
        steps = np.diff(starts)
        assert (steps[:-1] == stride).all()
        assert ((steps > 0) & (steps <= stride)).all()
        assert len(starts) == ceil((length - patch_size) / stride) + 1


@pytest.mark.parametrize(
    ("length", "patch_size", "size"),
    [(1, 512, 32), (32, 512, 32), (33, 512, 64), (98, 100, 100), (511, 512, 512)],
)
def test_a_side_shorter_than_a_patch_gets_one_window_of_a_multiple_of_32(
    length, patch_size, size
):
    axis = make_axis(length, patch_size, patch_size // 4)
    assert isinstance(axis, Axis)
    assert (axis.starts, axis.size) == ([0], size)


@pytest.mark.parametrize(("patch_size", "overlap"), WINDOWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_an_identity_predictor_gives_the_image_back(shape, patch_size, overlap):
    image = np.random.default_rng(1).random((2, *shape), np.float32)
    result, valid = blend(image, identity, patch_size, overlap)
    assert valid.shape == shape and valid.all()
    # float32 rounds each of the sums of 32 x 32 windows at overlap 31
    np.testing.assert_allclose(result, image, rtol=1e-6 if overlap < 31 else 1e-5)


@pytest.mark.parametrize(("patch_size", "overlap"), WINDOWS)
def test_a_constant_predictor_gives_the_constant(patch_size, overlap):
    image = np.zeros((1, 150, 83), np.float32)
    result, _ = blend(
        image, lambda images: np.full_like(images, 0.7), patch_size, overlap
    )
    np.testing.assert_allclose(result, 0.7, rtol=1e-6 if overlap < 31 else 1e-5)


@pytest.mark.parametrize(("patch_size", "overlap"), WINDOWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_streaming_equals_holding_the_whole_scene(shape, patch_size, overlap):
    image = np.random.default_rng(2).random((2, *shape), np.float32)
    result, _ = blend(image, place_dependent, patch_size, overlap)
    expected = whole_scene(image, place_dependent, patch_size, overlap)
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5)


def test_rows_come_from_top_to_bottom_each_once():
    image = np.arange(150, dtype=np.float32)[None, :, None].repeat(40, axis=2)
    axes = make_axis(150, 48, 16), make_axis(40, 48, 16)
    read = array_reader(image, np.ones((150, 40), bool))
    seen = 0
    for part, valid in blended_rows(read, identity, axes, 1):
        assert part.shape == (1, len(valid), 40) and len(valid) > 0
        rows = np.arange(seen, seen + len(valid))
        np.testing.assert_allclose(part[0], rows[:, None] + np.zeros(40), rtol=2e-6)
        seen += len(valid)
    assert seen == 150


def test_rows_are_given_as_soon_as_no_further_window_adds_to_them():
    image, reached = np.zeros((1, 320, 32), np.float32), []
    inner = array_reader(image, np.ones((320, 32), bool))

    def read(window):
        reached.append(window.row_off)
        return inner(window)

    axes = make_axis(320, 32, 8), make_axis(32, 32, 8)
    done = 0
    for _, valid in blended_rows(read, identity, axes, 1):
        done += len(valid)
        assert reached[-1] + 32 >= done > reached[-1]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 100])
def test_the_batch_size_changes_nothing(batch_size):
    image = np.random.default_rng(3).random((2, 90, 150), np.float32)
    sizes = []

    def predict(images):
        sizes.append(len(images))
        return place_dependent(images)

    result, _ = blend(image, predict, 32, 8, batch_size=batch_size)
    expected, _ = blend(image, place_dependent, 32, 8, batch_size=4)
    np.testing.assert_array_equal(result, expected)
    across, down = len(offsets(150, 32, 24)), len(offsets(90, 32, 24))
    assert max(sizes) == min(batch_size, across)
    assert sum(sizes) == across * down


def test_windows_without_a_valid_pixel_are_not_predicted():
    image = np.random.default_rng(4).random((1, 128, 160), np.float32)
    valid = np.zeros((128, 160), bool)
    valid[40:50, 100:110] = True
    count = 0

    def predict(images):
        nonlocal count
        count += len(images)
        return images

    result, seen = blend(image, predict, 32, 0, valid)
    assert count == 1  # the block lies in the window at row 32 and column 96
    np.testing.assert_array_equal(seen, valid)
    np.testing.assert_allclose(result[:, valid], image[:, valid], rtol=2e-6)
    assert (result[:, :32] == 0).all() and (result[:, :, :96] == 0).all()


def test_a_scene_without_a_valid_pixel_is_never_predicted():
    def predict(images):
        raise AssertionError("predicted a window without a valid pixel")

    image = np.ones((2, 70, 50), np.float32)
    result, valid = blend(image, predict, 32, 8, np.zeros((70, 50), bool))
    assert not valid.any() and not result.any()


@pytest.mark.parametrize("seed", range(6))
def test_valid_pixels_beside_nodata_are_exact(seed):
    rng = np.random.default_rng(seed)
    image = rng.random((2, 120, 140), np.float32)
    valid = np.zeros((120, 140), bool)
    for _ in range(3):
        top, left = rng.integers(0, 110, 2)
        valid[top : top + 40, left : left + rng.integers(1, 30)] = True
    valid &= rng.random((120, 140)) > 0.3
    result, seen = blend(image, identity, 32, 12, valid)
    np.testing.assert_array_equal(seen, valid)
    np.testing.assert_allclose(result[:, valid], image[:, valid], rtol=2e-6)


def test_peak_memory_does_not_grow_with_the_height():
    def peak(height: int) -> int:
        def read(window):
            shape = int(window.height), int(window.width)
            return np.ones((2, *shape), np.float32), np.ones(shape, bool)

        axes = make_axis(height, 64, 16), make_axis(256, 64, 16)
        tracemalloc.start()
        for part, _ in blended_rows(read, identity, axes, 2):
            assert part.any()
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(128)  # whatever is allocated once
    assert peak(4096) < 1.1 * peak(512)


# --- reading --------------------------------------------------------------------------------


def open_reader(path: Path, low=0.0, high=10_000.0):
    scene = rasters.open_raster(path)
    bands = rasters.image_bands(scene)
    rule = model_training.Normalization(
        "dataset", (low,) * len(bands), (high,) * len(bands)
    )
    return prediction.window_reader(scene, bands, rule)


def test_a_small_scene_is_reflected_beyond_its_edges(tmp_path):
    pixels = noise(20, 27)
    read = open_reader(write_scene(tmp_path / "small.tif", pixels))
    image, valid = read(Window(0, 0, 32, 32))
    assert image.dtype == np.float32 and image.shape == (3, 32, 32) and valid.all()
    rows = [*range(20), *range(18, 6, -1)]  # 19 is the edge: 18, 17, ... follow it
    columns = [*range(27), *range(25, 20, -1)]
    expected = pixels[:, rows][:, :, columns] / 10_000
    np.testing.assert_allclose(image, expected, rtol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (3, 2)])
def test_a_scene_of_a_few_pixels_fills_a_window(tmp_path, shape):
    pixels = noise(*shape)
    read = open_reader(write_scene(tmp_path / "tiny.tif", pixels))
    image, valid = read(Window(0, 0, 64, 32))
    assert image.shape == (3, 32, 64) and valid.all()
    assert set(np.unique(np.rint(image * 10_000))) <= set(np.unique(pixels))


def test_invalid_pixels_are_reflected_as_invalid_and_read_as_zero(tmp_path):
    pixels = noise(20, 32)
    pixels[:, 15] = 0
    read = open_reader(write_scene(tmp_path / "small.tif", pixels, nodata=0))
    image, valid = read(Window(0, 0, 32, 32))
    assert [row for row in range(32) if not valid[row].any()] == [15, 23]
    assert not image[:, ~valid].any()


def test_a_pixel_reads_the_same_in_every_window_by_the_dataset_rule(tmp_path):
    read = open_reader(write_scene(tmp_path / "scene.tif", noise(80, 80)))
    one, _ = read(Window(0, 0, 64, 64))
    other, _ = read(Window(16, 8, 64, 64))
    np.testing.assert_array_equal(one[:, 8:, 16:], other[:, :56, :48])


# --- classes --------------------------------------------------------------------------------


def test_the_threshold_itself_is_foreground():
    foreground = np.array([[[0.0, 0.29, 0.3, 0.31, 0.9]]], np.float32)
    valid = np.ones((1, 5), bool)
    classes, confidence = decide(foreground, valid, 0.3, 255)
    assert classes.dtype == np.uint8 and confidence.dtype == np.float32
    assert classes.tolist() == [[0, 0, 1, 1, 1]]
    np.testing.assert_allclose(confidence, [[1, 0.71, 0.3, 0.31, 0.9]], rtol=1e-6)


def test_the_likeliest_class_wins_and_its_probability_is_the_confidence():
    probabilities = np.array([[[0.2, 0.5]], [[0.7, 0.1]], [[0.1, 0.4]]], np.float32)
    classes, confidence = decide(probabilities, np.ones((1, 2), bool), 0.9, 255)
    assert classes.tolist() == [[1, 0]]
    np.testing.assert_allclose(confidence, [[0.7, 0.5]], rtol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_invalid_pixels_are_nodata_in_map_and_confidence(channels):
    probabilities = np.full((channels, 1, 2), 0.9, np.float32)
    classes, confidence = decide(probabilities, np.array([[True, False]]), 0.5, 255)
    assert classes[0, 1] == 255 and classes[0, 0] != 255
    assert confidence[0, 1] == -1 and confidence[0, 0] == np.float32(0.9)


def test_confidence_never_passes_one():
    above = np.nextafter(np.float32(1), np.float32(2))
    classes, confidence = decide(
        np.full((1, 1, 1), above), np.ones((1, 1), bool), 0.5, 255
    )
    assert classes.item() == 1 and confidence.item() == 1


@pytest.mark.parametrize(
    ("classes", "nodata", "dtype"),
    [
        (2, 255, "uint8"),
        (255, 255, "uint8"),
        (256, 65535, "uint16"),
        (300, 65535, "uint16"),
    ],
)
def test_past_255_classes_a_map_has_sixteen_bits(classes, nodata, dtype):
    assert prediction.map_nodata(classes) == nodata
    probabilities = np.zeros((classes, 1, 2), np.float32)
    probabilities[-1] = 1
    found, _ = decide(probabilities, np.array([[True, False]]), 0.5, nodata)
    assert found.dtype == dtype and found.tolist() == [[classes - 1, nodata]]


# --- statistics -----------------------------------------------------------------------------


def random_map(rows=90, columns=41, classes=4):
    """Classes with some nodata, and confidences with -1 there."""
    rng = np.random.default_rng(5)
    found = rng.integers(0, classes, (rows, columns)).astype(np.uint8)
    confidence = rng.random((rows, columns)).astype(np.float32)
    empty = rng.random((rows, columns)) < 0.2
    found[empty], confidence[empty] = 255, -1
    return found, confidence


@pytest.mark.parametrize("chunk", [1, 7, 90])
def test_statistics_agree_with_numpy_however_the_rows_come(chunk):
    classes, confidence = random_map()
    areas = np.linspace(80, 120, 90)
    statistics = Statistics(["a", "b", "c", "d", "never"], areas)
    for top in range(0, 90, chunk):
        statistics.add(classes[top : top + chunk], confidence[top : top + chunk])
    report = statistics.report()
    known = classes != 255
    assert report["pixels"] == classes.size
    assert report["mapped_pixels"] == known.sum()
    assert report["nodata_pixels"] == (~known).sum()
    counts = np.bincount(classes[known], minlength=5)
    assert [entry["pixels"] for entry in report["classes"]] == counts.tolist()
    for number, entry in enumerate(report["classes"][:4]):
        here = classes == number
        assert entry["class"] == number
        assert entry["share"] == pytest.approx(here.sum() / known.sum())
        assert entry["area_ha"] == pytest.approx((here.sum(axis=1) * areas).sum() / 1e4)
        assert entry["mean_confidence"] == pytest.approx(
            confidence[here].mean(), rel=1e-5
        )
    assert report["classes"][4]["share"] == 0
    assert report["classes"][4]["mean_confidence"] is None
    summary, values = report["confidence"], confidence[known]
    assert summary["mean"] == pytest.approx(values.mean(), rel=1e-5)
    for key, percent in (("p10", 10), ("median", 50), ("p90", 90)):
        assert summary[key] == pytest.approx(np.percentile(values, percent), abs=2e-3)
    assert summary["share_below_0.5"] == pytest.approx((values < 0.5).mean())


def test_confidences_of_a_half_and_of_one_are_not_below_a_half():
    statistics = Statistics(["a", "b"], None)
    values = np.array([[0.5, 1.0, 0.5, 0.4999]], np.float32)
    statistics.add(np.array([[0, 1, 1, 0]], np.uint8), values)
    assert statistics.report()["confidence"]["share_below_0.5"] == 0.25


def test_statistics_of_nothing_are_null_and_still_json():
    statistics = Statistics(["a", "b"], None)
    statistics.add(
        np.full((3, 4), 255, np.uint8), np.full((3, 4), -1.0, dtype=np.float32)
    )
    report = json.loads(json.dumps(statistics.report(), allow_nan=False))
    assert (report["pixels"], report["nodata_pixels"]) == (12, 12)
    assert report["confidence"] is None
    assert {entry["share"] for entry in report["classes"]} == {None}
    assert {entry["area_ha"] for entry in report["classes"]} == {None}
    text = prediction.report_text(report | {"output": "map.tif"})
    assert "nodata 12 pixels (100.00%)" in text and "confidence:" not in text


def test_the_report_says_pixels_shares_areas_and_confidence():
    statistics = Statistics(["water", "a class with a long name"], np.full(10, 1e4))
    classes = np.zeros((10, 200), np.uint8)
    classes[:, 150:] = 1
    classes[0] = 255
    confidence = np.where(classes == 255, -1, np.where(classes == 1, 0.4, 0.9))
    statistics.add(classes, confidence)
    text = prediction.report_text(statistics.report() | {"output": "out/map.tif"})
    first, head, water, other, nodata, summary = text.splitlines()
    assert first == "out/map.tif"
    assert head.split() == [
        "class", "name", "pixels", "share", "area", "(ha)", "confidence",
    ]  # fmt: skip
    assert water.split() == ["0", "water", "1,350", "75.00%", "1,350.00", "0.900"]
    assert "a class with a long name" in other
    assert other.split()[-4:] == ["450", "25.00%", "450.00", "0.400"]
    assert len(head) == len(water) == len(other)
    assert nodata == "nodata 200 pixels (10.00%)"
    assert "mean 0.775" in summary and "25.00% of the pixels below 0.5" in summary


# --- writing --------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 7, 100, 255, 256, 257, 600])
def test_rows_in_any_portions_make_the_same_raster(tmp_path, chunk):
    pixels = noise(600, 40, bands=1)[0]
    path = tmp_path / "map.tif"
    shape = {"height": 600, "width": 40, "count": 1, "dtype": "uint16"}
    tiles = {"tiled": True, "blockxsize": 256, "blockysize": 256}
    with rasterio.open(path, "w", driver="GTiff", **shape, **tiles) as raster:
        writer = prediction.RowWriter(raster)
        for top in range(0, 600, chunk):
            writer.write(pixels[top : top + chunk])
    np.testing.assert_array_equal(read_map(path), pixels)


@pytest.mark.parametrize("chunk", [1, 100, 300])
def test_rows_are_written_in_whole_rows_of_blocks(chunk):
    class Recorder:
        height, width = 700, 5

        def __init__(self):
            self.windows = []

        def write(self, rows, band, window):
            assert rows.shape == (window.height, window.width) and band == 1
            self.windows.append((window.row_off, window.height))

    raster = Recorder()
    writer = prediction.RowWriter(raster)
    for top in range(0, 700, chunk):
        writer.write(np.zeros((min(chunk, 700 - top), 5), np.uint8))
    assert all(top % prediction.BLOCK == 0 for top, _ in raster.windows)
    ends = [top + height for top, height in raster.windows]
    assert [0, *ends[:-1]] == [top for top, _ in raster.windows] and ends[-1] == 700


# --- maps -----------------------------------------------------------------------------------


def test_a_map_holds_the_class_of_every_pixel_on_the_pixel_grid_of_the_scene(
    land, scene, tmp_path
):
    output = tmp_path / "out" / "map.tif"
    assert run(land.path, scene, output, "--save_confidence") == 0
    with rasterio.open(scene) as file:
        image, valid = file.read(), file.read_masks(1) > 0
    probabilities = land.probabilities(image)
    with rasterio.open(output) as file:
        assert (file.crs, file.transform) == (CRS, TRANSFORM)
        assert (file.count, file.shape) == (1, (100, 90))
        assert (file.dtypes, file.nodata) == (("uint8",), 255)
        assert file.block_shapes == [(256, 256)] and file.profile["tiled"]
        assert file.compression.name == "deflate"
        classes = file.read(1)
    with rasterio.open(output.with_name("map_confidence.tif")) as file:
        assert (file.crs, file.transform) == (CRS, TRANSFORM)
        assert (file.count, file.shape) == (1, (100, 90))
        assert (file.dtypes, file.nodata) == (("float32",), -1)
        assert file.block_shapes == [(256, 256)] and file.profile["tiled"]
        assert file.compression.name == "deflate"
        confidence = file.read(1)
    np.testing.assert_array_equal(classes == 255, ~valid)
    np.testing.assert_array_equal(confidence == -1, ~valid)
    expected = probabilities.argmax(axis=0)
    two = np.sort(probabilities, axis=0)[-2:]
    clear = valid & (two[1] - two[0] > 1e-5)
    assert clear.sum() > 0.99 * valid.sum() and len(np.unique(classes)) == 5
    np.testing.assert_array_equal(classes[clear], expected[clear])
    written = np.take_along_axis(probabilities, np.minimum(classes, 3)[None], axis=0)
    np.testing.assert_allclose(confidence[valid], written[0][valid], atol=2e-6)


def test_a_map_says_what_its_classes_are(land, scene, tmp_path):
    output = tmp_path / "map.tif"
    assert run(land.path, scene, output) == 0
    names = ["water", "forêt", "bare soil", "town"]
    with rasterio.open(output) as file:
        assert json.loads(file.tags()["CLASS_NAMES"]) == names
        assert file.tags()["MODEL"] == "unet-dropout"
        assert file.tags()["NORMALIZATION"] == "dataset"
        assert file.colorinterp == (ColorInterp.palette,)
        colours = file.colormap(1)
    for number, colour in enumerate(rasters.class_colours(4)):
        assert colours[number] == (*colour, 255)
    beside = ElementTree.parse(f"{output}.aux.xml").getroot()
    assert [node.text for node in beside.iter("Category")] == names
    # GDAL itself finds them: a VRT of the map repeats them
    rasterio.shutil.copy(output, tmp_path / "map.vrt", driver="VRT")
    told = ElementTree.parse(tmp_path / "map.vrt").getroot()
    assert [node.text for node in told.iter("Category")] == names


def test_classes_without_names_are_numbered(models, scene, tmp_path, capsys):
    model = make_pixel_model(models / "plain.pth", np.eye(3), np.zeros(3))
    assert run(model.path, scene, tmp_path / "map.tif") == 0
    assert "class 2" in capsys.readouterr().out
    with rasterio.open(tmp_path / "map.tif") as file:
        names = json.loads(file.tags()["CLASS_NAMES"])
    assert names == ["class 0", "class 1", "class 2"]


def test_a_binary_map_calls_its_classes_background_and_foreground(
    water, scene, tmp_path
):
    output = tmp_path / "map.tif"
    assert run(water.path, scene, output, "--save_confidence") == 0
    with rasterio.open(scene) as file:
        image, valid = file.read(), file.read_masks(1) > 0
    foreground = water.probabilities(image)[0]
    with rasterio.open(output) as file:
        assert json.loads(file.tags()["CLASS_NAMES"]) == ["background", "foreground"]
        classes = file.read(1)
    clear = valid & (abs(foreground - 0.5) > 1e-5)
    np.testing.assert_array_equal(classes[clear], foreground[clear] >= 0.5)
    expected = np.where(classes == 1, foreground, 1 - foreground)
    confidence = read_map(tmp_path / "map_confidence.tif")
    np.testing.assert_allclose(confidence[valid], expected[valid], atol=2e-6)


def test_three_hundred_classes_make_a_sixteen_bit_map(models, tmp_path):
    rng = np.random.default_rng(6)
    weights = rng.normal(0, 9, (300, 3))
    model = make_pixel_model(models / "many.pth", weights, -weights.sum(axis=1) / 2)
    pixels = noise(50, 40)
    pixels[:, :10] = 0
    scene = write_scene(tmp_path / "scene.tif", pixels, nodata=0)
    assert run(model.path, scene, tmp_path / "map.tif") == 0
    with rasterio.open(tmp_path / "map.tif") as file:
        assert (file.dtypes, file.nodata) == (("uint16",), 65535)
        classes, colours = file.read(1), file.colormap(1)
    assert colours[299] == (*rasters.class_colours(300)[299], 255)
    assert (classes[:10] == 65535).all() and classes[10:].max() > 255
    probabilities = model.probabilities(pixels)
    best = np.sort(probabilities, axis=0)
    clear = (best[-1] - best[-2] > 1e-5)[10:]
    expected = probabilities.argmax(axis=0)[10:]
    np.testing.assert_array_equal(classes[10:][clear], expected[clear])


def test_a_scene_in_one_window_equals_one_forward_pass(spatial, tmp_path):
    pixels = noise(64, 96)
    scene = write_scene(tmp_path / "scene.tif", pixels)
    output = tmp_path / "map.tif"
    options = ("--patch_size", "512", "--overlap", "128", "--save_confidence")
    assert run(spatial, scene, output, *options) == 0
    expected = forward(spatial, pixels / 10_000)
    assert len(np.unique(expected.argmax(axis=0))) == 3
    confidence = read_map(tmp_path / "map_confidence.tif")
    np.testing.assert_allclose(confidence, expected.max(axis=0), atol=1e-5)


def test_a_scene_smaller_than_a_window_is_seen_with_its_reflection(spatial, tmp_path):
    pixels = noise(40, 51)
    scene = write_scene(tmp_path / "scene.tif", pixels)
    output = tmp_path / "map.tif"
    assert run(spatial, scene, output, "--save_confidence") == 0
    confidence = read_map(tmp_path / "map_confidence.tif")
    reflected = np.pad(pixels, [(0, 0), (0, 24), (0, 13)], mode="reflect") / 10_000
    expected = forward(spatial, reflected)[:, :40, :51].max(axis=0)
    np.testing.assert_allclose(confidence, expected, atol=1e-5)
    zeros = np.pad(pixels, [(0, 0), (0, 24), (0, 13)]) / 10_000
    assert (
        abs(confidence - forward(spatial, zeros)[:, :40, :51].max(axis=0)).max() > 0.1
    )


@pytest.mark.parametrize(
    ("patch_size", "overlap"), [(64, 16), (64, 0), (64, 48), (50, 20)]
)
def test_a_map_equals_the_blend_of_all_windows_in_memory(
    spatial, tmp_path, patch_size, overlap
):
    pixels = noise(100, 90)
    scene = write_scene(tmp_path / "scene.tif", pixels)
    options = ("--patch_size", str(patch_size), "--overlap", str(overlap))
    output = tmp_path / "map.tif"
    assert run(spatial, scene, output, *options, "--save_confidence") == 0
    probabilities = whole_scene(
        (pixels / 10_000).astype(np.float32),
        lambda images: forward(spatial, images[0])[None],
        patch_size,
        overlap,
    )
    confidence = read_map(tmp_path / "map_confidence.tif")
    np.testing.assert_allclose(confidence, probabilities.max(axis=0), atol=1e-5)
    best = np.sort(probabilities, axis=0)
    clear = best[-1] - best[-2] > 1e-4
    expected = probabilities.argmax(axis=0)
    np.testing.assert_array_equal(read_map(output)[clear], expected[clear])


def test_the_network_for_neighbours_does_look_at_neighbours(spatial):
    image = (noise(64, 64) / 10_000).astype(np.float32)
    changed = image.copy()
    changed[:, 0, 0] = 1 - changed[:, 0, 0]
    shift = abs(forward(spatial, image) - forward(spatial, changed)).max(axis=0)
    assert shift[8:, 8:].max() > 1e-4


# --- options --------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", ["0", "0.3", "0.5", "0.8"])
def test_threshold_is_the_least_foreground_probability(
    water, scene, tmp_path, threshold
):
    assert run(water.path, scene, tmp_path / "map.tif", "--threshold", threshold) == 0
    with rasterio.open(scene) as file:
        image, valid = file.read(), file.read_masks(1) > 0
    foreground = water.probabilities(image)[0]
    clear = valid & (abs(foreground - float(threshold)) > 1e-5)
    expected = foreground[clear] >= float(threshold)
    np.testing.assert_array_equal(read_map(tmp_path / "map.tif")[clear], expected)


def test_a_probability_equal_to_the_threshold_is_foreground(models, tmp_path):
    model = make_pixel_model(models / "half.pth", [[0, 0, 0]], [0])
    scene = write_scene(tmp_path / "scene.tif", noise(64, 64))
    for threshold, expected in (("0.5", 1), ("0.5001", 0)):
        options = ("--threshold", threshold)
        assert run(model.path, scene, tmp_path / "map.tif", *options) == 0
        assert (read_map(tmp_path / "map.tif") == expected).all()


def test_a_threshold_for_several_classes_is_a_wrong_command_line(
    land, scene, tmp_path, capsys
):
    with pytest.raises(SystemExit) as stop:
        run(land.path, scene, tmp_path / "map.tif", "--threshold", "0.7")
    assert stop.value.code == 2
    assert "--threshold 0.7" in capsys.readouterr().err


def test_confidence_and_quicklook_are_written_only_when_asked_for(
    land, scene, tmp_path
):
    folder = tmp_path / "out"
    assert run(land.path, scene, folder / "map.tif") == 0
    plain = {"map.tif", "map.tif.aux.xml", "map_statistics.json"}
    assert {path.name for path in folder.iterdir()} == plain
    options = ("--save_confidence", "--quicklook")
    assert run(land.path, scene, folder / "map.tif", *options) == 0
    more = {"map_confidence.tif", "map_quicklook.png"}
    assert {path.name for path in folder.iterdir()} == plain | more


@pytest.mark.parametrize("options", [(), ("--save_confidence",)])
def test_a_quicklook_shows_the_map_in_its_colours(land, scene, tmp_path, options):
    from matplotlib.image import imread

    assert run(land.path, scene, tmp_path / "map.tif", "--quicklook", *options) == 0
    picture = (imread(tmp_path / "map_quicklook.png")[..., :3] * 255).round()
    assert picture.shape[0] > 300
    assert picture.shape[1] / picture.shape[0] > (2.2 if options else 1.5)
    for colour in rasters.class_colours(4):
        assert (picture == colour).all(axis=-1).sum() > 500


def test_bands_select_and_order_by_number_and_by_description(land, tmp_path):
    pixels = noise(64, 60)
    straight = write_scene(tmp_path / "straight.tif", pixels)
    assert run(land.path, straight, tmp_path / "expected.tif") == 0
    shuffled = np.stack([pixels[2], noise(64, 60, 1, seed=9)[0], pixels[1], pixels[0]])
    names = ("B04 red", "B05", "B03 green", "B02 blue")
    scene = write_scene(tmp_path / "shuffled.tif", shuffled, names)
    expected = read_map(tmp_path / "expected.tif")
    for bands in ("4,3,1", "B02,B03,B04", "b02 blue, 3, B04 RED"):
        assert run(land.path, scene, tmp_path / "map.tif", "--bands", bands) == 0
        np.testing.assert_array_equal(read_map(tmp_path / "map.tif"), expected)
    assert run(land.path, scene, tmp_path / "map.tif", "--bands", "1,3,4") == 0
    assert (read_map(tmp_path / "map.tif") != expected).any()


@pytest.mark.parametrize("bands", ["1,2,4", "B02,B03,B99", "0,1,2", "1,2"])
def test_bands_that_are_not_there_are_refused(land, scene, tmp_path, capsys, bands):
    assert run(land.path, scene, tmp_path / "map.tif", "--bands", bands) == 1
    error = capsys.readouterr().err
    assert "--bands" in error and str(scene) in error
    assert not (tmp_path / "map.tif").exists()


def test_bands_in_another_order_than_in_training_are_told(
    land, scene, tmp_path, capsys
):
    assert run(land.path, scene, tmp_path / "map.tif") == 0
    assert "trained on" not in capsys.readouterr().err
    assert run(land.path, scene, tmp_path / "map.tif", "--bands", "3,2,1") == 0
    error = capsys.readouterr().err
    assert "B04 red, B03 green, B02 blue" in error
    assert "trained on B02 blue, B03 green, B04 red" in error


def test_num_classes_and_in_channels_are_checks(land, water, scene, tmp_path, capsys):
    output = tmp_path / "map.tif"
    assert run(land.path, scene, output, "--num_classes", "6") == 1
    error = capsys.readouterr().err
    assert "--num_classes 6" in error and "4 classes" in error
    assert run(land.path, scene, output, "--in_channels", "10") == 1
    error = capsys.readouterr().err
    assert "--in_channels 10" in error and "3 bands" in error
    assert run(water.path, scene, output, "--num_classes", "3") == 1
    error = capsys.readouterr().err
    assert "--num_classes 3" in error and "2 classes" in error
    assert not output.exists()
    right = ("--num_classes", "4", "--in_channels", "3")
    assert run(land.path, scene, output, *right) == 0
    for number in ("1", "2"):
        assert run(water.path, scene, output, "--num_classes", number) == 0


def test_a_scene_of_other_bands_is_refused_with_both_counts(land, tmp_path, capsys):
    scene = write_scene(tmp_path / "scene.tif", noise(40, 40, bands=5))
    assert run(land.path, scene, tmp_path / "map.tif") == 1
    error = capsys.readouterr().err
    assert "5 bands" in error and "takes 3" in error and str(scene) in error
    assert "B02 blue" in error and "--bands" in error
    assert not (tmp_path / "map.tif").exists()


def test_windows_have_the_size_the_overlap_and_the_batch_asked_for(
    land, tmp_path, batches
):
    scene = write_scene(tmp_path / "scene.tif", noise(100, 150))
    window = ("--patch_size", "40", "--overlap", "10", "--batch_size", "3")
    assert run(land.path, scene, tmp_path / "map.tif", *window) == 0
    # 5 windows across, in batches of 3 and 2; 3 down
    assert batches == [(3, 3, 40, 40), (2, 3, 40, 40)] * 3


def test_the_default_window_is_512_pixels_in_batches_of_4():
    required = ["--model", "m.pth", "--input", "a.tif", "--output", "b.tif"]
    parsed = prediction.build_parser().parse_args(required)
    assert (parsed.patch_size, parsed.overlap, parsed.batch_size) == (512, 128, 4)
    assert (parsed.threshold, parsed.device) == (0.5, None)
    assert not parsed.save_confidence and not parsed.quicklook


def test_windows_of_nodata_cost_no_prediction(land, tmp_path, batches):
    pixels = noise(160, 160)
    pixels[:, :, 32:] = 0
    pixels[:, 64:] = 0
    scene = write_scene(tmp_path / "scene.tif", pixels, nodata=0)
    window = ("--patch_size", "32", "--overlap", "0")
    assert run(land.path, scene, tmp_path / "map.tif", *window) == 0
    assert sum(shape[0] for shape in batches) == 2
    classes = read_map(tmp_path / "map.tif")
    assert (classes[:64, :32] < 4).all() and (classes == 255).sum() == 160**2 - 64 * 32


@pytest.mark.parametrize("window", [(32, 0), (64, 40), (512, 128)])
def test_a_pixel_model_maps_alike_whatever_the_windows(land, scene, tmp_path, window):
    options = ("--patch_size", str(window[0]), "--overlap", str(window[1]))
    output = tmp_path / "map.tif"
    assert run(land.path, scene, output, *options, "--save_confidence") == 0
    with rasterio.open(scene) as file:
        image, valid = file.read(), file.read_masks(1) > 0
    expected = land.probabilities(image).max(axis=0)
    confidence = read_map(tmp_path / "map_confidence.tif")
    np.testing.assert_allclose(confidence[valid], expected[valid], atol=2e-6)


def test_a_run_without_a_gpu_says_so_in_one_line(
    land, scene, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    paths = ["--model", land.path, "--input", scene, "--output", tmp_path / "map.tif"]
    assert prediction.main(list(map(str, paths))) == 0
    assert capsys.readouterr().err.splitlines() == ["no GPU found: running on the CPU"]


def test_an_explicit_gpu_that_is_not_there_is_an_error(
    land, scene, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    for device in ("cuda", "cuda:1"):
        output = tmp_path / "map.tif"
        assert run(land.path, scene, output, "--device", device) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"--device {device}" in error
        assert not output.exists()


@pytest.mark.parametrize(
    "wrong",
    [
        ("--patch_size", "16"),
        ("--overlap", "64"),
        ("--overlap", "-1"),
        ("--batch_size", "0"),
        ("--threshold", "1.5"),
        ("--threshold", "nan"),
        ("--device", "nonsense"),
        ("--save_conf",),
    ],
)
def test_a_wrong_option_exits_with_2_and_names_it(land, scene, tmp_path, capsys, wrong):
    with pytest.raises(SystemExit) as stop:
        run(land.path, scene, tmp_path / "map.tif", *wrong)
    assert stop.value.code == 2
    assert wrong[0] in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "map.tif").exists()


def test_debug_shows_the_traceback(land, tmp_path):
    with pytest.raises(rasters.RasterError, match="missing.tif"):
        run(land.path, tmp_path / "missing.tif", tmp_path / "map.tif", "--debug")


# --- scenes ---------------------------------------------------------------------------------


def check_map(model: PixelModel, output: Path, image: np.ndarray, valid: np.ndarray):
    """A map is nodata exactly where ``valid`` is not, and the model's classes elsewhere."""
    classes = read_map(output)
    np.testing.assert_array_equal(classes == 255, ~valid)
    probabilities = model.probabilities(np.where(valid, image, 1).astype(np.float64))
    best = np.sort(probabilities, axis=0)
    clear = valid & (best[-1] - best[-2] > 1e-5)
    assert clear.any()
    np.testing.assert_array_equal(classes[clear], probabilities.argmax(axis=0)[clear])


def test_nodata_of_a_single_band_makes_a_pixel_invalid(land, tmp_path):
    pixels = noise(70, 50)
    pixels[0, 3, 4] = pixels[2, 60:, 30] = 0
    scene = write_scene(tmp_path / "scene.tif", pixels, nodata=0)
    assert run(land.path, scene, tmp_path / "map.tif") == 0
    check_map(land, tmp_path / "map.tif", pixels, (pixels > 0).all(axis=0))


def test_numbers_that_are_none_make_a_pixel_invalid(land, tmp_path):
    pixels = noise(70, 50).astype(np.float32)
    pixels[0, 3, 4], pixels[1, 10:20], pixels[2, 40, 7] = np.nan, np.inf, -np.inf
    scene = write_scene(tmp_path / "scene.tif", pixels)
    assert run(land.path, scene, tmp_path / "map.tif") == 0
    check_map(land, tmp_path / "map.tif", pixels, np.isfinite(pixels).all(axis=0))


def test_an_alpha_band_is_a_mask_and_no_input(land, tmp_path):
    pixels = np.concatenate([noise(70, 50), np.full((1, 70, 50), 65535, np.uint16)])
    pixels[3, 20:30, :25] = 0
    scene = write_scene(tmp_path / "scene.tif", pixels, colours=RGBA)
    assert run(land.path, scene, tmp_path / "map.tif") == 0
    check_map(land, tmp_path / "map.tif", pixels[:3], pixels[3] > 0)


def test_a_fourth_band_that_is_chosen_as_data_is_no_mask(land, tmp_path):
    # GDAL calls the fourth of four 8-bit bands alpha; here it is a near infrared
    pixels = (noise(40, 40, bands=4) // 40).astype(np.uint8)
    pixels[3, :20] = 0  # dark water
    scene = write_scene(tmp_path / "scene.tif", pixels)
    with rasterio.open(scene) as file:
        assert file.colorinterp[3] == ColorInterp.alpha
    assert run(land.path, scene, tmp_path / "map.tif", "--bands", "4,3,2") == 0
    assert (read_map(tmp_path / "map.tif") != 255).all()


def test_a_mask_band_makes_pixels_invalid(land, tmp_path):
    pixels, mask = noise(70, 50), np.ones((70, 50), bool)
    mask[50:, 10:] = False
    scene = write_scene(tmp_path / "scene.tif", pixels, mask=mask)
    assert run(land.path, scene, tmp_path / "map.tif") == 0
    check_map(land, tmp_path / "map.tif", pixels, mask)


def test_a_scene_of_nodata_alone_is_mapped_as_nodata(land, tmp_path, batches):
    pixels = np.zeros((3, 50, 40), np.uint16)
    scene = write_scene(tmp_path / "scene.tif", pixels, nodata=0)
    options = ("--save_confidence", "--quicklook")
    assert run(land.path, scene, tmp_path / "map.tif", *options) == 0
    assert batches == []
    assert (read_map(tmp_path / "map.tif") == 255).all()
    assert (read_map(tmp_path / "map_confidence.tif") == -1).all()
    assert read_json(tmp_path / "map_statistics.json")["mapped_pixels"] == 0


def test_a_vrt_and_a_file_in_a_zip_are_scenes(land, tmp_path):
    pixels = noise(70, 50)
    source = write_scene(tmp_path / "source.tif", pixels)
    rasterio.shutil.copy(source, tmp_path / "scene.vrt", driver="VRT")
    with zipfile.ZipFile(tmp_path / "scene.zip", "w") as archive:
        archive.write(source, "inner/scene.tif")
    for name in ("scene.vrt", "scene.zip/inner/scene.tif"):
        path = f"/vsizip/{tmp_path / name}" if ".zip" in name else tmp_path / name
        assert run(land.path, path, tmp_path / "map.tif") == 0
        check_map(land, tmp_path / "map.tif", pixels, np.ones((70, 50), bool))
        with rasterio.open(tmp_path / "map.tif") as file:
            assert (file.crs, file.transform) == (CRS, TRANSFORM)


@pytest.mark.skipif(
    raster_driver_extensions().get("jp2") != "JP2OpenJPEG",
    reason="this GDAL writes no lossless JPEG 2000",
)
def test_a_jpeg_2000_is_a_scene(land, tmp_path):
    pixels = noise(70, 50)
    lossless = {"driver": "JP2OpenJPEG", "QUALITY": "100", "REVERSIBLE": "YES"}
    scene = write_scene(tmp_path / "scene.jp2", pixels, **lossless)
    assert run(land.path, scene, tmp_path / "map.tif") == 0
    check_map(land, tmp_path / "map.tif", pixels, np.ones((70, 50), bool))


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 200), (200, 1), (33, 33), (129, 200), (197, 31)]
)
def test_scenes_of_any_shape_are_mapped(land, tmp_path, shape):
    pixels = noise(*shape)
    scene = write_scene(tmp_path / "scene.tif", pixels)
    assert run(land.path, scene, tmp_path / "map.tif", "--patch_size", "32") == 0
    check_map(land, tmp_path / "map.tif", pixels, np.ones(shape, bool))


def test_a_turned_scene_keeps_its_transform(land, tmp_path):
    turned = Affine.translation(431_240, 4_912_560) @ Affine.rotation(30)
    turned = turned @ Affine.scale(10, -20)
    scene = write_scene(tmp_path / "scene.tif", noise(40, 40), transform=turned)
    assert run(land.path, scene, tmp_path / "map.tif") == 0
    with rasterio.open(tmp_path / "map.tif") as file:
        assert file.transform.almost_equals(turned, 1e-9)
    report = read_json(tmp_path / "map_statistics.json")
    area = sum(entry["area_ha"] for entry in report["classes"])
    assert area == pytest.approx(40 * 40 * 10 * 20 / 1e4)


def test_a_scene_without_a_crs_is_mapped_with_a_warning(land, tmp_path, capsys):
    pixels = noise(40, 40)
    scene = write_scene(tmp_path / "scene.tif", pixels, crs=None)
    assert run(land.path, scene, tmp_path / "map.tif") == 0
    captured = capsys.readouterr()
    assert "warning" in captured.err and "no CRS" in captured.err
    with rasterio.open(tmp_path / "map.tif") as file:
        assert file.crs is None and file.transform == TRANSFORM
    check_map(land, tmp_path / "map.tif", pixels, np.ones((40, 40), bool))
    report = read_json(tmp_path / "map_statistics.json")
    assert {entry["area_ha"] for entry in report["classes"]} == {None}


def corner_points(height: int, width: int) -> list[GroundControlPoint]:
    return [
        GroundControlPoint(row, column, 3 + column / 1000, 44 - row / 1000)
        for row, column in ((0, 0), (0, width), (height, 0), (height, width))
    ]


def test_ground_control_points_are_handed_on(land, tmp_path, capsys):
    pixels = noise(50, 40)
    scene = write_scene(
        tmp_path / "scene.tif",
        pixels,
        transform=None,
        crs="EPSG:4326",
        gcps=corner_points(50, 40),
    )
    output = tmp_path / "map.tif"
    assert run(land.path, scene, output, "--save_confidence") == 0
    assert "no CRS" not in capsys.readouterr().err
    for path in (output, tmp_path / "map_confidence.tif"):
        with rasterio.open(path) as file:
            points, crs = file.gcps
        assert crs == "EPSG:4326"
        assert [(p.row, p.col, p.x, p.y) for p in points] == [
            (p.row, p.col, p.x, p.y) for p in corner_points(50, 40)
        ]
    check_map(land, output, pixels, np.ones((50, 40), bool))


def test_a_folder_of_scenes_is_mapped_into_a_folder(land, tmp_path, capsys):
    images = {"a": noise(40, 50, seed=1), "b.c": noise(50, 40, seed=2)}
    for (stem, pixels), suffix in zip(images.items(), (".tif", ".TIF")):
        write_scene(tmp_path / "scenes" / f"{stem}{suffix}", pixels)
    (tmp_path / "scenes" / "notes.txt").write_text("no scene")
    assert run(land.path, tmp_path / "scenes", tmp_path / "maps") == 0
    for stem, pixels in images.items():
        output = tmp_path / "maps" / f"{stem}_prediction.tif"
        check_map(land, output, pixels, np.ones(pixels.shape[1:], bool))
        assert output.with_name(f"{stem}_prediction_statistics.json").exists()
    assert len(list((tmp_path / "maps").glob("*.tif"))) == 2
    assert capsys.readouterr().out.count("confidence: mean") == 2


def test_a_single_scene_can_go_into_a_folder_that_is_there(land, scene, tmp_path):
    (tmp_path / "maps").mkdir()
    assert run(land.path, scene, tmp_path / "maps") == 0
    assert (tmp_path / "maps" / "scene_prediction.tif").exists()


def test_one_failing_scene_leaves_the_others_mapped(land, tmp_path, capsys):
    first = write_scene(tmp_path / "first.tif", noise(40, 50))
    cut = cut_off(tmp_path / "cut.tif")
    last = write_scene(tmp_path / "last.tif", noise(40, 50))
    maps = tmp_path / "maps"
    assert run(land.path, [first, cut, last], maps, "--save_confidence") == 1
    error = capsys.readouterr().err
    assert f"Cannot read {cut}" in error and "1 of 3 scenes" in error
    stems = ("first_prediction", "last_prediction")
    ends = (".tif", ".tif.aux.xml", "_confidence.tif", "_statistics.json")
    expected = {stem + end for stem in stems for end in ends}
    assert set(os.listdir(maps)) == expected


def test_several_scenes_want_a_folder_and_not_a_file(land, scene, tmp_path, capsys):
    output = write_scene(tmp_path / "map.tif", noise(10, 10))
    before = output.read_bytes()
    other = shutil.copy(scene, tmp_path / "other.tif")
    with pytest.raises(SystemExit) as stop:
        run(land.path, [scene, other], output)
    assert stop.value.code == 2 and "folder" in capsys.readouterr().err
    assert output.read_bytes() == before


def test_two_scenes_of_one_stem_are_refused(land, tmp_path, capsys):
    one = write_scene(tmp_path / "a" / "scene.tif", noise(40, 40))
    two = write_scene(tmp_path / "b" / "scene.tif", noise(40, 40))
    assert run(land.path, [one, two], tmp_path / "maps") == 1
    error = capsys.readouterr().err
    assert str(one) in error and str(two) in error
    assert not (tmp_path / "maps").exists()


def test_a_folder_without_scenes_is_an_error(land, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert run(land.path, tmp_path / "empty", tmp_path / "maps") == 1
    assert f"No scenes in {tmp_path / 'empty'}" in capsys.readouterr().err


def test_a_vrt_that_is_called_tif_is_refused(land, scene, tmp_path, capsys):
    rasterio.shutil.copy(scene, tmp_path / "scene.vrt", driver="VRT")
    (tmp_path / "scene.vrt").rename(tmp_path / "false.tif")
    assert run(land.path, tmp_path / "false.tif", tmp_path / "map.tif") == 1
    assert "false.tif" in capsys.readouterr().err
    assert not (tmp_path / "map.tif").exists()


@pytest.mark.parametrize("option", [(), ("--save_confidence",)])
def test_an_output_that_is_the_input_is_refused(land, scene, tmp_path, capsys, option):
    before = scene.read_bytes()
    (tmp_path / "link.tif").symlink_to(scene)
    (tmp_path / "sub").mkdir()
    for output in (scene, tmp_path / "sub" / ".." / scene.name, tmp_path / "link.tif"):
        with pytest.raises(SystemExit) as stop:
            run(land.path, scene, output, *option)
        assert stop.value.code == 2 and "--output" in capsys.readouterr().err
    confidence = scene.rename(tmp_path / "map_confidence.tif")
    with pytest.raises(SystemExit):
        run(land.path, confidence, tmp_path / "map.tif", *option)
    assert confidence.read_bytes() == before


def test_maps_that_lie_among_their_scenes_are_not_written_over(land, tmp_path):
    write_scene(tmp_path / "a.tif", noise(40, 40))
    assert run(land.path, tmp_path, tmp_path) == 0
    before = (tmp_path / "a_prediction.tif").read_bytes()
    with pytest.raises(SystemExit) as stop:
        run(land.path, tmp_path, tmp_path)
    assert stop.value.code == 2
    assert (tmp_path / "a_prediction.tif").read_bytes() == before


@pytest.mark.parametrize("name", ["map", "map.png", "map.pth"])
def test_an_output_that_is_no_tif_is_a_wrong_command_line(
    land, scene, tmp_path, capsys, name
):
    with pytest.raises(SystemExit) as stop:
        run(land.path, scene, tmp_path / name)
    assert stop.value.code == 2
    assert ".tif" in capsys.readouterr().err and not (tmp_path / name).exists()


# --- failures -------------------------------------------------------------------------------


def test_a_scene_that_ends_in_the_middle_leaves_nothing_behind(land, tmp_path, capsys):
    scene = cut_off(tmp_path / "cut.tif")
    with rasterio.open(scene) as file:  # it opens, and its first rows are there
        assert file.read(window=Window(0, 0, 40, 32)).all()
    folder = tmp_path / "out"
    options = ("--patch_size", "32", "--overlap", "8", "--save_confidence")
    assert run(land.path, scene, folder / "map.tif", *options) == 1
    assert f"Cannot read {scene}" in capsys.readouterr().err
    assert os.listdir(folder) == []


def test_a_run_that_fails_leaves_the_earlier_map_as_it_was(land, scene, tmp_path):
    output = tmp_path / "out" / "map.tif"
    assert run(land.path, scene, output, "--save_confidence") == 0
    before = {path: path.read_bytes() for path in output.parent.iterdir()}
    cut = cut_off(tmp_path / "cut.tif")
    assert run(land.path, cut, output, "--save_confidence") == 1
    assert {path: path.read_bytes() for path in output.parent.iterdir()} == before


def test_an_interrupted_run_leaves_nothing_behind(land, tmp_path, capsys, monkeypatch):
    make, calls = prediction.model_predictor, []

    def interrupted(*arguments):
        predict = make(*arguments)

        def twice(images):
            calls.append(1)
            if len(calls) > 2:
                raise KeyboardInterrupt
            return predict(images)

        return twice

    monkeypatch.setattr(prediction, "model_predictor", interrupted)
    scene = write_scene(tmp_path / "scene.tif", noise(200, 40))
    folder = tmp_path / "out"
    assert run(land.path, scene, folder / "map.tif", "--save_confidence") == 130
    assert len(calls) == 3 and os.listdir(folder) == []
    assert "interrupted" in capsys.readouterr().err


def test_files_that_are_missing_or_false_are_errors_of_one_kind(
    land, scene, tmp_path, capsys
):
    output = tmp_path / "map.tif"
    (tmp_path / "text.tif").write_text("no raster")
    (tmp_path / "file").write_text("no folder")
    for model, image, target, named in (
        (land.path, tmp_path / "missing.tif", output, "missing.tif"),
        (land.path, tmp_path / "text.tif", output, "text.tif"),
        (tmp_path / "missing.pth", scene, output, "missing.pth"),
        (scene, scene, output, "scene.tif"),
        (land.path, scene, tmp_path / "file" / "map.tif", "file"),
    ):
        assert run(model, image, target) == 1
        captured = capsys.readouterr()
        assert captured.err.splitlines()[-1].startswith("error: ")
        assert named in captured.err and captured.out == ""
        assert not output.exists()


def test_complex_numbers_are_refused(land, tmp_path, capsys):
    pixels = noise(40, 40).astype(np.complex64)
    scene = write_scene(tmp_path / "scene.tif", pixels)
    assert run(land.path, scene, tmp_path / "map.tif") == 1
    assert "complex" in capsys.readouterr().err


# --- statistics of a run --------------------------------------------------------------------


def test_the_json_equals_a_recount_of_the_written_map(land, scene, tmp_path):
    output = tmp_path / "map.tif"
    assert run(land.path, scene, output, "--save_confidence") == 0
    report = read_json(tmp_path / "map_statistics.json")
    classes = read_map(output)
    confidence = read_map(tmp_path / "map_confidence.tif").astype(np.float64)
    known = classes != 255
    assert report["scene"] == str(scene) and report["output"] == str(output)
    assert report["model"] == str(land.path)
    assert report["pixels"] == classes.size
    assert report["nodata_pixels"] == 20 * 25 == (~known).sum()
    for number, entry in enumerate(report["classes"]):
        here = classes == number
        assert entry["pixels"] == here.sum() > 0
        assert entry["share"] == pytest.approx(here.sum() / known.sum())
        assert entry["area_ha"] == pytest.approx(here.sum() * 100 / 1e4)
        assert entry["mean_confidence"] == pytest.approx(confidence[here].mean())
    names = [entry["name"] for entry in report["classes"]]
    assert names == ["water", "forêt", "bare soil", "town"]
    summary = report["confidence"]
    assert summary["mean"] == pytest.approx(confidence[known].mean())
    median = np.median(confidence[known])
    assert summary["median"] == pytest.approx(median, abs=2e-3)
    assert summary["share_below_0.5"] == pytest.approx((confidence[known] < 0.5).mean())


def mapped_area(model: PixelModel, folder: Path, **place) -> float:
    """Square metres of a map of 40 x 50 pixels, all classes together, as its JSON says."""
    scene = write_scene(folder / "scene.tif", noise(40, 50), **place)
    assert run(model.path, scene, folder / "map.tif") == 0
    report = read_json(folder / "map_statistics.json")
    return 1e4 * sum(entry["area_ha"] for entry in report["classes"])


def test_areas_in_metres_and_in_feet(land, tmp_path):
    place = {"transform": from_origin(431_240, 4_912_560, 10, 20)}
    assert mapped_area(land, tmp_path, **place) == pytest.approx(2000 * 200)
    place = {"crs": "EPSG:2263", "transform": from_origin(981_000, 200_000, 30, 30)}
    foot = 1200 / 3937  # US survey
    expected = 2000 * (30 * foot) ** 2
    assert mapped_area(land, tmp_path, **place) == pytest.approx(expected)


@pytest.mark.parametrize("north", [0.1, 52.0, -60.0])
def test_areas_in_degrees_are_those_of_an_equal_area_projection(land, tmp_path, north):
    from pyproj import Transformer

    step = 0.05
    place = {"crs": "EPSG:4326", "transform": from_origin(7.3, north, step, step)}
    area = mapped_area(land, tmp_path, **place)
    to_plane = Transformer.from_crs("EPSG:4326", "EPSG:6933", always_xy=True)
    left, top = to_plane.transform(7.3, north)
    right, bottom = to_plane.transform(7.3 + 50 * step, north - 40 * step)
    assert area == pytest.approx((right - left) * (top - bottom), rel=1e-4)


def test_a_global_grid_whose_cell_centres_lie_on_the_poles_is_mapped(land, tmp_path):
    grid = from_origin(-181.25, 91.25, 2.5, 2.5)
    scene = write_scene(
        tmp_path / "scene.tif", noise(73, 144), crs="EPSG:4326", transform=grid
    )
    assert run(land.path, scene, tmp_path / "map.tif") == 0
    report = read_json(tmp_path / "map_statistics.json")
    area = sum(entry["area_ha"] for entry in report["classes"]) * 1e4
    assert area == pytest.approx(5.1e14, rel=0.02)


def test_the_report_is_on_stdout_and_nothing_else(land, scene, tmp_path, capsys):
    output = tmp_path / "map.tif"
    assert run(land.path, scene, output, "--bands", "3,2,1") == 0
    captured = capsys.readouterr()
    report = read_json(tmp_path / "map_statistics.json")
    assert captured.out == prediction.report_text(report) + "\n"
    assert captured.out.startswith(str(output))
    assert "warning" in captured.err and "bare soil" not in captured.err


# --- normalization --------------------------------------------------------------------------


def image_rule(image: np.ndarray) -> np.ndarray:
    """Divide by the joint 99th percentile of all bands, clip."""
    return np.clip(image / np.percentile(image, 99), 0, 1)


def write_legacy(path: Path, model: PixelModel, key: str, number=int) -> Path:
    """A checkpoint with the documented keys alone."""
    import torch

    network = linear_network(model.weights, model.bias)[0].network
    classes, bands = model.weights.shape
    described = {
        "model_name": "unet-dropout",
        "mode": "multiclass",
        "in_channels": bands,
        "num_classes": classes,
        "input_size": [64, 64],
        "normalization": "percentile_99",
        "encoder_name": None,
        "pretrained": False,
        "training_params": {"epochs": 1, "batch_size": 4, "learning_rate": 0.001},
        "performance_metrics": {},
    }
    described["num_classes"] = number(classes)
    torch.save({"model_state_dict": network.state_dict(), key: described}, path)
    return path


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


# --- command line ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "status"),
    [(["--help"], 0), (["--input", "a.tif"], 2), (["--patch_size", "many"], 2)],
)
def test_help_and_a_wrong_command_line_import_no_torch(arguments, status):
    program = f"""
import sys
import Predict_large_image
try:
    Predict_large_image.main({arguments!r})
except SystemExit as stop:
    assert stop.code == {status}, stop.code
slow = ("torch", "torchvision", "segmentation_models_pytorch", "matplotlib", "scipy")
sys.exit(", ".join(name for name in slow if name in sys.modules) or 0)
"""
    ended = subprocess.run(
        [sys.executable, "-c", program],
        check=False,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert "usage: Predict_large_image.py" in (ended.stdout or ended.stderr)


def test_help_names_every_setting_once():
    text = prediction.build_parser().format_help()
    listed = text[text.index("options:") :]
    for name in prediction.PredictionConfig.__dataclass_fields__:
        assert listed.count(f"  --{name} ") + listed.count(f"  --{name}\n") == 1
    assert "(default: 512)" in text and "(default: 128)" in text


# --- known defects --------------------------------------------------------------------------


def test_a_full_disk_is_an_error_and_leaves_no_map(land, tmp_path):
    resource = pytest.importorskip("resource")
    scene = write_scene(tmp_path / "scene.tif", noise(200, 200))
    folder = tmp_path / "out"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (8000, limits[1])
    )  # bytes a file may have
    try:
        status = run(land.path, scene, folder / "map.tif", "--save_confidence")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 1
    assert os.listdir(folder) == []


@pytest.mark.parametrize(
    "crs",
    [
        "+proj=eqearth",
        "+proj=ob_tran +o_proj=longlat +o_lon_p=0 +o_lat_p=30 +lon_0=10",
    ],
)
def test_a_crs_that_geotiff_cannot_hold_is_kept(land, tmp_path, crs):
    scene = write_scene(tmp_path / "scene.tif", noise(40, 40), crs=crs)
    output = tmp_path / "out" / "map.tif"
    assert run(land.path, scene, output, "--save_confidence") == 0
    assert [name for name in os.listdir(output.parent) if ".part" in name] == []
    with rasterio.open(scene) as file:
        expected = file.crs
    for path in (output, output.with_name("map_confidence.tif")):
        with rasterio.open(path) as file:
            assert file.crs == expected


def test_a_network_that_gives_no_numbers_makes_no_map(models, scene, tmp_path):
    big = np.finfo(np.float32).max
    model = make_pixel_model(models / "nan.pth", np.full((3, 3), big), [0, 0, 0])
    assert run(model.path, scene, tmp_path / "map.tif") == 1
    assert not (tmp_path / "map.tif").exists()


def test_class_names_that_do_not_fit_the_model_are_an_error(models, scene, tmp_path):
    path = models / "names.pth"
    make_pixel_model(path, np.eye(3), [0, 0, 0], class_names=["one", "two"])
    assert run(path, scene, tmp_path / "map.tif") == 1


def test_the_source_of_a_vrt_is_not_written_over(land, tmp_path):
    source = write_scene(tmp_path / "scene.tif", noise(40, 40))
    before = source.read_bytes()
    rasterio.shutil.copy(source, tmp_path / "scene.vrt", driver="VRT")
    try:
        run(land.path, tmp_path / "scene.vrt", source)
    except SystemExit:
        pass  # refused as a wrong command line, which is as good as status 1
    assert source.read_bytes() == before


def test_ground_control_points_without_a_crs_are_mapped(land, tmp_path):
    pixels = noise(50, 40)
    source = write_scene(
        tmp_path / "source.tif",
        pixels,
        transform=None,
        crs="EPSG:4326",
        gcps=corner_points(50, 40),
    )
    vrt = tmp_path / "scene.vrt"
    rasterio.shutil.copy(source, vrt, driver="VRT")
    tree = ElementTree.parse(vrt)
    del tree.getroot().find("GCPList").attrib["Projection"]
    tree.write(vrt)
    assert run(land.path, vrt, tmp_path / "map.tif") == 0
    check_map(land, tmp_path / "map.tif", pixels, np.ones((50, 40), bool))


def test_a_scene_of_another_planet_is_mapped(land, tmp_path):
    radius = 3_396_190.0  # of Mars in metres
    place = {"crs": f"+proj=longlat +R={radius}"}
    place["transform"] = from_origin(20, 1, 0.05, 0.05)  # as much south as north
    area = mapped_area(land, tmp_path, **place)
    strip = 2 * np.sin(np.radians(1)) * radius**2  # between the parallels, per radian
    assert area == pytest.approx(strip * np.radians(2.5), rel=1e-3)


@pytest.mark.parametrize("device", ["xpu", "xla"])
def test_a_device_that_is_neither_cpu_nor_cuda_is_a_wrong_command_line(
    land, scene, tmp_path, device
):
    with pytest.raises(SystemExit) as stop:
        run(land.path, scene, tmp_path / "map.tif", "--device", device)
    assert stop.value.code == 2


def test_too_little_memory_on_the_cpu_says_what_to_lower(land):
    import torch
    from torch import nn

    class Greedy(nn.Module):
        def forward(self, images):
            return torch.empty(len(images), 1 << 50)

    checkpoint = model_training.Checkpoint(Greedy(), None, None, {})
    predict = prediction.model_predictor(checkpoint, torch.device("cpu"))
    with pytest.raises(rasters.SegmentationError, match="--batch_size"):
        predict(np.zeros((1, 3, 32, 32), np.float32))


def test_a_missing_scene_is_told_in_one_line(land, tmp_path, capsys):
    assert run(land.path, tmp_path / "missing.tif", tmp_path / "map.tif") == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_hidden_files_and_folders_are_no_scenes(land, tmp_path):
    write_scene(tmp_path / "scenes" / "a.tif", noise(40, 40))
    (tmp_path / "scenes" / "._a.tif").write_bytes(b"what another system leaves")
    (tmp_path / "scenes" / "b.tif").mkdir()
    assert run(land.path, tmp_path / "scenes", tmp_path / "maps") == 0


def test_a_probability_equal_to_the_threshold_is_foreground_where_windows_meet(
    models, tmp_path
):
    model = make_pixel_model(models / "half.pth", [[0, 0, 0]], [0])
    scene = write_scene(tmp_path / "scene.tif", noise(150, 150))
    assert run(model.path, scene, tmp_path / "map.tif", "--threshold", "0.5") == 0
    assert (read_map(tmp_path / "map.tif") == 1).all()
