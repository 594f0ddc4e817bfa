"""Reading a scene from top to bottom, by several threads."""

from __future__ import annotations

import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from prediction_helpers import CPU, noise, write_scene
from rasterio.windows import Window

from common.rasters import Source, image_bands, open_raster
from model_training import Normalization, normalize
from prediction.blending import blended_rows
from prediction.reader import READ_ROWS, SceneReader, read_row_blocks
from prediction.tiling import Extent, WindowLayout


def window_of(path: Path, height: int, width: int):
    """What the predictor gets of the one window of a small scene: image and valid or None."""
    got = []

    def predict(images, valid):
        got.append((images[0].numpy(), None if valid is None else valid[0].numpy()))
        return images

    with open_raster(path) as scene:
        whole = Extent(0, scene.height, 0, scene.width)
        bands = image_bands(scene)
        layouts = tuple(
            WindowLayout(length, size, [0], np.ones((1, size), np.float32), [0])
            for length, size in zip(scene.shape, (height, width))
        )
        reader = SceneReader(Source(scene, bands), 1)
        with reader.opened:
            blocks = read_row_blocks(reader, CPU, whole)
            list(blended_rows(blocks, predict, layouts, whole, len(bands)))
    return got[0]


def test_a_small_scene_is_reflected_beyond_its_edges(tmp_path):
    pixels = noise(20, 27)
    image, valid = window_of(write_scene(tmp_path / "small.tif", pixels), 32, 32)
    assert image.dtype == np.float32 and valid is None
    rows = [*range(20), *range(18, 6, -1)]  # 19 is the edge: 18, 17, ... follow it
    columns = [*range(27), *range(25, 20, -1)]
    np.testing.assert_array_equal(image, pixels[:, rows][:, :, columns])


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (3, 2)])
def test_a_scene_of_a_few_pixels_fills_a_window(tmp_path, shape):
    pixels = noise(*shape)
    image, valid = window_of(write_scene(tmp_path / "tiny.tif", pixels), 32, 64)
    assert image.shape == (3, 32, 64) and valid is None
    assert set(np.unique(image)) <= set(np.unique(pixels))


def test_invalid_pixels_are_reflected_as_invalid_and_become_zero(tmp_path):
    pixels = noise(20, 32)
    pixels[:, 15] = 0
    path = write_scene(tmp_path / "small.tif", pixels, nodata=0)
    image, valid = window_of(path, 32, 32)
    assert [row for row in range(32) if not valid[row].any()] == [15, 23]
    rule = Normalization("dataset", (-5000,) * 3, (10_000,) * 3)
    scaled = normalize(image, valid, rule)
    assert scaled.dtype == torch.float32
    assert not scaled[:, ~valid].any() and scaled[:, valid].all()


LAYOUTS = {
    "tiled": {"tiled": True, "blockxsize": 64, "blockysize": 64},
    "striped": {"blockysize": 3},
    "one row a block": {"blockysize": 1},
    "one block": {"blockysize": 500},
}


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_follow_each_other_and_begin_where_blocks_do(tmp_path, layout, count):
    pixels = noise(500, 70)
    pixels[:, 30:60, 20:] = 0
    path = write_scene(tmp_path / "a.tif", pixels, nodata=0, **LAYOUTS[layout])
    with open_raster(path) as scene:
        height = scene.block_shapes[0][0]
        reader = SceneReader(Source(scene, [3, 1]), count)
        for part in (
            Extent(0, 500, 0, 70),
            Extent(77, 401, 13, 50),
            Extent(9, 10, 0, 1),
        ):
            blocks = list(read_row_blocks(reader, CPU, part))
            assert blocks[0].top == part.top and blocks[-1].bottom == part.bottom
            for one, next_one in pairwise(blocks):
                assert one.bottom == next_one.top and one.bottom % height == 0
            assert all(
                block.bottom - block.top <= max(READ_ROWS, height) for block in blocks
            )
            image = np.concatenate([block.image.numpy() for block in blocks], axis=1)
            valid = np.concatenate([block.valid for block in blocks])
            inside = slice(part.top, part.bottom), slice(part.left, part.right)
            np.testing.assert_array_equal(image, pixels[[2, 0]][(slice(None), *inside)])
            np.testing.assert_array_equal(valid, pixels[0][inside] > 0)
        reader.opened.close()
        assert not scene.closed


@pytest.mark.parametrize("interleave", ["pixel", "band"])
def test_pixels_and_transparency_are_decoded_once(tmp_path, interleave, monkeypatch):
    pixels = noise(64, 64, 5).astype(np.uint8)
    pixels[4] = 255
    pixels[4, :9] = 0
    options = {"photometric": "RGB", "alpha": "YES", "interleave": interleave}
    path = write_scene(tmp_path / "a.tif", pixels, **options)
    with open_raster(path) as scene:
        reads, plain = [], type(scene).read
        source = Source(scene, [2, 1], alphas=[5])
        out = np.empty((3, 64, 64), np.uint8)

        class Counted:
            def __getattr__(self, name):
                return getattr(scene, name)

            def read(self, *args, **options):
                reads.append(args)
                return plain(scene, *args, **options)

        source.dataset = Counted()
        image, valid = source.read(Window(0, 0, 64, 64), out=out)
    assert len(reads) == 1 and np.shares_memory(image, out)
    np.testing.assert_array_equal(image, pixels[[1, 0]])
    np.testing.assert_array_equal(valid, pixels[4] > 0)


def test_several_datasets_are_read_at_a_time(tmp_path, monkeypatch):
    path = write_scene(tmp_path / "a.tif", noise(500, 200), **LAYOUTS["tiled"])
    together, datasets, plain = threading.Barrier(2, timeout=30), set(), Source.read

    def read(source, window, out):
        datasets.add(source.dataset)
        together.wait()  # passes when two read
        return plain(source, window, out)

    with open_raster(path) as scene:
        reader = SceneReader(Source(scene, [1, 2, 3]), 2)
        with reader.opened:
            monkeypatch.setattr(Source, "read", read)
            part = Extent(0, 256, 0, 200)
            list(read_row_blocks(reader, CPU, part))
    assert len(datasets) == 2
