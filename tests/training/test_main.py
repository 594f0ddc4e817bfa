"""main.py: wrong command lines, errors of data, help and lists."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    QUICK,
    ROOT,
    make_patch,
    patch_everywhere,
    run_main,
    train,
    write_dataset,
    write_raster,
)
from training_helpers import origin_of

from common.architectures import get_available_models
from common.errors import DatasetError
from model_training import (
    get_available_encoders,
)
from training.settings import TrainingConfig

# --- errors ---------------------------------------------------------------------------------


def last_line(err: str) -> str:
    return err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--dataset_root"),
        (("--dataset_root", "data"), "--model"),
        (("--dataset_root", "data", "--model", "unett"), "did you mean 'unet'"),
        (("--dataset_root", "data", "--model", "fpn", "--epochs", "x"), "--epochs"),
        (("--dataset_root", "data", "--model", "fpn", "--epochs", 0), "--epochs 0"),
        (("--dataset_root", "data", "--model", "fpn", "--mode", "three"), "--mode"),
        (("--dataset_root", "data", "--model", "fpn", "--loss", "dise"), "'dice'"),
        (("--dataset_root", "data", "--model", "fpn", "--epoch", 1), "--epoch"),
        (("--dataset_root", "data", "--model", "fpn", "--scheduler", "x"), "cosine"),
        (
            (
                "--dataset_root",
                "d",
                "--model",
                "unet-dropout",
                "--encoder_name",
                "vgg11",
            ),
            "no exchangeable encoder",
        ),
    ],
)
def test_a_wrong_command_line_ends_with_2_and_names_the_option(arguments, words):
    status, out, err = run_main(*arguments)
    assert status == 2 and out == ""
    assert last_line(err).startswith("main.py: error: ")
    assert words in last_line(err)
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--encoder_name", "resnet3"), "did you mean 'resnet34'"),
        (("--rgb_bands", "1,2,99"), "--rgb_bands 1,2,99"),
        (("--encoder_name", "densenet121", "--model", "pan"), "DenseNet"),
    ],
)
def test_what_only_the_libraries_or_the_data_can_tell_ends_with_2_as_well(
    small_data, tmp_path, options, words
):
    status, _, err = run_main(
        *("--dataset_root", small_data, "--save_dir", tmp_path, *QUICK, *options)
    )
    assert status == 2
    assert words in last_line(err) and "Traceback" not in err


def break_nothing(root: Path):
    pass


def remove_label(root: Path):
    min(root.rglob("train/labels/*.tif")).unlink()


def remove_image(root: Path):
    min(root.rglob("validation/images/*.tif")).unlink()


def empty_validation(root: Path):
    for file in root.rglob("validation/*/*.tif"):
        file.unlink()


def cut_image(root: Path):
    file = sorted(root.rglob("train/images/*.tif"))[1]
    file.write_bytes(file.read_bytes()[:-700])


def text_as_image(root: Path):
    sorted(root.rglob("train/images/*.tif"))[1].write_text("no image")


def strange_value(root: Path):
    file = min(root.rglob("validation/labels/*.tif"))
    write_raster(file, np.full((32, 32), 9, np.uint8), origin=origin_of(file))


def other_bands(root: Path):
    file = min(root.rglob("validation/images/*.tif"))
    image, _ = make_patch(np.random.default_rng(0), bands=7)
    write_raster(file, image, origin=origin_of(file))


def other_size(root: Path):
    for kind, array in (
        ("images", np.ones((4, 16, 16), np.uint16)),
        ("labels", np.zeros((16, 16), np.uint8)),
    ):
        file = sorted(root.rglob(f"train/{kind}/*.tif"))[1]
        write_raster(file, array, origin=origin_of(file))


def shifted_label(root: Path):
    file = min(root.rglob("train/labels/*.tif"))
    write_raster(file, np.zeros((32, 32), np.uint8), origin=(1000.0, 2000.0))


def no_labels(root: Path):
    for file in root.rglob("train/labels/*.tif"):
        write_raster(file, np.full((32, 32), 255, np.uint8), origin=origin_of(file))


def no_valid_pixel(root: Path):
    for file in root.rglob("train/images/*.tif"):
        image = np.zeros((4, 32, 32), np.uint16)
        write_raster(file, image, nodata=0, origin=origin_of(file))


def no_training(root: Path):
    for file in root.rglob("train/*/*.tif"):
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "options", "words"),
    [
        (no_training, (), "there is no training split, only validation"),
        (remove_label, (), "patch_000.tif has no label"),
        (remove_image, (), "has no image"),
        (empty_validation, (), "No images found in"),
        pytest.param(
            *(cut_image, (), "patch_001.tif"),
        ),
        (text_as_image, (), "patch_001.tif"),
        (strange_value, (), "holds 9"),
        (other_bands, (), "(7, 32, 32)"),
        (other_size, (), "(4, 16, 16)"),
        (shifted_label, (), "the same ground"),
        (no_labels, (), "No patch of the train split has a labelled pixel"),
        (no_valid_pixel, (), "labelled pixel"),
        (break_nothing, ("--in_channels", 7), "--in_channels 7"),
        (break_nothing, ("--dataset_root", "nowhere"), "nowhere"),
        (break_nothing, ("--encoder_weights", "none.pth"), "none.pth"),
        pytest.param(
            break_nothing,
            ("--device", "cuda"),
            "--device cuda",
            marks=pytest.mark.skipif(
                torch.cuda.is_available(), reason="this machine has a GPU"
            ),
        ),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_cannot_be_done_ends_with_1_and_one_line_that_names_it(
    tmp_path, damage, options, words
):
    root = write_dataset(tmp_path / "data", 3, 2, 0, bands=4)
    damage(root)
    save_dir = tmp_path / "out"
    status, out, err = run_main(
        *("--dataset_root", root, "--save_dir", save_dir, *QUICK, *options)
    )
    assert status == 1 and out == ""
    assert last_line(err).startswith("error: ") and words in last_line(err)
    surveyed = re.compile(r"(train|validation|test) +\d+ patches|no test split")
    assert len([line for line in err.splitlines() if not surveyed.match(line)]) == 1
    assert not list(save_dir.glob("*.pth"))


def test_an_interrupted_run_ends_with_130(monkeypatch):
    def interrupt(config):
        raise KeyboardInterrupt

    patch_everywhere(monkeypatch, "training.experiment.run_experiment", interrupt)
    status, out, err = run_main("--dataset_root", "data", *QUICK)
    assert (status, out, err) == (130, "", "interrupted; --resume continues the run\n")


def test_debug_shows_the_traceback():
    with pytest.raises(DatasetError):
        run_main("--dataset_root", "nowhere", *QUICK, "--debug")


def test_in_channels_that_agrees_is_fine(small_data, tmp_path):
    done = train(small_data, tmp_path, "--in_channels", 4)
    assert done.metadata()["training_params"]["in_channels"] == 4


def test_a_save_dir_that_is_a_file_is_an_error_without_traceback(small_data, tmp_path):
    (tmp_path / "file").write_text("")
    status, _, err = run_main(
        *("--dataset_root", small_data, "--save_dir", tmp_path / "file", *QUICK)
    )
    assert status == 1 and "file" in last_line(err) and "Traceback" not in err


def test_a_save_dir_that_is_a_file_is_found_before_training(small_data, tmp_path):
    (tmp_path / "file").write_text("")
    _, _, err = run_main(
        *("--dataset_root", small_data, "--save_dir", tmp_path / "file", *QUICK)
    )
    assert "epoch" not in err and "train " not in err


def test_a_seed_that_not_every_library_takes_is_refused(small_data, tmp_path):
    options = ("--dataset_root", small_data, "--save_dir", tmp_path, *QUICK)
    status, _, err = run_main(*options, "--seed", 2**32)
    assert status == 2 and "argument --seed: expected a smaller" in err


def test_names_of_two_classes_go_with_a_binary_model(small_data, tmp_path):
    done = train(small_data, tmp_path, "--class_names", "dry,wet")
    assert done.metadata()["class_names"] == ["dry", "wet"]
    found = done.report["validation"]
    assert found["iou"] == found["per_class"][1]["iou"]  # wet is the foreground
    assert found["per_class"][1]["name"] == "wet"


def test_labels_of_one_class_are_refused_before_training(tmp_path):
    root = write_dataset(tmp_path / "data", 2, 1, 0, bands=3)
    for file in root.rglob("labels/*.tif"):
        write_raster(file, np.zeros((32, 32), np.uint8), origin=origin_of(file))
    status, _, err = run_main(
        *("--dataset_root", root, "--save_dir", tmp_path / "out", *QUICK)
    )
    assert status == 1
    assert "class 0" in err and "as 0,1 or 0,255" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_second_run_leaves_no_file_of_the_first(small_data, tmp_path):
    train(small_data, tmp_path)
    folds = ("--val_strategy", "kfold", "--n_splits", 2)
    train(small_data, tmp_path, *folds, "--overwrite")
    assert not list(tmp_path.glob("model_best_*.pth"))


# --- help and lists -------------------------------------------------------------------------


def test_help_names_every_setting_and_its_default():
    status, out, _ = run_main("--help")
    assert status == 0
    for item in fields(TrainingConfig):
        assert f"--{item.name}" in out
    flat = " ".join(out.split())
    for default in ("0.001", "resnet34", "trained_models", "dice+ce", "100", "42"):
        assert f"(default: {default})" in flat


def test_help_and_wrong_command_lines_import_no_heavy_library():
    code = """
import sys, main
for arguments in (["--help"], ["--model", "unet"], ["--list_models"],
                  ["--dataset_root", "x", "--model", "unett"],
                  ["--dataset_root", "x", "--model", "unet", "--epochs", "0"]):
    try:
        main.main(arguments)
    except SystemExit:
        pass
heavy = ("torch", "torchvision", "segmentation_models_pytorch", "timm", "sklearn",
         "scipy", "geopandas", "matplotlib", "cv2")
loaded = [name for name in heavy if name in sys.modules]
sys.exit(f"imported: {loaded}" if loaded else 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-300:]


def test_main_runs_as_a_script():
    command = [sys.executable, str(ROOT / "main.py"), "--list_models"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.split() == get_available_models()


def test_the_lists_print_what_the_options_take():
    status, out, _ = run_main("--list_encoders")
    assert status == 0
    assert out.split() == get_available_encoders()
