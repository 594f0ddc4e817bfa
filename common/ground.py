"""Where pixels and patches lie, in metres on the ellipsoid: areas, footprints, blocks, distances."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import rasterio

if TYPE_CHECKING:
    from affine import Affine
    from geopandas import GeoSeries
    from shapely import Geometry


def _horizontal(crs):
    """A CRS as pyproj's, without heights."""
    from pyproj import CRS

    known = CRS.from_wkt(crs.to_wkt())
    return known.sub_crs_list[0] if known.is_compound else known


def _to_degrees(known, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Longitudes and latitudes, in the datum of a CRS of pyproj's; infinite off the Earth."""
    from pyproj import Transformer

    geodetic = known.geodetic_crs
    degrees = np.degrees(geodetic.axis_info[0].unit_conversion_factor)  # of its unit
    ground = Transformer.from_crs(known, geodetic, always_xy=True).transform(x, y)
    longitudes, latitudes = (degrees * values for values in ground)
    return longitudes, np.where(np.isfinite(latitudes), latitudes.clip(-90, 90), np.inf)


def in_true_metres(crs, footprints: Sequence[Geometry]) -> bool:
    """Whether lengths in a CRS are, to half a percent, metres on the ground of some footprints.

    Not in degrees or feet, nor where a projection stretches the ground.
    """
    import shapely

    if not (crs.is_projected and crs.linear_units_factor[1] == 1):
        return False
    known = _horizontal(crs)
    chosen = footprints[:: len(footprints) // 64 + 1]
    west, south, east, north = shapely.bounds(chosen).T
    x, y = (west + east) / 2, (south + north) / 2
    for ends, length in (
        ((west, y, east, y), east - west),
        ((x, south, x, north), north - south),
    ):
        first, last = _to_degrees(known, *ends[:2]), _to_degrees(known, *ends[2:])
        if not np.isfinite([*first, *last]).all():
            return False
        metres = np.asarray(known.get_geod().inv(*first, *last)[2])
        if (np.abs(metres - length) > 0.005 * length).any():
            return False
    return True


EDGE_POINTS = 4  # of each side of a pixel that is measured: its sides are no geodesics
ROW_TOLERANCE = 1e-4  # relative, of an area between two rows that are measured


def pixel_areas(dataset: rasterio.DatasetReader) -> np.ndarray | None:
    """Square metres of a pixel in each row, (H,); None when the CRS does not give it.

    The ground is that of the ellipsoid, a row's mean that of five columns (Gauss and Legendre), and
    rows are measured until those between them can be interpolated. Rows off the Earth have 0.
    """
    crs, height = dataset.crs, dataset.height
    if crs is None or not (crs.is_projected or crs.is_geographic):
        return None
    known = _horizontal(crs)
    rows = np.unique(np.linspace(0, height - 1, 5).astype(int))
    areas = _areas_of_rows(dataset, known, rows)
    while len(rows) < height:
        between = np.setdiff1d((rows[1:] + rows[:-1]) // 2, rows)
        found = _areas_of_rows(dataset, known, between)
        expected = np.interp(between, rows, areas)
        exact = np.abs(found - expected) <= ROW_TOLERANCE * found
        rows, order = np.unique([*rows, *between], return_index=True)
        areas = np.concatenate([areas, found])[order]
        if exact.all():
            break
    return np.interp(np.arange(height), rows, areas)


def _areas_of_rows(
    dataset: rasterio.DatasetReader, known, rows: np.ndarray
) -> np.ndarray:
    """The mean area of a pixel in some rows, in square metres."""
    nodes, weights = np.polynomial.legendre.leggauss(5)
    columns = (nodes + 1) / 2 * max(dataset.width - 1, 0)
    steps = np.arange(EDGE_POINTS) / EDGE_POINTS
    still = np.zeros(EDGE_POINTS)
    right = np.concatenate([steps, still + 1, 1 - steps, still])
    down = np.concatenate([still, steps, still + 1, 1 - steps])
    column = columns[None, :, None] + right  # (rows, columns, points)
    row = rows[:, None, None] + down
    a, b, c, d, e, f = dataset.transform[:6]
    x, y = a * column + b * row + c, d * column + e * row + f
    points = np.stack(_to_degrees(known, x, y))
    geod, areas = known.get_geod(), np.zeros(x.shape[:2])
    there = np.isfinite(points).all(axis=(0, 3))
    for place in zip(*np.nonzero(there)):
        areas[place] = abs(geod.polygon_area_perimeter(*points[:, *place])[0])
    seen = np.maximum(there @ weights, 1e-9)
    return areas @ weights / seen


def pixel_size(dataset: rasterio.DatasetReader) -> float | None:
    """Metres of the side of a square of a pixel's size; None when the CRS does not give it."""
    areas = pixel_areas(dataset)
    size = None if areas is None else float(np.sqrt(np.median(areas)))
    return size if size and np.isfinite(size) else None


def footprint(transform: Affine, height: int, width: int) -> Geometry:
    """The ground of a patch as a polygon."""
    import shapely

    corners = [(0, 0), (width, 0), (width, height), (0, height)]
    return shapely.Polygon([transform * corner for corner in corners])


def to_metric_crs(footprints: Sequence[Geometry], systems: Sequence) -> GeoSeries:
    """Footprints of several CRS in one of metres: their own, or an equal-area one around them.

    Args:
        footprints: The ground of each patch.
        systems: The CRS of each.
    """
    import geopandas
    import pandas

    texts = pandas.Series([crs.to_wkt() for crs in systems])
    if texts.nunique() == 1 and in_true_metres(systems[0], footprints):
        return geopandas.GeoSeries(list(footprints), crs=systems[0])
    degrees = geopandas.GeoSeries(list(footprints), crs="EPSG:4326")
    for text, rows in texts.groupby(texts).groups.items():
        part = geopandas.GeoSeries(degrees[rows].to_numpy(), crs=text)
        degrees[rows] = part.to_crs("EPSG:4326").to_numpy()
    west, south, east, north = degrees.total_bounds
    middle = f"+lat_0={(south + north) / 2} +lon_0={(west + east) / 2}"
    return degrees.to_crs(f"+proj=laea {middle} +datum=WGS84 +units=m")


def typical_patch_side(footprints: GeoSeries) -> float:
    """The side of a usual patch."""
    return float(np.sqrt(footprints.area.median()))


def spatial_block_ids(footprints: GeoSeries, size: float) -> np.ndarray:
    """A number per patch, 0, 1...: the square block of ``size`` metres that its centre lies in."""
    centres = np.stack([footprints.centroid.x, footprints.centroid.y], axis=1)
    origin = centres.min(axis=0) - typical_patch_side(footprints) / 2
    blocks = np.floor((centres - origin) / size).astype(int)
    return np.unique(blocks, axis=0, return_inverse=True)[1].ravel()


def overlap_fraction(footprints: GeoSeries, pairs: np.ndarray) -> np.ndarray:
    """The share of the smaller patch's ground that lies in the other, per pair (M, 2)."""
    import shapely

    shapes, areas = footprints.to_numpy(), footprints.area.to_numpy()
    left, right = pairs.T
    common = shapely.area(shapely.intersection(shapes[left], shapes[right]))
    return common / np.minimum(areas[left], areas[right])


def pairs_within(footprints: GeoSeries, parts: Sequence[int], distance: float):
    """Pairs of patches of different parts that lie nearer than a distance to each other.

    Args:
        footprints: In a CRS of metres.
        parts: A whole number per patch.
        distance: Metres. At 0 they share ground; what only touches does not count.

    Returns:
        (M, 2) indices, the first of the part with the lower number.
    """
    parts, index = np.asarray(parts), footprints.sindex
    if distance:
        reach = max(0.0, distance - 1e-6 * typical_patch_side(footprints))
        pairs = index.query(footprints, predicate="dwithin", distance=reach).T
    else:
        pairs = index.query(footprints, predicate="intersects").T
    pairs = pairs[parts[pairs[:, 0]] < parts[pairs[:, 1]]]
    # a ten-thousandth is what projections leave between neighbours
    return pairs if distance else pairs[overlap_fraction(footprints, pairs) > 1e-4]
