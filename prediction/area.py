"""The area of interest of ``--area``: polygons on the pixel grid of a scene."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from math import ceil, floor

import numpy as np
import rasterio
from affine import Affine
from rasterio.features import geometry_mask

from common.errors import DatasetError, RasterError
from common.vectors import in_pixels, polygonal, read_vector
from prediction.tiling import Extent

COUNTED_ROWS = 1024  # rows that are drawn at once


@dataclass(frozen=True)
class Area:
    """What of a scene is mapped."""

    extent: Extent  # the bounds, in pixels of the scene
    polygons: Sequence = ()  # in pixel coordinates (x, y); none: all of the extent

    def inside(self, part: Extent) -> np.ndarray:
        """Which pixels of a part of the scene have their centre in the area, (n, w) bool."""
        shape = part.bottom - part.top, part.right - part.left
        if not len(self.polygons):
            return np.ones(shape, bool)
        import shapely

        box = shapely.box(part.left, part.top, part.right, part.bottom)
        near = [one for one in self.polygons if one.intersects(box)]
        if not near:
            return np.zeros(shape, bool)
        place = Affine.translation(part.left, part.top)
        return geometry_mask(near, shape, place, invert=True)

    @cached_property
    def pixels(self) -> int:
        """How many pixels of the scene lie in the area."""
        top, bottom, left, right = self.extent
        if not len(self.polygons):
            return (bottom - top) * (right - left)
        cuts = pairwise([*range(top, bottom, COUNTED_ROWS), bottom])
        parts = (Extent(*rows, left, right) for rows in cuts)
        return sum(int(self.inside(part).sum()) for part in parts)


def whole_scene(scene: rasterio.DatasetReader) -> Area:
    """All of a scene."""
    return Area(Extent(0, scene.height, 0, scene.width))


@cache
def read_polygons(source: str):
    """The table of ``--area``, read once for all scenes.

    Raises:
        DatasetError: It cannot be read, or has no polygons.
    """
    import shapely

    table = read_vector(source)
    if not (shapely.get_dimensions(table.geometry.values) == 2).any():
        raise DatasetError(
            f"--area: {source} has no polygons, only points or lines; draw polygons into it"
        )
    return table


def find_area(source: str, scene: rasterio.DatasetReader) -> Area | None:
    """The part of a scene that polygons of any CRS cover, of no pixels where they hold the centre
    of none; None where they miss it.

    Raises:
        DatasetError: The file has no polygons, or no CRS.
        RasterError: The scene has no place on the ground.
    """
    if scene.crs is None:
        raise RasterError(
            f"--area: {scene.name} has no CRS, so where it lies is not known"
        )
    import shapely

    table = read_polygons(source)
    whole = shapely.box(0, 0, scene.width, scene.height)
    outlines = (polygonal(one) for one in in_pixels(table, scene, source, cut=True))
    parts = [one.intersection(whole) for one in outlines if one is not None]
    polygons = [part for part in parts if part.area > 0]
    if not polygons:
        return None
    left, top, right, bottom = shapely.total_bounds(polygons)
    extent = Extent(floor(top), ceil(bottom), floor(left), ceil(right))
    return Area(extent, polygons)


def missed_text(source: str, scenes: str, touched: bool) -> str:
    """Why nothing of scenes can be mapped: the area misses them, or lies between centres of pixels."""
    if touched:
        return f"--area: no pixel of {scenes} has its centre in {source}; draw larger polygons"
    return f"--area: {source} does not touch {scenes}"
