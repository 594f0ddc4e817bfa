"""Predict_large_image.py: exact with toy predictors, then whole runs whose files are reopened.

Most runs use a U-Net whose weights are set by hand so that it is a linear classifier of single
pixels: NumPy alone knows its map. Where windows matter, a second network looks at neighbours.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
import zipfile
from dataclasses import dataclass
from functools import cache
from itertools import combinations, pairwise
from math import ceil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import rasterio
import rasterio.shutil
import torch
from helpers import ROOT, interrupt, patch_everywhere
from rasterio.control import GroundControlPoint
from rasterio.drivers import raster_driver_extensions
from rasterio.enums import ColorInterp
from rasterio.transform import Affine, from_origin
from rasterio.windows import Window

import Predict_large_image as prediction
from common import VERSION
from common.architectures import ModelConfig
from common.distributed import ProcessGroup
from common.errors import RasterError, SegmentationError
from common.files import atomic_write
from common.machine import SerialWorker, prefetch
from common.pictures import class_colours
from common.rasters import image_bands, open_raster, read_image
from common.tiffs import create_tiff
from model_training import (
    Normalization,
    build_model,
    load_checkpoint,
    normalize,
    save_checkpoint,
)
from prediction import tiling
from prediction.blending import blended_rows
from prediction.ensemble import load_models, sample_pixels
from prediction.jobs import RESULT_OPTIONS, count_pieces, prepare_scene
from prediction.layers import (
    Layer,
    classify,
    compute_layers,
    list_layers,
    map_nodata,
    mask_layers,
)
from prediction.mapfiles import MapWriter
from prediction.predictor import Predictor
from prediction.preflight import check_scenes
from prediction.reader import (
    READ_AHEAD,
    READ_ROWS,
    ParallelReader,
    RowBlock,
    read_row_blocks,
)
from prediction.rowstore import RowStore, StoredPart, _write_all, read_journal
from prediction.scene import map_scene
from prediction.settings import PredictionConfig
from prediction.statistics import Statistics, confidence_counts, report_text
from prediction.tasks import Task, list_tasks
from prediction.tiling import (
    Extent,
    WindowLayout,
    extent_to_read,
    lay_windows,
    remaining,
    split_columns,
    split_rows,
    window_weights,
)

CRS = "EPSG:32631"
TRANSFORM = from_origin(431_240, 4_912_560, 10, 10)
RGBA = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]
CPU = torch.device("cpu")
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
    from torch import nn

    classes, bands = weights.shape
    config = ModelConfig("unet-dropout", bands, classes, None)
    model = build_model(config)
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
    low = np.linspace(100, 500, bands)
    high = np.linspace(9500, 8500, bands)
    model, config = linear_network(weights, bias)
    numbers = Normalization("dataset", tuple(low), tuple(high))
    save_checkpoint(path, model, config, numbers, metadata)
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
    from torch import nn

    torch.manual_seed(3)
    config = ModelConfig("unet-dropout", 3, 3, None)
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


@cache
def load_model(checkpoint: Path):
    return load_checkpoint(checkpoint).model


def forward(checkpoint: Path, scaled: np.ndarray) -> np.ndarray:
    """(K, H, W) probabilities of one image (C, H, W) between 0 and 1, straight from the model."""
    model = load_model(checkpoint)
    with torch.inference_mode():
        logits = model(torch.from_numpy(scaled.astype(np.float32))[None])
    return logits.softmax(dim=1)[0].numpy()


def run(model: Path, scene, output, *options: str) -> int:
    """The exit status of a prediction on the CPU, with small windows unless told otherwise."""
    scenes = scene if isinstance(scene, list) else [scene]
    models = model if isinstance(model, list) else [model]
    command = ["--model", *models, "--input", *scenes, "--output", output]
    chosen = [*map(str, command), *options]
    defaults = {
        "--device": "cpu",
        "--precision": "fp32",
        "--patch_size": "64",
        "--overlap": "16",
    }
    for option, value in defaults.items():
        if option not in options:
            chosen += [option, value]
    return prediction.main(chosen)


def configure(**options) -> PredictionConfig:
    paths = {"model": ["m.pth"], "input": ["a.tif"], "output": "b.tif"}
    return PredictionConfig(**paths | {"device": "cpu"} | options)


@pytest.fixture(scope="module", autouse=True)
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


# --- helpers: toy predictors ----------------------------------------------------------------


def everywhere(shape) -> np.ndarray:
    return np.ones(shape, bool)


def array_chunks(image: np.ndarray, valid: np.ndarray, part: Extent, cuts=()):
    """A part of an array as the chunks that a scene would be read in, cut at some rows."""
    edges = {part.top, part.bottom, *(c for c in cuts if part.top < c < part.bottom)}
    columns = slice(part.left, part.right)
    for top, bottom in pairwise(sorted(edges)):
        rows = torch.from_numpy(image[:, top:bottom, columns])
        yield RowBlock(top, rows, valid[top:bottom, columns])


def in_torch(predict):
    """A predictor of NumPy images (N, C, h, w) as ``blended_rows`` takes it."""
    return lambda images, valid: torch.from_numpy(predict(images.numpy()))


def blend(
    image,
    predict,
    patch_size,
    overlap,
    valid=None,
    batch_size=4,
    region=None,
    cuts=(),
    form="hann",
):
    """A region (K, h, w) and its validity (h, w) out of ``blended_rows``; the whole by default."""
    shape = image.shape[1:]
    valid = everywhere(shape) if valid is None else valid
    axes = tuple(lay_windows(side, patch_size, overlap, form) for side in shape)
    region = region or Extent(0, shape[0], 0, shape[1])
    source = array_chunks(image, valid, extent_to_read(axes, region, batch_size), cuts)
    channels, row, parts, seen = len(image), region.top, [], []
    for done, part, known in blended_rows(
        source, in_torch(predict), axes, region, channels, batch_size
    ):
        assert done == (row, row + part.shape[1], region.left, region.right)
        assert part.shape[1:] == known.shape and known.size
        row = done.bottom
        parts.append(part.numpy().copy())
        seen.append(known)
    assert row == region.bottom and next(source, None) is None
    return np.concatenate(parts, axis=1), np.concatenate(seen)


def identity(images: np.ndarray) -> np.ndarray:
    return images.copy()


def place_dependent(images: np.ndarray) -> np.ndarray:
    """Results that depend on the place in the window and on the rest of the window."""
    down, across = (np.linspace(0, 1, side) for side in images.shape[-2:])
    shift = images.mean(axis=(-2, -1), keepdims=True)
    return (images * across + down[:, None] - shift).astype(np.float32)


def offsets(length: int, size: int, stride: int) -> list[int]:
    """The windows along a side, counted on by hand."""
    found = [0]
    while found[-1] + size < length:
        found.append(min(found[-1] + stride, length - size))
    return found


BELLS = {
    "hann": lambda x: np.sin(np.pi * x) ** 2,
    "gaussian": lambda x: np.exp(-((x - 0.5) ** 2) / (2 * 0.125**2)),
    "linear": lambda x: np.minimum(x, 1 - x) * 2,
    "none": lambda x: x**0,
}


def whole_scene(image, predict, patch_size, overlap, form="hann"):
    """The blended result with everything in memory, in double precision."""
    height, width = image.shape[1:]
    tall, wide = (min(patch_size, ceil(s / 32) * 32) for s in (height, width))
    bell = [BELLS[form]((np.arange(s) + 0.5) / s) for s in (tall, wide)]
    weight = bell[0][:, None] * bell[1]
    beyond = [(0, 0), (0, max(0, tall - height)), (0, max(0, wide - width))]
    image = np.pad(image, beyond, mode="reflect")
    sums, total = 0, np.zeros(image.shape[1:])
    stride = patch_size - overlap
    for top in offsets(height, tall, stride):
        for left in offsets(width, wide, stride):
            inside = (slice(top, top + tall), slice(left, left + wide))
            part = image[(slice(None), *inside)]
            result = predict(part[None])[0].astype(np.float64) * weight
            if isinstance(sums, int):
                sums = np.zeros((len(result), *image.shape[1:]))
            sums[(slice(None), *inside)] += result
            total[inside] += weight
    return (sums / total)[:, :height, :width]


SHAPES = [
    (1, 1), (1, 70), (5, 7), (31, 33), (32, 32), (33, 65), (64, 64), (65, 64), (97, 130), (101, 53),
    (128, 45), (143, 71),
]  # fmt: skip
WINDOWS = [(32, 0), (32, 8), (32, 31), (45, 11), (64, 32), (64, 48), (100, 25)]


# --- sliding window -------------------------------------------------------------------------


@pytest.mark.parametrize(("patch_size", "overlap"), WINDOWS)
def test_weights_are_positive_and_sum_to_one_over_every_length(patch_size, overlap):
    for length in range(1, 211):
        axis = lay_windows(length, patch_size, overlap)
        total = np.zeros(max(length, axis.size))
        for start, weights in zip(axis.starts, axis.weights, strict=True):
            assert (weights > 0).all()
            total[start : start + axis.size] += weights
        np.testing.assert_allclose(total, 1, rtol=1e-6)


@pytest.mark.parametrize(("patch_size", "overlap"), WINDOWS)
def test_the_last_window_ends_at_the_edge_and_none_is_there_twice(patch_size, overlap):
    stride = patch_size - overlap
    for length in range(patch_size, 211):
        starts = lay_windows(length, patch_size, overlap).starts
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
    axis = lay_windows(length, patch_size, patch_size // 4)
    assert isinstance(axis, WindowLayout)
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
    result, _ = blend(image, identity, 48, 16)  # checks the order
    np.testing.assert_allclose(result, image, rtol=2e-6)


def test_rows_are_given_as_soon_as_no_further_window_adds_to_them():
    image, reached = np.zeros((1, 320, 32), np.float32), []

    def source():
        part = Extent(0, 320, 0, 32)
        for chunk in array_chunks(image, everywhere((320, 32)), part, range(0, 320, 8)):
            reached.append(chunk.bottom)
            yield chunk

    axes = lay_windows(320, 32, 8), lay_windows(32, 32, 8)
    region = Extent(0, 320, 0, 32)
    for done, _, _ in blended_rows(source(), in_torch(identity), axes, region, 1):
        # two batches, which are rows here, are cut ahead
        assert reached[-1] == min(done.top + 2 * 24 + 32, 320)
        assert done.bottom == min(done.top + 24, 320) or done.bottom == 320


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


def test_only_the_rows_that_windows_look_at_stay_in_memory():
    alive, most = 0, 0

    def forget(rows):
        nonlocal alive
        alive -= rows

    def source():
        nonlocal alive, most
        for top in range(0, 4096, 32):
            image = torch.ones(2, 32, 256)
            weakref.finalize(image, forget, 32)
            alive += 32
            most = max(most, alive)
            yield RowBlock(top, image, everywhere((32, 256)))

    axes = lay_windows(4096, 64, 16), lay_windows(256, 64, 16)
    region = Extent(0, 4096, 0, 256)
    stores = set()
    for _, part, _ in blended_rows(source(), in_torch(identity), axes, region, 2):
        assert part.all()
        stores.add(part.untyped_storage().nbytes())
    # a window, the chunks that begin and end beside it, and the next row of batches
    assert most <= 64 + 4 * 32
    assert stores == {2 * 64 * 256 * 4}


@pytest.mark.parametrize("form", BELLS)
@pytest.mark.parametrize(("patch_size", "overlap"), [(32, 8), (45, 11), (64, 48)])
def test_every_blend_equals_that_of_the_whole_scene_in_memory(
    form, patch_size, overlap
):
    image = np.random.default_rng(2).random((2, 143, 101), np.float32)
    result, _ = blend(image, place_dependent, patch_size, overlap, form=form)
    expected = whole_scene(image, place_dependent, patch_size, overlap, form)
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", BELLS)
@pytest.mark.parametrize(("patch_size", "overlap"), WINDOWS)
def test_weights_of_every_blend_are_positive_and_sum_to_one(form, patch_size, overlap):
    for length in (1, 31, 33, 64, 99, 100, 101, 187, 210):
        axis = lay_windows(length, patch_size, overlap, form)
        assert axis.weights.dtype == np.float32 and (axis.weights > 0).all()
        total = np.zeros(max(length, axis.size))
        for start, weights in zip(axis.starts, axis.weights, strict=True):
            total[start : start + axis.size] += weights
        np.testing.assert_allclose(total, 1, rtol=1e-6)


def test_blends_differ_and_none_is_the_plain_mean():
    image = np.random.default_rng(8).random((1, 40, 110), np.float32)
    results = {
        form: blend(image, place_dependent, 64, 32, form=form)[0] for form in BELLS
    }
    for one, other in combinations(results, 2):
        assert abs(results[one] - results[other]).max() > 1e-3
    # 110 columns: windows at 0, 32 and 46
    padded = np.pad(image, [(0, 0), (0, 24), (0, 0)], mode="reflect")
    windows = [
        place_dependent(padded[None, :, :, left : left + 64])[0, :, :40]
        for left in (0, 32, 46)
    ]
    pixel = [windows[0][..., 50], windows[1][..., 18], windows[2][..., 4]]
    np.testing.assert_allclose(
        results["none"][..., 50], np.mean(pixel, axis=0), rtol=1e-5
    )


@pytest.mark.parametrize("form", ["hann", "gaussian", "linear"])
def test_weights_rise_to_the_middle_of_a_window_and_are_symmetric(form):
    weights = window_weights(64, form)
    assert (np.diff(weights[:32]) > 0).all()
    np.testing.assert_allclose(weights, weights[::-1], rtol=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_a_part_of_a_scene_is_what_the_whole_holds_there_to_the_last_bit(seed):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(20, 200, 2)
    patch_size = int(rng.integers(32, 70))
    overlap = int(rng.integers(0, patch_size * 3 // 4))
    batch_size = int(rng.integers(1, 6))
    form = str(rng.choice(list(BELLS)))
    image = rng.random((2, height, width), np.float32)
    valid = everywhere((height, width))
    for _ in range(2):  # holes of nodata, some of them larger than a window
        row, column = rng.integers(0, [height, width])
        valid[row : row + 60, column : column + 80] = False

    def part(region, cuts):
        return blend(
            image, place_dependent, patch_size, overlap, valid, batch_size, region,
            cuts, form,
        )  # fmt: skip

    whole, known = part(None, ())
    np.testing.assert_array_equal(known, valid)
    for _ in range(6):
        top, bottom = np.sort(rng.choice(height + 1, 2, replace=False)).tolist()
        left, right = np.sort(rng.choice(width + 1, 2, replace=False)).tolist()
        cuts = rng.integers(0, height, rng.integers(0, 30)).tolist()
        found, seen = part(Extent(top, bottom, left, right), cuts)
        np.testing.assert_array_equal(found, whole[:, top:bottom, left:right])
        np.testing.assert_array_equal(seen, valid[top:bottom, left:right])


@pytest.mark.parametrize(("patch_size", "overlap"), WINDOWS)
def test_no_more_windows_are_predicted_than_the_overlap_needs(patch_size, overlap):
    image, count = np.zeros((1, 150, 203), np.float32), 0

    def predict(images):
        nonlocal count
        count += len(images)
        return images

    blend(image, predict, patch_size, overlap)
    stride = patch_size - overlap
    assert count == np.prod([ceil((n - patch_size) / stride) + 1 for n in (150, 203)])


def test_what_a_network_gives_for_nodata_reaches_no_pixel():
    image = np.random.default_rng(4).random((1, 96, 96), np.float32)
    valid = everywhere((96, 96))
    valid[:40] = False
    image[:, ~valid] = np.nan
    result, seen = blend(image, identity, 32, 8, valid)
    np.testing.assert_array_equal(seen, valid)
    np.testing.assert_allclose(result[:, valid], image[:, valid], rtol=2e-6)


# --- parts of a scene -----------------------------------------------------------------------

SIDES = [(1, 32, 0), (40, 64, 16), (300, 32, 8), (301, 64, 48), (1000, 64, 16)]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
@pytest.mark.parametrize("side", SIDES)
def test_batches_hold_every_window_once_and_are_the_same_for_every_part(
    side, batch_size
):
    axis = lay_windows(*side)
    groups = tiling.batch_groups(axis, batch_size, 0, axis.length)
    together = np.concatenate(groups).tolist()
    assert together == list(range(len(axis.starts)))
    sizes = [len(group) for group in groups]
    assert max(sizes) <= batch_size and max(sizes) - min(sizes) <= 1
    assert len(groups) == ceil(len(axis.starts) / batch_size)
    whole = [group.tolist() for group in groups]
    for first in range(0, axis.length, 23):
        for last in {min(first + step, axis.length) for step in (1, 50, 400)}:
            part = tiling.batch_groups(axis, batch_size, first, last)
            part = [group.tolist() for group in part]
            assert all(group in whole for group in part)
            needed = {
                number
                for number, start in enumerate(axis.starts)
                if start < last and start + axis.size > first
            }
            assert needed <= {number for group in part for number in group}
            assert all(needed & set(group) for group in part)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("side", SIDES)
def test_pieces_of_columns_follow_each_other_without_gap(side, batch_size):
    axis = lay_windows(*side)
    most = len(tiling.batch_groups(axis, batch_size, 0, axis.length))
    for pieces in (1, 2, 3, 7, 1000):
        cuts = split_columns(axis, batch_size, pieces)
        assert len(cuts) == min(pieces, most)
        assert cuts[0][0] == 0 and cuts[-1][1] == axis.length
        assert all(one[1] == other[0] for one, other in pairwise(cuts))
        assert all(left < right for left, right in cuts)
        assert json.loads(json.dumps(cuts)) == [list(cut) for cut in cuts]


@pytest.mark.parametrize("side", SIDES)
def test_shares_of_rows_follow_each_other_without_gap(side):
    axis = lay_windows(*side)
    for top, bottom in ((0, axis.length), (axis.length // 3, axis.length * 2 // 3 + 1)):
        for of in (1, 2, 3, 50):
            shares = [split_rows(axis, top, bottom, number, of) for number in range(of)]
            rows = [row for share in shares if share for row in range(*share)]
            assert rows == list(range(top, bottom))
            assert shares[0] and all(
                share is None or share[0] < share[1] for share in shares
            )
            inner = {share[0] for share in shares if share} - {top}
            assert inner <= set(axis.starts)


@pytest.mark.parametrize("seed", range(30))
def test_what_remains_of_a_part_is_what_no_finished_part_holds(seed):
    rng = np.random.default_rng(seed)
    part = Extent(5, 40, 10, 20)
    done = []
    for _ in range(rng.integers(0, 8)):
        top, bottom = np.sort(rng.choice(50, 2, replace=False)).tolist()
        columns = [(10, 20), (0, 30), (10, 15), (20, 30)][rng.integers(4)]
        done.append(Extent(top, bottom, *columns))
    found = remaining(done, part)
    missing = {
        row
        for row in range(5, 40)
        if not any(
            d.top <= row < d.bottom and d.left <= 10 and d.right >= 20 for d in done
        )
    }
    rows = [row for left in found for row in range(left.top, left.bottom)]
    assert rows == sorted(missing)
    assert all(left[2:] == (10, 20) and left.top < left.bottom for left in found)
    assert all(one.bottom < other.top for one, other in pairwise(found))


# --- reading --------------------------------------------------------------------------------


def window_of(path: Path, height: int, width: int):
    """What the predictor gets of the one window of a small scene: image and valid or None."""
    got = []

    def predict(images, valid):
        got.append((images[0].numpy(), None if valid is None else valid[0].numpy()))
        return images

    with open_raster(path) as scene:
        whole = Extent(0, scene.height, 0, scene.width)
        bands = image_bands(scene)
        axes = tuple(
            WindowLayout(length, size, [0], np.ones((1, size), np.float32), [0])
            for length, size in zip(scene.shape, (height, width))
        )
        readers = ParallelReader(scene, bands, 1)
        with readers.opened:
            chunks = read_row_blocks(readers, CPU, whole)
            list(blended_rows(chunks, predict, axes, whole, len(bands)))
    return got[0]


def test_a_small_scene_is_reflected_beyond_its_edges(tmp_path):
    pixels = noise(20, 27)
    image, valid = window_of(write_scene(tmp_path / "small.tif", pixels), 32, 32)
    assert image.dtype == np.float32 and valid is None
    rows = [*range(20), *range(18, 6, -1)]  # 19 is the edge: 18, 17, ... follow it
    columns = [*range(27), *range(25, 20, -1)]
    np.testing.assert_array_equal(image, pixels[:, rows][:, :, columns])


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (3, 2)])
def test_a_scene_of_a_few_pixels_fills_a_window(tmp_path, shape):
    pixels = noise(*shape)
    image, valid = window_of(write_scene(tmp_path / "tiny.tif", pixels), 32, 64)
    assert image.shape == (3, 32, 64) and valid is None
    assert set(np.unique(image)) <= set(np.unique(pixels))


def test_invalid_pixels_are_reflected_as_invalid_and_become_zero(tmp_path):
    pixels = noise(20, 32)
    pixels[:, 15] = 0
    path = write_scene(tmp_path / "small.tif", pixels, nodata=0)
    image, valid = window_of(path, 32, 32)
    assert [row for row in range(32) if not valid[row].any()] == [15, 23]
    rule = Normalization("dataset", (-5000,) * 3, (10_000,) * 3)
    scaled = normalize(image, valid, rule)
    assert scaled.dtype == torch.float32
    assert not scaled[:, ~valid].any() and scaled[:, valid].all()


LAYOUTS = {
    "tiled": {"tiled": True, "blockxsize": 64, "blockysize": 64},
    "striped": {"blockysize": 3},
    "one row a block": {"blockysize": 1},
    "one block": {"blockysize": 500},
}


@pytest.mark.parametrize(("count", "rows_ahead"), [(1, 0), (3, 0), (3, 2)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_chunks_follow_each_other_and_begin_where_blocks_do(
    tmp_path, monkeypatch, layout, count, rows_ahead
):
    patch_everywhere(monkeypatch, "prediction.reader.READ_COLUMNS", 64)
    monkeypatch.setitem(READ_AHEAD, "cpu", rows_ahead)
    pixels = noise(500, 70)
    pixels[:, 30:60, 20:] = 0
    path = write_scene(tmp_path / "a.tif", pixels, nodata=0, **LAYOUTS[layout])
    with open_raster(path) as scene:
        height = scene.block_shapes[0][0]
        readers = ParallelReader(scene, [3, 1], count)
        for part in (
            Extent(0, 500, 0, 70),
            Extent(77, 401, 13, 50),
            Extent(9, 10, 0, 1),
        ):
            chunks = list(read_row_blocks(readers, CPU, part))
            assert chunks[0].top == part.top and chunks[-1].bottom == part.bottom
            for one, next_one in pairwise(chunks):
                assert one.bottom == next_one.top and one.bottom % height == 0
            assert all(
                chunk.bottom - chunk.top <= max(READ_ROWS, height) for chunk in chunks
            )
            image = np.concatenate([chunk.image.numpy() for chunk in chunks], axis=1)
            valid = np.concatenate([chunk.valid for chunk in chunks])
            inside = slice(part.top, part.bottom), slice(part.left, part.right)
            np.testing.assert_array_equal(image, pixels[[2, 0]][(slice(None), *inside)])
            np.testing.assert_array_equal(valid, pixels[0][inside] > 0)
        readers.opened.close()
        assert not scene.closed


@pytest.mark.parametrize("layout", LAYOUTS)
def test_threads_share_a_scene_and_none_reads_a_block_of_another_one(tmp_path, layout):
    path = write_scene(tmp_path / "a.tif", noise(500, 200), **LAYOUTS[layout])
    with open_raster(path) as scene:
        high, wide = scene.block_shapes[0]
        readers = ParallelReader(scene, [1, 2, 3], 4)
        datasets, pieces = set(), []
        plain = read_image
        together = threading.Barrier(2 if layout != "one block" else 1, timeout=30)

        def read(dataset, window, bands):
            datasets.add(dataset)
            pieces.append(window)
            together.wait()  # passes when as many read at a time
            return plain(dataset, window, bands)

        with readers.opened, pytest.MonkeyPatch.context() as patch:
            patch_everywhere(patch, "common.rasters.read_image", read)
            patch_everywhere(patch, "prediction.reader.READ_COLUMNS", 1)
            rows = 128 if layout != "one block" else 500
            images, masks = [np.empty((3, rows, 200))], [np.empty((rows, 200), bool)]
            list(readers.fill(0, 0, images, masks))
    assert len(datasets) > 1 or layout == "one block"
    blocks = [
        (row, column)
        for piece in pieces
        for row in range(piece.row_off, piece.row_off + piece.height, high)
        for column in range(piece.col_off, piece.col_off + piece.width, wide)
    ]
    assert all(row % high == 0 and column % wide == 0 for row, column in blocks)
    assert len(set(blocks)) == len(blocks) == -(-rows // high) * -(-200 // wide)


def test_a_format_with_threads_of_its_own_is_read_by_one(tmp_path):
    path = tmp_path / "a.jp2"
    plain = write_scene(tmp_path / "a.tif", noise(64, 64))
    rasterio.shutil.copy(plain, path, driver="JP2OpenJPEG")
    with open_raster(path) as scene:
        readers = ParallelReader(scene, [1], 4)
        with readers.opened:
            assert readers.count == 1


def test_a_thread_works_in_order_lets_few_wait_and_tells_its_faults():
    thread, done, go = SerialWorker(2), [], threading.Event()

    def work(number: int) -> None:
        go.wait(30)
        if number == 3:
            raise OSError("no space left")
        done.append(number)

    with thread.pool:
        thread.do(work, 0)
        thread.do(work, 1)  # as many as may wait
        blocked = threading.Thread(target=thread.do, args=(work, 2))
        blocked.start()
        blocked.join(0.2)
        assert blocked.is_alive() and done == []
        go.set()
        blocked.join(30)
        thread.do(work, 3)
        with pytest.raises(OSError, match="no space left"):
            thread.finish()
    assert done == [0, 1, 2]


@pytest.mark.parametrize(
    "name",
    [
        "prediction.statistics.confidence_counts",
        "prediction.reader.read_row_blocks",
        "prediction.layers.mask_layers",
    ],
)
def test_a_gpu_without_memory_for_the_rows_is_told_and_leaves_nothing(
    land, scene, tmp_path, monkeypatch, capsys, name
):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    patch_everywhere(monkeypatch, name, full)
    assert run(land.path, scene, tmp_path / "out" / "map.tif") == 1
    (error,) = [
        line for line in capsys.readouterr().err.splitlines() if "error" in line
    ]
    assert "memory" in error and "--max_memory" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("owner", [MapWriter, Statistics])
def test_a_fault_while_maps_are_written_ends_the_run(
    land, scene, tmp_path, monkeypatch, capsys, owner
):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(owner, "advance" if owner is MapWriter else "add", full)
    assert run(land.path, scene, tmp_path / "out" / "map.tif") == 1
    assert "No space left" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_reading_ahead_keeps_the_order_and_ends_with_the_source():
    with prefetch(range(100)) as items:
        assert list(items) == list(range(100))
    with prefetch([]) as items:
        assert list(items) == []


def test_reading_ahead_is_one_item_ahead_and_in_another_thread():
    taken, threads = [], set()

    def source():
        for number in range(5):
            taken.append(number)
            threads.add(threading.get_ident())
            yield number

    with prefetch(source()) as items:
        for number in items:
            assert len(taken) <= number + 2
    assert threading.get_ident() not in threads and len(threads) == 1


def test_an_error_while_reading_ahead_comes_in_its_place():
    def source():
        yield 1
        raise RasterError("the block is broken")

    with prefetch(source()) as items:
        assert next(items) == 1
        with pytest.raises(RasterError, match="the block is broken"):
            next(items)


def test_a_consumer_that_stops_leaves_no_thread_behind():
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt), prefetch(range(10)) as items:
        next(items)
        raise KeyboardInterrupt
    assert threading.active_count() == before


# --- classes --------------------------------------------------------------------------------


def classes_and_confidence(probabilities, threshold=0.5):
    return [one.numpy() for one in classify(torch.as_tensor(probabilities), threshold)]


def test_the_threshold_itself_is_foreground():
    foreground = np.array([[[0.0, 0.29, 0.3, 0.31, 0.9]]], np.float32)
    classes, confidence = classes_and_confidence(foreground, 0.3)
    assert classes.dtype == np.uint8 and confidence.dtype == np.float32
    assert classes.tolist() == [[0, 0, 1, 1, 1]]
    np.testing.assert_allclose(confidence, [[1, 0.71, 0.3, 0.31, 0.9]], rtol=1e-6)


def test_the_likeliest_class_wins_and_its_probability_is_the_confidence():
    probabilities = np.array([[[0.2, 0.5]], [[0.7, 0.1]], [[0.1, 0.4]]], np.float32)
    classes, confidence = classes_and_confidence(probabilities, 0.9)
    assert classes.tolist() == [[1, 0]]
    np.testing.assert_allclose(confidence, [[0.7, 0.5]], rtol=1e-6)


def test_the_first_of_classes_that_are_as_likely_wins():
    rng = np.random.default_rng(0)
    probabilities = rng.integers(0, 3, (5, 40, 40)).astype(np.float32) / 2
    before = probabilities.copy()
    classes, confidence = classes_and_confidence(probabilities)
    np.testing.assert_array_equal(classes, probabilities.argmax(axis=0))
    np.testing.assert_array_equal(confidence, probabilities.max(axis=0))
    np.testing.assert_array_equal(probabilities, before)


def layers_of(names, models=1, **wanted):
    return list_layers(configure(**wanted), names, models)


@pytest.mark.parametrize("channels", [1, 3])
def test_invalid_pixels_are_nodata_in_every_layer(channels):
    names = ["a", "b", "c"][: max(2, channels)]
    wanted = ("save_confidence", "save_uncertainty", "save_probabilities")
    layers = layers_of(names, 2, **dict.fromkeys(wanted, True))
    blended = torch.full((channels + 1, 1, 2), 0.9)
    tensors = compute_layers(blended, layers, channels, 0.5)
    arrays = mask_layers(tensors, np.array([[True, False]]), layers)
    assert set(arrays) == set(layers) and "confidence" in layers
    for name, layer in layers.items():
        array = arrays[name]
        assert array.dtype == layer.dtype and array.shape == (len(layer.bands), 1, 2)
        assert (array[..., 1] == layer.nodata).all()
        assert (array[..., 0] != layer.nodata).all()
    assert arrays["confidence"][0, 0, 0] == np.float32(0.9)


def test_probabilities_that_are_not_numbers_make_no_map():
    tensors = compute_layers(torch.full((2, 1, 2), torch.nan), {}, 2, 0.5)
    both = tensors["classes"][0], tensors["confidence"][0]
    confidence_counts(*both, np.zeros((1, 2), bool), 2)  # none is seen
    with pytest.raises(SegmentationError, match="not numbers"):
        confidence_counts(*both, np.array([[False, True]]), 2)
    with pytest.raises(SegmentationError, match="not numbers"):
        confidence_counts(*both, np.ones((1, 2), bool), 2)


def test_confidence_never_passes_one():
    above = np.nextafter(np.float32(1), np.float32(2))
    for channels in (1, 2):
        probabilities = np.full((channels, 1, 1), above)
        classes, confidence = classes_and_confidence(probabilities)
        assert classes.item() == 2 - channels and confidence.item() == 1


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
    assert map_nodata(classes) == nodata
    layers = layers_of([f"class {number}" for number in range(classes)])
    probabilities = torch.zeros(classes, 1, 2)
    probabilities[-1] = 1
    tensors = compute_layers(probabilities, layers, classes, 0.5)
    found = mask_layers(tensors, np.array([[True, False]]), layers)
    found = found["classes"]
    assert found.dtype == dtype and found.tolist() == [[[classes - 1, nodata]]]


# --- statistics -----------------------------------------------------------------------------


def random_map(rows=90, columns=41, classes=4):
    """Classes with some nodata, and confidences with -1 there."""
    rng = np.random.default_rng(5)
    found = rng.integers(0, classes, (rows, columns)).astype(np.uint8)
    confidence = rng.random((rows, columns)).astype(np.float32)
    empty = rng.random((rows, columns)) < 0.2
    found[empty], confidence[empty] = 255, -1
    return found, confidence


def count_map(statistics: Statistics, classes, confidence) -> None:
    """Count the next rows of a map with nodata."""
    valid = classes < len(statistics.names)
    arrays = np.where(valid, classes, 0), np.where(valid, confidence, np.nan)
    tensors = (torch.from_numpy(array) for array in arrays)
    statistics.tally += confidence_counts(*tensors, valid, len(statistics.names))
    statistics.add(classes)


@pytest.mark.parametrize("chunk", [1, 7, 90])
def test_statistics_agree_with_numpy_however_the_rows_come(chunk):
    classes, confidence = random_map()
    areas = np.linspace(80, 120, 90)
    statistics = Statistics(["a", "b", "c", "d", "never"], areas)
    for top in range(0, 90, chunk):
        rows = slice(top, top + chunk)
        count_map(statistics, classes[rows], confidence[rows])
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


def test_the_parts_of_a_map_add_up_to_the_same_in_any_order():
    classes, confidence = random_map()
    arrays = np.where(classes == 255, 0, classes), confidence

    def counted(rows: slice, columns: slice = slice(None)) -> np.ndarray:
        both = (torch.from_numpy(array[rows, columns].copy()) for array in arrays)
        return confidence_counts(*both, classes[rows, columns] != 255, 4)

    whole = counted(slice(None))
    assert whole.dtype == np.int64 and whole.shape == (1000 + 4,)
    assert whole[:1000].sum() == (classes != 255).sum()
    cuts = slice(0, 40), slice(40, 41), slice(41, 90)
    for order in itertools.permutations(cuts):
        np.testing.assert_array_equal(sum(map(counted, order)), whole)
    columns = slice(0, 13), slice(13, 41)
    halves = [counted(slice(None), some) for some in columns]
    np.testing.assert_array_equal(sum(halves), whole)


def test_confidences_of_a_half_and_of_one_are_not_below_a_half():
    statistics = Statistics(["a", "b"], None)
    values = np.array([[0.5, 1.0, 0.5, 0.4999]], np.float32)
    count_map(statistics, np.array([[0, 1, 1, 0]], np.uint8), values)
    assert statistics.report()["confidence"]["share_below_0.5"] == 0.25


def test_statistics_of_nothing_are_null_and_still_json():
    statistics = Statistics(["a", "b"], None)
    count_map(statistics, np.full((3, 4), 255, np.uint8), np.ones((3, 4), np.float32))
    report = json.loads(json.dumps(statistics.report(), allow_nan=False))
    assert (report["pixels"], report["nodata_pixels"]) == (12, 12)
    assert report["confidence"] is None
    assert {entry["share"] for entry in report["classes"]} == {None}
    assert {entry["area_ha"] for entry in report["classes"]} == {None}
    text = report_text(report | {"output": "map.tif"})
    assert "nodata 12 pixels (100.00%)" in text and "confidence:" not in text


def test_the_report_says_pixels_shares_areas_and_confidence():
    statistics = Statistics(["water", "a class with a long name"], np.full(10, 1e4))
    classes = np.zeros((10, 200), np.uint8)
    classes[:, 150:] = 1
    classes[0] = 255
    confidence = np.where(classes == 1, 0.4, 0.9).astype(np.float32)
    count_map(statistics, classes, confidence)
    text = report_text(statistics.report() | {"output": "out/map.tif"})
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


# --- unfinished maps ------------------------------------------------------------------------

LAYERS = [
    Layer("classes", "uint16", 65535, ["class"]),
    Layer("confidence", "float32", -1, ["confidence"]),
    Layer("uncertainty", "float32", -1, ["one", "two"]),
    Layer("probabilities", "uint8", 255, ["a", "b", "c"]),
]
LAYERS = {layer.name: layer for layer in LAYERS}


def random_layers(height: int, width: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {}
    for name, layer in LAYERS.items():
        values = rng.random((len(layer.bands), height, width)) * 300
        arrays[name] = values.astype(layer.dtype)
    arrays["classes"] %= 4
    return arrays


def random_parts(height: int, width: int, columns: int, seed: int) -> list[Extent]:
    """A partition of a map, shuffled: pieces of columns, each cut into rows of its own."""
    rng = np.random.default_rng(seed)

    def cut(length, pieces):
        inner = rng.choice(np.arange(1, length), pieces - 1, replace=False)
        return list(pairwise([0, *np.sort(inner).tolist(), length]))

    parts = [
        Extent(top, bottom, left, right)
        for left, right in cut(width, columns)
        for top, bottom in cut(height, min(height, 7))
    ]
    return [parts[number] for number in rng.permutation(len(parts))]


def piece(arrays, part: Extent) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """What is stored of a part: its layers and a tally, here its pixels and its corner."""
    top, bottom, left, right = part
    layers = {name: array[:, top:bottom, left:right] for name, array in arrays.items()}
    return layers, np.array([(bottom - top) * (right - left), top, 0])


def finished(arrays, parts) -> list[StoredPart]:
    """What journals tell of parts."""
    return [StoredPart(part, tuple(piece(arrays, part)[1].tolist())) for part in parts]


@pytest.fixture
def partial(tmp_path) -> Path:
    """An unfinished map of 90 x 41 pixels of which nothing is there yet."""
    folder = tmp_path / ".map.tif-partial"
    RowStore.begin(folder, {"what": "a test"}, LAYERS, (90, 41))
    return folder


@pytest.mark.parametrize("columns", [1, 2, 5])
def test_what_is_stored_in_any_order_is_read_back(partial, columns):
    arrays = random_layers(90, 41)
    rows = RowStore(partial, LAYERS, (90, 41))
    with rows.opened:
        for part in random_parts(90, 41, columns, seed=columns):
            rows.write(part, *piece(arrays, part))
        assert (rows.covered == 41).all()
        for top, bottom in ((0, 90), (0, 1), (13, 64), (89, 90)):
            for name, array in arrays.items():
                found = rows.read(name, top, bottom)
                assert found.dtype == array.dtype
                np.testing.assert_array_equal(found, array[:, top:bottom])


def test_two_processes_store_into_the_same_map(partial):
    arrays = random_layers(90, 41)
    parts = random_parts(90, 41, 3, seed=9)
    for number in range(2):
        rows = RowStore(partial, LAYERS, (90, 41), number)
        with rows.opened:
            for part in parts[number::2]:
                rows.write(part, *piece(arrays, part))
    found = RowStore.finished_parts(partial)
    assert sorted(found) == sorted(finished(arrays, parts))
    assert [path.name for path in partial.glob("done-*")] == ["done-0.txt"]
    rows = RowStore(partial, LAYERS, (90, 41))
    with rows.opened:
        for name, array in arrays.items():
            np.testing.assert_array_equal(rows.read(name, 0, 90), array)


@pytest.mark.parametrize("torn", ["1", "64 9", "64 90 0 41", "64 90 0 41 1066 64 0"])
@pytest.mark.parametrize("number", [0, 1])
def test_a_torn_line_of_a_journal_is_ignored_and_spoils_no_later_one(
    partial, torn, number
):
    arrays = random_layers(90, 41)
    first, second = Extent(0, 64, 0, 41), Extent(64, 90, 0, 41)
    rows = RowStore(partial, LAYERS, (90, 41), number)
    with rows.opened:
        rows.write(first, *piece(arrays, first))
    with open(partial / f"done-{number}.txt", "a") as journal:
        journal.write(torn)
    found = RowStore.finished_parts(partial)
    assert found == finished(arrays, [first])
    rows = RowStore(partial, LAYERS, (90, 41))
    with rows.opened:
        rows.write(second, *piece(arrays, second))
    found = RowStore.finished_parts(partial)
    assert found == finished(arrays, [first, second])
    assert [path.name for path in partial.glob("done-*")] == ["done-0.txt"]


def test_a_part_that_two_journals_tell_of_counts_once(partial):
    # twice 30 columns are more than 41
    left = StoredPart(Extent(0, 90, 0, 30), (7, 8))
    for number in (0, 1):  # as a process leaves them that is killed while it joins them
        (partial / f"done-{number}.txt").write_text("0 90 0 30 7 8\n")
    assert RowStore.finished_parts(partial) == [left]
    assert RowStore.finished_parts(partial) == [left]


@pytest.mark.parametrize("bytes_a_call", [1000, 7])
def test_files_that_take_and_give_less_at_a_time_hold_the_map_all_the_same(
    partial, bytes_a_call
):
    class Slow:  # as Linux is past 2 GiB
        def __init__(self, file):
            self.file = file

        def write(self, data):
            return self.file.write(data[:bytes_a_call])

        def read(self, size):
            return self.file.read(min(size, bytes_a_call))

        def readinto(self, data):
            return self.file.readinto(memoryview(data).cast("B")[:bytes_a_call])

        def __getattr__(self, name):
            return getattr(self.file, name)

    arrays, part = random_layers(90, 41), Extent(0, 90, 0, 41)
    rows = RowStore(partial, LAYERS, (90, 41))
    with rows.opened:
        rows.files = {name: Slow(file) for name, file in rows.files.items()}
        rows.sources = {name: Slow(file) for name, file in rows.sources.items()}
        rows.write(part, *piece(arrays, part))
        for name, array in arrays.items():
            np.testing.assert_array_equal(rows.read(name, 0, 90), array)


def test_a_part_is_in_the_journal_only_after_it_is_in_the_files(partial, monkeypatch):
    arrays, part = random_layers(90, 41), Extent(0, 90, 0, 41)
    write_all, fsync, calls = _write_all, os.fsync, []

    def failing(file, data):
        calls.append(file.name)
        if len(calls) == 4:  # the last layer
            raise OSError("disk full")
        write_all(file, data)

    synced = []
    monkeypatch.setattr(
        os, "fsync", lambda number: (synced.append(number), fsync(number))
    )
    rows = RowStore(partial, LAYERS, (90, 41))
    with rows.opened:
        with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
            patch_everywhere(patch, "prediction.rowstore._write_all", failing)
            rows.write(part, *piece(arrays, part))
        assert (partial / "done-0.txt").read_text() == ""
        assert not rows.covered.any()
        synced.clear()
        rows.write(part, *piece(arrays, part))
        files = [file.fileno() for file in rows.files.values()]
        assert synced == [*files, rows.journal.fileno()]


def test_a_disk_that_does_not_hold_the_map_is_an_error_before_the_work(
    land, scene, tmp_path, capsys, monkeypatch, batches
):
    # classes and confidence of 100 x 90 pixels: 45,000 bytes
    more = "--save_confidence"
    folder = tmp_path / "out"
    for free, status in ((44_999, 1), (45_000, 0)):
        usage = shutil._ntuple_diskusage(10**9, 10**9 - free, free)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
        assert run(land.path, scene, folder / "map.tif", more) == status
        if status:
            error = capsys.readouterr().err
            assert str(folder) in error and "GB free" in error
            assert not folder.exists() and batches == []


class Recorder:
    """A raster file that remembers what is written to it."""

    def __init__(self, shape):
        self.pixels = np.zeros(shape)
        self.windows = []

    def write(self, rows, window):
        assert rows.shape[1:] == (window.height, window.width)
        assert window.col_off == 0 and window.width == self.pixels.shape[2]
        self.windows.append((window.row_off, window.row_off + window.height))
        self.pixels[:, slice(*self.windows[-1])] = rows


@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_maps_get_whole_rows_of_blocks_in_order_whatever_comes_first(
    tmp_path, columns, seed
):
    shape, arrays = (600, 23), random_layers(600, 23)
    RowStore.begin(tmp_path / "partial", {}, LAYERS, shape)
    files = {name: Recorder(array.shape) for name, array in arrays.items()}
    statistics = Statistics(["a", "b", "c", "d"], np.ones(600))
    rows = RowStore(tmp_path / "partial", LAYERS, shape)
    maps = MapWriter(rows, files, statistics)
    with rows.opened:
        missing = everywhere(shape)
        for part in random_parts(*shape, columns, seed):
            rows.write(part, *piece(arrays, part))
            maps.advance()
            missing[part.top : part.bottom, part.left : part.right] = False
            whole = int(np.argmax(missing.any(axis=1))) if missing.any() else 600
            assert maps.row == (whole if whole == 600 else whole // 256 * 256)
    expected = Statistics(["a", "b", "c", "d"], np.ones(600))
    for top, bottom in ((0, 256), (256, 512), (512, 600)):
        expected.add(arrays["classes"][0, top:bottom])
    assert statistics.report() == expected.report()
    for name, file in files.items():
        assert file.windows == [(0, 256), (256, 512), (512, 600)]
        np.testing.assert_array_equal(file.pixels, arrays[name])


# --- resuming -------------------------------------------------------------------------------

EVERYTHING = ("--save_confidence", "--save_uncertainty", "--save_probabilities")


def outcome(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def tall_scene(tmp_path) -> Path:
    """300 x 100 pixels: 6 windows down, 2 across."""
    pixels = noise(300, 100)
    pixels[:, 100:180, :70] = 0
    return write_scene(tmp_path / "tall.tif", pixels, nodata=0)


@pytest.mark.parametrize("memory", ["1", "0.000001"], ids=["whole rows", "columns"])
@pytest.mark.parametrize(
    "name",
    [
        "prediction.layers.compute_layers",
        "prediction.rowstore.RowStore.write",
        "prediction.mapfiles.MapWriter.advance",
        "prediction.predictor.Predictor.__call__",
    ],
)
def test_a_resumed_run_gives_the_same_bytes_and_predicts_no_finished_row_again(
    spatial, tall_scene, tmp_path, monkeypatch, capsys, batches, memory, name
):
    folder = tmp_path / "out"
    options = (*EVERYTHING, "--max_memory", memory, "--batch_size", "1")
    assert run(spatial, tall_scene, folder / "map.tif", *options) == 0
    expected, report = outcome(folder), capsys.readouterr().out
    whole, steps = len(batches), (6 if memory == "1" else 12)
    for call in (2, steps):
        shutil.rmtree(folder)
        with monkeypatch.context() as patch:
            interrupt(patch, name, call)
            assert run(spatial, tall_scene, folder / "map.tif", *options) == 130
        journal = folder / ".map.tif-partial" / "done-0.txt"
        parts = read_journal(journal)
        assert os.listdir(folder) == [".map.tif-partial"]
        capsys.readouterr()
        batches.clear()
        again = (*options, "--resume")
        assert run(spatial, tall_scene, folder / "map.tif", *again) == 0
        assert outcome(folder) == expected
        assert capsys.readouterr().out == report
        if memory == "1":
            # rows end at the next window's start: only the one window row before is needed again
            left = 6 - len(parts)
            assert len(batches) <= 2 * (left + 1)
        assert len(batches) <= whole


def test_a_run_that_was_interrupted_several_times_ends_with_the_same_map(
    spatial, tall_scene, tmp_path, monkeypatch
):
    assert run(spatial, tall_scene, tmp_path / "a" / "map.tif", *EVERYTHING) == 0
    output = tmp_path / "b" / "map.tif"
    for _ in range(4):
        with monkeypatch.context() as patch:
            interrupt(patch, "prediction.layers.compute_layers", 2)
            run(spatial, tall_scene, output, *EVERYTHING, "--resume")
    assert run(spatial, tall_scene, output, *EVERYTHING, "--resume") == 0
    found, expected = outcome(output.parent), outcome(tmp_path / "a")
    for name in expected.keys() - {"map_statistics.json"}:
        assert found[name] == expected[name]


def left_unfinished(model, scene, output, monkeypatch, *options) -> dict[str, bytes]:
    """Interrupt a run; what lies in the hidden folder then."""
    with monkeypatch.context() as patch:
        interrupt(patch, "prediction.layers.compute_layers", 3)
        assert run(model, scene, output, *options) == 130
    return outcome(output.with_name(f".{output.name}-partial"))


def test_without_resume_an_unfinished_map_is_dropped_and_that_is_told(
    spatial, tall_scene, tmp_path, monkeypatch, capsys, batches
):
    output = tmp_path / "map.tif"
    left_unfinished(spatial, tall_scene, output, monkeypatch)
    batches.clear()
    capsys.readouterr()
    assert run(spatial, tall_scene, output) == 0
    assert len(batches) == 12
    assert ".map.tif-partial is dropped" in capsys.readouterr().err


OTHER_OPTIONS = {
    "bands": ("1,2,3",),
    "patch_size": ("32",),
    "overlap": ("20",),
    "blend": ("none",),
    "tta": ("flip",),
    "threshold": ("0.6",),
    "precision": ("bf16",),
    "batch_size": ("3",),
    "compile": (),
    "format": ("cog",),
    "save_confidence": (),
    "save_uncertainty": (),
    "save_probabilities": (),
}


def test_every_option_that_changes_the_result_is_compared():
    assert set(OTHER_OPTIONS) == set(RESULT_OPTIONS)
    fields = set(PredictionConfig.__dataclass_fields__)
    assert fields >= set(OTHER_OPTIONS)


@pytest.mark.parametrize("option", OTHER_OPTIONS)
def test_resuming_with_another_option_is_refused_and_keeps_the_unfinished_map(
    water, tall_scene, tmp_path, monkeypatch, capsys, option
):
    output = tmp_path / "map.tif"
    kept = left_unfinished(water.path, tall_scene, output, monkeypatch)
    capsys.readouterr()
    changed = (f"--{option}", *OTHER_OPTIONS[option])
    assert run(water.path, tall_scene, output, *changed, "--resume") == 1
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("error: --resume:")
    assert f"--{option} " in error and "leave --resume out" in error
    assert outcome(tmp_path / ".map.tif-partial") == kept
    assert run(water.path, tall_scene, output, "--resume") == 0


def test_resuming_with_another_scene_or_model_is_refused(
    spatial, tall_scene, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "map.tif"
    kept = left_unfinished(spatial, tall_scene, output, monkeypatch)
    other_scene = shutil.copy(tall_scene, tmp_path / "other.tif")
    other_model = shutil.copy(spatial, tmp_path / "other.pth")
    for model, image, named in (
        (spatial, other_scene, "scene"),
        (other_model, tall_scene, "model"),
        ([spatial, other_model], tall_scene, "model"),
    ):
        capsys.readouterr()
        assert run(model, image, output, "--resume") == 1
        assert f"of a run with another {named}" in capsys.readouterr().err
        assert outcome(tmp_path / ".map.tif-partial") == kept
    os.utime(tall_scene, (1, 1))  # the same name, but other contents
    assert run(spatial, tall_scene, output, "--resume") == 1
    assert "of a run with another scene" in capsys.readouterr().err
    assert outcome(tmp_path / ".map.tif-partial") == kept


def test_resuming_a_finished_map_predicts_nothing_and_reports_the_same(
    spatial, tall_scene, tmp_path, capsys, batches
):
    output = tmp_path / "out" / "map.tif"
    assert run(spatial, tall_scene, output, *EVERYTHING) == 0
    report, before = capsys.readouterr().out, outcome(output.parent)
    batches.clear()
    assert run(spatial, tall_scene, output, *EVERYTHING, "--resume") == 0
    captured = capsys.readouterr()
    assert captured.out == report and "is there already" in captured.err
    assert batches == [] and outcome(output.parent) == before
    assert run(spatial, tall_scene, output, "--resume", "--overlap", "17") == 1
    assert outcome(output.parent) == before


def test_resuming_where_nothing_is_there_is_an_ordinary_run(
    spatial, tall_scene, tmp_path, batches
):
    assert run(spatial, tall_scene, tmp_path / "a" / "map.tif") == 0
    assert run(spatial, tall_scene, tmp_path / "b" / "map.tif", "--resume") == 0
    assert len(batches) == 2 * 12
    names = ("map.tif", "map.tif.aux.xml")
    for name in names:
        one, other = (tmp_path / folder / name for folder in "ab")
        assert one.read_bytes() == other.read_bytes()


def test_resuming_several_scenes_goes_on_with_the_one_that_was_interrupted(
    spatial, tmp_path, monkeypatch, batches, capsys
):
    scenes = [
        write_scene(tmp_path / f"{name}.tif", noise(150, 60, seed=seed))
        for seed, name in enumerate("abc")
    ]
    assert run(spatial, scenes, tmp_path / "expected") == 0
    report = capsys.readouterr().out.replace("/expected/", "/maps/")
    maps = tmp_path / "maps"
    with monkeypatch.context() as patch:
        interrupt(patch, "prediction.layers.compute_layers", 5)  # 3 window rows a scene
        assert run(spatial, scenes, maps) == 130
    capsys.readouterr()
    batches.clear()
    assert run(spatial, scenes, maps, "--resume") == 0
    assert capsys.readouterr().out == report
    assert len(batches) <= 3 + 3
    for path in maps.glob("*.tif"):
        assert path.read_bytes() == (tmp_path / "expected" / path.name).read_bytes()
    assert len(list(maps.glob("*.tif"))) == 3 and not list(maps.glob(".*"))


def test_an_interruption_before_the_first_row_can_be_resumed(
    land, scene, tmp_path, monkeypatch
):
    output = tmp_path / "map.tif"
    with monkeypatch.context() as patch:
        interrupt(patch, "common.files.write_json", 1)
        assert run(land.path, scene, output) == 130
    assert run(land.path, scene, output, "--resume") == 0


@pytest.mark.parametrize("more", ["--save_confidence", "map deleted"])
def test_resume_makes_what_is_not_there(land, scene, tmp_path, more):
    output = tmp_path / "map.tif"
    assert run(land.path, scene, output) == 0
    options = ["--save_confidence"]
    if more == "map deleted":
        output.unlink()
        options = []
    assert run(land.path, scene, output, "--resume", *options) == 0
    assert output.exists()
    assert (tmp_path / "map_confidence.tif").exists() == bool(options)


def test_resume_draws_a_quicklook_of_a_finished_map(land, scene, tmp_path):
    output = tmp_path / "map.tif"
    assert run(land.path, scene, output) == 0
    assert run(land.path, scene, output, "--resume", "--quicklook") == 0
    assert (tmp_path / "map_quicklook.png").exists()


def test_resume_with_another_format_is_refused_or_obeyed(land, scene, tmp_path):
    output = tmp_path / "map.tif"
    assert run(land.path, scene, output) == 0
    status = run(land.path, scene, output, "--resume", "--format", "cog")
    with rasterio.open(output) as file:
        layout = file.tags(ns="IMAGE_STRUCTURE").get("LAYOUT")
    assert status == 1 or layout == "COG"


def test_a_fault_after_the_map_is_written_leaves_no_hidden_folder(
    land, scene, tmp_path, monkeypatch
):
    folder = tmp_path / "out"
    interrupt(monkeypatch, "prediction.mapfiles.draw_quicklook", 1, OSError("no space"))
    assert run(land.path, scene, folder / "map.tif", "--quicklook") == 1
    assert not list(folder.glob(".*"))


# --- memory ---------------------------------------------------------------------------------


def test_little_memory_gives_the_same_bytes(spatial, tmp_path):
    pixels = noise(100, 150)
    pixels[:, 20:90, :70] = 0
    scene = write_scene(tmp_path / "scene.tif", pixels, nodata=0)
    found = {}
    for memory in ("100", "0.000001"):
        folder = tmp_path / memory
        options = (*EVERYTHING, "--max_memory", memory, "--batch_size", "1")
        assert run(spatial, scene, folder / "map.tif", *options) == 0
        report = read_json(folder / "map_statistics.json")
        columns = report.pop("run")["columns"]
        files = {path.name: path.read_bytes() for path in folder.glob("*.tif")}
        found[memory] = columns, files, report["classes"], report["confidence"]
    assert [len(columns) for columns, *_ in found.values()] == [1, 3]
    first, other = (rest for _, *rest in found.values())
    assert other == first


def test_pieces_of_columns_are_as_many_as_the_memory_needs(land, tmp_path):
    path = write_scene(tmp_path / "scene.tif", noise(10, 4000))
    counts = []
    for megabytes in (100, 3, 1, 0.1):
        config = configure(model=[str(land.path)], max_memory=megabytes / 1000)
        models = load_models(config)
        with open_raster(path) as scene:
            task = Task(str(path), tmp_path / "map.tif")
            job = prepare_scene(task, config, models, scene)
            counts.append(count_pieces(job))
    assert counts[0] == 1 and counts == sorted(counts) and len(set(counts)) == 4
    assert counts[3] == pytest.approx(10 * counts[2], abs=10)


# --- further layers -------------------------------------------------------------------------


def entropy_share(probabilities: np.ndarray) -> np.ndarray:
    """Entropy over the first axis as a share of that of equal probabilities."""
    from scipy.stats import entropy

    if len(probabilities) == 1:
        probabilities = np.concatenate([probabilities, 1 - probabilities])
    return entropy(probabilities, axis=0) / np.log(len(probabilities))


@pytest.mark.parametrize("kind", ["land", "water"])
def test_uncertainty_of_one_model_is_the_entropy_of_its_probabilities(
    kind, scene, tmp_path, request
):
    model = request.getfixturevalue(kind)
    assert run(model.path, scene, tmp_path / "map.tif", "--save_uncertainty") == 0
    with rasterio.open(scene) as file:
        image, valid = file.read(), file.read_masks(1) > 0
    with rasterio.open(tmp_path / "map_uncertainty.tif") as file:
        assert (file.count, file.dtypes, file.nodata) == (1, ("float32",), -1)
        assert (file.crs, file.transform) == (CRS, TRANSFORM)
        assert "entropy" in file.descriptions[0]
        found = file.read(1)
    expected = entropy_share(model.probabilities(image))
    np.testing.assert_allclose(found[valid], expected[valid], atol=1e-5)
    assert (found[~valid] == -1).all() and not valid.all()


@pytest.mark.parametrize("kind", ["land", "water"])
def test_disagreement_of_several_models_is_their_mutual_information(
    kind, models, scene, tmp_path, request
):
    one = request.getfixturevalue(kind)
    rng = np.random.default_rng(0)
    shape, names = one.weights.shape, {}
    if kind == "land":
        names = {"class_names": ["water", "forêt", "bare soil", "town"]}
    members = [one] + [
        make_pixel_model(
            models / f"{kind}_{number}.pth",
            rng.normal(0, 4, shape),
            rng.normal(0, 1, shape[0]),
            **names,
        )
        for number in (1, 2)
    ]
    window = ("--patch_size", "128", "--overlap", "0", "--save_uncertainty")
    files = [member.path for member in members]
    assert run(files, scene, tmp_path / "map.tif", *window) == 0
    with rasterio.open(scene) as file:
        image, valid = file.read(), file.read_masks(1) > 0
    with rasterio.open(tmp_path / "map_uncertainty.tif") as file:
        assert (file.count, file.nodata) == (2, -1)
        assert "mutual information" in file.descriptions[1]
        total, disagreement = file.read()
    each = [member.probabilities(image) for member in members]
    expected = entropy_share(np.mean(each, axis=0))
    mutual = expected - np.mean([entropy_share(p) for p in each], axis=0)
    np.testing.assert_allclose(total[valid], expected[valid], atol=1e-5)
    np.testing.assert_allclose(disagreement[valid], mutual[valid], atol=1e-5)
    assert mutual[valid].max() > 0.1 and (disagreement[~valid] == -1).all()


def test_models_that_agree_have_no_disagreement(land, scene, tmp_path):
    output, options = tmp_path / "map.tif", ("--save_uncertainty",)
    assert run([land.path, land.path], scene, output, *options) == 0
    with rasterio.open(tmp_path / "map_uncertainty.tif") as file:
        total, disagreement = file.read()
    assert disagreement[disagreement >= 0].max() < 1e-5 < total.max()


@pytest.mark.parametrize("kind", ["land", "water"])
def test_probabilities_are_a_band_per_class_within_half_a_step(
    kind, scene, tmp_path, request
):
    model = request.getfixturevalue(kind)
    assert run(model.path, scene, tmp_path / "map.tif", "--save_probabilities") == 0
    with rasterio.open(scene) as file:
        image, valid = file.read(), file.read_masks(1) > 0
    expected = model.probabilities(image)
    names = ["water", "forêt", "bare soil", "town"]
    if kind == "water":
        expected = np.concatenate([1 - expected, expected])
        names = ["background", "foreground"]
    with rasterio.open(tmp_path / "map_probabilities.tif") as file:
        assert file.count == len(names) and set(file.dtypes) == {"uint8"}
        assert file.nodata == 255 and file.scales == (1 / 254,) * file.count
        assert file.descriptions == tuple(f"probability of {name}" for name in names)
        stored = file.read()
    assert (stored[:, ~valid] == 255).all() and stored[:, valid].max() <= 254
    np.testing.assert_allclose(
        (stored / 254)[:, valid], expected[:, valid], atol=0.5 / 254 + 1e-5
    )


# --- cloud-optimized maps -------------------------------------------------------------------


def tall_blobs(height: int, width: int) -> np.ndarray:
    """A scene of blocks of 3 x 5 pixels, so that an average of class numbers would be seen."""
    small = noise(height // 3 + 1, width // 5 + 1)
    return small.repeat(3, axis=1).repeat(5, axis=2)[:, :height, :width]


def test_a_cog_holds_the_pixels_of_the_geotiff_and_overviews(land, tmp_path):
    pixels = tall_blobs(530, 700)
    pixels[:, :90, :120] = 0
    scene = write_scene(tmp_path / "scene.tif", pixels, nodata=0)
    options = ("--patch_size", "512", *EVERYTHING)
    for form in ("gtiff", "cog"):
        output = tmp_path / form / "map.tif"
        assert run(land.path, scene, output, "--format", form, *options) == 0
    assert {path.name for path in (tmp_path / "cog").iterdir()} == {
        path.name for path in (tmp_path / "gtiff").iterdir()
    }
    for name in ("map", "map_confidence", "map_uncertainty", "map_probabilities"):
        with (
            rasterio.open(tmp_path / "gtiff" / f"{name}.tif") as plain,
            rasterio.open(tmp_path / "cog" / f"{name}.tif") as cog,
        ):
            assert cog.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
            assert "LAYOUT" not in plain.tags(ns="IMAGE_STRUCTURE")
            np.testing.assert_array_equal(cog.read(), plain.read())
            for what in ("crs", "transform", "nodata", "dtypes", "scales"):
                assert getattr(cog, what) == getattr(plain, what)
            assert cog.descriptions == plain.descriptions
            ours = {"SOFTWARE", "MODEL", "CLASS_NAMES", "PRECISION", "NORMALIZATION"}
            assert ours <= cog.tags().keys()
            assert {tag: cog.tags()[tag] for tag in ours} == {
                tag: plain.tags()[tag] for tag in ours
            }
            assert cog.overviews(1) and not plain.overviews(1)
    beside = ElementTree.parse(tmp_path / "cog" / "map.tif.aux.xml").getroot()
    assert [node.text for node in beside.iter("Category")][:1] == ["water"]


def test_overviews_of_classes_are_classes_and_those_of_confidence_are_means(
    models, tmp_path
):
    model = make_pixel_model(
        models / "bands.pth", 60 * np.eye(5), np.zeros(5), class_names=list("abcde")
    )
    stripes = np.full((5, 600, 600), 300, np.uint16)  # classes 1 and 4, three to one
    stripes[1], stripes[4, :, ::4] = 5000, 9000
    scene = write_scene(tmp_path / "scene.tif", stripes)
    options = ("--patch_size", "512", "--format", "cog", "--save_confidence")
    assert run(model.path, scene, tmp_path / "map.tif", *options) == 0
    with rasterio.open(tmp_path / "map.tif") as file:
        assert file.colorinterp == (ColorInterp.palette,)
        assert file.colormap(1)[4] == (*class_colours(5)[4], 255)
        assert file.overviews(1) == [2]
        assert set(np.unique(file.read())) == {1, 4}
    for name in ("map.tif", "map_confidence.tif"):
        with rasterio.open(tmp_path / name) as file:
            full = file.read(1)
        with rasterio.open(tmp_path / name, overview_level=0) as file:
            small = file.read(1)
        squares = full.reshape(300, 2, 300, 2)
        if name == "map.tif":
            assert set(np.unique(small)) <= {1, 4}  # an average would be 2 or 3
            same = (squares == squares[:, :1, :, :1]).all(axis=(1, 3))
            np.testing.assert_array_equal(small[same], squares[:, 0, :, 0][same])
        else:
            np.testing.assert_allclose(small, squares.mean(axis=(1, 3)), rtol=1e-5)


def test_a_small_cog_has_no_overviews_and_is_one_all_the_same(land, scene, tmp_path):
    assert run(land.path, scene, tmp_path / "map.tif", "--format", "cog") == 0
    with rasterio.open(tmp_path / "map.tif") as file:
        assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert file.overviews(1) == [] and file.nodata == 255
        assert file.colorinterp == (ColorInterp.palette,)
        assert file.compression.name == "deflate"


# --- creation options and metadata ----------------------------------------------------------


def test_outputs_become_bigtiff_when_they_may_need_it(
    land, scene, tmp_path, monkeypatch
):
    plain, profiles = create_tiff, []
    copy, copied = rasterio.shutil.copy, []

    def create(path, **profile):
        profiles.append(profile)
        return plain(path, **profile)

    def copying(source, target, **options):
        copied.append(options)
        return copy(source, target, **options)

    patch_everywhere(monkeypatch, "common.tiffs.create_tiff", create)
    monkeypatch.setattr(rasterio.shutil, "copy", copying)
    options = (*EVERYTHING, "--format", "cog")
    assert run(land.path, scene, tmp_path / "map.tif", *options) == 0
    assert len(profiles) == len(copied) == 4
    assert {profile["bigtiff"].upper() for profile in profiles} == {"IF_SAFER"}
    assert {options["BIGTIFF"] for options in copied} == {"IF_SAFER"}


def test_every_output_says_what_made_it(land, scene, tmp_path):
    assert run(land.path, scene, tmp_path / "map.tif", *EVERYTHING) == 0
    for name in ("map", "map_confidence", "map_uncertainty", "map_probabilities"):
        with rasterio.open(tmp_path / f"{name}.tif") as file:
            tags = file.tags()
        assert tags["SOFTWARE"] == f"SemanticSeg4EO {VERSION}"
        assert (tags["MODEL"], tags["MODEL_FILES"]) == ("unet-dropout", "land.pth")
        assert (tags["NORMALIZATION"], tags["PRECISION"]) == ("dataset", "fp32")
        names = ["water", "forêt", "bare soil", "town"]
        assert json.loads(tags["CLASS_NAMES"]) == names


# --- honest input ---------------------------------------------------------------------------


def warnings_of(capsys) -> list[str]:
    lines = capsys.readouterr().err.splitlines()
    return [line for line in lines if "warning" in line]


@pytest.mark.parametrize(
    ("change", "strange"),
    [
        (lambda image: image, []),
        (lambda image: (image / 10_000).astype(np.float32), [1, 2, 3]),
        (lambda image: (image // 39).astype(np.uint8), [1, 2, 3]),
        (lambda image: image + np.array([0, 9000, 0], np.uint16)[:, None, None], [2]),
        (lambda image: image * np.array([1, 0, 1], np.uint16)[:, None, None] + 1, [2]),
    ],
    ids=["same", "reflectance", "8 bit", "shifted", "constant"],
)
def test_values_that_the_model_was_not_trained_on_are_told_once_with_their_bands(
    land, tmp_path, capsys, change, strange
):
    scene = write_scene(tmp_path / "scene.tif", change(noise(150, 200)))
    assert run(land.path, scene, tmp_path / "map.tif") == 0
    told = warnings_of(capsys)
    assert len(told) == bool(strange)
    if strange:
        assert str(scene) in told[0] and str(land.path) in told[0]
        named = [band for band in (1, 2, 3) if f"{band} (median" in told[0]]
        assert named == strange


def test_a_shifted_scene_names_the_bands_as_the_file_counts_them(
    land, tmp_path, capsys
):
    pixels = noise(80, 80)[::-1].copy()
    pixels[1] += 20_000
    scene = write_scene(tmp_path / "scene.tif", np.concatenate([pixels[:1], pixels]))
    bands = ("--bands", "4,3,2")
    assert run(land.path, scene, tmp_path / "map.tif", *bands) == 0
    (told,) = warnings_of(capsys)
    assert "in band 3 (median 2.5" in told and told.count("median") == 1


def test_of_many_strange_bands_four_are_named(models, tmp_path, capsys):
    model = make_pixel_model(models / "ten.pth", np.eye(10), np.zeros(10))
    pixels = noise(70, 70, bands=10) // 1000
    scene = write_scene(tmp_path / "scene.tif", pixels)
    assert run(model.path, scene, tmp_path / "map.tif") == 0
    (told,) = warnings_of(capsys)
    assert told.count("median") == 4 and "and 6 more" in told


def test_a_model_without_statistics_gives_no_warning(land, tmp_path, capsys):
    legacy = write_legacy(tmp_path / "legacy.pth", land, "metadata")
    scene = write_scene(tmp_path / "scene.tif", noise(70, 70) // 5000)
    assert run(legacy, scene, tmp_path / "map.tif") == 0
    assert warnings_of(capsys) == []


@pytest.mark.parametrize("shape", [(1, 1), (20, 300), (63, 64), (64, 65), (500, 10)])
def test_sampled_pixels_are_valid_ones_of_the_scene(tmp_path, shape):
    pixels = noise(*shape)
    pixels[:, shape[0] // 2 + 1 :: 7] = 0
    path = write_scene(tmp_path / "scene.tif", pixels, nodata=0)
    with open_raster(path) as scene:
        found = sample_pixels(scene, [3, 1])
    there = {tuple(pixel) for pixel in pixels[[2, 0]].reshape(2, -1).T if pixel.all()}
    assert len(found) and {tuple(pixel) for pixel in found} <= there


def test_a_scene_without_a_valid_pixel_is_told_and_nothing_else(land, tmp_path, capsys):
    scene = write_scene(
        tmp_path / "scene.tif", np.zeros((3, 40, 40), np.uint16), nodata=0
    )
    assert run(land.path, scene, tmp_path / "map.tif") == 0
    (warning,) = warnings_of(capsys)
    assert "has no valid pixel" in warning


# --- names of polygons ----------------------------------------------------------------------


def test_polygons_of_one_scene_go_into_the_file_that_is_named(scene):
    config = configure(input=[str(scene)], polygons="fields/a.gpkg")
    (task,) = list_tasks(config)
    assert task.polygons == Path("fields/a.gpkg")


def test_polygons_of_several_scenes_go_into_a_folder(scene, tmp_path):
    scenes = [str(scene), str(tmp_path / "b.tif")]
    config = configure(input=scenes, output=str(tmp_path / "maps"), polygons="fields")
    found = [task.polygons for task in list_tasks(config)]
    names = ("scene_prediction.gpkg", "b_prediction.gpkg")
    assert found == [Path("fields") / name for name in names]


@pytest.mark.parametrize("several", [False, True])
def test_a_name_of_polygons_that_does_not_fit_is_a_wrong_command_line(
    land, scene, tmp_path, capsys, several
):
    scenes = [scene, tmp_path / "b.tif"] if several else scene
    output = tmp_path / ("maps" if several else "map.tif")
    wrong = ["a.gpkg"] if several else ["a.shp", "fields", "a.geojson"]
    for name in wrong:
        with pytest.raises(SystemExit) as stop:
            run(land.path, scenes, output, "--polygons", name)
        assert stop.value.code == 2
        assert f"--polygons {name}" in capsys.readouterr().err
    assert not output.exists()


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
    for number, colour in enumerate(class_colours(4)):
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
    assert colours[299] == (*class_colours(300)[299], 255)
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
    for colour in class_colours(4):
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


def test_the_default_window_is_512_pixels_and_the_batch_is_chosen():
    required = ["--model", "m.pth", "--input", "a.tif", "--output", "b.tif"]
    parsed = prediction.build_parser().parse_args(required)
    assert (parsed.patch_size, parsed.overlap, parsed.batch_size) == (512, 128, "auto")
    assert (parsed.blend, parsed.tta, parsed.precision) == ("hann", "none", "auto")
    assert (parsed.format, parsed.max_memory, parsed.resume) == ("gtiff", None, False)
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
        ("--batch_size", "1.5"),
        ("--batch_size", "-2"),
        ("--batch_size", "many"),
        ("--max_memory", "0"),
        ("--max_memory", "-1"),
        ("--max_memory", "nan"),
        ("--min_area", "-1"),
        ("--min_area", "nan"),
        ("--min_area", "100"),
        ("--blend", "mean"),
        ("--tta", "all"),
        ("--format", "jp2"),
        ("--precision", "int8"),
        ("--precision", "fp16"),
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
    with pytest.raises(RasterError, match="missing.tif"):
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
    assert f"{cut} is cut off" in error and "1 of 3 scenes" in error
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


@pytest.mark.parametrize("rule", ["dataset", "image"])
def test_a_scene_that_ends_in_the_middle_leaves_nothing_behind(
    land, tmp_path, capsys, rule
):
    scene = cut_off(tmp_path / "cut.tif")
    with rasterio.open(scene) as file:  # it opens, and its first rows are there
        assert file.read(window=Window(0, 0, 40, 32)).all()
    folder = tmp_path / "out"
    folder.mkdir()
    options = ("--patch_size", "32", "--overlap", "8", "--save_confidence")
    model = land.path  # whose values are compared with the scene's before anything
    if rule == "image":
        model = write_legacy(tmp_path / "legacy.pth", land, "metadata")
    assert run(model, scene, folder / "map.tif", *options) == 1
    assert f"{scene} is cut off" in capsys.readouterr().err
    assert os.listdir(folder) == []


@pytest.mark.parametrize("name", ["map.tif", "map.tiff", "map.TIF"])
def test_the_map_has_the_name_that_was_asked_for(land, scene, tmp_path, name):
    folder = tmp_path / "out"
    options = ("--quicklook", "--format", "cog")
    assert run(land.path, scene, folder / name, *options) == 0
    more = ["map_quicklook.png", "map_statistics.json"]
    assert sorted(os.listdir(folder)) == sorted([name, f"{name}.aux.xml", *more])


def test_a_run_that_fails_leaves_the_earlier_map_as_it_was(land, scene, tmp_path):
    output = tmp_path / "out" / "map.tif"
    assert run(land.path, scene, output, "--save_confidence") == 0
    before = {path: path.read_bytes() for path in output.parent.iterdir()}
    cut = cut_off(tmp_path / "cut.tif")
    assert run(land.path, cut, output, "--save_confidence") == 1
    assert {path: path.read_bytes() for path in output.parent.iterdir()} == before


def test_an_interrupted_run_leaves_the_unfinished_map_and_nothing_else(
    land, tmp_path, capsys, monkeypatch
):
    calls = interrupt(monkeypatch, "prediction.predictor.Predictor.__call__", 3)
    scene = write_scene(tmp_path / "scene.tif", noise(200, 40))
    folder = tmp_path / "out"
    threads = threading.active_count()
    assert run(land.path, scene, folder / "map.tif", "--save_confidence") == 130
    assert len(calls) >= 3 and os.listdir(folder) == [".map.tif-partial"]
    left = set(os.listdir(folder / ".map.tif-partial"))
    assert left == {"run.json", "classes.raw", "confidence.raw", "done-0.txt"}
    assert "interrupted" in capsys.readouterr().err
    assert threading.active_count() == threads


def test_sigterm_ends_a_run_as_ctrl_c_does_and_its_handler_goes_back(
    land, scene, tmp_path, monkeypatch
):
    def ended(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000):  # the handler runs between two steps of Python
            time.sleep(0.01)
        raise AssertionError("SIGTERM was not noticed")

    patch_everywhere(monkeypatch, "prediction.layers.classify", ended)
    before = signal.getsignal(signal.SIGTERM)
    folder = tmp_path / "out"
    assert run(land.path, scene, folder / "map.tif") == 130
    assert signal.getsignal(signal.SIGTERM) is before
    assert os.listdir(folder) == [".map.tif-partial"]


@pytest.mark.parametrize("ending", [0, 1, 2])
def test_the_handler_of_sigterm_goes_back_however_a_run_ends(
    land, scene, tmp_path, ending
):
    before = signal.getsignal(signal.SIGTERM)
    model = land.path if ending != 1 else tmp_path / "missing.pth"
    wrong = ("--threshold", "0.7") if ending == 2 else ()
    try:
        assert run(model, scene, tmp_path / "map.tif", *wrong) == ending
    except SystemExit as stop:
        assert stop.code == ending
    assert signal.getsignal(signal.SIGTERM) is before


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
    assert report["model"] == [str(land.path)]
    assert report["run"]["precision"] == "fp32"
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
    assert captured.out == report_text(report) + "\n"
    assert captured.out.startswith(str(output))
    assert "warning" in captured.err and "bare soil" not in captured.err


# --- normalization --------------------------------------------------------------------------


def image_rule(image: np.ndarray) -> np.ndarray:
    """Divide by the joint 99th percentile of all bands, clip."""
    return np.clip(image / np.percentile(image, 99), 0, 1)


def write_legacy(path: Path, model: PixelModel, key: str, number=int) -> Path:
    """A checkpoint with the documented keys alone."""
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


# --- looking ahead --------------------------------------------------------------------------


def files_in(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}


def test_a_check_tells_what_a_run_will_take_and_leaves_nothing(
    land, scene, tmp_path, capsys
):
    before = files_in(tmp_path)
    assert run(land.path, scene, tmp_path / "new" / "map.tif", "--check") == 0
    told, err = capsys.readouterr()
    assert told.splitlines()[-1] == "Nothing stands against this run."
    assert "scenes        1, 0.0 megapixels\nwindows       4 of 64 x 64" in told
    assert "error" not in err
    assert files_in(tmp_path) == before


def test_what_a_check_says_is_what_a_run_takes(land, scene, tmp_path, batches):
    more = write_scene(tmp_path / "more.tif", noise(64, 200), DESCRIPTIONS)
    config = configure(
        model=[str(land.path)], input=[str(scene), str(more)], output=str(tmp_path),
        patch_size=64, overlap=16, precision="fp32", save_confidence=True,
    )  # fmt: skip
    faults, outlook = check_scenes(config)
    assert not faults
    assert outlook["scenes"] == 2 and outlook["pixels"] == 100 * 90 + 64 * 200
    assert outlook["precision"] == "fp32"
    assert outlook["window_seconds"] > 0 and outlook["memory"] > 1e8
    tasks = list_tasks(config)
    models, team = load_models(config), ProcessGroup()
    batches.clear()
    for task in tasks:
        map_scene(task, config, models, team)
    assert outlook["windows"] == sum(shape[0] for shape in batches)
    # classes of a byte and confidences of four
    assert outlook["unfinished"] == max(100 * 90, 64 * 200) * 5
    assert outlook["maps"] == (100 * 90 + 64 * 200) * 5


def test_a_check_tells_all_faults_at_once(land, scene, tmp_path, capsys):
    broken = cut_off(write_scene(tmp_path / "broken.tif", noise(80, 80)))
    fewer = write_scene(tmp_path / "fewer.tif", noise(80, 80, bands=2))
    missing, maps = tmp_path / "missing.tif", tmp_path / "maps"
    scenes = [scene, broken, missing, fewer]
    before = files_in(tmp_path)
    assert run(land.path, scenes, maps, "--check") == 1
    told, err = capsys.readouterr()
    lines = err.splitlines()
    assert told == "" and len(lines) == 3 and all("error: " in line for line in lines)
    for words in ("broken.tif is cut off", "missing.tif", "fewer.tif gives 2 bands"):
        assert any(words in line for line in lines), words
    assert files_in(tmp_path) == before


def test_a_check_looks_at_scenes_and_outputs_without_a_model(scene, tmp_path, capsys):
    broken = cut_off(write_scene(tmp_path / "broken.tif", noise(80, 80)))
    notes = tmp_path / "notes.txt"
    notes.write_text("no model")
    file = tmp_path / "file"
    file.write_text("")
    models = [tmp_path / "none.pth", notes]
    assert run(models, [scene, broken], file / "maps", "--check") == 1
    lines = capsys.readouterr().err.splitlines()
    for words in ("none.pth", "notes.txt", "broken.tif is cut off", "--output"):
        assert any(words in line for line in lines), words
    assert len(lines) == 4


def test_a_check_sees_a_run_that_cannot_be_resumed_and_a_disk_without_room(
    land, scene, tmp_path, capsys, monkeypatch
):
    output = tmp_path / "map.tif"
    assert run(land.path, scene, output) == 0
    options = "--resume", "--check", "--overlap", "32"
    assert run(land.path, scene, output, *options) == 1
    assert "--overlap 16, not 32" in capsys.readouterr().err
    room = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: room)
    assert run(land.path, scene, output, "--check") == 1
    assert "GB free" in capsys.readouterr().err


def test_a_check_tells_a_warning_once(land, tmp_path, capsys):
    scene = write_scene(tmp_path / "scene.tif", noise(64, 64), DESCRIPTIONS, crs=None)
    assert run(land.path, scene, tmp_path / "map.tif", "--check") == 0
    assert capsys.readouterr().err.count("has no CRS") == 1


def test_a_check_leaves_out_what_is_finished(land, scene, tmp_path, capsys):
    more = write_scene(tmp_path / "more.tif", noise(64, 64), DESCRIPTIONS)
    maps = tmp_path / "maps"
    maps.mkdir()
    assert run(land.path, scene, maps) == 0
    capsys.readouterr()
    assert run(land.path, [scene, more], maps, "--resume", "--check") == 0
    assert "scenes        1, 0.0 megapixels" in capsys.readouterr().out


def test_a_finished_scene_needs_no_room(land, scene, tmp_path, monkeypatch):
    output = tmp_path / "map.tif"
    assert run(land.path, scene, output) == 0
    room = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: room)
    assert run(land.path, scene, output, "--resume") == 0
    assert run(land.path, scene, output) == 1


def test_what_a_kill_left_of_a_finished_map_is_removed(land, scene, tmp_path):
    output, partial = tmp_path / "map.tif", tmp_path / ".map.tif-partial"
    assert run(land.path, scene, output) == 0
    partial.mkdir()
    (partial / "classes.raw").write_bytes(bytes(100))
    assert run(land.path, scene, output, "--resume") == 0
    assert not partial.exists()


def test_a_run_touches_nothing_that_another_scene_leaves_aside(land, tmp_path):
    """Their names are long, and alike but for the end."""
    start = "S2A_MSIL2A_20230101T101031_N0509_R022_T3"
    scene = write_scene(tmp_path / f"{start}2TQM.tif", noise(64, 64), DESCRIPTIONS)
    maps = tmp_path / "maps"
    maps.mkdir()
    with atomic_write(maps / f"{start}3UUP_prediction_statistics.json") as part:
        part.write_text("half")
        assert run(land.path, scene, maps) == 0
        assert part.read_text() == "half"


def test_a_check_of_a_scene_of_nodata_alone_measures_nothing(land, tmp_path, capsys):
    empty = write_scene(tmp_path / "empty.tif", noise(70, 70) * 0, nodata=0)
    assert run(land.path, empty, tmp_path / "map.tif", "--check") == 0
    told = capsys.readouterr().out
    assert "windows" in told and "time" not in told


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
    for name in PredictionConfig.__dataclass_fields__:
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
    assert not folder.exists()


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
