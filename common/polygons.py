"""The polygons of a class map: connected areas of one class, merged to a smallest area."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import chain, islice
from pathlib import Path

import numpy as np
import rasterio
from rasterio.windows import Window
from tqdm import tqdm

from common.errors import RasterError
from common.files import atomic_write, naming, part_prefix
from common.ground import pixel_areas
from common.interruption import until_stopped
from common.labels import read_label, require_one_band
from common.rasters import Source, open_raster
from common.styles import Colour, categorized_style
from common.vectors import add_style, append_features

STRIP = 256  # rows of a map that are turned into polygons at a time


@dataclass
class Areas:
    """Connected areas of a map, in the order of their first pixels: an entry for each."""

    classes: np.ndarray  # int32; -1 is nodata, whose areas are counted too
    pixels: np.ndarray  # int64
    extent: np.ndarray  # float64, square metres; NaN when it is unknown
    last: np.ndarray  # int32, the last row

    def united(self, number: np.ndarray, count: int) -> Areas:
        """The ``count`` areas of which these are parts; ``number`` is that of each."""
        classes, last = np.zeros((2, count), np.int32)
        classes[number] = self.classes
        np.maximum.at(last, number, self.last)
        pixels = np.bincount(number, self.pixels, count).astype(np.int64)
        return Areas(classes, pixels, np.bincount(number, self.extent, count), last)


def connected_groups(count: int, pairs: np.ndarray) -> tuple[int, np.ndarray]:
    """Unite what pairs (2, n) connect, directly or through others.

    Returns:
        How many groups there are, and for each of the ``count`` the number of its group; groups
        are numbered in the order of their first members.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    links = np.ones(pairs.shape[1], bool), tuple(pairs)
    return connected_components(coo_array(links, shape=(count, count)), directed=False)


def distinct_pairs(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The pairs (2, n) int64 of different numbers below 2**31 in two arrays, each once."""
    differ = first != second
    first, second = first[differ].astype(np.int64), second[differ].astype(np.int64)
    keys = np.unique(np.minimum(first, second) << 32 | np.maximum(first, second))
    return np.stack([keys >> 32, keys & 0xFFFFFFFF])


def label_strip(classes: np.ndarray, top: int, row_areas: np.ndarray):
    """Find the 4-connected areas of a strip.

    Args:
        classes: (h, W) int32, -1 where nodata.
        top: The strip's first row in the map.
        row_areas: Square metres of a pixel in each row of the map.

    Returns:
        For each pixel the number of its area, (h, W) int32, and the ``Areas``.
    """
    # runs of one class in a row are mostly far fewer than pixels
    starts = np.ones(classes.shape, bool)
    starts[:, 1:] = classes[:, 1:] != classes[:, :-1]
    runs = np.cumsum(starts, dtype=np.int32).reshape(classes.shape) - 1
    below = (classes[1:] == classes[:-1]) & (starts[1:] | starts[:-1])
    begin = np.flatnonzero(starts)
    count, number = connected_groups(
        len(begin), np.stack([runs[:-1][below], runs[1:][below]])
    )
    pixels = np.diff(begin, append=classes.size)
    rows = (top + begin // classes.shape[1]).astype(np.int32)
    parts = Areas(classes.ravel()[begin], pixels, pixels * row_areas[rows], rows)
    return number.astype(np.int32)[runs], parts.united(number, count)


def labelled_strips(dataset, num_classes: int, rows: int, title: str) -> Iterator:
    """Cut a class map into strips and find the areas of each.

    Args:
        dataset: The map.
        num_classes: Classes 0 to ``num_classes`` - 1 may occur.
        rows: Of a strip.
        title: Of the progress bar.

    Yields:
        First row, numbers (h, W) int32 that continue from strip to strip, the strip's ``Areas``.

    Raises:
        RasterError: A class that has no name.
    """
    row_areas = pixel_areas(dataset)
    row_areas = np.full(dataset.height, np.nan) if row_areas is None else row_areas
    base, source = 0, Source(dataset)
    tops = range(0, dataset.height, rows)
    for top in until_stopped(tqdm(tops, desc=title, unit="strip", disable=None)):
        height = min(rows, dataset.height - top)
        window = Window(0, top, dataset.width, height)
        classes = read_label(source, -1, window)
        if classes.max() >= num_classes:
            raise RasterError(
                f"{dataset.name} holds class {classes.max()}, but there are names for "
                f"{num_classes} classes only; name all"
            )
        labels, areas = label_strip(classes.astype(np.int32), top, row_areas)
        yield top, labels + np.int32(base), areas
        base += len(areas.classes)


def find_areas(strips: Iterator, min_area: float) -> tuple[np.ndarray, Areas]:
    """Join the areas of strips to those of the map, and merge those below the smallest area.

    Returns:
        For each number of the strips the area that it belongs to, int32, and the areas.
    """
    tables, pairs, above = [], [np.zeros((2, 0), np.int64)], None
    for _, labels, table in strips:
        if above is not None:
            pairs.append(distinct_pairs(above, labels[0]))
        if min_area > 0:
            pairs.append(distinct_pairs(labels[:, :-1], labels[:, 1:]))
            pairs.append(distinct_pairs(labels[:-1], labels[1:]))
        above = labels[-1].copy()
        tables.append(table)
    columns = zip(*(vars(table).values() for table in tables))
    areas, pairs = Areas(*map(np.concatenate, columns)), np.concatenate(pairs, axis=1)
    same = areas.classes[pairs[0]] == areas.classes[pairs[1]]
    count, number = connected_groups(len(areas.classes), pairs[:, same])
    areas = areas.united(number, count)
    if min_area > 0:
        pairs = distinct_pairs(*number[pairs[:, ~same]])
        pairs = pairs[:, (areas.classes[pairs] >= 0).all(axis=0)]
        heirs, areas.classes = sieve(areas, pairs, min_area)
        first, merged = np.unique(heirs, return_inverse=True)
        number, areas = merged[number], areas.united(merged, len(first))
    return number.astype(np.int32), areas


def sieve(areas: Areas, pairs: np.ndarray, min_area: float):
    """Merge areas below the smallest area into neighbours, by the rule of ``write_polygons``.

    Args:
        areas: Of the map.
        pairs: (2, n), neighbours of different classes, each pair once.
        min_area: Square metres.

    Returns:
        For each area the first one of those that it is united with, and its class.
    """
    limit = min_area * (1 - 1e-9)  # sums of fractions are not exact
    count = len(areas.classes)
    small = (areas.extent < limit) & (areas.classes >= 0)
    ends = np.concatenate([pairs, pairs[::-1]], axis=1)
    ends = ends[:, small[ends[0]]]
    ends = ends[:, np.argsort(ends[0], kind="stable")]
    bounds = memoryview(np.searchsorted(ends[0], np.arange(count + 1)))
    neighbours = ends[1].astype(np.int32)
    # plain numbers from memory views are quicker than NumPy's, and less than lists
    heirs, following = np.arange(count), np.arange(count)
    heir, ring = memoryview(heirs), memoryview(following)  # a ring of members each
    columns = (areas.classes, areas.pixels, areas.extent)
    classes, pixels, extent = (memoryview(column.copy()) for column in columns)

    def find(area: int) -> int:
        while heir[area] != area:
            heir[area] = area = heir[heir[area]]
        return area

    def around(area: int) -> set[int]:
        found, member = set(), area
        while True:
            found.update(neighbours[bounds[member] : bounds[member + 1]].tolist())
            member = ring[member]
            if member == area:
                return {find(other) for other in found} - {area}

    waiting = [(pixels[area], area) for area in np.flatnonzero(small).tolist()]
    heapify(waiting)
    while waiting:
        size, area = heappop(waiting)
        if heir[area] != area or pixels[area] != size:
            continue  # it has grown since then
        others = around(area)
        if not others:
            continue
        largest = max(
            others, key=lambda other: (pixels[other], -classes[other], -other)
        )
        class_ = classes[largest]
        group = [area, *(other for other in others if classes[other] == class_)]
        first = min(group)
        pixels[first] = sum(pixels[member] for member in group)
        extent[first] = sum(extent[member] for member in group)
        classes[first] = class_
        for member in group:
            heir[member] = first
            if member != first:
                ring[first], ring[member] = ring[member], ring[first]
        if extent[first] < limit:
            heappush(waiting, (pixels[first], first))
    while (heirs != heirs[heirs]).any():
        heirs = heirs[heirs]
    return heirs, np.asarray(classes)[heirs]


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


def write_polygons(
    map_path: Path,
    target: Path,
    names: Sequence[str],
    min_area: float = 0.0,
    rows: int = STRIP,
    colours: Sequence[Colour] = (),
) -> int:
    """Write a class map as a GeoPackage with a polygon per connected area of one class.

    Pixels are connected through their edges. The columns are class, class_name and area_ha: the
    hectares of the area's pixels as ``pixel_areas`` measures them, null without a CRS. The
    map is read in strips of rows, and memory holds one of them, a few numbers per area, and the
    outlines of areas that reach into the next strip; the polygons are the same for all strips.

    With ``min_area``, areas smaller than that many square metres are merged into others. The one
    of fewest pixels comes first (of several the one whose first pixel comes first, row by row). It
    takes the class of its neighbour with most pixels (then the lowest class, then the first pixel)
    and forms one area with all its neighbours of that class, which takes its turn again if it is
    still too small. An area without neighbours, an island in nodata, stays as it is.

    Args:
        map_path: One band of classes; nodata gives no polygon.
        target: The GeoPackage; its layer has the name of the file.
        names: Of all classes.
        min_area: Smallest area in square metres.
        rows: Of a strip.
        colours: Of all classes, for the style that QGIS shows; none without.

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
        if min_area > 0 and pixel_areas(dataset) is None:
            raise RasterError(
                f"{map_path} has no CRS that gives the size of its pixels, so --min_area "
                "cannot be applied; assign one (gdal_edit.py -a_srs)"
            )
        strips = labelled_strips(dataset, len(names), rows, "areas")
        belongs, areas = find_areas(strips, min_area)
        strips = labelled_strips(dataset, len(names), rows, "polygons")
        file, total, layer = Path(folder) / "map.gpkg", 0, Path(target).stem
        none = np.zeros(0, int), np.zeros(0, object)  # makes the layer of an empty map
        for numbers, polygons in chain(
            [none], polygons_of_strips(strips, belongs, areas)
        ):
            table = feature_table(numbers, polygons, areas, names, dataset.transform)
            with naming(target, file):
                append_features(file, layer, table, dataset.crs)
            total += len(numbers)
        if colours:
            with naming(target, file):
                add_style(file, layer, categorized_style("class_name", names, colours))
        file.replace(part)
    return total
