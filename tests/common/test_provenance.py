"""What scenes say of their sensor and dates, and what is no such word."""

from __future__ import annotations

import numpy as np
import pytest
import rasterio
from helpers import write_raster

from common.provenance import Facts, facts_of_tags, joint_facts, scene_facts

PIXELS = np.ones((1, 8, 8), np.uint16)


def facts_of_file(path, **tags) -> Facts:
    """What a GeoTIFF with some tags says."""
    write_raster(path, PIXELS, tags=tags)
    with rasterio.open(path) as scene:
        return scene_facts(scene)


def test_a_stacked_scene_says_its_sensors_and_dates(tmp_path):
    tags = {"sensor": "Sentinel-2B,Sentinel-2A", "acquired": "2021-07-09,2021-06-19"}
    found = facts_of_file(tmp_path / "scene.tif", **tags)
    assert found.sensor == "Sentinel-2A,Sentinel-2B"
    assert found.acquired == ("2021-06-19", "2021-07-09")


@pytest.mark.parametrize(
    "tags, expected",
    [
        (
            # as GDAL's driver of Sentinel-2 writes them, and gdal_translate passes them on
            {
                "DATATAKE_1_SPACECRAFT_NAME": "Sentinel-2A",
                "PRODUCT_START_TIME": "2015-08-13T10:10:26.027Z",
                "GENERATION_TIME": "2015-08-18T10:14:40.000283Z",
            },
            Facts("Sentinel-2A", ("2015-08-13",)),
        ),
        (
            # as its driver of Sentinel-1 does
            {
                "SATELLITE_IDENTIFIER": "SENTINEL-1",
                "ACQUISITION_START_TIME": "2020-02-03T05:33:00.123456",
            },
            Facts("SENTINEL-1", ("2020-02-03",)),
        ),
        ({"sensor": "mine", "DATATAKE_1_SPACECRAFT_NAME": "no"}, Facts("mine")),
        ({"ACQUISITION_START_TIME": "UNK"}, Facts()),
        ({"acquired": "summer 2021, 2021-06-19"}, Facts(None, ("2021-06-19",))),
        ({"sensor": " , "}, Facts()),
        ({}, Facts()),
    ],
)
def test_tags_of_products_are_understood(tags, expected):
    assert facts_of_tags(tags) == expected


def test_the_time_when_a_file_was_written_is_no_date_of_its_pixels(tmp_path):
    found = facts_of_file(tmp_path / "a.tif", TIFFTAG_DATETIME="2021:06:19 10:10:31")
    assert found == Facts()


IMD = """version = "R";
BEGIN_GROUP = IMAGE_1
	satId = "WV02";
	firstLineTime = {};
END_GROUP = IMAGE_1
END;
"""


@pytest.mark.parametrize(
    "time, days",
    [("2010-04-29T01:36:22.107600Z", ("2010-04-29",)), ('"29 April 2010"', ())],
)
def test_metadata_beside_an_image_are_read_and_a_time_that_gdal_cannot_read_is_none(
    tmp_path, time, days
):
    write_raster(tmp_path / "scene.tif", PIXELS)
    (tmp_path / "scene.IMD").write_text(IMD.format(time))
    (tmp_path / "scene.RPB").write_text("")
    with rasterio.open(tmp_path / "scene.tif") as scene:
        assert scene_facts(scene) == Facts("WV02", days)


def test_facts_of_several_are_those_of_all_and_tags_give_them_back():
    parts = [
        Facts("Sentinel-2B", ("2021-07-09",)),
        Facts("Sentinel-2A,Sentinel-2B", ("2021-06-19", "2021-07-09")),
        Facts(),
    ]
    joint = joint_facts(parts)
    assert joint == Facts("Sentinel-2A,Sentinel-2B", ("2021-06-19", "2021-07-09"))
    assert facts_of_tags(joint.tags()) == joint
    assert Facts().tags() == {} and joint_facts([]) == Facts()
