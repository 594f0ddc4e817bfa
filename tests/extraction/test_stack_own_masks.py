"""``stack`` of files that have a mask or an alpha band, and of what files say of themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.enums import ColorInterp
from stack_helpers import CORNER, stacked, write_band, write_l2a

from common.rasters import Source

COLOURS = ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha
FACTS = {"sensor": "PlanetScope", "acquired": "2021-06-20"}


def write_masked(path: Path, kind: str, metres: float = 10, **more) -> np.ndarray:
    """A raster of three bands of 100 whose left half holds 0 and is masked; where it is valid."""
    count, side = 4 if "alpha" in kind else 3, round(240 / metres)
    valid = np.ones((side, side), bool)
    valid[:, : side // 2] = False
    pixels = np.repeat(np.uint8([[[100]]]) * valid, count, axis=0)
    if count == 4:
        pixels[3] = np.where(valid, 255, 0)
    if kind == "mask beside data as alpha":
        pixels[3] = np.arange(side * side).reshape(side, side) % 200
    write_band(path, pixels, metres, **more)
    inside = rasterio.Env(GDAL_TIFF_INTERNAL_MASK=kind != "file beside")
    with inside, rasterio.open(path, "r+") as file:
        file.update_tags(**FACTS)
        if count == 4:
            file.colorinterp = COLOURS
        if kind != "alpha":
            file.write_mask(valid)
    return valid


def validity(path: Path) -> np.ndarray:
    with rasterio.open(path) as file:
        return Source(file).read()[1]


@pytest.mark.parametrize("suffix", [".vrt", ".tif"])
@pytest.mark.parametrize(
    "kind", ["mask", "file beside", "alpha", "mask beside data as alpha"]
)
def test_what_a_file_masks_stays_invalid(tmp_path, kind, suffix):
    file, target = tmp_path / "a.tif", tmp_path / f"scene{suffix}"
    expected = write_masked(file, kind)
    assert (validity(file) == expected).all()
    said = stacked("--input", file, "--output", target)
    assert (validity(target) == expected).all()
    assert (
        "50.0 % masked, 0.0 % beyond its edge (valid) by a.tif; the file's own" in said
    )
    with rasterio.open(target) as scene:
        assert scene.count == (4 if "data" in kind else 3)
        assert scene.tags()["mask"] == "a.tif: the file's own mask"


def test_nodata_does_not_hide_an_alpha_band(tmp_path):
    file, target = tmp_path / "a.tif", tmp_path / "scene.vrt"
    expected = write_masked(file, "alpha", nodata=255)
    stacked("--input", file, "--output", target)
    assert (validity(target) == expected).all()


def test_a_stacked_scene_keeps_its_mask_and_facts_beside_a_dem(tmp_path):
    first, target = tmp_path / "scene.tif", tmp_path / "both.tif"
    stacked("--input", write_l2a(tmp_path), "--cloud_mask", "--output", first)
    dem = write_band(tmp_path / "dem.tif", np.full((24, 24), 7, np.uint16), 20)
    stacked("--input", first, dem, "--output", target)
    with rasterio.open(first) as before, rasterio.open(target) as after:
        assert (before.dataset_mask() == 0).any()
        assert (before.dataset_mask() == after.dataset_mask()).all()
        for key in ("sensor", "acquired"):
            assert after.tags()[key] == before.tags()[key]


def test_masks_of_files_count_beside_that_of_a_product(l2a, tmp_path):
    expected = np.ones((48, 48), bool)  # of which the file covers a quarter
    expected[:24, :24] = write_masked(tmp_path / "a.tif", "mask")
    cloudy, target = tmp_path / "cloudy.vrt", tmp_path / "scene.vrt"
    stacked("--input", l2a, "--cloud_mask", "--output", cloudy)
    words = ["--input", l2a, tmp_path / "a.tif", "--cloud_mask", "--output", target]
    stacked(*words)
    with rasterio.open(cloudy) as scene, rasterio.open(target) as both:
        clear = scene.dataset_mask() > 0
        assert ((both.dataset_mask() > 0) == (clear & expected)).all()
        tags = both.tags()
    assert tags["sensor"] == "Sentinel-2A,PlanetScope"
    assert tags["acquired"] == "2021-06-19,2021-06-20"
    # a file of which no band is taken says nothing
    stacked(*words, "--bands", "B02", "--overwrite")
    with rasterio.open(target) as scene:
        assert scene.tags()["sensor"] == "Sentinel-2A"
        assert ((scene.dataset_mask() > 0) == clear).all()


@pytest.mark.parametrize("kind", ["mask", "alpha"])
def test_masked_pixels_are_not_mixed_into_finer_ones(tmp_path, kind):
    coarse = write_masked(tmp_path / "coarse.tif", kind, 40)
    fine = write_band(tmp_path / "fine.tif", np.full((24, 24), 9, np.uint8), 10)
    target = tmp_path / "scene.tif"
    stacked("--input", fine, tmp_path / "coarse.tif", "--output", target)
    with rasterio.open(target) as scene:
        image, valid = Source(scene).read()
    assert (valid == np.kron(coarse, np.ones((4, 4)))).all()
    assert (image[1:, valid] == 100).all()


def test_scale_and_offset_of_files_are_passed_on(tmp_path):
    file, target = tmp_path / "a.tif", tmp_path / "scene.vrt"
    write_band(file, np.full((2, 4, 4), 3000, np.uint16), 10, corner=CORNER)
    with rasterio.open(file, "r+") as source:
        source.scales, source.offsets = (1e-4, 1.0), (-0.1, 0.0)
    stacked("--input", file, "--output", target)
    with rasterio.open(target) as scene:
        assert (scene.scales, scene.offsets) == ((1e-4, 1.0), (-0.1, 0.0))
    # other numbers, the same value
    stacked("--input", file, "--offset", -1000, "--overwrite", "--output", target)
    with rasterio.open(target) as scene:
        value = scene.read(1) * scene.scales[0] + scene.offsets[0]
    assert np.allclose(value, 0.2)
