"""Styles for QGIS, class tables for GDAL, styles in GeoPackages. A real QGIS: tests/test_qgis.py."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from xml.etree import ElementTree

import geopandas
import numpy as np
import pyogrio
import pytest
import rasterio.shutil
from helpers import grid, write_raster

from common.errors import SegmentationError
from common.polygons import write_polygons
from common.styles import (
    RAMP,
    add_class_table,
    categorized_style,
    paletted_style,
    ramp_style,
)
from common.vectors import add_style, read_vector

NAMES = ["water", 'forêt & "bois"', "<bare>"]
COLOURS = [(0, 64, 255), (1, 2, 3), (250, 128, 114)]
HEXES = ["#0040ff", "#010203", "#fa8072"]


def parse(style: str) -> ElementTree.Element:
    assert style.startswith("<!DOCTYPE qgis")
    return ElementTree.fromstring(style)


# --- rasters ---------------------------------------------------------------------------------


def test_a_style_of_classes_holds_each_class_and_no_other_value():
    root = parse(paletted_style(NAMES, COLOURS))
    assert root.find("pipe/rasterrenderer").get("type") == "paletted"
    found = [
        (entry.get("value"), entry.get("label"), entry.get("color"))
        for entry in root.iter("paletteEntry")
    ]
    assert found == list(zip("012", NAMES, HEXES))


def test_every_class_needs_a_colour():
    for style in (paletted_style, lambda *both: categorized_style("name", *both)):
        with pytest.raises(ValueError, match="zip"):
            style(NAMES, COLOURS[:2])


@pytest.mark.parametrize(("low", "high"), [(0, 1), (1, 12)])
def test_a_ramp_covers_its_range_in_the_colours_of_the_quicklook(low, high):
    from matplotlib import colormaps

    root = parse(ramp_style(low, high))
    renderer = root.find("pipe/rasterrenderer")
    limits = renderer.get("classificationMin"), renderer.get("classificationMax")
    assert limits == (str(low), str(high))
    values = [float(item.get("value")) for item in root.iter("item")]
    np.testing.assert_allclose(values, np.linspace(low, high, len(RAMP)))
    viridis = colormaps["viridis"](np.linspace(0, 1, len(RAMP)))[:, :3]
    np.testing.assert_allclose(np.divide(RAMP, 255), viridis, atol=0.5 / 255 + 1e-9)


def test_names_with_what_xml_cannot_hold_leave_a_style_that_can_be_read():
    names = ["bell\x07", "half \ud800", "tab\t"]
    for style in (
        paletted_style(names, COLOURS),
        categorized_style("c", names, COLOURS),
    ):
        parse(style.encode("utf-8").decode())
        assert "bell\N{REPLACEMENT CHARACTER}" in style


# --- .aux.xml --------------------------------------------------------------------------------


def test_a_class_table_is_thematic_and_has_names_and_colours(tmp_path):
    path = tmp_path / "map.tif.aux.xml"
    add_class_table(path, NAMES, COLOURS)
    band = ElementTree.parse(path).getroot().find("PAMRasterBand")
    assert [node.text for node in band.iter("Category")] == NAMES
    table = band.find("GDALRasterAttributeTable")
    assert table.get("tableType") == "thematic"
    columns = [column.find("Name").text for column in table.iter("FieldDefn")]
    assert columns == [
        "Value",
        "Class",
        "Class_code",
        "Class_name",
        "Red",
        "Green",
        "Blue",
    ]
    rows = [[field.text for field in row.iter("F")] for row in table.iter("Row")]
    assert rows == [
        [*[str(number)] * 3, name, *map(str, colour)]
        for number, (name, colour) in enumerate(zip(NAMES, COLOURS))
    ]


def test_what_gdal_has_put_beside_a_raster_stays_and_nothing_is_there_twice(tmp_path):
    raster = write_raster(tmp_path / "map.tif", np.zeros((4, 4), np.uint8))
    # a PNG has no place for the CRS, which GDAL keeps in that file
    with rasterio.open(raster) as file, rasterio.Env(GDAL_PAM_ENABLED=True):
        rasterio.shutil.copy(file, tmp_path / "map.png", driver="PNG")
    path = tmp_path / "map.png.aux.xml"
    before = ElementTree.parse(path).getroot()
    assert before.find("SRS") is not None
    for _ in range(2):
        add_class_table(path, NAMES, COLOURS)
    after = ElementTree.parse(path).getroot()
    assert after.find("SRS").text == before.find("SRS").text
    assert len(after.findall("PAMRasterBand")) == 1
    for tag in ("CategoryNames", "GDALRasterAttributeTable"):
        assert len(list(after.iter(tag))) == 1
    with rasterio.open(tmp_path / "map.png") as file:
        assert file.crs.to_epsg() == 32631


# --- GeoPackages -----------------------------------------------------------------------------


def stored_styles(path) -> list[sqlite3.Row]:
    with closing(sqlite3.connect(path)) as base:
        base.row_factory = sqlite3.Row
        return base.execute("SELECT * FROM layer_styles").fetchall()


@pytest.mark.parametrize("column", ["geom", "outline"])
def test_a_style_in_a_geopackage_is_the_default_of_its_layer(tmp_path, column):
    path = tmp_path / "cells.gpkg"
    grid().to_file(path, layer="cells", layer_options={"GEOMETRY_NAME": column})
    style = categorized_style("name", NAMES, COLOURS)
    add_style(path, "cells", style)
    (row,) = stored_styles(path)
    assert (row["f_table_name"], row["f_geometry_column"]) == ("cells", column)
    # QGIS looks for these, and not for NULL
    assert (row["f_table_catalog"], row["f_table_schema"]) == ("", "")
    assert row["useAsDefault"] == 1 and row["styleQML"] == style
    assert parse(style).find("renderer-v2").get("attr") == "name"
    layers = {name: kind for name, kind in pyogrio.list_layers(path)}
    assert layers == {"cells": "Polygon", "layer_styles": None}


def test_a_table_of_styles_is_no_second_layer_for_our_readers(tmp_path):
    path = tmp_path / "cells.gpkg"
    grid().to_file(path)
    add_style(path, "cells", categorized_style("id", NAMES, COLOURS))
    for source in (path, f"{path}|layername=cells"):
        assert list(read_vector(str(source))["id"]) == [1, 2, 3, 4]


def test_a_geopackage_that_cannot_take_a_style_is_named(tmp_path):
    path = tmp_path / "cells.gpkg"
    path.write_bytes(b"no database, and longer than its header" * 9)
    with pytest.raises(SegmentationError, match=rf"{path} was not written completely"):
        add_style(path, "cells", "")


def test_polygons_of_a_map_are_coloured_by_the_names_of_its_classes(tmp_path):
    classes = np.repeat([[0, 1, 2, 255]], 4, axis=0).astype(np.uint8)
    write_raster(tmp_path / "map.tif", classes, nodata=255)
    target = tmp_path / "areas.gpkg"
    assert write_polygons(tmp_path / "map.tif", target, NAMES, colours=COLOURS) == 3
    (row,) = stored_styles(target)
    assert row["f_table_name"] == "areas"
    root = ElementTree.fromstring(row["styleQML"])
    assert root.find("renderer-v2").get("attr") == "class_name"
    values = [node.get("value") for node in root.iter("category")]
    assert values == NAMES
    assert set(values) == set(geopandas.read_file(target, layer="areas")["class_name"])
    fills = [node.get("v") for node in root.iter("prop") if node.get("k") == "color"]
    assert fills == ["0,64,255,255", "1,2,3,255", "250,128,114,255"]
