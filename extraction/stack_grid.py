"""Pixel grids: that of each band, that of the scene, and what all bands are stored as."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import rasterio
from rasterio.crs import CRS
from rasterio.enums import MaskFlags
from rasterio.transform import Affine, array_bounds
from rasterio.warp import calculate_default_transform

from common.alpha import alpha_bands
from common.errors import OptionError, RasterError
from common.rasters import as_dtype, open_raster, require_georeference
from common.sources import require_whole
from extraction.stack_bands import Band

NEAR = 0.01  # of a pixel: grids that differ by less are the same
# a type with room for a value that no band holds
WIDER = {"uint8": "int16", "int8": "int16", "int16": "int32", "uint16": "int32"}


@dataclass(frozen=True)
class Grid:
    """The pixels of a raster on the ground."""

    crs: CRS
    transform: Affine
    width: int
    height: int

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """Left, bottom, right, top."""
        left, bottom, right, top = array_bounds(self.height, self.width, self.transform)
        return min(left, right), min(bottom, top), max(left, right), max(bottom, top)

    @property
    def pixel(self) -> float:
        """The side of a pixel in units of the CRS, by its area."""
        return math.sqrt(abs(self.transform.determinant))

    def offset_in(self, other: Grid) -> tuple[int, int] | None:
        """Column and row of this grid's first pixel in another with the same pixels, or None."""
        if self.crs != other.crs:
            return None
        corners = np.array([(0, 0), (self.width, 0), (0, self.height)])
        places = np.array([~other.transform * (self.transform * c) for c in corners])
        first = places[0].round()
        if np.abs(places - corners - first).max() > NEAR:
            return None
        return int(first[0]), int(first[1])

    def covers(self, other: Grid) -> bool:
        """Whether another grid of the same CRS lies within this one."""
        if self.crs != other.crs:
            return False
        corners = product((0, other.width), (0, other.height))
        places = [~self.transform * (other.transform * corner) for corner in corners]
        return all(
            -NEAR <= x <= self.width + NEAR and -NEAR <= y <= self.height + NEAR
            for x, y in places
        )


@dataclass(frozen=True)
class Layer:
    """A band of the scene: what it is called there, and how its file stores it."""

    name: str
    band: Band
    grid: Grid
    dtype: str
    nodata: float | None
    block: tuple[int, int]
    masks: tuple[str, ...] = ()  # of its file, as a VRT names them


def grid_of(file: rasterio.DatasetReader) -> Grid:
    """The pixels of an open raster.

    Raises:
        RasterError: It has no CRS.
    """
    require_georeference(file)
    return Grid(file.crs, file.transform, file.width, file.height)


def open_layer(name: str, band: Band) -> Layer:
    """Look into the file of a band.

    Raises:
        RasterError: It cannot be read, has no CRS, or holds numbers that an offset does not fit.
    """
    with open_raster(band.path) as file:
        require_whole(band.path)
        if file.count < band.number:
            raise RasterError(
                f"{band.path} has {file.count} bands, expected {band.number}"
            )
        nodata = (
            file.nodatavals[band.number - 1] if band.nodata is None else band.nodata
        )
        block = file.block_shapes[band.number - 1]
        dtype = np.dtype(file.dtypes[band.number - 1])
        if as_dtype(nodata, dtype) is None:  # then no pixel holds it
            nodata = None
        if band.offset and dtype.kind not in "iu":
            raise RasterError(
                f"An offset ({band.offset}) is for whole numbers, but {name} of {band.path} holds "
                f"{dtype}; leave --offset or the file out"
            )
        if band.offset and abs(band.offset) >= (most := np.iinfo(dtype).max):
            raise RasterError(
                f"An offset of {band.offset} leaves no pixel of {name} of {band.path} as it is: "
                f"{dtype} ends at {most}; leave --offset or the file out"
            )
        masks = own_masks(file)
        return Layer(name, band, grid_of(file), dtype.name, nodata, block, masks)


def own_masks(file: rasterio.DatasetReader) -> tuple[str, ...]:
    """The mask band and the alpha bands of a file, as a VRT names the bands of its sources."""
    flags = file.mask_flag_enums[0]
    masked = MaskFlags.per_dataset in flags and MaskFlags.alpha not in flags
    return ("mask,1",) * masked + tuple(map(str, alpha_bands(file)))


def finest_grid(layers: Sequence[Layer], resolution: float | None) -> Grid:
    """The pixels of the finest layer, or of ``--resolution``, over the ground that all share.

    Raises:
        RasterError: Layers of several CRSs, rotated, or without ground in common.
        OptionError: A resolution in metres where the CRS has other units.
    """
    finest = min(layers, key=lambda layer: layer.grid.pixel)
    base = finest.grid
    for layer in layers:
        if layer.grid.crs != base.crs:
            raise RasterError(
                f"{layer.band.path} is in {layer.grid.crs}, but {finest.band.path} in {base.crs}; "
                "name the raster to follow with --like"
            )
        if layer.grid.transform.b or layer.grid.transform.d:
            raise RasterError(
                f"{layer.band.path} is rotated; name a raster to follow with --like"
            )
    a, e = abs(base.transform.a), abs(base.transform.e)
    bounds = [layer.grid.bounds for layer in layers]
    left, bottom = (max(b[i] for b in bounds) for i in (0, 1))
    right, top = (min(b[i] for b in bounds) for i in (2, 3))
    x, y = base.bounds[0], base.bounds[3]
    # whole pixels of the finest layer within the common ground
    left = x + math.ceil((left - x) / a - NEAR) * a
    top = y - math.ceil((y - top) / e - NEAR) * e
    if resolution is not None:
        if not (
            base.crs.is_projected and base.crs.linear_units.lower().startswith("met")
        ):
            raise OptionError(
                f"--resolution {resolution:g}: expected --like, since {base.crs} does not count in "
                "metres"
            )
        a = e = resolution
    width = math.floor((right - left) / a + NEAR)
    height = math.floor((top - bottom) / e + NEAR)
    if width < 1 or height < 1:
        raise RasterError(
            f"{', '.join(dict.fromkeys(layer.band.path for layer in layers))} have no ground in "
            "common; give files of one place"
        )
    return Grid(base.crs, Affine(a, 0, left, 0, -e, top), width, height)


def resampling_to(layer: Layer, grid: Grid) -> str:
    """How the pixels of a layer become those of a grid: average when coarsening."""
    pixel = layer.grid.pixel
    if layer.grid.crs != grid.crs:
        transform, _, _ = calculate_default_transform(
            layer.grid.crs,
            grid.crs,
            layer.grid.width,
            layer.grid.height,
            *layer.grid.bounds,
        )
        pixel = math.sqrt(abs(transform.determinant))
    return "average" if grid.pixel > pixel * (1 + NEAR) else "bilinear"


def common_type(layers: Sequence[Layer], grid: Grid) -> tuple[str, float | None]:
    """The type and the nodata value of all bands of a scene.

    Those of the layers where they agree; else the next larger type, with a nodata value that none
    of the layers can hold. A GeoTIFF has one of each.
    """
    kinds = {(layer.dtype, repr(layer.nodata)) for layer in layers}
    covered = all(layer.grid.covers(grid) for layer in layers)
    if len(kinds) == 1 and (layers[0].nodata is not None or covered):
        return layers[0].dtype, layers[0].nodata
    dtypes = {layer.dtype for layer in layers}
    dtype = np.result_type(*dtypes).name
    if dtype in dtypes and np.dtype(dtype).kind in "iu":
        dtype = WIDER.get(dtype, "float64")
    if np.dtype(dtype).kind == "f":
        return dtype, math.nan
    return dtype, float(np.iinfo(dtype).min)
