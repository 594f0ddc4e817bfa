"""Labels at points: CSV tables with coordinates, and the ground around points and lines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import rasterio

from common.errors import DatasetError, OptionError
from common.ground import footprint, to_one_crs

if TYPE_CHECKING:
    from geopandas import GeoDataFrame
    from pandas import DataFrame

# columns of degrees, in the order in which they are looked for
DEGREES = (("longitude", "latitude"), ("lon", "lat"))
ASKED_CRS = ("x", "y")
# not "None", which may be a class
EMPTY = ("", "NA", "N/A", "#N/A", "NaN", "nan", "NULL", "null")
AREAS = ("Polygon", "MultiPolygon", "GeometryCollection")


def is_point_table(source: str) -> bool:
    """Whether a label is a CSV table of points, by its suffix."""
    return Path(source).suffix.lower() == ".csv"


def read_points(source: str, crs: str | None) -> GeoDataFrame:
    """A CSV table (UTF-8) of points, its other columns kept.

    Args:
        source: The file, with commas, semicolons or tabs between its columns. Points are in the
            columns ``longitude`` and ``latitude`` or ``lon`` and ``lat`` in degrees (WGS 84), else
            ``x`` and ``y``, in any case.
        crs: ``--label_crs`` of ``x`` and ``y``.

    Raises:
        DatasetError: It cannot be read, lacks such columns, or a row has no place.
        OptionError: ``crs`` is missing, no CRS, or not needed.
    """
    import geopandas
    import pandas
    from pyproj.exceptions import CRSError

    try:
        with open(source, encoding="utf-8-sig") as file:
            head = file.readline()
        mark = max(",;\t", key=head.count)
        # as spreadsheets of many languages write it
        decimal = "," if mark == ";" else "."
        table = pandas.read_csv(
            source,
            sep=mark,
            decimal=decimal,
            encoding="utf-8-sig",
            skipinitialspace=True,
            keep_default_na=False,
            na_values=EMPTY,
        )
        is_shifted = not isinstance(table.index, pandas.RangeIndex)
        if is_shifted:  # the first column is taken for names of rows
            raise ValueError(
                "its rows have more columns than its head; quote texts that hold a separator"
            )
        table.columns = [str(name).strip() for name in table.columns]
    except (OSError, ValueError) as error:  # pandas' errors are values too
        raise DatasetError(
            f"{source} cannot be read as a CSV table (UTF-8): {error!s:.100}"
        ) from error
    pair, columns = _coordinates(table, source)
    if (pair == ASKED_CRS) != (crs is not None):
        expected = (
            "the CRS of x and y" if crs is None else "x and y with it, not degrees"
        )
        raise OptionError(f"--label_crs {crs}: expected {expected} in {source}")
    points = geopandas.points_from_xy(*columns)
    try:
        return geopandas.GeoDataFrame(table, geometry=points, crs=crs or "EPSG:4326")
    except CRSError:
        raise OptionError(f"--label_crs {crs}: expected a CRS, as EPSG:32633") from None


def _coordinates(table: DataFrame, source: str) -> tuple[tuple[str, str], list]:
    """The names of the columns of a table's coordinates, and these as numbers.

    Raises:
        DatasetError: There are none, a row lacks one, or degrees are none.
    """
    import pandas

    by_name = {str(name).strip().lower(): name for name in table.columns}
    pair = next(
        (pair for pair in (*DEGREES, ASKED_CRS) if set(pair) <= set(by_name)), None
    )
    if pair is None:
        raise DatasetError(
            f"{source} has the columns {', '.join(map(str, table.columns[:12]))}; points need "
            "longitude and latitude, lon and lat, or x and y with --label_crs"
        )
    columns = [
        pandas.to_numeric(table[by_name[name]], errors="coerce") for name in pair
    ]
    lost = np.flatnonzero(~np.isfinite(np.stack(columns)).all(axis=0))
    if len(lost):
        raise DatasetError(
            f"{source} has no place in row {lost[0] + 2} ({len(lost)} such rows); fill in "
            f"{' and '.join(pair)} or remove it"
        )
    if pair != ASKED_CRS and not (
        columns[0].abs().le(360).all() and columns[1].abs().le(90).all()
    ):
        raise DatasetError(
            f"{source} has values in {' and '.join(pair)} that are no degrees; call projected "
            "coordinates x and y, and give --label_crs"
        )
    return pair, columns


def has_areas(table: GeoDataFrame) -> bool:
    """Whether all geometries of a table are polygons."""
    return set(table.geom_type.dropna()) <= set(AREAS)


def buffer_points(
    table: GeoDataFrame, metres: float, image: rasterio.DatasetReader
) -> GeoDataFrame:
    """A table whose points and lines are the ground around them, its polygons as they are.

    Args:
        table: In any CRS.
        metres: From the point or line to the border of its ground.
        image: The scene that they label; lengths are true around its middle.
    """
    thin = ~(table.geometry.isna() | table.geometry.is_empty)
    thin &= ~table.geom_type.isin(AREAS)
    outline = footprint(image.transform, image.height, image.width)
    middle = to_one_crs([outline], [image.crs], "EPSG:4326").iloc[0].centroid
    plane = f"+proj=aeqd +lat_0={middle.y} +lon_0={middle.x} +datum=WGS84 +units=m"
    around = table.geometry[thin].to_crs(plane).buffer(metres)
    table = table.copy()
    table.loc[thin, table.geometry.name] = around.to_crs(table.crs)
    return table
