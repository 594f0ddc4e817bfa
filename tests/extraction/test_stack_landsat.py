"""``stack`` of Landsat Collection 2 products."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
import rasterio
from stack_helpers import refused, stacked, write_landsat

from extraction.stack_landsat import parse_mtl

OLI_1 = "LC09_L1TP_198030_20220619_20230410_02_T1"
TM_1 = "LT05_L1TP_198030_19900619_20200915_02_T1"
TM_2 = "LT05_L2SP_198030_19900619_20200915_02_T1"
ETM_2 = "LE07_L2SP_198030_20010619_20200915_02_T1"


@pytest.fixture(scope="module")
def oli(tmp_path_factory) -> Path:
    """A Level-2 product that no test changes."""
    return write_landsat(tmp_path_factory.mktemp("oli"))


def test_level_2_keeps_its_integers_and_names(oli, tmp_path):
    said = stacked("--input", oli, "--output", tmp_path / "scene.vrt")
    with rasterio.open(tmp_path / "scene.vrt") as scene:
        assert scene.descriptions == tuple(f"SR_B{n}" for n in range(1, 8))
        assert scene.nodatavals == (0,) * 7 and scene.res == (30, 30)
        with rasterio.open(oli / f"{oli.name}_SR_B4.TIF") as file:
            assert (scene.read(4) == file.read(1)).all()
        tags = scene.tags()
    assert tags["sensor"] == "Landsat 8 OLI_TIRS" and tags["acquired"] == "2021-06-19"
    assert tags["tile"] == "198030" and tags["product"] == oli.name
    assert tags["values"] == "as in the files" and tags["values"] in said


@pytest.mark.parametrize(
    "product, sensor, names",
    [
        (OLI_1, "OLI_TIRS", ["B1", "B2", "B3", "B4", "B5", "B6", "B7"]),
        (TM_1, "TM", ["B1", "B2", "B3", "B4", "B5", "B7"]),
        (TM_2, "TM", ["SR_B1", "SR_B2", "SR_B3", "SR_B4", "SR_B5", "SR_B7"]),
        (ETM_2, "ETM", ["SR_B1", "SR_B2", "SR_B3", "SR_B4", "SR_B5", "SR_B7"]),
    ],
)
def test_the_reflective_bands_of_each_sensor_are_taken(
    tmp_path, product, sensor, names
):
    folder = write_landsat(tmp_path, product, sensor)
    stacked("--input", folder, "--output", tmp_path / "scene.vrt")
    with rasterio.open(tmp_path / "scene.vrt") as scene:
        assert list(scene.descriptions) == names
        assert set(scene.dtypes) == {"uint8" if product == TM_1 else "uint16"}


def test_pan_and_thermal_are_taken_when_named(tmp_path):
    folder = write_landsat(tmp_path, OLI_1)
    target = tmp_path / "scene.vrt"
    stacked("--input", folder, "--bands", "B8,B4,B10", "--output", target)
    with rasterio.open(target) as scene:
        assert scene.descriptions == ("B8", "B4", "B10")
        assert scene.res == (15, 15)
        assert (scene.read(2)[:, 1:] > 0).any()
        with rasterio.open(folder / f"{OLI_1}_B8.TIF") as pan:
            column, row = ~pan.transform * (scene.transform * (0, 0))
            window = rasterio.windows.Window(column, row, scene.width, scene.height)
            assert (scene.read(1) == pan.read(1, window=window)).all()


def test_quality_bits_become_the_mask(oli, tmp_path):
    stacked("--input", oli, "--cloud_mask", "--output", tmp_path / "scene.vrt")
    expected = np.ones((16, 16), bool)
    expected[:, 0] = False
    for place in (2, 4, 8, 10):  # cloud, shadow, dilated cloud, cirrus; not snow
        expected[place, place] = False
    with rasterio.open(tmp_path / "scene.vrt") as scene:
        assert ((scene.dataset_mask() > 0) == expected).all()
        assert "bits 0, 1, 2, 3, 4" in scene.tags()["mask"]


@pytest.mark.parametrize("metres, suffix", [(60, ".vrt"), (90, ".tif"), (45, ".tif")])
def test_coarser_pixels_that_hold_a_cloud_are_masked(oli, tmp_path, metres, suffix):
    target = tmp_path / f"scene{suffix}"
    words = "--cloud_mask", "--resolution", metres, "--output", target
    stacked("--input", oli, *words)
    clear = np.ones((16, 16), bool)
    clear[:, 0] = False
    for place in (2, 4, 8, 10):
        clear[place, place] = False
    # in pixels of 15 m, of which all sides are multiples
    clear, step = np.kron(clear, np.ones((2, 2), bool)), metres // 15
    count = 32 // step
    clear = clear[: count * step, : count * step].reshape(count, step, count, step)
    with rasterio.open(target) as scene:
        assert ((scene.dataset_mask() > 0) == clear.all(axis=(1, 3))).all()


def test_a_buffer_does_not_grow_fill(oli, tmp_path):
    options = "--cloud_mask", "--mask_buffer", "60", "--output", tmp_path / "scene.vrt"
    stacked("--input", oli, *options)
    with rasterio.open(tmp_path / "scene.vrt") as scene:
        valid = scene.dataset_mask() > 0
    assert not valid[2, 4] and not valid[4, 2]  # two pixels from the cloud
    assert valid[13:, 1].all()  # beside the fill


def test_a_tar_is_read_without_unpacking(oli, tmp_path):
    with tarfile.open(tmp_path / f"{oli.name}.tar", "w") as archive:
        for path in sorted(oli.iterdir()):
            archive.add(path, path.name)
    target = tmp_path / "scene.vrt"
    stacked("--input", tmp_path / f"{oli.name}.tar", "--cloud_mask", "--output", target)
    stacked("--input", oli, "--cloud_mask", "--output", tmp_path / "b.vrt")
    with rasterio.open(target) as one, rasterio.open(tmp_path / "b.vrt") as other:
        assert (one.read() == other.read()).all()
        assert (one.dataset_mask() == other.dataset_mask()).all()


def test_products_go_into_a_folder_by_path_and_row(oli, tmp_path):
    other = write_landsat(tmp_path, OLI_1)
    stacked("--input", oli, other, "--output", tmp_path / "scenes")
    names = sorted(path.name for path in (tmp_path / "scenes").iterdir())
    assert names == ["Image_198030_20210619.vrt", "Image_198030_20220619.vrt"]


def test_dates_whose_extents_differ_are_joined_over_what_they_share(oli, tmp_path):
    other = write_landsat(
        tmp_path, oli.name.replace("_20210619_", "_20210705_"), shift=2
    )
    target = tmp_path / "scene.vrt"
    options = "--bands", "SR_B4", "--join", "--cloud_mask", "--output", target
    stacked("--input", oli, other, *options)
    with rasterio.open(target) as scene:
        assert scene.descriptions == ("SR_B4_20210619", "SR_B4_20210705")
        assert scene.shape == (16, 14)
        with rasterio.open(oli / f"{oli.name}_SR_B4.TIF") as file:
            assert (scene.read(1) == file.read(1)[:, 2:]).all()
        with rasterio.open(other / f"{other.name}_SR_B4.TIF") as file:
            assert (scene.read(2) == file.read(1)[:, :-2]).all()
        mask = scene.dataset_mask() > 0
    # invalid on one of the dates is invalid: the first has its cloud at column 4 - 2, fill at 0
    assert not mask[4, 2] and not mask[4, 4] and not mask[:, 0].any()


@pytest.mark.parametrize(
    "before, after, words",
    [
        ("COLLECTION_NUMBER = 02", "COLLECTION_NUMBER = 01", "Collection 2"),
        ('SENSOR_ID = "OLI_TIRS"', 'SENSOR_ID = "MSS"', "sensor MSS"),
    ],
)
def test_other_collections_and_sensors_are_refused(tmp_path, before, after, words):
    folder = write_landsat(tmp_path)
    metadata = folder / f"{folder.name}_MTL.txt"
    metadata.write_text(metadata.read_text().replace(before, after))
    assert words in refused("--input", folder, "--output", tmp_path / "scene.vrt")


def test_an_incomplete_download_is_refused(tmp_path):
    folder = write_landsat(tmp_path)
    options = "--input", folder, "--output", tmp_path / "scene.vrt"
    (folder / f"{folder.name}_QA_PIXEL.TIF").unlink()
    assert "QA_PIXEL" in refused(*options, "--cloud_mask")
    (folder / f"{folder.name}_SR_B5.TIF").unlink()
    assert "lacks the file of SR_B5" in refused(*options)
    (folder / f"{folder.name}_MTL.txt").unlink()
    assert "*_MTL.txt" in refused(*options)


def test_a_file_that_is_cut_off_is_refused(tmp_path):
    folder = write_landsat(tmp_path)
    path = folder / f"{folder.name}_SR_B5.TIF"
    path.write_bytes(path.read_bytes()[:-200])
    said = refused("--input", folder, "--output", tmp_path / "scene.vrt")
    assert f"{path} is cut off" in said


def test_groups_of_the_metadata_are_kept_apart():
    groups = parse_mtl(
        'GROUP = A\n  GROUP = B\n    X = "1"\n  END_GROUP = B\n  GROUP = C\n    X = 2\n'
        "  END_GROUP = C\n  Y = 3\nEND_GROUP = A\nEND\n"
    )
    assert groups["B"] == {"X": "1"} and groups["C"] == {"X": "2"}
    assert groups["A"] == {"Y": "3"}
