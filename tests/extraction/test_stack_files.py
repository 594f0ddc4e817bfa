"""``stack`` of raster files, of files beside products, masks from files, and what follows."""

from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import rasterio
import tifffile
from helpers import interrupt, write_model
from rasterio.transform import Affine, from_origin
from stack_helpers import (
    CORNER,
    CRS,
    band_pixels,
    refused,
    stacked,
    undone,
    write_band,
    write_l2a,
)

import Patch_extraction
import Predict_large_image
from common.pictures import rgb_bands
from common.rasters import Source
from common.text import number_dates
from extraction.pairing import pair_scenes
from extraction.settings import BatchConfig


def ramp(side: int = 12, start: int = 1, dtype="uint16") -> np.ndarray:
    return np.arange(start, start + side * side).reshape(side, side).astype(dtype)


def opened(path: Path):
    return rasterio.open(path)


# --- names ----------------------------------------------------------------------------------


def test_bands_are_called_by_description_else_by_file(tmp_path):
    described = write_band(tmp_path / "a.tif", np.stack([ramp(), ramp(start=9)]), 10)
    with rasterio.open(described, "r+") as file:
        file.descriptions = ("red", "nir")
    files = [
        described,
        write_band(tmp_path / "T32TQR_20210619T101031_B8A_20m.jp2", ramp(), 10),
        write_band(tmp_path / "LC08_X_SR_B4.TIF", ramp(), 10),
        write_band(tmp_path / "vv.tif", ramp(), 10),
        write_band(tmp_path / "two.tif", np.stack([ramp(), ramp()]), 10),
    ]
    stacked("--input", *files, "--output", tmp_path / "scene.vrt")
    with opened(tmp_path / "scene.vrt") as scene:
        names = "red", "nir", "B8A", "SR_B4", "vv", "two_1", "two_2"
        assert scene.descriptions == names
        assert (scene.read(2) == ramp(start=9)).all()
    target = tmp_path / "few.vrt"
    stacked("--input", *files, "--bands", "vv,RED", "--output", target)
    with opened(target) as scene:
        assert scene.descriptions == ("vv", "red")


def test_two_bands_of_one_name_are_refused(tmp_path):
    files = [write_band(tmp_path / name / "B04.tif", ramp(), 10) for name in "ab"]
    said = refused("--input", *files, "--output", tmp_path / "scene.vrt")
    assert all(str(file) in said for file in files)


# --- pixel grid -----------------------------------------------------------------------------


def test_files_share_the_finest_pixels_over_their_common_ground(tmp_path):
    fine = write_band(tmp_path / "fine.tif", ramp(12), 10)
    moved = CORNER[0] + 40, CORNER[1] - 20
    coarse = write_band(tmp_path / "coarse.tif", ramp(6), 20, corner=moved)
    stacked("--input", coarse, fine, "--output", tmp_path / "scene.vrt")
    with opened(tmp_path / "scene.vrt") as scene:
        assert scene.shape == (10, 8)
        assert (scene.transform.c, scene.transform.f) == moved
        assert (scene.read(2) == ramp(12)[2:, 4:]).all()
        assert scene.nodata is None


def test_like_gives_the_grid_and_what_files_do_not_cover_is_nodata(tmp_path):
    grid = write_band(
        tmp_path / "grid.tif", ramp(8), 10, corner=(CORNER[0] - 20, CORNER[1])
    )
    file = write_band(tmp_path / "B04.tif", ramp(12), 10, nodata=0)
    stacked("--input", file, "--like", grid, "--output", tmp_path / "scene.vrt")
    with opened(tmp_path / "scene.vrt") as scene, opened(grid) as like:
        assert scene.transform == like.transform and scene.shape == like.shape
        assert (scene.read(1)[:, :2] == 0).all()
        assert (scene.read(1)[:, 2:] == ramp(12)[:8, :6]).all()


def test_a_file_without_nodata_gets_a_value_that_it_cannot_hold(tmp_path):
    grid = write_band(
        tmp_path / "grid.tif", ramp(8), 10, corner=(CORNER[0] - 20, CORNER[1])
    )
    file = write_band(tmp_path / "a.tif", ramp(12, 0, "uint8"), 10)
    stacked("--input", file, "--like", grid, "--output", tmp_path / "scene.vrt")
    with opened(tmp_path / "scene.vrt") as scene:
        assert scene.dtypes == ("int16",) and scene.nodata == -32768
        pixels = scene.read(1)
    assert (pixels[:, :2] == -32768).all()
    assert (pixels[:, 2:] == ramp(12, 0, "uint8")[:8, :6]).all()


def test_like_may_have_another_crs(tmp_path):
    file = write_band(
        tmp_path / "a.tif", np.full((40, 40), 77, np.uint16), 10, nodata=0
    )
    with rasterio.open(file) as source:
        bounds = rasterio.warp.transform_bounds(source.crs, "EPSG:4326", *source.bounds)
    middle = (bounds[0] + bounds[2]) / 2, (bounds[1] + bounds[3]) / 2
    more = {"crs": "EPSG:4326", "transform": from_origin(*middle, 1e-4, 1e-4)}
    grid = write_band(tmp_path / "grid.tif", ramp(6), 1, **more)
    stacked("--input", file, "--like", grid, "--output", tmp_path / "scene.vrt")
    with opened(tmp_path / "scene.vrt") as scene:
        assert scene.crs == "EPSG:4326" and scene.shape == (6, 6)
        assert (scene.read(1) == 77).all()


def test_what_a_rotated_file_does_not_cover_is_nodata(tmp_path):
    turned = Affine.translation(*CORNER) * Affine.rotation(45) * Affine.scale(10, -10)
    pixels = np.full((20, 20), 100, np.uint8)
    file = write_band(tmp_path / "a.tif", pixels, 10, transform=turned)
    half = 100 * 2**0.5  # a square on its corner, as wide as it is high
    target = tmp_path / "scene.vrt"
    for name, side, covered in (("all", 28, False), ("middle", 12, True)):
        corner = CORNER[0] + half - side * 5, CORNER[1] + side * 5
        like = write_band(tmp_path / f"{name}.tif", ramp(side), 10, corner=corner)
        words = ["--like", like, "--overwrite", "--output", target]
        stacked("--input", file, *words)
        with opened(target) as scene:
            assert scene.nodata == (None if covered else -32768)
            valid = Source(scene).read()[1]
            assert (scene.read(1)[valid] == 100).all()
            assert valid.all() if covered else 0.4 < valid.mean() < 0.6


def test_files_of_several_crs_need_like(tmp_path):
    one = write_band(tmp_path / "a.tif", ramp(), 10)
    other = write_band(tmp_path / "b.tif", ramp(), 10, crs="EPSG:32631")
    said = refused("--input", one, other, "--output", tmp_path / "scene.vrt")
    assert "EPSG:32631" in said and "--like" in said


def test_south_up_files_are_turned(tmp_path):
    turned = Affine(10, 0, CORNER[0], 0, 10, CORNER[1] - 120)
    file = write_band(tmp_path / "a.tif", ramp(), 10, transform=turned, nodata=0)
    stacked("--input", file, "--output", tmp_path / "scene.vrt")
    with opened(tmp_path / "scene.vrt") as scene:
        assert scene.transform == from_origin(*CORNER, 10, 10)
        assert (scene.read(1) == ramp()[::-1]).all()


def test_half_a_pixel_of_shift_is_resampled(tmp_path):
    near = write_band(tmp_path / "a.tif", ramp(), 10)
    shifted = write_band(
        tmp_path / "b.tif", ramp(), 10, corner=(CORNER[0] + 5, CORNER[1])
    )
    stacked("--input", near, shifted, "--output", tmp_path / "scene.vrt")
    with opened(tmp_path / "scene.vrt") as scene:
        assert scene.shape == (12, 11)
        between = (ramp()[:, :-1] + ramp()[:, 1:]) / 2
        assert np.abs(scene.read(2)[:, :-1] - between[:, :10]).max() <= 0.51


@pytest.mark.parametrize(
    "change, words",
    [
        ({"corner": (CORNER[0] + 5000, CORNER[1])}, "no ground in common"),
        ({"crs": None}, "no CRS"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, change, words):
    one = write_band(tmp_path / "a.tif", ramp(), 10)
    other = write_band(tmp_path / "b.tif", ramp(), 10, **change)
    assert words in refused("--input", one, other, "--output", tmp_path / "scene.vrt")


def test_a_file_elsewhere_than_like_is_refused(tmp_path):
    file = write_band(tmp_path / "a.tif", ramp(), 10)
    grid = write_band(
        tmp_path / "g.tif", ramp(), 10, corner=(CORNER[0] + 5000, CORNER[1])
    )
    said = refused("--input", file, "--like", grid, "--output", tmp_path / "scene.vrt")
    assert "a.tif lies elsewhere" in said


@pytest.mark.parametrize("path", ["/vsizip/{}", "/vsizip/../d/{}", "/vsizip/{{{}}}"])
def test_a_relative_path_into_an_archive_is_stored_in_full(tmp_path, monkeypatch, path):
    folder = tmp_path / "d"
    file = write_band(folder / "a.tif", ramp(), 10)
    with zipfile.ZipFile(folder / "z.zip", "w") as archive:
        archive.write(file, "b.tif")
    monkeypatch.chdir(folder)
    said = stacked("--input", f"{path.format('z.zip')}/b.tif", "--output", "scene.vrt")
    assert "refers to an archive by its full path" in said
    monkeypatch.chdir(tmp_path)
    with opened(folder / "scene.vrt") as scene:
        assert scene.descriptions == ("b",)
        assert (scene.read(1) == ramp()).all()


# --- values ---------------------------------------------------------------------------------


def test_files_without_metadata_that_begin_near_1000_are_doubted(tmp_path):
    for name, low in (("B04", 1050), ("B11", 1020)):
        write_band(
            tmp_path / f"T32TQR_20210619T101031_{name}_20m.jp2", ramp(24, low), 20
        )
    files = sorted(tmp_path.glob("*.jp2"))
    target = tmp_path / "scene.vrt"
    said = stacked("--input", *files, "--output", target)
    assert "(B11) begins at 10" in said and "--offset -1000" in said
    with opened(target) as scene:
        assert scene.nodatavals == (0, 0) and scene.read(1)[0, 0] == 1050
    said = stacked(
        "--input", *files, "--offset", "-1000", "--overwrite", "--output", target
    )
    assert "warning" not in said
    with opened(target) as scene:
        assert scene.read(1)[0, 0] == 50


def test_an_offset_of_broken_numbers_is_refused(tmp_path):
    file = write_band(tmp_path / "a.tif", ramp(dtype="float32"), 10)
    said = refused("--input", file, "--offset", "-1000", "--output", tmp_path / "s.vrt")
    assert "float32" in said and "--offset" in said


@pytest.mark.parametrize(
    "dtype, offset", [("uint8", -1000), ("uint8", 255), ("int16", -32767)]
)
@pytest.mark.parametrize("suffix", [".vrt", ".tif"])
def test_an_offset_beyond_the_numbers_of_a_file_is_refused(
    tmp_path, dtype, offset, suffix
):
    file = write_band(tmp_path / "a.tif", ramp(11, dtype=dtype), 10)
    target = tmp_path / f"s{suffix}"
    said = refused("--input", file, "--offset", offset, "--output", target)
    assert f"An offset of {offset} leaves no pixel of a of {file}" in said
    assert [path.name for path in tmp_path.iterdir()] == ["a.tif"]


def test_the_largest_offset_that_a_file_takes(tmp_path):
    file = write_band(tmp_path / "a.tif", ramp(11, dtype="uint8"), 10)
    target = tmp_path / "s.vrt"
    for offset, expected in ((-120, [1, 1]), (-254, [1, 1]), (254, [255, 255])):
        words = ["--offset", offset, "--overwrite", "--output", target]
        stacked("--input", file, *words)
        with opened(target) as scene:
            assert scene.read(1)[0, :2].tolist() == expected
            assert scene.read(1)[-1, -1] == min(255, max(1, 121 + offset))


@pytest.mark.parametrize("suffix", [".vrt", ".tif"])
@pytest.mark.parametrize("nodata", [None, 0, -9999, -32768, 32767])
@pytest.mark.parametrize("offset", [1000, -1000])
def test_an_offset_moves_all_signed_numbers(tmp_path, suffix, nodata, offset):
    numbers = np.arange(-32768, 32768).reshape(256, 256).astype("int16")
    file = write_band(tmp_path / "a.tif", numbers, 10, nodata=nodata)
    target = tmp_path / f"scene{suffix}"
    said = stacked("--input", file, "--offset", offset, "--output", target)
    assert f"values: {offset:+d} added to a; int16" in said
    with opened(target) as scene:
        assert scene.nodata == nodata
        found = scene.read(1).astype(int)
    missing = numbers == nodata
    assert ((found == nodata) == missing).all()
    expected = np.clip(numbers.astype(int) + offset, -32768, 32767)
    beside = (expected == nodata) & ~missing
    assert (found == expected)[~missing & ~beside].all()
    assert (np.abs(found - expected)[beside] == 1).all()


def test_an_offset_keeps_signed_numbers_beside_a_product(l2a, tmp_path):
    heights = np.where(np.arange(48) % 2, -300, 300) * np.ones((48, 1))
    dem = write_band(tmp_path / "dem.tif", heights.astype("int16"), 10)
    alone, target = tmp_path / "alone.vrt", tmp_path / "scene.vrt"
    stacked("--input", dem, "--offset", "1000", "--output", alone)
    stacked("--input", l2a, alone, "--bands", "B02,dem", "--output", target)
    with opened(target) as scene:
        assert (scene.read(2) == heights + 1000).all()


def test_nodata_that_no_pixel_of_its_type_holds_is_none(tmp_path):
    grid = write_band(tmp_path / "grid.tif", ramp(6), 20)
    file = write_band(tmp_path / "a.tif", ramp(11, 0, "uint8"), 10, nodata=200)
    with tifffile.TiffFile(file, mode="r+") as tiff:
        tiff.pages.first.tags["GDAL_NODATA"].overwrite("0.5")
    for more in ((), ("--like", grid)):
        target = tmp_path / f"scene{len(more)}.vrt"
        stacked("--input", file, "--output", target, *more)
        with opened(target) as scene:
            assert scene.nodata in (None, -32768)
    with opened(tmp_path / "scene0.vrt") as scene:
        assert (scene.read(1) == ramp(11, 0, "uint8")).all()


def test_a_vrt_that_gdal_does_not_read_is_not_published(tmp_path, monkeypatch):
    near = write_band(tmp_path / "a.tif", ramp(), 10, nodata=0)
    coarse = write_band(tmp_path / "b.tif", ramp(6), 20, nodata=0)
    target = tmp_path / "scene.vrt"
    words = ["--input", near, coarse, "--offset", -1, "--output", target]
    stacked(*words)
    former = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    monkeypatch.setattr(
        "extraction.stack_vrt.lookup_table", lambda *_: "1:1,9:9,3:3,255:1"
    )
    said = refused(*words, "--overwrite")
    assert f"error: {target} could not be read, so it is not kept" in said
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == former


@pytest.mark.parametrize("suffix", [".vrt", ".tif"])
@pytest.mark.parametrize(
    "dtype, nodata", [("float32", -9999.0), ("int16", -32768), ("int16", None)]
)
def test_a_dem_stands_beside_a_product(l2a, tmp_path, suffix, dtype, nodata):
    heights = ramp(30, -200, dtype)
    if nodata is not None:
        heights[3, 4] = nodata
    dem = write_band(tmp_path / "dem.tif", heights, 30, corner=(CORNER[0] - 60, CORNER[1] + 60),
                     nodata=nodata)  # fmt: skip
    target = tmp_path / f"scene{suffix}"
    stacked(
        "--input",
        l2a,
        dem,
        "--bands",
        "B02,dem",
        "--resolution",
        "30",
        "--output",
        target,
    )
    with opened(target) as scene:
        assert scene.descriptions == ("B02", "dem") and scene.shape == (16, 16)
        assert len(set(scene.dtypes)) == 1
        expected = heights[2:18, 2:18]
        image, valid = Source(scene).read()
        low = scene.read(1, masked=True)
        missing = np.zeros((16, 16), bool) if nodata is None else expected == nodata
        assert (scene.read(2, masked=True).mask == missing).all()
        assert (image[1][valid] == expected[valid]).all()
        assert (
            expected[valid] <= 0
        ).any()  # a height of 0 is valid beside B02, whose 0 is not
        assert low.min() >= 1 and low.max() < 5000
    with opened(tmp_path / "dem.tif"):
        stacked("--input", l2a, dem, "--output", tmp_path / "all.vrt")
    with opened(tmp_path / "all.vrt") as scene:
        assert scene.descriptions[-1] == "dem" and scene.shape == (48, 48)


def test_a_dem_in_degrees_stands_beside_a_product(l2a, tmp_path):
    more = {"crs": "EPSG:4326", "transform": from_origin(11.45, 44.25, 0.001, 0.001)}
    heights = np.full((200, 200), 7, np.int16)
    dem = write_band(tmp_path / "dem.tif", heights, 1, nodata=-32768, **more)
    stacked(
        "--input", l2a, dem, "--bands", "B02,dem", "--output", tmp_path / "scene.vrt"
    )
    with opened(tmp_path / "scene.vrt") as scene:
        assert scene.crs == CRS and (scene.read(2) == 7).all()


# --- masks ----------------------------------------------------------------------------------


def test_a_mask_file_becomes_the_mask(l2a, tmp_path):
    pixels = np.zeros((6, 6), np.uint8)
    pixels[1, 2], pixels[3, 3] = 1, 9
    mask = write_band(tmp_path / "cloud.tif", pixels, 40, nodata=9)
    options = "--mask", mask, "--mask_values", "1", "--output", tmp_path / "scene.vrt"
    said = stacked("--input", l2a, *options)
    expected = np.zeros((48, 48), bool)
    expected[4:8, 8:12] = expected[12:16, 12:16] = True
    with opened(tmp_path / "scene.vrt") as scene:
        assert ((scene.dataset_mask() == 0) == expected).all()
    assert "1.4 % masked, 75.0 % beyond its edge (valid)" in said


def test_a_mask_of_another_place_is_refused(l2a, tmp_path):
    corner = CORNER[0], CORNER[1] + 5000
    mask = write_band(tmp_path / "c.tif", np.zeros((6, 6), np.uint8), 10, corner=corner)
    target = tmp_path / "scene.vrt"
    said = refused(
        "--input", l2a, "--mask", mask, "--mask_values", "1", "--output", target
    )
    assert f"{mask} has no ground in common with {target}" in said


@pytest.mark.parametrize(
    "options, words",
    [
        (
            ["--mask_buffer", "10"],
            "--mask_buffer 10.0: expected --cloud_mask or --mask",
        ),
        (["--mask", "m.tif"], "expected one of --mask_values"),
        (["--mask_values", "1"], "expected --mask with it"),
        (["--cloud_mask", "--mask", "m.tif", "--mask_values", "1"], "one of the two"),
        (["--like", "a.tif", "--resolution", "10"], "one of the two"),
        (["--resolution", "0"], "more than 0"),
    ],
)
def test_options_that_contradict_are_refused(options, words):
    assert words in refused("--input", "a.tif", "--output", "s.vrt", *options, status=2)


def test_files_have_no_cloud_mask_of_their_own(tmp_path):
    file = write_band(tmp_path / "a.tif", ramp(), 10)
    said = refused("--input", file, "--cloud_mask", "--output", tmp_path / "s.vrt")
    assert "give one with --mask" in said


@pytest.mark.parametrize("output", ["out", "scene.png"])
def test_files_become_one_scene_with_a_name(tmp_path, output):
    file = write_band(tmp_path / "a.tif", ramp(), 10)
    said = refused("--input", file, "--output", tmp_path / output, status=2)
    assert "ends in .vrt or .tif" in said


def test_a_scene_does_not_replace_its_input(tmp_path):
    file = write_band(tmp_path / "a.tif", ramp(), 10)
    said = refused("--input", file, "--output", file, "--overwrite", status=2)
    assert "not an input" in said


def test_a_resolution_in_metres_needs_a_crs_in_metres(tmp_path):
    more = {"crs": "EPSG:4326", "transform": from_origin(11, 44, 1e-4, 1e-4)}
    file = write_band(tmp_path / "a.tif", ramp(), 1, **more)
    said = refused(
        "--input", file, "--resolution", "10", "--output", tmp_path / "s.vrt", status=2
    )
    assert "--like" in said


# --- what follows ---------------------------------------------------------------------------


def run(*words) -> None:
    assert Patch_extraction.main([str(word) for word in words]) == 0


def test_clouds_are_invalid_in_patches(l2a, tmp_path, capsys):
    scene, label = tmp_path / "scene.vrt", tmp_path / "label.tif"
    stacked("--input", l2a, "--cloud_mask", "--output", scene)
    write_band(label, np.ones((48, 48), np.uint8), 10)
    folder = tmp_path / "data"
    run("extract", "--image", scene, "--label", label, "--output", folder, "--patch_size", 16,
        "--min_valid", 0.1)  # fmt: skip
    with opened(scene) as file:
        _, valid = Source(file).read()
        names, origin = file.descriptions, file.transform
    patches = sorted((folder / "Patch").rglob("labels/*.tif"))
    assert len(patches) == 9
    for path in patches:
        with opened(path) as patch:
            column, row = (round(v) for v in ~origin * (patch.transform * (0, 0)))
            here = valid[row : row + 16, column : column + 16]
            assert ((patch.read(1) == 1) == here).all()
        with opened(path.parents[1] / "images" / path.name) as image:
            assert image.descriptions == names
            assert (Source(image).read()[1] == here).all()


def test_a_product_that_was_downloaded_again_refuses_the_resume(
    l2a, tmp_path, capsys, monkeypatch
):
    archive = Path(shutil.make_archive(str(l2a), "zip", l2a.parent, l2a.name))
    scene, label = tmp_path / "scene.vrt", tmp_path / "label.tif"
    stacked("--input", archive, "--bands", "B02,B05", "--output", scene)
    write_band(label, np.ones((48, 48), np.uint8), 10)
    words = ["extract", "--image", scene, "--label", label, "--output", tmp_path / "d",
             "--patch_size", "16"]  # fmt: skip
    words = [str(word) for word in words]
    with monkeypatch.context() as patching:
        interrupt(patching, "extraction.cutting.read_cell", 5)
        assert Patch_extraction.main(words) == 130
    os.utime(archive, (1, 1))
    assert Patch_extraction.main([*words, "--resume"]) == 1
    assert f"another file {archive} (" in capsys.readouterr().err


def test_clouds_are_nodata_in_maps(l2a, tmp_path, capsys):
    scene, model = tmp_path / "scene.vrt", tmp_path / "model.pth"
    stacked("--input", l2a, "--cloud_mask", "--output", scene)
    write_model(model, bands=10)
    words = ["--model", model, "--input", scene, "--output", tmp_path / "map.tif",
             "--patch_size", 32, "--overlap", 8, "--device", "cpu", "--precision", "fp32"]  # fmt: skip
    assert Predict_large_image.main([str(word) for word in words]) == 0
    with opened(scene) as file, opened(tmp_path / "map.tif") as classes:
        _, valid = Source(file).read()
        assert classes.transform == file.transform and classes.shape == file.shape
        assert ((classes.read(1) == classes.nodata) == ~valid).all()
        assert 0 < valid.mean() < 1


def test_batch_takes_stacked_scenes_but_no_helper_files(l2a, tmp_path):
    other = write_l2a(tmp_path, l2a.name.replace("20210619T10", "20210704T10"), seed=5)
    folder = tmp_path / "scenes"
    stacked("--input", l2a, other, "--cloud_mask", "--output", folder)
    for date in ("20210619", "20210704"):
        label = folder / f"Label_T32TQR_{date}.tif"
        write_band(label, np.ones((48, 48), np.uint8), 10)
    scenes = pair_scenes(BatchConfig(data_dir=str(folder), output="o", recursive=True))
    assert [Path(scene.image).name for scene in scenes] == [
        "Image_T32TQR_20210619.vrt", "Image_T32TQR_20210704.vrt"
    ]  # fmt: skip
    config = BatchConfig(
        data_dir=str(folder), output="o", recursive=True, image_pattern="<id>.vrt",
        label_pattern="Label_<id>.tif", skip_unmatched=True,
    )  # fmt: skip
    with pytest.raises(Exception, match="No scene in"):
        pair_scenes(config)
    run("batch", "--data_dir", folder, "--output", tmp_path / "data", "--patch_size", 16,
        "--min_valid", 0.1)  # fmt: skip


def test_names_with_dates_are_understood():
    assert rgb_bands(
        ["B08_20210619", "B04_20210619", "B03_20210619", "B02_20210619"]
    ) == [2, 3, 4]
    assert rgb_bands(["SR_B5", "SR_B4", "SR_B3", "SR_B2"]) == [2, 3, 4]
    first = number_dates(["B04_20210619", "B04_20210704", "dem", None])
    assert first == ["B04_1", "B04_2", "dem", None]
    assert number_dates(["B04_20220601", "B04_20220711", "dem", None]) == first


def test_an_interrupted_run_leaves_nothing(l2a, tmp_path, monkeypatch):
    def stop(*arguments, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr("extraction.stack.write_vrt", stop)
    words = ["--input", l2a, "--cloud_mask", "--output", tmp_path / "scene.vrt"]
    assert Patch_extraction.main(["stack", *map(str, words)]) == 130
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    stacked(*words)
    with opened(tmp_path / "scene.vrt") as scene:
        assert (scene.read(1) == undone(band_pixels("B02", 10))).all()
