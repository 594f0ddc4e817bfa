"""What the tests of prediction share: scenes, toy models of which NumPy alone knows the map, runs.

Most runs use a U-Net whose weights are set by hand so that it is a linear classifier of single
pixels. Where windows matter, a second network looks at neighbours.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from math import ceil
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from rasterio.control import GroundControlPoint
from rasterio.enums import ColorInterp
from rasterio.transform import from_origin
from torch import nn

import Predict_large_image as prediction
from common.architectures import ModelConfig
from model_training import (
    Normalization,
    UNetDropout,
    build_model,
    load_checkpoint,
    save_checkpoint,
)
from prediction.blending import blended_rows
from prediction.layers import Layer
from prediction.reader import RowBlock
from prediction.settings import PredictionConfig
from prediction.tiling import Extent, extent_to_read, lay_windows

CRS = "EPSG:32631"


TRANSFORM = from_origin(431_240, 4_912_560, 10, 10)


RGBA = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]


CPU = torch.device("cpu")


DESCRIPTIONS = ("B02 blue", "B03 green", "B04 red")


# --- scenes -----------------------------------------------------------------------------


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


# --- models -----------------------------------------------------------------------------


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


@contextmanager
def small_network():
    """Have a ``unet-dropout`` some thousand weights: the network is not the subject here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UNetDropout, "WIDTHS", (12, 8, 8, 8, 8))
        yield


def linear_network(weights: np.ndarray, bias: np.ndarray):
    """A ``unet-dropout`` that computes ``weights @ pixel + bias`` and sees no neighbour.

    All kernels are zero but the centres of those on the way from the input over the first skip
    connection to the head, which hand each band on unchanged.
    """
    classes, bands = weights.shape
    config = ModelConfig("unet-dropout", bands, classes, None)
    with small_network():
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


# --- toy predictors ---------------------------------------------------------------------


def everywhere(shape) -> np.ndarray:
    return np.ones(shape, bool)


def array_blocks(image: np.ndarray, valid: np.ndarray, part: Extent, cuts=()):
    """A part of an array as the row blocks that a scene would be read in, cut at some rows."""
    edges = {part.top, part.bottom, *(c for c in cuts if part.top < c < part.bottom)}
    columns = slice(part.left, part.right)
    for top, bottom in pairwise(sorted(edges)):
        rows = torch.from_numpy(image[:, top:bottom, columns])
        yield RowBlock(top, rows, *[valid[top:bottom, columns]] * 2)


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
    extent=None,
    cuts=(),
    form="hann",
):
    """A extent (K, h, w) and its validity (h, w) out of ``blended_rows``; the whole by default."""
    shape = image.shape[1:]
    valid = everywhere(shape) if valid is None else valid
    layouts = tuple(lay_windows(side, patch_size, overlap, form) for side in shape)
    extent = extent or Extent(0, shape[0], 0, shape[1])
    source = array_blocks(
        image, valid, extent_to_read(layouts, extent, batch_size), cuts
    )
    channels, row, parts, seen = len(image), extent.top, [], []
    for done, part, known in blended_rows(
        source, in_torch(predict), layouts, extent, channels, batch_size
    ):
        assert done == (row, row + part.shape[1], extent.left, extent.right)
        assert part.shape[1:] == known.shape and known.size
        row = done.bottom
        parts.append(part.numpy().copy())
        seen.append(known)
    assert row == extent.bottom and next(source, None) is None
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


# --- unfinished maps --------------------------------------------------------------------


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
    """What is stored of a part: its layers and counts, here its pixels and its corner."""
    top, bottom, left, right = part
    layers = {name: array[:, top:bottom, left:right] for name, array in arrays.items()}
    return layers, np.array([(bottom - top) * (right - left), top, 0])


# --- resuming ---------------------------------------------------------------------------


EVERYTHING = ("--save_confidence", "--save_uncertainty", "--save_probabilities")


def outcome(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- further layers ---------------------------------------------------------------------


def entropy_share(probabilities: np.ndarray) -> np.ndarray:
    """Entropy over the first axis as a share of that of equal probabilities."""
    from scipy.stats import entropy

    if len(probabilities) == 1:
        probabilities = np.concatenate([probabilities, 1 - probabilities])
    return entropy(probabilities, axis=0) / np.log(len(probabilities))


# --- scenes -----------------------------------------------------------------------------


def check_map(model: PixelModel, output: Path, image: np.ndarray, valid: np.ndarray):
    """A map is nodata exactly where ``valid`` is not, and the model's classes elsewhere."""
    classes = read_map(output)
    np.testing.assert_array_equal(classes == 255, ~valid)
    probabilities = model.probabilities(np.where(valid, image, 1).astype(np.float64))
    best = np.sort(probabilities, axis=0)
    clear = valid & (best[-1] - best[-2] > 1e-5)
    assert clear.any()
    np.testing.assert_array_equal(classes[clear], probabilities.argmax(axis=0)[clear])


def corner_points(height: int, width: int) -> list[GroundControlPoint]:
    return [
        GroundControlPoint(row, column, 3 + column / 1000, 44 - row / 1000)
        for row, column in ((0, 0), (0, width), (height, 0), (height, width))
    ]


# --- statistics of a run ----------------------------------------------------------------


def mapped_area(model: PixelModel, folder: Path, **place) -> float:
    """Square metres of a map of 40 x 50 pixels, all classes together, as its JSON says."""
    scene = write_scene(folder / "scene.tif", noise(40, 50), **place)
    assert run(model.path, scene, folder / "map.tif", "--overwrite") == 0
    report = read_json(folder / "map_statistics.json")
    return 1e4 * sum(entry["area_ha"] for entry in report["classes"])


# --- normalization ----------------------------------------------------------------------


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


# --- checks ----------------------------------------------------------------------


def files_in(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}


def make_model(path: Path, weights, bias, low, high, **metadata) -> PixelModel:
    """A classifier of single pixels with a normalization of its own."""
    weights, bias = np.array(weights, np.float32), np.array(bias, np.float32)
    model, config = linear_network(weights, bias)
    numbers = Normalization("dataset", tuple(low), tuple(high))
    save_checkpoint(path, model, config, numbers, metadata)
    return PixelModel(path, weights, bias, np.array(low), np.array(high))


def confidence_of(folder: Path) -> np.ndarray:
    return read_map(folder / "map_confidence.tif")
