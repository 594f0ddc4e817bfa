"""Reading a scene from top to bottom, by several threads."""

from __future__ import annotations

import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import rasterio
import rasterio.shutil
import torch
from helpers import patch_everywhere
from prediction_helpers import CPU, noise, write_scene

from common.rasters import Source, image_bands, open_raster
from model_training import Normalization, normalize
from prediction.blending import blended_rows
from prediction.reader import READ_AT_A_TIME, READ_ROWS, ParallelReader, read_row_blocks
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
        readers = ParallelReader(scene, bands, 1)
        with readers.opened:
            blocks = read_row_blocks(readers, CPU, whole)
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


@pytest.mark.parametrize(("count", "at_a_time"), [(1, 1), (3, 1), (3, 2)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_follow_each_other_and_begin_where_blocks_do(
    tmp_path, monkeypatch, layout, count, at_a_time
):
    patch_everywhere(monkeypatch, "prediction.reader.READ_COLUMNS", 64)
    monkeypatch.setitem(READ_AT_A_TIME, "cpu", at_a_time)
    pixels = noise(500, 70)
    pixels[:, 30:60, 20:] = 0
    path = write_scene(tmp_path / "a.tif", pixels, nodata=0, **LAYOUTS[layout])
    with open_raster(path) as scene:
        height = scene.block_shapes[0][0]
        readers = ParallelReader(scene, [3, 1], count)
        for part in (
            Extent(0, 500, 0, 70),
            Extent(77, 401, 13, 50),
            Extent(9, 10, 0, 1),
        ):
            blocks = list(read_row_blocks(readers, CPU, part))
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
        readers.opened.close()
        assert not scene.closed


@pytest.mark.parametrize("layout", LAYOUTS)
def test_threads_share_a_scene_and_none_reads_a_block_of_another_one(tmp_path, layout):
    path = write_scene(tmp_path / "a.tif", noise(500, 200), **LAYOUTS[layout])
    with open_raster(path) as scene:
        high, wide = scene.block_shapes[0]
        readers = ParallelReader(scene, [1, 2, 3], 4)
        datasets, windows = set(), []
        plain = Source.read
        together = threading.Barrier(2 if layout != "one block" else 1, timeout=30)

        def read(source, window):
            datasets.add(source.dataset)
            windows.append(window)
            together.wait()  # passes when as many read at a time
            return plain(source, window)

        with readers.opened, pytest.MonkeyPatch.context() as patch:
            patch.setattr(Source, "read", read)
            patch_everywhere(patch, "prediction.reader.READ_COLUMNS", 1)
            rows = 128 if layout != "one block" else 500
            readers.read(Extent(0, rows, 0, 200))
    assert len(datasets) > 1 or layout == "one block"
    blocks = [
        (row, column)
        for window in windows
        for row in range(window.row_off, window.row_off + window.height, high)
        for column in range(window.col_off, window.col_off + window.width, wide)
    ]
    assert all(row % high == 0 and column % wide == 0 for row, column in blocks)
    assert len(set(blocks)) == len(blocks) == -(-rows // high) * -(-200 // wide)


def test_a_format_with_threads_of_its_own_is_read_by_one(tmp_path):
    path = tmp_path / "a.jp2"
    plain = write_scene(tmp_path / "a.tif", noise(64, 64))
    rasterio.shutil.copy(plain, path, driver="JP2OpenJPEG")
    with open_raster(path) as scene:
        readers = ParallelReader(scene, [1], 4)
        with readers.opened:
            assert readers.count == 1
