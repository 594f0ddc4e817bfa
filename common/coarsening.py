"""Pixels of a raster in the larger ones of a scene: how many there are, and the largest of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import rasterio
from rasterio.crs import CRS
from rasterio.enums import Resampling
from rasterio.transform import Affine
from rasterio.warp import reproject
from rasterio.windows import Window

from common.ground import outline_in

AT_ONCE = 2**22  # pixels of a raster that are read together
PLANE = CRS.from_epsg(3857)  # any
FLIP = Affine.scale(2, -2)  # rows go down; GDAL takes pixels of 1 for none


class Place(NamedTuple):
    """Pixels on the ground."""

    crs: CRS
    transform: Affine
    width: int
    height: int

    def part(self, window: Window) -> Place:
        shift = Affine.translation(window.col_off, window.row_off)
        size = int(window.width), int(window.height)
        return Place(self.crs, self.transform * shift, *size)


def mean_count(place: Place, raster: rasterio.DatasetReader) -> float:
    """How many pixels of a raster have the size of one of a place; 0 where nobody knows."""
    import shapely

    points = outline_in(place, raster)
    if points is None:
        return 0.0
    return shapely.MultiPoint(points).convex_hull.area / (place.width * place.height)


def largest_within(
    read: Callable[[Window], np.ndarray],
    raster: rasterio.DatasetReader,
    place: Place,
    window: Window,
) -> np.ndarray:
    """The largest value of a raster's pixels that lie, also in part, in each pixel of a place.

    GDAL finds them, as it does for averages.

    Args:
        read: Gives a window of the raster as two or more bands of bytes (C, h, w).
        raster: Where these pixels lie.
        place: Larger pixels.
        window: Whole pixels of the place.

    Returns:
        (C, H, W) uint8, 0 beyond the raster; read in parts, so that memory is bounded.
    """
    part = place.part(window)
    inside = _window_around(part, raster)
    if inside.width * inside.height > AT_ONCE and part.width * part.height > 1:
        axis = 1 if part.height > part.width else 2
        halves = _halves(window, axis)
        return np.concatenate(
            [largest_within(read, raster, place, h) for h in halves], axis
        )
    pixels = read(inside)
    found = np.zeros((len(pixels), part.height, part.width), np.uint8)
    systems = raster.crs, place.crs
    before, after = raster.window_transform(inside), part.transform
    if raster.crs == place.crs:
        # in pixels of the raster: rounding of large coordinates would touch those beside
        a, b, c, d, e, f = (~raster.transform * place.transform)[:6]
        scene = Affine(a, b, round(c, 6), d, e, round(f, 6))
        after = FLIP * scene * Affine.translation(window.col_off, window.row_off)
        before = FLIP * Affine.translation(inside.col_off, inside.row_off)
        systems = PLANE, PLANE
    reproject(
        pixels, found, src_crs=systems[0], dst_crs=systems[1], src_transform=before,
        dst_transform=after, resampling=Resampling.max, tolerance=0,
    )  # fmt: skip
    return found


def _window_around(part: Place, raster: rasterio.DatasetReader) -> Window:
    """The pixels of a raster that hold a part of a place, and some around them: at least one."""
    points = outline_in(part, raster)
    size = np.array([raster.width, raster.height])
    if points is None:  # without a place in the raster's CRS, so beyond it
        return Window(0, 0, 1, 1)
    first = np.clip(np.floor(points.min(axis=0)) - 2, 0, size - 1).astype(int)
    last = np.clip(np.ceil(points.max(axis=0)) + 2, first + 1, size).astype(int)
    return Window(*map(int, [*first, *(last - first)]))


def _halves(window: Window, axis: int) -> list[Window]:
    """The upper and the lower half of a window (axis 1), or the left and the right one (2)."""
    left, top, width, height = map(int, window.flatten())
    if axis == 1:
        half = height // 2
        return [
            Window(left, top, width, half),
            Window(left, top + half, width, height - half),
        ]
    half = width // 2
    return [
        Window(left, top, half, height),
        Window(left + half, top, width - half, height),
    ]
