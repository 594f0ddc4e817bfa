"""The ground of patches in longitude and latitude, for catalogues, from what a checkpoint says.

Geometries are shapely's, in WGS 84 with the longitude first, from -180 to 180: ground beyond the
antimeridian lies in parts on both sides.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import shapely
from rasterio.crs import CRS
from shapely.geometry.polygon import orient

from common.ground import on_earth, to_one_crs

MOST_POLYGONS = 100  # where patches lie in more parts, neighbours get a hull
DIGITS = 6  # of a degree, which is a tenth of a metre
UNIT = 10**-DIGITS


def ground_of(
    places: Sequence[dict], splits: Collection[str]
) -> shapely.MultiPolygon | shapely.Polygon | None:
    """Where the patches of some splits lie; None where no file says it.

    Args:
        places: As checkpoints hold them: ``split``, ``crs`` and the ``bounds`` of patches.
        splits: Names of splits.
    """
    polygons = []
    for place in places:
        if place["split"] in splits and place["bounds"] and place["crs"]:
            polygons += _polygons_in_degrees(place["crs"], place["bounds"])
    if not polygons:
        return None
    ground = _fewer_parts(shapely.union_all(polygons).simplify(10 * UNIT))
    ground = shapely.set_precision(ground, UNIT)
    parts = [orient(part) for part in shapely.get_parts(ground)]  # RFC 7946, 3.1.6
    return parts[0] if len(parts) == 1 else shapely.MultiPolygon(parts)


def _fewer_parts(ground: shapely.Geometry) -> shapely.Geometry:
    """Ground of many parts as the hulls of those that begin in one square of longitude and latitude."""
    parts, side = shapely.get_parts(ground), 1e-2  # degrees
    while len(parts) > MOST_POLYGONS:
        squares = np.floor(shapely.bounds(parts)[:, :2] / side)
        groups = np.unique(squares, axis=0, return_inverse=True)[1].ravel()
        order = np.argsort(groups)
        together = shapely.multipolygons(parts[order], indices=groups[order])
        parts = shapely.get_parts(shapely.union_all(shapely.convex_hull(together)))
        side *= 2
    return shapely.union_all(parts)


def _polygons_in_degrees(crs: str, bounds: Sequence) -> list[shapely.Polygon]:
    """Boxes in a CRS as polygons in degrees; none where the CRS has no place on the Earth."""
    system = CRS.from_user_input(crs)
    if not on_earth(system):
        return []
    union = shapely.union_all(shapely.box(*np.transpose(bounds)))
    parts = shapely.get_parts(union)
    parts = to_one_crs(parts, [system] * len(parts), "EPSG:4326")
    there = [part for part in parts if np.isfinite(part.bounds).all()]
    return [half for part in there for half in _cut_at_antimeridian(part)]


def _cut_at_antimeridian(polygon: shapely.Polygon) -> list[shapely.Polygon]:
    """A polygon as it is; its two sides where it spans the 180th meridian."""
    west, _, east, _ = polygon.bounds
    if east - west <= 180:
        return [polygon]
    # from 0 to 360 degrees it is in one piece
    turned = shapely.transform(
        polygon, lambda p: np.where(p[:, :1] < 0, p + [360, 0], p)
    )
    sides = (
        turned & shapely.box(0, -90, 180, 90),
        turned & shapely.box(180, -90, 360, 90),
    )
    back = shapely.transform(sides[1], lambda p: p - [360, 0])
    return [*shapely.get_parts(sides[0]), *shapely.get_parts(back)]


def bounding_box(ground: shapely.MultiPolygon | shapely.Polygon) -> list[float]:
    """West, south, east and north; west is larger than east beyond the antimeridian (RFC 7946)."""
    west, south, east, north = shapely.bounds(shapely.get_parts(ground)).T
    box = [west.min(), south.min(), east.max(), north.max()]
    if box[0] == -180 and box[2] == 180:
        box[0], box[2] = west[west >= 0].min(), east[east <= 0].max()
    return [round(float(value), DIGITS) for value in box]
