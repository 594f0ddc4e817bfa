"""The polygons of a class map: connected areas of one class, without seams."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice
from math import sqrt
from pathlib import Path

import numpy as np
import rasterio
from rasterio.windows import Window

from common import MISSING
from common.errors import RasterError
from common.ground import pixel_areas
from common.interruption import until_stopped
from common.labels import read_label, require_one_band
from common.map_classes import class_numbers
from common.rasters import Source, open_raster
from common.sieve import (
    STRIP,
    Areas,
    MapRows,
    centre_pixel,
    fewest_pixels,
    find_areas,
    labelled_strips,
)
from common.styles import Colour, categorized_style
from common.vectors import add_style, append_features, new_geopackage

BATCH = 10_000  # polygons in work at a time
# memory of ``simplify_together``, measured on maps of 8,000 to 2.8 million polygons
POLYGON_BYTES, VERTEX_BYTES = 2000, 100


def outlines(areas: np.ndarray, valid: np.ndarray, top: int) -> Iterator:
    """The polygons of a strip's areas, in pixels of the map, each with its area's number."""
    import shapely
    from rasterio import features

    shift = rasterio.Affine.translation(0, top)
    found = features.shapes(areas, valid, connectivity=4, transform=shift)
    while batch := list(islice(found, BATCH)):
        polygons = [shape["coordinates"] for shape, _ in batch]
        rings = list(chain.from_iterable(polygons))
        points = np.array(list(chain.from_iterable(rings)))
        offsets = [np.cumsum([0, *map(len, parts)]) for parts in (rings, polygons)]
        polygons = shapely.from_ragged_array(
            shapely.GeometryType.POLYGON, points, offsets
        )
        yield from zip((int(area) for _, area in batch), polygons)


def unite(parts: Sequence):
    """The polygon that an area's polygons in several strips make together."""
    import shapely

    # where a part meets a seam it is open: its holes are whole and stay as they are
    shells = shapely.get_exterior_ring(parts)
    whole = shapely.union_all(shapely.polygons(shells))
    holes = [hole for polygon in (whole, *parts) for hole in polygon.interiors]
    return shapely.Polygon(whole.exterior, holes)


def straighten(polygons: Sequence) -> np.ndarray:
    """Leave out the vertices of polygons along pixel edges that are no corners."""
    import shapely

    kind, points, (ends, shells) = shapely.to_ragged_array(polygons)
    starts, stops = ends[:-1], ends[1:] - 1  # a ring ends with its first vertex
    before, after = np.arange(len(points)) - 1, np.arange(len(points)) + 1
    before[starts], after[stops] = stops - 1, starts + 1
    straight = (points[before] == points) & (points[after] == points)
    corner = ~straight.any(axis=1)
    corner[stops] = False
    points, lengths = points[corner], np.add.reduceat(corner, starts, dtype=np.int64)
    ends = np.cumsum([0, *lengths])
    points = np.insert(points, ends[1:], points[ends[:-1]], axis=0)  # close the rings
    ends += np.arange(len(ends))
    return shapely.from_ragged_array(kind, points, (ends, shells))


def polygons_of_strips(strips: Iterator, belongs: np.ndarray, areas: Areas) -> Iterator:
    """Turn areas into polygons strip by strip, without seams.

    One call of ``rasterio.features.shapes`` over the merged areas of a map takes two thirds of the
    time, but memory grows with the number of polygons: 10,980 x 10,980 noisy pixels (2.9 million
    polygons) need 5.8 GB instead of about 1.2.

    Args:
        strips: See ``labelled_strips``.
        belongs: The area of each number of the strips.
        areas: Of the map.

    Yields:
        Numbers of areas and their polygons in pixels, ordered by last row and first pixel; areas
        that continue in the next strip wait for it.
    """
    import shapely

    parts: dict[int, list] = {}
    for top, labels, _ in strips:
        numbers = belongs[labels]
        for area, polygon in outlines(numbers, areas.classes[numbers] >= 0, top):
            parts.setdefault(area, []).append(polygon)
        bottom = top + len(labels)
        ended = [area for area in parts if areas.last[area] < bottom]
        ended.sort(key=lambda area: (areas.last[area], area))
        pieces = map(parts.pop, ended)
        polygons = [unite(p) if len(p) > 1 else p[0] for p in pieces]
        if ended:
            yield ended, shapely.normalize(straighten(polygons))


def with_all_corners(polygons: Sequence, corners: np.ndarray) -> np.ndarray:
    """Polygons along pixel edges with a vertex wherever another one's corner lies on an edge.

    Args:
        polygons: In pixels, without other vertices than corners.
        corners: ``corner_keys`` of all polygons of the map, each once, in order.
    """
    import shapely

    dense = shapely.segmentize(polygons, 1.0)
    kind, points, (ends, shells) = shapely.to_ragged_array(dense)
    points = np.rint(points)
    keys = corner_keys(points)
    places = np.searchsorted(corners, keys)
    kept = corners[np.minimum(places, len(corners) - 1)] == keys
    lengths = np.add.reduceat(kept, ends[:-1], dtype=np.int64)
    ends = np.cumsum([0, *lengths])
    return shapely.from_ragged_array(kind, points[kept], (ends, shells))


def corner_keys(points: np.ndarray) -> np.ndarray:
    """A number for each point (n, 2) in whole pixels."""
    x, y = points.astype(np.int64).T
    return y << 32 | x


def simplify_together(batches: Iterator, tolerance: float) -> Iterator:
    """Simplify all polygons of a map, so that neighbours go on sharing their borders.

    Of each border the corners that cut the smallest triangles off are left out first (Visvalingam
    and Whyatt). Borders to nodata and the edge of the map stay as they are, so that the same ground
    is covered, and no polygon vanishes.

    Args:
        batches: See ``polygons_of_strips``; all polygons are held in memory.
        tolerance: The side, in pixels, of the square that a triangle is smaller than.

    Yields:
        What ``batches`` does.
    """
    import shapely

    found = list(batches)
    if not found:
        return
    numbers, polygons = (np.concatenate(parts) for parts in zip(*found))
    del found
    # GEOS knows borders as shared by their vertices
    corners = np.unique(corner_keys(shapely.get_coordinates(polygons)))
    parts = [slice(n, n + BATCH) for n in range(0, len(polygons), BATCH)]
    for part in until_stopped(parts):
        polygons[part] = with_all_corners(polygons[part], corners)
    tolerance = min(tolerance, 2.0**32)  # beyond any map, and can be squared
    polygons = shapely.coverage_simplify(polygons, tolerance, simplify_boundary=False)
    for part in until_stopped(parts):
        yield numbers[part], shapely.normalize(polygons[part])


def memory_to_simplify(classes: np.ndarray, fewest: int) -> int:
    """About the bytes that ``simplify_together`` takes for the polygons of a map.

    Args:
        classes: (H, W) int32, -1 where nodata.
        fewest: Pixels of the smallest area that is left; see ``find_areas``.
    """
    import shapely

    rows, strip = MapRows(lambda top, bottom: classes[top:bottom], len(classes)), STRIP
    belongs, areas = find_areas(labelled_strips(rows, strip, None), fewest)
    strips, total = labelled_strips(rows, strip, None), 0
    for numbers, polygons in polygons_of_strips(strips, belongs, areas):
        vertices = shapely.get_num_coordinates(polygons).sum()
        total += POLYGON_BYTES * len(numbers) + VERTEX_BYTES * int(vertices)
    return total


def feature_tables(
    areas: Areas, batches: Iterator, names, codes, transform
) -> Iterator[dict]:
    """The columns of a layer, batch by batch, polygons brought from pixels to the ground.

    The first one has no rows, and makes the layer of an empty map. Without codes the numbers of
    the classes count.
    """
    import shapely

    a, b, c, d, e, f = transform[:6]
    matrix, origin = np.array([[a, d], [b, e]]), (c, f)
    codes = list(codes or range(len(names)))
    if any(isinstance(code, str) for code in codes):
        codes = np.array([str(code) for code in codes], object)
    else:
        codes = np.array(codes, np.int64)
    none = np.zeros(0, int), np.zeros(0, object)
    for numbers, polygons in chain([none], batches):
        number = areas.classes[numbers]
        yield {
            "class": number,
            "class_code": codes[number],
            "class_name": np.array(names, object)[number],
            "area_ha": areas.extent[numbers] / 1e4,
            "geometry": shapely.transform(polygons, lambda xy: xy @ matrix + origin),
        }


def rows_of_map(
    dataset, num_classes: int, values: Sequence[int] | None = None
) -> MapRows:
    """The rows of a class map in a file, which holds ``values`` or the numbers of the classes.

    Its reading raises RasterError where it holds a class without a name.
    """
    source = Source(dataset)

    def read(top: int, bottom: int) -> np.ndarray:
        window = Window(0, top, dataset.width, bottom - top)
        classes = read_label(source, MISSING if values else -1, window)
        if values:
            pixels, classes = classes, class_numbers(classes, values)
            missing = classes == MISSING
            strange = pixels[missing & (pixels != MISSING)]
            classes[missing] = -1
        else:
            strange = classes.max(keepdims=True)
            strange = strange[strange >= num_classes]
        if strange.size:
            raise RasterError(
                f"{dataset.name} holds class {strange.max()}, but there are names for "
                f"{num_classes} classes only; name all"
            )
        return classes.astype(np.int32)

    return MapRows(read, dataset.height, pixel_areas(dataset))


def polygons_of_rows(
    name: Path, rows: MapRows, min_area: float, simplify: float | None, strip: int
) -> tuple[Areas, Iterator]:
    """The areas of a map and their polygons in batches; the options are ``write_polygons``'."""
    fewest, tolerance = 0, 0.0
    if min_area:
        pixel = centre_pixel(name, rows.pixel_areas, "--min_area")
        fewest = fewest_pixels(min_area, pixel)
    if simplify:
        pixel = centre_pixel(name, rows.pixel_areas, "--simplify")
        tolerance = simplify / sqrt(pixel)
    belongs, areas = find_areas(labelled_strips(rows, strip, "areas"), fewest)
    strips = labelled_strips(rows, strip, "polygons")
    batches = polygons_of_strips(strips, belongs, areas)
    if tolerance:
        batches = simplify_together(batches, tolerance)
    return areas, batches


def write_polygons(
    map_path: Path,
    target: Path,
    names: Sequence[str],
    min_area: float = 0.0,
    strip: int = STRIP,
    simplify: float | None = None,
    colours: Sequence[Colour] = (),
    codes: Sequence[int | str] | None = None,
    values: Sequence[int] | None = None,
) -> int:
    """Write a class map as a GeoPackage with a polygon per connected area of one class.

    Pixels are connected through their edges. The columns are class, class_code, class_name and
    area_ha: the hectares of the area's pixels as ``pixel_areas`` measures them, null without a CRS.
    The map is read in strips of rows, and memory holds one of them, a few numbers per area, and the
    outlines of areas that reach into the next strip; the polygons are the same for all strips.

    Args:
        map_path: One band of classes; nodata gives no polygon.
        target: The GeoPackage; its layer has the name of the file.
        names: Of all classes.
        min_area: Smallest area in square metres, which ``find_areas`` leaves: as many pixels as
            it is at the centre of the map.
        strip: Rows of a strip.
        simplify: Tolerance of ``simplify_together`` in metres, as many pixels as they are at the
            centre of the map.
        colours: Of all classes, for the style that QGIS shows; none without.
        codes: Of all classes, by default their numbers.
        values: What the map holds for them, by default their numbers.

    Returns:
        The number of polygons.

    Raises:
        RasterError: A class without a name, or ``min_area`` or ``simplify`` for a map whose CRS
            does not give the size of its pixels.
        SegmentationError: The GeoPackage cannot be written.
    """
    with open_raster(map_path) as dataset, new_geopackage(target) as file:
        require_one_band(dataset)
        rows = rows_of_map(dataset, len(names), values)
        found = polygons_of_rows(map_path, rows, min_area, simplify, strip)
        total, layer = 0, Path(target).stem
        for table in feature_tables(*found, names, codes, dataset.transform):
            append_features(file, layer, table, dataset.crs)
            total += len(table["class"])
        if colours:
            add_style(file, layer, categorized_style("class_name", names, colours))
    return total
