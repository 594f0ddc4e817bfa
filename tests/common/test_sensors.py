"""Names of bands: what they mean, and which bands of two scenes are the same."""

from __future__ import annotations

import pytest

from common.errors import DatasetError
from common.sensors import SENSORS, common_names, match_bands, sensor_of

S2 = ["B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12"]


@pytest.mark.parametrize(
    ("text", "sensor"),
    [
        ("Sentinel 2", "sentinel2"),
        ("sentinel_2a", "sentinel2"),
        ("Sentinel-2 MSI", "sentinel2"),
        ("Sentinel-1A SAR", "sentinel1"),
        ("Sentinel-2A", "sentinel2"),
        ("Sentinel-2A,Sentinel-2B", "sentinel2"),
        ("sentinel-2c", "sentinel2"),
        ("Sentinel-1A", "sentinel1"),
        ("Landsat 8 OLI_TIRS", "landsat-oli"),
        ("landsat-9", "landsat-oli"),
        ("Landsat 7 ETM", "landsat-etm"),
        ("Landsat 5 TM", "landsat-tm"),
        ("landsat-oli", "landsat-oli"),
        ("Landsat 5 MSS", None),
        ("Landsat 8 OLI_TIRS,Sentinel-2A", None),
        ("PlanetScope", None),
        ("", None),
        (None, None),
    ],
)
def test_what_scenes_say_of_their_sensor_is_understood(text, sensor):
    assert sensor_of(text) == sensor


def test_a_scene_of_sentinel2_is_known_by_a_name_that_only_it_has():
    expected = "blue green red rededge1 rededge2 rededge3 nir nir_narrow swir1 swir2"
    assert common_names(S2) == expected.split()
    assert common_names(["b8a", "B2"]) == ["nir_narrow", "blue"]


def test_leading_zeros_and_prefixes_say_the_sensor():
    assert common_names(["B02", "B03", "B04", "B08"]) == ["blue", "green", "red", "nir"]
    oli = [f"SR_B{number}" for number in range(1, 8)]
    assert common_names(oli) == [SENSORS["landsat-oli"][f"B{n}"] for n in range(1, 8)]
    assert common_names(["SR_B4", "ST_B6"]) == ["nir", "thermal"]


def test_names_that_mean_different_things_are_not_guessed():
    assert common_names(["B2", "B3", "B4"]) == ["?", "?", "?"]
    assert common_names(["B2", "B3", "B4"], "landsat-etm") == ["green", "red", "nir"]
    assert common_names(["B2", "B3", "B4"], "landsat-oli") == ["blue", "green", "red"]


def test_words_and_radar_need_no_sensor():
    names = ["Red", "NIR", "swir16", "VV", "vh", "elevation", None]
    expected = ["red", "nir", "swir1", "vv", "vh", None, None]
    assert common_names(names) == expected
    assert common_names(["VV", "B02", "B8A"]) == ["vv", "blue", "nir_narrow"]


def test_equal_spelling_is_enough_where_no_sensor_is_known():
    assert match_bands(["B4", "B3", "B9"], ["B3", "B4"]) == [1, 0, None]
    assert match_bands(["SR_B4", "sr_b3"], ["B3", "B4"]) == [1, 0]


def test_equal_spelling_is_not_enough_where_the_sensors_differ():
    tm = ["B1", "B2", "B3", "B4", "elevation"]
    oli = ["B2", "B3", "B4", "B5", "elevation"]
    assert match_bands(tm, oli, "landsat-tm", "landsat-oli") == [0, 1, 2, 3, 4]
    assert match_bands(tm, oli, "landsat-tm") == [None, 0, 1, 2, 4]


def test_names_that_only_one_sensor_has_tell_it_apart_from_another():
    landsat = ["SR_B2_20200101", "SR_B5_20200101", "SR_B7_20200101", "dem"]
    dated = [f"{name}_20190101" for name in S2]
    expected = [dated.index("B02_20190101"), 6, 9, None]
    for sensors in (("landsat-oli", None), ("landsat-oli", "sentinel2")):
        assert match_bands(landsat, dated, *sensors) == expected
    # B5 is no red edge of Sentinel-2, and may be near infrared or not
    with pytest.raises(DatasetError, match="SR_B5.*--sensor"):
        match_bands(landsat[1:2], dated)


def test_names_of_two_kinds_meet_by_their_meaning():
    assert match_bands(["nir", "red", "dem"], S2) == [6, 2, None]
    assert match_bands(["red", "nir"], ["B4", "B5"], None, "landsat-oli") == [0, 1]


def test_an_unknown_sensor_is_asked_for_where_it_matters():
    with pytest.raises(
        DatasetError, match="B4, B5 are not the same on every.*--sensor"
    ):
        match_bands(["B4", "B5"], ["red", "nir"])
    # nothing is left that they could be
    assert match_bands(["B4", "B5"], ["B4"]) == [0, None]


def test_bands_of_several_dates_meet_in_the_order_of_the_dates():
    new = ["B04_20200501", "B04_20200101", "B08_20200101"]
    old = ["B04_20190101", "B04_20190601", "red_20190101"]
    assert match_bands(new, old) == [1, 0, None]
    assert match_bands(["red_20200101"], ["B04_20190101"], None, "sentinel2") == [0]


def test_bands_without_a_name_meet_none_and_equal_ones_are_refused():
    assert match_bands([None, "B2"], [None, "B2"]) == [None, 1]
    with pytest.raises(DatasetError, match="both B4.*different descriptions"):
        match_bands(["B4", "B04"], ["B4"])
    with pytest.raises(DatasetError, match="both red.*different descriptions"):
        match_bands(["red"], ["B4", "red edge", "Red", "RED"])


def test_a_word_after_a_number_says_what_the_number_is():
    landsat = ["B2_blue", "B3_green", "Band 4 (Red)", "B5 - NIR", "SR_B6_swir1"]
    assert common_names(landsat) == ["blue", "green", "red", "nir", "swir1"]
    assert match_bands(landsat, S2, None, "sentinel2") == [0, 1, 2, 6, 8]
    assert common_names(["B6_VCID_1", "B4_mean"], "landsat-etm") == ["thermal", None]


def test_words_may_be_written_apart():
    words = [
        "SWIR 1",
        "swir-2",
        "Red Edge 1",
        "rededge_3",
        "NIR narrow",
        "Band 6 - SWIR 1",
    ]
    expected = ["swir1", "swir2", "rededge1", "rededge3", "nir_narrow", "swir1"]
    assert common_names(words) == expected
    assert match_bands(words[:3], S2, None, "sentinel2") == [8, 9, 3]
    assert common_names(["Red Edge", "SWIR"]) == [None, None]


def test_words_of_stac_that_depend_on_the_sensor_are_known_with_it():
    landsat = ["blue", "green", "red", "nir08", "swir16", "swir22"]
    numbers = [f"SR_B{number}" for number in (2, 3, 4, 5, 6, 7)]
    assert match_bands(landsat, numbers, *["landsat-oli"] * 2) == [0, 1, 2, 3, 4, 5]
    assert match_bands(["red", "nir08"], S2, "sentinel2") == [2, 7]
    assert match_bands(["nir08"], ["nir08"], "landsat-oli", "sentinel2") == [None]
    assert match_bands(["nir08"], ["nir08"]) == [0]
    assert common_names(["lwir", "nir08"], "landsat-etm") == ["thermal", "nir"]
    with pytest.raises(DatasetError, match="nir08 are not the same.*--sensor"):
        match_bands(["red", "nir08"], S2)
