"""``stack`` of Sentinel-2 products: bands, offsets, resolutions, clouds."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import rasterio
from stack_helpers import (
    L1C_NAME,
    band_pixels,
    refused,
    scene_classes,
    stacked,
    undone,
    write_band,
    write_l1c,
    write_l2a,
    write_old_l1c,
)

from extraction.stack_sentinel2 import DEFAULT, RESOLUTIONS
from extraction.stack_vrt import lookup_table


@pytest.fixture(scope="module")
def l1c(tmp_path_factory) -> Path:
    return write_l1c(tmp_path_factory.mktemp("l1c"))


def upsampled(pixels: np.ndarray, factor: int) -> tuple[np.ndarray, np.ndarray]:
    """Bilinear values from the valid pixels alone, float, and where the nearest one is valid."""
    side = len(pixels)
    place = (np.arange(side * factor) + 0.5) / factor - 0.5
    before = np.floor(place).astype(int)
    share = place - before
    first, second = (np.clip(before + i, 0, side - 1) for i in (0, 1))

    def blend(values):
        values = values[first] * (1 - share)[:, None] + values[second] * share[:, None]
        return values[:, first] * (1 - share) + values[:, second] * share

    valid = (pixels > 0).astype(float)
    weight = blend(valid)
    values = blend(pixels * valid) / np.maximum(weight, 1e-9)
    return values, np.kron(valid, np.ones((factor, factor))) > 0


def averaged(pixels: np.ndarray, factor: int) -> np.ndarray:
    """The mean of the valid pixels, float; 0 where there is none."""
    side = len(pixels) // factor
    blocks = pixels.reshape(side, factor, side, factor).astype(float)
    count = (blocks > 0).sum(axis=(1, 3))
    return blocks.sum(axis=(1, 3)) / np.maximum(count, 1)


def equal_when_rounded(band: np.ndarray, exact: np.ndarray) -> bool:
    """Whether whole numbers are those nearest to exact ones; 0 is only 0."""
    near = np.abs(band - exact).max() <= 0.51
    return bool(near and ((band == 0) == (exact == 0)).all())


# --- L2A ------------------------------------------------------------------------------------


def test_gdal_knows_the_test_products_as_sentinel_2(l2a, l1c):
    for product, level in ((l2a, "2A"), (l1c, "1C")):
        with rasterio.open(product / f"MTD_MSIL{level}.xml") as file:
            assert file.driver == "SENTINEL2"
            finest = next(name for name in file.subdatasets if ":10m:" in name)
        with rasterio.open(finest) as file:
            assert file.shape == (48, 48)
            assert (file.read(1) == band_pixels("B04", 10)).all()


def test_a_product_becomes_a_scene_of_ten_bands(l2a, tmp_path):
    said = stacked("--input", l2a, "--output", tmp_path / "scene.vrt")
    with rasterio.open(tmp_path / "scene.vrt") as scene:
        assert scene.descriptions == DEFAULT
        assert scene.dtypes == ("uint16",) * 10 and scene.nodatavals == (0,) * 10
        assert scene.shape == (48, 48) and scene.res == (10, 10)
        assert scene.crs == "EPSG:32632"
        pixels = scene.read()
        tags = scene.tags()
        assert scene.tags(1)["offset_added"] == "-1000"
    for name, band in zip(DEFAULT, pixels):
        metres = RESOLUTIONS[name]
        own = undone(band_pixels(name, metres))
        if metres == 10:
            assert (band == own).all(), name
        else:
            values, valid = upsampled(own, 2)
            assert equal_when_rounded(band, np.where(valid, values, 0)), name
    assert tags["sensor"] == "Sentinel-2A" and tags["acquired"] == "2021-06-19"
    assert tags["tile"] == "T32TQR" and tags["product"] == l2a.stem
    assert "-1000 added to B02, B03" in tags["values"]
    assert tags["values"] in said and "bilinear: B05" in said


def test_pixels_that_fall_to_zero_or_below_become_one(l2a, tmp_path):
    stacked("--input", l2a, "--bands", "B02", "--output", tmp_path / "scene.vrt")
    with rasterio.open(tmp_path / "scene.vrt") as scene:
        pixels = scene.read(1)
    assert pixels[0, 0] == pixels[0, 1] == 1  # 900 and 1000
    assert pixels[0, 24] == 0 == pixels[-1, -1]
    assert not (tmp_path / "scene.parts").exists()


@pytest.mark.parametrize("offset", [-1000, -1, 0, 7, 1000])
def test_every_value_gets_its_offset(tmp_path, offset):
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    write_band(tmp_path / "B04.jp2", ramp, 10)
    stacked(
        "--input",
        tmp_path / "B04.jp2",
        "--offset",
        offset,
        "--output",
        tmp_path / "s.vrt",
    )
    with rasterio.open(tmp_path / "s.vrt") as scene:
        expected = np.clip(ramp.astype(int) + offset, 1, 65535)
        assert (scene.read(1) == np.where(ramp == 0, 0, expected)).all()


def test_the_look_up_table_is_as_short_as_it_can_be():
    assert lookup_table(-1000, "uint16") == "1:1,1001:1,65535:64535"
    assert lookup_table(5, "uint8") == "1:6,250:255,255:255"


def test_products_without_offset_keep_their_pixels(tmp_path):
    product = write_l2a(tmp_path, offset=None)
    said = stacked(
        "--input", product, "--bands", "B02,B11", "--output", tmp_path / "scene.vrt"
    )
    with rasterio.open(tmp_path / "scene.vrt") as scene:
        assert (scene.read(1) == band_pixels("B02", 10)).all()
        assert scene.tags()["values"] == "as in the files"
    assert "warning" not in said


def test_offset_overrides_what_the_metadata_state(l2a, tmp_path):
    target = tmp_path / "scene.vrt"
    stacked("--input", l2a, "--bands", "B02", "--offset", "0", "--output", target)
    with rasterio.open(target) as scene:
        assert (scene.read(1) == band_pixels("B02", 10)).all()


def test_bands_are_selected_and_ordered_whatever_their_case(l2a, tmp_path):
    target = tmp_path / "scene.vrt"
    stacked("--input", l2a, "--bands", "b8a,B01,B12", "--output", target)
    with rasterio.open(target) as scene:
        assert scene.descriptions == ("B8A", "B01", "B12")
        assert scene.res == (20, 20) and scene.shape == (24, 24)
        assert (scene.read(1) == undone(band_pixels("B8A", 20))).all()


def test_average_takes_no_nodata_in(l2a, tmp_path):
    target = tmp_path / "scene.vrt"
    stacked("--input", l2a, "--resolution", "20", "--output", target)
    with rasterio.open(target) as scene:
        assert scene.res == (20, 20) and scene.shape == (24, 24)
        for number, name in enumerate(DEFAULT, start=1):
            own = undone(band_pixels(name, RESOLUTIONS[name]))
            expected = own if RESOLUTIONS[name] == 20 else averaged(own, 2)
            assert equal_when_rounded(scene.read(number), expected), name


def test_averages_come_from_the_pixels_not_from_overviews(tmp_path):
    rng = np.random.default_rng(1)
    pixels = rng.integers(1001, 9000, (600, 600)).astype(np.uint16)
    pixels[200:260, 100:300] = 0
    path = write_band(tmp_path / "T32TQR_20210619T101031_B04_10m.jp2", pixels, 10)
    with rasterio.open(path) as file:
        assert file.overviews(1)  # in which JPEG 2000 mixes nodata with its neighbours
    target = tmp_path / "scene.vrt"
    stacked(
        "--input", path, "--offset", "-1000", "--resolution", "20", "--output", target
    )
    with rasterio.open(target) as scene:
        assert equal_when_rounded(scene.read(1), averaged(undone(pixels), 2))


def test_a_window_is_the_same_as_in_the_whole(l2a, tmp_path):
    stacked("--input", l2a, "--cloud_mask", "--output", tmp_path / "scene.vrt")
    with rasterio.open(tmp_path / "scene.vrt") as scene:
        whole = scene.read()
    window = rasterio.windows.Window(19, 7, 11, 13)
    with rasterio.open(tmp_path / "scene.vrt") as scene:
        assert (scene.read(window=window) == whole[:, 7:20, 19:30]).all()


def test_a_zip_is_read_without_unpacking(l2a, tmp_path):
    archive = shutil.make_archive(str(tmp_path / "p"), "zip", l2a.parent, l2a.name)
    target = tmp_path / "scene.vrt"
    said = stacked(
        "--input", archive, "--bands", "B02,B11", "--cloud_mask", "--output", target
    )
    assert "refers to an archive by its full path" in said
    stacked(
        "--input",
        l2a,
        "--bands",
        "B02,B11",
        "--cloud_mask",
        "--output",
        tmp_path / "b.vrt",
    )
    with rasterio.open(target) as one, rasterio.open(tmp_path / "b.vrt") as other:
        assert (one.read() == other.read()).all()
        assert (one.dataset_mask() == other.dataset_mask()).all()


def test_product_and_scene_move_together(tmp_path):
    product = write_l2a(tmp_path / "here")
    target = tmp_path / "here" / "scenes" / "scene.vrt"
    stacked("--input", product, "--cloud_mask", "--output", target)
    with rasterio.open(target) as scene:
        before = scene.read()
    (tmp_path / "here").rename(tmp_path / "there")
    with rasterio.open(tmp_path / "there" / "scenes" / "scene.vrt") as scene:
        assert (scene.read() == before).all()
    text = (tmp_path / "there" / "scenes" / "scene.vrt").read_text()
    assert str(tmp_path) not in text


def test_a_tif_is_a_cloud_optimized_copy(l2a, tmp_path):
    stacked("--input", l2a, "--cloud_mask", "--output", tmp_path / "scene.tif")
    stacked("--input", l2a, "--cloud_mask", "--output", tmp_path / "scene.vrt")
    with rasterio.open(tmp_path / "scene.tif") as copy:
        assert copy.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        with rasterio.open(tmp_path / "scene.vrt") as scene:
            assert (copy.read() == scene.read()).all()
            assert (copy.dataset_mask() == scene.dataset_mask()).all()
            assert copy.descriptions == scene.descriptions
            assert copy.nodatavals == scene.nodatavals
            assert copy.transform == scene.transform and copy.crs == scene.crs
            assert scene.tags().items() <= copy.tags().items()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "scene.parts",
        "scene.tif",
        "scene.vrt",
    ]


# --- clouds ---------------------------------------------------------------------------------


def test_the_scene_classification_becomes_the_mask(l2a, tmp_path):
    said = stacked("--input", l2a, "--cloud_mask", "--output", tmp_path / "scene.vrt")
    valid = ~np.isin(scene_classes(), [0, 1, 3, 8, 9, 10])
    with rasterio.open(tmp_path / "scene.vrt") as scene:
        mask = scene.dataset_mask() > 0
        assert (mask == np.kron(valid, np.ones((2, 2), bool))).all()
        assert "SCL" in scene.tags()["mask"]
    assert f"{100 * (~valid).mean():.1f} % masked, 0.0 % beyond its edge" in said


def test_a_buffer_grows_clouds_and_shadows_but_not_fill(l2a, tmp_path):
    options = "--cloud_mask", "--mask_buffer", "20", "--bands", "B05"
    stacked("--input", l2a, *options, "--output", tmp_path / "scene.vrt")
    classes = scene_classes()
    cloud = np.isin(classes, [3, 8, 9, 10])
    padded = np.pad(cloud, 1)
    expected = padded[1:-1, 1:-1] | padded[:-2, 1:-1] | padded[2:, 1:-1]
    expected |= padded[1:-1, :-2] | padded[1:-1, 2:]
    expected |= np.isin(classes, [0, 1])
    with rasterio.open(tmp_path / "scene.vrt") as scene:
        assert ((scene.dataset_mask() == 0) == expected).all()
        assert "clouds grown by 20 m" in scene.tags()["mask"]


def test_l1c_masks_opaque_clouds_and_cirrus_but_not_snow(l1c, tmp_path):
    said = stacked("--input", l1c, "--cloud_mask", "--output", tmp_path / "scene.vrt")
    invalid = np.zeros((8, 8), bool)
    invalid[1, 1] = invalid[2, 2] = True
    with rasterio.open(tmp_path / "scene.vrt") as scene:
        assert scene.descriptions == DEFAULT
        assert (scene.read(1) == undone(band_pixels("B02", 10))).all()
        assert (
            (scene.dataset_mask() == 0) == np.kron(invalid, np.ones((6, 6), bool))
        ).all()
    assert "cloud shadows are not in it" in said


def test_l1c_without_a_cloud_raster_is_refused(tmp_path):
    product = write_l1c(tmp_path, clouds=False)
    said = refused(
        "--input", product, "--cloud_mask", "--output", tmp_path / "scene.vrt"
    )
    assert "baseline 04.00" in said and "--mask" in said
    assert [p.name for p in tmp_path.iterdir()] == [L1C_NAME]


# --- several products -----------------------------------------------------------------------


def test_an_old_product_gives_a_scene_of_each_granule(tmp_path):
    product = write_old_l1c(tmp_path)
    stacked("--input", product, "--output", tmp_path / "scenes")
    names = sorted(p.name for p in (tmp_path / "scenes").glob("*.vrt"))
    assert names == ["Image_T32TQQ_20151231.vrt", "Image_T32TQR_20151231.vrt"]
    with rasterio.open(tmp_path / "scenes" / names[0]) as scene:
        assert (scene.read(1) == band_pixels("B02", 10, low=100)).all()
    assert "2 products" in refused(
        "--input", product, "--output", tmp_path / "one.vrt", status=2
    )


def test_products_go_into_a_folder_by_tile_and_date(l2a, tmp_path):
    other = write_l2a(tmp_path, l2a.name.replace("20210619T10", "20210704T10"), seed=5)
    folder = tmp_path / "scenes"
    stacked("--input", l2a, other, "--bands", "B04", "--output", folder)
    for date, seed in (("20210619", 0), ("20210704", 5)):
        with rasterio.open(folder / f"Image_T32TQR_{date}.vrt") as scene:
            assert (scene.read(1) == undone(band_pixels("B04", 10, seed))).all()


def test_two_products_of_one_tile_and_date_are_refused(l2a, tmp_path):
    other = write_l2a(tmp_path, l2a.name.replace("N0500", "N0301"), offset=None)
    said = refused("--input", l2a, other, "--output", tmp_path / "scenes")
    assert l2a.stem in said and other.stem in said
    said = refused("--input", l2a, other, "--join", "--output", tmp_path / "scene.vrt")
    assert l2a.stem in said and other.stem in said


def test_joined_dates_have_their_date_in_the_names(l2a, tmp_path):
    other = write_l2a(
        tmp_path, l2a.name.replace("20210619T10", "20210704T10"), None, seed=5
    )
    target = tmp_path / "scene.vrt"
    options = "--bands", "B04,B11", "--join", "--cloud_mask", "--output", target
    stacked("--input", l2a, other, *options)
    with rasterio.open(target) as scene:
        names = "B04_20210619", "B11_20210619", "B04_20210704", "B11_20210704"
        assert scene.descriptions == names
        assert (scene.read(1) == undone(band_pixels("B04", 10))).all()
        assert (scene.read(3) == band_pixels("B04", 10, 5)).all()
        assert scene.tags()["acquired"] == "2021-06-19,2021-07-04"


# --- what is refused ------------------------------------------------------------------------


def damaged(l2a: Path, folder: Path, pattern: str) -> Path:
    """A copy of a product without some of its files."""
    copy = shutil.copytree(l2a, folder / l2a.name)
    for path in list(copy.rglob(pattern)):
        path.unlink()
    return copy


@pytest.mark.parametrize(
    "pattern, words",
    [
        ("*_B11_20m.jp2", ["lacks the file of B11", "download it again"]),
        ("MTD_MSIL2A.xml", ["lacks the metadata", "MTD_MSIL2A.xml"]),
        ("*.jp2", ["no images", "download it again"]),
    ],
)
def test_an_incomplete_download_is_refused(l2a, tmp_path, pattern, words):
    said = refused(
        "--input", damaged(l2a, tmp_path, pattern), "--output", tmp_path / "s.vrt"
    )
    assert all(word in said for word in words)


def test_a_missing_cloud_layer_is_refused(l2a, tmp_path):
    product = damaged(l2a, tmp_path, "*_SCL_*.jp2")
    said = refused("--input", product, "--cloud_mask", "--output", tmp_path / "s.vrt")
    assert product.stem in said and "--mask" in said


def test_half_metadata_is_refused(l2a, tmp_path):
    copy = shutil.copytree(l2a, tmp_path / l2a.name)
    text = (copy / "MTD_MSIL2A.xml").read_text()
    (copy / "MTD_MSIL2A.xml").write_text(text[: len(text) // 2])
    said = refused("--input", copy, "--output", tmp_path / "s.vrt")
    assert "MTD_MSIL2A.xml" in said and "incomplete" in said


def test_half_a_zip_is_refused(l2a, tmp_path):
    archive = Path(
        shutil.make_archive(str(tmp_path / "p"), "zip", l2a.parent, l2a.name)
    )
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    said = refused("--input", archive, "--output", tmp_path / "s.vrt")
    assert str(archive) in said and "download it again" in said


def test_a_product_of_another_kind_is_refused(tmp_path):
    product = tmp_path / "S1A_IW_GRDH_1SDV_20210619T052101.SAFE"
    product.mkdir()
    (product / "manifest.safe").write_text("<xml/>")
    said = refused("--input", product, "--output", tmp_path / "s.vrt")
    assert str(product) in said and "neither a Sentinel-2" in said
    with zipfile.ZipFile(tmp_path / "s1.zip", "w") as archive:
        archive.writestr("a/manifest.safe", "<xml/>")
    said = refused("--input", tmp_path / "s1.zip", "--output", tmp_path / "s.vrt")
    assert "s1.zip is neither a Sentinel-2" in said


def test_a_band_that_the_level_lacks_is_refused(l2a, tmp_path):
    said = refused("--input", l2a, "--bands", "B02,B10", "--output", tmp_path / "s.vrt")
    assert "has no band B10; it has B01, B02" in said
    said = refused("--input", l2a, "--bands", "B02,b02", "--output", tmp_path / "s.vrt")
    assert "Two bands would be called B02" in said


def test_scenes_are_replaced_only_on_demand(l2a, tmp_path):
    options = "--input", l2a, "--bands", "B02,B11", "--output", tmp_path / "s.vrt"
    stacked(*options)
    assert "--overwrite" in refused(*options)
    stacked(*options[:3], "B02", *options[4:], "--overwrite")
    with rasterio.open(tmp_path / "s.vrt") as scene:
        assert scene.descriptions == ("B02",)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.vrt"]
