"""The card of an exported model: what Hugging Face and people read."""

from __future__ import annotations

import re
import runpy
from dataclasses import replace

import numpy as np
import onnx
import pytest
from helpers import write_raster
from huggingface_hub import ModelCard
from item_helpers import KNOWN, SCORES, make_subject

from exporting.card import card_text, cell
from exporting.facts import member_names
from exporting.stac import stac_item


def rows_of(text: str, section: str) -> list[list[str]]:
    """The cells of the first table of a section, without its heads."""
    part = text.split(f"\n## {section}\n")[1]
    lines = part[part.index("\n|") + 1 :].split("\n\n")[0].splitlines()
    return [[word.strip() for word in line.split("|")[1:-1]] for line in lines[2:]]


@pytest.fixture
def text(tmp_path):
    return card_text(make_subject(tmp_path, **KNOWN))


def test_hugging_face_reads_the_front_matter(text):
    known = ModelCard(text).data.to_dict()
    assert known["license"] == "other"
    assert known["license_name"] == known["license_link"] == "to-be-filled-in"
    assert known["pipeline_tag"] == "image-segmentation"
    assert known["classes"] == KNOWN["class_names"]
    assert known["bands"] == ["blue_1", "B8A_2", "B8A_3"]
    assert (known["sensor"], known["pixel_size_metres"]) == ("Sentinel-2A", 10.0036)


def test_the_front_matter_holds_any_name(tmp_path):
    names = ['no: "fire"', "- fire # yes"]
    subject = make_subject(tmp_path, outputs=1, class_names=names)
    known = ModelCard(card_text(subject)).data.to_dict()
    assert known["classes"] == names
    assert "sensor" not in known


def test_tables_hold_what_the_checkpoint_knows(text):
    assert rows_of(text, "Input") == [
        ["1", "blue_1", "100", "3000", "-9999"],
        ["2", "B8A_2", "100", "3000", ""],
        ["3", "B8A_3", "100", "3000", "nan"],
    ]
    assert rows_of(text, "Output")[1] == ["1", "forêt", "42", "#006900"]
    assert rows_of(text, "Scores") == [
        ["test", "0.432", "0.625", "0.75", ""],
        ["validation", "0.5", "0.625", "0.75", ""],
    ]
    assert rows_of(text, "Place and time")[0][:3] == ["train", "2", "3"]
    training = dict(rows_of(text, "Training"))
    assert training["first weights"] == "weights-0abc.pth"
    assert training["patch (pixels)"] == "32 x 48"
    assert "Images of 2 days: 2021-06-19 to 2021-08-02." in text
    assert "By class (test):" in text


def test_no_folder_of_a_machine_is_told(text, tmp_path):
    assert "somebody" not in text
    assert str(tmp_path) not in text


def test_an_older_checkpoint_has_a_card_too(tmp_path):
    text = card_text(make_subject(tmp_path))
    assert "The checkpoints hold no scores." in text
    assert "does not say when the images were taken. It does not say where" in text
    assert rows_of(text, "Input")[0] == ["1", "band_1", "100", "3000", ""]
    assert dict(rows_of(text, "Training"))["model"] == "pixel"
    assert "| None" not in text


def test_an_ensemble_tells_its_members_apart(tmp_path):
    folds = {
        "training_params": {"val_strategy": "kfold", "n_splits": 2, "fold_by": "block"}
    }
    scores = {"performance_metrics": {"held_out": SCORES, "validation": SCORES}}
    text = card_text(make_subject(tmp_path, members=2, **KNOWN | folds | scores))
    assert "the mean of 2 models" in text
    assert "that of their mean was not measured" in text
    assert rows_of(text, "Input")[0][2] == "100 to 200"
    assert [row[:2] for row in rows_of(text, "Scores")[::2]] == [
        ["fold_1/model_final_model.pth", "held out"],
        ["fold_2/model_final_model.pth", "held out"],
    ]
    assert "2 folds, drawn by square blocks of ground." in text


def test_members_that_differ_are_all_told_of(tmp_path):
    subject = make_subject(tmp_path, members=2, **KNOWN)
    first, second = subject.checkpoints
    elsewhere = KNOWN["places"][0] | {"crs": "EPSG:32632"}
    held_out = elsewhere | {"split": "validation", "crs": "EPSG:32630"}
    other = {
        "nodata": [-9999.0, 0.0, -1.0], "data_type": "int16", "pretrained": False,
        "input_size": [64, 64], "places": [*KNOWN["places"], elsewhere, held_out],
        "training_params": {"val_strategy": "kfold", "n_splits": 3, "fold_by": "random"},
    }  # fmt: skip
    second = replace(second, metadata=second.metadata | other)
    chosen_by = [*KNOWN["places"], held_out | {"crs": "EPSG:32633"}]
    first = replace(first, metadata=first.metadata | {"places": chosen_by})
    subject = replace(subject, checkpoints=[first, second])
    text = card_text(subject)
    assert [row[-1] for row in rows_of(text, "Input")] == ["-9999", "0", "nan, -1"]
    assert "(uint16, int16 in the training)" in text
    training = dict(rows_of(text, "Training"))
    assert training["first weights"] == "weights-0abc.pth, random"
    assert training["patch (pixels)"] == "32 x 48, 64 x 64"
    assert "- fold_2/model_final_model.pth: 3 folds, drawn at random" in text
    west, _, east, _ = map(float, rows_of(text, "Place and time")[0][2:])
    assert (west, round(east, 2)) == (3, 9.02), "of both, each place once"
    assert rows_of(text, "Place and time")[0][1] == "4"
    item = stac_item(subject)
    west, _, east, north = item["bbox"]
    assert west == -3, "folds are drawn from validation patches too"
    assert (round(east, 2), round(north, 1)) == (9.02, 41.6), (
        "other splits do not count"
    )
    properties = item["properties"]
    assert properties["mlm:pretrained"]
    assert properties["mlm:pretrained_source"] == "weights-0abc.pth"
    none = replace(second, metadata=second.metadata | {"places": None})
    text = card_text(replace(subject, checkpoints=[first, none]))
    assert "It does not say where the patches lie" in text


def test_members_have_as_many_folders_as_tell_them_apart(tmp_path):
    subject = make_subject(tmp_path)
    for files, expected in (
        (["/home/somebody/a/m.pth"], ["m.pth"]),
        (["/home/somebody/a/m.pth", "/data/run/n.pth"], ["m.pth", "n.pth"]),
        (["/home/somebody/a/m.pth", "/data/b/m.pth"], ["a/m.pth", "b/m.pth"]),
        (["/a/m.pth", "/a/m.pth"], ["m.pth", "m.pth"]),
    ):
        assert member_names(replace(subject, files=files)) == expected


def test_a_threshold_of_many_digits_is_told_in_full(tmp_path):
    subject = make_subject(tmp_path, outputs=1)
    settings = replace(subject.config, threshold=0.12345678)
    text = card_text(replace(subject, config=settings))
    assert "probabilities[0, 0] >= 0.12345678)" in text
    assert "at least 0.12345678" in text


def test_scores_are_not_shown_as_better_than_they_are(tmp_path):
    options = {
        "training_params": {"val_strategy": "kfold", "n_splits": 5, "fold_by": "random"}
    }
    scores = {
        "performance_metrics": {"pooled": SCORES, "summary": {"iou": {"mean": 0.5}}}
    }
    text = card_text(make_subject(tmp_path, **options | scores))
    assert "by the model of the fold that holds it out, not by this model" in text
    assert "the scores are better than those on new ground" in text


def test_folds_are_said_to_be_drawn_as_they_were(tmp_path):
    folds = {"val_strategy": "kfold", "n_splits": 2}
    by_column = folds | {"fold_by": "random", "fold_column": "region_*"}
    text = card_text(make_subject(tmp_path, training_params=by_column))
    assert "2 folds, drawn by equal values of region\\_\\*. Each chose" in text
    rows = dict(rows_of(text, "Training"))
    assert rows["fold_column"] == "region\\_\\*"
    assert "fold_by" not in rows
    text = card_text(
        make_subject(tmp_path, training_params=folds | {"fold_by": "both"})
    )
    assert "2 folds, drawn by square blocks of ground. Each chose" in text


def test_a_model_that_began_as_another_says_so(tmp_path):
    first = {"started_from": {"file": "/home/somebody/first.pth", "sha256": "ab12"}}
    text = card_text(make_subject(tmp_path, **KNOWN | first))
    assert (
        dict(rows_of(text, "Training"))["first weights"] == "first.pth (SHA-256 ab12)"
    )
    assert "where that one has seen the places of these patches" in text


def test_many_classes_are_named_in_tables_alone(tmp_path):
    names = [f"class {number}" for number in range(300)]
    text = card_text(make_subject(tmp_path, outputs=300, class_names=names))
    assert "gives each pixel one of 300 classes, from" in text
    assert [row[1] for row in rows_of(text, "Output")] == names


def test_names_do_not_break_a_table():
    assert cell("a|b\nc") == "a\\|b c"
    assert cell("<i>") == "\\<i>"
    assert cell("_x_ bare_soil *") == "\\_x\\_ bare_soil \\*"


def save_softmax(path, bands: int, size: int) -> None:
    """An ONNX file whose probabilities are the softmax of its input."""
    shape = ["N", bands, size, size]
    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name in ("image", "probabilities")
    ]
    node = onnx.helper.make_node("Softmax", ["image"], ["probabilities"], axis=1)
    graph = onnx.helper.make_graph([node], "softmax", ends[:1], ends[1:])
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), path)


@pytest.mark.parametrize("outputs", [1, 3])
def test_the_example_runs_as_it_is_written(tmp_path, monkeypatch, outputs):
    subject = make_subject(tmp_path, outputs=outputs)
    image = np.random.default_rng(0).random((3, 64, 64)).astype(np.float32)
    write_raster(tmp_path / "scene.tif", image)
    save_softmax(subject.onnx, 3, 64)
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", card_text(subject), re.DOTALL)
    (tmp_path / "example.py").write_text(code)
    found = runpy.run_path("example.py")
    shares = np.exp(image) / np.exp(image).sum(axis=0)
    expected = image.argmax(axis=0) if outputs > 1 else shares[0] >= 0.5
    assert np.array_equal(found["classes"], expected)
