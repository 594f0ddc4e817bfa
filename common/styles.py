"""How other programs draw the outputs: QGIS styles (QML), class names and colours for GDAL.

Colours are (red, green, blue), 0..255. A style names its values and nothing else, so that nodata
stays transparent.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from xml.etree.ElementTree import Element, ElementTree, SubElement, indent, tostring
from xml.etree.ElementTree import parse as parse_xml

from common.colours import Colour
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
# GDAL's numbers of types and meanings of columns: GDALRATFieldType, GDALRATFieldUsage
CLASS_COLUMNS = {
    "Value": (0, 5),
    "Class_name": (2, 2),
    "Red": (0, 6),
    "Green": (0, 7),
    "Blue": (0, 8),
}


def paletted_style(names: Sequence[str], colours: Sequence[Colour]) -> str:
    """The style of a class raster: a legend entry for each class, which its number stands for."""
    root, renderer = _raster_style("paletted")
    entries = SubElement(renderer, "colorPalette")
    for number, (name, colour) in enumerate(zip(names, colours, strict=True)):
        entry = {"value": str(number), "label": name, "color": _hex(colour)}
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


def write_style(target: Path, style: str) -> None:
    """Write a style to the file beside a raster where QGIS looks for it."""
    with atomic_write(target) as part:
        part.write_text(style, encoding="utf-8")


def add_class_table(
    path: Path, names: Sequence[str], colours: Sequence[Colour]
) -> None:
    """Add names and colours of the classes of band 1 to GDAL's ``.aux.xml``, new or not.

    As category names and as a raster attribute table, which programs read that know no QGIS style.
    What else GDAL has put there stays.
    """
    root = parse_xml(path).getroot() if path.exists() else Element("PAMDataset")
    band = root.find("PAMRasterBand[@band='1']")
    if band is None:
        band = SubElement(root, "PAMRasterBand", band="1")
    for tag in ("CategoryNames", "GDALRasterAttributeTable"):
        for former in band.findall(tag):
            band.remove(former)
    categories = SubElement(band, "CategoryNames")
    table = SubElement(band, "GDALRasterAttributeTable", tableType="thematic")
    for index, (name, (kind, usage)) in enumerate(CLASS_COLUMNS.items()):
        column = SubElement(table, "FieldDefn", index=str(index))
        for tag, text in (("Name", name), ("Type", kind), ("Usage", usage)):
            SubElement(column, tag).text = str(text)
    for number, (name, colour) in enumerate(zip(names, colours, strict=True)):
        SubElement(categories, "Category").text = _xml_text(name)
        row = SubElement(table, "Row", index=str(number))
        for value in (number, _xml_text(name), *colour):
            SubElement(row, "F").text = str(value)
    ElementTree(root).write(path, encoding="utf-8")


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
