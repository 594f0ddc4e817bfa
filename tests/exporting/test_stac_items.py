"""The STAC item of an exported model: valid, complete, and of the file as it is run."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from datetime import UTC, datetime

import pystac
import pytest
from export_helpers import run_export, write_checkpoint
from item_helpers import KNOWN, errors_of, make_subject, schemas
from pystac.validation import JsonSchemaSTACValidator, validate_dict

from exporting.stac import model_name, stac_item

CASES = {
    "all that is known": ({"members": 1} | KNOWN),
    "an older checkpoint": {},
    "binary": {"outputs": 1, "class_names": ["no water", "water"], "mode": "binary"},
    "an ensemble": {"members": 2} | KNOWN,
    "no plain name": {"name": "2 modèles+++.onnx", "class_names": ["水", "水", "a b"]},
}


@pytest.fixture(params=CASES)
def item(request, tmp_path):
    return json.loads(
        json.dumps(stac_item(make_subject(tmp_path, **CASES[request.param])))
    )


def test_the_schemas_of_stac_and_of_all_extensions_accept_it(item):
    assert errors_of(item) == []
    assert (
        "https://stac-extensions.github.io/mlm/v1.5.2/schema.json"
        in item["stac_extensions"]
    )


def test_pystac_reads_and_accepts_it(item):
    validator = JsonSchemaSTACValidator()
    validator.schema_cache |= schemas()
    assert len(validate_dict(item, validator=validator)) == 5
    read = pystac.Item.from_dict(item)
    assert len(read.validate(validator)) == 5  # as STAC 1.1, which pystac writes
    assert read.assets["model"].has_role("mlm:model")


def test_the_schemas_refuse_what_the_extension_forbids(tmp_path):
    item = stac_item(make_subject(tmp_path))
    for change in (
        {"mlm:name": "unet++"},
        {"mlm:name": "2021_map"},
        {"mlm:unknown": 1},
        {"mlm:hyperparameters": {}},
    ):
        assert errors_of(item | {"properties": item["properties"] | change}), change
    bandless = {"model": item["assets"]["model"] | {"eo:bands": []}}
    assert errors_of(item | {"assets": bandless})


def test_the_input_is_raw_values_without_a_scaling_to_apply_again(tmp_path):
    (given,) = stac_item(make_subject(tmp_path, **KNOWN))["properties"]["mlm:input"]
    assert given["bands"] == ["blue_1", "B8A_2", "B8A_3"]
    assert given["input"] == {
        "shape": [-1, 3, 64, 64],
        "dim_order": ["batch", "bands", "height", "width"],
        "data_type": "float32",
    }
    assert not given.keys() & {"value_scaling", "pre_processing_function"}


def test_the_output_describes_each_class(tmp_path):
    (result,) = stac_item(make_subject(tmp_path, **KNOWN))["properties"]["mlm:output"]
    assert result["result"]["shape"] == [-1, 3, 64, 64]
    classes = result["classification:classes"]
    assert [(c["value"], c["name"], c["color_hint"]) for c in classes] == [
        (0, "eau", "002db4"), (1, "foret", "006900"), (2, "class_2", "ff3c1e"),
    ]  # fmt: skip
    assert [c["title"] for c in classes] == KNOWN["class_names"]
    assert classes[2]["description"] == "建物 (AB in the labels)"


def test_a_binary_model_has_two_classes_and_one_probability(tmp_path):
    properties = stac_item(make_subject(tmp_path, outputs=1))["properties"]
    (result,) = properties["mlm:output"]
    assert result["result"]["shape"] == [-1, 1, 64, 64]
    assert [c["name"] for c in result["classification:classes"]] == [
        "background",
        "foreground",
    ]
    assert properties["mlm:hyperparameters"]["threshold"] == 0.5
    assert "at least 0.5" in result["description"]


def test_hyperparameters_hold_scaling_and_training_but_no_folder(tmp_path):
    item = stac_item(make_subject(tmp_path, **KNOWN))
    found = item["properties"]["mlm:hyperparameters"]
    assert found["normalization_low"] == [100.0] * 3
    assert found["normalization_high"] == [3000.0] * 3
    assert found["nodata"] == [-9999.0, None, "nan"]
    assert (found["epochs"], found["loss"], found["temperature"]) == (
        7,
        "dice+ce",
        1.25,
    )
    assert "fold_by" not in found, "without folds it says nothing"
    assert item["properties"]["mlm:pretrained_source"] == "weights-0abc.pth"
    assert "somebody" not in json.dumps(item)


def test_an_ensemble_describes_every_member(tmp_path):
    item = stac_item(make_subject(tmp_path, members=2, **KNOWN))
    first, second = item["properties"]["mlm:hyperparameters"]["members"]
    assert (first["normalization_low"][0], second["normalization_low"][0]) == (100, 200)
    assert [item["assets"][f"checkpoint_{n}"]["href"] for n in (1, 2)] == [
        f"./run/fold_{n}/model_final_model.pth" for n in (1, 2)
    ]
    assert "averages 2 models" in item["properties"]["description"]


def test_the_footprint_and_the_time_are_those_of_the_training_patches(tmp_path):
    item = stac_item(make_subject(tmp_path, **KNOWN))
    west, south, east, north = item["bbox"]
    assert (west, south) == (pytest.approx(3.0), pytest.approx(41.5517, abs=1e-4))
    assert (east, north) == (
        pytest.approx(3.0240, abs=1e-4),
        pytest.approx(41.5607, abs=1e-4),
    )
    assert item["geometry"]["type"] == "Polygon"
    times = item["properties"]
    assert times["datetime"] is None
    assert times["start_datetime"] == "2021-06-19T00:00:00Z"
    assert times["end_datetime"] == "2021-08-02T23:59:59Z"
    assert (times["platform"], times["gsd"]) == ("Sentinel-2A", 10.0036)


def test_one_day_is_a_time_too(tmp_path):
    one = KNOWN | {"acquired": ["2021-06-19"], "sensor": "Sentinel-2A,Sentinel-2B"}
    properties = stac_item(make_subject(tmp_path, **one))["properties"]
    assert properties["datetime"] == "2021-06-19T00:00:00Z"
    assert "platform" not in properties
    assert "Sentinel-2A and Sentinel-2B" in properties["description"]


def test_an_older_checkpoint_has_no_place_and_the_time_of_its_file(tmp_path):
    subject = make_subject(tmp_path)
    moment = datetime(2024, 5, 6, 7, 8, 9, tzinfo=UTC)
    os.utime(subject.files[0], (0, moment.timestamp()))
    item = stac_item(subject)
    assert item["geometry"] is None
    assert "bbox" not in item
    assert item["properties"]["datetime"] == "2024-05-06T07:08:09Z"
    assert "mlm:pretrained" not in item["properties"]
    assert item["properties"]["mlm:input"][0]["bands"] == ["band_1", "band_2", "band_3"]


def test_folds_are_trained_on_validation_patches_too(tmp_path):
    places = [place | {"split": "validation"} for place in KNOWN["places"]]
    for strategy, known in (("split", False), ("kfold", True)):
        options = {"val_strategy": strategy}
        subject = make_subject(tmp_path, places=places, training_params=options)
        assert (stac_item(subject)["geometry"] is not None) == known


def test_assets_are_the_file_and_its_checkpoint_as_they_lie(tmp_path):
    subject = make_subject(tmp_path, **KNOWN)
    subject.onnx.write_bytes(b"onnx")
    assets = stac_item(subject)["assets"]
    model, checkpoint = assets["model"], assets["checkpoint"]
    assert (model["href"], model["file:size"]) == ("./model.onnx", 4)
    assert model["file:checksum"] == "1220" + hashlib.sha256(b"onnx").hexdigest()
    assert model["eo:bands"] == [
        {"name": "blue_1", "common_name": "blue"},
        {"name": "B8A_2", "common_name": "nir08"},
        {"name": "B8A_3", "common_name": "nir08"},
    ]
    assert checkpoint["href"] == "./run/fold_1/model_final_model.pth"
    assert "mlm:model" not in checkpoint["roles"]


def test_bands_have_stacs_names_where_it_is_certain_what_they_are(tmp_path):
    def common(names: list[str], **known) -> list[str | None]:
        subject = make_subject(tmp_path, band_descriptions=names, **known)
        bands = stac_item(subject)["assets"]["model"]["eo:bands"]
        return [band.get("common_name") for band in bands]

    assert common(["Red", "B8A", "B11"]) == ["red", "nir08", "swir16"]
    assert common(["B3", "B4", "B6"]) == [None] * 3, "of which sensor?"
    assert common(["B3", "B4", "B6"], sensor="Landsat-7") == ["red", "nir", None]
    said = {"training_params": {"sensor": "landsat-oli"}}
    assert common(["B3", "B4", "B6"], **said) == ["green", "red", "swir16"]
    dates = ["B04_20210619", "B05_20210619", "height"]
    assert common(dates, sensor="Sentinel-2B") == ["red", "rededge", None]


def test_names_that_the_extension_allows():
    assert model_name("unet++ 2021") == "unetplusplus_2021"
    assert model_name("2021-map") == "model_2021-map"
    assert model_name("Forêt") == "Foret"
    assert model_name("水") == "model"
    assert model_name("a") == "model_a"


def test_the_script_writes_an_item_and_keeps_a_card(tmp_path, monkeypatch):
    def write(target, *_):
        target.write_bytes(b"onnx")

    monkeypatch.setattr("exporting.export.write_onnx", write)
    monkeypatch.setattr("exporting.export.require_libraries", lambda: None)
    file, model = tmp_path / "model.onnx", write_checkpoint(tmp_path / "model.pth")
    item, card = file.with_suffix(".json"), file.with_suffix(".md")
    words = ("--model", model, "--output", file, "--patch_size", 32)
    card.write_text("mine")
    done = run_export(*words)
    assert (done.status, done.out.split()) == (0, [str(file), str(item)])
    assert "model.md is kept as it is" in done.err
    file.unlink()
    again = run_export(*words)
    assert again.status == 1
    assert "model.json is there already; give --overwrite" in again.err
    assert not file.exists(), "before the work"
    done = run_export(*words, "--overwrite")
    assert done.out.split() == [str(file), str(item), str(card)]
    assert card.read_text() != "mine"


@pytest.mark.parametrize("step", ["stac_item", "card_text"])
def test_an_export_that_fails_leaves_all_files_as_they_were(
    tmp_path, monkeypatch, step
):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def write(target, *_):
        target.write_bytes(b"onnx")

    monkeypatch.setattr("exporting.export.write_onnx", write)
    monkeypatch.setattr("exporting.export.require_libraries", lambda: None)
    monkeypatch.setattr(f"exporting.export.{step}", full)
    model, folder = write_checkpoint(tmp_path / "model.pth"), tmp_path / "out"
    words = ("--model", model, "--output", folder / "model.onnx", "--patch_size", 32)
    done = run_export(*words)
    assert done.status == 1
    assert "No space left on device" in done.err
    assert list(folder.iterdir()) == []
    for ending in ("onnx", "json", "md"):
        (folder / f"model.{ending}").write_text(ending)
    assert run_export(*words, "--overwrite").status == 1
    assert {f.name: f.read_text() for f in folder.iterdir()} == {
        f"model.{ending}": ending for ending in ("onnx", "json", "md")
    }
