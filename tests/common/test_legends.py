"""Colours that a user gives: lists, QGIS styles, .clr files."""

from __future__ import annotations

import pytest

from common.colours import (
    BLUE,
    GREEN,
    GREY,
    PALETTE,
    RED,
    class_colours,
    complete_colours,
    table_colours,
)
from common.errors import OptionError
from common.legends import asked_colours, missing_advice, read_colours

PALETTED = """<!DOCTYPE qgis PUBLIC 'http://mrcc.com/qgis.dtd' 'SYSTEM'>
<qgis version="3.22.4-Bialowieza"><pipe>
  <rasterrenderer type="paletted" band="1"><colorPalette>
    <paletteEntry value="11" label="Open water" color="#466b9f" alpha="255"/>
    <paletteEntry value="41.0" label="Forest" color="#1C6330" alpha="255"/>
  </colorPalette></rasterrenderer>
</pipe></qgis>"""
# as QGIS writes symbols, and as early QGIS 3 did by props alone
CATEGORIZED = """<qgis><renderer-v2 type="categorizedSymbol" attr="kind">
  <categories>
    <category symbol="0" value="lake" label="A lake" render="true"/>
    <category symbol="1" type="List" label="woods" render="true">
      <val type="QString" value="wood"/><val type="QString" value="copse"/>
    </category>
    <category symbol="2" value="" label="all other values" render="true"/>
  </categories>
  <symbols>
    <symbol name="0" type="fill"><layer class="SimpleFill"><Option type="Map">
      <Option name="color" type="QString" value="10,20,250,255,rgb:0.04,0.08,0.98,1"/>
      <Option name="outline_color" type="QString" value="35,35,35,255"/>
    </Option></layer></symbol>
    <symbol name="1" type="fill"><layer class="SimpleFill">
      <prop k="border_width_map_unit_scale" v="3x:0,0"/><prop k="color" v="1,110,2,255"/>
    </layer></symbol>
    <symbol name="2" type="fill"><layer class="SimpleFill"><prop k="color" v="9,9,9,255"/>
    </layer></symbol>
  </symbols></renderer-v2></qgis>"""


@pytest.fixture
def legend(tmp_path):
    """A function that writes a legend file; its path."""

    def write(name: str, text: str) -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


# --- lists ------------------------------------------------------------------------------------


def test_listed_colours_are_hex_or_names_of_css():
    asked = "#466B9F, 1c6330,f80,RebeccaPurple"
    expected = [(70, 107, 159), (28, 99, 48), (255, 136, 0), (102, 51, 153)]
    assert read_colours(asked) == expected
    assert asked_colours(asked, list("abcd"), None) == expected
    assert asked_colours(asked, None, None) == expected


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ("red,bleu", r"'bleu'; did you mean 'blue'"),
        ("red,12345", "'12345'"),
        ("red,C0", "'C0'"),
        ("red,", "Unknown colour .* ''"),
        ("red,blue,F00", "red and F00 are the same colour"),
        ("red", "expected 3 colours, one for each class"),
        ("missing.qml", "missing.qml: there is no such file"),
    ],
)
def test_wrong_colours_are_refused_in_one_line(asked, reason):
    with pytest.raises(OptionError, match=reason) as caught:
        asked_colours(asked, list("abc"), None)
    assert "\n" not in str(caught.value)


# --- legend files -----------------------------------------------------------------------------


def test_a_paletted_style_gives_colours_by_the_values_of_the_label(legend):
    style = legend("nlcd.qml", PALETTED)
    assert asked_colours(style, None, [41, 11]) == [(28, 99, 48), (70, 107, 159)]
    found = asked_colours(style, ["water", "shrub"], [11, 52])
    assert found == [(70, 107, 159), None]
    line = missing_advice(style, found, ["water", "shrub"])
    assert line == f"{style} has no colour for shrub: taken from the palette"
    assert missing_advice(style, found[:1], ["water"]) is None


def test_a_categorized_style_gives_colours_by_texts(legend):
    style = legend("kinds.QML", CATEGORIZED)
    wood, lake = (1, 110, 2), (10, 20, 250)
    assert asked_colours(style, None, ["wood", "lake", "road"]) == [wood, lake, None]
    # patches of earlier versions hold the names alone
    assert asked_colours(style, ["wood", "lake"], range(2)) == [wood, lake]
    with pytest.raises(OptionError, match="wood and copse are the same colour"):
        asked_colours(style, None, ["wood", "copse"])


def test_a_clr_file_gives_colours_by_values(legend):
    file = legend("map.clr", "# ESRI\n0 10 20 30\n\n2 255 0 0 255\n")
    assert asked_colours(file, None, [2, 0]) == [(255, 0, 0), (10, 20, 30)]
    # without values or names, as many classes as the legend knows
    assert asked_colours(file, None, None) == [(10, 20, 30), None, (255, 0, 0)]
    assert asked_colours(file, list("abcd"), None)[2:] == [(255, 0, 0), None]


def test_a_mark_of_utf8_indented_comments_and_repeated_lines_of_a_clr_file_are_fine(
    legend,
):
    file = legend("map.clr", "\ufeff1 10 20 30 lake\r\n  # 2\r\n\t2 9 0 0\r\n2 9 0 0 #")
    assert read_colours(file) == {"1": (10, 20, 30), "2": (9, 0, 0)}


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.clr", "0 1 2 3\n1 300 0 0", "a.clr, line 2: expected value red green blue"),
        ("a.clr", "water 1 2", "line 1"),
        ("a.clr", "", "has no colours of values"),
        ("a.qml", "<qgis><pipe/></qgis>", "has no colours of values"),
        ("a.qml", "no xml", "no QGIS style"),
        ("a.qml", PALETTED, "has colours of 11, 41, and none of the classes 1, 2"),
        ("a.clr", "1 5 5 5\n2 5 5 5", "1 and 2 are the same colour"),
        ("a.clr", "1 5 5 5\n2 6 6 6\n1 7 7 7", "a.clr: value 1 has two colours"),
        ("a.qml", PALETTED.replace("41.0", "11"), "a.qml: value 11 has two colours"),
    ],
)
def test_a_legend_that_cannot_serve_is_refused(legend, name, text, reason):
    with pytest.raises(OptionError, match=reason):
        asked_colours(legend(name, text), None, [1, 2])


# --- what is missing --------------------------------------------------------------------------


def test_missing_colours_come_from_the_palette_and_are_unlike_those_given():
    names = ["lake", "forest", "ruins", "mud"]
    assert complete_colours(None, names) == class_colours(names)
    given = [None, (0, 0, 250), None, (250, 50, 20)]
    found = complete_colours(given, names)
    assert found[1::2] == given[1::2] and len(set(found)) == 4
    # blue would be the lake's, but nobody could tell it from the forest's
    assert found[0] != BLUE and not {found[0], found[2]} & {BLUE, RED}
    assert {found[0], found[2]} < set(PALETTE)
    assert complete_colours([None, RED, None], names) == [BLUE, RED, GREEN, PALETTE[3]]


def test_a_map_of_many_classes_is_completed_without_using_a_colour_twice():
    names = [f"class {number}" for number in range(3000)]
    given = [(number % 256, 7, number // 256) for number in range(1000)]
    found = complete_colours(given, names)
    assert found[:1000] == given and len(set(found)) == 3000


def test_a_given_foreground_leaves_the_background_grey_and_equal_colours_say_nothing():
    names = ["background", "roof"]
    assert complete_colours([None, BLUE], names) == [GREY, BLUE]
    assert complete_colours([BLUE, BLUE], names) == [GREY, RED]
    assert complete_colours([BLUE, RED, BLUE], names) == [BLUE, RED]


def test_a_colour_table_counts_unless_it_is_black_or_a_grey_ramp():
    table = {0: (0, 0, 0), 1: (9, 90, 9), 2: (90, 9, 9), 3: (0, 0, 0)}
    assert table_colours(table, [2, 1]) == [(90, 9, 9), (9, 90, 9)]
    assert table_colours(table, [2, 7]) == [(90, 9, 9), None]
    assert table_colours(table, None) == [(0, 0, 0), (9, 90, 9), (90, 9, 9)]
    assert table_colours(table, [0, 3]) == []
    assert table_colours({k: (k, k, k) for k in range(256)}, None) == []
    assert table_colours({}, [1, 2]) == table_colours({}, None) == []
