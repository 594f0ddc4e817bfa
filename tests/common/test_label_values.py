"""The grammar of --label_values and --class_names."""

from __future__ import annotations

import pytest

from common.errors import OptionError
from common.label_values import (
    ClassValues,
    parse_label_values,
    parse_names,
    whole_numbers,
)


def parsed(text: str) -> list[tuple]:
    return [(one.values, one.name) for one in parse_label_values(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1,2", [(("1",), None), (("2",), None)]),
        (
            "1=water, 5+6 = forest ,9",
            [(("1",), "water"), (("5", "6"), "forest"), (("9",), None)],
        ),
        ('"a, b"+c="x=y"', [(("a, b", "c"), "x=y")]),
        ('"say ""hi"""', [(('say "hi"',), None)]),
        ("winter wheat,-3", [(("winter wheat",), None), (("-3",), None)]),
        ('" padded "', [((" padded ",), None)]),
        ('wheat "soft"', [(('wheat "soft"',), None)]),
        ('5" pipe', [(('5" pipe',), None)]),
    ],
)
def test_commas_separate_pluses_merge_and_equal_signs_name(text, expected):
    assert parsed(text) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1,,2", "missing at ','"),
        ("1,", "missing at ','"),
        ("1+", "missing at '+'"),
        ("=a", "missing at ','"),
        ("1=", "missing at '='"),
        ("1=a=b", "'=' follows the name 'a'; quote it"),
        ("1=a+b", "'+' follows the name 'a'; quote it"),
        ('"a', "a quote is not closed"),
        ('"a"b', "'b' follows a closing quote"),
        ("1,2+1", "the value 1 is given twice"),
        ("1=a,2=a", "the name a is given twice"),
        ("1=2,2", "the name 2 is given twice"),
    ],
)
def test_what_cannot_be_read_is_refused(text, words):
    with pytest.raises(OptionError) as caught:
        parse_label_values(text)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_has_a_class_in_each_line(tmp_path):
    file = tmp_path / "classes.txt"
    content = 'Wheat, winter=wheat\n\n  5+6 = forest\n"a+b"\nMaïs\n'
    file.write_text(content, encoding="utf-8")
    assert parsed(f"@{file}") == [
        (("Wheat, winter",), "wheat"), (("5", "6"), "forest"), (("a+b",), None),
        (("Maïs",), None),
    ]  # fmt: skip
    file.write_bytes(b"\xef\xbb\xbf" + b"1=a\r\n2=b\r\n")
    assert parsed(f"@{file}") == [(("1",), "a"), (("2",), "b")]


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    file = tmp_path / "classes.txt"
    for content, words in (
        (None, "No such file"),
        (b"\xff\xfe\x00", "it is not UTF-8"),
        (b"\n \n", "the file lists no class"),
        (b"1=a=b", "follows the name"),
    ):
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(OptionError, match=f"@{file}.*{words}"):
            parse_label_values(f"@{file}")


def test_a_class_without_a_name_is_called_by_its_code():
    titles = [one.title for one in parse_label_values("9,5+6,1=water")]
    assert titles == ["9", "5+6", "water"]


def test_values_of_rasters_are_whole_numbers():
    assert whole_numbers(parse_label_values("1=a,-5+6")) == [(1,), (-5, 6)]
    for text, words in (
        ("1,b", "expected whole numbers"),
        ("1,01", "1 is given twice"),
        ("1,99999999999999999999", "beyond what labels hold"),
        ("1,-2147483648", "beyond what labels hold"),
    ):
        with pytest.raises(OptionError, match=words):
            whole_numbers(parse_label_values(text))


def test_names_take_the_same_quotes():
    assert parse_names('a, "b, c" ,d=e', "--class_names") == ["a", "b, c", "d=e"]
    assert parse_names(None, "--class_names") == []
    for text, words in (
        ("a,,b", "is empty"),
        ("a,b,a", "a is given twice"),
        ('a,"', "quote"),
    ):
        with pytest.raises(OptionError, match=words):
            parse_names(text, "--class_names")
    assert ClassValues(("1",)).title == "1"
