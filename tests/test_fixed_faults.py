"""Faults of version 1.1 that must not come back, by the numbers they have in ``pytest -m fault``."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import geopandas
import numpy as np
import pytest
import rasterio
import torch
from helpers import (
    QUICK,
    cell,
    grid,
    run_main,
    write_dataset,
    write_model,
    write_raster,
)

import Patch_extraction
import Predict_large_image
from common import machine
from common.architectures import ModelConfig
from common.devices import local_device
from common.errors import CheckpointError, OptionError, RasterError
from common.interruption import until_stopped
from common.rasters import Source, gdal_options, open_raster, select_bands
from main import interrupted
from model_training import (
    build_loss,
    build_model,
    combined_score,
    load_checkpoint,
    scores,
)
from training.epochs import false_alarms

fault = pytest.mark.fault


def scene_and_label(folder: Path, bands: int = 3, side: int = 64) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(1, 9_999, (bands, side, side)).astype(np.uint16)
    write_raster(folder / "scene.tif", image)
    write_raster(
        folder / "label.tif", rng.integers(0, 2, (side, side)).astype(np.uint8)
    )


def extract(folder: Path, *options) -> int:
    words = [
        "extract",
        "--image",
        folder / "scene.tif",
        "--label",
        folder / "label.tif",
    ]
    words += ["--output", folder / "out", "--patch_size", 32, *options]
    return Patch_extraction.main(list(map(str, words)))


@fault(3)
def test_extraction_flushes_its_own_files_where_the_system_cannot_flush_all(
    tmp_path, monkeypatch
):
    monkeypatch.delattr(os, "sync", raising=False)  # as on Windows
    flushed = []
    plain = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: flushed.append(plain(file)))
    scene_and_label(tmp_path)
    assert extract(tmp_path) == 0
    assert len(flushed) >= 2 * 4


@fault(9)
def test_dropout_of_a_model_without_dropout_is_refused():
    words = ("--dataset_root", "d", "--model", "deeplabv3_resnet50")
    status, _, err = run_main(*words, "--dropout_rate", 0.5)
    assert status == 2 and "--dropout_rate 0.5" in err


@fault(11)
def test_patches_have_the_dtype_of_the_selected_bands(tmp_path):
    path = tmp_path / "scene.vrt"
    write_raster(tmp_path / "a.tif", np.full((8, 8), 7, np.uint8))
    write_raster(tmp_path / "b.tif", np.full((8, 8), 0.5, np.float32))
    kinds = {"a.tif": "Byte", "b.tif": "Float32"}
    bands = "".join(
        f'<VRTRasterBand dataType="{kind}" band="{number}"><SimpleSource>'
        f'<SourceFilename relativeToVRT="1">{name}</SourceFilename>'
        "<SourceBand>1</SourceBand></SimpleSource></VRTRasterBand>"
        for number, (name, kind) in enumerate(kinds.items(), start=1)
    )
    path.write_text(
        '<VRTDataset rasterXSize="8" rasterYSize="8"><SRS>EPSG:32631</SRS>'
        f"<GeoTransform>500030, 10, 0, 4649970, 0, -10</GeoTransform>{bands}</VRTDataset>"
    )
    with open_raster(path) as scene:
        assert Source(scene, [1]).read()[0].dtype == np.uint8
        assert Source(scene, [1, 2]).read()[0].dtype == np.float32


@fault(14)
@pytest.mark.parametrize("classes", [1, 4])
def test_focal_loss_is_that_of_the_probabilities_that_prediction_uses(classes):
    torch.manual_seed(0)
    logits = torch.randn(2, classes, 5, 6)
    mask = torch.randint(0, max(2, classes), (2, 5, 6))
    mask[0, 0] = 255
    if classes == 1:
        foreground = logits[:, 0].sigmoid()
        true = torch.where(mask == 1, foreground, 1 - foreground)
    else:
        true = logits.softmax(1).gather(1, mask.where(mask != 255, 0)[:, None])[:, 0]
    expected = (-((1 - true) ** 2) * true.log())[mask != 255].mean()
    mode = "binary" if classes == 1 else "multiclass"
    value = build_loss("focal", mode, 255)(logits, mask)
    torch.testing.assert_close(value, expected)


@fault(18)
def test_a_model_file_whose_weights_have_changed_is_refused(tmp_path):
    path = tmp_path / "model.pth"
    write_model(path)
    content = torch.load(path, weights_only=True)
    assert len(content["metadata"]["weights_sha256"]) == 64
    weights = content["model_state_dict"].values()
    value = next(tensor for tensor in weights if tensor.is_floating_point())
    value.view(-1)[0] += 1e-3
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(path)
    del content["metadata"]["weights_sha256"]  # as files of 1.1 are
    torch.save(content, path)
    assert load_checkpoint(path).config.in_channels == 3


@fault(21)
def test_free_memory_is_the_least_of_system_and_control_groups(tmp_path):
    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    def group(folder: str, names: tuple, limit: str, used: int, cached: int) -> None:
        most, current, key = names
        write(f"sys/fs/cgroup/{folder}/memory.{most}", f"{limit}\n")
        write(f"sys/fs/cgroup/{folder}/memory.{current}", f"{used}\n")
        write(f"sys/fs/cgroup/{folder}/memory.stat", f"anon 1\n{key} {cached}\n")

    first = ("limit_in_bytes", "usage_in_bytes", "total_inactive_file")
    second = ("max", "current", "inactive_file")
    assert machine.free_memory(tmp_path) == 4 << 30  # another system
    write("proc/meminfo", "MemTotal: 900 kB\nMemAvailable: 256000000 kB\n")
    assert machine.free_memory(tmp_path) == 256_000_000 << 10  # an ordinary host
    write("proc/self/cgroup", "0::/user.slice/job\n")
    group("user.slice/job", second, "max", 5, 0)
    assert machine.free_memory(tmp_path) == 256_000_000 << 10
    group("user.slice", second, "9000", 5000, 1000)  # of the group that it is in
    assert machine.free_memory(tmp_path) == 5000
    write("proc/self/cgroup", "7:cpu:/x\n4:memory:/docker/a\n")
    group("memory", first, "7000", 4000, 500)  # what a container sees
    assert machine.free_memory(tmp_path) == 3500
    write("proc/meminfo", "MemAvailable: 2 kB\n")
    assert machine.free_memory(tmp_path) == 2048


@fault(22)
def test_gdal_uses_the_cores_of_this_process(monkeypatch):
    monkeypatch.setattr("common.rasters.available_cores", lambda: 3)
    with rasterio.Env(**gdal_options()):
        assert int(rasterio.env.getenv()["GDAL_NUM_THREADS"]) == 3


@fault(24)
def test_a_huge_cell_elsewhere_stops_no_scene(tmp_path):
    scene_and_label(tmp_path)
    cells = [cell(0, 0), cell(32, 0), cell(0, 32), cell(100_000, 0, 50_000)]
    grid(cells).to_file(tmp_path / "grid.gpkg")
    assert extract(tmp_path, "--grid", tmp_path / "grid.gpkg", "--save_metadata") == 0
    report = json.loads((tmp_path / "out" / "Patch" / "metadata.json").read_text())
    assert len(report["patches"]) == 3 and len(report["skipped"]) == 1
    assert list(report["skipped"].values()) == ["outside the image"]
    table = geopandas.read_file(
        tmp_path / "out" / "Patch" / "cells.gpkg", layer="cells"
    )
    assert len(table) == 3


@pytest.fixture
def mapping(tmp_path, monkeypatch) -> Path:
    """A model and a scene, in the working directory."""
    write_model(tmp_path / "model.pth")
    scene_and_label(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def predict(*options: str) -> int:
    words = ["--model", "model.pth", "--device", "cpu", "--patch_size", "32"]
    try:
        return Predict_large_image.main([*words, "--overlap", "8", *options])
    except SystemExit as ended:
        return ended.code


@fault(28)
def test_maps_into_the_folder_of_the_scenes_are_refused_at_the_first_run(
    mapping, capsys
):
    (mapping / "scenes").mkdir()
    (mapping / "scene.tif").rename(mapping / "scenes" / "scene.tif")
    assert predict("--input", "scenes", "--output", "scenes") == 2
    assert "--output scenes: expected another folder" in capsys.readouterr().err
    assert [path.name for path in (mapping / "scenes").iterdir()] == ["scene.tif"]


@fault(29)
def test_polygons_do_not_replace_an_input(mapping, capsys):
    (mapping / "scene.gpkg").write_bytes(b"mine")
    words = ["--input", "scene.gpkg", "--output", "map.tif", "--polygons", "scene.gpkg"]
    assert predict(*words) == 2
    assert "--polygons scene.gpkg: expected not an input" in capsys.readouterr().err
    assert (mapping / "scene.gpkg").read_bytes() == b"mine"


@fault(34)
@pytest.mark.parametrize("check", ["training.preflight", "prediction.preflight"])
def test_a_preflight_ends_by_a_signal_as_a_run_does(
    mapping, monkeypatch, capsys, check
):
    import signal

    def killed(config):
        for _ in until_stopped(range(2)):
            os.kill(os.getpid(), signal.SIGTERM)

    if check.startswith("training"):
        monkeypatch.setattr("training.preflight.check_experiment", killed)
        status, _, err = run_main("--dataset_root", "d", *QUICK, "--check")
    else:
        monkeypatch.setattr("prediction.preflight.check_scenes", killed)
        status = predict("--input", "scene.tif", "--output", "map.tif", "--check")
        err = capsys.readouterr().err
    assert status == 143 and err.splitlines()[-1].startswith("interrupted")


@fault(35)
def test_unlabelled_share_and_a_missing_test_split_are_reported(tmp_path):
    data = write_dataset(tmp_path / "data", 4, 2, 0, bands=3, unlabelled_rows=8)
    status, _, err = run_main(
        "--dataset_root", data, "--save_dir", tmp_path / "out", *QUICK
    )
    assert status == 0
    assert "3 bands, 25.0 % of the pixels unlabelled" in err
    assert "no test split, and so no test score" in err


@fault(37)
def test_the_best_model_so_far_is_of_this_run(tmp_path):
    best = tmp_path / "model_best_combined.pth"
    best.write_bytes(b"of an earlier run")
    os.utime(best, (1, 1))
    assert "best model" not in interrupted(str(tmp_path), time.time() - 5)
    assert "best model" in interrupted(str(tmp_path), 0)  # a resumed run
    os.utime(best)
    assert "best model" in interrupted(str(tmp_path), time.time() - 5)


@fault(38)
def test_several_processes_do_not_share_a_gpu_that_has_a_number(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(OptionError, match="--device cuda:0: expected cuda, since each"):
        local_device("cuda:0")


@fault(43)
@pytest.mark.parametrize(
    ("text", "expected"),
    [("1-3,5", [1, 2, 3, 5]), ("6, 2-2", [6, 2]), ("4 - 6", [4, 5, 6])],
)
def test_bands_are_given_as_ranges(tmp_path, text, expected):
    path = write_raster(tmp_path / "a.tif", np.ones((6, 4, 4), np.uint8))
    with open_raster(path) as scene:
        assert select_bands(scene, text) == expected


@fault(43)
@pytest.mark.parametrize("text", ["0-2", "5-7", "4-3", "1-"])
def test_ranges_outside_the_raster_are_refused(tmp_path, text):
    path = write_raster(tmp_path / "a.tif", np.ones((6, 4, 4), np.uint8))
    with (
        open_raster(path) as scene,
        pytest.raises(RasterError, match=f"--bands .?{text}"),
    ):
        select_bands(scene, text)


@fault(47)
@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
def test_weights_of_a_compiled_or_wrapped_model_open(tmp_path, prefix):
    config = ModelConfig("unet-dropout", 3, 2, None)
    state = build_model(config).network.state_dict()
    torch.save(
        {prefix + key: value for key, value in state.items()}, tmp_path / "w.pth"
    )
    described = {"model_name": "unet-dropout", "in_channels": 3, "num_classes": 2}
    opened = load_checkpoint(tmp_path / "w.pth", described=described)
    for key, value in opened.model.network.state_dict().items():
        assert torch.equal(value, state[key])


@fault(52)
def test_a_stray_pixel_of_a_class_that_validation_lacks_chooses_no_other_epoch():
    names = ["a", "b", "c"]
    right = np.array([[90, 10, 0], [10, 90, 0], [0, 0, 0]])
    stray = np.array([[89, 10, 1], [10, 90, 0], [0, 0, 0]])
    held = right.sum(axis=1) > 0
    before = combined_score(scores(right, names, False, of=held))
    after = combined_score(scores(stray, names, False, of=held))
    assert abs(before - after) < 0.01
    reported = scores(stray, names, False)
    assert reported["mean_iou"] < 0.6 and reported["per_class"][2]["iou"] == 0
    assert false_alarms(right) == 0 and false_alarms(stray) == 1 / 200
