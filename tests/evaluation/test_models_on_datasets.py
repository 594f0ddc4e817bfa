"""A model examined on a dataset: as training does it, other class orders, what does not fit."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from helpers import ENCODER, SENTINEL, patch_everywhere, write_dataset
from map_helpers import run

from common.architectures import ModelConfig
from common.labels import class_name_tags
from model_training import Normalization, build_model, save_checkpoint

NAMES = ["water", "forest", "town"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("examined")
    return write_dataset(
        root, 2, 2, 3, classes=3, descriptions=SENTINEL, unlabelled_rows=4,
        tags=class_name_tags(NAMES),
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    config = ModelConfig("linknet", 10, 3, ENCODER)
    path = tmp_path_factory.mktemp("model") / "model.pth"
    numbers = Normalization("dataset", (0.0,) * 10, (1e4,) * 10)
    metadata = {"class_names": NAMES, "band_descriptions": list(SENTINEL), "temperature": 1.5}  # fmt: skip
    save_checkpoint(path, build_model(config), config, numbers, metadata)
    return path


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """No pixel of a picture is drawn, which takes a second each."""
    patch_everywhere(monkeypatch, "common.pictures.save_figure", lambda _, target: target.touch())  # fmt: skip


def examine(model, root, target, *more) -> dict:
    status, out, err = run("--model", model, "--dataset_root", root, "--output", target,
                           "--device", "cpu", *more)  # fmt: skip
    assert status == 0, err
    assert "overall accuracy" in out
    return json.loads((target / "evaluation.json").read_text())


def test_classes_in_another_order_are_matched_by_name(model, dataset, tmp_path):
    import rasterio

    expected = examine(model, dataset, tmp_path / "a", "--split", "train")["train"]
    root = write_dataset(
        tmp_path / "other", 2, 2, 3, classes=3, descriptions=SENTINEL, unlabelled_rows=4,
        tags=class_name_tags([NAMES[k] for k in (1, 2, 0)]),
    )  # fmt: skip
    for path in root.glob("Patch/train/labels/*.tif"):
        with rasterio.open(path, "r+") as file:
            mask = file.read(1)
            file.write(np.where(mask < 3, (mask + 2) % 3, mask).astype(mask.dtype), 1)
    found = examine(model, root, tmp_path / "b", "--split", "train")["train"]
    assert found == expected
    files = {path.name for path in (tmp_path / "b").iterdir()}
    pictures = {"confusion_matrix.png", "reliability.png", "examples.png"}
    assert files == {"evaluation.json", *pictures}


def test_a_folder_stands_for_its_final_model_but_not_for_folds(
    model, dataset, tmp_path
):
    folder = tmp_path / "run"
    names = ("", "fold_1", "fold_2")
    places = [folder / name / "model_final_model.pth" for name in names]
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(model)
    words = "--model", folder, "--dataset_root", dataset, "--output", tmp_path / "a"
    status, _, err = run(*words)
    assert status == 1 and "holds 2 folds" in err.splitlines()[-1]
    for place in places[1:]:
        place.unlink()
    report = examine(folder, dataset, tmp_path / "b")
    assert report["model"] == str(places[0])


def test_a_dataset_with_another_class_is_refused(model, tmp_path):
    root = write_dataset(tmp_path / "d", 1, 1, 1, classes=2, descriptions=SENTINEL,
                         tags=class_name_tags(["water", "rock"]))  # fmt: skip
    status, _, err = run("--model", model, "--dataset_root", root, "--device", "cpu")
    assert status == 1
    assert "have the class 'rock', which the model does not know (water, forest, town)" in err  # fmt: skip


def test_a_dataset_with_other_bands_is_refused(model, tmp_path):
    root = write_dataset(tmp_path / "d", 1, 1, 1, classes=3, bands=4)
    status, _, err = run("--model", model, "--dataset_root", root, "--device", "cpu")
    assert status == 1
    assert "has 4 bands, but the model takes 10" in err
    turned = write_dataset(tmp_path / "t", 1, 1, 1, classes=3, descriptions=SENTINEL[::-1])  # fmt: skip
    status, _, err = run("--model", model, "--dataset_root", turned, "--device", "cpu")
    assert status == 1
    assert "but the model was trained on B02" in err


def test_options_of_the_other_kind_are_refused():
    for words, message in (
        (("--model", "m.pth"), "--dataset_root is missing"),
        (("--model", "m.pth", "--dataset_root", "d", "--block_size", "9"), "--block_size changes nothing"),
        (("--map", "m.tif", "--label", "l.tif", "--split", "train"), "--split changes nothing"),
        ((), "--map is missing"),
    ):  # fmt: skip
        status, _, err = run(*words)
        assert status == 2
        assert message in err
