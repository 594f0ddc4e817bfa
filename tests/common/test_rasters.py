"""rasters.py: known answers on small rasters, and what is refused."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
import weakref
import zipfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import rasterio
import tifffile
from helpers import ROOT
from rasterio.enums import ColorInterp
from rasterio.transform import Affine, from_origin
from rasterio.windows import Window

from common.console import add_settings, settings_from
from common.errors import (
    DatasetError,
    OptionError,
    RasterError,
    SegmentationError,
    require,
    unknown_name,
)
from common.files import atomic_write, umask, write_json
from common.ground import pixel_areas
from common.interruption import interruptible
from common.labels import (
    class_name_tags,
    class_names_of,
    read_label,
    require_one_band,
    whole_labels,
)
from common.options import setting
from common.patches import PatchPair, list_pairs, patch_root, read_patch
from common.pictures import (
    class_colours,
    colour_map,
    draw_panels,
    rgb_bands,
    save_figure,
    stretch,
)
from common.rasters import (
    GDAL_OPTIONS,
    Source,
    image_bands,
    open_raster,
    pixel_bounds,
    require_georeference,
    same_pixel_grid,
    select_bands,
    window_starts,
    window_within,
)
from common.tiffs import TiffHeader, list_tiffs, tiff_header

CRS = "EPSG:32631"
TRANSFORM = from_origin(431_240, 4_912_560, 10, 10)
WHOLE = Window(0, 0, 8, 8)
RGBA = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]
VRT_TYPES = {"uint8": "Byte", "uint16": "UInt16", "float32": "Float32"}


# --- helpers --------------------------------------------------------------------------------


def ramp(bands: int = 1, size: int = 8, dtype="uint16") -> np.ndarray:
    """(bands, size, size); the values count from 1, and no two pixels of a band are equal."""
    count = np.arange(1, size * size + 1).reshape(size, size)
    return np.stack([count + 100 * band for band in range(bands)]).astype(dtype)


def write_raster(
    path: Path, pixels, descriptions=None, colours=None, mask=None, **profile
) -> Path:
    """Write (C, H, W) or (H, W) pixels as a GeoTIFF with a CRS and an off-origin transform."""
    pixels = np.asarray(pixels)
    pixels = pixels[None] if pixels.ndim == 2 else pixels
    count, height, width = pixels.shape
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = {"dtype": pixels.dtype, "crs": CRS, "transform": TRANSFORM} | profile
    shape = {"count": count, "height": height, "width": width}
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(path, "w", driver="GTiff", **shape, **profile) as file,
    ):
        if descriptions:
            file.descriptions = descriptions
        if colours:
            file.colorinterp = colours
        file.write(pixels)
        if mask is not None:
            file.write_mask(mask)
    return path


def write_vrt(path: Path, bands: list[tuple[Path, float | str | None]]) -> Path:
    """A VRT whose bands are the first bands of files, each with its own nodata value."""
    text = ""
    for number, (source, nodata) in enumerate(bands, start=1):
        with rasterio.open(source) as file:
            kind, (height, width) = VRT_TYPES[file.dtypes[0]], file.shape
        text += f'<VRTRasterBand dataType="{kind}" band="{number}">'
        text += "" if nodata is None else f"<NoDataValue>{nodata}</NoDataValue>"
        text += f"<SimpleSource><SourceFilename>{source}</SourceFilename>"
        text += "<SourceBand>1</SourceBand></SimpleSource></VRTRasterBand>"
    transform = ", ".join(map(str, TRANSFORM.to_gdal()))
    path.write_text(
        f'<VRTDataset rasterXSize="{width}" rasterYSize="{height}"><SRS>{CRS}</SRS>'
        f"<GeoTransform>{transform}</GeoTransform>{text}</VRTDataset>"
    )
    return path


def invalid_pixels(path: Path, bands=None, window: Window = WHOLE) -> set:
    """(row, column) of the invalid pixels of a window."""
    with open_raster(path) as file:
        chosen = bands or image_bands(file)
        _, valid = Source(file, chosen).read(window)
    return {tuple(place) for place in np.argwhere(~valid).tolist()}


def described(path: Path, *descriptions: str | None) -> Path:
    """A raster whose bands have these descriptions."""
    return write_raster(path, ramp(len(descriptions)), descriptions)


def bands_of(path: Path, text: str | None) -> list[int]:
    with open_raster(path) as file:
        return select_bands(file, text)


def write_patches(folder: Path, names=("a", "b"), suffix=".tif") -> Path:
    """Image-label pairs in ``folder/images`` and ``folder/labels``."""
    for name in names:
        write_raster(folder / "images" / f"{name}{suffix}", ramp(2))
        write_raster(folder / "labels" / f"{name}{suffix}", ramp() % 3, dtype="uint8")
    return folder


def write_pair(folder: Path, image=None, label=None, image_more=None, label_more=None):
    """One pair; what is not given is 8 px of valid pixels."""
    image = ramp(2) if image is None else image
    label = ramp(dtype="uint8") % 3 if label is None else label
    return PatchPair(
        write_raster(folder / "image.tif", image, **(image_more or {})),
        write_raster(folder / "label.tif", label, **(label_more or {})),
    )


# --- the module -----------------------------------------------------------------------------


def test_importing_rasters_imports_nothing_slow():
    slow = "{'torch', 'cv2', 'scipy', 'geopandas', 'matplotlib', 'tifffile'}"
    code = f"import sys; from common import rasters; print({slow} & set(sys.modules) or 'none')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout.strip(), done.stderr) == ("none", "")


@pytest.mark.parametrize("kind", [RasterError, DatasetError, OptionError])
def test_every_error_is_one_that_the_user_can_mend_and_a_value_error(kind):
    assert issubclass(kind, SegmentationError)
    assert issubclass(kind, ValueError)


def test_an_unknown_name_is_answered_with_the_nearest_known_one():
    error = unknown_name("model", "Unett", ["unet", "fpn", "pan"])
    assert isinstance(error, OptionError)
    message = "Unknown model 'Unett'; did you mean 'unet'? (unet, fpn, pan)"
    assert str(error) == message


def test_an_unknown_name_like_no_other_gets_no_suggestion():
    assert "did you mean" not in str(unknown_name("model", "zzz", ["unet"]))


def test_a_long_list_of_known_names_is_counted_only():
    message = str(unknown_name("encoder", "x", [f"e{i}" for i in range(25)]))
    assert "25 names are known" in message
    assert "e24" not in message


def test_a_name_that_differs_in_case_only_is_suggested():
    error = unknown_name("--label_column", "Class", ["OTHER", "CLASS"])
    assert "did you mean 'CLASS'" in str(error)


# --- settings -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    root: str = setting(help="folder", group="data")
    classes: int = setting(2, "how many", "data", alias="--num_classes")
    rate: float = setting(1e-3, "step size")
    augment: bool = setting(False, "vary the patches")
    mode: str = setting("a", "which one", choices=("a", "b"))
    channels: int | None = setting(None, "bands", shown="those of the data")
    limits: tuple[float, ...] = setting((0.0, 1.0), "range", nargs=2)


def parser_of(config_class) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="prog")
    add_settings(parser, config_class)
    return parser


def settings_of(*words: str) -> Settings:
    return settings_from(Settings, parser_of(Settings).parse_args(words))


def test_settings_that_are_not_given_have_the_defaults_of_the_dataclass():
    assert settings_of("--root", "data") == Settings("data")


def test_settings_that_are_given_get_the_type_of_their_field():
    data = ["--root", "d", "--classes", "6", "--rate", "0.5", "--augment"]
    more = ["--mode", "b", "--channels", "4", "--limits", "2", "3"]
    expected = Settings("d", 6, 0.5, True, "b", 4, [2.0, 3.0])
    assert settings_of(*data, *more) == expected


def test_an_alias_sets_the_field_that_it_belongs_to():
    assert settings_of("--root", "d", "--num_classes", "7").classes == 7


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "required: --root"),
        (["--root", "d", "--mode", "c"], "invalid choice: 'c'"),
        (["--root", "d", "--classes", "two"], "invalid int value: 'two'"),
        (["--root", "d", "--channels", "x"], "invalid int value: 'x'"),
        (["--root", "d", "--augment", "yes"], "unrecognized arguments: yes"),
    ],
)
def test_a_wrong_command_line_exits_with_status_2(words, complaint, capsys):
    with pytest.raises(SystemExit) as stop:
        settings_of(*words)
    assert stop.value.code == 2
    assert complaint in capsys.readouterr().err


def test_help_lists_groups_defaults_and_words_for_a_default_found_later():
    text = parser_of(Settings).format_help()
    assert "\ndata:\n" in text
    assert "--num_classes CLASSES" in text and "--classes" in text
    assert "(default: 0.001)" in text
    assert "(default: those of the data)" in text
    assert "(default: False)" not in text
    assert "(default: None)" not in text


def test_require_passes_what_holds_and_names_option_value_and_expectation_otherwise():
    require(True, "--epochs", 3, "at least 1")
    with pytest.raises(OptionError, match=r"^--epochs 0: expected at least 1$"):
        require(False, "--epochs", 0, "at least 1")


# --- opening --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.tif", "a.TIFF", "without_suffix"])
def test_a_geotiff_is_opened(tmp_path, name):
    with open_raster(write_raster(tmp_path / name, ramp())) as file:
        np.testing.assert_array_equal(file.read(), ramp())


def test_a_path_may_be_a_text(tmp_path):
    with open_raster(str(write_raster(tmp_path / "a.tif", ramp()))) as file:
        assert file.count == 1


@pytest.mark.parametrize("name", ["a.vrt", "a.VRT"])
def test_a_vrt_under_its_own_name_is_opened(tmp_path, name):
    source = write_raster(tmp_path / "a.tif", ramp())
    with open_raster(write_vrt(tmp_path / name, [(source, None)])) as file:
        np.testing.assert_array_equal(file.read(), ramp())


def test_a_file_in_a_zip_is_opened(tmp_path):
    write_raster(tmp_path / "a.tif", ramp())
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tmp_path / "a.tif", "inner/a.tif")
    with open_raster(f"/vsizip/{tmp_path}/a.zip/inner/a.tif") as file:
        np.testing.assert_array_equal(file.read(), ramp())


@pytest.mark.parametrize("name", ["a.tif", "a.TIF", "a.tiff", "a.jp2", "a.img", "a"])
def test_a_vrt_under_another_name_is_refused(tmp_path, name):
    source = write_raster(tmp_path / "source.tif", ramp())
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
    path = write_raster(tmp_path / "slc.tif", pixels, dtype=dtype)
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
    shutil.copy(write_raster(tmp_path / "a.tif", ramp()), tmp_path / name)
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
    with rasterio.open(write_raster(tmp_path / "a.tif", ramp())) as file:
        require_georeference(file)
    path = write_raster(tmp_path / "b.tif", ramp(), crs=None)
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
    one = write_raster(tmp_path / "a.tif", ramp())
    other = write_raster(tmp_path / "b.tif", ramp(), **change)
    with rasterio.open(one) as a, rasterio.open(other) as b:
        assert same_pixel_grid(a, b) is same
        assert same_pixel_grid(b, a) is same


def test_rasters_of_another_size_do_not_share_a_pixel_grid(tmp_path):
    one = write_raster(tmp_path / "a.tif", ramp())
    other = write_raster(tmp_path / "b.tif", ramp(size=9))
    with rasterio.open(one) as a, rasterio.open(other) as b:
        assert not same_pixel_grid(a, b)


def test_the_tolerance_of_a_pixel_grid_can_be_widened(tmp_path):
    shifted = TRANSFORM * Affine.translation(0.4, 0.4)
    one = write_raster(tmp_path / "a.tif", ramp())
    other = write_raster(tmp_path / "b.tif", ramp(), transform=shifted)
    with rasterio.open(one) as a, rasterio.open(other) as b:
        assert same_pixel_grid(a, b, 0.5)
        assert not same_pixel_grid(a, b, 0.3)


def areas_of(tmp_path, crs, transform, height: int = 4, width: int = 4):
    path = tmp_path / "a.tif"
    write_raster(path, np.ones((height, width), "uint8"), crs=crs, transform=transform)
    with rasterio.open(path) as file:
        return pixel_areas(file)


@pytest.mark.parametrize(
    ("crs", "unit"),
    [("EPSG:32631", 1), ("EPSG:32631+5773", 1), ("EPSG:2263", 1200 / 3937)],
)
def test_a_pixel_of_a_projected_raster_has_its_size_in_square_metres(
    tmp_path, crs, unit
):
    turned = TRANSFORM * Affine.rotation(30) * Affine.scale(1, 2)
    areas = areas_of(tmp_path, crs, turned)
    np.testing.assert_allclose(areas, [200 * unit**2] * 4, rtol=1e-6)


def test_the_pixels_of_the_whole_earth_in_degrees_sum_to_its_surface(tmp_path):
    areas = areas_of(tmp_path, "EPSG:4326", from_origin(-180, 90, 1, 1), 180, 360)
    assert areas.shape == (180,)
    assert areas.sum() * 360 == pytest.approx(510_065_621_724_089, rel=1e-6)
    np.testing.assert_allclose(areas, areas[::-1])
    assert areas[89] > 50 * areas[0]


@pytest.mark.parametrize("crs", [None, 'LOCAL_CS["site",UNIT["metre",1]]'])
def test_a_raster_that_lies_nowhere_on_earth_has_no_pixel_areas(tmp_path, crs):
    assert areas_of(tmp_path, crs, TRANSFORM) is None


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


# --- valid pixels ---------------------------------------------------------------------------


def test_without_any_mask_all_pixels_are_valid(tmp_path):
    path = write_raster(tmp_path / "a.tif", ramp(2) - 1)
    with open_raster(path) as file:
        image, valid = Source(file, [2, 1]).read(WHOLE)
    np.testing.assert_array_equal(image, (ramp(2) - 1)[::-1])
    assert image.dtype == np.uint16
    assert valid.dtype == bool
    assert valid.all()


def test_nodata_in_any_band_makes_a_pixel_invalid(tmp_path):
    pixels = ramp(3)
    pixels[0, 1, 2] = pixels[2, 5, 6] = 0
    path = write_raster(tmp_path / "a.tif", pixels, nodata=0)
    assert invalid_pixels(path) == {(1, 2), (5, 6)}


def test_nodata_of_a_band_that_is_not_read_does_not_matter(tmp_path):
    pixels = ramp(2)
    pixels[0, 1, 2] = pixels[1, 3, 4] = 0
    path = write_raster(tmp_path / "a.tif", pixels, nodata=0)
    assert invalid_pixels(path, [2]) == {(3, 4)}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("nodata", [None, math.nan, -9999])
def test_nan_and_infinity_are_invalid_beside_any_nodata_value(tmp_path, dtype, nodata):
    pixels = ramp(2, dtype=dtype)
    pixels[0, 0, 1], pixels[1, 2, 3], pixels[1, 4, 5] = np.nan, np.inf, -np.inf
    path = write_raster(tmp_path / "a.tif", pixels, nodata=nodata)
    assert invalid_pixels(path) == {(0, 1), (2, 3), (4, 5)}


def test_a_float_nodata_value_that_is_no_round_number_is_recognized(tmp_path):
    pixels = ramp(dtype="float32")
    pixels[0, 7, 7] = nodata = np.finfo(np.float32).min
    path = write_raster(tmp_path / "a.tif", pixels, nodata=float(nodata))
    assert invalid_pixels(path) == {(7, 7)}


def test_an_internal_mask_is_obeyed(tmp_path):
    seen = np.ones((8, 8), bool)
    seen[3, 4] = False
    path = write_raster(tmp_path / "a.tif", ramp(3), mask=seen)
    assert invalid_pixels(path) == {(3, 4)}


@pytest.mark.parametrize("bands", [None, [1], [3, 2]])
def test_pixels_of_alpha_zero_are_invalid_and_alpha_is_no_image_band(tmp_path, bands):
    pixels = ramp(4)
    pixels[3, 1, 1] = 0
    path = write_raster(tmp_path / "a.tif", pixels, colours=RGBA)
    assert invalid_pixels(path, bands) == {(1, 1)}
    with open_raster(path) as file:
        assert image_bands(file) == [1, 2, 3]


def test_all_bands_with_alpha_are_data(tmp_path):
    pixels = ramp(4)
    pixels[3, 1, 1] = 0
    path = write_raster(tmp_path / "a.tif", pixels, colours=RGBA)
    with open_raster(path) as file:
        image, valid = Source(file, [1, 2, 3, 4]).read(WHOLE)
    np.testing.assert_array_equal(image, pixels)
    assert valid.all()


@pytest.mark.parametrize(
    ("bands", "invalid"), [([1, 4], set()), ([1, 1, 1, 1], {(1, 1)})]
)
def test_alpha_masks_unless_it_is_read_as_data(tmp_path, bands, invalid):
    pixels = ramp(4)
    pixels[3, 1, 1] = 0
    path = write_raster(tmp_path / "a.tif", pixels, colours=RGBA)
    assert invalid_pixels(path, bands) == invalid


@pytest.mark.filterwarnings("ignore:The dataset's nodata attribute is shadowing")
def test_alpha_and_nodata_are_both_obeyed(tmp_path):
    pixels = ramp(4)
    pixels[3, 1, 1], pixels[:3, 2, 2] = 0, 0
    path = write_raster(tmp_path / "a.tif", pixels, colours=RGBA, nodata=0)
    assert invalid_pixels(path) == {(1, 1), (2, 2)}


def test_a_mask_band_and_nodata_are_both_obeyed(tmp_path):
    pixels, seen = ramp(2), np.ones((8, 8), bool)
    pixels[:, 2, 2], seen[1, 1] = 0, False
    path = write_raster(tmp_path / "a.tif", pixels, mask=seen, nodata=0)
    assert invalid_pixels(path) == {(1, 1), (2, 2)}


def test_the_bands_of_a_vrt_have_a_nodata_value_each(tmp_path):
    source = write_raster(tmp_path / "a.tif", ramp())
    bands = [(source, 1), (source, 10), (source, None)]
    path = write_vrt(tmp_path / "a.vrt", bands)
    assert invalid_pixels(path) == {(0, 0), (1, 1)}
    assert invalid_pixels(path, [2, 3]) == {(1, 1)}


@pytest.mark.parametrize("nodata", [-9999, 70_000, "nan"])
def test_a_nodata_value_beyond_the_dtype_makes_nothing_invalid(tmp_path, nodata):
    pixels = ramp()
    pixels[0, 0] = [0, 65535, 55537, 4464, 1, 2, 3, 4]  # as the value might wrap
    source = write_raster(tmp_path / "a.tif", pixels)
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
        write_raster(tmp_path / f"{dtype}.tif", ramp(dtype=dtype)) for dtype in dtypes
    ]
    path = write_vrt(tmp_path / "a.vrt", [(source, 3) for source in sources])
    with open_raster(path) as file:
        image, valid = Source(file, [1, 2]).read(WHOLE)
        picture, _ = Source(file, [1, 2]).overview(8)
    assert image.dtype == picture.dtype == common
    np.testing.assert_array_equal(image, np.concatenate([ramp(), ramp()]))
    np.testing.assert_array_equal(picture, image)
    assert np.argwhere(~valid).tolist() == [[0, 2]]


def test_one_band_of_a_raster_of_several_dtypes_comes_in_the_common_one(tmp_path):
    sources = [
        write_raster(tmp_path / f"{dtype}.tif", ramp(dtype=dtype))
        for dtype in ("uint8", "float32")
    ]
    path = write_vrt(tmp_path / "a.vrt", [(source, None) for source in sources])
    with open_raster(path) as file:
        image, _ = Source(file, [1]).read(WHOLE)
    assert image.dtype == np.float32
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
    path = write_raster(tmp_path / "a.tif", ramp(2))
    with open_raster(path) as file:
        image, valid = Source(file, [1, 2]).read(window)
    padded = np.pad(ramp(2), ((0, 0), (20, 20), (20, 20)))
    rows = slice(window.row_off + 20, window.row_off + 20 + window.height)
    columns = slice(window.col_off + 20, window.col_off + 20 + window.width)
    np.testing.assert_array_equal(image, padded[:, rows, columns])
    np.testing.assert_array_equal(valid, padded[0, rows, columns] > 0)


@pytest.mark.parametrize("corner", [(8, 0), (0, 8), (-3, 0), (0, -4), (100, 100)])
def test_a_window_outside_the_raster_is_zero_and_invalid(tmp_path, corner):
    path = write_raster(tmp_path / "a.tif", ramp(2))
    with open_raster(path) as file:
        image, valid = Source(file, [1, 2]).read(Window(*corner, 3, 4))
    assert image.shape == (2, 4, 3)
    assert image.dtype == np.uint16
    assert not image.any()
    assert not valid.any()


def spoilt(path: Path) -> Path:
    """A compressed raster whose first block cannot be decoded."""
    noise = np.random.default_rng(0).integers(0, 9999, (2, 32, 32), "uint16")
    write_raster(path, noise, compress="deflate", blockysize=16)
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


# --- bands ----------------------------------------------------------------------------------


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


@pytest.mark.parametrize("text", ["B09", "-1", "1-3", "edge", "1.0", "²"])
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
    path = write_raster(tmp_path / "a.tif", ramp(), colours=[ColorInterp.alpha])
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


# --- windows --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        (Window(1, 2, 3, 4), Window(1, 2, 3, 4)),
        (Window(-2, -3, 5, 5), Window(0, 0, 3, 2)),
        (Window(8, 4, 5, 5), Window(8, 4, 2, 2)),
        (Window(-5, -5, 50, 50), Window(0, 0, 10, 6)),
        (Window(10, 0, 2, 2), None),
        (Window(0, -2, 2, 2), None),
        (Window(3, 3, 0, 2), None),
    ],
)
def test_window_within_is_the_overlap_with_the_raster_or_none(window, expected):
    assert window_within(window, 10, 6) == expected


@pytest.mark.parametrize("patch_size", [1, 3, 8, 32])
@pytest.mark.parametrize("overlap", [0, 1, 2, 16])
def test_windows_cover_every_length_once_each_and_end_at_the_edge(patch_size, overlap):
    stride = max(1, patch_size - overlap)
    for length in range(1, 100):
        starts = window_starts(length, patch_size, stride)
        assert starts == sorted(set(starts))
        assert starts[0] == 0
        assert all(b - a <= stride for a, b in pairwise(starts))
        if length >= patch_size:
            assert starts[-1] + patch_size == length
            assert len(starts) == math.ceil((length - patch_size) / stride) + 1
        else:
            assert starts == [0]


def test_a_pixel_belongs_to_bounds_that_hold_its_centre():
    assert pixel_bounds((0.25, 1.75, 3.25, 4.75)) == Window(0, 2, 3, 3)
    assert pixel_bounds((-2.25, -0.75, 1, 2)) == Window(-2, -1, 3, 3)


def test_adjacent_cells_share_no_pixel_and_leave_no_gap():
    rng = np.random.default_rng(0)
    halves = np.arange(-6, 7) / 2
    for edges in (halves, *np.sort(rng.uniform(-20, 20, (200, 12)))):
        cells = [
            pixel_bounds((left, left, right, right)) for left, right in pairwise(edges)
        ]
        for one, other in pairwise(cells):
            assert one.col_off + one.width == other.col_off
            assert one.row_off + one.height == other.row_off


@pytest.mark.parametrize("edge", [-3, 0, 7, 7.5])
def test_projection_noise_moves_no_edge(edge):
    windows = {
        pixel_bounds((edge + noise, edge - noise, 20 + noise, 20 - noise))
        for noise in (-4e-4, -1e-9, 0, 1e-9, 4e-4)
    }
    assert len(windows) == 1


# --- labels ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32", "float64"])
def test_whole_labels_of_any_dtype_become_int64(dtype):
    label = np.array([[0, 3], [7, 9]], dtype)
    whole = whole_labels(label, np.ones((2, 2), bool), "a.tif")
    assert whole.dtype == np.int64
    assert whole.tolist() == [[0, 3], [7, 9]]


def test_a_fraction_among_the_labels_is_an_error_that_names_file_and_value():
    label = np.array([[0, 1.5]], np.float32)
    with pytest.raises(DatasetError, match=r"a\.tif holds 1\.5"):
        whole_labels(label, np.ones((1, 2), bool), "a.tif")


def test_a_fraction_or_nan_that_is_invalid_is_no_error():
    label = np.array([[0.5, np.nan, 4]], np.float32)
    valid = np.array([[False, False, True]])
    assert whole_labels(label, valid, "a.tif").tolist() == [[0, 0, 4]]


def test_a_float_label_beyond_all_integers_does_not_wrap_around():
    label = np.array([[1, 3.4e38]], np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = whole_labels(label, np.ones((1, 2), bool), "a.tif")
    assert whole[0, 1] > 2**32


def test_nodata_and_the_outside_of_a_label_are_unlabelled(tmp_path):
    label = ramp(dtype="uint8") % 5
    path = write_raster(tmp_path / "a.tif", label, nodata=4)
    with open_raster(path) as file:
        read = read_label(Source(file), 77, Window(-1, 0, 9, 8))
    assert read.dtype == np.int64
    assert (read[:, 0] == 77).all()
    np.testing.assert_array_equal(read[:, 1:], np.where(label[0] == 4, 77, label[0]))


def test_nan_in_a_float_label_is_unlabelled(tmp_path):
    label = ramp(dtype="float32")
    label[0, 2, 3] = np.nan
    with open_raster(write_raster(tmp_path / "a.tif", label)) as file:
        read = read_label(Source(file), 255, WHOLE)
    assert read[2, 3] == 255
    assert np.count_nonzero(read == ramp()[0]) == 63


def test_a_label_has_one_band(tmp_path):
    with open_raster(write_raster(tmp_path / "one.tif", ramp())) as file:
        require_one_band(file)
    refused = pytest.raises(DatasetError, match=r"two\.tif has 2 bands")
    path = write_raster(tmp_path / "two.tif", ramp(2))
    with open_raster(path) as file, refused:
        require_one_band(file)


@pytest.mark.parametrize(
    "label_first",
    [
        True,
        pytest.param(
            False,
        ),
    ],
)
def test_a_label_may_have_an_alpha_band_beside_its_own(tmp_path, label_first):
    alpha = np.full((8, 8), 255, "uint8")
    alpha[0, 0] = 0
    pixels = np.stack([ramp(dtype="uint8")[0] % 3, alpha])
    colours = [ColorInterp.gray, ColorInterp.alpha]
    if not label_first:
        pixels, colours = pixels[::-1], colours[::-1]
    path = write_raster(tmp_path / "a.tif", pixels, colours=colours)
    with open_raster(path) as file:
        require_one_band(file)
        read = read_label(Source(file), 99, WHOLE)
    expected = ramp()[0] % 3
    expected[0, 0] = 99
    np.testing.assert_array_equal(read, expected)


# --- patch folders --------------------------------------------------------------------------


def test_the_splits_may_lie_in_patch_or_directly_in_the_root(tmp_path):
    direct = tmp_path / "direct"
    write_patches(direct / "train")
    write_patches(tmp_path / "nested" / "Patch" / "train")
    assert patch_root(direct) == direct
    assert patch_root(tmp_path / "nested") == tmp_path / "nested" / "Patch"
    for root in (direct, str(tmp_path / "nested")):
        pairs = list_pairs(root, "train")
        assert [pair.name for pair in pairs] == ["a", "b"]


def test_a_root_that_is_no_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    for name in ("absent", "file"):
        with pytest.raises(DatasetError, match=f"No folder .*{name}"):
            patch_root(tmp_path / name)


def test_tiffs_are_listed_by_stem_in_order_whatever_the_case_of_their_suffix(tmp_path):
    names = ["c.TIFF", "a.tif", "b.Tif", "d.tiff"]
    others = [".hidden.tif", "._a.tif", "a.tif.aux.xml", "a.png", "readme", "tif"]
    for name in (*names, *others):
        (tmp_path / name).touch()
    listed = list_tiffs(tmp_path)
    assert list(listed) == ["a", "b", "c", "d"]
    assert {path.name for path in listed.values()} == set(names)


def test_a_missing_folder_lists_no_tiffs(tmp_path):
    assert list_tiffs(tmp_path / "absent") == {}


def test_two_files_of_one_stem_are_an_error(tmp_path):
    (tmp_path / "a.tif").touch()
    (tmp_path / "a.TIFF").touch()
    with pytest.raises(DatasetError, match="same stem"):
        list_tiffs(tmp_path)


def test_image_and_label_pair_by_stem_whatever_their_suffixes(tmp_path):
    train = write_patches(tmp_path / "train", ["a"])
    (train / "labels" / "a.tif").rename(train / "labels" / "a.TIFF")
    (pair,) = list_pairs(tmp_path, "train")
    assert pair.name == "a"
    assert pair.image == train / "images" / "a.tif"
    assert pair.label == train / "labels" / "a.TIFF"


@pytest.mark.parametrize(
    ("folder", "complaint"),
    [("labels", r"images/b\.tif has no label"), ("images", r"labels/b\.tif has no im")],
)
def test_an_unmatched_file_is_named(tmp_path, folder, complaint):
    train = write_patches(tmp_path / "train", ["a", "b", "c"])
    (train / folder / "b.tif").unlink()
    with pytest.raises(DatasetError, match=complaint):
        list_pairs(tmp_path, "train")


def test_unmatched_files_are_counted(tmp_path):
    train = write_patches(tmp_path / "train", ["a", "b", "c"])
    for name in ("b", "c"):
        (train / "labels" / f"{name}.tif").unlink()
    with pytest.raises(DatasetError, match=r"b\.tif .*\(2 such files\)"):
        list_pairs(tmp_path, "train")


def test_a_split_without_images_is_an_error_unless_it_may_be_missing(tmp_path):
    write_patches(tmp_path / "train")
    (tmp_path / "test" / "images").mkdir(parents=True)
    for split in ("validation", "test"):
        assert list_pairs(tmp_path, split, required=False) == []
        with pytest.raises(DatasetError, match=rf"{split}/images \(looked for \.tif"):
            list_pairs(tmp_path, split)


@pytest.mark.parametrize("required", [True, False])
def test_labels_without_any_image_are_an_error(tmp_path, required):
    shutil.rmtree(write_patches(tmp_path / "test") / "images")
    with pytest.raises(DatasetError, match="No images found"):
        list_pairs(tmp_path, "test", required)


@pytest.mark.parametrize("interleave", ["band", "pixel"])
@pytest.mark.parametrize("more", [{}, {"compress": "deflate"}, {"BIGTIFF": "YES"}])
def test_the_header_of_a_patch_gives_bands_size_and_dtype(tmp_path, interleave, more):
    pixels = np.zeros((3, 16, 24), np.float32)
    path = write_raster(tmp_path / "a.tif", pixels, interleave=interleave, **more)
    assert tiff_header(path) == TiffHeader(3, 16, 24, "float32")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("more", [{}, {"compress": "deflate", "blockysize": 16}])
def test_a_patch_that_is_cut_off_is_an_error_that_names_it(tmp_path, share, more):
    noise = np.random.default_rng(0).integers(0, 9999, (3, 64, 64), "uint16")
    content = write_raster(tmp_path / "whole.tif", noise, **more).read_bytes()
    (tmp_path / "cut.tif").write_bytes(content[: int(share * len(content))])
    with pytest.raises(DatasetError, match=r"cut\.tif"):
        tiff_header(tmp_path / "cut.tif")


@pytest.mark.parametrize("content", [b"", b"I", b"no TIFF at all", b"\0" * 64])
def test_a_patch_that_is_no_tiff_is_an_error_that_names_it(tmp_path, content):
    (tmp_path / "odd.tif").write_bytes(content)
    with pytest.raises(DatasetError, match=r"odd\.tif"):
        tiff_header(tmp_path / "odd.tif")


@pytest.mark.parametrize("length", [2, 4, 7])
def test_a_patch_cut_off_within_its_first_bytes_is_an_error(tmp_path, length):
    content = write_raster(tmp_path / "whole.tif", ramp()).read_bytes()
    (tmp_path / "cut.tif").write_bytes(content[:length])
    with pytest.raises(DatasetError, match=r"cut\.tif"):
        tiff_header(tmp_path / "cut.tif")


def test_a_patch_cut_off_within_its_tags_is_an_error(tmp_path):
    nodata = -3.4028234e38  # a long text, stored apart from its tag
    pixels = np.full((3, 32, 32), nodata, np.float32)
    whole = write_raster(tmp_path / "whole.tif", pixels, nodata=nodata)
    with rasterio.open(whole, "r+") as file:  # moves the header to the end
        file.descriptions = "B02 blue", "B03 green", "B04 red"
    with tifffile.TiffFile(whole) as tiff:
        tag = tiff.pages.first.tags["GDAL_NODATA"]
        assert tag.valueoffset > tiff.pages.first.dataoffsets[-1]
    (tmp_path / "cut.tif").write_bytes(whole.read_bytes()[: tag.valueoffset])
    with pytest.raises(DatasetError, match=r"cut\.tif"):
        tiff_header(tmp_path / "cut.tif")


def test_a_patch_is_read_with_its_validity_and_its_mask(tmp_path):
    image, label = ramp(2), ramp(dtype="uint8") % 3
    image[1, 0, 0] = 0
    label[0, 7, 7] = 9
    pair = write_pair(tmp_path, image, label, {"nodata": 0}, {"nodata": 9})
    read, valid, mask = read_patch(pair)
    np.testing.assert_array_equal(read, image)
    assert read.dtype == np.uint16
    assert np.argwhere(~valid).tolist() == [[0, 0]]
    expected = label[0].astype(np.int64)
    expected[0, 0] = expected[7, 7] = 255
    np.testing.assert_array_equal(mask, expected)
    assert mask.dtype == np.int64


def test_a_patch_takes_the_ignore_index_that_is_asked_for(tmp_path):
    pair = write_pair(tmp_path, image_more={"nodata": 1})
    assert read_patch(pair, ignore_index=-1)[2][0, 0] == -1


def test_the_alpha_band_of_a_patch_is_its_validity_and_no_channel(tmp_path):
    image = ramp(4)
    image[3, 2, 2] = 0
    pair = write_pair(tmp_path, image, image_more={"colours": RGBA})
    read, valid, mask = read_patch(pair)
    np.testing.assert_array_equal(read, image[:3])
    assert np.argwhere(~valid).tolist() == [[2, 2]]
    assert mask[2, 2] == 255


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"label": ramp(size=9, dtype="uint8")}, "8 x 8 pixels but its label is 9 x 9"),
        ({"label": ramp(2, dtype="uint8")}, r"label\.tif has 2 bands"),
        ({"label": ramp(dtype="float32") / 4}, r"label\.tif holds 0\.25"),
        ({"label_more": {"crs": "EPSG:32632"}}, "different ground"),
        (
            {"label_more": {"transform": TRANSFORM * Affine.translation(1, 0)}},
            "different ground",
        ),
    ],
)
def test_an_image_and_a_label_that_do_not_fit_are_an_error(tmp_path, change, complaint):
    pair = write_pair(tmp_path, **change)
    with pytest.raises(DatasetError, match=complaint):
        read_patch(pair)


@pytest.mark.parametrize("which", ["image_more", "label_more"])
def test_a_patch_of_which_one_file_has_no_crs_is_read(tmp_path, which):
    pair = write_pair(tmp_path, **{which: {"crs": None}})
    assert read_patch(pair)[1].all()


@pytest.mark.parametrize("which", ["image", "label"])
def test_a_file_of_a_pair_that_is_unreadable_is_named(tmp_path, which):
    pair = write_pair(tmp_path)
    getattr(pair, which).write_text("no raster")
    with pytest.raises(RasterError, match=rf"{which}\.tif"):
        read_patch(pair)


def test_class_names_are_read_as_they_were_stored(tmp_path):
    names = ["water", "forêt, mixte", 'a "b"']
    path = write_raster(tmp_path / "a.tif", ramp())
    with rasterio.open(path) as file:
        assert class_names_of(file) is None
    with rasterio.open(path, "r+") as file:
        file.update_tags(**class_name_tags(names))
    with rasterio.open(path) as file:
        assert class_names_of(file) == names


@pytest.mark.parametrize("text", ["water,forest", "3", '{"0": "water"}'])
def test_a_tag_of_that_name_from_another_program_gives_no_class_names(tmp_path, text):
    path = write_raster(tmp_path / "a.tif", ramp())
    with rasterio.open(path, "r+") as file:
        file.update_tags(CLASS_NAMES=text)
    with rasterio.open(path) as file:
        assert class_names_of(file) is None


# --- files that appear whole ----------------------------------------------------------------


def test_a_file_gets_its_name_when_it_is_whole(tmp_path):
    target = tmp_path / "new" / "folder" / "result.txt"
    with atomic_write(target) as part:
        part.write_text("half")
        assert part.parent == target.parent
        assert not target.exists()
    assert target.read_text() == "half"
    assert os.listdir(target.parent) == ["result.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_no_file(tmp_path, error):
    with pytest.raises(error), atomic_write(tmp_path / "result.txt") as part:
        part.write_text("half")
        raise error
    assert os.listdir(tmp_path) == []


def test_an_error_keeps_the_former_file(tmp_path):
    target = tmp_path / "result.txt"
    target.write_text("former")
    with pytest.raises(KeyError), atomic_write(target) as part:
        part.write_text("half")
        raise KeyError
    assert target.read_text() == "former"
    assert os.listdir(tmp_path) == ["result.txt"]


def test_a_former_file_is_replaced(tmp_path):
    target = tmp_path / "result.txt"
    target.write_text("former")
    with atomic_write(str(target)) as part:
        part.write_text("new")
    assert target.read_text() == "new"


def test_a_name_as_long_as_the_file_system_allows_can_be_written(tmp_path):
    target = tmp_path / ("x" * 251 + ".txt")
    with atomic_write(target) as part:
        part.write_text("long")
    assert target.read_text() == "long"


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0, 0o666)])
def test_permissions_follow_the_umask(tmp_path, mask, mode):
    former = os.umask(mask)
    try:
        with atomic_write(tmp_path / "result.txt") as part:
            part.write_text("text")
        assert umask() == mask
    finally:
        os.umask(former)
    assert (tmp_path / "result.txt").stat().st_mode & 0o777 == mode


def test_a_new_raster_is_not_shown_by_the_overviews_of_the_former_one(tmp_path):
    target = write_raster(tmp_path / "map.tif", np.full((64, 64), 1, "uint8"))
    with rasterio.Env(TIFF_USE_OVR=True), rasterio.open(target, "r+") as file:
        file.build_overviews([4])
    with atomic_write(target) as part:
        write_raster(part, np.full((64, 64), 2, "uint8"))
    with open_raster(target) as file:
        picture, _ = Source(file, [1]).overview(16)
    assert np.unique(picture).tolist() == [2]


def test_json_is_written_as_any_reader_accepts_it(tmp_path):
    content = {"scores": [0.5, None], "name": "forêt"}
    write_json(tmp_path / "a.json", content)
    assert json.loads((tmp_path / "a.json").read_bytes()) == content


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_takes_no_nan_and_no_infinity(tmp_path, value):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"score": value})
    assert os.listdir(tmp_path) == []


# --- colours and pictures -------------------------------------------------------------------


def test_every_class_has_a_colour_of_its_own_that_is_not_white():
    for count in range(2, 301):
        colours = class_colours(count)
        assert len(colours) == len(set(colours)) == count
        assert (255, 255, 255) not in colours
        assert all(isinstance(v, int) and 0 <= v <= 255 for c in colours for v in c)


def test_a_class_keeps_its_colour_whatever_the_number_of_classes():
    most = class_colours(300)
    for count in range(3, 300):
        assert class_colours(count) == most[:count]


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int64"])
@pytest.mark.parametrize("num_classes", [1, 2, 6, 300])
def test_a_colour_map_shows_classes_in_their_colours_and_the_rest_white(
    dtype, num_classes
):
    labels = np.array([[0, 1, 5], [100, 255 if dtype == "uint8" else 999, 0]], dtype)
    if dtype != "uint8":
        labels[1, 2] = -1
    picture = colour_map(labels, num_classes)
    assert picture.shape == (2, 3, 3)
    assert picture.dtype == np.uint8
    colours = class_colours(num_classes)[:num_classes]
    for shown, label in zip(picture.reshape(-1, 3).tolist(), labels.flat):
        known = 0 <= label < num_classes
        assert tuple(shown) == (colours[label] if known else (255, 255, 255))


def test_stretch_runs_from_the_2nd_to_the_98th_percentile_of_valid_pixels():
    image = np.arange(10_000, dtype=np.float64).reshape(1, 100, 100)
    image = np.concatenate([image, -image, image * 1e4 + 7]).round()
    valid = np.ones((100, 100), bool)
    valid[:10] = False
    picture = stretch(image, valid)
    assert picture.shape == (100, 100, 3)
    assert picture.dtype == np.uint8
    assert (picture[:10] == 255).all()
    shown = picture[valid].astype(int)
    assert np.count_nonzero(shown == 0, axis=0) == pytest.approx(180, abs=50)
    np.testing.assert_allclose(np.median(shown, axis=0), 127, atol=1)
    assert (np.diff(shown[:, 0]) >= 0).all()
    assert (np.diff(shown[:, 1]) <= 0).all()
    assert shown.min(axis=0).tolist() == [0, 0, 0]
    assert shown.max(axis=0).tolist() == [255, 255, 255]


def test_stretch_shows_a_single_band_in_grey():
    picture = stretch(ramp(), np.ones((8, 8), bool))
    assert (picture == picture[..., :1]).all()
    assert np.unique(picture).size > 32


def test_stretch_of_nothing_valid_is_white_and_of_a_constant_is_even():
    nothing = stretch(ramp(3), np.zeros((8, 8), bool))
    assert (nothing == 255).all()
    even = stretch(np.full((1, 8, 8), 7), np.ones((8, 8), bool))
    assert np.unique(even).size == 1


def test_stretch_does_not_depend_on_the_unit_of_the_image():
    valid = np.ones((8, 8), bool)
    image = ramp(dtype="float64")
    expected = stretch(image, valid).astype(int)
    shown = stretch(image * 1e-9, valid).astype(int)
    np.testing.assert_allclose(shown, expected, atol=1)


def test_an_overview_is_the_raster_thinned_to_a_longest_side(tmp_path):
    pixels = np.zeros((2, 64, 32), np.uint16)
    pixels[0], pixels[1, :32], pixels[1, 32:] = 1, 5, 9
    pixels[:, :, :16] = 0
    path = write_raster(tmp_path / "a.tif", pixels, nodata=0)
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
    with open_raster(write_raster(tmp_path / "a.tif", pixels)) as file:
        image, valid = Source(file, [1, 2]).overview()
    np.testing.assert_array_equal(image, pixels)
    assert np.argwhere(~valid).tolist() == [[3, 3]]


def test_an_overview_of_a_very_long_raster_has_a_row_at_least(tmp_path):
    path = write_raster(tmp_path / "a.tif", np.ones((2, 64), np.uint8))
    with open_raster(path) as file:
        image, valid = Source(file, [1]).overview(longest=8)
    assert image.shape == (1, 1, 8)
    assert valid.shape == (1, 8)


def test_an_overview_of_an_unreadable_block_is_an_error_that_names_the_file(tmp_path):
    refused = pytest.raises(RasterError, match=r"bad\.tif")
    with open_raster(spoilt(tmp_path / "bad.tif")) as file, refused:
        Source(file, [1]).overview()


def panel(title: str = "scene", **more) -> dict:
    return {"title": title, "picture": np.zeros((8, 8, 3), np.uint8), **more}


def test_panels_are_stored_as_a_png(tmp_path):
    import matplotlib.image

    target = tmp_path / "new" / "picture.png"
    legend = [("water", (0, 0, 255)), ("forest", (0, 128, 0))]
    save_figure(draw_panels([panel()], legend, "Title"), target)
    assert target.read_bytes().startswith(b"\x89PNG")
    pixels = matplotlib.image.imread(target)[..., :3]
    for colour in ((0, 0, 0), (0, 0, 1), (0, 128 / 255, 0)):  # picture and both keys
        assert np.isclose(pixels, colour, atol=0.01).all(axis=-1).any()


def test_panels_lie_in_rows_with_titles_legend_and_colour_bar():
    confidence = {
        "picture": 0.3 + np.eye(8) / 2,
        "limits": (0, 1),
        "title": "confidence",
    }
    legend = [("water", (0, 0, 255))]
    panels = [panel("image"), panel("map"), confidence]
    figure = draw_panels(panels, legend, "Title", columns=2)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["image", "map", "confidence", ""]  # the last is the colour bar
    assert figure.axes[2].images[0].get_clim() == (0, 1)
    assert figure.get_suptitle() == "Title"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["water"]
    spec = figure.axes[2].get_subplotspec()
    assert (spec.rowspan.start, spec.colspan.start) == (1, 0)


@pytest.mark.parametrize("where", ["panel", "legend", "title"])
def test_names_with_dollar_signs_are_drawn_as_they_are(tmp_path, where):
    name = r"scene_$\x_{$"
    figure = draw_panels(
        [panel(name if where == "panel" else "scene")],
        [(name if where == "legend" else "water", (0, 0, 255))],
        name if where == "title" else "Title",
    )
    save_figure(figure, tmp_path / "a.png")
    assert (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("panels", "classes"),
    [
        (3, 8),
        (2, 8),
        (3, 254),
    ],
)
def test_the_legend_lies_in_the_figure_and_leaves_room_for_the_panels(panels, classes):
    legend = [(f"land cover {number}", (0, 0, 255)) for number in range(classes)]
    figure = draw_panels([panel()] * panels, legend)
    figure.draw_without_rendering()
    box, paper = figure.legends[0].get_window_extent(), figure.bbox
    assert paper.x0 <= box.x0 and box.x1 <= paper.x1
    assert paper.y0 <= box.y0 and box.y1 <= paper.y1
    assert figure.axes[0].get_window_extent().width > 100


def test_the_block_cache_holds_rows_of_blocks():
    from rasterio.env import get_gdal_config

    with rasterio.Env(**GDAL_OPTIONS):
        assert 2**27 <= int(get_gdal_config("GDAL_CACHEMAX")) <= 2**29  # bytes


# --- interruptions --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name
)
def test_an_interruption_that_python_drops_comes_again(number):
    class Thing:
        pass

    def wait() -> None:
        until = time.monotonic() + 30
        while time.monotonic() < until:
            time.sleep(0.01)

    thing, former = Thing(), sys.unraisablehook
    # an exception in what is called when a thing goes reaches nobody
    watched = weakref.ref(thing, lambda _: signal.raise_signal(number))
    with pytest.raises(KeyboardInterrupt), interruptible():
        del thing
        assert watched() is None
        wait()
    assert sys.unraisablehook is former


def test_other_exceptions_that_python_drops_are_told_as_ever(monkeypatch):
    class Thing:
        def __del__(self):
            raise ValueError("told")

    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    with interruptible():
        Thing()
    assert [one.exc_type for one in told] == [ValueError]
