"""The precision of the forward pass, and how auto finds it."""

from __future__ import annotations

from pathlib import Path

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
from helpers import interrupt, patch_everywhere
from prediction_helpers import (
    CRS,
    TRANSFORM,
    confidence_of,
    make_model,
    noise,
    read_json,
    run,
    write_scene,
)

from prediction.predictor import Predictor


def precision_of(path: Path) -> str:
    with rasterio.open(path) as file:
        return file.tags()["PRECISION"]


def test_bf16_and_fp32_agree(land, scene, tmp_path):
    found = {}
    for precision in ("fp32", "bf16"):
        folder = tmp_path / precision
        options = ("--precision", precision, "--save_confidence")
        assert run(land.path, scene, folder / "map.tif", *options) == 0
        found[precision] = confidence_of(folder)
        assert precision_of(folder / "map.tif") == precision
        assert precision_of(folder / "map_confidence.tif") == precision
    difference = abs(found["fp32"] - found["bf16"])
    assert 0 < difference.max() < 2e-2


def test_fp16_on_the_cpu_is_a_wrong_command_line(land, scene, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(land.path, scene, tmp_path / "map.tif", "--precision", "fp16")
    assert stop.value.code == 2
    assert "--precision fp16" in capsys.readouterr().err


@pytest.fixture
def delicate(tmp_path) -> tuple[Path, Path]:
    """A model that decides by the ninth bit, and a scene of 16 windows around its limit."""
    model = make_model(
        tmp_path / "m.pth", [[1000, 0, 0]], [-500], [0] * 3, [10_000] * 3
    )
    pixels = noise(200, 200) // 50 + 4900  # 4900 to 5100
    return model.path, write_scene(tmp_path / "delicate.tif", pixels)


def test_auto_computes_in_fp32_and_says_so_where_classes_would_change(
    delicate, tmp_path, capsys, monkeypatch
):
    patch_everywhere(
        monkeypatch, "common.devices.native_precisions", lambda device: ["bf16"]
    )
    output = tmp_path / "map.tif"
    assert run(*delicate, output, "--precision", "auto") == 0
    assert "computing in fp32" in capsys.readouterr().err
    assert precision_of(output) == "fp32"
    assert read_json(tmp_path / "map_statistics.json")["run"]["precision"] == "fp32"


@pytest.mark.parametrize(
    "native", [["bf16"], ["bf16", "fp16"], ["bf16", "fp16", "tf32"], []]
)
def test_auto_takes_what_is_native_where_classes_stay(
    land, tmp_path, capsys, monkeypatch, native
):
    patch_everywhere(
        monkeypatch, "common.devices.native_precisions", lambda device: native
    )
    pixels = np.where(noise(200, 200) > 5000, 9000, 2000).astype(np.uint16)
    scene = write_scene(tmp_path / "scene.tif", pixels)
    output = tmp_path / "map.tif"
    assert run(land.path, scene, output, "--precision", "auto") == 0
    assert "computing in" not in capsys.readouterr().err
    assert precision_of(output) == (native or ["fp32"])[0]


def test_auto_takes_the_next_native_precision_where_the_first_changes_classes(
    delicate, tmp_path, capsys, monkeypatch
):
    native = ["bf16", "fp16"]
    patch_everywhere(
        monkeypatch, "common.devices.native_precisions", lambda device: native
    )
    plain = Predictor._average_views

    def exact_in_fp16(self, *arguments):
        if self.precision == "fp16":
            monkeypatch.setattr(self, "precision", "fp32")
        return plain(self, *arguments)

    monkeypatch.setattr(Predictor, "_average_views", exact_in_fp16)
    output = tmp_path / "map.tif"
    assert run(*delicate, output, "--precision", "auto") == 0
    err = capsys.readouterr().err
    assert "bf16 changes the class of" in err and "computing in fp16" in err
    assert precision_of(output) == "fp16"


def test_auto_makes_no_trial_for_a_few_windows(
    land, scene, tmp_path, monkeypatch, batches
):
    patch_everywhere(
        monkeypatch, "common.devices.native_precisions", lambda device: ["bf16"]
    )
    output = tmp_path / "map.tif"
    assert run(land.path, scene, output, "--precision", "auto") == 0
    assert precision_of(output) == "fp32"
    assert sum(shape[0] for shape in batches) == 4


def test_a_part_of_a_scene_gets_the_precision_of_the_whole(land, tmp_path, monkeypatch):
    patch_everywhere(
        monkeypatch, "common.devices.native_precisions", lambda device: ["bf16"]
    )
    pixels = np.where(noise(200, 200) > 5000, 9000, 2000).astype(np.uint16)
    scene = write_scene(tmp_path / "scene.tif", pixels)
    (left, top), (right, bottom) = TRANSFORM * (70, 40), TRANSFORM * (90, 60)
    shapes = [shapely.box(left, bottom, right, top)]
    area = tmp_path / "area.gpkg"
    geopandas.GeoDataFrame(geometry=shapes, crs=CRS).to_file(area)
    options = ("--precision", "auto", "--area", str(area))
    assert run(land.path, scene, tmp_path / "map.tif", *options) == 0
    assert precision_of(tmp_path / "map.tif") == "bf16"


def test_auto_makes_its_trial_where_pixels_are_valid(
    delicate, tmp_path, monkeypatch, batches
):
    model, path = delicate
    with rasterio.open(path) as file:
        pixels = file.read()
    pixels[:, :, 60:] = 0  # most windows hold nothing
    scene = write_scene(tmp_path / "holes.tif", pixels, nodata=0)
    patch_everywhere(
        monkeypatch, "common.devices.native_precisions", lambda device: ["bf16"]
    )
    assert run(model, scene, tmp_path / "map.tif", "--precision", "auto") == 0
    assert precision_of(tmp_path / "map.tif") == "fp32"


def test_a_resumed_run_keeps_the_precision_that_was_found(
    delicate, tmp_path, monkeypatch
):
    patch_everywhere(
        monkeypatch, "common.devices.native_precisions", lambda device: ["bf16"]
    )
    output = tmp_path / "map.tif"
    with monkeypatch.context() as patch:
        interrupt(patch, "prediction.layers.compute_layers", 2)
        assert run(*delicate, output, "--precision", "auto") == 130
    calls = interrupt(monkeypatch, "prediction.precision.choose_precision", 99)
    assert run(*delicate, output, "--precision", "auto", "--resume") == 0
    assert calls == [] and precision_of(output) == "fp32"
