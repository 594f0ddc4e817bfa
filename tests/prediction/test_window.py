"""The side of the sliding window: tried on the scene when --patch_size is not given."""

from __future__ import annotations

from pathlib import Path

import geopandas
import numpy as np
import pytest
import shapely
import torch
from helpers import interrupt, patch_everywhere
from prediction_helpers import (
    CRS,
    EVERYTHING,
    TRANSFORM,
    make_pixel_model,
    noise,
    outcome,
    read_json,
    read_map,
    write_scene,
)
from torch import nn

import Predict_large_image as prediction
from common.architectures import ModelConfig
from model_training import Normalization, build_model, save_checkpoint
from prediction.window import windows_over_middle

fault = pytest.mark.fault
TRAINED = 64  # side of the patches, in pixels


def predict(model, scene, output: Path, *options) -> int:
    """The exit status of a prediction on the CPU, without a window unless one is given."""
    models = model if isinstance(model, list) else [model]
    scenes = scene if isinstance(scene, list) else [scene]
    words = ["--model", *models, "--input", *scenes, "--output", output, *options]
    fixed = ["--device", "cpu", "--precision", "fp32"]
    return prediction.main([*map(str, words), *fixed])


def window_of(output: Path) -> int:
    report = read_json(output.with_name(f"{output.stem}_statistics.json"))
    return report["run"]["options"]["patch_size"]


def squares(count: int, rng) -> tuple[np.ndarray, np.ndarray]:
    """Squares of a training patch's size, of three classes: classes (H, W), noisy pixels (1, H, W).

    A pixel alone does not tell its class, but their mean does.
    """
    classes = rng.integers(0, 3, (count, count)).repeat(TRAINED, 0).repeat(TRAINED, 1)
    pixels = 4000 + 1000 * classes + rng.normal(0, 1000, classes.shape)
    return classes, pixels[None].clip(1, 10_000).astype(np.float32)


@pytest.fixture(scope="module")
def excited(tmp_path_factory) -> Path:
    """A small network that pools over its window (squeeze-and-excitation), trained on 64 pixels."""
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    config = ModelConfig("unet", 1, 3, "tu-mobilenetv3_small_050")
    model = build_model(config).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)

    def batch(size: int):
        masks, images = zip(*[squares(1, rng) for _ in range(size)])
        images = torch.from_numpy(np.stack(images)) / 10_000
        return images, torch.from_numpy(np.stack(masks))

    for _ in range(40):
        images, masks = batch(4)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), masks).backward()
        optimizer.step()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    with torch.no_grad():
        model(batch(48)[0])  # statistics of the weights as they are now
    path = tmp_path_factory.mktemp("excited") / "model.pth"
    rule = Normalization("dataset", (0.0,), (10_000.0,))
    metadata = {"input_size": [TRAINED, TRAINED]}
    save_checkpoint(path, model.eval(), config, rule, metadata)
    return path


@pytest.mark.slow
@fault(56)
def test_a_model_that_pools_over_its_window_gets_that_of_its_training(
    excited, tmp_path, capsys
):
    accuracy = {}
    # nine windows of 512 pixels without an explicit size, one with it
    for size, count in ((None, 20), (512, 8)):
        classes, pixels = squares(count, np.random.default_rng(1))
        scene = write_scene(tmp_path / f"scene_{size}.tif", pixels)
        options = ["--overlap", 0, "--patch_size", size][: 4 if size else 2]
        output = tmp_path / f"map_{size}.tif"
        assert predict(excited, scene, output, *options) == 0
        accuracy[size] = (read_map(output) == classes).mean()
        err = capsys.readouterr().err
        assert ("leave --patch_size out" in err) == (size == 512)
        assert ("windows of 64 x 64 pixels" in err) == (size is None)
    assert window_of(tmp_path / "map_None.tif") == TRAINED
    assert accuracy[None] > 0.8 and accuracy[512] < 0.6


@pytest.fixture
def trained(tmp_path):
    """Make a classifier of single pixels, to which the window is all one, of a training's size."""

    def make(*input_size: int) -> Path:
        path = tmp_path / f"trained_{'_'.join(map(str, input_size))}.pth"
        weights = [[6, -3, 0], [-2, 7, 1], [0, -4, 6]]
        make_pixel_model(path, weights, [0, 0, 0], input_size=list(input_size))
        return path

    return make


@pytest.fixture
def small_sizes(monkeypatch):
    """Have 96 and 64 pixels for 512 and 256: the scenes may be small."""
    patch_everywhere(monkeypatch, "prediction.window.SIZES", (96, 64))


@pytest.fixture
def wide(tmp_path) -> Path:
    """A scene of nine windows of 96 pixels."""
    return write_scene(tmp_path / "wide.tif", noise(240, 240))


@fault(56)
def test_a_model_to_which_the_window_is_all_one_gets_the_largest(
    trained, wide, small_sizes, tmp_path, capsys
):
    assert predict(trained(32, 32), wide, tmp_path / "map.tif") == 0
    assert window_of(tmp_path / "map.tif") == 96
    err = capsys.readouterr().err
    assert "100 % of the pixels keep their class in windows of 96" in err
    assert "windows of 96 x 96 pixels" in err
    assert predict(trained(32, 32), wide, tmp_path / "new.tif", "--check") == 0
    assert "9 of 96 x 96" in capsys.readouterr().out


@fault(56)
@pytest.mark.parametrize(
    ("input_sizes", "size"),
    [
        ([(32, 32)], 64),  # not the largest, as 96 changes the classes
        ([(64, 64)], 64),
        ([(80, 80)], 80),
        ([(128, 128)], 128),
        ([(128, 128), (32, 48), ()], 64),
        ([(16, 16)], 64),
        ([()], 96),  # nobody knows
    ],
)
def test_what_changes_the_classes_is_not_taken(
    trained, wide, small_sizes, tmp_path, monkeypatch, input_sizes, size
):
    patch_everywhere(
        monkeypatch,
        "prediction.window.kept_classes",
        lambda job, trained, sizes: ((s, 0.5 if s > 64 else 0.9) for s in sizes),
    )
    models = [trained(*sides) for sides in input_sizes]
    assert predict(models, wide, tmp_path / "map.tif") == 0
    assert window_of(tmp_path / "map.tif") == size


@fault(56)
def test_a_scene_of_few_windows_gets_the_size_of_the_training(
    trained, small_sizes, tmp_path, batches
):
    scene = write_scene(tmp_path / "scene.tif", noise(168, 168))
    assert predict(trained(32, 32), scene, tmp_path / "map.tif") == 0
    assert window_of(tmp_path / "map.tif") == 32
    assert {shape[2:] for shape in batches} == {(32, 32)}  # and no trial


def test_a_part_of_a_scene_gets_the_window_of_the_whole(
    trained, wide, small_sizes, tmp_path
):
    (left, top), (right, bottom) = TRANSFORM * (90, 100), TRANSFORM * (130, 120)
    shapes = [shapely.box(left, bottom, right, top)]
    area = tmp_path / "area.gpkg"
    geopandas.GeoDataFrame(geometry=shapes, crs=CRS).to_file(area)
    output = tmp_path / "map.tif"
    assert predict(trained(32, 32), wide, output, "--area", area) == 0
    assert window_of(output) == 96


@fault(56)
def test_the_default_overlap_is_a_quarter_of_the_window(trained, tmp_path, batches):
    scene = write_scene(tmp_path / "scene.tif", noise(64, 112))
    options = ("--patch_size", 64, "--batch_size", 9)
    assert predict(trained(64, 64), scene, tmp_path / "map.tif", *options) == 0
    assert batches == [(2, 3, 64, 64)]
    options = (
        "--overlap",
        48,
        "--overwrite",
    )  # is as large as the window that is found
    with pytest.raises(SystemExit) as stop:
        predict(trained(32, 32), scene, tmp_path / "map.tif", *options)
    assert stop.value.code == 2


@fault(56)
def test_a_resumed_run_keeps_the_window_that_was_found(
    trained, wide, small_sizes, tmp_path, monkeypatch
):
    model = trained(32, 32)
    assert predict(model, wide, tmp_path / "whole" / "map.tif", *EVERYTHING) == 0
    output = tmp_path / "out" / "map.tif"
    with monkeypatch.context() as patch:
        interrupt(patch, "prediction.layers.compute_layers", 2)
        assert predict(model, wide, output, *EVERYTHING) == 130
    patch_everywhere(monkeypatch, "prediction.window.SIZES", (128,))
    calls = interrupt(monkeypatch, "prediction.window.kept_classes", 99)
    assert predict(model, wide, output, *EVERYTHING, "--resume") == 0
    assert predict(model, wide, output, *EVERYTHING, "--resume") == 0  # finished
    assert calls == [] and window_of(output) == 96
    maps = [outcome(path.parent) for path in (output, tmp_path / "whole" / "map.tif")]
    for name in ("map.tif", "map_confidence.tif", "map_probabilities.tif"):
        assert maps[0][name] == maps[1][name]


@fault(56)
def test_all_scenes_get_the_window_of_one_trial(
    trained, wide, small_sizes, tmp_path, monkeypatch, capsys
):
    bad = tmp_path / "bad.tif"
    bad.write_text("no raster")
    little = write_scene(tmp_path / "little.tif", noise(100, 100), crs=None)
    calls = interrupt(monkeypatch, "prediction.window.kept_classes", 99)
    scenes, output = [bad, wide, little], tmp_path / "maps"
    model = trained(32, 32)
    assert predict(model, scenes, output) == 1
    assert len(calls) == 1
    for name in ("wide", "little"):
        assert window_of(output / f"{name}_prediction.tif") == 96
    err = capsys.readouterr().err
    assert sum("bad.tif" in line for line in err.splitlines()) == 1
    assert err.count("has no CRS") == 1
    # one that is added later gets that of the rest
    more = write_scene(tmp_path / "more.tif", noise(80, 80))
    scenes = [wide, little, more]
    assert predict(model, scenes, output, "--resume") == 0
    assert window_of(output / "more_prediction.tif") == 96


def test_jobs_of_an_array_take_the_window_of_maps_that_are_there(
    trained, wide, small_sizes, tmp_path, monkeypatch, capsys
):
    """Though the first scene, on which they would try windows, has changed meanwhile."""
    later = write_scene(tmp_path / "later.tif", noise(240, 240, seed=1))
    model, output = trained(32, 32), tmp_path / "maps"
    assert predict(model, [wide, later], output, "--part", "1/2") == 0
    early = write_scene(tmp_path / "early.tif", noise(80, 80))  # gets no trial
    scenes = [early, wide, later]
    calls = interrupt(monkeypatch, "prediction.window.kept_classes", 99)
    for part, more in (("1/3", ()), ("3/3", ()), ("1/3", ("--overwrite",))):
        assert predict(model, scenes, output, "--part", part, *more) == 0
        text = f"windows of 96 x 96 pixels, as in {output}"
        assert text in capsys.readouterr().err
    assert not calls
    for name in ("early", "later"):
        assert window_of(output / f"{name}_prediction.tif") == 96
    # those of other options or models tell nothing
    for options in (("--bands", "1,2,3"), ()):
        other = trained(32, 48) if not options else model
        options = (*options, "--part", "1/3", "--overwrite")
        assert predict(other, scenes, output, *options) == 0
        assert window_of(output / "early_prediction.tif") == 32
    capsys.readouterr()


@pytest.mark.parametrize("length", [32, 64, 100, 416, 512])
@pytest.mark.parametrize("size", [32, 33, 45, 64, 65, 127, 224, 256, 511, 512, 600])
def test_windows_give_each_pixel_of_the_middle_once(length, size):
    given = []
    for window, inner in windows_over_middle(length, size):
        assert window.stop - window.start == min(size, length)
        assert 0 <= window.start and window.stop <= length
        assert 0 <= inner.start < inner.stop <= min(size, length)
        given += range(window.start + inner.start, window.start + inner.stop)
    extent = min(128, length // 2)
    first = (length - extent) // 2
    assert given == list(range(first, first + extent))


@fault(56)
def test_the_places_of_a_trial_hold_windows_of_the_training(
    trained, small_sizes, tmp_path, monkeypatch
):
    asked = []

    def kept(job, trained, sizes):
        asked.append((job.config.patch_size, trained, list(sizes)))
        return iter(())

    patch_everywhere(monkeypatch, "prediction.window.kept_classes", kept)
    scene = write_scene(tmp_path / "scene.tif", noise(300, 300))
    assert predict(trained(128, 128), scene, tmp_path / "map.tif") == 0
    assert asked == [(128, 128, [96])] and window_of(tmp_path / "map.tif") == 128
