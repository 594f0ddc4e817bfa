"""Vector files: reading layers, their geometries in pixels, adding features to a GeoPackage."""

from __future__ import annotations

import logging
import os
import sqlite3
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import rasterio

from common.errors import (
    DatasetError,
    SegmentationError,
    gdal_message,
    require,
    unknown_name,
)
from common.files import atomic_write, naming, part_prefix
from common.options import has_geopandas
from common.shapefiles import ASSUMED, decode_utf8, guessed_encoding

if TYPE_CHECKING:
    from geopandas import GeoDataFrame
    from shapely import Geometry

log = logging.getLogger("semanticseg4eo")

VECTOR_SUFFIXES = (
    ".shp", ".gpkg", ".geojson", ".json", ".fgb", ".kml", ".gml", ".parquet", ".zip",
)  # fmt: skip

# where QGIS keeps styles in a GeoPackage, registered as a table without geometries
STYLE_TABLE = (
    """CREATE TABLE layer_styles (
        "id" INTEGER PRIMARY KEY AUTOINCREMENT NOT NULL, "f_table_catalog" TEXT(256),
        "f_table_schema" TEXT(256), "f_table_name" TEXT(256), "f_geometry_column" TEXT(256),
        "styleName" TEXT(30), "styleQML" TEXT, "styleSLD" TEXT, "useAsDefault" BOOLEAN,
        "description" TEXT, "owner" TEXT(30), "ui" TEXT(30),
        "update_time" DATETIME DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ','now')))""",
    """INSERT INTO gpkg_contents (table_name, data_type, identifier, srs_id)
        VALUES ('layer_styles', 'attributes', 'layer_styles', 0)""",
)


def has_vector_library(otherwise: str) -> bool:
    """Whether geopandas is there; a line says what is done ``otherwise``.

    Training and mapping need it for extras alone, and may run on a machine of few libraries.
    """
    there = has_geopandas()
    if not there:
        log.warning("geopandas is not installed: %s", otherwise)
    return there


def file_and_layer(source: str) -> tuple[str, str | None]:
    """The file of a source, and the layer that it names as QGIS does: ``file|layername=x``.

    Raises:
        OptionError: It asks for anything but a layer by name, as a filter, which would be ignored.
    """
    file = file_of(source)
    if file == source:
        return file, None
    key, _, name = source.removeprefix(f"{file}|").partition("=")
    fine = key.lower() == "layername" and name != "" and "|" not in name
    require(fine, "vector file", source, f"{file}|layername=NAME and no more")
    return file, name


def file_of(source: str) -> str:
    """The file of a source that may name a layer."""
    return source if os.path.exists(source) else source.partition("|")[0]


def files_of_vector(source: str) -> list[str]:
    """The file of a source; of a shapefile all of its parts, since classes are in its .dbf."""
    file = Path(file_of(source))
    if file.suffix.lower() != ".shp":
        return [str(file)]
    parts = [file.with_suffix(ending) for ending in (".dbf", ".shx", ".prj", ".cpg")]
    return [str(file), *(str(part) for part in parts if part.is_file())]


def is_vector(source: str) -> bool:
    """Whether a source is a vector file, by its suffix."""
    return Path(file_of(source)).suffix.lower() in VECTOR_SUFFIXES


def _choose_layer(file: str, asked: str | None) -> str | None:
    """The layer to read: the one asked for, else the only one that has geometries."""
    from pyogrio import list_layers

    kinds = dict(list_layers(file))
    drawn = [name for name, kind in kinds.items() if kind]  # QGIS adds tables of styles
    if asked is not None and asked not in kinds:
        raise unknown_name(f"layer of {file}", asked, drawn)
    if asked is None and len(drawn) > 1:
        raise DatasetError(
            f"{file} has {len(drawn)} layers with geometries ({', '.join(drawn[:24])}); name one, "
            f'as "{file}|layername={drawn[0]}"'
        )
    return asked or (drawn or [None])[0]


def read_vector(path: str) -> GeoDataFrame:
    """A layer of a vector file, with geometries and a CRS.

    Args:
        path: Of the file. Where several of its layers have geometries, with ``|layername=NAME``.

    Raises:
        DatasetError: Missing, unreadable, no geometry, no CRS, or several layers.
        OptionError: No such layer.
    """
    import geopandas

    file, asked = file_and_layer(path)
    try:
        if Path(file).suffix.lower() == ".parquet":
            table = geopandas.read_parquet(file)
        else:
            table = _read_layer(file, _choose_layer(file, asked))
    except SegmentationError:
        raise
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{path} has texts in another encoding than UTF-8; write the right one, as CP1252, into a "
            ".cpg file beside it"
        ) from error
    except Exception as error:  # every driver raises its own kinds
        raise DatasetError(
            f"{path} cannot be read as a vector file: {gdal_message(error):.100}; give a complete "
            "GeoPackage, GeoJSON, or shapefile with its .shx and .dbf beside it"
        ) from error
    if not isinstance(table, geopandas.GeoDataFrame) or table.geometry.isna().all():
        raise DatasetError(f"{path} has no geometries; draw polygons into it")
    if table.crs is None:
        raise DatasetError(
            f"{path} has no CRS; add it (a shapefile keeps it in a .prj file beside it)"
        )
    return table


def _read_layer(file: str, layer: str | None) -> GeoDataFrame:
    """A layer whose texts are decoded; ``attrs["encoding"]`` is what had to be guessed for it."""
    import geopandas

    encoding = guessed_encoding(file, layer)
    options = {"encoding": encoding} if encoding else {}
    try:
        table = geopandas.read_file(file, layer=layer, **options)
    except UnicodeDecodeError:  # also of a letter that is cut off
        table = geopandas.read_file(file, layer=layer, encoding=ASSUMED)
        table = table.rename(columns=_as_utf8)
        for name in table.columns.drop("geometry", errors="ignore"):
            if table[name].dtype.kind == "O":
                table[name] = table[name].map(_as_utf8)
    table.attrs["encoding"] = encoding
    return table


def _as_utf8(text):
    """A text that was decoded byte by byte as what its bytes stand for; other values as they are."""
    return decode_utf8(text.encode("latin-1")) if isinstance(text, str) else text


def find_column(table: GeoDataFrame, option: str, name: str) -> str:
    """The column of a table that an option names, in any case.

    Raises:
        OptionError: No such column.
    """
    columns = [str(column) for column in table.columns if column != "geometry"]
    alike = [column for column in columns if column.lower() == name.lower()]
    if not alike:
        raise unknown_name(option, name, columns)
    return name if name in alike else alike[0]


def in_pixels(
    table: GeoDataFrame, image: rasterio.DatasetReader, source: str, cut: bool = False
):
    """The geometries of a table as a GeoSeries in the image's pixel coordinates (x, y).

    Args:
        table: With a CRS.
        image: With a place on the ground.
        source: The table's file, for messages.
        cut: Cut polygons to the ground around the image before they are transformed, and make
            those elsewhere None: what a projection makes of the far side of the Earth is no polygon.

    Raises:
        DatasetError: No transformation between the two CRS is known, or what is left of a geometry
            has no place in the image's CRS.
    """
    from pyproj.exceptions import ProjError

    a, b, c, d, e, f = (~image.transform)[:6]
    try:
        shapes = _cut_around(table.geometry, image) if cut else table.geometry
        outlines = shapes.to_crs(image.crs)
    except ProjError as error:
        raise DatasetError(
            f"{source} cannot be transformed to the CRS of {image.name}: {error}"
        ) from error
    known = ~(outlines.isna() | outlines.is_empty).to_numpy()
    lost = known & ~np.isfinite(outlines.bounds.to_numpy()).all(axis=1)
    if cut and lost.any():
        raise DatasetError(
            f"{source}: {lost.sum()} outlines reach beyond what the CRS of {image.name} can "
            "show; cut them to the ground of the scene (Clip in QGIS)"
        )
    return outlines.affine_transform([a, b, d, e, c, f])


def _cut_around(outlines, image: rasterio.DatasetReader):
    """A GeoSeries in its own CRS, cut to the ground around an image of another."""
    import geopandas
    import shapely

    box = around(image, outlines.crs, 1) if outlines.crs != image.crs else None
    if box is None:
        return outlines
    shapes = outlines.to_numpy().copy()
    low, high = np.split(shapely.bounds(shapes)[:, None], 2, axis=2)
    parts = shapely.bounds(shapely.get_parts(box))
    apart = ((high < parts[:, :2]) | (low > parts[:, 2:])).any(axis=2).all(axis=1)
    inside = ((low >= parts[:, :2]) & (high <= parts[:, 2:])).all(axis=2).any(axis=1)
    reach = ~apart & ~inside & ~shapely.is_missing(shapes)
    shapes[apart] = None
    shapes[reach] = shapely.intersection(shapely.make_valid(shapes[reach]), box)
    return geopandas.GeoSeries(shapes, index=outlines.index, crs=outlines.crs)


def around(image: rasterio.DatasetReader, crs, margin: float) -> Geometry | None:
    """Boxes in another CRS around what an image covers, at each turn of the globe in degrees.

    Args:
        image: With a CRS and a place on the ground.
        crs: Of the boxes.
        margin: On each side, as a share of the image's width and height there.

    Returns:
        None where part of the image has no place in that CRS.
    """
    import shapely
    from pyproj import CRS, Transformer

    sides = (np.linspace(0, side, 21) for side in (image.width, image.height))
    column, row = np.meshgrid(*sides)
    a, b, c, d, e, f = image.transform[:6]
    ground = a * column + b * row + c, d * column + e * row + f
    there = Transformer.from_crs(image.crs, crs, always_xy=True)
    x, y = np.array(there.transform(*ground)).reshape(2, -1)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return None
    turns = (0,)
    if CRS.from_user_input(
        crs
    ).is_geographic:  # the image may lie across the antimeridian
        x, turns = x[0] + (x - x[0] + 180) % 360 - 180, (-360, 0, 360)
    across, along = margin * np.ptp(x), margin * np.ptp(y)
    left, right = x.min() - across, x.max() + across
    bottom, top = y.min() - along, y.max() + along
    boxes = [shapely.box(left + turn, bottom, right + turn, top) for turn in turns]
    return shapely.union_all(boxes)


def polygonal(outline: Geometry | None) -> Geometry | None:
    """The valid polygons of a geometry as one; None when there are none."""
    import shapely

    if outline is None or not np.isfinite(outline.bounds).all():
        return outline if outline is not None and not outline.is_empty else None
    parts = shapely.get_parts(shapely.make_valid(outline))
    parts = [part for part in shapely.get_parts(parts) if part.area > 0]
    return shapely.union_all(parts) if parts else None


def append_features(file: Path, layer: str, table: dict, crs) -> None:
    """Add polygons to a layer of a GeoPackage, which is made when it is not there.

    Raises:
        SegmentationError: They cannot be written.
    """
    import geopandas

    frame = geopandas.GeoDataFrame(table, crs=crs and crs.to_wkt())
    options = {"layer": layer, "driver": "GPKG", "geometry_type": "Polygon"}
    options["mode"] = "a" if file.exists() else "w"
    write_layer(frame, file, **options)


def write_layer(frame: GeoDataFrame, file: Path, **options) -> None:
    """Write a table to a vector file, as pyogrio does.

    Raises:
        SegmentationError: It cannot be written.
    """
    from pyogrio.errors import DataLayerError, DataSourceError

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "'crs' was not provided")
            frame.to_file(file, engine="pyogrio", **options)
    except (DataSourceError, DataLayerError) as error:
        raise _incomplete(file, gdal_message(error)) from error


@contextmanager
def new_geopackage(target: Path) -> Iterator[Path]:
    """A GeoPackage to fill; it gets its name only when the block succeeds."""
    with (
        atomic_write(target) as part,
        # SQLite's own files lie beside a GeoPackage while it grows
        tempfile.TemporaryDirectory(
            ".part", part_prefix(Path(target)), part.parent
        ) as folder,
    ):
        file = Path(folder) / "map.gpkg"
        with naming(target, file):
            yield file
        file.replace(part)


def add_style(file: Path, layer: str, style: str) -> None:
    """Store the QGIS style of a layer in its GeoPackage, as its default.

    The table ``layer_styles`` is the one that QGIS makes, to which it adds styles later.

    Raises:
        SegmentationError: It cannot be written.
    """
    try:
        with closing(sqlite3.connect(file)) as base, base:
            for statement in STYLE_TABLE:
                base.execute(statement)
            base.execute(
                "INSERT INTO layer_styles (f_table_catalog, f_table_schema, f_table_name, "
                "f_geometry_column, styleName, styleQML, useAsDefault, description, owner) "
                "SELECT '', '', table_name, column_name, table_name, ?, 1, '', '' "
                "FROM gpkg_geometry_columns WHERE table_name = ?",
                (style, layer),
            )
    except sqlite3.Error as error:
        raise _incomplete(file, str(error)) from error


def _incomplete(file: Path, reason: str) -> SegmentationError:
    """The error of a file that could not be written; GDAL may quote pages of SQL."""
    return SegmentationError(
        f"{file} was not written completely ({reason:.120}); is the disk full? "
        "free some, or write elsewhere"
    )
