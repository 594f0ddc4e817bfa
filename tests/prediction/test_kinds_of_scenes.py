"""Scenes of all kinds: masks, formats, shapes, coordinates, several at a time."""

from __future__ import annotations

import os
import zipfile
from xml.etree import ElementTree

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from prediction_helpers import (
    CRS,
    RGBA,
    TRANSFORM,
    check_map,
    confidence_of,
    corner_points,
    cut_off,
    make_model,
    mapped_area,
    noise,
    read_json,
    read_map,
    run,
    write_scene,
)
from rasterio.drivers import raster_driver_extensions
from rasterio.enums import ColorInterp
from rasterio.transform import Affine, from_origin

# --- scenes -----------------------------------------------------------------------------


@pytest.mark.fault(10)
def test_zero_is_nodata_where_all_bands_hold_it(land, tmp_path, capsys):
    pixels = noise(60, 50)
    pixels[1, 20:30, 5:15], pixels[:, 40:, 40:] = 0, 0
    scene = write_scene(tmp_path / "scene.tif", pixels, nodata=0)
    assert run(land.path, scene, tmp_path / "map.tif") == 0
    check_map(land, tmp_path / "map.tif", pixels, (pixels > 0).any(axis=0))
    text = "scene.tif: about 3.3% of the pixels hold the nodata value 0 in some of the bands"
    assert capsys.readouterr().err.count(text) == 1


@pytest.mark.fault(57)
def test_fill_that_an_option_names_is_not_mapped(land, tmp_path, capsys):
    pixels = noise(70, 50)
    pixels[:, :30, :25] = 10_001
    scene = write_scene(tmp_path / "scene.tif", pixels)
    assert run(land.path, scene, tmp_path / "map.tif") == 0
    assert "give --nodata=10001" in capsys.readouterr().err
    more = ("--nodata", "10001", "--quicklook")
    assert run(land.path, scene, tmp_path / "given.tif", *more) == 0
    assert "at its border" not in capsys.readouterr().err
    check_map(land, tmp_path / "given.tif", pixels, (pixels <= 10_000).all(axis=0))


def test_numbers_that_are_none_make_a_pixel_invalid(land, tmp_path):
    pixels = noise(70, 50).astype(np.float32)
    pixels[0, 3, 4], pixels[1, 10:20], pixels[2, 40, 7] = np.nan, np.inf, -np.inf
    scene = write_scene(tmp_path / "scene.tif", pixels)
    assert run(land.path, scene, tmp_path / "map.tif") == 0
    check_map(land, tmp_path / "map.tif", pixels, np.isfinite(pixels).all(axis=0))


def test_an_alpha_band_is_a_mask_and_no_input(land, tmp_path):
    pixels = np.concatenate([noise(70, 50), np.full((1, 70, 50), 65535, np.uint16)])
    pixels[3, 20:30, :25] = 0
    scene = write_scene(tmp_path / "scene.tif", pixels, colours=RGBA)
    assert run(land.path, scene, tmp_path / "map.tif") == 0
    check_map(land, tmp_path / "map.tif", pixels[:3], pixels[3] > 0)


def test_a_fourth_band_that_is_chosen_as_data_is_no_mask(land, tmp_path):
    # GDAL calls the fourth of four 8-bit bands alpha; here it is a near infrared
    pixels = (noise(40, 40, bands=4) // 40).astype(np.uint8)
    pixels[3, :20] = 0  # dark water
    scene = write_scene(tmp_path / "scene.tif", pixels)
    with rasterio.open(scene) as file:
        assert file.colorinterp[3] == ColorInterp.alpha
    assert run(land.path, scene, tmp_path / "map.tif", "--bands", "4,3,2") == 0
    assert (read_map(tmp_path / "map.tif") != 255).all()


def test_a_mask_band_makes_pixels_invalid(land, tmp_path):
    pixels, mask = noise(70, 50), np.ones((70, 50), bool)
    mask[50:, 10:] = False
    scene = write_scene(tmp_path / "scene.tif", pixels, mask=mask)
    assert run(land.path, scene, tmp_path / "map.tif") == 0
    check_map(land, tmp_path / "map.tif", pixels, mask)


def test_a_scene_of_nodata_alone_is_mapped_as_nodata(land, tmp_path, batches):
    pixels = np.zeros((3, 50, 40), np.uint16)
    scene = write_scene(tmp_path / "scene.tif", pixels, nodata=0)
    options = ("--save_confidence", "--quicklook")
    assert run(land.path, scene, tmp_path / "map.tif", *options) == 0
    assert batches == []
    assert (read_map(tmp_path / "map.tif") == 255).all()
    assert (read_map(tmp_path / "map_confidence.tif") == -1).all()
    assert read_json(tmp_path / "map_statistics.json")["mapped_pixels"] == 0


def test_a_vrt_and_a_file_in_a_zip_are_scenes(land, tmp_path):
    pixels = noise(70, 50)
    source = write_scene(tmp_path / "source.tif", pixels)
    rasterio.shutil.copy(source, tmp_path / "scene.vrt", driver="VRT")
    with zipfile.ZipFile(tmp_path / "scene.zip", "w") as archive:
        archive.write(source, "inner/scene.tif")
    for name in ("scene.vrt", "scene.zip/inner/scene.tif"):
        path = f"/vsizip/{tmp_path / name}" if ".zip" in name else tmp_path / name
        assert run(land.path, path, tmp_path / "map.tif", "--overwrite") == 0
        check_map(land, tmp_path / "map.tif", pixels, np.ones((70, 50), bool))
        with rasterio.open(tmp_path / "map.tif") as file:
            assert (file.crs, file.transform) == (CRS, TRANSFORM)


@pytest.mark.skipif(
    raster_driver_extensions().get("jp2") != "JP2OpenJPEG",
    reason="this GDAL writes no lossless JPEG 2000",
)
def test_a_jpeg_2000_is_a_scene(land, tmp_path):
    pixels = noise(70, 50)
    lossless = {"driver": "JP2OpenJPEG", "QUALITY": "100", "REVERSIBLE": "YES"}
    scene = write_scene(tmp_path / "scene.jp2", pixels, **lossless)
    assert run(land.path, scene, tmp_path / "map.tif") == 0
    check_map(land, tmp_path / "map.tif", pixels, np.ones((70, 50), bool))


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 200), (200, 1), (33, 33), (129, 200), (197, 31)]
)
def test_scenes_of_any_shape_are_mapped(land, tmp_path, shape):
    pixels = noise(*shape)
    scene = write_scene(tmp_path / "scene.tif", pixels)
    assert run(land.path, scene, tmp_path / "map.tif", "--patch_size", "32") == 0
    check_map(land, tmp_path / "map.tif", pixels, np.ones(shape, bool))


def test_a_turned_scene_keeps_its_transform(land, tmp_path):
    turned = Affine.translation(431_240, 4_912_560) @ Affine.rotation(30)
    turned = turned @ Affine.scale(10, -20)
    scene = write_scene(tmp_path / "scene.tif", noise(40, 40), transform=turned)
    assert run(land.path, scene, tmp_path / "map.tif") == 0
    with rasterio.open(tmp_path / "map.tif") as file:
        assert file.transform.almost_equals(turned, 1e-9)
    report = read_json(tmp_path / "map_statistics.json")
    area = sum(entry["area_ha"] for entry in report["classes"])
    assert area == pytest.approx(40 * 40 * 10 * 20 / 1e4, rel=1e-3)


def test_a_scene_without_a_crs_is_mapped_with_a_warning(land, tmp_path, capsys):
    pixels = noise(40, 40)
    scene = write_scene(tmp_path / "scene.tif", pixels, crs=None)
    assert run(land.path, scene, tmp_path / "map.tif") == 0
    captured = capsys.readouterr()
    assert "warning" in captured.err and "no CRS" in captured.err
    with rasterio.open(tmp_path / "map.tif") as file:
        assert file.crs is None and file.transform == TRANSFORM
    check_map(land, tmp_path / "map.tif", pixels, np.ones((40, 40), bool))
    report = read_json(tmp_path / "map_statistics.json")
    assert {entry["area_ha"] for entry in report["classes"]} == {None}


def test_ground_control_points_are_handed_on(land, tmp_path, capsys):
    pixels = noise(50, 40)
    scene = write_scene(
        tmp_path / "scene.tif",
        pixels,
        transform=None,
        crs="EPSG:4326",
        gcps=corner_points(50, 40),
    )
    output = tmp_path / "map.tif"
    assert run(land.path, scene, output, "--save_confidence") == 0
    assert "no CRS" not in capsys.readouterr().err
    for path in (output, tmp_path / "map_confidence.tif"):
        with rasterio.open(path) as file:
            points, crs = file.gcps
        assert crs == "EPSG:4326"
        assert [(p.row, p.col, p.x, p.y) for p in points] == [
            (p.row, p.col, p.x, p.y) for p in corner_points(50, 40)
        ]
    check_map(land, output, pixels, np.ones((50, 40), bool))


def test_a_folder_of_scenes_is_mapped_into_a_folder(land, tmp_path, capsys):
    images = {"a": noise(40, 50, seed=1), "b.c": noise(50, 40, seed=2)}
    for (stem, pixels), suffix in zip(images.items(), (".tif", ".TIF")):
        write_scene(tmp_path / "scenes" / f"{stem}{suffix}", pixels)
    (tmp_path / "scenes" / "notes.txt").write_text("no scene")
    assert run(land.path, tmp_path / "scenes", tmp_path / "maps") == 0
    for stem, pixels in images.items():
        output = tmp_path / "maps" / f"{stem}_prediction.tif"
        check_map(land, output, pixels, np.ones(pixels.shape[1:], bool))
        assert output.with_name(f"{stem}_prediction_statistics.json").exists()
    assert len(list((tmp_path / "maps").glob("*.tif"))) == 2
    assert capsys.readouterr().out.count("confidence: mean") == 2


def test_a_single_scene_can_go_into_a_folder_that_is_there(land, scene, tmp_path):
    (tmp_path / "maps").mkdir()
    assert run(land.path, scene, tmp_path / "maps") == 0
    assert (tmp_path / "maps" / "scene_prediction.tif").exists()


def test_one_failing_scene_leaves_the_others_mapped(land, tmp_path, capsys):
    first = write_scene(tmp_path / "first.tif", noise(40, 50))
    cut = cut_off(tmp_path / "cut.tif")
    last = write_scene(tmp_path / "last.tif", noise(40, 50))
    maps = tmp_path / "maps"
    assert run(land.path, [first, cut, last], maps, "--save_confidence") == 1
    error = capsys.readouterr().err
    assert f"{cut} is cut off" in error and "1 of 3 scenes" in error
    stems = ("first_prediction", "last_prediction")
    ends = [".tif", ".tif.aux.xml", "_confidence.tif", "_statistics.json"]
    ends += [".qml", "_confidence.qml"]
    expected = {stem + end for stem in stems for end in ends}
    assert set(os.listdir(maps)) == expected


def test_a_vrt_that_is_called_tif_is_refused(land, scene, tmp_path, capsys):
    rasterio.shutil.copy(scene, tmp_path / "scene.vrt", driver="VRT")
    (tmp_path / "scene.vrt").rename(tmp_path / "false.tif")
    assert run(land.path, tmp_path / "false.tif", tmp_path / "map.tif") == 1
    assert "false.tif" in capsys.readouterr().err
    assert not (tmp_path / "map.tif").exists()


# --- known defects ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "crs",
    [
        "+proj=eqearth",
        "+proj=ob_tran +o_proj=longlat +o_lon_p=0 +o_lat_p=30 +lon_0=10",
    ],
)
def test_a_crs_that_geotiff_cannot_hold_is_kept(land, tmp_path, crs):
    scene = write_scene(tmp_path / "scene.tif", noise(40, 40), crs=crs)
    output = tmp_path / "out" / "map.tif"
    assert run(land.path, scene, output, "--save_confidence") == 0
    assert [name for name in os.listdir(output.parent) if ".part" in name] == []
    with rasterio.open(scene) as file:
        expected = file.crs
    for path in (output, output.with_name("map_confidence.tif")):
        with rasterio.open(path) as file:
            assert file.crs == expected


def test_ground_control_points_without_a_crs_are_mapped(land, tmp_path):
    pixels = noise(50, 40)
    source = write_scene(
        tmp_path / "source.tif",
        pixels,
        transform=None,
        crs="EPSG:4326",
        gcps=corner_points(50, 40),
    )
    vrt = tmp_path / "scene.vrt"
    rasterio.shutil.copy(source, vrt, driver="VRT")
    tree = ElementTree.parse(vrt)
    del tree.getroot().find("GCPList").attrib["Projection"]
    tree.write(vrt)
    assert run(land.path, vrt, tmp_path / "map.tif") == 0
    check_map(land, tmp_path / "map.tif", pixels, np.ones((50, 40), bool))


def test_a_scene_of_another_planet_is_mapped(land, tmp_path):
    radius = 3_396_190.0  # of Mars in metres
    place = {"crs": f"+proj=longlat +R={radius}"}
    place["transform"] = from_origin(20, 1, 0.05, 0.05)  # as much south as north
    area = mapped_area(land, tmp_path, **place)
    strip = 2 * np.sin(np.radians(1)) * radius**2  # between the parallels, per radian
    assert area == pytest.approx(strip * np.radians(2.5), rel=1e-3)


# --- input ------------------------------------------------------------------------------


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
