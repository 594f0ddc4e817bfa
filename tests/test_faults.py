"""Faults that are alike in all scripts: extreme numbers, full disks, two runs into one output."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import rasterio
from faults import (
    COMMANDS,
    SIDE,
    assert_one_line,
    patch_path,
    read,
    run,
    snapshot,
    start,
    text,
    words,
)
from helpers import (
    CRS,
    ROOT,
    patch_everywhere,
)

import Patch_extraction
from extraction.settings import BatchConfig, ExtractionConfig, InfoConfig, SampleConfig
from prediction.settings import PredictionConfig
from training.settings import TrainingConfig


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("it's $HOME; #1 Überschwemmung 洪水", id="any letters"),
        pytest.param("x" * 246, id="250 characters"),
    ],
)
def test_no_faults_of_names_of_files(place, name, capfd):
    """Spaces, letters of any script, and 250 characters with the suffix."""
    for path in ("scene.tif", "label.tif", "grid.gpkg", "model.pth", "data"):
        os.makedirs(name, exist_ok=True)
        os.rename(path, Path(name, path))
    os.rename(Path(name, "scene.tif"), Path(name, f"{name}.tif"))
    folder = shlex.quote(name)
    scene = shlex.quote(f"{name}/{name}.tif")
    assert run(
        "extract",
        f"--image {scene} --label {folder}/label.tif --grid {folder}/grid.gpkg "
        f"--output {folder}/out",
    ) == 0  # fmt: skip
    assert len(list(Path(name, "out").rglob("images/*.tif"))) == 4
    assert run("train", f"--dataset_root {folder}/out --save_dir {folder}/models") == 0
    model = f"--model {folder}/models/model_final_model.pth --input {scene}"
    assert run("predict", f"{model} --output {folder}/map.tif --quicklook") == 0
    plain, _ = read(f"{name}/map.tif")
    capfd.readouterr()
    target = f"{name}/{name[:-1]}_.tif"
    ended = run("predict", f"{model} --output {shlex.quote(target)}")
    err = capfd.readouterr().err
    if ended:  # a name that leaves no room for those of the files beside it
        assert_one_line(err, r"--output x+_.tif: expected a shorter name", 2)
    else:
        np.testing.assert_array_equal(read(target)[0], plain)
    assert [p for p in Path(name).iterdir() if p.name.startswith(".")] == []


def test_no_faults_of_bands_of_several_dtypes(place):
    """A VRT may mix them; the patch holds all."""
    band = '<VRTRasterBand dataType="{}" band="{}"><SimpleSource><SourceFilename relativeToVRT="1">scene.tif</SourceFilename><SourceBand>{}</SourceBand></SimpleSource></VRTRasterBand>'
    with rasterio.open("scene.tif") as file:
        head = f"<SRS>{CRS}</SRS><GeoTransform>{str(file.transform.to_gdal())[1:-1]}</GeoTransform>"
    bands = "".join(
        band.format(t, n, n) for n, t in enumerate(("UInt16", "Float32", "Int16"), 1)
    )
    size = f'rasterXSize="{SIDE}" rasterYSize="{SIDE}"'
    Path("scene.vrt").write_text(f"<VRTDataset {size}>{head}{bands}</VRTDataset>")
    assert run("extract", "--image scene.vrt") == 0
    assert run("extract", "--image scene.tif --output plain") == 0
    for path in Path("plain").rglob("images/*.tif"):
        same = str(path).replace("plain", "out", 1)
        np.testing.assert_array_equal(read(same)[0], read(str(path))[0])
    assert run("predict", "--input scene.vrt") == 0
    assert run("predict", "--output plain.tif") == 0
    np.testing.assert_array_equal(read("map.tif")[0], read("plain.tif")[0])


CONFIGS = {
    "extract": ExtractionConfig,
    "batch": BatchConfig,
    "visualize": SampleConfig,
    "info": InfoConfig,
    "train": TrainingConfig,
    "predict": PredictionConfig,
}
HUGE = "1000000000"
EXTREMES = {
    int: ("0", "-1", "nan", "1.5", HUGE, "9" * 30),
    float: ("0", "-1", "nan", "inf", "-inf", "1e300", "1e-320", "much"),
}
# the extremes that mean something; all others must be refused
LEGAL_VALUES = {
    "accumulate": {HUGE},  # a step per epoch
    "batch_size": {HUGE},
    "block_size": {"1e300"},
    "buffer": {"0", "1e300", "1e-320"},
    "clip_grad": {"0", "1e300", "1e-320"},
    "dropout_rate": {"0", "1e-320"},
    "epochs": {HUGE},
    "freeze_encoder_epochs": {"0"},
    "ignore_index": {"-1", HUGE},
    "image_channels": {HUGE},  # the scene does not have as many
    "label_buffer": {"0", "1e300", "1e-320"},
    "learning_rate": {"1e300", "1e-320"},  # the loss shows it
    "mask_buffer": {"0", "1e300", "1e-320"},
    "max_memory": {"1e300"},
    "min_area": {"0", "1e300", "1e-320"},
    "min_valid": {"0", "1e-320"},
    "nodata": {"0", "-1", "1e300", "1e-320"},  # each scene says whether it fits
    "num_workers": {"0"},
    "overlap": {"0"},
    "patience": {"0", HUGE},
    "sample_index": {"0"},
    "seed": {"0", HUGE},
    "sieve": {"1e300", "1e-320"},
    "simplify": {"1e300", "1e-320"},
    "stride": {HUGE},
    "test_ratio": {"0", "1e-320"},
    "threshold": {"0", "1e-320"},
    "train_ratio": {"0", "1e-320"},
    "val_ratio": {"0", "1e-320"},
    "warmup_epochs": {"0"},
    "weight_decay": {"0", "1e300", "1e-320"},
    ("predict", "patch_size"): {HUGE},  # a window is at most the scene
}
# options that mean something beside others only
BESIDE = {
    ("train", "block_size"): "--val_strategy kfold --fold_by block",
    ("train", "buffer"): "--val_strategy kfold --fold_by block",
    ("train", "classes"): "--mode multiclass",
    ("train", "dropout_rate"): "--model unet-dropout --encoder_name resnet34",
    ("extract", "block_size"): "--split_by block",
    ("batch", "block_size"): "--split_by block",
    ("extract", "mask_buffer"): "--mask m.tif --mask_values 1",
    ("batch", "mask_buffer"): "--mask m.tif --mask_values 1",
    ("predict", "mask_buffer"): "--mask m.tif --mask_values 1",
    ("predict", "cell_size"): "--suggest 3",
    ("predict", "min_area"): "--polygons a.gpkg",
    ("predict", "simplify"): "--polygons a.gpkg",
}
AUTOMATIC = (("predict", "batch_size"), ("train", "num_workers"))


def number_options():
    """Every option of every script that takes a number, with every extreme."""
    for script, config in CONFIGS.items():
        hints = get_type_hints(config)
        for field in fields(config):
            kinds = {hints[field.name], *get_args(hints[field.name])}
            kind = next((k for k in (float, int) if k in kinds), None)
            if (script, field.name) in AUTOMATIC:
                kind = int  # a number or "auto"
            for value in EXTREMES.get(kind, ()):
                name = "huge" if len(value) > 9 else value
                name = "larger" if len(value) == 30 else name
                yield pytest.param(
                    script, field.name, value, id=f"{script}: {field.name} {name}"
                )


@pytest.mark.parametrize(("script", "option", "value"), [*number_options()])
def test_faults_of_numbers(place_of_options, capfd, monkeypatch, script, option, value):
    """An extreme number is a wrong command line, unless the table says what it means."""
    beside = BESIDE.get((script, option), "")
    if option == "stride":  # instead of a grid
        monkeypatch.setitem(
            COMMANDS,
            script,
            (COMMANDS[script][0], COMMANDS[script][1].replace("--grid grid.gpkg", "")),
        )
    ended = run_no_work(monkeypatch, script, f"{beside} --{option}={value}")
    err = capfd.readouterr().err
    legal = LEGAL_VALUES.get((script, option), LEGAL_VALUES.get(option, ()))
    if value in legal:
        assert ended == 0, err
        return
    assert_one_line(err, rf"--{option}\b", 2)
    assert ended == 2


@pytest.fixture(scope="module")
def place_of_options(whole, tmp_path_factory):
    """One folder for all rows, since none of them writes."""
    folder = tmp_path_factory.mktemp("options") / "place"
    shutil.copytree(whole, folder)
    former = os.getcwd()
    os.chdir(folder)
    yield folder
    os.chdir(former)


def run_no_work(monkeypatch, script: str, options: str) -> int:
    """A script up to the point where it would begin with files."""
    if script in Patch_extraction.COMMANDS and script != "visualize":
        config_class, _, text = Patch_extraction.COMMANDS[script]
        nothing_done = config_class, lambda config: 0, text
        monkeypatch.setitem(Patch_extraction.COMMANDS, script, nothing_done)
    elif script == "train":
        begin = "training.experiment.run_experiment"
        patch_everywhere(monkeypatch, begin, lambda config: {})
    elif script == "predict":
        begin = "prediction.scene.predict_scenes"
        patch_everywhere(monkeypatch, begin, lambda config, show: 0)
    else:
        patch_everywhere(monkeypatch, "common.pictures.save_figure", lambda *_: None)
    return run(script, options)


# a limit on the size of files ends every write as a full disk does, GDAL's and SQLite's too
SMALL_FILES = """
import os, resource, signal, sys
# bytecode would be cut off, for all processes
sys.dont_write_bytecode, os.environ["PYTHONDONTWRITEBYTECODE"] = True, "1"
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "limit", "error"),
    [
        (
            "extract",
            2000,
            r"was not written completely; is the disk full|File too large.*; free",
        ),
        (
            "predict",
            2000,
            r"was not written completely; is the disk full|File too large.*; free",
        ),
        ("train", 300_000, r"disk full|too large.*; free some, or write elsewhere"),
    ],
    ids=["extract", "predict", "train"],
)
def test_faults_of_a_disk_without_room(place, script, limit, error):
    """In a process whose files cannot grow, as on a full disk."""
    before = snapshot(place)
    process = start(script, "", SMALL_FILES.format(limit))
    _, err = process.communicate(timeout=100)
    assert process.returncode == 1, err
    # libtiff reports it by itself, past all handlers of GDAL
    own = re.compile(r"epoch |_tiff\w+Proc: ")
    lines = [line for line in err.splitlines() if not own.match(line)]
    assert_one_line("\n".join(lines), error, 1)
    after = snapshot(place)
    made = {name for name in after.keys() - before.keys() if after[name] is not None}
    assert made <= {"models/model_training_log.csv"}  # of the epoch that was trained
    assert all(after[name] == before[name] for name in before)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["extract", "train", "predict"])
def test_faults_of_two_runs_into_one_output(place, capfd, script):
    """The second is refused, and the first ends well, as if it had been alone."""
    pause = """
import importlib, pathlib, time
module = importlib.import_module({0!r})
work = module.{1}
def paused(*a, **k):
    pathlib.Path("begun").mkdir(exist_ok=True)
    while not pathlib.Path("go").exists():
        time.sleep(0.05)
    return work(*a, **k)
module.{1} = paused
"""
    where = {
        "extract": ("extraction.dataset", "cut_scene"),
        "train": ("training.epochs", "train_one_epoch"),
        "predict": ("prediction.scene", "predict_parts"),
    }[script]
    first = start(script, "", pause.format(*where))
    deadline = time.monotonic() + 100
    while not Path("begun").exists():
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.05)
    before = snapshot(place)
    ended = run(script)
    err = capfd.readouterr().err
    assert ended == 1, err
    assert_one_line(err, r"(A|Another) run into \S+ is under way", 1)
    assert snapshot(place) == before
    Path("go").mkdir()
    _, err = first.communicate(timeout=100)
    assert first.returncode == 0, err
    made = {
        "extract": "out/Patch",
        "train": "models/model_final_model.pth",
        "predict": "map.tif",
    }
    assert Path(made[script]).exists()


@pytest.mark.slow
@pytest.mark.parametrize("script", ["extract", "train", "predict"])
def test_faults_seen_from_a_shell(place, script):
    """The scripts as files: status and streams are those of the function ``main``."""
    for path in ("scene.tif", patch_path("train")):
        text(path)
    command = [sys.executable, ROOT / f"{COMMANDS[script][0]}.py", *words(script, "")]
    before = snapshot(place)
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 1 and done.stdout == ""
    assert_one_line(done.stderr, r"\.tif.*(copy or write|; write) it again", 1)
    assert snapshot(place) == before
