"""The options of Predict_large_image.py: what each changes, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import rasterio
from helpers import ROOT
from prediction_helpers import make_pixel_model, noise, read_map, run, write_scene

import Predict_large_image as prediction
from common.errors import RasterError
from prediction.settings import PredictionConfig

# --- options ----------------------------------------------------------------------------


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
        options = ("--threshold", threshold, "--overwrite")
        assert run(model.path, scene, tmp_path / "map.tif", *options) == 0
        assert (read_map(tmp_path / "map.tif") == expected).all()


def test_a_threshold_for_several_classes_is_a_wrong_command_line(
    land, scene, tmp_path, capsys
):
    with pytest.raises(SystemExit) as stop:
        run(land.path, scene, tmp_path / "map.tif", "--threshold", "0.7")
    assert stop.value.code == 2
    assert "--threshold 0.7" in capsys.readouterr().err


def test_bands_select_and_order_by_number_and_by_description(land, tmp_path):
    pixels = noise(64, 60)
    straight = write_scene(tmp_path / "straight.tif", pixels)
    assert run(land.path, straight, tmp_path / "expected.tif") == 0
    shuffled = np.stack([pixels[2], noise(64, 60, 1, seed=9)[0], pixels[1], pixels[0]])
    names = ("B04 red", "B05", "B03 green", "B02 blue")
    scene = write_scene(tmp_path / "shuffled.tif", shuffled, names)
    expected = read_map(tmp_path / "expected.tif")
    for bands in ("4,3,1", "B02,B03,B04", "b02 blue, 3, B04 RED"):
        options = ("--overwrite", "--bands", bands)
        assert run(land.path, scene, tmp_path / "map.tif", *options) == 0
        np.testing.assert_array_equal(read_map(tmp_path / "map.tif"), expected)
    options = ("--overwrite", "--bands", "1,3,4")
    assert run(land.path, scene, tmp_path / "map.tif", *options) == 0
    assert (read_map(tmp_path / "map.tif") != expected).any()


@pytest.mark.parametrize("bands", ["1,2,4", "B02,B03,B99", "0,1,2", "1,2"])
def test_bands_that_are_not_there_are_refused(land, scene, tmp_path, capsys, bands):
    assert run(land.path, scene, tmp_path / "map.tif", "--bands", bands) == 1
    error = capsys.readouterr().err
    assert "--bands" in error and str(scene) in error
    assert not (tmp_path / "map.tif").exists()


def test_bands_in_another_order_than_in_training_are_reported(
    land, scene, tmp_path, capsys
):
    assert run(land.path, scene, tmp_path / "map.tif") == 0
    assert "trained on" not in capsys.readouterr().err
    assert run(land.path, scene, tmp_path / "other.tif", "--bands", "3,2,1") == 0
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
        options = ("--overwrite", "--num_classes", number)
        assert run(water.path, scene, output, *options) == 0


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


def test_window_and_batch_are_chosen_by_default():
    required = ["--model", "m.pth", "--input", "a.tif", "--output", "b.tif"]
    parsed = prediction.build_parser().parse_args(required)
    assert (parsed.patch_size, parsed.overlap, parsed.batch_size) == (
        None,
        None,
        "auto",
    )
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
        ("--sieve", "0"),
        ("--sieve", "-1"),
        ("--min_area", "-1"),
        ("--min_area", "nan"),
        ("--min_area", "100"),
        ("--simplify", "0"),
        ("--simplify", "10"),
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


# --- command line -----------------------------------------------------------------------


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
    assert "(default: a quarter of the window)" in " ".join(text.split())


# --- known defects ----------------------------------------------------------------------


def test_a_probability_equal_to_the_threshold_is_foreground_where_windows_meet(
    models, tmp_path
):
    model = make_pixel_model(models / "half.pth", [[0, 0, 0]], [0])
    scene = write_scene(tmp_path / "scene.tif", noise(150, 150))
    assert run(model.path, scene, tmp_path / "map.tif", "--threshold", "0.5") == 0
    assert (read_map(tmp_path / "map.tif") == 1).all()
