"""ONNX files: what they hold, what onnxruntime and Deepness make of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from export_helpers import (
    BANDS,
    NAMES,
    SIDE,
    Outcome,
    random_scene,
    run_export,
    subject_of,
    write_checkpoint,
)
from exports import END, FAMILIES, MARK, MODELS, networks
from helpers import ENCODER, ROOT, train, write_geotiff
from item_helpers import errors_of
from rasterio.windows import Window

import Patch_extraction
from common.architectures import ARCHITECTURES
from common.files import FINAL_MODEL
from common.rasters import Source, open_raster
from common.windows import window_starts
from examples.demo import synthesize_scene
from exporting.onnx_file import INPUT, OUTPUT, open_session
from model_training import Checkpoint
from prediction.predictor import Predictor

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

NODATA = 65535
DECLARED = {"nodata": [float(NODATA)] * BANDS, "data_type": "uint16"}


class Exported(NamedTuple):
    """An ONNX file, the checkpoints in it, and how the script ended."""

    file: Path
    checkpoints: list[Checkpoint]
    outcome: Outcome

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Probabilities by onnxruntime."""
        return open_session(self.file).run([OUTPUT], {INPUT: images})[0]


def export(folder: Path, given: list[Path], models: list[Path], *words) -> Exported:
    file = folder / "model.onnx"
    words = ["--output", file, "--patch_size", SIDE, *words]
    outcome = run_export("--model", *given, *words)
    assert outcome.status == 0, outcome.err
    return Exported(file, subject_of(*models).checkpoints, outcome)


@pytest.fixture(scope="module")
def land(tmp_path_factory) -> Exported:
    """Three classes: the mean of a network with context and one without."""
    folder = tmp_path_factory.mktemp("land")
    models = [
        write_checkpoint(
            folder / "a.pth", "unet", encoder=ENCODER, temperature=0.5, **DECLARED
        ),
        write_checkpoint(folder / "b.pth", temperature=0.3, **DECLARED),
    ]
    return export(folder, models, models)


@pytest.fixture(scope="module")
def water(tmp_path_factory) -> Exported:
    """A binary model: the folder of a run with two folds."""
    folder = tmp_path_factory.mktemp("water")
    models = [folder / f"run/fold_{fold}/{FINAL_MODEL}" for fold in (1, 2)]
    for seed, file in enumerate(models):
        file.parent.mkdir(parents=True)
        write_checkpoint(
            file, "pixel", 1, seed, temperature=0.05, nodata=[None] * BANDS
        )
    words = ("--threshold", 0.4, "--resolution", 2.5)
    return export(folder, [folder / "run"], models, *words)


@pytest.fixture(params=["land", "water"])
def exported(request) -> Exported:
    return request.getfixturevalue(request.param)


def test_a_file_is_of_versions_that_old_runtimes_read(exported):
    model = onnx.load(exported.file, load_external_data=False)
    assert model.ir_version == 8
    (opset,) = model.opset_import
    assert (opset.domain, opset.version) == ("", 17)
    assert not model.functions
    assert not [t for t in model.graph.initializer if t.external_data]
    assert len(list(exported.file.parent.glob("*.onnx*"))) == 1


def test_the_stac_item_beside_a_file_describes_it(exported):
    item = json.loads(exported.file.with_suffix(".json").read_text())
    assert errors_of(item) == []
    session, properties = open_session(exported.file), item["properties"]
    (taken,), (given,) = session.get_inputs(), session.get_outputs()
    (read,), (written,) = properties["mlm:input"], properties["mlm:output"]
    assert (read["name"], read["input"]["shape"][1:]) == (taken.name, taken.shape[1:])
    assert (written["name"], written["result"]["shape"][1:]) == (
        given.name,
        given.shape[1:],
    )
    assert item["assets"]["model"]["file:size"] == exported.file.stat().st_size
    assert "## Scores" in exported.file.with_suffix(".md").read_text(encoding="utf-8")


def test_a_file_takes_any_batch_of_one_size(exported):
    session = open_session(exported.file)
    (taken,), (given,) = session.get_inputs(), session.get_outputs()
    outputs = exported.checkpoints[0].config.num_classes
    assert (taken.name, taken.shape) == ("image", ["batch", BANDS, SIDE, SIDE])
    assert (given.name, given.shape[1:]) == ("probabilities", [outputs, SIDE, SIDE])
    images = np.stack([random_scene(seed=n) for n in range(5)]).astype(np.float32)
    alone = np.concatenate([exported(image[None]) for image in images])
    np.testing.assert_allclose(exported(images), alone, atol=1e-5)


def test_a_file_says_nothing_of_the_machine(exported):
    content = exported.file.read_bytes()
    for text in (ROOT, Path.home(), Path(torch.__file__).parent):
        assert str(text).encode() not in content
    assert b"forward" not in content


def test_the_script_prints_its_files_and_nothing_of_the_exporter(land, water):
    files = [land.file.with_suffix(suffix) for suffix in (".onnx", ".json", ".md")]
    assert land.outcome.out.splitlines() == list(map(str, files))
    assert all(file.is_file() for file in files)
    assert land.outcome.err == ""
    assert "2 models, averaged" in water.outcome.err
    assert len(water.outcome.err.splitlines()) == 1


def stored(exported: Exported) -> dict[str, str]:
    return open_session(exported.file).get_modelmeta().custom_metadata_map


def test_deepness_finds_its_keys(land, water):
    values = {key: json.loads(text) for key, text in stored(land).items()}
    assert values == {
        "model_type": "Segmentor",
        "class_names": {"0": NAMES[0], "1": NAMES[1], "2": NAMES[2]},
        "resolution": 1000.0,  # cm
        "tile_size": SIDE,
        "tiles_size": SIDE,
        "tiles_overlap": 25,
        "seg_thresh": 0,
        "seg_small_segment": 0,
        "standardization_mean": [0.0] * BANDS,
        "standardization_std": [1 / 255] * BANDS,
    }
    values = {key: json.loads(text) for key, text in stored(water).items()}
    assert values["class_names"] == {"0": "land", "1": "water"}
    assert (values["seg_thresh"], values["resolution"]) == (0.4, 250.0)


def as_deepness_reads(exported: Exported, tiles: np.ndarray) -> np.ndarray:
    """Tiles (N, C, S, S) of a scene's values after what Deepness does to them, with its types."""
    means, deviations = (
        np.array(json.loads(stored(exported)[f"standardization_{key}"]), np.float32)
        for key in ("mean", "std")
    )
    values = np.float32(tiles.transpose(0, 2, 3, 1) * (1.0 / 255.0))
    return ((values - means) / deviations).transpose(0, 3, 1, 2)


def test_what_deepness_does_to_values_changes_no_probability(land):
    tiles = random_scene()[None]
    tiles[0, 1, 5:15, 5:15] = NODATA
    read = as_deepness_reads(land, tiles)
    expected, found = land(tiles.astype(np.float32)), land(read)
    assert read.dtype == np.float32 and (read != tiles).any()
    np.testing.assert_allclose(found, expected, atol=1e-4)
    beside = tiles.copy()
    beside[0, 1, 5:15, 5:15] -= 1  # data
    assert abs(land(beside.astype(np.float32)) - expected).max() > 0.1


def test_deepness_makes_the_classes_of_prediction(land, water):
    tiles = random_scene()[None]
    for exported, threshold in ((land, 0), (water, 0.4)):
        found = exported(as_deepness_reads(exported, tiles)).copy()
        found[found < json.loads(stored(exported)["seg_thresh"])] = 0
        expected = predict(exported, tiles[0], np.ones((SIDE, SIDE), bool))
        if exported is water:
            classes, expected = (found != 0)[0, 0], expected[0] >= threshold
            assert 0.02 < classes.mean() < 0.98
        else:
            classes, expected = found.argmax(axis=1)[0], expected.argmax(axis=0)
        assert (classes != expected).mean() < 0.002, "more than ties"


def predict(exported: Exported, image: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """A window's probabilities by prediction."""
    predictor = Predictor(exported.checkpoints, torch.device("cpu"))
    images = torch.from_numpy(image.astype(np.float32))[None]
    return predictor(images, torch.from_numpy(valid)[None])[0].numpy()


def compare_windows(exported: Exported, path: Path, side: int, step: int) -> None:
    """Each window of a scene by onnxruntime has the probabilities and classes of prediction."""
    with open_raster(path) as scene:
        source = Source(scene)
        for top in window_starts(scene.height, side, step):
            for left in window_starts(scene.width, side, step):
                window = Window(left, top, side, side)
                expected = predict(exported, *source.read(window))
                found = exported(scene.read(window=window).astype(np.float32)[None])[0]
                np.testing.assert_allclose(found, expected, atol=1e-4)
                best = np.sort(expected, axis=0)
                differing = found.argmax(axis=0) != expected.argmax(axis=0)
                assert (best[-1] - best[-2])[differing].max(initial=0) < 2e-4


def test_a_scene_window_by_window_is_as_prediction_has_it(land, tmp_path):
    pixels = random_scene(80, 72)
    pixels[0, 30:50, 10:40] = NODATA
    path = write_geotiff(tmp_path / "scene.tif", pixels, nodata=NODATA)
    compare_windows(land, path, SIDE, SIDE - 8)


@pytest.mark.slow
def test_a_trained_model_maps_the_scene_of_the_demo_as_prediction_does(tmp_path):
    scene = synthesize_scene(tmp_path, size=384, seed=3, patch_size=64)
    data, out = tmp_path / "data", tmp_path / "run"
    files = f"--image {scene.image} --label {scene.label} --grid {scene.grid} --output {data}"
    words = f"extract {files} --patch_size 64 --class_names water,forest,grass,crops,soil,town"
    assert Patch_extraction.main(words.split()) == 0
    model = "--mode", "multiclass", "--model", "unet", "--encoder_name", "resnet18"
    assert train(data, out, *model, "--epochs", 3).status == 0
    model = out / FINAL_MODEL
    words = "--model", model, "--output", tmp_path / "model.onnx", "--patch_size", 128
    outcome = run_export(*words)
    assert outcome.status == 0, outcome.err
    exported = Exported(tmp_path / "model.onnx", subject_of(model).checkpoints, outcome)
    compare_windows(exported, scene.image, 128, 128)


# --- the table in the documentation ---------------------------------------------------------


def test_the_table_of_exports_names_every_decoder_and_family():
    """It is written by ``python tests/exports.py``."""
    table = MODELS.read_text().split(MARK)[1].split(END)[0].strip().splitlines()[2:]
    rows = [[cell.strip(" `") for cell in row.strip("|").split("|")] for row in table]
    assert [(d, e) for d, e, *_ in rows] == [(d, e or "-") for d, e in networks()]
    assert {decoder for decoder, *_ in rows} == ARCHITECTURES.keys()
    assert {row[2] for row in rows} <= {"yes", "no"}


def test_a_member_of_every_family_of_encoders_is_in_the_table():
    text = MODELS.read_text().split("| family | `--encoder_name` |")[1].split("\n\n")[0]
    for row in text.splitlines()[2:]:
        assert any(f"`{encoder}`" in row for encoder in FAMILIES), row
