"""How other programs draw the outputs: QGIS styles (QML), class names and colours for GDAL.

Colours are (red, green, blue), 0..255. A style names its values and nothing else, so that nodata
stays transparent.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree.ElementTree import (
    Element,
    ElementTree,
    ParseError,
    SubElement,
    indent,
    tostring,
)
from xml.etree.ElementTree import parse as parse_xml

from common.colours import Colour
from common.errors import RasterError
from common.files import atomic_write

QGIS = "3.22"  # whose form of styles this is
DOCTYPE = "<!DOCTYPE qgis PUBLIC 'http://mrcc.com/qgis.dtd' 'SYSTEM'>\n"
NOT_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
# Matplotlib's viridis in tenths, as in the quicklook
RAMP: tuple[Colour, ...] = (
    (68, 1, 84), (72, 36, 117), (65, 68, 135), (53, 95, 141), (42, 120, 142), (33, 145, 140),
    (34, 168, 132), (68, 191, 112), (122, 209, 81), (189, 223, 38), (253, 231, 37),
)  # fmt: skip
OUTLINE = {  # of polygons: thin, and in their own hue, which small areas keep so
    "joinstyle": "bevel",
    "outline_style": "solid",
    "outline_width": "0.1",
    "outline_width_unit": "MM",
    "style": "solid",
}
DARKER = 0.7  # an outline's share of the brightness of its area
CATEGORIES = 256  # category names of a band, unless it has more classes
# GDAL's numbers of types and meanings of columns: GDALRATFieldType, GDALRATFieldUsage
INTEGER, TEXT = 0, 2
CLASS_COLUMNS = {
    "Value": (INTEGER, 5),
    "Class": (INTEGER, 0),
    "Class_code": (INTEGER, 0),
    "Class_name": (TEXT, 2),
    "Red": (INTEGER, 6),
    "Green": (INTEGER, 7),
    "Blue": (INTEGER, 8),
}


def paletted_style(
    names: Sequence[str],
    colours: Sequence[Colour],
    values: Sequence[int] | None = None,
) -> str:
    """The style of a class raster: a legend entry for each class.

    ``values`` are what the raster holds for them, by default their numbers.
    """
    root, renderer = _raster_style("paletted")
    entries = SubElement(renderer, "colorPalette")
    values = values or range(len(names))
    for value, name, colour in zip(values, names, colours, strict=True):
        entry = {"value": str(value), "label": name, "color": _hex(colour)}
        SubElement(entries, "paletteEntry", entry | {"alpha": "255"})
    return _document(root)


def ramp_style(low: float, high: float) -> str:
    """The style of a raster's first band: ``RAMP`` from one value to another, whatever it holds."""
    limits = {"classificationMin": f"{low:g}", "classificationMax": f"{high:g}"}
    root, renderer = _raster_style("singlebandpseudocolor", limits)
    SubElement(SubElement(renderer, "minMaxOrigin"), "limits").text = "None"
    shader = SubElement(
        SubElement(renderer, "rastershader"),
        "colorrampshader",
        colorRampType="INTERPOLATED",
        classificationMode="1",
        clip="0",
        minimumValue=f"{low:g}",
        maximumValue=f"{high:g}",
    )
    shares = [number / (len(RAMP) - 1) for number in range(len(RAMP))]
    inner = list(zip(shares, RAMP))[1:-1]
    ramp = SubElement(shader, "colorramp", name="[source]", type="gradient")
    _properties(
        ramp,
        {
            "color1": _numbers(RAMP[0]),
            "color2": _numbers(RAMP[-1]),
            "discrete": "0",
            "rampType": "gradient",
            "stops": ":".join(f"{share:g};{_numbers(rgb)}" for share, rgb in inner),
        },
    )
    for share, colour in zip(shares, RAMP):
        value = f"{low + share * (high - low):g}"
        entry = {"value": value, "label": value, "color": _hex(colour)}
        SubElement(shader, "item", entry | {"alpha": "255"})
    return _document(root)


def categorized_style(
    column: str, values: Sequence[str], colours: Sequence[Colour]
) -> str:
    """The style of polygons: a legend entry for each text of a column."""
    root = Element("qgis", version=QGIS, styleCategories="Symbology")
    renderer = SubElement(root, "renderer-v2", type="categorizedSymbol", attr=column)
    categories = SubElement(renderer, "categories")
    symbols = SubElement(renderer, "symbols")
    for number, (value, colour) in enumerate(zip(values, colours, strict=True)):
        entry = {"value": value, "label": value, "symbol": str(number)}
        SubElement(categories, "category", entry | {"type": "string", "render": "true"})
        symbol = SubElement(symbols, "symbol", type="fill", name=str(number), alpha="1")
        fill = {"class": "SimpleFill", "enabled": "1", "locked": "0", "pass": "0"}
        layer = SubElement(symbol, "layer", fill)
        darker = [round(part * DARKER) for part in colour]
        fill = {"color": _numbers(colour), "outline_color": _numbers(darker)}
        _properties(layer, fill | OUTLINE)
    return _document(root)


def ramp_colours(count: int) -> list[Colour]:
    """Colours of ``RAMP`` at equal steps, from its first to its last."""
    last = len(RAMP) - 1
    places = [last * number / max(1, count - 1) for number in range(count)]
    return [RAMP[round(place)] for place in places]


def write_style(target: Path, style: str) -> None:
    """Write a style to the file beside a raster where QGIS looks for it."""
    with atomic_write(target) as part:
        part.write_text(style, encoding="utf-8")


class TableRow(NamedTuple):
    """A class in a raster attribute table."""

    value: int
    number: int
    code: int | str
    name: str
    colour: Colour | None


def add_class_table(
    path: Path,
    names: Sequence[str],
    colours: Sequence[Colour],
    codes: Sequence[int | str] | None = None,
    values: Sequence[int] | None = None,
) -> None:
    """Add names and colours of the classes of band 1 to GDAL's ``.aux.xml``, new or not.

    As category names and as a raster attribute table, which programs read that know no QGIS style.
    What else GDAL has put there stays.

    Args:
        path: The file.
        names: Of the classes.
        colours: Likewise.
        codes: Likewise, by default their numbers.
        values: What the raster holds for them, by default their numbers.
    """
    root = parse_xml(path).getroot() if path.exists() else Element("PAMDataset")
    band = root.find("PAMRasterBand[@band='1']")
    if band is None:
        band = SubElement(root, "PAMRasterBand", band="1")
    for tag in ("CategoryNames", "GDALRasterAttributeTable"):
        for former in band.findall(tag):
            band.remove(former)
    numbers = range(len(names))
    codes, values = list(codes or numbers), list(values or numbers)
    add_categories(band, names, values)
    table = SubElement(band, "GDALRasterAttributeTable", tableType="thematic")
    short = all(isinstance(code, int) and abs(code) < 2**31 for code in codes)
    kinds = CLASS_COLUMNS | ({} if short else {"Class_code": (TEXT, 0)})
    for index, (name, (kind, usage)) in enumerate(kinds.items()):
        column = SubElement(table, "FieldDefn", index=str(index))
        for tag, text in (("Name", name), ("Type", kind), ("Usage", usage)):
            SubElement(column, tag).text = str(text)
    rows = zip(values, numbers, codes, names, colours, strict=True)
    for index, (value, number, code, name, colour) in enumerate(rows):
        row = SubElement(table, "Row", index=str(index))
        for cell in (value, number, code, name, *colour):
            SubElement(row, "F").text = _xml_text(str(cell))
    ElementTree(root).write(path, encoding="utf-8")


def add_categories(band: Element, names: Sequence[str], values: Sequence[int]) -> None:
    """Add the names of values to a band of GDAL's as its list of category names.

    The list begins with that of 0, so that negative and large values have no place in it.
    """
    if min(values) < 0 or max(values) >= max(CATEGORIES, len(names)):
        return
    known = dict(zip(values, names))
    categories = SubElement(band, "CategoryNames")
    for value in range(max(values) + 1):
        SubElement(categories, "Category").text = _xml_text(known.get(value, ""))


def read_class_table(path: str | Path) -> list[TableRow]:
    """The classes in the raster attribute table of band 1 in a ``.aux.xml``; none without it.

    A table of another program needs a column of values and one of names: its values are numbers
    and codes of the classes.

    Raises:
        RasterError: It cannot be read, or a value in it is no whole number.
    """
    band = _band_of(path)
    table = None if band is None else band.find("GDALRasterAttributeTable")
    try:
        return [] if table is None else list(_table_rows(table))
    except (ValueError, OverflowError) as error:
        raise RasterError(
            f"{path} has an attribute table that cannot be read ({error}); remove it"
        ) from error


def read_categories(path: str | Path) -> list[str]:
    """The category names of band 1 in a ``.aux.xml``, which begin with that of 0.

    Raises:
        RasterError: It cannot be read.
    """
    band = _band_of(path)
    found = [] if band is None else band.iterfind("CategoryNames/Category")
    return [category.text or "" for category in found]


def _band_of(path: str | Path) -> Element | None:
    """What a ``.aux.xml`` says of the first band."""
    if not Path(path).is_file():
        return None
    try:
        root = parse_xml(path).getroot()
    except ParseError as error:
        raise RasterError(f"{path} is no readable XML ({error}); remove it") from error
    return root.find("PAMRasterBand[@band='1']")


def _table_rows(table: Element) -> Iterator[TableRow]:
    """The rows of an attribute table with a column of values and one of names."""
    places, kinds = {}, {}
    for index, column in enumerate(table.iter("FieldDefn")):
        name = column.findtext("Name", "").capitalize()
        usage, kind = (int(column.findtext(tag, "0")) for tag in ("Usage", "Type"))
        if name == "Name" or (name == "Class" and kind == TEXT):
            name = "Class_name"
        for known, (_, meaning) in CLASS_COLUMNS.items():
            if usage == meaning != 0 or name == known:
                places.setdefault(known, index)
        kinds[index] = kind
    if not places.keys() >= {"Value", "Class_name"}:
        return
    for row in table.iter("Row"):
        cells = [cell.text or "" for cell in row.iter("F")]
        found = {name: cells[index] for name, index in places.items()}
        value = _whole(found["Value"])
        number = _whole(found.get("Class", found["Value"]))
        code = found.get("Class_code", value)
        if "Class_code" in places and kinds[places["Class_code"]] != TEXT:
            code = _whole(code)
        hues = [found[name] for name in ("Red", "Green", "Blue") if name in found]
        colour = tuple(map(_whole, hues)) if len(hues) == 3 else None
        yield TableRow(value, number, code, found["Class_name"], colour)


def _whole(text: str) -> int:
    """A whole number, which some programs write as 3.0."""
    number = float(text)
    if number != int(number):
        raise ValueError(f"{text} is no whole number")
    return int(number)


def _raster_style(kind: str, options: dict[str, str] | None = None):
    """The root of a raster's style, and its renderer."""
    root = Element("qgis", version=QGIS, styleCategories="Symbology")
    always = {"type": kind, "band": "1", "opacity": "1", "alphaBand": "-1"}
    pipe = SubElement(root, "pipe")
    return root, SubElement(pipe, "rasterrenderer", always | (options or {}))


def _properties(parent: Element, values: dict[str, str]) -> None:
    for key, value in values.items():
        SubElement(parent, "prop", k=key, v=value)


def _hex(colour: Iterable[int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _numbers(colour: Iterable[int]) -> str:
    return ",".join(map(str, (*colour, 255)))


def _xml_text(text: str) -> str:
    """A text without what XML cannot hold."""
    return NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)


def _document(root: Element) -> str:
    indent(root)
    return DOCTYPE + _xml_text(tostring(root, encoding="unicode")) + "\n"
