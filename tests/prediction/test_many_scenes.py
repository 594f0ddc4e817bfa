"""Prediction of scenes of all kinds: drawn at random one by one, and many in one run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from affine import Affine
from helpers import CRS, ROOT, write_model
from hypothesis import given, settings
from hypothesis import strategies as st

import Predict_large_image as prediction
from common.architectures import ModelConfig
from common.distributed import ProcessGroup
from model_training import Checkpoint, Normalization
from prediction.ensemble import Models
from prediction.predictor import Predictor
from prediction.scene import map_scene
from prediction.settings import PredictionConfig
from prediction.tasks import list_tasks

# --- scenes drawn at random -----------------------------------------------------------------


WEIGHTS = np.array([[6, -3, 0], [-2, 7, 1], [0, -4, 6], [1, 1, -5]], np.float32)
LARGEST = 200.0  # value of a pixel


def pixel_models() -> Models:
    """A classifier of single pixels, as if it had been loaded from a file."""
    network = torch.nn.Conv2d(3, 4, 1, bias=False)
    with torch.no_grad():
        network.weight[:, :, 0, 0] = torch.tensor(WEIGHTS)
    normalization = Normalization("dataset", (0.0,) * 3, (LARGEST,) * 3)
    config = ModelConfig("unet", 3, 4)
    checkpoint = Checkpoint(network.eval(), config, normalization, {})
    device = torch.device("cpu")

    def make_predictor(precision: str, batch_size: int) -> Predictor:
        return Predictor([checkpoint], device, precision)

    return Models(["pixels.pth"], [checkpoint], device, make_predictor)


@st.composite
def scenes(draw):
    """Pixels (3, H, W), which of them are valid, and the profile of the file that holds them."""
    height, width = draw(st.integers(1, 150)), draw(st.integers(1, 150))
    dtype = np.dtype(draw(st.sampled_from(["u1", "u2", "i2", "i4", "f4", "f8"])))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    constant = draw(st.booleans())
    shape = (3, 1, 1) if constant else (3, height, width)
    pixels = np.broadcast_to(rng.integers(1, 201, shape), (3, height, width))
    pixels = pixels.astype(dtype)
    valid = np.ones((height, width), bool)
    kind = draw(st.sampled_from(["none", "frame", "speckles", "half", "all"]))
    if kind == "frame":
        valid[: height // 3], valid[:, width - width // 4 :] = False, False
    elif kind == "speckles":
        valid = rng.random((height, width)) < 0.7
    elif kind == "half":
        valid[np.add.outer(np.arange(height), np.arange(width)) % 90 > 45] = False
    elif kind == "all":
        valid[:] = False
    profile = {"dtype": dtype.name}
    if dtype.kind == "f" and draw(st.booleans()):
        # in any band is in all
        pixels[draw(st.integers(0, 2))][~valid] = draw(
            st.sampled_from([np.nan, np.inf])
        )
    elif not valid.all():
        profile["nodata"] = 0
        pixels[:, ~valid] = 0
    if draw(st.booleans()):
        profile |= {"tiled": True, "blockxsize": 32, "blockysize": 16}
    return pixels, valid, profile, constant


@st.composite
def windows(draw):
    size = draw(st.sampled_from([32, 48, 64, 96]))
    return {
        "patch_size": size,
        "overlap": draw(st.integers(0, size - 1)),
        "blend": draw(st.sampled_from(["hann", "gaussian", "linear", "none"])),
        "max_memory": draw(st.sampled_from([None, 1e-3, 1e-4])),
    }


@pytest.mark.slow
@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(scenes(), windows())
def test_every_valid_pixel_is_mapped_once_and_where_it_lies(scene, window):
    """Whatever the scene: classes as without windows, nodata where it was, the place kept."""
    pixels, valid, profile, constant = scene
    _, height, width = pixels.shape
    shape = {"count": 3, "height": height, "width": width, "driver": "GTiff"}
    place = {"crs": CRS, "transform": Affine(7.5, 0, 499_999.25, 0, -7.5, 4_000_000.5)}
    with tempfile.TemporaryDirectory() as folder:
        path, output = Path(folder, "scene.tif"), Path(folder, "map.tif")
        with rasterio.open(path, "w", **shape, **place, **profile) as file:
            file.write(pixels)
        config = PredictionConfig(
            ["pixels.pth"], [str(path)], str(output), save_confidence=True,
            device="cpu", precision="fp32", batch_size="2", **window,
        )  # fmt: skip
        (task,) = list_tasks(config)
        report = map_scene(task, config, pixel_models(), ProcessGroup())
        with rasterio.open(output) as file:
            classes, nodata = file.read(1), file.nodata
            assert file.crs == rasterio.crs.CRS.from_user_input(place["crs"])
            assert file.transform == place["transform"]
            assert file.shape == (height, width)
        with rasterio.open(task.beside("_confidence.tif")) as file:
            confidence = file.read(1)
        assert sorted(p.name for p in Path(folder).iterdir()) == [
            "map.qml", "map.tif", "map.tif.aux.xml", "map_confidence.qml", "map_confidence.tif",
            "map_statistics.json", "scene.tif",
        ]  # fmt: skip
    np.testing.assert_array_equal(classes != nodata, valid)
    np.testing.assert_array_equal(confidence != -1, valid)
    assert sum(one["pixels"] for one in report["classes"]) == valid.sum()
    logits = np.tensordot(WEIGHTS, pixels[:, valid] / LARGEST, 1)
    powers = np.exp(logits - logits.max(axis=0))
    probabilities = powers / powers.sum(axis=0)
    # up to a thousand windows are summed in float32
    np.testing.assert_allclose(confidence[valid], probabilities.max(axis=0), atol=3e-5)
    apart = np.ptp(np.sort(probabilities, axis=0)[-2:], axis=0) > 1e-4
    np.testing.assert_array_equal(
        classes[valid][apart], probabilities.argmax(axis=0)[apart]
    )
    if constant and valid.any():
        assert np.ptp(confidence[valid]) < 3e-5


# --- many scenes ----------------------------------------------------------------------------


FAULTS = ("cut off", "text", "empty", "bands", "complex", "missing")


def write_some_scene(path: Path, number: int) -> str | None:
    """Write a scene of its number's kind; why it cannot be mapped, or None."""
    rng = np.random.default_rng(number)
    height, width = (int(side) for side in rng.integers(20, 260, 2))
    dtype = ("uint16", "uint8", "int16", "float32", "float64", "uint16")[number % 6]
    fault = FAULTS[number // 8 % len(FAULTS)] if number % 8 == 5 else None
    pixels = rng.integers(1, 250, (2 if fault == "bands" else 3, height, width))
    pixels = pixels.astype("complex64" if fault == "complex" else dtype)
    profile = {"nodata": 0} if number % 3 == 0 else {}
    if number % 3 == 0:
        pixels[:, : height // 2, : width // 3] = 0
    if number % 40 == 3:
        pixels[:] = 0  # nodata alone is no fault
    if number % 5 == 0:
        profile |= {"tiled": True, "blockxsize": 64, "blockysize": 64}
    if number % 7 == 0:
        profile |= {"compress": "deflate"}
    shape = {"count": len(pixels), "height": height, "width": width}
    place = {"crs": CRS, "transform": Affine(10, 0, 5e5 + number, 0, -10, 4e6)}
    with rasterio.open(
        path, "w", driver="GTiff", dtype=pixels.dtype, **shape, **place, **profile
    ) as file:
        file.write(pixels)
    if fault == "cut off":
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    elif fault == "text":
        path.write_text("no raster")
    elif fault == "empty":
        path.write_bytes(b"")
    elif fault == "missing":
        path.unlink()
    return fault


# a process of its own: another's memory comes and goes with what it did before
WATCHED = """
import json, os, sys

sys.path.insert(0, {root!r})
import Predict_large_image
from prediction import scene

used, map_scene = [], scene.map_scene


def watched(*arguments):
    try:
        return map_scene(*arguments)
    finally:
        pages = int(open("/proc/self/statm").read().split()[1])
        used.append((pages * os.sysconf("SC_PAGESIZE"), len(os.listdir("/proc/self/fd"))))


scene.map_scene = watched
status = Predict_large_image.main()
json.dump(used, open({target!r}, "w"))
sys.exit(status)
"""


def contents(output: Path) -> dict[str, bytes]:
    """All files of a map by ending, without what a report says of names."""
    found = {
        path.name.removeprefix(output.stem): path.read_bytes()
        for path in output.parent.glob(f"{output.stem}*")
    }
    report = json.loads(found.pop("_statistics.json"))
    named = ("output", "run", "settings", "command")
    report = {key: report[key] for key in report if key not in named}
    return found | {"report": json.dumps(report).encode()}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_many_scenes_in_one_run(tmp_path):
    """The good ones as if alone, the bad ones reported, and nothing piles up."""
    write_model(tmp_path / "model.pth")
    names = [tmp_path / f"scene {number:03}.tif" for number in range(120)]
    faults = {path: write_some_scene(path, n) for n, path in enumerate(names)}
    bad = [path for path in names if faults[path]]
    assert {faults[path] for path in bad} == set(FAULTS)
    model = ["--model", str(tmp_path / "model.pth"), "--device", "cpu"]
    model += ["--patch_size", "64", "--overlap", "16", "--save_confidence"]

    def words(scenes: list[Path], output: Path) -> list[str]:
        return [*model, "--input", *map(str, scenes), "--output", str(output)]

    maps, target = tmp_path / "maps", tmp_path / "used.json"
    maps.mkdir()
    code = WATCHED.format(root=str(ROOT), target=str(target))
    done = subprocess.run(
        [sys.executable, "-c", code, *words(names, maps)],
        check=False, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 1
    errors = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
    assert errors[-1] == f"error: {len(bad)} of 120 scenes not mapped"
    assert len(errors) == len(bad) + 1
    for path, line in zip(bad, errors):
        assert str(path) in line
    made = {p.stem.removesuffix("_prediction") for p in maps.glob("*_prediction.tif")}
    assert made == {path.stem for path in names if not faults[path]}
    assert not [path for path in maps.iterdir() if path.name.startswith(".")]

    memory, descriptors = np.transpose(json.loads(target.read_text()))
    assert len(memory) == 120 and len(set(descriptors[5:])) == 1
    # the allocator settles in the first scenes
    assert memory[70:].max() < memory[20:70].max() + 10e6

    (tmp_path / "alone").mkdir()
    for path in names[::5]:
        if not faults[path]:
            alone = tmp_path / "alone" / f"{path.stem}_prediction.tif"
            assert prediction.main(words([path], alone)) == 0
            assert contents(alone) == contents(maps / alone.name)
