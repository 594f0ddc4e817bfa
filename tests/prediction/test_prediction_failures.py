"""Runs that fail or are interrupted: what they leave and what they say."""

from __future__ import annotations

import os
import signal
import threading

import numpy as np
import pytest
import rasterio
import torch
from helpers import interrupt, patch_everywhere, signal_during, small_files
from prediction_helpers import (
    cut_off,
    make_pixel_model,
    noise,
    run,
    write_legacy,
    write_scene,
)
from rasterio.windows import Window

from prediction.mapfiles import MapWriter
from prediction.statistics import Statistics

# --- reading ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "prediction.statistics.confidence_counts",
        "prediction.reader.read_row_blocks",
        "prediction.layers.mask_layers",
    ],
)
def test_a_gpu_without_memory_for_the_rows_is_reported_and_leaves_nothing(
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
    assert not list((tmp_path / "out").glob("map*"))
    monkeypatch.undo()
    assert run(land.path, scene, tmp_path / "out" / "map.tif", "--resume") == 0


# --- failures ---------------------------------------------------------------------------


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
    more = ["map.qml", "map_quicklook.png", "map_statistics.json"]
    assert sorted(os.listdir(folder)) == sorted([name, f"{name}.aux.xml", *more])


def test_a_run_that_fails_leaves_the_earlier_map_as_it_was(land, scene, tmp_path):
    output = tmp_path / "out" / "map.tif"
    assert run(land.path, scene, output, "--save_confidence") == 0
    before = {path: path.read_bytes() for path in output.parent.iterdir()}
    cut = cut_off(tmp_path / "cut.tif")
    assert run(land.path, cut, output, "--save_confidence", "--overwrite") == 1
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
    signal_during(monkeypatch, "prediction.layers.classify", 1, signal.SIGTERM)
    before = signal.getsignal(signal.SIGTERM)
    folder = tmp_path / "out"
    assert run(land.path, scene, folder / "map.tif") == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert not (folder / "map.tif").exists()


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


# --- known defects ----------------------------------------------------------------------


def test_a_full_disk_is_an_error_and_leaves_no_map(land, tmp_path):
    scene = write_scene(tmp_path / "scene.tif", noise(200, 200))
    folder = tmp_path / "out"
    with small_files(8000):
        status = run(land.path, scene, folder / "map.tif", "--save_confidence")
    assert status == 1
    assert not folder.exists()


def test_a_network_that_gives_no_numbers_makes_no_map(models, scene, tmp_path):
    big = np.finfo(np.float32).max
    model = make_pixel_model(models / "nan.pth", np.full((3, 3), big), [0, 0, 0])
    assert run(model.path, scene, tmp_path / "map.tif") == 1
    assert not (tmp_path / "map.tif").exists()


def test_class_names_that_do_not_fit_the_model_are_an_error(models, scene, tmp_path):
    path = models / "names.pth"
    make_pixel_model(path, np.eye(3), [0, 0, 0], class_names=["one", "two"])
    assert run(path, scene, tmp_path / "map.tif") == 1


@pytest.mark.parametrize("device", ["xpu", "xla"])
def test_a_device_that_is_neither_cpu_nor_cuda_is_a_wrong_command_line(
    land, scene, tmp_path, device
):
    with pytest.raises(SystemExit) as stop:
        run(land.path, scene, tmp_path / "map.tif", "--device", device)
    assert stop.value.code == 2


def test_a_missing_scene_is_reported_in_one_line(land, tmp_path, capsys):
    assert run(land.path, tmp_path / "missing.tif", tmp_path / "map.tif") == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
