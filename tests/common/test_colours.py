"""The palette, and which class gets which colour."""

from __future__ import annotations

import numpy as np
import pytest
from colour_distance import DEUTERANOPIA, ciede2000, distance, lab, smallest

from common.colours import (
    BLUE,
    BROWN,
    GREEN,
    GREY,
    LIGHT_CYAN,
    LIGHT_GREEN,
    OCHRE,
    PALETTE,
    RED,
    TEAL,
    YELLOW,
    class_colours,
)


def numbered(count: int) -> list[str]:
    return [f"class {number}" for number in range(count)]


# --- the measure itself -----------------------------------------------------------------------

# from table 1 of Sharma, Wu and Dalal 2005: two colours in CIELAB and their difference
PUBLISHED = [
    ((50.0, 2.6772, -79.7751), (50.0, 0.0, -82.7485), 2.0425),
    ((50.0, -1.3802, -84.2814), (50.0, 0.0, -82.7485), 1.0000),
    ((50.0, 0.0, 0.0), (50.0, -1.0, 2.0), 2.3669),
    ((50.0, 2.4900, -0.0010), (50.0, -2.4900, 0.0009), 7.1792),
    ((50.0, 2.4900, -0.0010), (50.0, -2.4900, 0.0011), 7.2195),
    ((50.0, -0.0010, 2.4900), (50.0, 0.0009, -2.4900), 4.8045),
    ((50.0, -0.0010, 2.4900), (50.0, 0.0011, -2.4900), 4.7461),
    ((50.0, 2.5, 0.0), (73.0, 25.0, -18.0), 27.1492),
    ((50.0, 2.5, 0.0), (61.0, -5.0, 29.0), 22.8977),
    ((50.0, 2.5, 0.0), (56.0, -27.0, -3.0), 31.9030),
    ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
    ((22.7233, 20.0904, -46.6940), (23.0331, 14.9730, -42.5619), 2.0373),
    ((90.9257, -0.5406, -0.9208), (88.6381, -0.8985, -0.7239), 1.5381),
    ((2.0776, 0.0795, -1.1350), (0.9033, -0.0636, -0.5514), 0.9082),
]


@pytest.mark.parametrize("first, second, published", PUBLISHED)
def test_the_measure_gives_the_published_differences(first, second, published):
    assert ciede2000(first, second) == pytest.approx(published, abs=5e-5)
    assert ciede2000(second, first) == pytest.approx(published, abs=5e-5)


def test_the_measure_knows_white_and_red_and_greys_look_alike_to_all():
    np.testing.assert_allclose(lab((255, 255, 255)), (100, 0, 0), atol=1e-6)
    np.testing.assert_allclose(lab((255, 0, 0)), (53.24, 80.09, 67.20), atol=0.01)
    grey = (130, 130, 130)
    np.testing.assert_allclose(lab(grey, DEUTERANOPIA), lab(grey), atol=0.01)


# --- the palette ------------------------------------------------------------------------------


def test_any_two_of_the_first_classes_can_be_told_apart():
    first = class_colours(numbered(12))
    assert smallest(first) >= 30 and smallest(first, DEUTERANOPIA) >= 16
    # with usual hues of land cover a later one of the palette may be among the first
    assert smallest(PALETTE[:19]) >= 20 and smallest(PALETTE[:19], DEUTERANOPIA) >= 11


def test_every_class_has_a_colour_of_its_own_that_is_not_white():
    for count in (*range(1, 80), 65535):
        colours = class_colours(numbered(count))
        assert len(colours) == len(set(colours)) == count
        assert (255, 255, 255) not in colours
    values = np.array(colours)
    assert values.dtype == np.int64 and values.min() >= 0 and values.max() <= 255


def test_a_class_without_a_name_keeps_its_colour_whatever_the_number_of_classes():
    most = class_colours(numbered(300))
    for count in range(3, 300, 7):
        assert class_colours(numbered(count)) == most[:count]


# --- usual hues -------------------------------------------------------------------------------


def hue(name: str):
    """The colour of a class among others that have no usual hue, None for the next of the palette."""
    names = [*numbered(9), name]
    alone = class_colours(names)[9]
    return None if alone == class_colours([*numbered(9), "?"])[9] else alone


@pytest.mark.parametrize(
    ("expected", "names"),
    [
        (BLUE, "Water, Permanent water bodies, open_water, Lakes, SEA"),
        (GREEN, "forest, Tree cover, MixedForest, trees in town: trees"),
        (RED, "Built-up, urban, buildings, cities, developed"),
        (YELLOW, "Cropland, crops, cultivated, tree crops, field"),
        (LIGHT_GREEN, "grass, Grassland, pasture, urban grass, grasses"),
        (BROWN, "bare soil, BareSoil, Barren, Bare / sparse vegetation"),
        (LIGHT_CYAN, "Snow and ice, glaciers, sea ice"),
        (TEAL, "wetland, Herbaceous wetland, marshes, Flooded vegetation"),
        (OCHRE, "Shrubland, shrubs, Scrub"),
        (None, "non-forest, No water, nonforest, not urban, treeless, classes, rice"),
        (None, "underwater, deforested, icefree, forest loss, wäldchen, glass, 7"),
    ],
)
def test_land_cover_has_its_usual_hue_and_what_only_sounds_like_it_has_not(
    expected, names
):
    for name in names.split(", "):
        assert hue(name) == expected, name


def test_names_in_any_order_leave_all_classes_different():
    names = [
        *("cropland", "forest", "built-up", "grassland", "ponds", "lake", "other"),
        *("bare soil", "wetland", "snow", "shrubland", "no data"),
    ]
    colours = class_colours(names)
    assert len(set(colours)) == 12
    assert colours[4] == BLUE  # the lake comes later, and its colour is taken
    assert colours[5] != BLUE
    assert smallest(colours) >= 20 and smallest(colours, DEUTERANOPIA) >= 10


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["background", "foreground"], [GREY, RED]),
        (["class 0", "class 1"], [GREY, RED]),
        (["no water", "water"], [GREY, BLUE]),
        (["forest", "other"], [GREEN, GREY]),
        (["non-forest", "forest"], [GREY, GREEN]),
        (["background", "landslide"], [GREY, RED]),
        (["forest", "water"], [GREEN, BLUE]),
        (["intact", "damaged"], PALETTE[:2]),
    ],
)
def test_of_two_classes_the_rest_is_grey_and_the_other_in_its_hue(names, expected):
    assert class_colours(names) == expected
    assert distance(*expected) >= 20 and distance(*expected, DEUTERANOPIA) >= 10
