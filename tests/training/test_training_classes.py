"""The classes of a run come from its dataset where no option names them."""

from __future__ import annotations

import json
import shutil

import pytest
from helpers import QUICK, patch_everywhere, run_main

from common.errors import DatasetError, OptionError
from training.classes import settle_classes, stored_classes
from training.settings import TrainingConfig

LAND = ["water", "forest", "town", "ice"]


def named(names) -> dict:
    return {"tags": {"CLASS_NAMES": json.dumps(names)}}


def settle(monkeypatch, names, **options) -> tuple[str, int]:
    stored = (names, options.pop("codes", None))
    patch_everywhere(
        monkeypatch, "training.classes.stored_classes", lambda root: stored
    )
    config = settle_classes(TrainingConfig(dataset_root="d", model="unet", **options))
    assert config.label_classes == config.classes
    return config.mode, config.classes


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (LAND, ("multiclass", 4)),
        (["forest", "water"], ("multiclass", 2)),
        (["northern forest", "water"], ("multiclass", 2)),
        (["background", "water"], ("binary", 2)),
        (["Other", "water"], ("binary", 2)),
        (["no water", "water"], ("binary", 2)),
        (["non-forest", "forest"], ("binary", 2)),
        (["None", "1"], ("binary", 2)),
        (["0", "1"], ("binary", 2)),
        (["01", "02"], ("multiclass", 2)),
        (["class 0", "class 1"], ("binary", 2)),
        (None, ("binary", 2)),
    ],
)
def test_mode_and_classes_are_those_of_the_dataset(monkeypatch, names, expected):
    assert settle(monkeypatch, names) == expected


@pytest.mark.parametrize(
    ("names", "options", "expected"),
    [
        (None, {"classes": 6}, ("multiclass", 6)),
        (None, {"class_names": "a,b,c"}, ("multiclass", 3)),
        (None, {"mode": "multiclass"}, ("multiclass", 2)),
        (["forest", "water"], {"mode": "binary"}, ("binary", 2)),
        (["land", "water"], {"codes": [0, 7]}, ("binary", 2)),
        (["land", "water"], {"codes": [3, 0]}, ("multiclass", 2)),
        (["other", "water"], {"mode": "multiclass"}, ("multiclass", 2)),
        (LAND, {"mode": "multiclass", "classes": 4}, ("multiclass", 4)),
    ],
)
def test_what_an_option_says_counts(monkeypatch, names, options, expected):
    assert settle(monkeypatch, names, **options) == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"classes": 10}, "--classes 10, but the labels in d hold 4 classes (water, "),
        ({"mode": "binary"}, "--mode binary, but the labels in d hold 4 classes"),
        ({"class_names": "a,b"}, "--class_names has 2 names, but the labels in d hold"),
    ],
)
def test_an_option_that_contradicts_the_dataset_is_refused(monkeypatch, options, words):
    with pytest.raises(DatasetError, match=words.replace("(", r"\(")):
        settle(monkeypatch, LAND, **options)


def test_an_unlabelled_value_that_is_a_stored_class_is_refused(monkeypatch):
    with pytest.raises(OptionError, match="--ignore_index 3"):
        settle(monkeypatch, LAND, ignore_index=3)


def test_a_run_without_mode_and_classes_takes_the_names_of_the_dataset(
    make_dataset, tmp_path
):
    root = make_dataset(2, 1, 0, classes=3, bands=2, **named(["a", "b", "c"]))
    options = "--dataset_root", root, "--save_dir", tmp_path / "out"
    status, _, err = run_main(*QUICK, *options, "--epochs", 1)
    assert status == 0, err
    assert "multiclass classes: 3 classes (a, b, c)" in err
    report = json.loads((tmp_path / "out" / "model_metrics.json").read_text())
    assert report["settings"]["mode"] == "multiclass"
    assert report["settings"]["classes"] == 3


def test_a_check_reports_the_contradiction_in_one_line(make_dataset, tmp_path):
    root = make_dataset(2, 1, 0, classes=3, bands=2, **named(["a", "b", "c"]))
    options = "--dataset_root", root, "--save_dir", tmp_path / "out", "--classes", 10
    status, _, err = run_main(*QUICK, *options, "--check")
    errors = [line for line in err.splitlines() if line.startswith("error")]
    assert status == 1 and len(errors) == 1 and "--classes 10, but" in errors[0]


def test_splits_with_classes_in_another_order_are_refused(make_dataset):
    root = make_dataset(2, 1, 0, classes=3, bands=2, **named(["a", "b", "c"]))
    other = make_dataset(2, 1, 0, classes=3, bands=2, **named(["b", "a", "c"]))
    for label in other.glob("Patch/validation/labels/*.tif"):
        shutil.copy(label, root / label.relative_to(other))
    with pytest.raises(DatasetError, match=r"3 classes \(b, a, c\), but train/ 3"):
        stored_classes(root)


def test_equal_problems_of_many_patches_are_one_line(make_dataset, tmp_path):
    root = make_dataset(6, 1, 0, classes=4, bands=2)
    options = "--dataset_root", root, "--save_dir", tmp_path / "out", "--classes", 3
    status, _, err = run_main(*QUICK, *options, "--check")
    errors = [line for line in err.splitlines() if "holds 3: labels are 0..2" in line]
    folder = root / "Patch" / "train" / "labels"
    labels = sorted(folder.glob("*.tif"))
    assert status == 1 and len(errors) == 1
    assert all(str(path) in errors[0] for path in labels[:3])
    assert "and 4 others" in errors[0]
