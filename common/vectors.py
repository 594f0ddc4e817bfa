"""Vector files: reading layers, their geometries in pixels, adding features to a GeoPackage."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import rasterio

from common.errors import DatasetError, SegmentationError, gdal_message

if TYPE_CHECKING:
    from geopandas import GeoDataFrame
    from shapely import Geometry

VECTOR_SUFFIXES = (
    ".shp", ".gpkg", ".geojson", ".json", ".fgb", ".kml", ".gml", ".parquet", ".zip",
)  # fmt: skip


def read_vector(path: str) -> GeoDataFrame:
    """A vector file with geometries and a CRS.

    Raises:
        DatasetError: Missing, unreadable, no geometry, or no CRS.
    """
    import geopandas

    read = geopandas.read_file
    if Path(path).suffix.lower() == ".parquet":
        read = geopandas.read_parquet
    try:
        table = read(path)
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


def in_pixels(table: GeoDataFrame, image: rasterio.DatasetReader, source: str):
    """The geometries of a table as a GeoSeries in the image's pixel coordinates (x, y).

    Raises:
        DatasetError: No transformation between the two CRS is known.
    """
    from pyproj.exceptions import ProjError

    a, b, c, d, e, f = (~image.transform)[:6]
    try:
        outlines = table.geometry.to_crs(image.crs)
    except ProjError as error:
        raise DatasetError(
            f"{source} cannot be transformed to the CRS of {image.name}: {error}"
        ) from error
    return outlines.affine_transform([a, b, d, e, c, f])


def polygonal(outline: Geometry | None) -> Geometry | None:
    """The valid polygons of a geometry as one; None when there are none."""
    import shapely

    if outline is None or not np.isfinite(outline.bounds).all():
        return outline if outline is not None and not outline.is_empty else None
    parts = shapely.get_parts(shapely.make_valid(outline))
    parts = [part for part in shapely.get_parts(parts) if part.area > 0]
    return shapely.union_all(parts) if parts else None


def append_features(file: Path, layer: str, table: dict, crs) -> None:
    """Add features to a layer of a GeoPackage, which is made when it is not there.

    Raises:
        SegmentationError: They cannot be written.
    """
    import geopandas
    from pyogrio.errors import DataLayerError, DataSourceError

    frame = geopandas.GeoDataFrame(table, crs=crs and crs.to_wkt())
    options = {"layer": layer, "driver": "GPKG", "geometry_type": "Polygon"}
    options["mode"] = "a" if file.exists() else "w"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "'crs' was not provided")
            frame.to_file(file, engine="pyogrio", **options)
    except (DataSourceError, DataLayerError) as error:
        raise SegmentationError(  # GDAL may quote pages of SQL
            f"Cannot write the polygons {layer}: {gdal_message(error):.120}; "
            "is the disk full?"
        ) from error
