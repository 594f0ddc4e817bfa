"""Where pixels and patches lie, in metres: areas, footprints, blocks, distances."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import rasterio

if TYPE_CHECKING:
    from affine import Affine
    from geopandas import GeoSeries
    from shapely import Geometry


def in_true_metres(crs) -> bool:
    """Whether lengths in a CRS are metres on the ground.

    Not in degrees or feet, and not in Mercator projections, whose scale grows with the latitude.
    """
    return crs.is_projected and crs.linear_units_factor[1] == 1 and not _mercator(crs)


def _mercator(crs) -> bool:
    method = _horizontal(crs).coordinate_operation.method_name
    return "Mercator" in method and "Transverse" not in method


def _horizontal(crs):
    """A CRS as pyproj's, without heights."""
    from pyproj import CRS

    known = CRS.from_wkt(crs.to_wkt())
    return known.sub_crs_list[0] if known.is_compound else known


def pixel_areas(dataset: rasterio.DatasetReader) -> np.ndarray | None:
    """Square metres of a pixel in each row, (H,); None when the CRS does not give it.

    In degrees, and in Mercator projections, whose scale grows with the latitude, a pixel is measured
    on the ellipsoid, in the middle column.
    """
    crs, transform = dataset.crs, dataset.transform
    if crs is None or not (crs.is_projected or crs.is_geographic):
        return None
    from pyproj import Transformer

    if crs.is_projected and not _mercator(crs):
        metres = crs.linear_units_factor[1]
        return np.full(dataset.height, abs(transform.determinant) * metres**2)
    known = _horizontal(crs)
    column = dataset.width // 2 + np.array([0, 0, 1, 1])
    row = np.arange(dataset.height)[:, None] + np.array([0, 1, 1, 0])
    a, b, c, d, e, f = transform[:6]
    corners = a * column + b * row + c, d * column + e * row + f
    geodetic = known.geodetic_crs
    degrees = np.degrees(geodetic.axis_info[0].unit_conversion_factor)  # of its unit
    ground = Transformer.from_crs(known, geodetic, always_xy=True)
    longitudes, latitudes = (degrees * v for v in ground.transform(*corners))
    latitudes = np.clip(np.where(np.isfinite(latitudes), latitudes, 90), -90, 90)
    geod = known.get_geod()
    return np.array(
        [
            abs(geod.polygon_area_perimeter(*pair)[0])
            for pair in zip(longitudes, latitudes)
        ]
    )


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
    if texts.nunique() == 1 and in_true_metres(systems[0]):
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
