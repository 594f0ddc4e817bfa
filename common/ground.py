"""Where pixels and patches lie, in metres on the ellipsoid: areas, footprints, blocks, distances."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import rasterio

from common.errors import DatasetError, RasterError, require

if TYPE_CHECKING:
    from affine import Affine
    from geopandas import GeoSeries
    from shapely import Geometry


def _horizontal(crs):
    """A CRS as pyproj's, without heights."""
    from pyproj import CRS

    known = CRS.from_wkt(crs.to_wkt())
    return known.sub_crs_list[0] if known.is_compound else known


def on_earth(crs) -> bool:
    """Whether places in a CRS are known on the Earth; a local (engineering) one is a plane."""
    return crs.is_projected or crs.is_geographic


def _metres_of_plane(crs) -> float | None:
    """The metres of the unit of a local CRS; None of any other."""
    known = None if on_earth(crs) else _horizontal(crs)
    local = known is not None and known.is_engineering and known.axis_info
    return known.axis_info[0].unit_conversion_factor if local else None


def in_one_plane(systems: Sequence) -> bool:
    """Whether several CRS are one and the same local CRS, whose places are known to each other."""
    alike = all(crs == systems[0] for crs in systems)
    return alike and _metres_of_plane(systems[0]) is not None


def _to_degrees(known, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Longitudes and latitudes, in the datum of a CRS of pyproj's; infinite off the Earth."""
    from pyproj import Transformer

    geodetic = known.geodetic_crs
    degrees = np.degrees(geodetic.axis_info[0].unit_conversion_factor)  # of its unit
    ground = Transformer.from_crs(known, geodetic, always_xy=True).transform(x, y)
    longitudes, latitudes = (degrees * values for values in ground)
    return longitudes, np.where(np.isfinite(latitudes), latitudes.clip(-90, 90), np.inf)


def require_on_earth(raster) -> None:
    """Raise RasterError where the middle of a raster, by its transform and CRS, is no place on the Earth.

    Planes of a local CRS are not looked at.
    """
    if not on_earth(raster.crs):
        return
    x, y = raster.transform * (raster.width / 2, raster.height / 2)
    known, far = _horizontal(raster.crs), False
    if known.is_geographic:
        unit = np.degrees(known.axis_info[0].unit_conversion_factor)
        far = abs(x * unit) > 540 or abs(y * unit) > 90
    if far or not np.isfinite(_to_degrees(known, np.array([x]), np.array([y]))).all():
        raise RasterError(
            f"{raster.name} does not lie on the Earth: {x:g}, {y:g} is no place of its CRS "
            f"({raster.crs.to_string()[:60]}); assign the right one (gdal_edit.py -a_srs)"
        )


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


DEGREE = 111_320  # metres on the equator
EDGE_POINTS = 4  # of each side of a pixel that is measured: its sides are no geodesics
ROW_TOLERANCE = 1e-4  # relative, of an area between two rows that are measured


def pixel_areas(dataset: rasterio.DatasetReader) -> np.ndarray | None:
    """Square metres of a pixel in each row, (H,); None when the CRS does not give it.

    The ground is that of the ellipsoid, a row's mean that of five columns (Gauss and Legendre), and
    rows are measured until those between them can be interpolated. Rows off the Earth have 0.
    """
    crs, height = dataset.crs, dataset.height
    if crs is None:
        return None
    if not on_earth(crs):
        metres = _metres_of_plane(crs)
        area = abs(dataset.transform.determinant)
        return None if metres is None else np.full(height, area * metres**2)
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


def pixel_sides(raster) -> tuple[float, float] | None:
    """Metres of the width and the height of the pixel in the middle of a raster.

    Args:
        raster: Anything with a CRS, a transform, a width and a height.

    Returns:
        None when the CRS does not give them.
    """
    crs, transform = raster.crs, raster.transform
    if crs is None:
        return None
    column, row = raster.width / 2, raster.height / 2
    ends = np.array([(-0.5, 0), (0.5, 0), (0, -0.5), (0, 0.5)]) + (column, row)
    x, y = transform * tuple(ends.T)
    if not on_earth(crs):
        metres = _metres_of_plane(crs)
        sides = np.hypot(np.diff(x)[::2], np.diff(y)[::2]) * (metres or np.nan)
    else:
        known = _horizontal(crs)
        points = np.stack(_to_degrees(known, x, y), axis=1)
        if not np.isfinite(points).all():
            return None
        sides = np.array(known.get_geod().inv(*points[::2].T, *points[1::2].T)[2])
    fine = np.isfinite(sides).all() and sides.all()
    return tuple(sides.tolist()) if fine else None


OUTLINE_POINTS = 21  # of each side of a raster: its sides are bent in another CRS


def covered_share(raster, other) -> float:
    """The share of a raster's ground that another covers, 0 where they have none in common.

    Each is anything with a CRS, a transform, a width and a height. Where one of the outlines has no
    place in the CRS of the other raster, the other outline says it.
    """
    import shapely

    shares = [0.0]
    for one, base in ((raster, other), (other, raster)):
        points = outline_in(one, base)
        if points is None:
            continue
        outline = shapely.MultiPoint(points).convex_hull
        whole = shapely.box(0, 0, base.width, base.height)
        total = (outline if base is other else whole).area
        shares.append(outline.intersection(whole).area / total if total else 0.0)
    return max(shares)


def outline_in(raster, base) -> np.ndarray | None:
    """Points on the outline of a raster in the pixels of another, (P, 2); None without a place."""
    from pyproj import Transformer
    from pyproj.exceptions import ProjError

    way = np.linspace(0, 1, OUTLINE_POINTS)
    x = np.concatenate([way, np.ones_like(way), way, np.zeros_like(way)])
    y = np.concatenate([np.zeros_like(way), way, np.ones_like(way), way])
    ground = raster.transform * (x * raster.width, y * raster.height)
    if raster.crs != base.crs:
        try:
            known = _horizontal(raster.crs), _horizontal(base.crs)
            ground = Transformer.from_crs(*known, always_xy=True).transform(*ground)
        except ProjError:
            return None
    if not np.isfinite(ground).all():
        return None
    return np.transpose(~base.transform * tuple(ground))


def footprint(transform: Affine, height: int, width: int) -> Geometry:
    """The ground of a patch as a polygon."""
    import shapely

    corners = [(0, 0), (width, 0), (width, height), (0, height)]
    return shapely.Polygon([transform * corner for corner in corners])


def to_one_crs(footprints: Sequence[Geometry], systems: Sequence, target) -> GeoSeries:
    """Footprints, each in a CRS of its own, in a common one."""
    import geopandas
    import pandas

    texts = pandas.Series([crs.to_wkt() for crs in systems])
    found = geopandas.GeoSeries(list(footprints), crs=target)
    for text, rows in texts.groupby(texts).groups.items():
        part = geopandas.GeoSeries(found[rows].to_numpy(), crs=text)
        found[rows] = part.to_crs(target).to_numpy()
    return found


def to_metric_crs(footprints: Sequence[Geometry], systems: Sequence) -> GeoSeries:
    """Footprints of several CRS in metres: in their own CRS, or an equal-area one around them.

    Those of regions far from each other lie each in a plane around their own middle, and together
    in none: the plane of a region is moved to a place of its own, and the result has no CRS.

    Args:
        footprints: The ground of each patch.
        systems: The CRS of each; a local one is a plane.

    Raises:
        DatasetError: A local CRS beside another one.
    """
    import geopandas
    import shapely

    if in_one_plane(systems):
        metres = _metres_of_plane(systems[0])
        plane = geopandas.GeoSeries(list(footprints))
        return plane.scale(metres, metres, origin=(0, 0))
    if not all(map(on_earth, systems)):
        raise DatasetError(
            "Images in a local CRS and in another one have no known place to each other; use them "
            "apart, or assign the CRS of the place (gdal_edit.py -a_srs)"
        )
    if len(set(systems)) == 1 and in_true_metres(systems[0], footprints):
        return geopandas.GeoSeries(list(footprints), crs=systems[0])
    degrees = to_one_crs(footprints, systems, "EPSG:4326")
    # a corner, since beyond the antimeridian there is no centroid in degrees
    points, owners = shapely.get_coordinates(degrees.to_numpy(), return_index=True)
    vectors = unit_vectors(points[np.unique(owners, return_index=True)[1]])
    north = np.abs(points[:, 1])
    if not (north <= 91).all():
        raise DatasetError(
            "Patches do not all lie on the Earth: a transform does not fit its CRS; assign the "
            "right one to their scene (gdal_edit.py -a_srs)"
        )
    if (north > 90).any():  # a pixel whose centre is a pole reaches beyond it
        degrees = degrees.clip_by_rect(-np.inf, -90, np.inf, 90)
    regions, planes = _regions_of(vectors), []
    for region in range(regions.max() + 1):
        x, y, z = vectors[regions == region].mean(axis=0)
        east, north = np.degrees([np.arctan2(y, x), np.arctan2(z, np.hypot(x, y))])
        plane = f"+proj=laea +lat_0={north} +lon_0={east} +datum=WGS84 +units=m"
        part = degrees[regions == region].to_crs(plane)
        planes.append((part, east * DEGREE, north * DEGREE))
    if len(planes) == 1:
        return part
    ground = geopandas.GeoSeries([None] * len(degrees))
    for part, east, north in planes:
        ground[part.index] = part.set_crs(None, allow_override=True).translate(
            east, north
        )
    return ground


def places_apart(footprints: Sequence[Geometry], scenes: Sequence[str]) -> GeoSeries:
    """Footprints in pictures without a location, in pixels: each picture in a place of its own."""
    import geopandas
    import shapely

    shapes = np.array(list(footprints), object)
    _, numbers = np.unique(scenes, return_inverse=True)
    step = 2 * np.abs(shapely.total_bounds(shapes)).max() + 1
    corners = shapely.get_num_coordinates(shapes)

    def moved(points: np.ndarray) -> np.ndarray:
        right = step * np.repeat(numbers, corners)
        return np.stack([points[:, 0] + right, -points[:, 1]], axis=1)  # rows run down

    return geopandas.GeoSeries(shapely.transform(shapes, moved))


def unit_vectors(points: np.ndarray) -> np.ndarray:
    """From the middle of the Earth to points in degrees, (N, 3)."""
    east, north = np.radians(np.where(np.isfinite(points), points, np.nan)).T
    away = np.cos(north)
    return np.stack([away * np.cos(east), away * np.sin(east), np.sin(north)], axis=1)


def _regions_of(vectors: np.ndarray) -> np.ndarray:
    """A number per unit vector, 0, 1...: those of several regions are 530 km or more apart."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components
    from scipy.spatial import KDTree

    cells, members = np.unique(np.floor(vectors * 12), axis=0, return_inverse=True)
    left, right = KDTree(cells).query_pairs(2, output_type="ndarray").T
    graph = coo_array((np.ones(len(left)), (left, right)), (len(cells), len(cells)))
    return connected_components(graph, directed=False)[1][members.ravel()]


def typical_patch_side(footprints: GeoSeries) -> float:
    """The side of a usual patch."""
    return float(np.sqrt(footprints.area.median()))


def spatial_block_ids(footprints: GeoSeries, size: float) -> np.ndarray:
    """A number per patch, 0, 1...: the square block of ``size`` metres that its centre lies in.

    Raises:
        OptionError: The blocks are smaller than a patch.
    """
    side = typical_patch_side(footprints)
    what = f"at least {round(side, 1):g}, the side of a patch in metres; smaller blocks keep no neighbours together"
    require(size > 0.99 * side, "--block_size", f"{size:g}", what)
    centres = np.stack([footprints.centroid.x, footprints.centroid.y], axis=1)
    origin = centres.min(axis=0) - side / 2
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
