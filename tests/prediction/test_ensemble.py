"""Models of a run: several, described by options, and whether a scene goes with them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from prediction_helpers import (
    DESCRIPTIONS,
    EVERYTHING,
    PixelModel,
    confidence_of,
    configure,
    image_rule,
    linear_network,
    make_model,
    make_pixel_model,
    noise,
    read_json,
    read_map,
    run,
    write_legacy,
    write_scene,
)
from torch import nn

from common.architectures import ModelConfig
from common.errors import CheckpointError
from common.rasters import Source, open_raster
from model_training import build_model
from prediction.ensemble import load_models, runs_on_onednn, sample_pixels
from prediction.predictor import route_pointwise_to_onednn

# --- honest input -----------------------------------------------------------------------


def warnings_of(capsys) -> list[str]:
    lines = capsys.readouterr().err.splitlines()
    return [line for line in lines if "warning" in line]


@pytest.mark.parametrize(
    ("change", "strange"),
    [
        (lambda image: image, []),
        (lambda image: (image / 10_000).astype(np.float32), [1, 2, 3]),
        (lambda image: (image // 39).astype(np.uint8), [1, 2, 3]),
        (lambda image: image + np.array([0, 9000, 0], np.uint16)[:, None, None], [2]),
        (lambda image: image * np.array([1, 0, 1], np.uint16)[:, None, None] + 1, [2]),
    ],
    ids=["same", "reflectance", "8 bit", "shifted", "constant"],
)
def test_values_that_the_model_was_not_trained_on_are_reported_once_with_their_bands(
    land, tmp_path, capsys, change, strange
):
    scene = write_scene(tmp_path / "scene.tif", change(noise(150, 200)))
    assert run(land.path, scene, tmp_path / "map.tif") == 0
    warnings = warnings_of(capsys)
    assert len(warnings) == bool(strange)
    if strange:
        assert str(scene) in warnings[0] and str(land.path) in warnings[0]
        named = [band for band in (1, 2, 3) if f"{band} (" in warnings[0]]
        assert named == strange


def test_a_shifted_scene_names_the_bands_as_the_file_counts_them(
    land, tmp_path, capsys
):
    pixels = noise(80, 80)[::-1].copy()
    pixels[1] += 20_000
    scene = write_scene(tmp_path / "scene.tif", np.concatenate([pixels[:1], pixels]))
    bands = ("--bands", "4,3,2")
    assert run(land.path, scene, tmp_path / "map.tif", *bands) == 0
    (warning,) = warnings_of(capsys)
    assert "in band 3 (100% of the pixels outside" in warning
    assert warning.count("trained on 300 to 9000") == 1


def test_of_many_strange_bands_four_are_named(models, tmp_path, capsys):
    model = make_pixel_model(models / "ten.pth", np.eye(10), np.zeros(10))
    pixels = noise(70, 70, bands=10) // 1000
    scene = write_scene(tmp_path / "scene.tif", pixels)
    assert run(model.path, scene, tmp_path / "map.tif") == 0
    (warning,) = warnings_of(capsys)
    assert warning.count("of the pixels outside") == 4 and "and 6 more" in warning


def test_a_model_without_statistics_gives_no_warning(land, tmp_path, capsys):
    legacy = write_legacy(tmp_path / "legacy.pth", land, "metadata")
    scene = write_scene(tmp_path / "scene.tif", noise(70, 70) // 5000)
    assert run(legacy, scene, tmp_path / "map.tif") == 0
    assert warnings_of(capsys) == []


@pytest.mark.parametrize("shape", [(1, 1), (20, 300), (63, 64), (64, 65), (500, 10)])
def test_sampled_pixels_are_valid_ones_of_the_scene(tmp_path, shape):
    pixels = noise(*shape)
    pixels[:, shape[0] // 2 + 1 :: 7] = 0
    path = write_scene(tmp_path / "scene.tif", pixels, nodata=0)
    with open_raster(path) as scene:
        found = sample_pixels(Source(scene, [3, 1]))
    there = {tuple(pixel) for pixel in pixels[[2, 0]].reshape(2, -1).T if pixel.any()}
    assert len(found) and {tuple(pixel) for pixel in found} <= there


def test_a_scene_without_a_valid_pixel_is_reported_and_nothing_else(
    land, tmp_path, capsys
):
    scene = write_scene(
        tmp_path / "scene.tif", np.zeros((3, 40, 40), np.uint16), nodata=0
    )
    assert run(land.path, scene, tmp_path / "map.tif") == 0
    (warning,) = warnings_of(capsys)
    assert "has no valid pixel" in warning


# --- ensembles --------------------------------------------------------------------------


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
        options = ("--save_confidence", "--overwrite")
        assert run(files, scene, tmp_path / "map.tif", *options) == 0
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
        band_descriptions=list(DESCRIPTIONS[::-1]),
    )
    status = run([land.path, other.path], scene, tmp_path / "map.tif")
    assert status == 1 or "B04 red, B03 green, B02 blue" in capsys.readouterr().err


def test_values_that_only_the_second_model_does_not_know_are_reported(
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


# --- what the options say of a model ----------------------------------------------------


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


@pytest.mark.parametrize("compiled", [False, True])
def test_windows_are_predicted_by_onednn_unless_compiled(land, compiled):
    models = load_models(configure(model=[str(land.path)], compile=compiled))
    layers = models.first.model.modules()
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    pointwise = [one for one in convolutions if one.kernel_size == (1, 1)]
    routed = not compiled and torch.backends.mkldnn.is_available()
    assert pointwise and not runs_on_onednn(configure(), torch.device("cuda"))
    assert all((one.dilation == (2, 2)) == routed for one in pointwise)
