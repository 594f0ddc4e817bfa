"""``stack --output scene.tif``: the copy of a scene, and what ends it before it is whole."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from batch_helpers import spoil
from helpers import signal_during
from rasterio._err import CPLE_AppDefinedError
from rasterio.transform import from_origin
from rasterio.windows import Window
from stack_helpers import refused, stack, stacked, write_band

from extraction.stack import windows_of


def noise(bands: int, height: int, width: int, dtype="uint16") -> np.ndarray:
    return (
        np.random.default_rng(3).integers(1, 99, (bands, height, width)).astype(dtype)
    )


@pytest.fixture
def words(tmp_path) -> list:
    """The command line for a copy of a small file."""
    file = write_band(tmp_path / "in" / "a.tif", noise(2, 64, 64), 10, nodata=0)
    return ["--input", file, "--output", tmp_path / "scene.tif"]


def test_a_scene_of_many_windows_is_copied_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("extraction.stack.COPIED_AT_ONCE", 1)
    pixels = noise(2, 520, 600)
    file = write_band(tmp_path / "in" / "a.tif", pixels, 10, nodata=0)
    mask = write_band(tmp_path / "in" / "m.tif", noise(1, 520, 600), 10)
    options = ["--mask", mask, "--mask_values", "7,8"]
    stacked("--input", file, *options, "--output", tmp_path / "scene.tif")
    with rasterio.open(tmp_path / "scene.tif") as scene, rasterio.open(mask) as given:
        assert len(windows_of(scene)) == 4
        assert (scene.read() == pixels).all() and scene.overviews(1)
        valid = ~np.isin(given.read(1), (7, 8))
        assert ((scene.dataset_mask() > 0) == valid).all()


def test_windows_hold_whole_blocks_and_all_bands(tmp_path):
    place = {"height": 1100, "width": 2100, "count": 3, "dtype": "uint16"}
    place["transform"] = from_origin(0, 9, 1, 1)
    tiles = {"tiled": True, "blockxsize": 1024, "blockysize": 1024}
    with rasterio.open(
        tmp_path / "a.tif", "w", driver="GTiff", **place | tiles
    ) as file:
        assert windows_of(file) == [
            Window(0, 0, 2100, 1024),
            Window(0, 1024, 2100, 76),
        ]


def test_four_bands_of_bytes_are_no_colours(tmp_path):
    pixels = noise(4, 40, 40, "uint8")
    file = write_band(tmp_path / "in" / "a.tif", pixels, 10, photometric="minisblack")
    stacked("--input", file, "--output", tmp_path / "scene.tif")
    with rasterio.open(tmp_path / "scene.tif") as scene:
        assert {colour.name for colour in scene.colorinterp} <= {"gray", "undefined"}
        assert (scene.read() == pixels).all()


def test_an_interrupted_copy_leaves_nothing(words, tmp_path, monkeypatch):
    signal_during(monkeypatch, "extraction.stack.copy_tags", 1, signal.SIGINT)
    assert stack(*words)[0] == 130
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_gdals_own_copy_ends_when_a_stop_is_requested(words, tmp_path, monkeypatch):
    copy, sources = rasterio.shutil.copy, []

    def slow(source: Path, *arguments, **options):
        sources.append(source.stat().st_size)
        os.kill(os.getpid(), signal.SIGTERM)
        while sources[-1]:  # as one that reads block after block
            time.sleep(0.01)
            sources.append(source.stat().st_size)
        copy(source, *arguments, **options)

    monkeypatch.setattr("rasterio.shutil.copy", slow)
    assert stack(*words)[0] == 143
    assert sources[0] > 0 == sources[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_copy_that_gdal_does_not_finish_is_an_error(words, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise CPLE_AppDefinedError(3, 1, "Write error")

    monkeypatch.setattr("rasterio.shutil.copy", fail)
    said = refused(*words)
    assert (
        f"error: {tmp_path / 'scene.tif'} was not written completely (Write er" in said
    )
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_block_that_cannot_be_read_is_an_error_that_names_the_scene(tmp_path):
    tiles = {"tiled": True, "blockxsize": 16, "blockysize": 16, "compress": "deflate"}
    file = write_band(tmp_path / "in" / "a.tif", noise(1, 64, 64), 10, **tiles)
    spoil(file, 2)
    target = tmp_path / "scene.tif"
    said = refused("--input", file, "--output", target)
    assert f"error: {target} cannot be written, since a block of --input" in said
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
