"""Patches against the scenes that they were cut from: pixels, validity, bands, resizing."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import rasterio
from rasterio.enums import ColorInterp
from rasterio.transform import Affine
from shapely import box
from site_helpers import (
    CHOICES,
    CRS,
    DTYPES,
    PATCH,
    SIZE,
    TRANSFORM,
    classes,
    hole,
    refusal,
    scene,
    tiles,
)

from common import SPLITS
from common.patches import PatchPair, read_patch
from common.rasters import image_bands
from extraction.cutting import resize_image, resize_label

# --- resizing --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "size", "expected"),
    [
        ([[1, 2], [3, 4]], 4, [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]),
        ([[1, 2, 3], [4, 5, 6], [7, 8, 9]], 1, [[5]]),
        ([[1, 2, 3]], 3, [[1, 2, 3]] * 3),
    ],
)
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_labels_are_resized_to_the_nearest_pixel(source, size, expected, dtype):
    resized = resize_label(np.array(source, dtype), size)
    assert resized.dtype == dtype
    assert resized.tolist() == expected


@pytest.mark.parametrize("shape", [(5, 7), (16, 16), (33, 20), (64, 9)])
@pytest.mark.parametrize("size", [8, 15, 32])
def test_the_nearest_pixel_is_the_one_that_holds_the_centre(shape, size):
    numbers = np.arange(shape[0] * shape[1]).reshape(shape).astype("uint16")
    rows, columns = np.divmod(resize_label(numbers, size), shape[1])
    for chosen, side in ((rows[:, :1], shape[0]), (columns[:1].T, shape[1])):
        centre = (np.arange(size)[:, None] + 0.5) * side / size
        # a centre on the edge of two pixels is as near to the one as to the other
        assert np.all((chosen <= centre) & (centre <= chosen + 1))
    assert np.all(rows == rows[:, :1])
    assert np.all(columns == columns[:1])


def resized(image, size: int, interpolation: str, valid=None):
    """An image (H, W) or (C, H, W) resized; all valid unless told."""
    image = image if np.ndim(image) == 3 else np.asarray(image)[None]
    valid = np.ones(image.shape[1:], bool) if valid is None else np.asarray(valid)
    return resize_image(image, valid, size, interpolation)


@pytest.mark.parametrize("interpolation", ["area", "auto"])
def test_shrinking_averages(interpolation):
    image = np.array([[1, 2, 10, 10], [3, 4, 10, 10], [0, 0, 7, 7], [0, 1, 7, 8]])
    shrunk, valid = resized(image.astype("float32"), 2, interpolation)
    assert shrunk[0].tolist() == [[2.5, 10], [0.25, 7.25]]
    assert valid.all()
    spot = np.zeros((3, 3), "float32")
    spot[1, 1] = 9  # all that a bilinear pixel would see
    assert resized(spot, 1, interpolation)[0][0] == pytest.approx(1)


@pytest.mark.parametrize("interpolation", ["bilinear", "auto"])
def test_enlarging_is_bilinear_about_pixel_centres(interpolation):
    enlarged, _ = resized(np.array([[0, 8], [0, 8]], "float32"), 4, interpolation)
    assert enlarged[0].tolist() == [[0, 2, 6, 8]] * 4


def test_whole_numbers_are_rounded_and_not_cut_off():
    shrunk, _ = resized(np.array([[1, 2], [2, 2]], "uint8"), 1, "area")
    assert shrunk[0].tolist() == [[2]]


def test_cubic_overshoots_stop_at_the_limits_of_the_dtype():
    step = np.repeat(np.array([[0, 0, 255, 255]], "uint8"), 4, axis=0)
    enlarged, _ = resized(step, 16, "cubic")
    assert np.all(np.diff(enlarged[0, 0].astype(int)) >= 0)
    assert (enlarged[0, 0, 0], enlarged[0, 0, -1]) == (0, 255)
    assert len(np.unique(enlarged)) > 2


def test_the_nearest_image_pixel_is_the_nearest_label_pixel():
    label = np.random.default_rng(0).integers(0, 200, (33, 20)).astype("uint16")
    image, _ = resized(label, 16, "nearest")
    assert np.array_equal(image[0], resize_label(label, 16))


@pytest.mark.parametrize("size", [5, 8, 20])
@pytest.mark.parametrize("interpolation", CHOICES)
@pytest.mark.parametrize("dtype", [*DTYPES, "int8", "uint32"])
def test_invalid_pixels_do_not_bleed_into_valid_ones(dtype, interpolation, size):
    high = 1e6 if np.dtype(dtype).kind == "f" else np.iinfo(dtype).max
    image = np.full((2, 12, 10), high, dtype)
    valid = np.ones((12, 10), bool)
    valid[3:8, 4:7] = valid[0] = False
    image[:, valid] = np.array([[3], [100]])
    result, kept = resized(image, size, interpolation, valid)
    assert result.dtype == dtype
    assert 0 < kept.sum() < kept.size
    for channel, value in zip(result, (3, 100)):
        # floats may differ in their last digit
        assert np.allclose(channel[kept], value, rtol=1e-6, atol=0)


def test_a_resized_pixel_is_valid_when_half_of_it_is():
    valid = np.array([[1, 1, 1, 0], [0, 0, 0, 0]] * 2, bool)
    image = np.where(valid, [[4, 8, 5, 90]], 90).astype("float32")
    result, kept = resized(image, 2, "area", valid)
    assert kept.tolist() == [[True, False], [True, False]]
    assert result[0].tolist() == [[6, 0], [6, 0]]


def test_large_values_of_32_bits_keep_their_last_digit():
    image = np.full((4, 4), 2**31 - 3, "int32")
    for interpolation in CHOICES:
        assert np.all(resized(image, 8, interpolation)[0] == 2**31 - 3)


@pytest.mark.parametrize("interpolation", CHOICES)
def test_each_interpolation_can_be_chosen(site, interpolation):
    site.draw_grid([box(8, 8, 40, 40)])
    patch = site.only("--interpolation", interpolation)
    expected, _ = resized(scene()[:, 8:40, 8:40], PATCH, interpolation)
    assert np.array_equal(patch.image, expected)
    nearest = resize_label(classes()[8:40, 8:40], PATCH)
    assert np.array_equal(patch.label, nearest)


def test_shrinking_by_auto_is_the_mean_of_blocks(site):
    site.draw_image(scene(dtype="float32"))
    site.draw_grid([box(0, 0, 48, 48)])
    blocks = scene().reshape(3, PATCH, 3, PATCH, 3)
    assert np.allclose(site.only().image, blocks.mean(axis=(2, 4)), rtol=1e-6)


# --- pixels ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cell_of_the_patch_size_is_the_scene_bit_by_bit(site, dtype):
    image = scene(dtype=dtype)
    image[1, 20, 20] = image[:, 30, 30] = 0
    described = ("B04 red", "B03 green", "B02 blue")
    site.draw_image(image, descriptions=described, nodata=0)
    patches = site.extract()
    assert list(patches) == [f"patch_00{number}" for number in range(1, 10)]
    for number, patch in enumerate(patches.values()):
        row, column = divmod(number, 3)
        rows, columns = patch.place()
        assert (rows.start, columns.start) == (PATCH * row, PATCH * column)
        window = image[:, rows, columns]
        valid = (window != 0).any(axis=0)
        assert np.array_equal(patch.image, np.where(valid, window, 0))
        assert patch.image.dtype == dtype
        assert np.array_equal(
            patch.label, np.where(valid, classes()[rows, columns], 255)
        )
        assert np.array_equal(patch.valid, valid)
        shift = Affine.translation(columns.start, rows.start)
        assert patch.transform == TRANSFORM * shift
        assert patch.profile["crs"] == CRS
        assert patch.profile["nodata"] == 0
        assert patch.descriptions == described
        assert (patch.label.dtype, patch.unlabelled) == ("uint8", 255)
    assert sum(patch.valid.size - patch.valid.sum() for patch in patches.values()) == 1


def test_patches_are_plain_geotiffs_without_files_beside_them(site):
    site.draw_image(scene(), mask=scene()[0] > 60)
    patches = site.extract("--class_names", "a,b,c")
    for patch in patches.values():
        assert patch.profile["driver"] == "GTiff"
        assert patch.profile["compress"] == "deflate"
    for folder in site.out.glob("Patch/*/*"):
        assert {path.suffix for path in folder.iterdir()} <= {".tif"}
    assert {path.name for path in (site.out / "Patch").iterdir()} == {
        *SPLITS,
        "cells.gpkg",
    }


@pytest.mark.parametrize("size", [8, 24, 31])
def test_the_corners_of_a_resized_patch_are_the_corners_of_its_cell(site, size):
    site.draw_grid([box(3, 5, 37, 25)])
    patch = site.only(size=size)
    assert patch.image.shape == (3, size, size)
    for corner, place in {(0, 0): (3, 5), (size, size): (37, 25)}.items():
        found = ~TRANSFORM * (patch.transform * corner)
        assert np.allclose(found, place, atol=1e-6)


def test_cells_between_pixels_take_the_pixels_whose_centre_they_hold(site):
    site.draw_grid([box(4.4, 7.6, 20.4, 23.6)])
    assert site.only().place() == (slice(8, 24), slice(4, 20))


@pytest.mark.parametrize("shift", [0.0, 0.3, 0.5, 0.7])
@pytest.mark.parametrize("side", [8.0, 10.5, 11.3])
def test_adjacent_cells_share_no_pixel_and_leave_no_gap(site, side, shift):
    site.draw_grid(tiles(3, 3, side, left=shift, top=1 + shift))
    site.extract("--save_metadata", size=8)
    count = np.zeros((SIZE, SIZE), int)
    for record in site.metadata()["patches"]:
        left, top, width, height = record["window"]
        count[top : top + height, left : left + width] += 1
    rows, columns = np.flatnonzero(count.any(axis=1)), np.flatnonzero(count.any(axis=0))
    covered = count[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    assert np.all(covered == 1)
    assert abs(len(rows) - 3 * side) <= 1


def test_the_grid_may_be_in_degrees(site):
    expected = site.extract()
    site.draw_grid(tiles(), crs="EPSG:4326")
    site.out = site.folder / "degrees"
    found = site.extract()
    assert list(found) == list(expected)
    for name, patch in found.items():
        assert patch.transform == expected[name].transform
        assert np.array_equal(patch.image, expected[name].image)
        assert np.array_equal(patch.label, expected[name].label)


@pytest.mark.parametrize(
    "name", ["grid.shp", "grid.gpkg", "grid.geojson", "GRID.GeoJSON", "grid.fgb"]
)
def test_the_grid_may_be_in_any_vector_format(site, name):
    site.draw_grid(tiles(3, 1), name)
    places = [patch.place()[1].start for patch in site.extract().values()]
    # FlatGeobuf stores its features in an order of its own
    assert sorted(places) == [0, 16, 32]
    assert name.endswith(".fgb") or places == [0, 16, 32]


def test_the_scene_may_be_rotated(site):
    turned = TRANSFORM * Affine.rotation(25)
    site.draw_image(scene(), transform=turned)
    site.draw_label(classes(), transform=turned)
    site.draw_grid(tiles(), transform=turned)
    patches = site.extract()
    assert np.array_equal(patches["patch_005"].image, scene()[:, 16:32, 16:32])
    found = ~turned * (patches["patch_005"].transform * (0, 0))
    assert np.allclose(found, (16, 16), atol=1e-6)


def test_the_first_row_of_the_scene_may_lie_in_the_south(site):
    upward = Affine(10, 0, 431_240, 0, 10, 4_912_080)
    site.draw_image(scene(), transform=upward)
    site.draw_label(classes(), transform=upward)
    site.draw_grid(tiles(), transform=upward)
    patches = site.extract()
    assert np.array_equal(patches["patch_002"].image, scene()[:, :16, 16:32])
    assert patches["patch_002"].transform == upward * Affine.translation(16, 0)


def test_pixels_need_not_be_square(site):
    flat = Affine(30, 0, 431_240, 0, -10, 4_912_560)
    site.draw_image(scene(), transform=flat)
    site.draw_label(classes(), transform=flat)
    site.draw_grid([box(0, 0, 16, 48)], transform=flat)
    patch = site.only()
    assert patch.transform == flat * Affine.scale(1, 3)
    assert np.array_equal(patch.label, classes()[1::3, :16])


# --- valid pixels ----------------------------------------------------------------------------


def check_validity(patches, valid) -> None:
    for patch in patches.values():
        expected = valid[patch.place()]
        assert np.array_equal(patch.valid, expected)
        assert np.array_equal(patch.labelled, expected)
        assert np.array_equal(
            patch.image[:, expected],
            scene()[(slice(None), *patch.place())][:, expected],
        )


def test_declared_nodata_stays_declared(site):
    site.draw_image(np.where(hole(), scene(), 9999), nodata=9999, dtype="uint16")
    patches = site.extract()
    check_validity(patches, hole())
    assert {patch.profile["nodata"] for patch in patches.values()} == {9999}
    assert np.all(patches["patch_001"].image[:, 2:5, 3:9] == 9999)


def test_nodata_of_one_band_is_written_to_all_bands(site):
    image = scene()
    image[1] = np.where(hole(), image[1], 65535)
    site.draw_image(image, nodata=65535)
    patches = site.extract()
    check_validity(patches, hole())
    assert np.all(patches["patch_001"].image[:, 2:5, 3:9] == 65535)


@pytest.mark.fault(57)
def test_fill_that_an_option_names_is_nodata_of_the_patches(site, capsys):
    image = scene(dtype="uint8")
    image[:, ~hole()] = 255
    image[:, :4] = 255
    site.draw_image(image, nodata=255)
    expected = site.extract()
    assert "at its border" not in capsys.readouterr().err
    site.draw_image(image)
    shutil.rmtree(site.out)
    patches = site.extract("--nodata", 255)
    assert "at its border" not in capsys.readouterr().err
    for name, patch in patches.items():
        assert patch.profile["nodata"] == 255
        for kind in ("image", "label"):
            found, right = getattr(patch, kind), getattr(expected[name], kind)
            assert np.array_equal(found, right)
    shutil.rmtree(site.out)
    site.extract()
    assert "give --nodata=255" in capsys.readouterr().err


@pytest.mark.fault(10)
@pytest.mark.parametrize("size", [PATCH, 8])
def test_a_dark_band_is_no_nodata_also_where_patches_are_resized(site, capsys, size):
    image = scene()
    image[1] = np.where(hole(), image[1], 0)
    image[2, :, :24] = 0
    site.draw_image(image, nodata=0)
    patches = site.extract(size=size)
    for patch in patches.values():
        _, valid, _ = read_patch(PatchPair(patch.image_path, patch.label_path))
        assert valid.all() and patch.labelled.all()
        assert patch.profile["nodata"] == 0
    assert np.all(patches["patch_001"].image[2] == 0)
    assert (
        capsys.readouterr().err.count("hold the nodata value 0 in some of the bands")
        == 1
    )


@pytest.mark.fault(10)
def test_resizing_makes_no_valid_pixel_nodata(site):
    image = np.zeros((2, 16, 16), np.int16)
    image[:, ::2], image[:, 1::2] = 1, -1
    pixels, valid = resize_image(image, np.ones((16, 16), bool), 8, "area", np.int16(0))
    assert valid.all() and np.all(pixels == 1)
    image[1] = 5
    pixels, _ = resize_image(image, np.ones((16, 16), bool), 8, "area", np.int16(0))
    assert np.all(pixels[0] == 0) and np.all(pixels[1] == 5)


def test_a_mask_band_becomes_a_mask_in_the_patch(site):
    site.draw_image(scene(), mask=hole())
    patches = site.extract()
    check_validity(patches, hole())
    assert patches["patch_001"].flags == ["per_dataset"]
    assert patches["patch_002"].flags == ["all_valid"]
    assert {patch.profile["nodata"] for patch in patches.values()} == {None}


def test_an_alpha_band_becomes_a_mask_and_no_channel(site):
    rgba = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]
    alpha = 255 * hole("uint8")[None]
    site.draw_image(np.concatenate([scene(dtype="uint8"), alpha]), colours=rgba)
    patches = site.extract("--image_channels", 3)
    check_validity(patches, hole())
    assert {patch.colours for patch in patches.values()} == {tuple(rgba[:3])}


def test_nan_and_infinity_become_the_declared_nodata(site):
    image = scene(dtype="float32")
    image[0, 2:5, 3:9], image[2, 20, 20] = np.nan, -np.inf
    site.draw_image(image, nodata=-9999)
    patches = site.extract()
    check_validity(patches, hole())
    assert np.all(patches["patch_001"].image[:, 2:5, 3:9] == -9999)


def test_nan_without_declared_nodata_is_marked_by_a_mask(site):
    image = scene(dtype="float32")
    image[:, ~hole()] = np.nan
    site.draw_image(image)
    patches = site.extract()
    check_validity(patches, hole())
    assert patches["patch_001"].flags == ["per_dataset"]


@pytest.mark.parametrize(
    "bands",
    [1, pytest.param(3)],
)
def test_nan_as_declared_nodata_stays_declared(site, bands):
    image = scene(bands, dtype="float32")
    image[:, ~hole()] = np.nan
    site.draw_image(image, nodata=np.nan)
    patch = site.extract()["patch_001"]
    assert np.array_equal(patch.valid, hole()[:PATCH, :PATCH])
    assert np.isnan(patch.profile["nodata"] or 0)


def test_a_nodata_that_bands_do_not_share_becomes_a_mask(site):
    image = scene()
    image[0] = np.where(hole(), image[0], 7777)
    site.draw_image(image)
    text = "".join(
        f'<VRTRasterBand dataType="UInt16" band="{band}">{nodata}<SimpleSource>'
        f"<SourceFilename>{site.image}</SourceFilename><SourceBand>{band}</SourceBand>"
        "</SimpleSource></VRTRasterBand>"
        for band, nodata in ((1, "<NoDataValue>7777</NoDataValue>"), (2, ""), (3, ""))
    )
    transform = ", ".join(map(str, TRANSFORM.to_gdal()))
    site.image = site.folder / "image.vrt"
    site.image.write_text(
        f'<VRTDataset rasterXSize="{SIZE}" rasterYSize="{SIZE}"><SRS>{CRS}</SRS>'
        f"<GeoTransform>{transform}</GeoTransform>{text}</VRTDataset>"
    )
    patches = site.extract()
    check_validity(patches, hole())
    assert patches["patch_001"].profile["nodata"] is None


def test_a_valid_scene_without_nodata_gets_no_mask(site):
    patches = site.extract()
    assert {tuple(patch.flags) for patch in patches.values()} == {("all_valid",)}


@pytest.mark.parametrize("nodata", [0, None])
def test_invalid_pixels_stay_invalid_in_a_resized_patch(site, nodata):
    valid = np.ones((SIZE, SIZE), bool)
    valid[:, :24] = False
    image = np.where(valid, scene(), 0 if nodata == 0 else 60_000).astype("uint16")
    site.draw_image(image, nodata=nodata, mask=None if nodata == 0 else valid)
    site.draw_grid([box(8, 8, 40, 40)])
    patch = site.only()
    assert np.array_equal(patch.valid, np.tile(np.arange(PATCH) >= 8, (PATCH, 1)))
    assert np.array_equal(patch.labelled, patch.valid)
    assert patch.image[:, patch.valid].max() <= 250


@pytest.mark.parametrize(
    ("low", "high", "dtype", "interpolation", "size"),
    [(-1, 1, "int16", "area", 8), (10, 250, "uint8", "cubic", 32)],
)
def test_valid_pixels_stay_valid_in_a_resized_patch(
    site, low, high, dtype, interpolation, size
):
    image = np.where(np.arange(SIZE) % 8 < 4, low, high).astype(dtype)
    if interpolation == "area":
        image = np.where(np.arange(SIZE) % 2, low, high).astype(dtype)
    site.draw_image(np.tile(image, (1, SIZE, 1)), nodata=0)
    site.draw_grid([box(16, 16, 32, 32)])
    assert site.only("--interpolation", interpolation, size=size).valid.all()


def test_four_bands_of_bytes_do_not_turn_into_colour_and_alpha(site):
    image = scene(4, dtype="uint8")
    image[3, :8] = 0
    site.draw_image(image, photometric="MINISBLACK", alpha="NO")
    patches = site.extract()
    assert all(patch.valid.all() for patch in patches.values())
    assert ColorInterp.alpha not in patches["patch_001"].colours
    assert np.array_equal(patches["patch_001"].image, image[:, :16, :16])


# --- bands -----------------------------------------------------------------------------------


def test_bands_are_chosen_and_ordered_by_number_or_description(site):
    described = ("B02 blue", "B03 green", "B04 red")
    for number, text in enumerate(("3,1", "B04, b02 blue", "b04,1")):
        site.draw_image(scene(), descriptions=described)
        site.out = site.folder / f"out{number}"
        patch = site.extract("--bands", text, "--save_metadata")["patch_001"]
        assert np.array_equal(patch.image, scene()[[2, 0], :16, :16])
        assert patch.descriptions == ("B04 red", "B02 blue")
        assert site.metadata()["bands"] == [
            {"band": 3, "description": "B04 red"},
            {"band": 1, "description": "B02 blue"},
        ]


def test_an_unknown_band_is_refused(site, capsys):
    assert "--bands 4:" in refusal(capsys, site, "--bands", "1,4")
    assert "'B99'" in refusal(capsys, site, "--bands", "B99")


def test_the_number_of_bands_is_checked(site, capsys):
    site.extract("--image_channels", 3)
    site.out = site.folder / "other"
    line = refusal(capsys, site, "--image_channels", 10)
    assert "--image_channels 10" in line
    assert "has 3 bands" in line
    assert len(site.extract("--image_channels", 2, "--bands", "1,3")) == 9


def test_an_alpha_band_that_is_chosen_by_number_is_a_channel_of_the_patch(site):
    roles = [ColorInterp.gray, ColorInterp.undefined, ColorInterp.alpha]
    site.draw_image(scene(dtype="uint8"), colours=roles)
    patch = site.extract("--bands", "1,2,3")["patch_001"]
    with rasterio.open(patch.image_path) as file:
        assert image_bands(file) == [1, 2, 3]
