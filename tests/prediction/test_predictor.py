"""What turns windows into probabilities: ensembles, views, precisions, and memory that runs out.

The networks and scenes are those of test_prediction.py.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import rasterio
import test_prediction as prediction_tests
import torch
from helpers import interrupt, patch_everywhere
from test_prediction import (
    EVERYTHING,
    PixelModel,
    configure,
    forward,
    image_rule,
    linear_network,
    make_pixel_model,
    noise,
    read_json,
    read_map,
    run,
    write_legacy,
    write_scene,
)
from torch import nn

from common.architectures import TTA_TRANSFORMS, ModelConfig
from common.errors import CheckpointError, SegmentationError
from model_training import (
    Checkpoint,
    Normalization,
    build_model,
    load_checkpoint,
    save_checkpoint,
)
from prediction.ensemble import load_models, one_thread_each
from prediction.predictor import Predictor, route_pointwise_to_onednn
from prediction.settings import PredictionConfig
from prediction.tasks import list_models

CPU = torch.device("cpu")
models, land, water, spatial = (
    prediction_tests.models,
    prediction_tests.land,
    prediction_tests.water,
    prediction_tests.spatial,
)
scene, batches = prediction_tests.scene, prediction_tests.batches
_one_thread, _logging_as_before = (
    prediction_tests._one_thread,
    prediction_tests._logging_as_before,
)


def make_model(path: Path, weights, bias, low, high, **metadata) -> PixelModel:
    """A classifier of single pixels with a normalization of its own."""
    weights, bias = np.array(weights, np.float32), np.array(bias, np.float32)
    model, config = linear_network(weights, bias)
    numbers = Normalization("dataset", tuple(low), tuple(high))
    save_checkpoint(path, model, config, numbers, metadata)
    return PixelModel(path, weights, bias, np.array(low), np.array(high))


def confidence_of(folder: Path) -> np.ndarray:
    return read_map(folder / "map_confidence.tif")


def precision_of(path: Path) -> str:
    with rasterio.open(path) as file:
        return file.tags()["PRECISION"]


# --- ensembles ------------------------------------------------------------------------------


def test_models_of_different_normalizations_are_averaged(tmp_path):
    rng = np.random.default_rng(1)
    members = [
        make_model(
            tmp_path / f"{number}.pth",
            rng.normal(0, 5, (3, 3)),
            rng.normal(0, 1, 3),
            rng.uniform(0, 2000, 3),
            rng.uniform(6000, 12_000, 3),
        )
        for number in range(3)
    ]
    pixels = noise(100, 90)
    scene = write_scene(tmp_path / "scene.tif", pixels)
    files = [member.path for member in members]
    assert run(files, scene, tmp_path / "map.tif", "--save_confidence") == 0
    expected = np.mean([member.probabilities(pixels) for member in members], axis=0)
    confidence = confidence_of(tmp_path)
    np.testing.assert_allclose(confidence, expected.max(axis=0), atol=3e-6)
    for member in members:
        assert abs(member.probabilities(pixels).max(axis=0) - confidence).max() > 0.1
    best = np.sort(expected, axis=0)
    clear = best[-1] - best[-2] > 1e-5
    classes = read_map(tmp_path / "map.tif")
    np.testing.assert_array_equal(classes[clear], expected.argmax(axis=0)[clear])
    assert read_json(tmp_path / "map_statistics.json")["model"] == list(map(str, files))
    with rasterio.open(tmp_path / "map.tif") as file:
        assert file.tags()["MODEL_FILES"] == "0.pth, 1.pth, 2.pth"


def test_models_of_both_rules_are_averaged(tmp_path):
    shape = np.eye(3) * 5, np.zeros(3), [500] * 3, [9000] * 3
    one = make_model(tmp_path / "one.pth", *shape)
    other = write_legacy(tmp_path / "other.pth", one, "metadata")
    pixels = noise(64, 64)
    scene = write_scene(tmp_path / "scene.tif", pixels)
    for files in ([one.path, other, one.path], [other, one.path, one.path]):
        assert run(files, scene, tmp_path / "map.tif", "--save_confidence") == 0
        legacy = one.classify(image_rule(pixels))
        expected = (2 * one.probabilities(pixels) + legacy) / 3
        np.testing.assert_allclose(
            confidence_of(tmp_path), expected.max(axis=0), atol=3e-6
        )


def test_a_model_with_itself_is_that_model(spatial, scene, tmp_path):
    for name, files in (("one", [spatial]), ("two", [spatial, spatial])):
        output = tmp_path / name / "map.tif"
        assert run(files, scene, output, "--save_confidence") == 0
    np.testing.assert_allclose(
        confidence_of(tmp_path / "one"), confidence_of(tmp_path / "two"), atol=1e-6
    )


def touch(*paths: Path) -> list[str]:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return [str(path) for path in paths]


def test_a_folder_of_folds_stands_for_their_final_models_in_order(tmp_path):
    final = "model_final_model.pth"
    numbers = [1, 2, 3, 10, 11]
    expected = touch(*(tmp_path / f"fold_{number}" / final for number in numbers))
    touch(tmp_path / "fold_2" / "model_best_IoU.pth", tmp_path / final)
    touch(tmp_path / "other" / final, tmp_path / "best.pth")
    assert list_models([str(tmp_path)]) == expected


def test_a_folder_without_folds_stands_for_its_final_model(tmp_path):
    (final,) = touch(tmp_path / "model_final_model.pth")
    touch(tmp_path / "model_best_IoU.pth", tmp_path / "fold_1" / "model_best_IoU.pth")
    assert list_models([str(tmp_path)]) == [final]


def test_a_folder_without_a_final_model_stands_for_all_its_checkpoints(tmp_path):
    expected = touch(tmp_path / "a.pth", tmp_path / "b.pth")
    touch(tmp_path / "notes.txt", tmp_path / "model_last.pth")  # of a run that goes on
    assert list_models([str(tmp_path), "c.pth"]) == [*expected, "c.pth"]


def test_a_folder_without_checkpoints_is_refused(scene, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert run(tmp_path / "empty", scene, tmp_path / "map.tif") == 1
    error = capsys.readouterr().err
    assert f"No checkpoints (.pth) in {tmp_path / 'empty'}" in error


def test_the_folds_of_a_folder_are_averaged(land, tmp_path):
    other = make_pixel_model(
        tmp_path / "other.pth", -land.weights, land.bias, class_names=LAND_NAMES
    )
    for number, source in ((1, land.path), (2, other.path)):
        folder = tmp_path / "run" / f"fold_{number}"
        folder.mkdir(parents=True)
        shutil.copy(source, folder / "model_final_model.pth")
    pixels = noise(64, 64)
    image = write_scene(tmp_path / "scene.tif", pixels)
    assert run(tmp_path / "run", image, tmp_path / "map.tif", "--save_confidence") == 0
    expected = (land.probabilities(pixels) + other.probabilities(pixels)) / 2
    np.testing.assert_allclose(confidence_of(tmp_path), expected.max(axis=0), atol=3e-6)


LAND_NAMES = ["water", "forêt", "bare soil", "town"]


@pytest.mark.parametrize(
    ("shape", "names", "what"),
    [
        ((4, 5), LAND_NAMES, ("bands", "5", "3")),
        ((3, 3), LAND_NAMES[:3], ("outputs", "3", "4")),
        ((1, 3), ["no", "yes"], ("outputs", "1", "4")),
        ((4, 3), LAND_NAMES[::-1], ("class names", "'town', 'bare soil'", "'water'")),
    ],
)
def test_models_that_do_not_go_together_are_refused_naming_both(
    land, scene, tmp_path, capsys, shape, names, what
):
    other = make_pixel_model(
        tmp_path / "other.pth", np.ones(shape), np.zeros(shape[0]), class_names=names
    )
    assert run([land.path, other.path], scene, tmp_path / "map.tif") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    for text in (str(land.path), str(other.path), *what):
        assert text in error
    assert not (tmp_path / "map.tif").exists()


def test_models_trained_on_other_band_orders_are_not_averaged_in_silence(
    land, scene, tmp_path, capsys
):
    other = make_pixel_model(
        tmp_path / "other.pth",
        land.weights,
        land.bias,
        class_names=LAND_NAMES,
        band_descriptions=list(prediction_tests.DESCRIPTIONS[::-1]),
    )
    status = run([land.path, other.path], scene, tmp_path / "map.tif")
    assert status == 1 or "B04 red, B03 green, B02 blue" in capsys.readouterr().err


def test_values_that_only_the_second_model_does_not_know_are_told(
    land, scene, tmp_path, capsys
):
    other = make_model(
        tmp_path / "other.pth",
        land.weights,
        land.bias,
        [0.0] * 3,
        [0.3] * 3,
        class_names=LAND_NAMES,
    )
    assert run([land.path, other.path], scene, tmp_path / "map.tif") == 0
    assert "warning" in capsys.readouterr().err


# --- views ----------------------------------------------------------------------------------

TURNED = {
    "flip": [lambda a: a, np.fliplr, np.flipud, lambda a: np.flipud(np.fliplr(a))],
    "d4": [
        lambda a: a,
        np.fliplr,
        np.flipud,
        lambda a: np.flipud(np.fliplr(a)),
        lambda a: np.swapaxes(a, 0, 1),
        lambda a: np.fliplr(np.swapaxes(a, 0, 1)),
        lambda a: np.flipud(np.swapaxes(a, 0, 1)),
        lambda a: np.flipud(np.fliplr(np.swapaxes(a, 0, 1))),
    ],
}


def averaged(predict, image: np.ndarray, views: str) -> np.ndarray:
    """The mean (K, H, W) over views of (C, H, W), each turned back by what undoes it."""
    height, width = image.shape[1:]
    places = np.arange(height * width).reshape(height, width)
    total = 0
    for turn in TURNED[views]:
        view = np.moveaxis(turn(np.moveaxis(image, 0, -1)), -1, 0)
        result = predict(view)
        back = np.empty((len(result), height * width))
        back[:, turn(places).ravel()] = result.reshape(len(result), -1)
        total = total + back.reshape(-1, height, width)
    return total / len(TURNED[views])


@pytest.mark.parametrize("views", TURNED)
@pytest.mark.parametrize("shape", [(64, 64), (64, 96)])
def test_views_are_averaged(spatial, tmp_path, views, shape):
    pixels = noise(*shape)
    scene = write_scene(tmp_path / "scene.tif", pixels)
    window = ("--patch_size", "96", "--tta", views, "--save_confidence")
    assert run(spatial, scene, tmp_path / "map.tif", *window) == 0
    expected = averaged(lambda view: forward(spatial, view), pixels / 10_000, views)
    found = confidence_of(tmp_path)
    np.testing.assert_allclose(found, expected.max(axis=0), atol=1e-5)
    plain = forward(spatial, pixels / 10_000)
    assert abs(found - plain.max(axis=0)).max() > 1e-3


def test_the_views_of_d4_are_eight_different_ones_and_flip_four_of_them():
    image = torch.arange(6.0).reshape(1, 2, 3)
    seen = set()
    for turns, mirrored in TTA_TRANSFORMS["d4"]:
        view = (image.flip(-1) if mirrored else image).rot90(turns, (-2, -1))
        seen.add(tuple(map(tuple, view[0].tolist())))
    assert len(seen) == 8
    assert set(TTA_TRANSFORMS["flip"]) < set(TTA_TRANSFORMS["d4"])
    assert TTA_TRANSFORMS["none"] == [(0, False)]


@pytest.mark.parametrize("views", ["none", "d4"])
def test_d4_maps_a_turned_scene_as_the_turned_map(spatial, views):
    checkpoint = load_checkpoint(spatial)
    predict = Predictor([checkpoint], CPU, tta=views)
    image = torch.from_numpy(noise(64, 64)).float()[None]
    valid = torch.rand(1, 64, 64) > 0.1
    straight = predict(image, valid)
    turned = predict(
        image.rot90(1, (-2, -1)).flip(-1), valid.rot90(1, (-2, -1)).flip(-1)
    )
    difference = (turned - straight.rot90(1, (-2, -1)).flip(-1)).abs().max()
    assert (difference < 1e-5) == (views == "d4")


def test_a_pixel_model_is_the_same_in_every_view(land, scene, tmp_path):
    found = []
    for views in ("none", "flip", "d4"):
        options = ("--tta", views, "--save_confidence")
        assert run(land.path, scene, tmp_path / "map.tif", *options) == 0
        found.append(confidence_of(tmp_path))
    np.testing.assert_allclose(found[1], found[0], atol=1e-6)
    np.testing.assert_allclose(found[2], found[0], atol=1e-6)


def test_views_of_several_models_with_uncertainty(spatial, land, tmp_path):
    checkpoints = [load_checkpoint(spatial)] * 2
    predict = Predictor(checkpoints, CPU, tta="flip", expected_entropy=True)
    image = noise(64, 64)
    found = predict(torch.from_numpy(image)[None], None)[0].numpy()
    mean = averaged(lambda view: forward(spatial, view), image / 10_000, "flip")
    assert found.shape == (4, 64, 64)
    np.testing.assert_allclose(found[:3], mean, atol=1e-5)
    np.testing.assert_allclose(
        found[3], prediction_tests.entropy_share(mean), atol=1e-5
    )


# --- temperature ----------------------------------------------------------------------------


def test_logits_are_divided_by_the_temperature_of_their_model(tmp_path):
    rng = np.random.default_rng(2)
    low, high = np.zeros(3), np.full(3, 10_000.0)
    sure = make_model(
        tmp_path / "sure.pth", rng.normal(0, 5, (3, 3)), np.zeros(3), low, high,
        temperature=2.0,
    )  # fmt: skip
    plain = make_model(
        tmp_path / "plain.pth", rng.normal(0, 5, (3, 3)), np.zeros(3), low, high
    )
    halved = PixelModel(sure.path, sure.weights / 2, sure.bias / 2, low, high)
    pixels = noise(70, 90)
    scene = write_scene(tmp_path / "scene.tif", pixels)
    assert run(sure.path, scene, tmp_path / "map.tif", "--save_confidence") == 0
    expected = halved.probabilities(pixels)
    np.testing.assert_allclose(confidence_of(tmp_path), expected.max(axis=0), atol=3e-6)
    both = [sure.path, plain.path]
    assert run(both, scene, tmp_path / "map.tif", "--save_confidence") == 0
    mean = (expected + plain.probabilities(pixels)) / 2
    np.testing.assert_allclose(confidence_of(tmp_path), mean.max(axis=0), atol=3e-6)


def test_the_threshold_of_a_binary_model_is_a_calibrated_probability(tmp_path):
    low, high = np.zeros(3), np.full(3, 10_000.0)
    weights, bias = [[6.0, -5.0, 1.0]], [-1.0]
    sure = make_model(tmp_path / "sure.pth", weights, bias, low, high, temperature=2.0)
    halved = PixelModel(sure.path, sure.weights / 2, sure.bias / 2, low, high)
    pixels = noise(64, 64)
    scene = write_scene(tmp_path / "scene.tif", pixels)
    for threshold in (0.3, 0.5):
        option = ("--threshold", str(threshold))
        assert run(sure.path, scene, tmp_path / "map.tif", *option) == 0
        found = read_map(tmp_path / "map.tif")
        foreground = halved.probabilities(pixels)[0]
        clear = abs(foreground - threshold) > 1e-5
        np.testing.assert_array_equal(found[clear], foreground[clear] >= threshold)


# --- precision ------------------------------------------------------------------------------


def test_bf16_and_fp32_agree(land, scene, tmp_path):
    found = {}
    for precision in ("fp32", "bf16"):
        folder = tmp_path / precision
        options = ("--precision", precision, "--save_confidence")
        assert run(land.path, scene, folder / "map.tif", *options) == 0
        found[precision] = confidence_of(folder)
        assert precision_of(folder / "map.tif") == precision
        assert precision_of(folder / "map_confidence.tif") == precision
    difference = abs(found["fp32"] - found["bf16"])
    assert 0 < difference.max() < 2e-2


def test_fp16_on_the_cpu_is_a_wrong_command_line(land, scene, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(land.path, scene, tmp_path / "map.tif", "--precision", "fp16")
    assert stop.value.code == 2
    assert "--precision fp16" in capsys.readouterr().err


@pytest.fixture
def delicate(tmp_path) -> tuple[Path, Path]:
    """A model that decides by the ninth bit, and a scene of 16 windows around its limit."""
    model = make_model(
        tmp_path / "m.pth", [[1000, 0, 0]], [-500], [0] * 3, [10_000] * 3
    )
    pixels = noise(200, 200) // 50 + 4900  # 4900 to 5100
    return model.path, write_scene(tmp_path / "delicate.tif", pixels)


def test_auto_computes_in_fp32_and_says_so_where_classes_would_change(
    delicate, tmp_path, capsys, monkeypatch
):
    patch_everywhere(
        monkeypatch, "common.devices.native_precisions", lambda device: ["bf16"]
    )
    output = tmp_path / "map.tif"
    assert run(*delicate, output, "--precision", "auto") == 0
    assert "computing in fp32" in capsys.readouterr().err
    assert precision_of(output) == "fp32"
    assert read_json(tmp_path / "map_statistics.json")["run"]["precision"] == "fp32"


@pytest.mark.parametrize("native", [["bf16"], ["bf16", "fp16"], []])
def test_auto_takes_what_is_native_where_classes_stay(
    land, tmp_path, capsys, monkeypatch, native
):
    patch_everywhere(
        monkeypatch, "common.devices.native_precisions", lambda device: native
    )
    pixels = np.where(noise(200, 200) > 5000, 9000, 2000).astype(np.uint16)
    scene = write_scene(tmp_path / "scene.tif", pixels)
    output = tmp_path / "map.tif"
    assert run(land.path, scene, output, "--precision", "auto") == 0
    assert "computing in" not in capsys.readouterr().err
    assert precision_of(output) == (native or ["fp32"])[0]


def test_auto_takes_the_next_native_precision_where_the_first_changes_classes(
    delicate, tmp_path, capsys, monkeypatch
):
    native = ["bf16", "fp16"]
    patch_everywhere(
        monkeypatch, "common.devices.native_precisions", lambda device: native
    )
    plain = Predictor._average_views

    def exact_in_fp16(self, *arguments):
        if self.precision == "fp16":
            monkeypatch.setattr(self, "precision", "fp32")
        return plain(self, *arguments)

    monkeypatch.setattr(Predictor, "_average_views", exact_in_fp16)
    output = tmp_path / "map.tif"
    assert run(*delicate, output, "--precision", "auto") == 0
    err = capsys.readouterr().err
    assert "bf16 changes the class of" in err and "computing in fp16" in err
    assert precision_of(output) == "fp16"


def test_auto_makes_no_trial_for_a_few_windows(
    land, scene, tmp_path, monkeypatch, batches
):
    patch_everywhere(
        monkeypatch, "common.devices.native_precisions", lambda device: ["bf16"]
    )
    output = tmp_path / "map.tif"
    assert run(land.path, scene, output, "--precision", "auto") == 0
    assert precision_of(output) == "fp32"
    assert sum(shape[0] for shape in batches) == 4


def test_auto_makes_its_trial_where_pixels_are_valid(
    delicate, tmp_path, monkeypatch, batches
):
    model, path = delicate
    with rasterio.open(path) as file:
        pixels = file.read()
    pixels[:, :, 60:] = 0  # most windows hold nothing
    scene = write_scene(tmp_path / "holes.tif", pixels, nodata=0)
    patch_everywhere(
        monkeypatch, "common.devices.native_precisions", lambda device: ["bf16"]
    )
    assert run(model, scene, tmp_path / "map.tif", "--precision", "auto") == 0
    assert precision_of(tmp_path / "map.tif") == "fp32"


def test_a_resumed_run_keeps_the_precision_that_was_found(
    delicate, tmp_path, monkeypatch
):
    patch_everywhere(
        monkeypatch, "common.devices.native_precisions", lambda device: ["bf16"]
    )
    output = tmp_path / "map.tif"
    with monkeypatch.context() as patch:
        interrupt(patch, "prediction.layers.compute_layers", 2)
        assert run(*delicate, output, "--precision", "auto") == 130
    calls = interrupt(monkeypatch, "prediction.precision.choose_precision", 99)
    assert run(*delicate, output, "--precision", "auto", "--resume") == 0
    assert calls == [] and precision_of(output) == "fp32"


# --- lack of memory -------------------------------------------------------------------------


class Greedy(nn.Module):
    """A network whose memory holds some windows and no more."""

    def __init__(self, most: int, error: Exception):
        super().__init__()
        self.most, self.error, self.seen = most, error, []

    def forward(self, images):
        self.seen.append(len(images))
        if len(images) > self.most:
            raise self.error
        return images[:, :2] * 3


def predictor_of(network: nn.Module, **options) -> Predictor:
    config = ModelConfig("unet-dropout", 3, 2, None)
    numbers = Normalization("dataset", (0.0,) * 3, (1.0,) * 3)
    return Predictor([Checkpoint(network, config, numbers, {})], CPU, **options)


SCARCE = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    RuntimeError(
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"
    ),
    MemoryError(),
]


@pytest.mark.parametrize("error", SCARCE, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("masked", [False, True])
def test_a_batch_that_does_not_fit_is_halved_until_it_does_and_stays_so(
    monkeypatch, error, masked
):
    messages = []

    def info(text, *values):
        messages.append(text % values)

    monkeypatch.setattr(logging.getLogger("semanticseg4eo"), "info", info)
    images = torch.rand(7, 3, 32, 32)
    valid = torch.rand(7, 32, 32) > 0.5 if masked else None
    plenty = predictor_of(Greedy(100, error))(images, valid)
    network = Greedy(2, error)
    predict = predictor_of(network)
    assert torch.equal(predict(images, valid), plenty)
    assert network.seen == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    assert len(messages) == 2 and "batches of 1 from here on" in messages[-1]
    assert torch.equal(predict(images, valid), plenty)
    assert network.seen[9:] == [1] * 7 and len(messages) == 2


def test_a_run_goes_on_in_smaller_batches(
    spatial, scene, tmp_path, monkeypatch, capsys
):
    expected = tmp_path / "expected.tif"
    assert run(spatial, scene, expected, "--batch_size", "1") == 0
    average = Predictor._average_views

    def greedy(self, network, scaled, temperature):
        if len(scaled) > 1:
            raise SCARCE[0]
        return average(self, network, scaled, temperature)

    monkeypatch.setattr(Predictor, "_average_views", greedy)
    capsys.readouterr()
    assert run(spatial, scene, tmp_path / "map.tif", "--batch_size", "2") == 0
    assert capsys.readouterr().err.count("memory ran out: batches of 1") == 1
    np.testing.assert_array_equal(read_map(tmp_path / "map.tif"), read_map(expected))


def test_a_window_that_does_not_fit_alone_is_an_error_that_says_what_to_lower(
    spatial, scene, tmp_path, monkeypatch, capsys
):
    predict = predictor_of(Greedy(0, SCARCE[1]))
    with pytest.raises(SegmentationError, match="--patch_size"):
        predict(torch.rand(4, 3, 32, 32), None)

    def greedy(self, network, scaled, temperature):
        raise SCARCE[1]

    monkeypatch.setattr(Predictor, "_average_views", greedy)
    folder = tmp_path / "out"
    capsys.readouterr()
    assert run(spatial, scene, folder / "map.tif") == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and "64 x 64" in last and "--patch_size" in last
    assert not folder.exists()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x5 and 6x7)"),
        ValueError("something else"),
        NotImplementedError("no kernel for this"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_other_errors_of_a_network_are_not_swallowed(error):
    network = Greedy(0, error)
    with pytest.raises(type(error)) as caught:
        predictor_of(network)(torch.rand(4, 3, 32, 32), None)
    assert caught.value is error and network.seen == [4]


def test_nothing_of_the_failed_batch_is_held_when_the_smaller_one_runs():
    import weakref

    class Holding(Greedy):
        def forward(self, images):
            self.seen.append(len(images))
            if len(images) > 1:
                taken = torch.ones(10)
                self.last = weakref.ref(taken)
                raise RuntimeError("can't allocate memory")
            assert self.last() is None
            return images[:, :2]

    predictor_of(Holding(0, SCARCE[0]))(torch.rand(2, 3, 32, 32), None)


# --- compiling ------------------------------------------------------------------------------


def test_a_compiled_network_sees_batches_of_one_size(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda network, **options: network)
    network = Greedy(100, SCARCE[0])
    predict = predictor_of(network, compile_batch=4)
    plain = predictor_of(Greedy(100, SCARCE[0]))
    images, valid = torch.rand(4, 3, 32, 32), torch.rand(4, 32, 32) > 0.5
    for count in (4, 3, 1):
        for masks in (None, valid[:count]):
            expected = plain(images[:count], masks)
            assert torch.equal(predict(images[:count], masks), expected)
    assert set(network.seen) == {4}


def test_a_compiled_network_short_of_memory_is_halved_too(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda network, **options: network)
    network = Greedy(2, SCARCE[0])
    predict = predictor_of(network, compile_batch=4)
    images = torch.rand(5, 3, 32, 32)
    assert predict(images, None).shape == (5, 2, 32, 32)
    assert set(network.seen[1:]) == {2}


# --- input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype",
    ["uint8", "int8", "int16", "uint16", "int32", "uint32", "float32", "float64"],
)
def test_scenes_of_every_dtype_are_mapped_alike(tmp_path, dtype):
    model = make_model(
        tmp_path / "m.pth", 9 * np.eye(3), np.zeros(3), [0.0] * 3, [120.0] * 3
    )
    pixels = (noise(70, 50) // 80).astype(dtype)  # 0 to 125
    pixels[:, 30:45, 20:] = 127
    scene = write_scene(tmp_path / "scene.tif", pixels, nodata=127)
    valid = pixels[0] != 127
    assert run(model.path, scene, tmp_path / "map.tif", "--save_confidence") == 0
    expected = model.probabilities(pixels).max(axis=0)
    found = confidence_of(tmp_path)
    np.testing.assert_allclose(found[valid], expected[valid], atol=3e-6)
    assert (found[~valid] == -1).all()


# --- what the options say of a model --------------------------------------------------------


def bare_weights(path: Path, model: PixelModel) -> Path:
    network = linear_network(model.weights, model.bias)[0].network
    torch.save(network.state_dict(), path)
    return path


def test_weights_alone_are_refused_naming_the_options_that_describe_them(
    land, scene, tmp_path, capsys
):
    bare = bare_weights(tmp_path / "bare.pth", land)
    assert run(bare, scene, tmp_path / "map.tif") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(bare) in error
    for option in ("--model_name", "--in_channels", "--num_classes"):
        assert option in error
    assert not (tmp_path / "map.tif").exists()


def test_weights_with_options_that_describe_them_are_predicted_by_the_image_rule(
    land, tmp_path
):
    bare = bare_weights(tmp_path / "bare.pth", land)
    pixels = noise(64, 64)
    scene = write_scene(tmp_path / "scene.tif", pixels)
    said = ("--model_name", "unet-dropout", "--in_channels", "3", "--num_classes", "4")
    assert run(bare, scene, tmp_path / "map.tif", *said, "--save_confidence") == 0
    expected = land.classify(image_rule(pixels))
    np.testing.assert_allclose(confidence_of(tmp_path), expected.max(axis=0), atol=3e-6)
    with rasterio.open(tmp_path / "map.tif") as file:
        assert file.tags()["NORMALIZATION"] == "image"


def test_binary_weights_are_described_by_one_class(water, tmp_path):
    bare = bare_weights(tmp_path / "bare.pth", water)
    pixels = noise(64, 64)
    scene = write_scene(tmp_path / "scene.tif", pixels)
    said = ("--model_name", "unet-dropout", "--in_channels", "3", "--num_classes", "1")
    assert run(bare, scene, tmp_path / "map.tif", *said, *EVERYTHING) == 0
    foreground = water.classify(image_rule(pixels))[0]
    expected = np.maximum(foreground, 1 - foreground)
    np.testing.assert_allclose(confidence_of(tmp_path), expected, atol=3e-6)


@pytest.mark.parametrize(
    "wrong", [("--model_name", "unet"), ("--in_channels", "4"), ("--num_classes", "5")]
)
def test_an_option_that_contradicts_the_checkpoint_is_an_error(
    land, scene, tmp_path, capsys, wrong
):
    assert run(land.path, scene, tmp_path / "map.tif", *wrong) == 1
    error = capsys.readouterr().err
    assert " ".join(wrong) in error and str(land.path) in error


def test_an_encoder_of_a_model_that_has_none_is_refused(land, scene, tmp_path):
    wrong = ("--encoder_name", "resnet18")
    assert run(land.path, scene, tmp_path / "map.tif", *wrong) != 0


def test_a_model_name_that_is_none_is_a_wrong_command_line(
    land, scene, tmp_path, capsys
):
    with pytest.raises(SystemExit) as stop:
        run(land.path, scene, tmp_path / "map.tif", "--model_name", "no-such-model")
    assert stop.value.code == 2
    assert "no-such-model" in capsys.readouterr().err


def test_an_unreadable_second_model_stops_before_the_work(
    land, scene, tmp_path, capsys, batches
):
    with pytest.raises(CheckpointError, match=r"missing\.pth"):
        config = configure(model=[str(land.path), str(tmp_path / "missing.pth")])
        load_models(config)
    files = [land.path, tmp_path / "missing.pth"]
    assert run(files, scene, tmp_path / "map.tif") == 1
    assert "missing.pth" in capsys.readouterr().err and batches == []


def test_pointwise_convolutions_of_onednn_give_the_same_logits():
    from torch import nn

    torch.manual_seed(0)
    config = ModelConfig("fpn", 3, 4, "resnet18")
    model = build_model(config).eval()
    images = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        expected = model(images)
        route_pointwise_to_onednn(model)
        found = model(images)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    turned = {layer.kernel_size: layer.dilation for layer in layers}
    assert turned[(1, 1)] == (2, 2) and turned[(3, 3)] == (1, 1)


@pytest.mark.parametrize(
    ("options", "wanted"), [({}, True), ({"compile": True}, False)]
)
def test_windows_are_predicted_by_onednn_unless_compiled(options, wanted):
    paths = {"model": ["m.pth"], "input": ["a.tif"], "output": "b.tif"}
    config = PredictionConfig(**paths | options)
    there = torch.backends.mkldnn.is_available()
    assert one_thread_each(config, torch.device("cpu")) == (wanted and there)
    assert not one_thread_each(config, torch.device("cuda"))
