"""Labels and the folders of patches."""

from __future__ import annotations

import shutil
import warnings

import numpy as np
import pytest
import rasterio
import tifffile
from helpers import write_geotiff
from raster_helpers import (
    RGBA,
    TRANSFORM,
    WHOLE,
    ramp,
    rgba,
    write_pair,
    write_patches,
)
from rasterio.enums import ColorInterp
from rasterio.transform import Affine
from rasterio.windows import Window

from common.errors import (
    DatasetError,
    RasterError,
)
from common.labels import (
    class_name_tags,
    class_names_of,
    read_label,
    require_one_band,
    whole_labels,
)
from common.patches import list_pairs, patch_root, read_patch
from common.rasters import (
    Source,
    open_raster,
)
from common.tiffs import TiffHeader, list_tiffs, tiff_header

# --- labels ----------------------------------------------------------------------------------


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
    path = write_geotiff(tmp_path / "a.tif", label, nodata=4)
    with open_raster(path) as file:
        read = read_label(Source(file), 77, Window(-1, 0, 9, 8))
    assert read.dtype == np.int64
    assert (read[:, 0] == 77).all()
    np.testing.assert_array_equal(read[:, 1:], np.where(label[0] == 4, 77, label[0]))


def test_nan_in_a_float_label_is_unlabelled(tmp_path):
    label = ramp(dtype="float32")
    label[0, 2, 3] = np.nan
    with open_raster(write_geotiff(tmp_path / "a.tif", label)) as file:
        read = read_label(Source(file), 255, WHOLE)
    assert read[2, 3] == 255
    assert np.count_nonzero(read == ramp()[0]) == 63


def test_a_label_has_one_band(tmp_path):
    with open_raster(write_geotiff(tmp_path / "one.tif", ramp())) as file:
        require_one_band(file)
    refused = pytest.raises(
        DatasetError, match=r"two\.tif has 2 bands; a label or a class map has one"
    )
    path = write_geotiff(tmp_path / "two.tif", ramp(2))
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
    path = write_geotiff(tmp_path / "a.tif", pixels, colours=colours)
    with open_raster(path) as file:
        require_one_band(file)
        read = read_label(Source(file), 99, WHOLE)
    expected = ramp()[0] % 3
    expected[0, 0] = 99
    np.testing.assert_array_equal(read, expected)


# --- patch folders ---------------------------------------------------------------------------


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
    path = write_geotiff(tmp_path / "a.tif", pixels, interleave=interleave, **more)
    assert tiff_header(path) == TiffHeader(3, 16, 24, "float32")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("more", [{}, {"compress": "deflate", "blockysize": 16}])
def test_a_patch_that_is_cut_off_is_an_error_that_names_it(tmp_path, share, more):
    noise = np.random.default_rng(0).integers(0, 9999, (3, 64, 64), "uint16")
    content = write_geotiff(tmp_path / "whole.tif", noise, **more).read_bytes()
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
    content = write_geotiff(tmp_path / "whole.tif", ramp()).read_bytes()
    (tmp_path / "cut.tif").write_bytes(content[:length])
    with pytest.raises(DatasetError, match=r"cut\.tif"):
        tiff_header(tmp_path / "cut.tif")


def test_a_patch_cut_off_within_its_tags_is_an_error(tmp_path):
    nodata = -3.4028234e38  # a long text, stored apart from its tag
    pixels = np.full((3, 32, 32), nodata, np.float32)
    whole = write_geotiff(tmp_path / "whole.tif", pixels, nodata=nodata)
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
    image[:, 0, 0] = image[1, 0, 1] = 0
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
    pair = write_pair(tmp_path, ramp(1), image_more={"nodata": 1})
    assert read_patch(pair, ignore_index=-1)[2][0, 0] == -1


def test_the_alpha_band_of_a_patch_is_its_validity_and_no_channel(tmp_path):
    image = rgba()
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
        ({"label_more": {"crs": "EPSG:32632"}}, "the same ground"),
        (
            {"label_more": {"transform": TRANSFORM * Affine.translation(1, 0)}},
            "the same ground",
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
    path = write_geotiff(tmp_path / "a.tif", ramp())
    with rasterio.open(path) as file:
        assert class_names_of(file) is None
    with rasterio.open(path, "r+") as file:
        file.update_tags(**class_name_tags(names))
    with rasterio.open(path) as file:
        assert class_names_of(file) == names


@pytest.mark.parametrize("text", ["water,forest", "3", '{"0": "water"}'])
def test_a_tag_of_that_name_from_another_program_gives_no_class_names(tmp_path, text):
    path = write_geotiff(tmp_path / "a.tif", ramp())
    with rasterio.open(path, "r+") as file:
        file.update_tags(CLASS_NAMES=text)
    with rasterio.open(path) as file:
        assert class_names_of(file) is None
