"""Rasters: known answers on small ones, and what is refused."""

from __future__ import annotations

import math
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import rasterio
import tifffile
from helpers import write_geotiff
from raster_helpers import (
    CRS,
    RGBA,
    TRANSFORM,
    WHOLE,
    bands_of,
    described,
    invalid_pixels,
    ramp,
    rgba,
    write_vrt,
)
from rasterio.enums import ColorInterp
from rasterio.transform import Affine, from_origin
from rasterio.windows import Window

from common.errors import (
    RasterError,
)
from common.ground import pixel_areas
from common.pictures import (
    rgb_bands,
)
from common.rasters import (
    Source,
    gdal_options,
    image_bands,
    open_raster,
    require_georeference,
    same_pixel_grid,
)

# --- opening ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.tif", "a.TIFF", "without_suffix"])
def test_a_geotiff_is_opened(tmp_path, name):
    with open_raster(write_geotiff(tmp_path / name, ramp())) as file:
        np.testing.assert_array_equal(file.read(), ramp())


def test_a_path_may_be_a_text(tmp_path):
    with open_raster(str(write_geotiff(tmp_path / "a.tif", ramp()))) as file:
        assert file.count == 1


@pytest.mark.parametrize("name", ["a.vrt", "a.VRT"])
def test_a_vrt_under_its_own_name_is_opened(tmp_path, name):
    source = write_geotiff(tmp_path / "a.tif", ramp())
    with open_raster(write_vrt(tmp_path / name, [(source, None)])) as file:
        np.testing.assert_array_equal(file.read(), ramp())


def test_a_file_in_a_zip_is_opened(tmp_path):
    write_geotiff(tmp_path / "a.tif", ramp())
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tmp_path / "a.tif", "inner/a.tif")
    with open_raster(f"/vsizip/{tmp_path}/a.zip/inner/a.tif") as file:
        np.testing.assert_array_equal(file.read(), ramp())


@pytest.mark.parametrize("name", ["a.tif", "a.TIF", "a.tiff", "a.jp2", "a.img", "a"])
def test_a_vrt_under_another_name_is_refused(tmp_path, name):
    source = write_geotiff(tmp_path / "source.tif", ramp())
    disguised = write_vrt(tmp_path / name, [(source, None)])
    with pytest.raises(RasterError, match=name):
        open_raster(disguised)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RasterError, match=r"absent\.tif"):
        open_raster(tmp_path / "absent.tif")


@pytest.mark.parametrize("content", [b"", b"not a raster", b"II*\0", b"\x89PNG\r\n"])
@pytest.mark.parametrize("name", ["odd.tif", "odd.png", "odd.vrt"])
def test_a_file_that_is_no_raster_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RasterError, match=name):
        open_raster(tmp_path / name)


def test_a_folder_is_no_raster(tmp_path):
    (tmp_path / "folder.tif").mkdir()
    with pytest.raises(RasterError, match=r"folder\.tif"):
        open_raster(tmp_path / "folder.tif")


@pytest.mark.parametrize(
    "dtype",
    [
        "complex64",
        "complex128",
        pytest.param(
            "complex_int16",
        ),
    ],
)
def test_complex_numbers_are_refused(tmp_path, dtype):
    pixels = ramp(dtype="complex64")
    path = write_geotiff(tmp_path / "slc.tif", pixels, dtype=dtype)
    with pytest.raises(RasterError, match="complex"):
        open_raster(path)


def test_a_container_without_bands_of_its_own_asks_for_a_subdataset(tmp_path):
    path = tmp_path / "container.gpkg"
    profile = {"driver": "GPKG", "dtype": "uint8", "crs": CRS, "transform": TRANSFORM}
    for name in ("one", "two"):
        more = {"raster_table": name, "append_subdataset": "yes"}
        shape = {"count": 1, "height": 8, "width": 8}
        with rasterio.open(path, "w", **shape, **profile, **more) as file:
            file.write(ramp(dtype="uint8"))
    with pytest.raises(RasterError, match="subdataset"):
        open_raster(path)


@pytest.mark.parametrize("name", ["a.jp2", "a.vrt"])
def test_a_geotiff_under_the_name_of_another_format_is_refused(tmp_path, name):
    shutil.copy(write_geotiff(tmp_path / "a.tif", ramp()), tmp_path / name)
    with pytest.raises(RasterError, match=name):
        open_raster(tmp_path / name)


def test_a_description_of_a_map_server_under_another_name_is_refused(tmp_path):
    (tmp_path / "scene.jp2").write_text(
        '<GDAL_WMS><Service name="TMS"><ServerUrl>file:///nowhere/${z}/${x}/${y}.png'
        "</ServerUrl></Service><DataWindow><UpperLeftX>0</UpperLeftX><UpperLeftY>10"
        "</UpperLeftY><LowerRightX>10</LowerRightX><LowerRightY>0</LowerRightY>"
        "<TileLevel>1</TileLevel></DataWindow><BandsCount>3</BandsCount></GDAL_WMS>"
    )
    with pytest.raises(RasterError):
        open_raster(tmp_path / "scene.jp2")


def test_a_raster_without_crs_is_refused_where_one_is_needed(tmp_path):
    with rasterio.open(write_geotiff(tmp_path / "a.tif", ramp())) as file:
        require_georeference(file)
    path = write_geotiff(tmp_path / "b.tif", ramp(), crs=None)
    refused = pytest.raises(RasterError, match=r"b\.tif has no CRS")
    with rasterio.open(path) as file, refused:
        require_georeference(file)


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({}, True),
        ({"transform": TRANSFORM * Affine.translation(0.005, 0)}, True),
        ({"transform": TRANSFORM * Affine.translation(0.02, 0)}, False),
        ({"transform": TRANSFORM * Affine.translation(0, -1)}, False),
        ({"transform": TRANSFORM * Affine.scale(1.01)}, False),
        ({"transform": TRANSFORM * Affine.rotation(1)}, False),
        ({"crs": "EPSG:32632"}, False),
        ({"crs": None}, False),
    ],
)
def test_two_rasters_share_a_pixel_grid_up_to_a_hundredth_of_a_pixel(
    tmp_path, change, same
):
    one = write_geotiff(tmp_path / "a.tif", ramp())
    other = write_geotiff(tmp_path / "b.tif", ramp(), **change)
    with rasterio.open(one) as a, rasterio.open(other) as b:
        assert same_pixel_grid(a, b) is same
        assert same_pixel_grid(b, a) is same


def test_rasters_of_another_size_do_not_share_a_pixel_grid(tmp_path):
    one = write_geotiff(tmp_path / "a.tif", ramp())
    other = write_geotiff(tmp_path / "b.tif", ramp(size=9))
    with rasterio.open(one) as a, rasterio.open(other) as b:
        assert not same_pixel_grid(a, b)


def test_the_tolerance_of_a_pixel_grid_can_be_widened(tmp_path):
    shifted = TRANSFORM * Affine.translation(0.4, 0.4)
    one = write_geotiff(tmp_path / "a.tif", ramp())
    other = write_geotiff(tmp_path / "b.tif", ramp(), transform=shifted)
    with rasterio.open(one) as a, rasterio.open(other) as b:
        assert same_pixel_grid(a, b, 0.5)
        assert not same_pixel_grid(a, b, 0.3)


def areas_of(tmp_path, crs, transform, height: int = 4, width: int = 4):
    path = tmp_path / "a.tif"
    write_geotiff(path, np.ones((height, width), "uint8"), crs=crs, transform=transform)
    with rasterio.open(path) as file:
        return pixel_areas(file)


@pytest.mark.parametrize(
    ("crs", "unit", "origin"),
    [
        ("EPSG:32631", 1, (431_240, 4_912_560)),
        ("EPSG:32631+5773", 1, (431_240, 4_912_560)),
        ("EPSG:2263", 1200 / 3937, (981_000, 200_000)),
    ],
)
def test_a_pixel_of_a_projected_raster_has_its_size_in_square_metres(
    tmp_path, crs, unit, origin
):
    turned = from_origin(*origin, 10, 10) * Affine.rotation(30) * Affine.scale(1, 2)
    areas = areas_of(tmp_path, crs, turned)
    np.testing.assert_allclose(areas, [200 * unit**2] * 4, rtol=1e-3)


def test_the_pixels_of_the_whole_earth_in_degrees_sum_to_its_surface(tmp_path):
    areas = areas_of(tmp_path, "EPSG:4326", from_origin(-180, 90, 1, 1), 180, 360)
    assert areas.shape == (180,)
    assert areas.sum() * 360 == pytest.approx(510_065_621_724_089, rel=1e-6)
    np.testing.assert_allclose(areas, areas[::-1])
    assert areas[89] > 50 * areas[0]


def test_a_raster_that_lies_nowhere_has_no_pixel_areas(tmp_path):
    assert areas_of(tmp_path, None, TRANSFORM) is None


def test_rows_that_reach_half_a_pixel_beyond_the_poles_have_an_area(tmp_path):
    areas = areas_of(tmp_path, "EPSG:4326", from_origin(-180, 90.5, 1, 1), 181, 360)
    assert np.isfinite(areas).all()


@pytest.mark.parametrize(
    ("crs", "left", "top", "pixel", "expected"),
    [
        ("EPSG:3857", 0, 8_399_737.9, 10, 25.06),  # 60 degrees north: half as long
        ("EPSG:4807", 0, 50, 0.001, 7097),  # grads: 50 of them are 45 degrees
    ],
)
def test_a_pixel_is_measured_on_the_ground(tmp_path, crs, left, top, pixel, expected):
    areas = areas_of(tmp_path, crs, from_origin(left, top, pixel, pixel))
    assert areas[0] == pytest.approx(expected, rel=0.01)


# --- valid pixels ----------------------------------------------------------------------------


def test_without_any_mask_all_pixels_are_valid(tmp_path):
    path = write_geotiff(tmp_path / "a.tif", ramp(2) - 1)
    with open_raster(path) as file:
        image, valid = Source(file, [2, 1]).read(WHOLE)
    np.testing.assert_array_equal(image, (ramp(2) - 1)[::-1])
    assert image.dtype == np.uint16
    assert valid.dtype == bool
    assert valid.all()


IMPOSSIBLE = [
    ("uint16", 65535), ("int16", -32768), ("int16", 32767), ("int16", -1), ("int8", 127),
    ("int32", 2**31 - 1), ("float32", -9999), ("float32", 3.4028234663852886e38),
]  # fmt: skip
POSSIBLE = [
    ("uint8", 0), ("uint8", 255), ("uint16", 0), ("uint16", 255), ("int16", 0), ("float32", 0),
    ("uint16", 9999), ("uint32", 2**32 - 1), ("float32", 1),
]  # fmt: skip


@pytest.mark.fault(10)
@pytest.mark.parametrize(("dtype", "nodata"), IMPOSSIBLE + POSSIBLE)
def test_a_value_that_may_be_measured_is_nodata_only_in_all_bands(
    tmp_path, dtype, nodata
):
    pixels = np.full((3, 8, 8), 7, dtype)
    pixels[0, 1, 2] = pixels[2, 5, 6] = pixels[:, 3, 3] = nodata
    path = write_geotiff(tmp_path / "a.tif", pixels, nodata=nodata)
    some = {(1, 2), (5, 6)} if (dtype, nodata) in IMPOSSIBLE else set()
    assert invalid_pixels(path) == some | {(3, 3)}
    # all bands that are used
    assert invalid_pixels(path, [3, 2]) == some - {(1, 2)} | {(3, 3)}
    assert invalid_pixels(path, [1]) == {(1, 2), (3, 3)}


def test_nodata_of_a_band_that_is_not_read_does_not_matter(tmp_path):
    pixels = ramp(2)
    pixels[0, 1, 2] = pixels[1, 3, 4] = 0
    path = write_geotiff(tmp_path / "a.tif", pixels, nodata=0)
    assert invalid_pixels(path, [2]) == {(3, 4)}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("nodata", [None, math.nan, -9999])
def test_nan_and_infinity_are_invalid_beside_any_nodata_value(tmp_path, dtype, nodata):
    pixels = ramp(2, dtype=dtype)
    pixels[0, 0, 1], pixels[1, 2, 3], pixels[1, 4, 5] = np.nan, np.inf, -np.inf
    path = write_geotiff(tmp_path / "a.tif", pixels, nodata=nodata)
    assert invalid_pixels(path) == {(0, 1), (2, 3), (4, 5)}


def test_a_float_nodata_value_that_is_no_round_number_is_recognized(tmp_path):
    pixels = ramp(dtype="float32")
    pixels[0, 7, 7] = nodata = np.finfo(np.float32).min
    path = write_geotiff(tmp_path / "a.tif", pixels, nodata=float(nodata))
    assert invalid_pixels(path) == {(7, 7)}


def test_an_internal_mask_is_obeyed(tmp_path):
    seen = np.ones((8, 8), bool)
    seen[3, 4] = False
    path = write_geotiff(tmp_path / "a.tif", ramp(3), mask=seen)
    assert invalid_pixels(path) == {(3, 4)}


@pytest.mark.parametrize("bands", [None, [1], [3, 2]])
def test_pixels_of_alpha_zero_are_invalid_and_alpha_is_no_image_band(tmp_path, bands):
    pixels = rgba()
    pixels[3, 1, 1] = 0
    path = write_geotiff(tmp_path / "a.tif", pixels, colours=RGBA)
    assert invalid_pixels(path, bands) == {(1, 1)}
    with open_raster(path) as file:
        assert image_bands(file) == [1, 2, 3]


def test_all_bands_with_alpha_are_data(tmp_path):
    pixels = rgba()
    pixels[3, 1, 1] = 0
    path = write_geotiff(tmp_path / "a.tif", pixels, colours=RGBA)
    with open_raster(path) as file:
        image, valid = Source(file, [1, 2, 3, 4]).read(WHOLE)
    np.testing.assert_array_equal(image, pixels)
    assert valid.all()


@pytest.mark.parametrize(
    ("bands", "invalid"), [([1, 4], set()), ([1, 1, 1, 1], {(1, 1)})]
)
def test_alpha_masks_unless_it_is_read_as_data(tmp_path, bands, invalid):
    pixels = rgba()
    pixels[3, 1, 1] = 0
    path = write_geotiff(tmp_path / "a.tif", pixels, colours=RGBA)
    assert invalid_pixels(path, bands) == invalid


@pytest.mark.filterwarnings("ignore:The dataset's nodata attribute is shadowing")
def test_alpha_and_nodata_are_both_obeyed(tmp_path):
    pixels = rgba()
    pixels[3, 1, 1], pixels[:3, 2, 2] = 0, 0
    path = write_geotiff(tmp_path / "a.tif", pixels, colours=RGBA, nodata=0)
    assert invalid_pixels(path) == {(1, 1), (2, 2)}


def test_a_mask_band_and_nodata_are_both_obeyed(tmp_path):
    pixels, seen = ramp(2), np.ones((8, 8), bool)
    pixels[:, 2, 2], seen[1, 1] = 0, False
    path = write_geotiff(tmp_path / "a.tif", pixels, mask=seen, nodata=0)
    assert invalid_pixels(path) == {(1, 1), (2, 2)}


def test_the_bands_of_a_vrt_have_a_nodata_value_each(tmp_path):
    source = write_geotiff(tmp_path / "a.tif", ramp())
    bands = [(source, 1), (source, 10), (source, 65535), (source, None)]
    path = write_vrt(tmp_path / "a.vrt", bands)
    assert invalid_pixels(path) == set()  # no pixel is both 1 and 10
    assert invalid_pixels(path, [2, 4]) == {(1, 1)}  # a band without one has no say
    assert invalid_pixels(path, [2, 3]) == {(1, 1)}


@pytest.mark.parametrize("nodata", [-9999, 70_000, "nan"])
def test_a_nodata_value_beyond_the_dtype_makes_nothing_invalid(tmp_path, nodata):
    pixels = ramp()
    pixels[0, 0] = [0, 65535, 55537, 4464, 1, 2, 3, 4]  # as the value might wrap
    source = write_geotiff(tmp_path / "a.tif", pixels)
    assert invalid_pixels(write_vrt(tmp_path / "a.vrt", [(source, nodata)])) == set()


@pytest.mark.parametrize(
    ("dtypes", "common"),
    [
        (("uint8", "uint16"), "uint16"),
        (("uint8", "float32"), "float32"),
        (("float32", "uint16"), "float32"),
    ],
)
def test_bands_of_several_dtypes_are_read_in_one_that_holds_them_all(
    tmp_path, dtypes, common
):
    sources = [
        write_geotiff(tmp_path / f"{dtype}.tif", ramp(dtype=dtype)) for dtype in dtypes
    ]
    path = write_vrt(tmp_path / "a.vrt", [(source, 3) for source in sources])
    with open_raster(path) as file:
        image, valid = Source(file, [1, 2]).read(WHOLE)
        picture, _ = Source(file, [1, 2]).overview(8)
    assert image.dtype == picture.dtype == common
    np.testing.assert_array_equal(image, np.concatenate([ramp(), ramp()]))
    np.testing.assert_array_equal(picture, image)
    assert np.argwhere(~valid).tolist() == [[0, 2]]


def test_one_band_of_a_raster_of_several_dtypes_comes_in_its_own(tmp_path):
    sources = [
        write_geotiff(tmp_path / f"{dtype}.tif", ramp(dtype=dtype))
        for dtype in ("uint8", "float32")
    ]
    path = write_vrt(tmp_path / "a.vrt", [(source, None) for source in sources])
    with open_raster(path) as file:
        image, _ = Source(file, [1]).read(WHOLE)
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, ramp())


@pytest.mark.parametrize(
    "window",
    [
        Window(2, 3, 4, 5),
        Window(-3, -2, 6, 7),
        Window(5, 6, 9, 4),
        Window(-2, 1, 12, 3),
        Window(-5, -5, 20, 20),
    ],
)
def test_a_window_shows_the_padded_raster_with_the_padding_invalid(tmp_path, window):
    path = write_geotiff(tmp_path / "a.tif", ramp(2))
    with open_raster(path) as file:
        image, valid = Source(file, [1, 2]).read(window)
    padded = np.pad(ramp(2), ((0, 0), (20, 20), (20, 20)))
    rows = slice(window.row_off + 20, window.row_off + 20 + window.height)
    columns = slice(window.col_off + 20, window.col_off + 20 + window.width)
    np.testing.assert_array_equal(image, padded[:, rows, columns])
    np.testing.assert_array_equal(valid, padded[0, rows, columns] > 0)


@pytest.mark.parametrize("corner", [(8, 0), (0, 8), (-3, 0), (0, -4), (100, 100)])
def test_a_window_outside_the_raster_is_zero_and_invalid(tmp_path, corner):
    path = write_geotiff(tmp_path / "a.tif", ramp(2))
    with open_raster(path) as file:
        image, valid = Source(file, [1, 2]).read(Window(*corner, 3, 4))
    assert image.shape == (2, 4, 3)
    assert image.dtype == np.uint16
    assert not image.any()
    assert not valid.any()


def spoilt(path: Path) -> Path:
    """A compressed raster whose first block cannot be decoded."""
    noise = np.random.default_rng(0).integers(0, 9999, (2, 32, 32), "uint16")
    write_geotiff(path, noise, compress="deflate", blockysize=16)
    with tifffile.TiffFile(path) as tiff:
        start = tiff.pages.first.dataoffsets[0]
    content = bytearray(path.read_bytes())
    content[start : start + 200] = b"\xff" * 200
    path.write_bytes(content)
    return path


def test_a_block_that_cannot_be_read_is_an_error_that_names_the_file(tmp_path):
    refused = pytest.raises(RasterError, match=r"Cannot read .*bad\.tif")
    with open_raster(spoilt(tmp_path / "bad.tif")) as file, refused:
        Source(file, [1, 2]).read(Window(0, 0, 32, 32))


# --- bands -----------------------------------------------------------------------------------


def test_without_a_text_all_bands_are_selected(tmp_path):
    assert bands_of(described(tmp_path / "a.tif", "x", None, "y"), None) == [1, 2, 3]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3", [3]),
        ("3,1", [3, 1]),
        (" 2 , 2 ", [2, 2]),
        ("B04 red", [3]),
        ("b04 RED", [3]),
        ("B04,B02,b03", [3, 1, 2]),
        ("B05 red edge 1", [4]),
        ("4,B02 blue", [4, 1]),
    ],
)
def test_bands_are_selected_by_number_description_or_its_first_word(
    tmp_path, text, expected
):
    names = "B02 blue", "B03 green", "B04 red", "B05 red edge 1"
    assert bands_of(described(tmp_path / "a.tif", *names), text) == expected


def test_a_whole_description_is_preferred_to_a_first_word(tmp_path):
    path = described(tmp_path / "a.tif", "nir narrow", "nir")
    assert bands_of(path, "nir") == [2]


@pytest.mark.parametrize("text", ["0", "4", "1,9", "99999999999999999999"])
def test_a_number_beyond_the_bands_is_an_error_that_says_how_many_there_are(
    tmp_path, text
):
    path = described(tmp_path / "a.tif", "x", "y", "z")
    with pytest.raises(RasterError, match=r"a\.tif has bands 1 to 3"):
        bands_of(path, text)


@pytest.mark.parametrize("text", ["B09", "-1", "edge", "1.0", "²"])
def test_an_unknown_description_is_an_error_that_lists_the_known_ones(tmp_path, text):
    path = described(tmp_path / "a.tif", "B04 red", None)
    with pytest.raises(RasterError, match=r"0 bands .*\(b04 red, -\)"):
        bands_of(path, text)


@pytest.mark.parametrize("text", ["red", "RED"])
def test_an_ambiguous_description_is_an_error(tmp_path, text):
    path = described(tmp_path / "a.tif", "red 10 m", "red 20 m")
    with pytest.raises(RasterError, match="2 bands"):
        bands_of(path, text)


@pytest.mark.parametrize("text", ["", "1,", "1,,1", " "])
def test_an_empty_band_name_is_an_error(tmp_path, text):
    path = described(tmp_path / "a.tif", None)
    with pytest.raises(RasterError):
        bands_of(path, text)


def test_blanks_around_a_description_do_not_matter(tmp_path):
    assert bands_of(described(tmp_path / "a.tif", " B04 red ", "x"), "B04 red") == [1]


def test_a_raster_of_nothing_but_alpha_has_no_bands_to_select(tmp_path):
    path = write_geotiff(tmp_path / "a.tif", rgba()[3], colours=[ColorInterp.alpha])
    with pytest.raises(RasterError):
        bands_of(path, None)


@pytest.mark.parametrize(
    ("descriptions", "expected"),
    [
        (["B02 blue", "B03 green", "B04 red", "B05 red edge 1"], [3, 2, 1]),
        (["red edge", "Blue", "Green", "Red"], [4, 3, 2]),
        (["rededge", "red-edge", "blue", "green", "red"], [5, 4, 3]),
        (["infrared", "red", "green", "blue"], [2, 3, 4]),
        (["B1", "B2", "B3", "B4", "B8"], [4, 3, 2]),
        (["B01", "B02", "B03", "B04", "B8A"], [4, 3, 2]),
        (["B12", "B04", "B03", "B02", "B11"], [2, 3, 4]),
        ([f"B{n}" for n in (1, 2, 3, 4, 5, 6, 7)], [4, 3, 2]),  # Landsat 8
        ([f"B{n}" for n in (1, 2, 3, 4, 5, 7)], [3, 2, 1]),  # Landsat 4 to 7
        ([f"b{n}" for n in (7, 5, 4, 3, 2, 1)], [4, 5, 6]),
        (["red", "green", "nir"], [1, 2, 3]),  # no blue
        ([None, None, None, None], [1, 2, 3]),
        (["VV", "VH"], [1]),
        ([None], [1]),
    ],
)
def test_true_colour_is_found_by_description(descriptions, expected):
    assert rgb_bands(descriptions) == expected


@pytest.mark.parametrize(
    ("descriptions", "expected"),
    [
        (["coastal blue", "blue", "green", "yellow", "red"], [5, 3, 2]),
        (["coastal_blue", "blue", "green_i", "green", "yellow", "red"], [6, 4, 2]),
        (["near infra-red", "red", "green", "blue"], [2, 3, 4]),
    ],
)
def test_a_plain_colour_is_preferred_to_a_qualified_one(descriptions, expected):
    assert rgb_bands(descriptions) == expected


def test_colour_interpretation_comes_before_descriptions():
    colours = [ColorInterp.blue, ColorInterp.green, ColorInterp.red]
    assert rgb_bands(["red", "green", "blue"], colours) == [3, 2, 1]


def test_an_incomplete_colour_interpretation_is_passed_over():
    colours = [ColorInterp.gray, ColorInterp.undefined, ColorInterp.red]
    assert rgb_bands(["blue", "green", "red"], colours) == [3, 2, 1]


# --- overviews -------------------------------------------------------------------------------


def test_an_overview_is_the_raster_thinned_to_a_longest_side(tmp_path):
    pixels = np.zeros((2, 64, 32), np.uint16)
    pixels[0], pixels[1, :32], pixels[1, 32:] = 1, 5, 9
    pixels[:, :, :16] = 0
    path = write_geotiff(tmp_path / "a.tif", pixels, nodata=0)
    with open_raster(path) as file:
        image, valid = Source(file, [2, 1]).overview(longest=16)
    assert image.shape == (2, 16, 8)
    assert image.dtype == np.uint16
    np.testing.assert_array_equal(image[0, :, 4:], [[5] * 4] * 8 + [[9] * 4] * 8)
    assert not valid[:, :4].any()
    assert valid[:, 4:].all()


def test_an_overview_does_not_enlarge_and_knows_nan(tmp_path):
    pixels = ramp(2, dtype="float32")
    pixels[1, 3, 3] = np.nan
    with open_raster(write_geotiff(tmp_path / "a.tif", pixels)) as file:
        image, valid = Source(file, [1, 2]).overview()
    np.testing.assert_array_equal(image, pixels)
    assert np.argwhere(~valid).tolist() == [[3, 3]]


def test_an_overview_of_a_very_long_raster_has_a_row_at_least(tmp_path):
    path = write_geotiff(tmp_path / "a.tif", np.ones((2, 64), np.uint8))
    with open_raster(path) as file:
        image, valid = Source(file, [1]).overview(longest=8)
    assert image.shape == (1, 1, 8)
    assert valid.shape == (1, 8)


def test_an_overview_of_an_unreadable_block_is_an_error_that_names_the_file(tmp_path):
    refused = pytest.raises(RasterError, match=r"bad\.tif")
    with open_raster(spoilt(tmp_path / "bad.tif")) as file, refused:
        Source(file, [1]).overview()


def test_the_block_cache_holds_rows_of_blocks():
    from rasterio.env import get_gdal_config

    with rasterio.Env(**gdal_options()):
        assert 2**27 <= int(get_gdal_config("GDAL_CACHEMAX")) <= 2**29  # bytes
