"""Durations, names and tables as text."""

from __future__ import annotations

import pytest

from common.text import (
    aligned_table,
    distance_text,
    duration,
    ranges_text,
    shorten,
    some_of,
)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0:00"), (45, "0:45"), (59.6, "1:00"), (7390, "2:03:10")],
)
def test_durations_are_minutes_and_hours(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    "metres, text",
    [(0, "0 m"), (640.4, "640 m"), (999.7, "1.0 km"), (3249, "3.2 km"), (1.25e6, "1,250 km")],
)  # fmt: skip
def test_distances_are_metres_and_kilometres(metres, text):
    assert distance_text(metres) == text


def test_a_long_name_keeps_its_ends():
    assert shorten("short") == "short"
    assert shorten("a" * 30 + "b" * 30, 11) == "aaaa...bbbb"


def test_the_first_column_is_aligned_left_and_the_others_right():
    rows = [["", "patches", "share"], ["water", "7", "1.0%"], ["forest", "12", "-"]]
    assert aligned_table(rows).splitlines() == [
        "        patches  share",
        "water         7   1.0%",
        "forest       12      -",
    ]


def test_more_columns_can_be_aligned_left_and_no_line_ends_with_blanks():
    rows = [["a", "long text", "1"], ["bb", "x", ""]]
    assert aligned_table(rows, left=2).splitlines() == ["a   long text  1", "bb  x"]


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([], ""),
        ([4], "4"),
        ([1, 2], "1-2"),
        ([1, 2, 3, 5, 7, 8], "1-3,5,7-8"),
        ([9, 3], "9,3"),
    ],
)
def test_numbers_are_told_as_ranges(numbers, text):
    assert ranges_text(numbers) == text


def test_names_that_hold_a_comma_are_told_apart_in_a_list():
    names = ["barley, spring", "oats", "rye"]
    assert some_of(names) == '"barley, spring", oats, rye'
    assert some_of(names, 1) == '"barley, spring" and 2 more'
