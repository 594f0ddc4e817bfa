"""The cells of a grid, in the pixels of an image."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import rasterio
from rasterio.transform import Affine
from rasterio.windows import Window

from common.errors import DatasetError
from common.rasters import GDAL_CACHE, Source
from common.text import first_reason
from common.vectors import around, find_column, in_pixels, polygonal, read_vector
from common.windows import pixel_bounds, window_within
from extraction.journal import Skipped
from extraction.settings import ExtractionOptions, SceneFiles

if TYPE_CHECKING:
    from geopandas import GeoDataFrame
    from pandas import DataFrame
    from shapely import Geometry

ID_COLUMNS = ("id", "fid", "cell_id", "cellid", "grid_id", "gridid", "patch_id", "name")
LONGEST_NAME = 200  # bytes; file systems allow 255, and temporary names are longer
LARGEST_CELL = 16  # times the patch size, per side


@dataclass(frozen=True)
class Cell:
    """A cell of the grid in the image's pixels."""

    name: str
    window: Window  # its bounding box; may reach beyond the image
    outline: Geometry | None = None  # in pixels; None when the cell fills the window


def cell_ids(grid: GeoDataFrame, column: str | None, prefix: int) -> list[str]:
    """The part of a file name that tells cells apart, from an id column or the row (from 1).

    Args:
        grid: The cells.
        column: That holds the ids; by default one of ``ID_COLUMNS`` that will do.
        prefix: Bytes of the names beside it.

    Raises:
        OptionError: No such column.
        DatasetError: The column named holds an id twice, or none.
    """
    columns = {name.lower(): name for name in grid.columns if name != "geometry"}
    if column:
        columns[column.lower()] = find_column(grid, "--id_column", column)
    for name in [column.lower()] if column else ID_COLUMNS:
        if name not in columns:
            continue
        ids = [id_text(value) for value in grid[columns[name]]]
        names = Counter(_padded([text for text in ids if text]))
        longest = LONGEST_NAME - prefix
        twice = [text for text in ids if not text]
        twice += [text for text in names if names[text] > 1]
        twice += [text for text in names if len(os.fsencode(text)) > longest]
        if not twice:
            break
        if column:
            raise DatasetError(
                f"--id_column {column}: {len(twice)} ids are not unique, empty or too long, as "
                f"{twice[0][:80]!r}; name another column"
            )
    else:
        ids = [str(row) for row in range(1, len(grid) + 1)]
    return _padded(ids)


def _padded(ids: Sequence[str]) -> list[str]:
    """Ids of which numbers are padded with zeros so that they sort."""
    digits = max([3, *(len(text) for text in ids if text.isdecimal())])
    return [text.zfill(digits) if text.isdecimal() else text for text in ids]


def id_text(value) -> str:
    """An id as part of a file name; separators and the like become underscores."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return re.sub(r"[^\w.-]+", "_", str(value)).strip("._")


def regular_cells(width: int, height: int, size: int, stride: int, prefix: str):
    """Square cells every ``stride`` pixels; the last ones may reach beyond the image."""
    return [
        Cell(f"{prefix}_r{row:03}_c{column:03}", Window(left, top, size, size))
        for row, top in enumerate(range(0, height, stride))
        for column, left in enumerate(range(0, width, stride))
    ]


class Grid:
    """The cells of a vector file, read once for all scenes that share it."""

    def __init__(self, path: str, column: str | None):
        self.path, self.column, self.table = path, column, read_vector(path)
        self._ids: dict[int, list[str]] = {}  # by the bytes of the prefix

    def names(self, rows: np.ndarray, prefix: str) -> list[str]:
        """The file names of some cells."""
        size = len(os.fsencode(prefix)) + 1
        if size not in self._ids:
            self._ids[size] = cell_ids(self.table, self.column, size)
        return [f"{prefix}_{self._ids[size][row]}" for row in rows]

    def columns(self, rows: Sequence[int]) -> DataFrame:
        """What the columns of the file hold of some cells, without the geometries."""
        table = self.table.iloc[list(rows)].select_dtypes(exclude="geometry")
        return table.reset_index(drop=True)

    def rows_near(self, image: rasterio.DatasetReader) -> np.ndarray:
        """The cells that may touch an image, and some around it, in the order of the file."""
        import shapely

        box = around(image, self.table.crs, margin=0.1)  # edges bend between the points
        if box is None:
            return np.arange(len(self.table))
        found = [self.table.sindex.query(part) for part in shapely.get_parts(box)]
        return np.unique(np.concatenate(found))


OUTSIDE = Skipped("outside the image")


def _place(
    name: str,
    outline: Geometry | None,
    image: rasterio.DatasetReader,
    path: str,
    patch_size: int,
) -> Cell | Skipped:
    """A cell by its outline in pixels, or why there is none; ``path`` is that of the grid."""
    import shapely

    outline = polygonal(outline)
    if outline is None:
        return Skipped("no polygon")
    if not np.isfinite(outline.bounds).all():
        return Skipped("cannot be transformed to the image's CRS")
    window = pixel_bounds(outline.bounds)
    if not window.width or not window.height:
        return Skipped("smaller than a pixel")
    if window_within(window, image.width, image.height) is None:
        return OUTSIDE
    if max(window.width, window.height) > LARGEST_CELL * patch_size:
        raise DatasetError(
            f"{name} of {path} covers {window.width} x {window.height} pixels, more "
            f"than {LARGEST_CELL} times --patch_size {patch_size}; use a finer grid"
        )
    box = shapely.box(*outline.bounds)
    gap = shapely.hausdorff_distance(outline.boundary, box.boundary)
    return Cell(name, window, outline if gap > 0.01 else None)


def cells_of(
    scene: SceneFiles,
    config: ExtractionOptions,
    image: rasterio.DatasetReader,
    shared: Grid | None = None,
):
    """The cells of a scene, and those that cannot be cut.

    Args:
        scene: Its files.
        config: The options.
        image: The open scene.
        shared: The scene's grid when other scenes have it too; cells elsewhere are theirs then,
            and not listed.

    Returns:
        cells, {name: Skipped} of the others, and what the grid's columns hold of each cell, a row
        per cell (None without a grid).

    Raises:
        DatasetError: The grid cannot be read, a cell is far too large, or none lies on the image.
    """
    if scene.grid is None:
        size, stride = config.patch_size, config.stride or config.patch_size
        cells = regular_cells(image.width, image.height, size, stride, scene.name)
        return cells, {}, None
    grid = shared or Grid(scene.grid, config.id_column)
    rows = shared.rows_near(image) if shared else np.arange(len(grid.table))
    names = grid.names(rows, scene.name)
    cells, skipped, taken = [], {}, []
    outlines = in_pixels(grid.table.iloc[rows], image, grid.path)
    for row, name, outline in zip(rows, names, outlines):
        found = _place(name, outline, image, scene.grid, config.patch_size)
        if isinstance(found, Cell):
            cells.append(found)
            taken.append(row)
        elif shared is None or found != OUTSIDE:
            skipped[name] = found
    if not cells:
        reason = first_reason(skipped) if skipped else "all are outside the image"
        raise DatasetError(
            f"No cell of {scene.grid} lies on {image.name} ({reason}); check the CRS "
            f"of both: {grid.table.crs.to_string()} and {image.crs.to_string()}"
        )
    return cells, skipped, grid.columns(taken)


def reading_order(cells: Sequence[Cell], image: Source) -> list[Cell]:
    """Cells in an order in which GDAL's block cache serves neighbours: each block decoded once.

    From top to bottom, in columns that are so wide that the blocks under two rows of cells fit into
    half of the cache.
    """
    block = image.dataset.block_shapes[0][0]
    rows = block + max(block, *(int(cell.window.height) for cell in cells))
    pixel = len(image.bands) * image.dtype.itemsize
    width = max(1, GDAL_CACHE // 2 // (pixel * rows))

    def place(cell: Cell) -> tuple[int, int, int]:
        window = cell.window
        return window.col_off // width, window.row_off, window.col_off

    return sorted(cells, key=place)


def cell_mask(cell: Cell) -> np.ndarray:
    """(H, W) bool: the window's pixels whose centre lies in the cell."""
    from rasterio.features import geometry_mask

    shape = (int(cell.window.height), int(cell.window.width))
    if cell.outline is None:
        return np.ones(shape, bool)
    origin = Affine.translation(cell.window.col_off, cell.window.row_off)
    return geometry_mask([cell.outline], shape, origin, invert=True)
