"""What a GPU would compute, traced where there is none; and ``gpu.py``, which proves it on one.

PyTorch's fake tensors have a device and a shape, but no values: an operation on tensors of two
devices fails as it would on a GPU, and so does all that would have to wait for one to know a value.
The backward pass cannot be traced so; it has no tensors but those of the forward pass.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import gpu
import numpy as np
import pytest
import torch
from helpers import CLASSES, ROOT, encoder_for, statistics
from torch._subclasses.fake_tensor import (
    DynamicOutputShapeException,
    FakeTensorMode,
    unset_fake_temporarily,
)

from common.architectures import LOSS_NAMES, ModelConfig
from model_training import (
    Normalization,
    build_loss,
    build_model,
    get_available_models,
)
from prediction import blending
from prediction.layers import compute_layers, list_layers
from prediction.predictor import Predictor
from prediction.settings import PredictionConfig
from prediction.tiling import Extent, lay_windows
from training.augmentation import Radiometry, Symmetry, radiometry_table
from training.loaders import RawBatch, to_input
from training.loop import MeanLoss, Stepper, evaluate, train_one_epoch

GPU = torch.device("cuda:0")
BANDS, SIDE = 3, 64


@pytest.fixture
def traced(monkeypatch) -> Iterator[None]:
    """Tensors are fake, also on a GPU that is not there."""
    monkeypatch.setattr(
        "torch.cuda.amp.common.amp_definitely_not_available", lambda: False
    )
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *_: True)

    def backward(value, *_, **__) -> None:
        assert value.device == GPU

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def on_gpu(model: torch.nn.Module) -> torch.nn.Module:
    """Put weights on the GPU, channels-last; what else a model holds stays where it is."""
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for key, value in held.items():
                if value is None:
                    continue
                four = value.ndim == 4
                layout = torch.channels_last if four else torch.contiguous_format
                there = torch.empty_like(value, device=GPU, memory_format=layout)
                parameter = held is module._parameters
                held[key] = torch.nn.Parameter(there) if parameter else there
    return model


def make_network(outputs: int = CLASSES) -> torch.nn.Module:
    """The smallest one, where it is not the subject."""
    return on_gpu(torch.nn.Conv2d(BANDS, outputs, 1))


def make_batches() -> list:
    """One of two patches, from main memory to the GPU as a loader brings it there."""
    shape = 2, SIDE, SIDE
    drawn = [Radiometry(contrast=1.1, lost_band=1)] * 2
    symmetries = [Symmetry(1, True), Symmetry(2)]
    raw = RawBatch(
        torch.zeros(2, BANDS, SIDE, SIDE, dtype=torch.uint16),
        torch.ones(shape, dtype=torch.bool),
        torch.zeros(shape, dtype=torch.uint8),
        symmetries,
        drawn,
        torch.from_numpy(radiometry_table(drawn, BANDS)),
    )
    return [to_input(raw, statistics(BANDS), GPU)]


def train_traced(monkeypatch, model, loss, mode="multiclass", **options) -> None:
    """A step of a training, without what ends an epoch: that waits for the loss."""
    monkeypatch.setattr(MeanLoss, "result", lambda self, group: self.sums)
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(parameters, foreach=True)
    scaler = torch.amp.GradScaler("cuda", enabled=False)
    stepper = Stepper(optimizer, scaler, clip_grad=1.0)
    sums = train_one_epoch(
        model, make_batches(), build_loss(loss, mode, 255, **options), stepper, GPU, "bf16"
    )  # fmt: skip
    assert sums.device == GPU


@pytest.mark.parametrize("name", get_available_models())
def test_a_training_step_neither_leaves_the_gpu_nor_waits_for_it(
    name, traced, monkeypatch
):
    with unset_fake_temporarily():
        model = build_model(ModelConfig(name, BANDS, CLASSES, encoder_for(name)))
    train_traced(monkeypatch, on_gpu(model), "dice+ce")


@pytest.mark.parametrize("mode", ["binary", "multiclass"])
@pytest.mark.parametrize("loss", [n for n in LOSS_NAMES if n != "lovasz"])
def test_no_loss_but_lovasz_waits_for_the_gpu(loss, mode, traced, monkeypatch):
    outputs = 1 if mode == "binary" else CLASSES
    train_traced(monkeypatch, make_network(outputs), loss, mode)


def test_class_weights_are_used_on_the_gpu(traced, monkeypatch):
    weights = torch.ones(CLASSES, device=GPU)
    train_traced(monkeypatch, make_network(), "ce", class_weights=weights)


@pytest.mark.parametrize("mode", ["binary", "multiclass"])
def test_lovasz_waits_where_it_selects_pixels(mode, traced):
    logits = torch.zeros(2, 1 if mode == "binary" else CLASSES, 8, 8, device=GPU)
    mask = torch.zeros(2, 8, 8, dtype=torch.int64, device=GPU)
    with pytest.raises(DynamicOutputShapeException):
        build_loss("lovasz", mode, 255)(logits, mask)


@pytest.mark.parametrize("outputs", [1, CLASSES])
def test_validation_neither_leaves_the_gpu_nor_waits_for_it(
    outputs, traced, monkeypatch
):
    monkeypatch.setattr(MeanLoss, "result", lambda self, group: self.sums)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: self)  # at the end
    monkeypatch.setattr(torch.Tensor, "numpy", lambda self: self)
    loss = build_loss("dice+ce", "binary" if outputs == 1 else "multiclass", 255)
    model, classes = make_network(outputs), max(2, outputs)
    sums, matrix = evaluate(model, make_batches(), loss, GPU, classes, None, "bf16")
    assert sums.device == matrix.device == GPU


def make_predictor(outputs: int, rules, tta: str, **options) -> Predictor:
    """One of several models that normalize by rules of their own."""
    config = SimpleNamespace(num_classes=outputs)
    members = [
        SimpleNamespace(
            model=make_network(outputs).eval(),
            normalization=rule,
            temperature=1.5,
            config=config,
        )
        for rule in rules
    ]
    return Predictor(members, GPU, "bf16", tta, **options)


@pytest.mark.parametrize("outputs", [1, CLASSES])
@pytest.mark.parametrize("tta", ["none", "d4"])
def test_a_map_is_computed_on_the_gpu_without_waiting(
    outputs, tta, traced, monkeypatch
):
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, **_: self)  # it is there
    rules = statistics(BANDS), Normalization("dataset", (1.0,) * 3, (9.0,) * 3)
    predictor = make_predictor(outputs, rules, tta, expected_entropy=True)
    in_turn = lambda function, items, *_, **__: map(function, items)
    monkeypatch.setattr(blending, "bounded_map", in_turn)
    layouts = lay_windows(96, SIDE, 16), lay_windows(160, SIDE, 16)
    valid = np.ones((96, 160), bool)
    blocks = [
        blending.RowBlock(
            0,
            torch.zeros(BANDS, 96, 160, dtype=torch.uint16, device=GPU),
            valid,
            valid,
        )
    ]
    rows = blending.blended_rows(
        iter(blocks), predictor, layouts, Extent(0, 96, 0, 160), predictor.channels, 2, GPU
    )  # fmt: skip
    config = PredictionConfig(
        "m.pth", "s.tif", "o.tif", save_uncertainty=True, save_probabilities=True
    )
    layers = list_layers(config, ["a"] * max(2, outputs), 2)
    found = [
        compute_layers(blended, layers, outputs, 0.5).values() for _, blended, _ in rows
    ]
    assert len(found) == len(layouts[0].starts)
    assert all(tensor.device == GPU for one in found for tensor in one)


# --- the command that proves it ---------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_nothing_to_prove(capsys):
    assert gpu.main([]) == 0
    assert capsys.readouterr().out.startswith("no GPU here")


def test_checks_are_chosen_by_their_name_or_how_it_begins():
    names = [check.name for check in gpu.choose(["train-unet-auto", "figures"])]
    assert names == ["train-unet-auto", "figures-training", "figures-prediction"]
    assert len(gpu.choose([])) == len(gpu.CHECKS)
    with pytest.raises(SystemExit, match="no check begins with walk"):
        gpu.choose(["walk"])


@pytest.mark.parametrize(
    ("raised", "outcome", "detail"),
    [
        (None, "passed", "fine"),
        (gpu.Skip("one GPU"), "skipped", "one GPU"),
        (gpu.Failure("no map"), "failed", "no map"),
        (KeyError("iou"), "failed", "KeyError: 'iou'"),
    ],
)
def test_a_check_has_an_outcome_whatever_it_raises(raised, outcome, detail):
    def run(place):
        if raised:
            raise raised
        return "fine"

    result = gpu.perform(gpu.Check("one", run), SimpleNamespace(on_gpu=False))
    assert (result.outcome, result.detail) == (outcome, detail)
    skipped = gpu.Check("one", run, gpu_only=True)
    result = gpu.perform(skipped, SimpleNamespace(on_gpu=False))
    assert (result.outcome, result.detail) == ("skipped", "needs a GPU")


WITHOUT_VECTORS = """
import sys

for name in ("geopandas", "pyogrio", "shapely", "fiona"):
    sys.modules[name] = None  # its import fails
sys.path[:0] = {paths!r}
import gpu, gpu_figures
from gpu_place import Place
from pathlib import Path

import Predict_large_image, main

place = object.__new__(Place)
place.device, place.once, place.folder = "cpu", lambda key, make: make(), Path(sys.argv[1])
quick = ("--encoder_name", "tu-test_resnet", "--epochs", "1", "--num_workers", "0")
assert main.main(place.words(Path(sys.argv[1]) / "out", *quick)) == 0
scene = place.scene(2, 3)
model = Path(sys.argv[1]) / "out" / "model_final_model.pth"
files = ["--model", model, "--input", scene, "--output", scene.with_name("map.tif")]
more = ["--patch_size", 64, "--overlap", 16, "--device", "cpu", "--quicklook"]
assert Predict_large_image.main([str(word) for word in (*files, *more)]) == 0
"""


@pytest.mark.slow
def test_training_and_mapping_need_no_library_of_vector_files(tmp_path):
    paths = [str(ROOT), str(ROOT / "tests")]
    script = WITHOUT_VECTORS.format(paths=paths)
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "map.tif").exists()
