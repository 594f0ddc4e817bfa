"""``--mask`` of the prediction."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio
from helpers import interrupt
from prediction_helpers import TRANSFORM, check_map, noise, run, write_scene
from rasterio.transform import Affine
from scipy.ndimage import distance_transform_edt

HEIGHT, WIDTH = 60, 48


def write_clouds(path: Path, *blocks: tuple[slice, slice]) -> Path:
    """A mask of 40 m pixels over scenes of 10 m, 9 in some blocks of it."""
    values = np.full((1, HEIGHT // 4, WIDTH // 4), 4, np.uint8)
    for block in blocks:
        values[0, *block] = 9
    return write_scene(path, values, transform=TRANSFORM * Affine.scale(4))


def cloudy(*blocks: tuple[slice, slice]) -> np.ndarray:
    """Where such blocks lie in a scene."""
    found = np.zeros((HEIGHT, WIDTH), bool)
    for rows, columns in blocks:
        found[4 * rows.start : 4 * rows.stop, 4 * columns.start : 4 * columns.stop] = (
            True
        )
    return found


ONE, OTHER = (slice(1, 3), slice(2, 5)), (slice(8, 12), slice(0, 6))
BY_VALUES = ("--mask_values", "9")


@pytest.fixture
def pixels() -> np.ndarray:
    return noise(HEIGHT, WIDTH)


@pytest.mark.parametrize(
    "rule", [BY_VALUES, ("--keep_values", "4"), ("--mask_bits", "0")]
)
def test_what_the_mask_says_is_not_mapped(land, tmp_path, capsys, pixels, rule):
    scene = write_scene(tmp_path / "scene.tif", pixels)
    mask = write_clouds(tmp_path / "clouds.tif", ONE, OTHER)
    more = ("--mask", str(mask), *rule, "--quicklook", "--save_confidence")
    assert run(land.path, scene, tmp_path / "map.tif", *more) == 0
    check_map(land, tmp_path / "map.tif", pixels, ~cloudy(ONE, OTHER))
    share = 100 * cloudy(ONE, OTHER).mean()
    line = f"about {share:.1f} % masked, 0.0 % beyond its edge (valid) by {mask}"
    assert capsys.readouterr().err.count(line) == 1


def test_clouds_of_the_mask_grow_by_metres(land, tmp_path, pixels):
    scene = write_scene(tmp_path / "scene.tif", pixels)
    mask = write_clouds(tmp_path / "clouds.tif", ONE)
    more = "--mask", str(mask), *BY_VALUES, "--mask_buffer", "30", "--patch_size", "32"
    assert run(land.path, scene, tmp_path / "map.tif", *more) == 0
    clouds = cloudy(ONE)
    away = distance_transform_edt(~clouds)
    assert (away <= 3).sum() > clouds.sum()
    check_map(land, tmp_path / "map.tif", pixels, away > 3)


def test_scenes_have_a_mask_each_or_one(land, tmp_path, pixels, capsys):
    for name, block in (("a", ONE), ("b", OTHER)):
        write_scene(tmp_path / "in" / f"{name}.tif", pixels)
        write_clouds(tmp_path / "masks" / f"{name}_clouds.tif", block)
    pattern = tmp_path / "masks" / "<id>_clouds.tif"
    given = (tmp_path / "in", tmp_path / "out", "--mask", str(pattern), *BY_VALUES)
    assert run(land.path, *given) == 0
    for name, block in (("a", ONE), ("b", OTHER)):
        output = tmp_path / "out" / f"{name}_prediction.tif"
        check_map(land, output, pixels, ~cloudy(block))
    (tmp_path / "masks" / "b_clouds.tif").unlink()
    capsys.readouterr()
    assert run(land.path, *given, "--overwrite") == 1
    assert "b_clouds.tif" in capsys.readouterr().err


def test_dates_are_combined_where_their_masks_let_them(land, tmp_path, pixels):
    for name, block in (("a", ONE), ("b", OTHER)):
        write_scene(tmp_path / f"{name}.tif", pixels)
        write_clouds(tmp_path / f"{name}_clouds.tif", block)
    scenes = [tmp_path / "a.tif", tmp_path / "b.tif"]
    more = ("--mask", str(tmp_path / "<id>_clouds.tif"), *BY_VALUES)
    assert run(land.path, scenes, tmp_path / "map.tif", "--combine", "mean", *more) == 0
    with rasterio.open(tmp_path / "map_dates.tif") as file:
        counts = file.read(1)
    assert np.array_equal(counts, 2 - cloudy(ONE).astype(int) - cloudy(OTHER))


def test_another_mask_is_another_map(land, tmp_path, pixels, monkeypatch, capsys):
    scene = write_scene(tmp_path / "scene.tif", pixels)
    mask, output = write_clouds(tmp_path / "c.tif", ONE), tmp_path / "map.tif"
    rows = ("--patch_size", "32", "--overlap", "8")
    options = ("--mask", str(mask), *BY_VALUES, *rows)
    with monkeypatch.context() as patch:
        interrupt(patch, "prediction.layers.compute_layers", 2)
        assert run(land.path, scene, output, *options) == 130
    write_clouds(mask, OTHER)
    assert run(land.path, scene, output, *options, "--resume") == 1
    assert "another masks" in capsys.readouterr().err
    other = ("--mask", str(mask), "--mask_values", "4", *rows)
    assert run(land.path, scene, output, *other, "--resume") == 1
    assert "--mask_values" in capsys.readouterr().err


def test_a_mask_needs_a_place(land, tmp_path, pixels, capsys):
    scene = write_scene(tmp_path / "scene.tif", pixels, crs=None)
    mask = write_clouds(tmp_path / "clouds.tif", ONE)
    assert (
        run(land.path, scene, tmp_path / "map.tif", "--mask", str(mask), *BY_VALUES)
        == 1
    )
    assert "has no CRS; assign one" in capsys.readouterr().err


def test_scenes_that_one_mask_misses_are_named(land, tmp_path, pixels, capsys):
    for number in range(3):
        place = TRANSFORM * Affine.translation(0, HEIGHT * number)
        write_scene(tmp_path / "in" / f"{number}.tif", pixels, transform=place)
    mask = write_clouds(tmp_path / "clouds.tif", ONE)
    options = ("--mask", str(mask), *BY_VALUES)
    assert run(land.path, tmp_path / "in", tmp_path / "out", *options) == 0
    error = capsys.readouterr().err
    assert f"{mask} has no ground in common with 2 of 3 scenes" in error
    assert error.count("has no ground") == 1 and "1.tif, " in error
    check_map(land, tmp_path / "out" / "0_prediction.tif", pixels, ~cloudy(ONE))
    check_map(land, tmp_path / "out" / "2_prediction.tif", pixels, ~cloudy())


@pytest.mark.parametrize("name", ["clouds.tif", "<id>.tif"])
def test_a_mask_of_another_place_is_refused(land, tmp_path, pixels, capsys, name):
    scene = write_scene(tmp_path / "clouds.tif", pixels)
    (tmp_path / "masks").mkdir()
    place = TRANSFORM * Affine.translation(0, HEIGHT)
    mask = write_scene(tmp_path / "masks" / "clouds.tif", pixels[:1], transform=place)
    options = ("--mask", str(tmp_path / "masks" / name), *BY_VALUES)
    for more in ((), ("--check",)):
        assert run(land.path, scene, tmp_path / "map.tif", *options, *more) == 1
        line = f"error: The mask {mask} has no ground in common with {scene}; give"
        assert line in capsys.readouterr().err
    assert not (tmp_path / "map.tif").exists()
