"""The polygons of a class map: connected areas of one class, without seams."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

import numpy as np
import rasterio
from rasterio.windows import Window

from common.errors import RasterError
from common.files import atomic_write, naming, part_prefix
from common.ground import pixel_areas
from common.labels import read_label, require_one_band
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
from common.vectors import append_features


def outlines(areas: np.ndarray, valid: np.ndarray, top: int) -> Iterator:
    """The polygons of a strip's areas, in pixels of the map, each with its area's number."""
    import shapely
    from rasterio import features

    shift = rasterio.Affine.translation(0, top)
    found = features.shapes(areas, valid, connectivity=4, transform=shift)
    while batch := list(islice(found, 10_000)):
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


def feature_table(numbers, polygons, areas: Areas, names, transform) -> dict:
    """The columns of a layer: areas by number, their polygons brought from pixels to the ground."""
    import shapely

    a, b, c, d, e, f = transform[:6]
    matrix, origin = np.array([[a, d], [b, e]]), (c, f)
    return {
        "class": areas.classes[numbers],
        "class_name": np.array(names, object)[areas.classes[numbers]],
        "area_ha": areas.extent[numbers] / 1e4,
        "geometry": shapely.transform(polygons, lambda xy: xy @ matrix + origin),
    }


def rows_of_map(dataset, num_classes: int) -> MapRows:
    """The rows of a class map in a file.

    Its reading raises RasterError where it holds a class from ``num_classes`` on, without a name.
    """
    source = Source(dataset)

    def read(top: int, bottom: int) -> np.ndarray:
        classes = read_label(source, -1, Window(0, top, dataset.width, bottom - top))
        if classes.max() >= num_classes:
            raise RasterError(
                f"{dataset.name} holds class {classes.max()}, but there are names for "
                f"{num_classes} classes only; name all"
            )
        return classes.astype(np.int32)

    return MapRows(read, dataset.height, pixel_areas(dataset))


def write_polygons(
    map_path: Path,
    target: Path,
    names: Sequence[str],
    min_area: float = 0.0,
    strip: int = STRIP,
) -> int:
    """Write a class map as a GeoPackage with a polygon per connected area of one class.

    Pixels are connected through their edges. The columns are class, class_name and area_ha: the
    hectares of the area's pixels as ``pixel_areas`` measures them, null without a CRS. The
    map is read in strips of rows, and memory holds one of them, a few numbers per area, and the
    outlines of areas that reach into the next strip; the polygons are the same for all strips.

    Args:
        map_path: One band of classes; nodata gives no polygon.
        target: The GeoPackage; its layer has the name of the file.
        names: Of all classes.
        min_area: Smallest area in square metres, which ``find_areas`` leaves: as many pixels as
            it is at the centre of the map.
        strip: Rows of a strip.

    Returns:
        The number of polygons.

    Raises:
        RasterError: A class without a name, or ``min_area`` for a map whose CRS does not
            give the size of its pixels.
        SegmentationError: The GeoPackage cannot be written.
    """
    with (
        open_raster(map_path) as dataset,
        atomic_write(target) as part,
        # SQLite's own files lie beside a GeoPackage while it grows
        tempfile.TemporaryDirectory(
            ".part", part_prefix(Path(target)), part.parent
        ) as folder,
    ):
        require_one_band(dataset)
        rows, fewest = rows_of_map(dataset, len(names)), 0
        if min_area:
            pixel = centre_pixel(map_path, rows.pixel_areas, "--min_area")
            fewest = fewest_pixels(min_area, pixel)
        belongs, areas = find_areas(labelled_strips(rows, strip, "areas"), fewest)
        strips = labelled_strips(rows, strip, "polygons")
        file, total = Path(folder) / "map.gpkg", 0
        none = np.zeros(0, int), np.zeros(0, object)  # makes the layer of an empty map
        for numbers, polygons in chain(
            [none], polygons_of_strips(strips, belongs, areas)
        ):
            table = feature_table(numbers, polygons, areas, names, dataset.transform)
            with naming(target, file):
                append_features(file, Path(target).stem, table, dataset.crs)
            total += len(numbers)
        file.replace(part)
    return total
