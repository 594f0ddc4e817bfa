"""Colours that a user gives for classes: listed, or as a legend file of another program."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

from common.colours import Colour, colour_of_hex
from common.errors import OptionError, unknown_name
from common.options import is_legend, require_colour_count, split_list
from common.text import some_of

OPTION = "--class_colors"


def read_colours(asked: str) -> list[Colour] | dict[str, Colour]:
    """``--class_colors``: colours in class order, or those of a legend file by the label's values.

    Raises:
        OptionError: A colour that is not known or stands there twice, a file that is no legend or
            gives a value two colours.
    """
    if not is_legend(asked):
        colours = [_read_colour(text) for text in split_list(asked)]
        _require_different(asked, colours, split_list(asked))
        return colours
    path = Path(asked)
    if not path.is_file():
        raise OptionError(f"{OPTION} {asked}: there is no such file")
    entries = _qml_entries if path.suffix.lower() == ".qml" else _clr_entries
    found: dict[str, Colour] = {}
    for value, colour in entries(path):
        value = _value_text(value)
        if found.setdefault(value, colour) != colour:
            raise OptionError(
                f"{OPTION} {asked}: value {value} has two colours; leave one of them"
            )
    if not found:
        raise OptionError(
            f"{OPTION} {asked}: the file has no colours of values; expected a paletted raster style "
            "or a categorized vector style of QGIS (.qml), or lines of value red green blue (.clr)"
        )
    return found


def asked_colours(
    asked: str, names: Sequence[str] | None, codes: Sequence[int | str] | None
) -> list[Colour | None]:
    """The colours of classes by ``--class_colors``, in class order; None is not in the legend.

    Args:
        asked: The option.
        names: The classes' names, where they have any.
        codes: Their values in the label, where these are not the class numbers.

    Raises:
        OptionError: See ``read_colours``; or not as many colours as classes, a legend of other
            values, or two classes of one colour.
    """
    legend = read_colours(asked)
    known = codes or names
    if isinstance(legend, list):
        require_colour_count(asked, len(known or legend))
        return legend
    if codes is None:
        numbers = [int(text) for text in legend if text.isdecimal()]
        # without names nobody knows the number of classes
        codes = range(len(names) if names else max(numbers, default=-1) + 1)
    # as in a legend by names, where patches hold the numbers alone
    names = names or [""] * len(codes)
    found = [legend.get(str(c)) or legend.get(n) for c, n in zip(codes, names)]
    if not any(found):
        values, ours = (some_of(list(map(str, v)), 6) for v in (legend, codes))
        raise OptionError(
            f"{OPTION} {asked}: the file has colours of {values}, and none of the classes {ours}"
        )
    _require_different(asked, found, codes)
    return found


def missing_advice(
    asked: str, known: Sequence[Colour | None], names: Sequence[str] | None
) -> str | None:
    """Which classes a legend leaves to the palette."""
    words = names or [f"class {number}" for number in range(len(known))]
    missing = [word for word, colour in zip(words, known) if colour is None]
    if not missing:
        return None
    return f"{asked} has no colour for {some_of(missing, 8)}: taken from the palette"


def _read_colour(text: str) -> Colour:
    """A colour in hex, with or without ``#``, or by its name in CSS."""
    if colour := colour_of_hex(text):
        return colour
    from matplotlib.colors import CSS4_COLORS

    if found := CSS4_COLORS.get(text.lower()):
        return colour_of_hex(found)
    raise unknown_name(f"colour of {OPTION}, hex or CSS,", text, list(CSS4_COLORS))


def _require_different(asked: str, colours: Sequence, classes: Sequence) -> None:
    """Raise OptionError where two classes have one colour."""
    first: dict[Colour, object] = {}
    for colour, word in zip(colours, classes):
        if colour and colour in first:
            raise OptionError(
                f"{OPTION} {asked}: {first[colour]} and {word} are the same colour; expected "
                "different colours of classes"
            )
        first[colour] = word


def _value_text(value: str) -> str:
    """A value of a legend as labels hold it: "1.0" is 1."""
    number = re.fullmatch(r"\s*(-?\d+)(\.0*)?\s*", value)
    return str(int(number[1])) if number else value.strip()


def _clr_entries(path: Path) -> Iterator[tuple[str, Colour]]:
    """Lines of value, red, green, blue; more columns are ignored."""
    # Windows' editors begin a text with a mark
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        colour = tuple(int(word) for word in words[1:4] if word.isdecimal())
        if len(colour) < 3 or max(colour) > 255:
            raise OptionError(
                f"{OPTION} {path}, line {number}: expected value red green blue, 0 to 255 each, as 1 "
                "0 112 255"
            )
        yield words[0], colour


def _qml_entries(path: Path) -> Iterator[tuple[str, Colour]]:
    """What a style of QGIS draws in which colour: of a paletted raster, or of categories."""
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise OptionError(f"{OPTION} {path}: no QGIS style ({error})") from None
    for renderer in root.iter("rasterrenderer"):
        if renderer.get("type") == "paletted":
            for entry in renderer.iter("paletteEntry"):
                if colour := colour_of_hex(entry.get("color", "")):
                    yield entry.get("value", ""), colour
    for renderer in root.iter("renderer-v2"):
        if renderer.get("type") == "categorizedSymbol":
            yield from _categories(renderer)


def _categories(renderer: ElementTree.Element) -> Iterator[tuple[str, Colour]]:
    """The categories of a vector style; the one of all other values is left out."""
    symbols = {
        symbol.get("name"): _symbol_colour(symbol)
        for symbol in renderer.iterfind("symbols/symbol")
    }
    for category in renderer.iterfind("categories/category"):
        # several values in one category have an element each
        values = category.findall(".//val") or [category]
        colour = symbols.get(category.get("symbol"))
        for value in values:
            if colour and value.get("value"):
                yield value.get("value"), colour


def _symbol_colour(symbol: ElementTree.Element) -> Colour | None:
    """The colour of a symbol's first layer, which early QGIS 3 stores as a ``prop`` alone."""
    layer = symbol.find("layer")
    if layer is None:
        return None
    option = layer.find("Option/Option[@name='color']")
    prop = layer.find("prop[@k='color']")
    text = prop.get("v", "") if option is None and prop is not None else ""
    text = option.get("value", "") if option is not None else text
    numbers = re.match(r"(\d+),(\d+),(\d+)\b", text)
    return tuple(map(int, numbers.groups())) if numbers else None
