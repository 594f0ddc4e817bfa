"""Whole runs: the classes and confidences that are written are those of the model."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from prediction_helpers import (
    CRS,
    TRANSFORM,
    forward,
    make_pixel_model,
    noise,
    read_map,
    run,
    whole_scene,
    write_scene,
)
from rasterio.enums import ColorInterp

from common.colours import class_colours


def test_a_map_holds_the_class_of_every_pixel_on_the_pixel_grid_of_the_scene(
    land, scene, tmp_path
):
    output = tmp_path / "out" / "map.tif"
    assert run(land.path, scene, output, "--save_confidence") == 0
    with rasterio.open(scene) as file:
        image, valid = file.read(), file.read_masks(1) > 0
    probabilities = land.probabilities(image)
    with rasterio.open(output) as file:
        assert (file.crs, file.transform) == (CRS, TRANSFORM)
        assert (file.count, file.shape) == (1, (100, 90))
        assert (file.dtypes, file.nodata) == (("uint8",), 255)
        assert file.block_shapes == [(256, 256)] and file.profile["tiled"]
        assert file.compression.name == "deflate"
        classes = file.read(1)
    with rasterio.open(output.with_name("map_confidence.tif")) as file:
        assert (file.crs, file.transform) == (CRS, TRANSFORM)
        assert (file.count, file.shape) == (1, (100, 90))
        assert (file.dtypes, file.nodata) == (("float32",), -1)
        assert file.block_shapes == [(256, 256)] and file.profile["tiled"]
        assert file.compression.name == "deflate"
        confidence = file.read(1)
    np.testing.assert_array_equal(classes == 255, ~valid)
    np.testing.assert_array_equal(confidence == -1, ~valid)
    expected = probabilities.argmax(axis=0)
    two = np.sort(probabilities, axis=0)[-2:]
    clear = valid & (two[1] - two[0] > 1e-5)
    assert clear.sum() > 0.99 * valid.sum() and len(np.unique(classes)) == 5
    np.testing.assert_array_equal(classes[clear], expected[clear])
    written = np.take_along_axis(probabilities, np.minimum(classes, 3)[None], axis=0)
    np.testing.assert_allclose(confidence[valid], written[0][valid], atol=2e-6)


def test_a_map_says_what_its_classes_are(land, scene, tmp_path):
    output = tmp_path / "map.tif"
    assert run(land.path, scene, output) == 0
    names = ["water", "forêt", "bare soil", "town"]
    with rasterio.open(output) as file:
        assert json.loads(file.tags()["CLASS_NAMES"]) == names
        assert file.tags()["MODEL"] == "unet-dropout"
        assert file.tags()["NORMALIZATION"] == "dataset"
        assert file.colorinterp == (ColorInterp.palette,)
        colours = file.colormap(1)
    for number, colour in enumerate(class_colours(names)):
        assert colours[number] == (*colour, 255)
    beside = ElementTree.parse(f"{output}.aux.xml").getroot()
    assert [node.text for node in beside.iter("Category")] == names
    # GDAL itself finds them: a VRT of the map repeats them
    rasterio.shutil.copy(output, tmp_path / "map.vrt", driver="VRT")
    repeated = ElementTree.parse(tmp_path / "map.vrt").getroot()
    assert [node.text for node in repeated.iter("Category")] == names


def test_classes_without_names_are_numbered(models, scene, tmp_path, capsys):
    model = make_pixel_model(models / "plain.pth", np.eye(3), np.zeros(3))
    assert run(model.path, scene, tmp_path / "map.tif") == 0
    assert "class 2" in capsys.readouterr().out
    with rasterio.open(tmp_path / "map.tif") as file:
        names = json.loads(file.tags()["CLASS_NAMES"])
    assert names == ["class 0", "class 1", "class 2"]


def test_a_binary_map_calls_its_classes_background_and_foreground(
    water, scene, tmp_path
):
    output = tmp_path / "map.tif"
    assert run(water.path, scene, output, "--save_confidence") == 0
    with rasterio.open(scene) as file:
        image, valid = file.read(), file.read_masks(1) > 0
    foreground = water.probabilities(image)[0]
    with rasterio.open(output) as file:
        assert json.loads(file.tags()["CLASS_NAMES"]) == ["background", "foreground"]
        classes = file.read(1)
    clear = valid & (abs(foreground - 0.5) > 1e-5)
    np.testing.assert_array_equal(classes[clear], foreground[clear] >= 0.5)
    expected = np.where(classes == 1, foreground, 1 - foreground)
    confidence = read_map(tmp_path / "map_confidence.tif")
    np.testing.assert_allclose(confidence[valid], expected[valid], atol=2e-6)


def test_three_hundred_classes_make_a_sixteen_bit_map(models, tmp_path):
    rng = np.random.default_rng(6)
    weights = rng.normal(0, 9, (300, 3))
    model = make_pixel_model(models / "many.pth", weights, -weights.sum(axis=1) / 2)
    pixels = noise(50, 40)
    pixels[:, :10] = 0
    scene = write_scene(tmp_path / "scene.tif", pixels, nodata=0)
    assert run(model.path, scene, tmp_path / "map.tif") == 0
    with rasterio.open(tmp_path / "map.tif") as file:
        assert (file.dtypes, file.nodata) == (("uint16",), 65535)
        classes, colours = file.read(1), file.colormap(1)
    assert colours[299] == (
        *class_colours([f"class {k}" for k in range(300)])[299],
        255,
    )
    assert (classes[:10] == 65535).all() and classes[10:].max() > 255
    probabilities = model.probabilities(pixels)
    best = np.sort(probabilities, axis=0)
    clear = (best[-1] - best[-2] > 1e-5)[10:]
    expected = probabilities.argmax(axis=0)[10:]
    np.testing.assert_array_equal(classes[10:][clear], expected[clear])


def test_a_scene_in_one_window_equals_one_forward_pass(spatial, tmp_path):
    pixels = noise(64, 96)
    scene = write_scene(tmp_path / "scene.tif", pixels)
    output = tmp_path / "map.tif"
    options = ("--patch_size", "512", "--overlap", "128", "--save_confidence")
    assert run(spatial, scene, output, *options) == 0
    expected = forward(spatial, pixels / 10_000)
    assert len(np.unique(expected.argmax(axis=0))) == 3
    confidence = read_map(tmp_path / "map_confidence.tif")
    np.testing.assert_allclose(confidence, expected.max(axis=0), atol=1e-5)


def test_a_scene_smaller_than_a_window_is_seen_with_its_reflection(spatial, tmp_path):
    pixels = noise(40, 51)
    scene = write_scene(tmp_path / "scene.tif", pixels)
    output = tmp_path / "map.tif"
    assert run(spatial, scene, output, "--save_confidence") == 0
    confidence = read_map(tmp_path / "map_confidence.tif")
    reflected = np.pad(pixels, [(0, 0), (0, 24), (0, 13)], mode="reflect") / 10_000
    expected = forward(spatial, reflected)[:, :40, :51].max(axis=0)
    np.testing.assert_allclose(confidence, expected, atol=1e-5)
    zeros = np.pad(pixels, [(0, 0), (0, 24), (0, 13)]) / 10_000
    assert (
        abs(confidence - forward(spatial, zeros)[:, :40, :51].max(axis=0)).max() > 0.1
    )


@pytest.mark.parametrize(
    ("patch_size", "overlap"), [(64, 16), (64, 0), (64, 48), (50, 20)]
)
def test_a_map_equals_the_blend_of_all_windows_in_memory(
    spatial, tmp_path, patch_size, overlap
):
    pixels = noise(100, 90)
    scene = write_scene(tmp_path / "scene.tif", pixels)
    options = ("--patch_size", str(patch_size), "--overlap", str(overlap))
    output = tmp_path / "map.tif"
    assert run(spatial, scene, output, *options, "--save_confidence") == 0
    probabilities = whole_scene(
        (pixels / 10_000).astype(np.float32),
        lambda images: forward(spatial, images[0])[None],
        patch_size,
        overlap,
    )
    confidence = read_map(tmp_path / "map_confidence.tif")
    np.testing.assert_allclose(confidence, probabilities.max(axis=0), atol=1e-5)
    best = np.sort(probabilities, axis=0)
    clear = best[-1] - best[-2] > 1e-4
    expected = probabilities.argmax(axis=0)
    np.testing.assert_array_equal(read_map(output)[clear], expected[clear])


def test_the_network_for_neighbours_does_look_at_neighbours(spatial):
    image = (noise(64, 64) / 10_000).astype(np.float32)
    changed = image.copy()
    changed[:, 0, 0] = 1 - changed[:, 0, 0]
    shift = abs(forward(spatial, image) - forward(spatial, changed)).max(axis=0)
    assert shift[8:, 8:].max() > 1e-4
