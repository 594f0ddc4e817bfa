"""The connected areas of a class map, found in strips and merged to a smallest area."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from math import ceil
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.errors import RasterError
from common.interruption import until_stopped

STRIP = 256  # rows of a map whose areas are found at a time


@dataclass(frozen=True)
class MapRows:
    """A class map that is read by rows."""

    read: Callable[[int, int], np.ndarray]  # from row, to row: (n, W) int32, -1: nodata
    height: int
    pixel_areas: np.ndarray | None = None  # (H,), square metres; None if unknown


def centre_pixel(
    name: str | Path, pixel_areas: np.ndarray | None, option: str
) -> float:
    """Square metres of the pixel at the centre of a map, by which an option's metres are pixels.

    Args:
        name: The map.
        pixel_areas: Of each row, (H,); None if unknown.
        option: As "--sieve".

    Raises:
        RasterError: They are unknown.
    """
    area = 0.0 if pixel_areas is None else float(pixel_areas[len(pixel_areas) // 2])
    if not area > 0:
        raise RasterError(
            f"{name} has no CRS that gives the size of its pixels, so {option} cannot be "
            "applied; assign one (gdal_edit.py -a_srs)"
        )
    return area


def fewest_pixels(square_metres: float, pixel: float) -> int:
    """The pixels of the smallest area that ``find_areas`` leaves; ``pixel`` is ``centre_pixel``."""
    # fractions are not exact, and more than this no map has
    return ceil(min(square_metres / pixel * (1 - 1e-9), 2.0**62))


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


def labelled_strips(rows: MapRows, strip: int, title: str | None) -> Iterator:
    """Cut a class map into strips and find the areas of each.

    Args:
        rows: Of the map.
        strip: Rows of a strip.
        title: Of the progress bar; None shows none.

    Yields:
        First row, numbers (h, W) int32 that continue from strip to strip, the strip's ``Areas``.
    """
    row_areas = rows.pixel_areas
    row_areas = np.full(rows.height, np.nan) if row_areas is None else row_areas
    base = 0
    tops = range(0, rows.height, strip)
    hidden = None if title else True
    for top in until_stopped(tqdm(tops, desc=title, unit="strip", disable=hidden)):
        classes = rows.read(top, min(top + strip, rows.height))
        labels, areas = label_strip(classes, top, row_areas)
        yield top, labels + np.int32(base), areas
        base += len(areas.classes)


def find_areas(strips: Iterator, fewest: int) -> tuple[np.ndarray, Areas]:
    """Join the areas of strips to those of the map, and merge those of too few pixels.

    Of the areas with less than ``fewest`` pixels, the one of fewest pixels comes first (of several
    the one whose first pixel comes first, row by row). It takes the class of its neighbour with
    most pixels (then the lowest class, then the first pixel) and forms one area with all its
    neighbours of that class, which takes its turn again if it is still too small. Neighbours share
    an edge of a pixel. An area without neighbours, an island in nodata, stays as it is.

    Returns:
        For each number of the strips the area that it belongs to, int32, and the areas.
    """
    tables, pairs, above = [], [np.zeros((2, 0), np.int64)], None
    for _, labels, table in strips:
        if above is not None:
            pairs.append(distinct_pairs(above, labels[0]))
        if fewest > 1:
            pairs.append(distinct_pairs(labels[:, :-1], labels[:, 1:]))
            pairs.append(distinct_pairs(labels[:-1], labels[1:]))
        above = labels[-1].copy()
        tables.append(table)
    columns = zip(*(vars(table).values() for table in tables))
    areas, pairs = Areas(*map(np.concatenate, columns)), np.concatenate(pairs, axis=1)
    same = areas.classes[pairs[0]] == areas.classes[pairs[1]]
    count, number = connected_groups(len(areas.classes), pairs[:, same])
    areas = areas.united(number, count)
    if fewest > 1:
        pairs = distinct_pairs(*number[pairs[:, ~same]])
        pairs = pairs[:, (areas.classes[pairs] >= 0).all(axis=0)]
        heirs, areas.classes = sieve(areas, pairs, fewest)
        first, merged = np.unique(heirs, return_inverse=True)
        number, areas = merged[number], areas.united(merged, len(first))
    return number.astype(np.int32), areas


def sieve(areas: Areas, pairs: np.ndarray, fewest: int):
    """Merge areas of less than ``fewest`` pixels into neighbours, by the rule of ``find_areas``.

    Args:
        areas: Of the map.
        pairs: (2, n), neighbours of different classes, each pair once.
        fewest: Pixels of an area that stays.

    Returns:
        For each area the first one of those that it is united with, and its class.
    """
    count = len(areas.classes)
    small = (areas.pixels < fewest) & (areas.classes >= 0)
    ends = np.concatenate([pairs, pairs[::-1]], axis=1)
    ends = ends[:, small[ends[0]]]
    ends = ends[:, np.argsort(ends[0], kind="stable")]
    bounds = memoryview(np.searchsorted(ends[0], np.arange(count + 1)))
    neighbours = ends[1].astype(np.int32)
    # plain numbers from memory views are quicker than NumPy's, and less than lists
    heirs, following = np.arange(count), np.arange(count)
    heir, ring = memoryview(heirs), memoryview(following)  # a ring of members each
    classes, pixels = memoryview(areas.classes.copy()), memoryview(areas.pixels.copy())

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
        classes[first] = class_
        for member in group:
            heir[member] = first
            if member != first:
                ring[first], ring[member] = ring[member], ring[first]
        if pixels[first] < fewest:
            heappush(waiting, (pixels[first], first))
    while (heirs != heirs[heirs]).any():
        heirs = heirs[heirs]
    return heirs, np.asarray(classes)[heirs]


def sieved_strips(
    rows: MapRows, fewest: int, strip: int = STRIP
) -> Iterator[tuple[int, np.ndarray]]:
    """The strips of a class map without the areas that ``find_areas`` merges.

    The map is read twice; memory holds a strip and some numbers per area.

    Args:
        rows: Of the map.
        fewest: Pixels of an area that stays.
        strip: Rows of a strip; the result is the same for all.

    Yields:
        First row and classes (h, W) int32, -1 where nodata.
    """
    belongs, areas = find_areas(labelled_strips(rows, strip, "areas"), fewest)
    for top, labels, _ in labelled_strips(rows, strip, "sieve"):
        yield top, areas.classes[belongs[labels]]
