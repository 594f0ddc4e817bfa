"""Cut a scene and its label into patches along the cells of a grid.

    python Patch_extraction.py extract --image scene.tif --label label.tif --grid grid.shp \\
        --output data --patch_size 224
    python Patch_extraction.py batch --data_dir scenes --grid grid.shp --output data
    python Patch_extraction.py visualize --output data --split train --sample_index 0
    python Patch_extraction.py info --output data

``extract`` and ``batch`` leave ``data/Patch/{train,validation,test}/{images,labels}``, which main.py
trains on, and ``data/Patch/cells.gpkg``, which shows the splits in QGIS.
A patch covers its cell's bounding box in the image's pixels; label pixels outside the cell itself
(a rotated or many-sided one) are unlabelled, so that neighbouring cells share no label.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import re
import shutil
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import rasterio
from rasterio.enums import ColorInterp, Resampling
from rasterio.transform import Affine
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window

import rasters
from rasters import (
    DatasetError,
    OptionError,
    RasterError,
    SegmentationError,
    require,
    setting,
)

if TYPE_CHECKING:
    from geopandas import GeoDataFrame, GeoSeries
    from shapely import Geometry

log = logging.getLogger("semanticseg4eo")

MISSING = -(
    2**31
)  # a label pixel of which nothing is known, before classes are numbered
VECTOR_SUFFIXES = (
    ".shp", ".gpkg", ".geojson", ".json", ".fgb", ".kml", ".gml", ".parquet", ".zip",
)  # fmt: skip
ID_COLUMNS = ("id", "fid", "cell_id", "cellid", "grid_id", "gridid", "patch_id", "name")
LONGEST_NAME = 200  # bytes; file systems allow 255, and others put endings behind it
LARGEST_PATCH = 16384  # pixels of a side
LARGEST_CELL = 16  # times the patch size, per side


# --- settings -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class OneScene:
    """What ``extract`` reads."""

    image: str = setting(help="scene, anything that GDAL reads", group="data")
    label: str = setting(
        help="label raster on any pixel grid, or vector file of polygons", group="data"
    )
    grid: str | None = setting(
        None,
        "vector file whose polygons are the cells, in any CRS",
        "data",
        shown="cells of --patch_size every --stride pixels",
    )


@dataclass(frozen=True, kw_only=True)
class SceneFolder:
    """What ``batch`` reads."""

    data_dir: str = setting(help="folder of scenes and labels", group="data")
    grid: str | None = setting(
        None,
        "vector file whose polygons are the cells of all scenes, in any CRS",
        "data",
        shown="cells of --patch_size every --stride pixels",
    )
    use_per_image_grid: bool = setting(
        False, "each scene has a grid of its own, found by --grid_pattern", "data"
    )
    image_pattern: str = setting(
        "Image_<id>.tif", "names of scenes; <id> pairs them, * is anything", "data"
    )
    label_pattern: str = setting("Label_<id>.tif", "names of labels", "data")
    grid_pattern: str = setting("Grid_<id>.*", "names of grids", "data")
    recursive: bool = setting(False, "look into folders of the folder too", "data")
    skip_unmatched: bool = setting(
        False, "leave out files without a partner instead of stopping", "data"
    )


@dataclass(frozen=True, kw_only=True)
class CuttingConfig:
    """What ``extract`` and ``batch`` have in common."""

    output: str = setting(help="dataset folder to write", group="data")
    bands: str | None = setting(
        None,
        "bands to keep, in this order: numbers from 1 or band descriptions, as B04,B03,B02",
        "data",
        shown="all but alpha",
    )
    image_channels: int | None = setting(
        None, "number of bands that must result", "data", shown="not checked"
    )
    id_column: str | None = setting(
        None,
        "grid column that names the patches",
        "data",
        shown="id or the like when there is one, else the row number",
    )
    label_values: str | None = setting(
        None,
        "label values (or texts of --label_column) that are classes, in class order, as 1,2,5: "
        "written as 0, 1, 2...; all others become unlabelled",
        "labels",
        shown="the label holds 0, 1, 2...",
    )
    label_column: str | None = setting(
        None,
        "column of a vector label that holds the class; outside its polygons is unlabelled",
        "labels",
        shown="every polygon is class 1, everything else class 0",
    )
    class_names: str | None = setting(
        None,
        "names in class order, separated by commas; they go with the patches to the map",
        "labels",
        shown="none, or the texts of --label_column",
    )
    patch_size: int = setting(
        224, "side of the patches in pixels; other cells are resized", "patches"
    )
    stride: int | None = setting(
        None,
        "pixels from cell to cell where there is no grid",
        "patches",
        shown="--patch_size",
    )
    interpolation: str = setting(
        "auto",
        "how image pixels are resized (labels: nearest); auto averages when shrinking and is "
        "bilinear when enlarging",
        "patches",
        choices=("auto", "nearest", "bilinear", "cubic", "area"),
    )
    min_valid: float = setting(
        0.5, "least valid share of a cell, 0 to 1; other cells are skipped", "patches"
    )
    train_ratio: float = setting(0.75, "share of the training split", "split")
    val_ratio: float = setting(0.15, "share of the validation split", "split")
    test_ratio: float = setting(0.10, "share of the test split", "split")
    split_by: str = setting(
        "random",
        "draw cell by cell, or in square blocks, which keeps neighbours together",
        "split",
        choices=("random", "block"),
    )
    block_size: float | None = setting(
        None, "side of a block in metres", "split", shown="four cells"
    )
    buffer: float = setting(
        0.0, "metres; cells nearer than that to another split are dropped", "split"
    )
    seed: int = setting(42, "seed of the split", "split", alias="--random_seed")
    save_metadata: bool = setting(
        False, "write Patch/metadata.json: where each patch comes from", "output"
    )
    overwrite: bool = setting(False, "replace the patches of an earlier run", "output")
    resume: bool = setting(False, "complete a run that was interrupted", "output")
    skip_errors: bool = setting(
        False,
        "go on after a cell or scene that cannot be read; list it and end with status 1",
        "output",
    )
    workers: int | None = setting(
        None, "cells in flight", "output", shown="the number of CPUs, at most 8"
    )

    def __post_init__(self):
        fine = 8 <= self.patch_size <= LARGEST_PATCH
        expected = f"at least 8, at most {LARGEST_PATCH}"
        require(fine, "--patch_size", self.patch_size, expected)
        for name in ("stride", "workers", "image_channels"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"--{name}", value, "at least 1")
        fine = (self.workers or 1) <= 1024
        require(fine, "--workers", self.workers, "1 to 1024")
        require(
            self.stride is None or self.grid is None,
            "--stride with --grid",
            self.grid,
            "one of the two",
        )
        fine = self.block_size is None or 1e-3 <= self.block_size < math.inf
        require(
            fine, "--block_size", self.block_size, "more than 0 metres, at least 0.001"
        )
        fine = self.block_size is None or self.split_by == "block"
        require(fine, "--block_size", self.block_size, "--split_by block with it")
        fine = 0 <= self.buffer < math.inf
        require(fine, "--buffer", self.buffer, "0 metres or more")
        require(
            not (self.overwrite and self.resume),
            "--overwrite",
            "and --resume",
            "one of the two",
        )
        require(0 <= self.min_valid <= 1, "--min_valid", self.min_valid, "0 to 1")
        require(0 <= self.seed < 2**32, "--seed", self.seed, "0 to 2^32 - 1")
        ratios = dict(zip(("train", "val", "test"), self.ratios))
        for name, ratio in ratios.items():
            require(0 <= ratio <= 1, f"--{name}_ratio", ratio, "0 to 1")
        require(self.train_ratio > 0, "--train_ratio", self.train_ratio, "more than 0")
        total = sum(self.ratios)
        require(
            abs(total - 1) < 1e-6,
            "--train_ratio, --val_ratio and --test_ratio",
            f"sum to {total:g}",
            "a sum of 1",
        )
        values, names = (split_list(v) for v in (self.label_values, self.class_names))
        require(
            not values or len(set(values)) == len(values) >= 2,
            "--label_values",
            self.label_values,
            "at least two different values",
        )
        require(
            not (values and names) or len(values) == len(names),
            "--class_names",
            self.class_names,
            f"{len(values)} names, as many as --label_values",
        )

    @property
    def ratios(self) -> tuple[float, float, float]:
        return self.train_ratio, self.val_ratio, self.test_ratio

    @property
    def threads(self) -> int:
        return self.workers or min(8, rasters.own_cores())


# the fields of the last class come first, so that --help begins with the files
@dataclass(frozen=True, kw_only=True)
class ExtractionConfig(CuttingConfig, OneScene):
    """Every setting of ``extract``."""

    def scenes(self) -> list[SceneFiles]:
        return [SceneFiles(self.image, self.label, self.grid, "patch")]


@dataclass(frozen=True, kw_only=True)
class BatchConfig(CuttingConfig, SceneFolder):
    """Every setting of ``batch``."""

    def __post_init__(self):
        super().__post_init__()
        require(
            not (self.use_per_image_grid and (self.grid or self.stride)),
            "--use_per_image_grid",
            "with --grid or --stride",
            "one of them",
        )
        for name in ("image_pattern", "label_pattern", "grid_pattern"):
            text = getattr(self, name)
            require(text.count("<id>") == 1, f"--{name}", text, "one <id> in it")

    def scenes(self) -> list[SceneFiles]:
        return pair_scenes(self)


@dataclass(frozen=True)
class SceneFiles:
    """Files that belong together, and what their patches' names begin with."""

    image: str
    label: str
    grid: str | None
    name: str


@dataclass(frozen=True)
class SampleConfig:
    """Every setting of ``visualize``."""

    output: str = setting(help="dataset folder that extract wrote", group="data")
    split: str = setting(
        "train", "which split to look into", "data", choices=rasters.SPLITS
    )
    sample_index: int = setting(0, "which patch of the split, from 0", "data")
    show: bool = setting(False, "open a window too", "output")


@dataclass(frozen=True)
class InfoConfig:
    """Every setting of ``info``."""

    output: str = setting(help="dataset folder that extract wrote", group="data")


def split_list(text: str | None) -> list[str]:
    """The items of a comma-separated option."""
    return [item.strip() for item in text.split(",")] if text else []


# --- scenes ---------------------------------------------------------------------------------


def pair_scenes(config: BatchConfig) -> list[SceneFiles]:
    """The scenes of a folder with their labels and grids, by the ids in their names.

    Raises:
        DatasetError: No scene, an id twice, or a file without its partner (unless they are to be
            skipped).
    """
    folder = Path(config.data_dir)
    if not folder.is_dir():
        raise DatasetError(f"No folder {folder}; give that of the scenes as --data_dir")
    paths = folder.rglob("*") if config.recursive else folder.iterdir()
    paths = sorted(path for path in paths if path.is_file())
    images = find_ids(paths, config.image_pattern)
    labels = find_ids(paths, config.label_pattern)
    grids = dict.fromkeys(images, config.grid)
    if config.use_per_image_grid:
        vectors = [path for path in paths if path.suffix.lower() in VECTOR_SUFFIXES]
        grids = find_ids(vectors, config.grid_pattern)
    if not images:
        raise DatasetError(f"No file in {folder} is called {config.image_pattern}")
    kinds = [images, labels, *([grids] if config.use_per_image_grid else [])]
    lonely = sorted(
        {
            path
            for kind in kinds
            for key, path in kind.items()
            if not all(key in other for other in kinds)
        }
    )
    if lonely:
        named = ", ".join(str(path) for path in lonely[:5])
        more = f" and {len(lonely) - 5} more" if len(lonely) > 5 else ""
        text = f"without the files that belong to them: {named}{more}"
        if not config.skip_unmatched:
            raise DatasetError(f"{text}; add them, or give --skip_unmatched")
        log.warning("left out, %s", text)
    scenes = [
        SceneFiles(str(path), str(labels[key]), _text(grids[key]), _id_text(key))
        for key, path in images.items()
        if key in labels and key in grids
    ]
    if not scenes:
        raise DatasetError(f"No scene in {folder} has all the files that belong to it")
    return scenes


def _text(path: Path | str | None) -> str | None:
    return None if path is None else str(path)


def find_ids(paths: Sequence[Path], pattern: str) -> dict[str, Path]:
    """Files whose name fits a pattern, in any case, by what stands for ``<id>`` in it.

    Raises:
        DatasetError: Two files of one id.
    """
    regex = re.escape(pattern).replace(r"\*", ".*").replace("<id>", "(?P<id>.+)")
    found: dict[str, Path] = {}
    for path in paths:
        match = re.fullmatch(regex, path.name, re.IGNORECASE)
        if not match:
            continue
        key = match["id"].lower()
        if key in found:
            raise DatasetError(f"{found[key]} and {path} have the same id")
        found[key] = path
    return found


# --- grid -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A cell of the grid in the image's pixels."""

    name: str
    window: Window  # its bounding box; may reach beyond the image
    outline: Geometry | None = None  # in pixels; None when the cell fills the window


def read_vector(path: str) -> GeoDataFrame:
    """A vector file with geometries and a CRS.

    Raises:
        DatasetError: Missing, unreadable, no geometry, or no CRS.
    """
    import geopandas

    read = geopandas.read_file
    if Path(path).suffix.lower() == ".parquet":
        read = geopandas.read_parquet
    try:
        table = read(path)
    except Exception as error:  # every driver raises its own kinds
        raise DatasetError(
            f"{path} cannot be read as a vector file: {rasters.reason(error):.100}; give a whole "
            "GeoPackage, GeoJSON, or shapefile with its .shx and .dbf beside it"
        ) from error
    if not isinstance(table, geopandas.GeoDataFrame) or table.geometry.isna().all():
        raise DatasetError(f"{path} has no geometries; draw polygons into it")
    if table.crs is None:
        raise DatasetError(
            f"{path} has no CRS; add it (a shapefile keeps it in a .prj file beside it)"
        )
    return table


def in_pixels(table: GeoDataFrame, image: rasterio.DatasetReader, source: str):
    """The geometries of a table as a GeoSeries in the image's pixel coordinates (x, y).

    Raises:
        DatasetError: There is no way between the two CRS.
    """
    from pyproj.exceptions import ProjError

    a, b, c, d, e, f = (~image.transform)[:6]
    try:
        outlines = table.geometry.to_crs(image.crs)
    except ProjError as error:
        raise DatasetError(
            f"{source} cannot be brought into the CRS of {image.name}: {error}"
        ) from error
    return outlines.affine_transform([a, b, d, e, c, f])


def cell_names(grid: GeoDataFrame, column: str | None, prefix="patch") -> list[str]:
    """A file name per cell, from an id column or the row number (from 1).

    Raises:
        OptionError: No such column.
        DatasetError: The column named holds an id twice, or none.
    """
    columns = {name.lower(): name for name in grid.columns if name != "geometry"}
    if column is not None and column.lower() not in columns:
        raise rasters.unknown_name("--id_column", column, list(columns))
    for name in [column.lower()] if column else ID_COLUMNS:
        if name not in columns:
            continue
        ids = [_id_text(value) for value in grid[columns[name]]]
        names = Counter(_file_names([text for text in ids if text], prefix))
        twice = [text for text in ids if not text]
        twice += [text for text in names if names[text] > 1]
        twice += [text for text in names if len(os.fsencode(text)) > LONGEST_NAME]
        if not twice:
            break
        if column:
            raise DatasetError(
                f"--id_column {column}: {len(twice)} ids are not unique, empty or too long, as "
                f"{twice[0][:80]!r}; name another column"
            )
    else:
        ids = [str(row) for row in range(1, len(grid) + 1)]
    return _file_names(ids, prefix)


def _file_names(ids: Sequence[str], prefix: str) -> list[str]:
    """Ids as the names of patches; numbers are filled up so that they sort."""
    digits = max([3, *(len(text) for text in ids if text.isdecimal())])
    return [f"{prefix}_{t.zfill(digits) if t.isdecimal() else t}" for t in ids]


def _id_text(value) -> str:
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


def cells_of(scene: SceneFiles, config: CuttingConfig, image: rasterio.DatasetReader):
    """The cells of a scene, and why others cannot be cut.

    Returns:
        cells, {name: reason} of those that cannot be used.

    Raises:
        DatasetError: Not such a file, a cell that is absurdly large, or none over the image.
    """
    import shapely

    if scene.grid is None:
        size, stride = config.patch_size, config.stride or config.patch_size
        cells = regular_cells(image.width, image.height, size, stride, scene.name)
        return cells, {}
    grid = read_vector(scene.grid)
    names = cell_names(grid, config.id_column, scene.name)
    cells, skipped = [], {}
    for name, outline in zip(names, in_pixels(grid, image, scene.grid)):
        outline = polygonal(outline)
        if outline is None:
            skipped[name] = "no polygon"
            continue
        if not np.isfinite(outline.bounds).all():
            skipped[name] = "cannot be expressed in the image's CRS"
            continue
        window = rasters.pixel_bounds(outline.bounds)
        largest = LARGEST_CELL * config.patch_size
        if max(window.width, window.height) > largest:
            raise DatasetError(
                f"{name} of {scene.grid} covers {window.width} x {window.height} pixels, more "
                f"than {LARGEST_CELL} times --patch_size {config.patch_size}; use a finer grid"
            )
        if not window.width or not window.height:
            skipped[name] = "smaller than a pixel"
            continue
        if rasters.window_within(window, image.width, image.height) is None:
            skipped[name] = "outside the image"
            continue
        box = shapely.box(*outline.bounds)
        gap = shapely.hausdorff_distance(outline.boundary, box.boundary)
        cells.append(Cell(name, window, outline if gap > 0.01 else None))
    if not cells:
        raise DatasetError(
            f"No cell of {scene.grid} lies on {image.name} ({_first_reason(skipped)}); check the CRS "
            f"of both: {grid.crs.to_string()} and {image.crs.to_string()}"
        )
    return cells, skipped


def polygonal(outline: Geometry | None) -> Geometry | None:
    """The valid polygons of a geometry as one; None when there are none."""
    import shapely

    if outline is None or not np.isfinite(outline.bounds).all():
        return outline if outline is not None and not outline.is_empty else None
    parts = shapely.get_parts(shapely.make_valid(outline))
    parts = [part for part in shapely.get_parts(parts) if part.area > 0]
    return shapely.union_all(parts) if parts else None


def _first_reason(skipped: dict[str, str]) -> str:
    name, reason = next(iter(skipped.items()))
    return f"{name}: {reason}"


# --- labels ---------------------------------------------------------------------------------

ReadLabel = Callable[[Window], np.ndarray]  # window -> (H, W) values, MISSING if none


@dataclass(frozen=True)
class Label:
    """A label on the image's pixel grid, and how its values become classes."""

    source: str
    read: ReadLabel
    values: list[int] | None  # that are classes, in class order; None: they are already
    names: list[str] | None

    @property
    def unlabelled(self) -> int:
        """What is written where nothing is known: 255, or 65535 past 255 classes."""
        many = self.values is not None and len(self.values) > rasters.UNLABELLED
        return 65535 if many else rasters.UNLABELLED

    def classes(self, window: Window) -> np.ndarray:
        """The classes of a window, (H, W) uint8 (uint16 past 255 classes).

        Raises:
            DatasetError: Values that are no class, or a class without a name among names.
        """
        label = self._numbered(window)
        if self.names:
            highest = label[label != self.unlabelled].max(initial=0)
            if highest >= len(self.names):
                raise DatasetError(
                    f"--class_names names {len(self.names)} classes, but {self.source} holds "
                    f"class {highest}"
                )
        return label

    def _numbered(self, window: Window) -> np.ndarray:
        label = self.read(window)
        dtype = np.uint8 if self.unlabelled == rasters.UNLABELLED else np.uint16
        if self.values is None:
            label[label == MISSING] = self.unlabelled
            if label.min() < 0 or label.max() > self.unlabelled:
                strange = np.unique(label[(label < 0) | (label > self.unlabelled)])
                raise DatasetError(
                    f"{self.source} holds {', '.join(map(str, strange[:8]))}: classes are 0 to "
                    "254, 255 is unlabelled; name the values that are classes with "
                    "--label_values"
                )
            return label.astype(dtype)
        written = np.full(label.shape, self.unlabelled, dtype)
        for number, value in enumerate(self.values):
            written[label == value] = number
        return written


@contextmanager
def open_label(source: str, config: CuttingConfig, image) -> Iterator[Label]:
    """The label of a scene, a raster on any pixel grid or a vector file.

    Raises:
        SegmentationError: It cannot be used.
    """
    suffix = Path(source).suffix.lower()
    names = split_list(config.class_names) or None
    require(
        not config.label_column or suffix not in rasters.SCENE_SUFFIXES,
        "--label_column",
        config.label_column,
        f"a vector label with it, but {source} is a raster",
    )
    if config.label_column or suffix in VECTOR_SUFFIXES:
        yield _vector_label(source, config, image, names)
        return
    with ExitStack() as stack:
        raster = stack.enter_context(rasters.open_raster(source))
        rasters.require_whole(source)
        rasters.require_one_band(raster)
        rasters.require_georeference(raster)
        if not rasters.same_pixel_grid(image, raster):
            _require_overlap(image, raster)
            log.info("%s is warped onto the image's pixels (nearest)", raster.name)
            masked = (
                raster.nodata is not None or ColorInterp.alpha in raster.colorinterp
            )
            options = {} if masked else {"add_alpha": True}
            raster = stack.enter_context(
                WarpedVRT(
                    raster,
                    crs=image.crs,
                    transform=image.transform,
                    width=image.width,
                    height=image.height,
                    resampling=Resampling.nearest,
                    **options,
                )
            )

        def read(window: Window) -> np.ndarray:
            return rasters.read_label(raster, window, MISSING)

        yield Label(source, read, whole_values(config.label_values), names)


def whole_values(text: str | None) -> list[int] | None:
    """``--label_values`` as numbers."""
    try:
        values = [int(item) for item in split_list(text)]
    except ValueError:
        raise OptionError(
            f"--label_values {text}: expected whole numbers for this label"
        ) from None
    fine = len(set(values)) == len(values)
    require(fine, "--label_values", text, "different values")
    return values or None


def _require_overlap(image, label) -> None:
    from rasterio._err import CPLE_BaseError
    from rasterio.errors import CRSError
    from rasterio.warp import transform_bounds

    try:
        theirs = transform_bounds(label.crs, image.crs, *label.bounds)
    except (CRSError, CPLE_BaseError) as error:
        raise DatasetError(
            f"{label.name} cannot be brought into the CRS of {image.name}: {error}"
        ) from error
    # (west, east) and (south, north), whichever way the rows run
    for axis in (0, 1):
        low, high = sorted(theirs[axis::2])
        first, last = sorted(image.bounds[axis::2])
        if low >= last or high <= first:
            raise _no_overlap(label.name, label.crs, image)


def _no_overlap(source: str, crs, image) -> DatasetError:
    return DatasetError(
        f"{source} does not overlap {image.name}; check the CRS of both: {crs.to_string()} and "
        f"{image.crs.to_string()}"
    )


def _vector_label(source: str, config: CuttingConfig, image, names) -> Label:
    """Polygons burnt onto the image's pixels where their centre lies inside; the last wins."""
    import pandas
    from rasterio.features import rasterize

    table = read_vector(source)
    values, fill, codes = None, 0, np.ones(len(table), np.int64)
    if config.label_column:
        if config.label_column not in table.columns:
            columns = [name for name in table.columns if name != "geometry"]
            raise rasters.unknown_name("--label_column", config.label_column, columns)
        column, fill = table[config.label_column], MISSING
        if pandas.api.types.is_numeric_dtype(column):
            values = whole_values(config.label_values)
            known = column.fillna(0).to_numpy()
            if not np.isfinite(known).all() or (known != np.round(known)).any():
                raise DatasetError(
                    f"{source} has fractions or infinities in {config.label_column}; "
                    "classes are whole numbers or texts"
                )
            codes = np.where(column.isna(), MISSING, known).astype(np.int64)
        else:
            texts = [None if pandas.isna(text) else str(text) for text in column]
            order = split_list(config.label_values) or sorted({t for t in texts if t})
            absent = [name for name in order if name not in texts]
            if absent:
                raise rasters.unknown_name(
                    "--label_values", absent[0], sorted({t for t in texts if t})
                )
            numbers = {name: number for number, name in enumerate(order)}
            codes = np.array([numbers.get(text, MISSING) for text in texts])
            values, names = list(range(len(order))), names or order
    elif config.label_values:
        raise OptionError(
            f"--label_values {config.label_values}: expected --label_column with it, since "
            f"{source} is a vector file"
        )
    outlines = in_pixels(table, image, source)
    usable = ~(outlines.isna() | outlines.is_empty)
    outlines, codes = outlines[usable].reset_index(drop=True), codes[usable]
    index = outlines.sindex
    if not len(index.intersection((0, 0, image.width, image.height))):
        raise _no_overlap(source, table.crs, image)
    # GDAL burns 32-bit numbers, so it burns row numbers that stand for the codes
    codes = np.concatenate([[fill], codes])

    def read(window: Window) -> np.ndarray:
        shape = (int(window.height), int(window.width))
        left, top = window.col_off, window.row_off
        hits = sorted(index.intersection((left, top, left + shape[1], top + shape[0])))
        if not len(hits):
            return np.full(shape, fill, np.int64)
        shapes = [(outlines[hit], int(hit) + 1) for hit in hits]
        origin = Affine.translation(left, top)
        return codes[rasterize(shapes, shape, 0, transform=origin, dtype="int32")]

    return Label(source, read, values, names)


# --- patches --------------------------------------------------------------------------------


@dataclass(frozen=True)
class CellPixels:
    """One cell as it was read."""

    cell: Cell
    image: np.ndarray  # (C, H, W)
    valid: np.ndarray  # (H, W) bool
    classes: np.ndarray  # (H, W)
    valid_share: float


@dataclass(frozen=True)
class Patch:
    """One cell, ready to be written."""

    image: np.ndarray  # (C, size, size)
    valid: np.ndarray  # (size, size) bool
    label: np.ndarray  # (size, size)
    transform: Affine


def read_cell(
    cell: Cell, image, bands: Sequence[int], label: Label, config: CuttingConfig
) -> CellPixels | str:
    """Read one cell; its pixels, or the reason why there is no patch of it."""
    pixels, valid = rasters.read_image(image, cell.window, bands)
    inside = cell_mask(cell)
    share = float(valid[inside].mean()) if inside.any() else 0.0
    if share < config.min_valid or not share:
        return f"less than {config.min_valid:.0%} valid" if share else "no valid pixel"
    classes = label.classes(cell.window)
    classes[~(inside & valid)] = label.unlabelled
    if (classes == label.unlabelled).all():
        return "no labelled pixel"
    return CellPixels(cell, pixels, valid, classes, share)


def make_patch(read: CellPixels, profile: Profile, config: CuttingConfig):
    """Bring a cell to ``--patch_size``; the patch, or the reason why there is none."""
    window, size = read.cell.window, config.patch_size
    transform = profile.transform * Affine.translation(window.col_off, window.row_off)
    height, width = read.classes.shape
    if (height, width) == (size, size):
        return Patch(read.image, read.valid, read.classes, transform)
    image, valid = resize_image(
        read.image, read.valid, size, config.interpolation, profile.nodata
    )
    classes = resize_label(read.classes, size)
    if (classes == profile.label_nodata).all():
        return "no labelled pixel after resizing"
    transform *= Affine.scale(width / size, height / size)
    return Patch(image, valid, classes, transform)


def cell_mask(cell: Cell) -> np.ndarray:
    """(H, W) bool: the window's pixels whose centre lies in the cell."""
    from rasterio.features import geometry_mask

    shape = (int(cell.window.height), int(cell.window.width))
    if cell.outline is None:
        return np.ones(shape, bool)
    origin = Affine.translation(cell.window.col_off, cell.window.row_off)
    return geometry_mask([cell.outline], shape, origin, invert=True)


def resize_label(label: np.ndarray, size: int) -> np.ndarray:
    """Labels (H, W) as (size, size): each pixel from the nearest one."""
    import cv2

    return cv2.resize(label, (size, size), interpolation=cv2.INTER_NEAREST_EXACT)


def resize_image(
    image: np.ndarray, valid: np.ndarray, size: int, interpolation: str, nodata=None
):
    """Resize an image without letting invalid pixels bleed into valid ones.

    Args:
        image: (C, H, W), any dtype; it is kept.
        valid: (H, W) bool.
        size: Side of the result in pixels.
        interpolation: A choice of ``--interpolation``.
        nodata: A value that no valid pixel may get; the next one takes its place.

    Returns:
        image (C, size, size), valid (size, size): where valid pixels make up half the weight.
    """
    import cv2

    methods = {
        "nearest": cv2.INTER_NEAREST_EXACT,
        "bilinear": cv2.INTER_LINEAR,
        "cubic": cv2.INTER_CUBIC,
        "area": cv2.INTER_AREA,
    }
    if interpolation == "auto":
        interpolation = "area" if min(valid.shape) >= size else "bilinear"

    def resize(layer):
        return cv2.resize(layer, (size, size), interpolation=methods[interpolation])

    if interpolation == "nearest":
        # by position, since OpenCV does not know every dtype
        places = resize(np.arange(valid.size, dtype=np.float64).reshape(valid.shape))
        rows, columns = np.divmod(places.astype(np.int64), valid.shape[1])
        return image[:, rows, columns], valid[rows, columns]
    exact = np.float32 if image.dtype.itemsize < 4 else np.float64
    weight = resize(valid.astype(exact))
    kept = weight >= 0.5
    resized = np.zeros((len(image), size, size), image.dtype)
    for target, band in zip(resized, image):
        values = resize(np.where(valid, band, 0).astype(exact))[kept] / weight[kept]
        if image.dtype.kind in "iu":
            limits = np.iinfo(image.dtype)
            values = np.clip(np.rint(values), limits.min, limits.max)
        values = values.astype(image.dtype)
        if nodata is not None:
            values[values == nodata] = next_to(nodata)
        target[kept] = values
    return resized, kept


def next_to(value: np.generic) -> np.generic:
    """The next larger number of the same dtype, or the next smaller of the largest."""
    if value.dtype.kind == "f":
        return np.nextafter(value, value.dtype.type(np.inf))
    step = 1 if value < np.iinfo(value.dtype).max else -1
    return value.dtype.type(int(value) + step)


def declared_nodata(image, bands: Sequence[int]):
    """The nodata value that all bands share and that their dtype can hold, or None."""
    values = {repr(image.nodatavals[band - 1]) for band in bands}  # NaN equals NaN
    if len(values) != 1:
        return None
    nodata = image.nodatavals[bands[0] - 1]
    return rasters.as_dtype(nodata, np.result_type(*image.dtypes))


@dataclass(frozen=True)
class Profile:
    """What all patches of a scene have in common."""

    crs: object
    transform: Affine  # of the scene
    nodata: float | None
    descriptions: tuple[str | None, ...]
    colours: tuple
    label_nodata: int
    class_names: list[str] | None

    @classmethod
    def of(cls, image, bands: Sequence[int], label: Label) -> Profile:
        return cls(
            image.crs,
            image.transform,
            declared_nodata(image, bands),
            tuple(image.descriptions[band - 1] for band in bands),
            tuple(_role(image.colorinterp[band - 1]) for band in bands),
            label.unlabelled,
            label.names,
        )

    def write(self, patch: Patch, image_path: Path, label_path: Path) -> None:
        """Write a patch as two GeoTIFFs that any reader opens.

        Invalid pixels become the declared nodata value; without one, an internal mask marks them.
        """
        pixels, masked = patch.image, not patch.valid.all()
        if masked and self.nodata is not None:
            pixels = np.where(patch.valid, pixels, self.nodata)
        with self._create(image_path, patch, pixels.dtype, len(pixels)) as file:
            file.descriptions = self.descriptions
            file.colorinterp = self.colours
            file.write(pixels)
            if masked and self.nodata is None:
                file.write_mask(patch.valid)
        with self._create(label_path, patch, patch.label.dtype, 1, label=True) as file:
            if self.class_names:
                file.update_tags(**rasters.class_name_tags(self.class_names))
            file.write(patch.label, 1)

    def _create(self, path: Path, patch: Patch, dtype, bands: int, label=False):
        height, width = patch.valid.shape
        return rasters.create_tiff(
            path,
            width=width,
            height=height,
            count=bands,
            dtype=dtype,
            crs=self.crs,
            transform=patch.transform,
            nodata=self.label_nodata if label else self.nodata,
            compress="deflate",
            zlevel=1,
            # tifffile alone cannot undo the predictor for floats
            predictor=2 if np.dtype(dtype).kind in "iu" else 1,
            interleave="band",
            blockysize=height,
        )


def _role(colour: ColorInterp) -> ColorInterp:
    """The role of a band in a patch: an alpha band that was selected is data."""
    return ColorInterp.undefined if colour == ColorInterp.alpha else colour


# --- splits ---------------------------------------------------------------------------------


def split_counts(count: int, ratios: Sequence[float]) -> list[int]:
    """Whole numbers that sum to ``count`` and are nearest to the ratios (largest remainder)."""
    exact = [count * ratio for ratio in ratios]
    counts = [math.floor(value + 1e-9) for value in exact]
    by_remainder = sorted(range(len(ratios)), key=lambda i: counts[i] - exact[i])
    for index in by_remainder[: count - sum(counts)]:
        counts[index] += 1
    return counts


def assign_splits(count: int, ratios: Sequence[float], seed: int) -> list[str]:
    """A split for each of ``count`` places, drawn at random with a seed."""
    names = np.repeat(rasters.SPLITS, split_counts(count, ratios))
    return np.random.default_rng(seed).permutation(names).tolist()


def assign_blocks(content: np.ndarray, ratios: Sequence[float], seed: int) -> list[str]:
    """A split for each block, so that patches and every class are shared as the ratios say.

    The sum of the deviations from the ratios, over splits and columns, is lowered by moving and
    swapping blocks until no step helps, from several random beginnings. A class that enough blocks hold
    is to be in every split, whatever that costs.

    Args:
        content: (blocks, 1 + classes): patches, then pixels of each class.
        ratios: Shares of training, validation and test.
        seed: Of the beginnings.
    """
    shares = content / np.maximum(content.sum(axis=0), 1)
    wanted = np.asarray(ratios) / np.sum(ratios)
    used = np.flatnonzero(wanted)
    # patches weigh as much as all classes together
    weights = np.array([max(1, content.shape[1] - 1), *[1] * (content.shape[1] - 1)])
    everywhere = (content > 0).sum(axis=0) >= len(used)

    def cost(sums: np.ndarray) -> float:
        missing = (sums[used] <= 1e-12) & everywhere
        gaps = np.abs(sums - wanted[:, None]) * weights
        return float(gaps.sum() + 10 * missing.sum())

    rng = np.random.default_rng(seed)
    best, lowest = None, math.inf
    for _ in range(max(3, min(20, 10_000 // len(shares)))):
        chosen = rng.choice(len(wanted), len(shares), p=wanted)
        sums = np.stack([shares[chosen == s].sum(axis=0) for s in range(len(wanted))])
        current, before = cost(sums), math.inf
        while current < before - 1e-9:
            before = current
            for block in rng.permutation(len(shares)):
                # move it to another split, or swap it with a block that is there
                other = rng.integers(len(shares))
                steps = [{block: split} for split in used]
                steps.append({block: chosen[other], other: chosen[block]})
                for step in steps:
                    moved = sums.copy()
                    for index, split in step.items():
                        moved[chosen[index]] -= shares[index]
                        moved[split] += shares[index]
                    if (value := cost(moved)) < current - 1e-9:
                        sums, current = moved, value
                        for index, split in step.items():
                            chosen[index] = split
        if current < lowest:
            best, lowest = chosen.copy(), current
    return [rasters.SPLITS[split] for split in best]


def same_places(footprints: GeoSeries, scenes: Sequence[int]) -> np.ndarray:
    """A number per patch; patches of several scenes that show one place have the same.

    Two patches do when, between their two scenes, each has most of its ground in common with the
    other and with none more.

    Args:
        footprints: The ground of each patch.
        scenes: The scene that each comes from.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    count, scenes = len(footprints), np.asarray(scenes)
    pairs = footprints.sindex.query(footprints, predicate="intersects").T
    pairs = pairs[scenes[pairs[:, 0]] != scenes[pairs[:, 1]]]
    shared = rasters.common_ground(footprints, pairs)
    pairs, shared = pairs[shared > 0.5], shared[shared > 0.5]
    # of each patch, the best partner in each other scene
    order = np.argsort(-shared, kind="stable")
    best: dict[tuple[int, int], int] = {}
    for left, right in pairs[order].tolist():
        best.setdefault((left, int(scenes[right])), right)
    links = [
        (left, right)
        for (left, _), right in best.items()
        if best.get((right, int(scenes[left]))) == left
    ]
    left, right = np.array(links, int).reshape(-1, 2).T
    graph = coo_array((np.ones(len(left)), (left, right)), (count, count))
    return connected_components(graph, directed=False)[1]


def share_out(records: Sequence[dict], ground: GeoSeries, config: CuttingConfig):
    """Put patches into splits.

    Args:
        records: Of the patches; "scene" and "class_pixels" are looked at.
        ground: Their footprints, in metres.
        config: How.

    Returns:
        A split per patch, and {index: reason} of the patches that are to be dropped.
    """
    if config.split_by == "random":
        scenes = {record["scene"]: number for number, record in enumerate(records)}
        places = same_places(ground, [scenes[record["scene"]] for record in records])
        drawn = assign_splits(places.max() + 1, config.ratios, config.seed)
        splits = [drawn[place] for place in places]
    else:
        splits = _block_splits(records, ground, config)
    dropped: dict[int, str] = {}
    parts = [rasters.SPLITS.index(split) for split in splits]
    overlapping = rasters.near_pairs(ground, parts, 0)
    if config.split_by == "block":
        dropped |= {int(i): "shares ground with another split" for i, _ in overlapping}
    elif config.buffer == 0:
        touching = rasters.near_pairs(ground, parts, 1e-3 * rasters.side_of(ground))
        if len(touching):
            log.warning(
                "%d of %d patches touch or overlap a patch of another split, so scores will be too "
                "good; --split_by block keeps neighbours together",
                len(np.unique(touching)),
                len(records),
            )
    if config.buffer:
        reason = f"nearer than {config.buffer:g} m to another split"
        dropped |= {
            int(i): reason for i, _ in rasters.near_pairs(ground, parts, config.buffer)
        }
    return splits, dropped


def _block_splits(records, ground: GeoSeries, config: CuttingConfig) -> list[str]:
    """Splits by square blocks; a patch belongs where its centre lies."""
    size = config.block_size or 4 * rasters.side_of(ground)
    numbers = rasters.block_numbers(ground, size)
    classes = max(len(record["class_pixels"]) for record in records)
    content = np.zeros((numbers.max() + 1, 1 + classes))
    for number, record in zip(numbers, records):
        content[number, 0] += 1
        pixels = record["class_pixels"]
        content[number, 1 : 1 + len(pixels)] += pixels
    if len(content) < np.count_nonzero(config.ratios):
        raise DatasetError(
            f"The cells lie in {len(content)} blocks of {size:g} m, too few for the splits; give a "
            "smaller --block_size"
        )
    drawn = assign_blocks(content, config.ratios, config.seed)
    return [drawn[number] for number in numbers]


# --- extraction -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A scene that was looked at before the work, and its cells."""

    scene: SceneFiles
    crs: object
    bands: list[dict]
    cells: list[Cell]
    label_values: list[int] | None
    class_names: list[str] | None
    unlabelled: int


class Journal:
    """What became of each cell, in memory and in a file that an interrupted run is resumed from."""

    def __init__(self, path: Path):
        self.path = path
        self.records: dict[str, dict] = {}
        self.skipped: dict[str, str] = {}
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # the last line may be cut off
        if whole != text:
            path.write_text(whole)
        for entry in map(json.loads, whole.splitlines()):
            if "skipped" not in entry:
                self.records[entry["name"]] = entry
            elif not entry["skipped"].startswith(ERROR):  # errors are tried again
                self.skipped[entry["name"]] = entry["skipped"]
        # a line at a time, so that what is there is whole when the process is killed
        self.file = open(path, "a", buffering=1)  # noqa: SIM115

    def close(self) -> None:
        self.file.close()

    def note(self, name: str, outcome: dict | str) -> None:
        """Keep the record of a patch, or the reason why there is none."""
        if isinstance(outcome, str):
            self.skipped[name] = outcome
            outcome = {"name": name, "skipped": outcome}
        else:
            self.records[name] = outcome
        self.file.write(json.dumps(outcome) + "\n")

    def forget_missing(self, staging: Path) -> None:
        """Drop the records of patches that are not there whole, and patches without a record."""
        for name in list(self.records):
            try:
                for kind in ("images", "labels"):
                    rasters.patch_header(staging / kind / f"{name}.tif")
            except (DatasetError, OSError):
                del self.records[name]
        for kind in ("images", "labels"):
            for patch in (staging / kind).iterdir():
                if patch.stem not in self.records:
                    patch.unlink()


def extract(config: ExtractionConfig | BatchConfig) -> dict:
    """Cut the cells of all scenes and share them among the splits.

    Patches are written aside; the folder ``Patch`` appears when all of them are there.

    Returns:
        What ``--save_metadata`` writes.

    Raises:
        SegmentationError: Anything in the data that cannot be right.
    """
    target = Path(config.output) / "Patch"
    if target.exists() and not target.is_dir():
        raise DatasetError(f"{target} is a file; choose another --output")
    former = former_settings(target) if config.resume else {}
    rasters.require_folder("--output", config.output)
    overwrite = config.overwrite or former.get("overwrite", False)
    if not overwrite and target.is_dir() and any(target.iterdir()):
        raise DatasetError(
            f"{target} already holds patches; choose another --output, or give --overwrite"
        )
    skipped: dict[str, str] = {}
    plans = plan_scenes(config, skipped)
    with staging_folder(target, config) as staging:
        with closing(Journal(staging / "journal.jsonl")) as journal:
            journal.forget_missing(staging)
            for plan in plans:
                cut_scene(plan, config, staging, journal)
        report = assemble(staging, plans, journal, skipped, config)
        publish(staging, target)
    return report


def assemble(
    staging: Path,
    plans: Sequence[Plan],
    journal: Journal,
    skipped: dict[str, str],
    config: ExtractionConfig | BatchConfig,
) -> dict:
    """Share the patches that were cut among the splits, and describe them.

    Returns:
        What ``--save_metadata`` writes.

    Raises:
        DatasetError: There is no patch, or there are too few blocks.
    """
    names = [cell.name for plan in plans for cell in plan.cells]
    skipped |= {n: journal.skipped[n] for n in names if n in journal.skipped}
    found = [(plan, journal.records.get(c.name)) for plan in plans for c in plan.cells]
    found = [(plan, record) for plan, record in found if record]
    if not found:
        raise DatasetError(
            f"None of the {len(names)} cells gives a patch ({_first_reason(skipped)}); look at the "
            f"nodata of {plans[0].scene.image} and of its label, or lower --min_valid"
        )
    size = config.patch_size
    shapes = [rasters.footprint(Affine(*r["transform"]), size, size) for _, r in found]
    ground = rasters.on_the_ground(shapes, [plan.crs for plan, _ in found])
    splits, dropped = share_out([record for _, record in found], ground, config)
    records = []
    for index, ((_, record), split) in enumerate(zip(found, splits)):
        if index in dropped:
            skipped[record["name"]] = dropped[index]
            continue
        records.append(record | {"split": split})
        for kind in ("images", "labels"):
            name = f"{record['name']}.tif"
            (staging / kind / name).rename(staging / split / kind / name)
    if dropped and not any(record["split"] == "train" for record in records):
        raise DatasetError(
            f"No patch is left to train on ({_first_reason(skipped)}); lower --buffer"
        )
    report = describe(config, plans, records, skipped)
    cells = ground.drop(list(dropped)).to_crs(plans[0].crs)
    write_cells(staging / "cells.gpkg", cells, report)
    if config.save_metadata:
        rasters.write_json(staging / "metadata.json", report)
    for kind in ("images", "labels"):
        shutil.rmtree(staging / kind)
    return report


def describe(config, plans: Sequence[Plan], records: list[dict], skipped: dict) -> dict:
    """Where all patches come from, as plain values for JSON."""
    first = plans[0]
    return {
        "version": rasters.VERSION,
        "settings": asdict(config),
        "crs": first.crs.to_string(),
        "bands": first.bands,
        "label_values": first.label_values,
        "class_names": first.class_names,
        "unlabelled": first.unlabelled,
        "scenes": [
            asdict(plan.scene) | {"crs": plan.crs.to_string()} for plan in plans
        ],
        "patches": records,
        "skipped": skipped,
    }


def plan_scenes(config: ExtractionConfig | BatchConfig, skipped: dict) -> list[Plan]:
    """Look at all scenes before the work begins.

    Args:
        config: Their settings.
        skipped: Gets the cells, and with ``--skip_errors`` the scenes, that cannot be used.

    Raises:
        SegmentationError: What ``--skip_errors`` does not let pass.
    """
    from tqdm import tqdm

    plans: list[Plan] = []
    scenes = config.scenes()
    for scene in tqdm(scenes, "looking at scenes", leave=False, disable=None):
        try:
            plan, reasons = plan_scene(scene, config)
            if plans:
                _require_alike(plans[0], plan)
        except (SegmentationError, OSError) as error:
            if (
                not config.skip_errors
                or len(scenes) == 1
                or isinstance(error, OptionError)
            ):
                raise
            skipped[scene.image] = f"{ERROR}{error}"
            continue
        plans.append(plan)
        skipped |= reasons
    if not plans:
        raise DatasetError(f"No scene can be used ({_first_reason(skipped)})")
    names = Counter(cell.name for plan in plans for cell in plan.cells)
    name, count = names.most_common(1)[0]
    if count > 1:
        raise DatasetError(f"Two cells would be called {name}; rename scenes or ids")
    return plans


def plan_scene(scene: SceneFiles, config: CuttingConfig) -> tuple[Plan, dict[str, str]]:
    """Open a scene and its label, find its cells; {name: reason} of those that are of no use."""
    with rasters.open_raster(scene.image) as image:
        rasters.require_whole(scene.image)
        rasters.require_georeference(image)
        bands = rasters.select_bands(image, config.bands)
        if config.image_channels not in (None, len(bands)):
            raise RasterError(
                f"--image_channels {config.image_channels}, but {image.name} gives {len(bands)} "
                "bands; select them with --bands"
            )
        cells, skipped = cells_of(scene, config, image)
        described = [
            {"band": band, "description": image.descriptions[band - 1]}
            for band in bands
        ]
        with open_label(scene.label, config, image) as label:
            return Plan(
                scene, image.crs, described, cells, label.values, label.names, label.unlabelled
            ), skipped  # fmt: skip


def _require_alike(first: Plan, other: Plan) -> None:
    """Raise DatasetError unless two scenes can be in one dataset."""
    if len(first.bands) != len(other.bands):
        raise DatasetError(
            f"{other.scene.image} gives {len(other.bands)} bands, but {first.scene.image} "
            f"{len(first.bands)}; select them with --bands"
        )
    described = [[band["description"] for band in p.bands] for p in (first, other)]
    if described[0] != described[1] and all(described[0] + described[1]):
        raise DatasetError(
            f"The bands of {other.scene.image} are {', '.join(described[1])}, but those of "
            f"{first.scene.image} {', '.join(described[0])}; select them with --bands"
        )
    if first.class_names != other.class_names:
        raise DatasetError(
            f"{other.scene.label} has the classes {', '.join(other.class_names or ['0, 1...'])}, "
            f"but {first.scene.label} {', '.join(first.class_names or ['0, 1...'])}; name them in "
            "order with --label_values"
        )


# settings that may change between an interrupted run and its completion
FREE_SETTINGS = ("resume", "overwrite", "workers", "save_metadata", "skip_errors")
STAGING = ".Patch-partial"  # beside Patch, while a run is under way
ERROR = "error: "  # begins the reasons that --skip_errors lets pass


@contextmanager
def staging_folder(target: Path, config: CuttingConfig) -> Iterator[Path]:
    """A hidden folder beside ``target`` with the folders of a dataset.

    It is removed when the block fails, and stays when it is interrupted, for ``--resume``.
    """
    parent, staging = target.parent, target.with_name(STAGING)
    made = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    locked = "--output", parent, staging
    if staging.exists():
        with rasters.sole_run(*locked):
            if config.overwrite:
                shutil.rmtree(staging)
            else:
                _require_same_run(target, config)
    with rasters.sole_run(*locked):
        yield from _staged(staging, config, made)


def _staged(staging: Path, config: CuttingConfig, made: Sequence[Path]):
    """Make the folders of a dataset in ``staging``, which is locked; see ``staging_folder``."""
    try:
        for kind in ("images", "labels"):
            (staging / kind).mkdir(parents=True, exist_ok=True)
            for split in rasters.SPLITS:
                folder = staging / split / kind
                folder.mkdir(parents=True, exist_ok=True)
                # of a run that was interrupted at its end
                for patch in list(folder.iterdir()):
                    patch.rename(staging / kind / patch.name)
        rasters.drop_unfinished(
            staging / f"{name}.json" for name in ("settings", "metadata")
        )
        if not (staging / "settings.json").exists():
            rasters.write_json(staging / "settings.json", asdict(config))
        yield staging
    except Exception:
        shutil.rmtree(staging, ignore_errors=True)
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        raise
    except BaseException:
        log.warning("what was cut is kept; the command with --resume completes it")
        raise


def former_settings(target: Path) -> dict:
    """The settings of an interrupted run; empty when there is none."""
    stored = target.with_name(STAGING) / "settings.json"
    return json.loads(stored.read_text()) if stored.exists() else {}


def _require_same_run(target: Path, config: CuttingConfig) -> None:
    if not config.resume:
        raise DatasetError(
            f"A run into {target.parent} is under way or was interrupted: --resume completes it, "
            "--overwrite starts anew"
        )
    settings = json.loads(json.dumps(asdict(config)))
    former = former_settings(target) or settings
    for name in former | settings:
        before, now = former.get(name), settings.get(name)
        if name not in FREE_SETTINGS and before != now:
            raise DatasetError(
                f"The interrupted run in {target.parent} had --{name} {before}, not {now}; give "
                "the same, or start anew with --overwrite"
            )


def publish(staging: Path, target: Path) -> None:
    """Flush a finished folder to disk and give it its name; what had the name is removed."""
    former = target.with_name(f"{staging.name}-former")

    def remove_former() -> None:
        if former.is_symlink():
            former.unlink()
        elif former.exists():
            shutil.rmtree(former)

    os.sync()
    if target.exists():
        remove_former()  # an interrupted run had no time to
        target.rename(former)
    for name in ("journal.jsonl", "settings.json"):
        (staging / name).unlink(missing_ok=True)
    staging.rename(target)
    remove_former()


def cut_scene(
    plan: Plan, config: CuttingConfig, staging: Path, journal: Journal
) -> None:
    """Write the patches of a scene to ``staging/{images,labels}``.

    One thread reads the cells, others resize and write them.

    Raises:
        SegmentationError: A cell that cannot be read, unless ``--skip_errors``.
    """
    from tqdm import tqdm

    done = journal.records.keys() | journal.skipped.keys()
    cells = [cell for cell in plan.cells if cell.name not in done]
    if not cells:
        return
    with ExitStack() as stack:
        image = stack.enter_context(rasters.open_raster(plan.scene.image))
        label = stack.enter_context(open_label(plan.scene.label, config, image))
        bands = [entry["band"] for entry in plan.bands]
        profile = Profile.of(image, bands, label)
        title = Path(plan.scene.image).name
        bar = stack.enter_context(
            tqdm(total=len(cells), desc=title, unit="cell", leave=False, disable=None)
        )
        pool = stack.enter_context(ThreadPoolExecutor(config.threads))
        waiting: deque[tuple[str, Future]] = deque()

        def settle(most: int) -> None:
            """Wait until at most so many cells are in flight."""
            while len(waiting) > most:
                name, future = waiting.popleft()
                outcome = future.result()
                if isinstance(outcome, dict):
                    outcome["scene"] = plan.scene.image
                journal.note(name, outcome)
                bar.update()

        for cell in reading_order(cells, image, bands):
            try:
                read = read_cell(cell, image, bands, label, config)
            except (RasterError, DatasetError) as error:
                if not config.skip_errors:
                    raise
                read = f"{ERROR}{error}"
            if isinstance(read, str):
                journal.note(cell.name, read)
                bar.update()
                continue
            future = pool.submit(write_cell, read, profile, config, staging)
            waiting.append((cell.name, future))
            settle(2 * config.threads)
        settle(0)


def reading_order(cells: Sequence[Cell], image, bands: Sequence[int]) -> list[Cell]:
    """Cells in an order in which GDAL's block cache serves neighbours: each block decoded once.

    From top to bottom, in columns that are so wide that the blocks under two rows of cells fit into
    half of the cache.
    """
    block = image.block_shapes[0][0]
    rows = block + max(block, *(int(cell.window.height) for cell in cells))
    pixel = len(bands) * rasters.validity(image, bands).dtype.itemsize
    width = max(1, rasters.GDAL_OPTIONS["GDAL_CACHEMAX"] // 2 // (pixel * rows))

    def place(cell: Cell) -> tuple[int, int, int]:
        window = cell.window
        return window.col_off // width, window.row_off, window.col_off

    return sorted(cells, key=place)


def write_cell(
    read: CellPixels, profile: Profile, config: CuttingConfig, staging: Path
):
    """Write the patch of a cell; its record, or the reason why there is none."""
    patch = make_patch(read, profile, config)
    if isinstance(patch, str):
        return patch
    name = read.cell.name
    paths = (staging / kind / f"{name}.tif" for kind in ("images", "labels"))
    with rasterio.Env(GDAL_NUM_THREADS=1, GDAL_TIFF_INTERNAL_MASK=True):
        profile.write(patch, *paths)
    counts = np.bincount(patch.label[patch.label != profile.label_nodata])
    window = read.cell.window
    return {
        "name": name,
        "window": [
            int(v)
            for v in (window.col_off, window.row_off, window.width, window.height)
        ],
        "transform": list(patch.transform[:6]),
        "valid_share": round(read.valid_share, 4),
        "class_pixels": counts.tolist(),
    }


def write_cells(path: Path, cells: GeoSeries, report: dict) -> None:
    """The cells that became patches as a GeoPackage: split, valid share, class shares."""
    import geopandas

    records = report["patches"]
    classes = max(len(record["class_pixels"]) for record in records)
    names = report["class_names"] or [""] * classes
    columns = {
        key: [r[key] for r in records]
        for key in ("name", "scene", "split", "valid_share")
    }
    pixels = np.zeros((len(records), len(names)))
    for row, record in zip(pixels, records):
        row[: len(record["class_pixels"])] = record["class_pixels"]
    shares = pixels / pixels.sum(axis=1, keepdims=True)
    # the number keeps names apart that differ in case only
    columns |= {f"share {k} {n}".strip(): shares[:, k] for k, n in enumerate(names)}
    table = geopandas.GeoDataFrame(columns, geometry=cells.to_numpy(), crs=cells.crs)
    table.to_file(path, driver="GPKG", layer="cells")


# --- reports --------------------------------------------------------------------------------


@dataclass(frozen=True)
class SplitSummary:
    """One split of a dataset in numbers."""

    patches: int = 0
    pixels: int = 0  # of all labels
    class_pixels: tuple[int, ...] = ()  # labelled, by class

    def __add__(self, other: SplitSummary) -> SplitSummary:
        size = max(len(self.class_pixels), len(other.class_pixels))
        padded = [
            np.pad(s.class_pixels, (0, size - len(s.class_pixels))).astype(int)
            for s in (self, other)
        ]
        return SplitSummary(
            self.patches + other.patches,
            self.pixels + other.pixels,
            tuple(sum(padded).tolist()),
        )

    @property
    def unlabelled_share(self) -> float:
        return 1 - sum(self.class_pixels) / self.pixels if self.pixels else 0.0

    def class_share(self, number: int) -> float:
        """The share of a class among labelled pixels."""
        counts = self.class_pixels
        return counts[number] / sum(counts) if number < len(counts) else 0.0


def split_table(summaries: dict[str, SplitSummary], names: Sequence[str] | None) -> str:
    """Splits as columns, class shares as rows."""
    classes = max(len(s.class_pixels) for s in summaries.values())
    names = names or [f"class {number}" for number in range(classes)]
    width = max([12, *(len(name) + 2 for name in names)])
    rows = [
        ("", list(summaries)),
        ("patches", [f"{s.patches:,}" for s in summaries.values()]),
        *(
            (name, [f"{s.class_share(number):.1%}" for s in summaries.values()])
            for number, name in enumerate(names)
        ),
        ("unlabelled", [f"{s.unlabelled_share:.1%}" for s in summaries.values()]),
    ]
    return "\n".join(
        f"{name:{width}}" + "".join(f"{value:>12}" for value in values)
        for name, values in rows
    )


def report_extraction(report: dict, config: CuttingConfig) -> None:
    """Tell what was written and what was not, in words and numbers."""
    summaries = dict.fromkeys(rasters.SPLITS, SplitSummary())
    for record in report["patches"]:
        summaries[record["split"]] += SplitSummary(
            1, config.patch_size**2, tuple(record["class_pixels"])
        )
    skipped = report["skipped"]
    if skipped:
        total = len(skipped) + len(report["patches"])
        log.warning("skipped %d of %d cells:", len(skipped), total)
        by_reason: dict[str, list[str]] = {}
        for name, reason in skipped.items():
            by_reason.setdefault(reason, []).append(name)
        for reason, names in by_reason.items():
            more = ", ... (--save_metadata stores all)" if len(names) > 12 else ""
            log.warning("  %s: %s%s", reason, ", ".join(names[:12]), more)
    for split, ratio in zip(rasters.SPLITS, config.ratios):
        if ratio and not summaries[split].patches:
            log.warning("the %s split got no patch: there are too few", split)
    labelled = sum(summaries.values(), SplitSummary())
    if np.count_nonzero(labelled.class_pixels) == 1:
        log.warning(
            "all labelled pixels are class %d, and nothing can be learnt from one class; 255 "
            "means unlabelled: if it is a class in your label, use --label_values 0,255",
            int(np.flatnonzero(labelled.class_pixels)[0]),
        )
    print(split_table(summaries, report["class_names"]))
    print(f"\nPatches: {Path(config.output) / 'Patch'}")


def dataset_info(config: InfoConfig) -> tuple[dict, list[Place]]:
    """Patches, sizes, bands, dtypes and class shares of a dataset, by split; and where they lie.

    Raises:
        DatasetError: Not a dataset, or a file that cannot be read.
    """
    from tqdm import tqdm

    report = {"dataset_root": config.output, "class_names": None, "splits": {}}
    places: list[Place] = []
    for split in rasters.SPLITS:
        pairs = rasters.list_pairs(config.output, split, required=split == "train")
        summary, kinds = SplitSummary(), Counter()
        for pair in tqdm(pairs, desc=split, unit="patch", leave=False, disable=None):
            kinds[rasters.patch_header(pair.image)] += 1
            with rasters.open_raster(pair.image) as file:
                shape = rasters.footprint(file.transform, file.height, file.width)
                places.append(Place(split, pair.name, shape, file.crs))
            with rasters.open_raster(pair.label) as file:
                rasters.require_one_band(file)
                label = read_classes(file)
                report["class_names"] = report["class_names"] or rasters.class_names_of(
                    file
                )
            known = label[label >= 0]
            summary += SplitSummary(1, label.size, tuple(np.bincount(known).tolist()))
        report["splits"][split] = {
            **asdict(summary),
            "unlabelled_share": summary.unlabelled_share,
            "kinds": [
                asdict(kind) | {"patches": count} for kind, count in kinds.most_common()
            ],
        }
    report["overlaps"] = split_overlaps(places)
    return report, places


class Place(NamedTuple):
    """Where a patch lies."""

    split: str
    name: str
    footprint: Geometry
    crs: object


def split_overlaps(places: Sequence[Place]) -> list[dict] | None:
    """Patches of different splits that share ground: what a test then measures is memory.

    Returns:
        An entry per pair of splits with "splits", "patches" (of the second that share ground with
        the first) and "examples"; None where a patch has no CRS.
    """
    if any(place.crs is None for place in places):
        return None
    splits, names, shapes, systems = zip(*places)
    parts = [rasters.SPLITS.index(split) for split in splits]
    ground = rasters.on_the_ground(shapes, systems)
    pairs = rasters.near_pairs(ground, parts, 0)
    found: dict[tuple[str, str], list] = {}
    for first, second in pairs:
        found.setdefault((splits[first], splits[second]), []).append((first, second))
    return [
        {
            "splits": list(key),
            "patches": len({second for _, second in hits}),
            "examples": [f"{names[b]} and {names[a]}" for a, b in hits[:5]],
        }
        for key, hits in found.items()
    ]


def draw_splits(places: Sequence[Place], target: Path) -> None:
    """Draw the patches of a dataset where they lie, coloured by split."""
    from matplotlib.collections import PolyCollection
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch as Key

    ground = rasters.on_the_ground(
        [p.footprint for p in places], [p.crs for p in places]
    )
    figure = Figure(figsize=(7, 7.5), layout="constrained")
    axes = figure.add_subplot()
    keys = []
    for split, colour in zip(rasters.SPLITS, ("#9db8d2", "#f0a030", "#c8283c")):
        corners = [
            np.array(shape.exterior.coords)
            for shape, place in zip(ground, places)
            if place.split == split
        ]
        style = {"facecolor": colour, "edgecolor": "white"}
        axes.add_collection(PolyCollection(corners, linewidth=0.4, **style))
        keys.append(Key(label=f"{split} ({len(corners):,})", **style))
    axes.autoscale_view()
    axes.set_aspect("equal")
    axes.ticklabel_format(useOffset=False, style="plain")
    axes.tick_params(labelsize=8)
    axes.set(xlabel="metres", ylabel="metres")
    figure.legend(handles=keys, loc="outside upper center", ncols=3, frameon=False)
    rasters.save_figure(figure, target)


def read_classes(label: rasterio.DatasetReader) -> np.ndarray:
    """The classes of a label patch (H, W) int64, negative where unlabelled."""
    window = Window(0, 0, label.width, label.height)
    classes = rasters.read_label(label, window, MISSING)
    if label.dtypes[0] == "uint8":  # wider ones may have a class of that number
        classes[classes == rasters.UNLABELLED] = MISSING
    return classes


def print_info(report: dict) -> None:
    """The dataset report as text."""
    summaries = {}
    for split, entry in report["splits"].items():
        summaries[split] = SplitSummary(
            entry["patches"], entry["pixels"], tuple(entry["class_pixels"])
        )
        for kind in entry["kinds"]:
            print(
                f"{split:12}{kind['patches']:>6} patches of {kind['height']} x {kind['width']} "
                f"pixels, {kind['bands']} bands, {kind['dtype']}"
            )
    print("\n" + split_table(summaries, report["class_names"]) + "\n")
    if report["overlaps"] is None:
        print("overlap between splits: unknown, since not all patches have a CRS")
    for entry in report["overlaps"] or []:
        first, second = entry["splits"]
        print(
            f"LEAK: {entry['patches']} patches of {second} share ground with {first}, as "
            f"{entry['examples'][0]}"
        )
    if report["overlaps"] == []:
        print("no ground is shared between splits")


def draw_sample(config: SampleConfig) -> Path:
    """Draw one patch: image, label with legend, and both together.

    Returns:
        The PNG that was written.

    Raises:
        OptionError: No such patch.
    """
    pairs = rasters.list_pairs(config.output, config.split)
    index = config.sample_index
    require(
        0 <= index < len(pairs),
        "--sample_index",
        index,
        f"0 to {len(pairs) - 1}, since {config.split} has {len(pairs)} patches",
    )
    pair = pairs[index]
    image, valid, _ = rasters.read_patch(pair, MISSING)
    with rasters.open_raster(pair.image) as file:
        bands = [band - 1 for band in rasters.image_bands(file)]
        shown = rasters.rgb_bands(
            [file.descriptions[band] for band in bands],
            [file.colorinterp[band] for band in bands],
        )
    with rasters.open_raster(pair.label) as file:
        names = rasters.class_names_of(file)
        mask = np.where(valid, read_classes(file), MISSING)
    present = np.unique(mask[mask >= 0])
    count = len(names) if names else max(2, int(present.max(initial=0)) + 1)
    names = names or [f"class {number}" for number in range(count)]
    picture = rasters.stretch(image[[band - 1 for band in shown]], valid)
    label = rasters.colour_map(mask, count)
    overlay = np.where(
        (mask >= 0)[..., None],
        (0.55 * picture + 0.45 * label).astype(np.uint8),
        picture,
    )
    colours = rasters.class_colours(count)
    target = Path(config.output) / f"sample_{config.split}_{pair.name}.png"
    panels = [
        {"title": f"image (bands {', '.join(map(str, shown))})", "picture": picture},
        {"title": "label", "picture": label},
        {"title": "overlay", "picture": overlay},
    ]
    legend = [(names[number], colours[number]) for number in present if number < count]
    title = f"{config.split} {index}: {pair.name}"
    rasters.save_figure(rasters.draw_panels(panels, legend, title), target)
    return target


def open_window(picture: Path) -> None:
    """Show a PNG in a window and wait until it is closed.

    Raises:
        SegmentationError: There is no display.
    """
    import matplotlib.pyplot as plt
    from matplotlib.backends import BackendFilter, backend_registry

    interactive = backend_registry.list_builtin(BackendFilter.INTERACTIVE)
    if plt.get_backend().lower() not in [name.lower() for name in interactive]:
        raise SegmentationError(f"No display for --show; look at {picture} instead")
    pixels = plt.imread(picture)
    figure = plt.figure(figsize=(pixels.shape[1] / 100, pixels.shape[0] / 100))
    figure.figimage(pixels)
    plt.show()


# --- command line ---------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="Patch_extraction.py",
        description=__doc__.split("\n")[0],
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, config_class, run, text in (
        ("extract", ExtractionConfig, run_extract, "cut a scene into patches"),
        ("batch", BatchConfig, run_extract, "cut all scenes of a folder into patches"),
        ("visualize", SampleConfig, run_visualize, "draw a patch as a PNG"),
        ("info", InfoConfig, run_info, "report what a dataset holds"),
    ):
        command = commands.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False
        )  # fmt: skip
        rasters.add_settings(command, config_class)
        command.add_argument_group("about").add_argument(
            "--debug", action="store_true", help="show the traceback of any error"
        )
        command.set_defaults(run=run, config_class=config_class, parser=command)
    return parser


def run_extract(config: ExtractionConfig | BatchConfig) -> int:
    report = extract(config)
    report_extraction(report, config)
    return any(reason.startswith(ERROR) for reason in report["skipped"].values())


def run_visualize(config: SampleConfig) -> int:
    picture = draw_sample(config)
    print(picture)
    if config.show:
        open_window(picture)
    return 0


def run_info(config: InfoConfig) -> int:
    report, places = dataset_info(config)
    folder = Path(config.output)
    rasters.write_json(folder / "dataset_info.json", report)
    print_info(report)
    if report["overlaps"] is not None:
        draw_splits(places, folder / "dataset_splits.png")
        print(f"Picture: {folder / 'dataset_splits.png'}")
    print(f"Report: {folder / 'dataset_info.json'}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 could not be done, 2 wrong command line, 130 interrupted."""
    arguments = build_parser().parse_args(argv)
    rasters.show_messages()
    try:
        config = rasters.settings_from(arguments.config_class, arguments)
        with rasters.ending_as_ctrl_c(), rasterio.Env(**rasters.GDAL_OPTIONS):
            return int(arguments.run(config))
    except OptionError as error:
        if arguments.debug:
            raise
        arguments.parser.error(str(error))
    except (SegmentationError, OSError, MemoryError) as error:
        if arguments.debug:
            raise
        print(
            f"error: {rasters.explain(error, '--patch_size or --workers')}",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
