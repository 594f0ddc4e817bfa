"""The ground of patches as catalogues hold it: a small geometry of GeoJSON, and its bounding box."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np
import shapely
from shapely.geometry.polygon import orient

from common.places import footprint_of

MOST_POLYGONS = 100  # where patches lie in more parts, neighbours get a hull
UNIT = 1e-6  # of a degree, which is a tenth of a metre; less where patches are small
DIGITS = 9  # the most of a degree that small patches get


def outline_of(
    places: Sequence[dict] | None, splits: Collection[str]
) -> shapely.MultiPolygon | shapely.Polygon | None:
    """Where the patches of some splits lie, in WGS 84, to a metre; see ``footprint_of``."""
    ground = footprint_of(places, splits)
    if ground is None:
        return None
    side = float(np.median(np.sqrt(shapely.area(shapely.get_parts(ground)))))
    digits = math.ceil(-math.log10(min(max(side / 100, 10.0**-DIGITS), UNIT)))
    unit = 10.0**-digits
    ground = shapely.set_precision(_fewer_parts(ground.simplify(10 * unit)), unit)
    if ground.is_empty:  # smaller than what the digits show
        return None
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


def bounding_box(ground: shapely.MultiPolygon | shapely.Polygon) -> list[float]:
    """West, south, east and north; west is larger than east beyond the antimeridian (RFC 7946).

    Ground lies beyond it where it touches it from both sides, or leaves half of the globe free.
    """
    parts = shapely.bounds(shapely.get_parts(ground))
    west, south, east, north = parts[np.argsort(parts[:, 0])].T
    box = [west.min(), south.min(), east.max(), north.max()]
    reached = np.maximum.accumulate(east)
    gaps = west[1:] - reached[:-1]
    least = 0 if box[0] == -180 and box[2] == 180 else 180
    if gaps.max(initial=0) > least:
        before = gaps.argmax()
        box[0], box[2] = west[before + 1], reached[before]
    return [round(float(value), DIGITS) for value in box]
