"""A stratified random sample of a map: how many points each class gets, and which pixels they are."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree.ElementTree import Element, SubElement, tostring

import numpy as np
import rasterio

from common.errors import DatasetError
from common.files import atomic_write, part_prefix
from common.ground import pixel_areas
from common.labels import require_one_band
from common.rasters import Source, open_raster, require_georeference
from common.styles import DOCTYPE, QGIS
from common.text import aligned_table, listed
from common.vectors import write_layer
from evaluation.classes import Classes
from evaluation.reading import classes_of_map, progress, read_guess, row_strips
from evaluation.settings import EvaluationConfig

log = logging.getLogger("semanticseg4eo")

LAYER = "sample"
HIDDEN = ("stratum", "weight")  # columns that would give the map's class away
MARKER = {
    "name": "cross",
    "color": "230,30,30,255",
    "outline_color": "230,30,30,255",
    "outline_width": "0.6",
    "size": "4",
}
# a map's class is never expected to be better, nor worse than what that leaves
LIKELIEST = 0.95


class Point(NamedTuple):
    """A pixel of the sample."""

    stratum: int
    row: int
    column: int


def allocate(
    sizes: np.ndarray, points: int, least: int, spread: np.ndarray | None = None
) -> np.ndarray:
    """How many points each stratum gets, (H,) int64.

    Args:
        sizes: (H,) pixels of each stratum.
        points: Of all; more only where ``least`` in each stratum exceed it.
        least: Points in each stratum, or all its pixels; taken from those with most points.
        spread: (H,) by which sizes are weighted: ones, or none, for proportional, 1 / sizes for
            equal, the expected standard deviations for Neyman allocation (Cochran 1977, Sampling
            techniques, equation 5.26).
    """
    sizes = np.asarray(sizes, np.int64)
    weights = sizes * (np.ones(len(sizes)) if spread is None else spread)
    exact = points * weights / weights.sum()
    floor = np.minimum(sizes, least)
    drawn = np.clip(np.floor(exact + 1e-9).astype(np.int64), floor, sizes)
    while drawn.sum() > points and (drawn > floor).any():
        drawn[np.where(drawn > floor, drawn, -1).argmax()] -= 1
    while drawn.sum() < points and (drawn < sizes).any():
        drawn[np.where(drawn < sizes, exact - drawn, -np.inf).argmax()] += 1
    return drawn


def spread_of(kind: str, sizes: np.ndarray, expected: Callable[[], np.ndarray]):
    """What ``allocate`` weights strata by, for a value of ``--allocate``.

    ``expected`` gives the user's accuracies for neyman.
    """
    if kind == "proportional":
        return None
    if kind == "equal":
        return 1 / sizes
    accuracy = np.clip(expected(), 1 - LIKELIEST, LIKELIEST)
    return np.sqrt(accuracy * (1 - accuracy))


def strips(raster: rasterio.DatasetReader, mapped: Classes, what: str) -> Iterator:
    """The classes of a map (h, W) int16 from top to bottom, and the row that each part begins at."""
    source = Source(raster)
    for window, _ in progress(list(row_strips(*raster.shape, 1, 0)), what):
        yield read_guess(source, window, mapped), int(window.row_off)


def count_classes(raster, mapped: Classes) -> tuple[np.ndarray, np.ndarray | None]:
    """Pixels (K,) of each class of a map, and hectares (K,), None without a usable CRS."""
    count, areas = len(mapped.names), pixel_areas(raster)
    pixels, hectares = np.zeros(count, np.int64), np.zeros(count)
    for guess, top in strips(raster, mapped, "counting"):
        for row, line in enumerate(guess, top):
            found = np.bincount(line[line >= 0], minlength=count)
            pixels += found
            if areas is not None:
                hectares += found * areas[row] / 1e4
    return pixels, None if areas is None else hectares


def draw_points(
    raster, mapped: Classes, pixels: np.ndarray, drawn: np.ndarray, seed: int
) -> list[Point]:
    """Pixels drawn at random within each class, without replacement, in random order.

    Args:
        raster: The map.
        mapped: Its classes.
        pixels: (K,) of each of them.
        drawn: (K,) how many to draw.
        seed: Of the draw.
    """
    rng = np.random.default_rng(seed)
    ranks = [
        np.sort(rng.choice(size, number, replace=False))
        for size, number in zip(pixels, drawn)
    ]
    seen, points = np.zeros(len(pixels), np.int64), []
    for guess, top in strips(raster, mapped, "drawing"):
        flat = guess.ravel()
        found = np.bincount(flat[flat >= 0], minlength=len(pixels))
        for stratum in np.flatnonzero(found):
            first, last = np.searchsorted(
                ranks[stratum], [seen[stratum], seen[stratum] + found[stratum]]
            )
            if last > first:
                places = np.flatnonzero(flat == stratum)
                for place in places[ranks[stratum][first:last] - seen[stratum]]:
                    row, column = divmod(int(place), guess.shape[1])
                    points.append(Point(int(stratum), top + row, column))
        seen += found
    points.sort(key=lambda point: (point.row, point.column))
    return [points[number] for number in rng.permutation(len(points))]


def make_sample(config: EvaluationConfig) -> str:
    """Draw a sample of a map and write it; what was drawn as text.

    Raises:
        SegmentationError: There is no pixel to draw, or the file cannot be written.
    """
    with open_raster(config.map) as raster:
        require_one_band(raster)
        require_georeference(raster)
        mapped = classes_of_map(raster)
        pixels, hectares = count_classes(raster, mapped)
        there = np.flatnonzero(pixels)
        if not len(there):
            raise DatasetError(
                f"{config.map} holds no pixel with a class: nothing to sample"
            )

        def expected() -> np.ndarray:
            from evaluation.expectation import expected_accuracies

            found = expected_accuracies(config, mapped.names)
            return np.array([found[number] for number in there])

        spread = spread_of(config.allocate, pixels[there], expected)
        drawn = np.zeros(len(pixels), np.int64)
        drawn[there] = allocate(
            pixels[there], config.sample, config.min_per_class, spread
        )
        if drawn.sum() != config.sample:
            log.info(
                "%d points, not %d: %s", drawn.sum(), config.sample, _why(config, drawn)
            )
        if empty := [mapped.names[number] for number in there if not drawn[number]]:
            log.warning(
                "warning: no point lies in %s, so areas and overall accuracy cannot be estimated; "
                "give more points, or a larger --min_per_class", listed(empty),
            )  # fmt: skip
        points = draw_points(raster, mapped, pixels, drawn, config.seed)
        metadata = {"MAP": Path(config.map).name, "SEED": str(config.seed)}
        strata = {mapped.names[number]: int(pixels[number]) for number in there}
        metadata["STRATA"] = json.dumps(strata)
        if hectares is not None:
            metadata["HECTARES"] = repr(float(hectares.sum()))
        table = sample_table(
            raster, mapped.names, points, pixels / np.maximum(drawn, 1)
        )
    write_sample(Path(config.output_path), table, metadata)
    rows = [["", "pixels", "share", "points"]]
    for number in there:
        share = pixels[number] / pixels.sum()
        rows.append(
            [
                mapped.names[number],
                f"{pixels[number]:,}",
                f"{share:.2%}",
                str(drawn[number]),
            ]
        )
    return aligned_table(rows)


def _why(config: EvaluationConfig, drawn: np.ndarray) -> str:
    if drawn.sum() < config.sample:
        return "the map has no more pixels"
    return f"--min_per_class {config.min_per_class} of each class"


def sample_table(
    raster, names: Sequence[str], points: Sequence[Point], weights: np.ndarray
):
    """The points as a GeoDataFrame, in the middle of their pixels."""
    import geopandas
    import shapely

    stratum, row, column = np.array(points).T
    x, y = raster.transform * (column + 0.5, row + 0.5)
    columns = {
        "id": np.arange(1, len(points) + 1),
        "reference": np.array([None] * len(points), object),
        "stratum": [names[number] for number in stratum],
        "weight": weights[stratum],
    }
    table = geopandas.GeoDataFrame(
        columns, geometry=shapely.points(x, y), crs=raster.crs.to_wkt()
    )
    return table.astype({"reference": "string"})


def write_sample(target: Path, table, metadata: dict[str, str]) -> None:
    """Write the points as a GeoPackage with a style that hides what the map says of them."""
    with (
        atomic_write(target) as part,
        tempfile.TemporaryDirectory(
            prefix=part_prefix(target), dir=part.parent
        ) as folder,
    ):
        file = Path(folder) / "sample.gpkg"
        write_layer(
            table, file, layer=LAYER, driver="GPKG", geometry_type="Point",
            layer_metadata=metadata,
        )  # fmt: skip
        add_style(file, list(table.columns.drop("geometry")))
        os.replace(file, part)


def add_style(file: Path, columns: Sequence[str]) -> None:
    """Store a default style of QGIS in a GeoPackage: all points alike, and columns hidden."""
    with sqlite3.connect(file) as base:
        base.execute(
            "CREATE TABLE layer_styles (id INTEGER PRIMARY KEY AUTOINCREMENT, f_table_catalog TEXT, "
            "f_table_schema TEXT, f_table_name TEXT, f_geometry_column TEXT, styleName TEXT, "
            "styleQML TEXT, styleSLD TEXT, useAsDefault BOOLEAN, description TEXT, owner TEXT, "
            "ui TEXT, update_time DATETIME DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ','now')))"
        )
        base.execute(
            "INSERT INTO gpkg_contents (table_name, data_type, identifier) "
            "VALUES ('layer_styles', 'attributes', 'layer_styles')"
        )
        (geometry,) = base.execute(
            "SELECT column_name FROM gpkg_geometry_columns WHERE table_name = ?",
            (LAYER,),
        ).fetchone()
        base.execute(
            "INSERT INTO layer_styles (f_table_catalog, f_table_schema, f_table_name, "
            "f_geometry_column, styleName, styleQML, styleSLD, useAsDefault, description, owner) "
            "VALUES ('', '', ?, ?, 'sample', ?, '', 1, 'points to be labelled', '')",
            (LAYER, geometry, style_text(columns)),
        )
    base.close()


def style_text(columns: Sequence[str]) -> str:
    """The style as QML: red crosses; form and table without the hidden columns."""
    categories = "Symbology|Forms|AttributeTable|Fields"
    root = Element("qgis", version=QGIS, styleCategories=categories)
    renderer = SubElement(root, "renderer-v2", type="singleSymbol")
    symbols = SubElement(renderer, "symbols")
    symbol = SubElement(symbols, "symbol", type="marker", name="0", alpha="1")
    kind = {"class": "SimpleMarker", "enabled": "1", "locked": "0", "pass": "0"}
    layer = SubElement(symbol, "layer", kind)
    for name, value in MARKER.items():
        SubElement(layer, "prop", k=name, v=value)
    fields = SubElement(root, "fieldConfiguration")
    shown = SubElement(SubElement(root, "attributetableconfig"), "columns")
    editable = SubElement(root, "editable")
    for name in columns:
        hidden = name in HIDDEN
        widget = "Hidden" if hidden else "TextEdit"
        edit = SubElement(
            SubElement(fields, "field", name=name), "editWidget", type=widget
        )
        SubElement(SubElement(edit, "config"), "Option")
        SubElement(shown, "column", type="field", name=name, hidden=str(int(hidden)))
        SubElement(editable, "field", name=name, editable=str(int(name == "reference")))
    SubElement(root, "previewExpression").text = '"id"'
    return DOCTYPE + tostring(root, encoding="unicode")
