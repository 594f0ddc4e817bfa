"""What cannot be exported is refused with one line, and leaves no file."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from export_helpers import (
    SIDE,
    make_checkpoint,
    run_export,
    subject_of,
    write_checkpoint,
)
from helpers import ENCODER

from common.architectures import ModelConfig
from common.errors import CheckpointError, OptionError, SegmentationError
from common.files import atomic_write
from exporting import onnx_file
from exporting.onnx_file import write_onnx
from exporting.settings import ExportConfig
from exporting.subject import require_size
from model_training import Normalization, build_model, save_checkpoint
from prediction.ensemble import load_models
from prediction.settings import PredictionConfig


@pytest.fixture
def model(tmp_path):
    return write_checkpoint(tmp_path / "a.pth")


def predictors_of(*files):
    """The models of a map."""
    settings = PredictionConfig(
        model=list(map(str, files)), input=["a.tif"], output="b.tif", device="cpu"
    )
    return load_models(settings)


def test_a_model_that_normalizes_each_window_is_refused(tmp_path):
    config = ModelConfig("pixel", 3, 1, None)
    file = tmp_path / "earlier.pth"
    save_checkpoint(file, build_model(config), config, Normalization("image"), {})
    with pytest.raises(
        CheckpointError, match="train it again with --normalization dataset"
    ):
        subject_of(file)


def test_models_of_other_classes_are_not_averaged(tmp_path, model):
    other = write_checkpoint(tmp_path / "b.pth", class_names=["a", "b", "c"])
    with pytest.raises(CheckpointError, match="class names.*cannot be averaged"):
        subject_of(model, other)


def with_bands(path, *names):
    """A model for bands of these names."""
    return write_checkpoint(path, band_descriptions=list(names), nodata=[None] * 3)


@pytest.mark.parametrize(
    "load", [subject_of, predictors_of], ids=["export", "prediction"]
)
def test_models_of_another_order_of_bands_are_not_averaged(tmp_path, load):
    first = with_bands(tmp_path / "a.pth", "B02", "B03", "B04")
    other = with_bands(tmp_path / "b.pth", "B4", "B3", "B2")
    with pytest.raises(
        CheckpointError, match="b.pth takes the bands B4, B3, B2, .*leave one out"
    ):
        load(first, other)
    for names in (("Blue", "B3", "b04"), ("B02", "B03", "B08"), (None, "B04", "B03")):
        load(first, with_bands(tmp_path / "c.pth", *names))
    first = with_bands(
        tmp_path / "d.pth", *(f"B04_{y}0101" for y in (2019, 2020, 2021))
    )
    load(
        first,
        with_bands(tmp_path / "e.pth", *(f"B04_{y}0101" for y in (2020, 2021, 2022))),
    )


def test_codes_of_classes_that_differ_are_named(tmp_path, model, caplog):
    other = write_checkpoint(tmp_path / "b.pth", class_codes=[4, 5, 6])
    subject_of(model, other, resolution=10)
    (line,) = [text for text in caplog.messages if "have the codes" in text]
    assert "b.pth have the codes 4, 5, 6" in line and "a.pth 0, 1, 2" in line


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("unet-dropout", 40, "a multiple of 16"),
        ("unet", 48, "a multiple of 32"),
        ("pan", 96, "a multiple of 32, at least 128"),
    ],
)
def test_a_size_that_would_be_padded_is_refused(name, size, expected):
    config = ModelConfig(name, 3, 3)
    checkpoint = replace(make_checkpoint(), config=config)
    require_size(128, "a.pth", checkpoint)
    with pytest.raises(OptionError, match=f"--patch_size {size}: expected {expected}"):
        require_size(size, "a.pth", checkpoint)


def test_the_pixel_model_takes_any_size(model):
    assert subject_of(model, patch_size=37).config.patch_size == 37
    message = "--patch_size 48: expected a multiple of 32 for the linknet in .*b.pth"
    other = write_checkpoint(model.with_name("b.pth"), "linknet", encoder=ENCODER)
    with pytest.raises(OptionError, match=message):
        subject_of(model, other, patch_size=48)


def test_a_threshold_is_for_two_classes(tmp_path, model):
    with pytest.raises(OptionError, match="--threshold 0.3: .* has 3 classes"):
        subject_of(model, threshold=0.3)
    binary = write_checkpoint(tmp_path / "b.pth", outputs=1)
    assert subject_of(binary, threshold=0.3).config.threshold == 0.3


def test_pixels_have_a_known_size(tmp_path, model):
    assert subject_of(model).resolution == 10
    older = write_checkpoint(tmp_path / "older.pth", pixel_size=None)
    for files in ((older,), (model, older)):
        with pytest.raises(OptionError, match="--resolution is missing: .*older.pth"):
            subject_of(*files)
    assert subject_of(older, resolution=0.5).resolution == 0.5
    finer = write_checkpoint(tmp_path / "finer.pth", pixel_size=2.5)
    with pytest.raises(
        CheckpointError, match=r"finer.pth was trained on pixels of 2.5 m"
    ):
        subject_of(model, finer)
    near = write_checkpoint(tmp_path / "near.pth", pixel_size=10.002)
    assert subject_of(model, near).resolution == 10


def test_a_nodata_value_that_the_file_does_not_hold_is_warned_of(tmp_path, caplog):
    for stored in ([None] * 3, [0.0] * 3):
        subject_of(write_checkpoint(tmp_path / "known.pth", nodata=stored))
    assert not caplog.messages
    differing = write_checkpoint(tmp_path / "differing.pth", nodata=None)
    subject_of(tmp_path / "known.pth", differing)
    (line,) = caplog.messages
    assert "differing.pth holds no nodata value" in line
    assert "make other such pixels NaN" in line


def test_weights_alone_are_refused_whatever_describes_them(tmp_path, model):
    """Their normalization would be that of each window."""
    weights = tmp_path / "weights.pth"
    torch.save(torch.load(model, weights_only=True)["model_state_dict"], weights)
    with pytest.raises(CheckpointError, match="alone, .*checkpoint that main.py wrote"):
        subject_of(weights)
    words = ("--model", weights, "--output", tmp_path / "model.onnx")
    assert run_export(*words, "--model_name", "pixel").status == 2


@pytest.mark.parametrize(
    "given",
    [{"output": "a.pt"}, {"patch_size": 0}, {"resolution": -1.0}, {"threshold": 1.5}],
)
def test_wrong_options_are_refused_at_once(given):
    with pytest.raises(OptionError):
        ExportConfig(**{"model": ["a.pth"], "output": "a.onnx"} | given)


def test_a_file_that_is_there_stays(tmp_path, model, monkeypatch):
    target = tmp_path / "model.onnx"
    target.write_text("before")
    monkeypatch.setattr(
        "exporting.export.write_onnx", lambda file, *_: file.write_text("new")
    )
    words = ["--model", model, "--output", target, "--patch_size", SIDE]
    outcome = run_export(*words)
    assert (outcome.status, target.read_text()) == (1, "before")
    assert f"{target} is there already; give --overwrite" in outcome.err
    run_export(*words, "--overwrite")
    assert target.read_text() == "new"
    target.unlink()
    item, card = target.with_suffix(".json"), target.with_suffix(".md")
    card.write_text("filled in")
    outcome = run_export(*words)
    assert f"{item} is there already; give --overwrite" in outcome.err
    assert not target.exists()
    item.unlink()
    outcome = run_export(*words)
    assert outcome.out.splitlines() == [str(target), str(item)]
    assert card.read_text() == "filled in"


@pytest.mark.parametrize("name", onnx_file.LIBRARIES)
def test_a_missing_library_is_named_with_its_remedy(tmp_path, model, monkeypatch, name):
    find = onnx_file.importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda one, *more: None if one == name else find(one, *more),
    )
    outcome = run_export("--model", model, "--output", tmp_path / "model.onnx")
    assert outcome.status == 1
    (line,) = outcome.err.splitlines()
    assert line.endswith(f"pip install {name}")


class Plain(torch.nn.Module):
    """In the place of a graph: its images."""

    def forward(self, images):
        return images


def write(target, graph, images=None):
    images = torch.rand(2, 3, 8, 8) if images is None else images
    with atomic_write(target) as part:
        write_onnx(part, graph, (3, 8, 8), images, {"key": "value"})


def onnx_model(operator: str, opset: int = 17):
    """A model of one operator, for images of any size."""
    helper = pytest.importorskip("onnx.helper")
    node = helper.make_node(operator, [onnx_file.INPUT], [onnx_file.OUTPUT])
    values = [
        helper.make_tensor_value_info(name, 1, [None, 3, None, None])  # float32
        for name in (onnx_file.INPUT, onnx_file.OUTPUT)
    ]
    graph = helper.make_graph([node], "graph", values[:1], values[1:])
    imports = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


def test_a_file_that_computes_something_else_gets_no_name(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    makers = {"model": lambda: onnx_model("Neg")}
    monkeypatch.setattr(onnx_file, "make_model", lambda *_: makers["model"]())
    with pytest.raises(SegmentationError, match="differ from PyTorch's by 2; .*export"):
        write(tmp_path / "model.onnx", Plain(), torch.ones(2, 3, 8, 8))
    assert not list(tmp_path.iterdir())
    makers["model"] = lambda: onnx_model("Identity")
    write(tmp_path / "model.onnx", Plain())
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


class Untraceable(torch.nn.Module):
    """Its result depends on the values in a way that no graph holds."""

    def forward(self, images):
        return images if float(images.sum()) > 3 else -images


@pytest.mark.slow
def test_a_network_without_a_form_in_onnx_is_one_line(tmp_path):
    pytest.importorskip("onnxscript")
    with pytest.raises(
        SegmentationError, match="cannot be written as ONNX: .+"
    ) as raised:
        write(tmp_path / "model.onnx", Untraceable())
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_more_weights_than_a_file_holds_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "LARGEST", 100)
    with pytest.raises(
        SegmentationError, match="one ONNX file holds 2 GB; export fewer"
    ):
        write(tmp_path / "model.onnx", torch.nn.Linear(8, 8))


@pytest.mark.parametrize(
    ("step", "kind"),
    [
        ("make_model", RuntimeError),
        ("make_model", MemoryError),
        ("open_session", Exception),
    ],
)
def test_a_lack_of_memory_names_the_option(tmp_path, monkeypatch, step, kind):
    def fail(*_):
        raise kind("Failed to allocate memory for requested buffer of size 9")

    monkeypatch.setattr(onnx_file, "make_model", lambda *_: onnx_model("Identity"))
    monkeypatch.setattr(onnx_file, step, fail)
    with pytest.raises(SegmentationError, match="lower --patch_size"):
        write(tmp_path / "model.onnx", Plain())


def test_a_network_that_onnxruntime_cannot_run_is_one_line(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    model = onnx_model("Identity")
    model.graph.node[0].domain = "elsewhere"
    model.opset_import.add(domain="elsewhere", version=1)
    monkeypatch.setattr(onnx_file, "make_model", lambda *_: model)
    with pytest.raises(SegmentationError) as raised:
        write(tmp_path / "model.onnx", Plain())
    message = str(raised.value)
    assert message.startswith(f"{tmp_path / 'model.onnx'}: onnxruntime cannot run this")
    assert "elsewhere" in message and "\n" not in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("operator", "expected"), [("Relu", 17), ("Mish", 18)])
def test_an_operator_that_is_new_keeps_the_newer_set(operator, expected):
    onnx = pytest.importorskip("onnx")
    made = onnx_file.to_older_opset(onnx_model(operator, 18))
    assert made.opset_import[0].version == expected
    onnx.checker.check_model(made, full_check=True)


def test_reductions_keep_their_axes_in_the_older_set():
    """The exporter writes an attribute that the older set does not know."""
    onnx = pytest.importorskip("onnx")
    reference = pytest.importorskip("onnx.reference")
    model = onnx_model("ReduceMean", 18)
    (node,) = model.graph.node
    node.input.append("axes")
    node.attribute.append(onnx.helper.make_attribute("noop_with_empty_axes", 0))
    axes = np.array([2, 3])
    model.graph.initializer.append(onnx.numpy_helper.from_array(axes, "axes"))
    older = onnx_file.to_older_opset(model)
    assert older.opset_import[0].version == 17
    images = np.random.default_rng(0).random((2, 3, 4, 5), np.float32)
    (found,) = reference.ReferenceEvaluator(older).run(None, {onnx_file.INPUT: images})
    np.testing.assert_allclose(found, images.mean((2, 3), keepdims=True), rtol=1e-6)
