"""Cut a scene and its label into patches along the cells of a grid.

    python Patch_extraction.py extract --image scene.tif --label label.tif --grid grid.shp \\
        --output data --patch_size 224
    python Patch_extraction.py visualize --output data --split train --sample_index 0
    python Patch_extraction.py info --output data

``extract`` leaves ``data/Patch/{train,validation,test}/{images,labels}``, which main.py trains on.
A patch covers its cell's bounding box in the image's pixels; label pixels outside the cell itself
(a rotated or many-sided one) are unlabelled, so that neighbouring cells share no label.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

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
    from geopandas import GeoDataFrame
    from shapely import Geometry

log = logging.getLogger("semanticseg4eo")

MISSING = -(
    2**31
)  # a label pixel of which nothing is known, before classes are numbered
VECTOR_SUFFIXES = (
    ".shp", ".gpkg", ".geojson", ".json", ".fgb", ".kml", ".gml", ".parquet", ".zip",
)  # fmt: skip
ID_COLUMNS = ("id", "fid", "cell_id", "cellid", "grid_id", "gridid", "patch_id", "name")
LARGEST_CELL = 16  # times the patch size, per side


# --- settings -------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExtractionConfig:
    """Every setting of ``extract``."""

    image: str = setting(help="scene, anything that GDAL reads", group="data")
    label: str = setting(
        help="label raster on any pixel grid, or vector file of polygons", group="data"
    )
    grid: str = setting(
        help="vector file whose polygons are the cells, in any CRS", group="data"
    )
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
    seed: int = setting(42, "seed of the split", "split", alias="--random_seed")
    save_metadata: bool = setting(
        False, "write Patch/metadata.json: where each patch comes from", "output"
    )
    overwrite: bool = setting(False, "replace the patches of an earlier run", "output")

    def __post_init__(self):
        require(self.patch_size >= 8, "--patch_size", self.patch_size, "at least 8")
        require(0 <= self.min_valid <= 1, "--min_valid", self.min_valid, "0 to 1")
        require(0 <= self.seed < 2**32, "--seed", self.seed, "0 to 2^32 - 1")
        ratios = dict(zip(("train", "val", "test"), self.ratios))
        for name, ratio in ratios.items():
            require(0 <= ratio <= 1, f"--{name}_ratio", ratio, "0 to 1")
        require(self.train_ratio > 0, "--train_ratio", self.train_ratio, "more than 0")
        total = sum(self.ratios)
        require(
            abs(total - 1) < 1e-6, "the three ratios", f"sum to {total:g}", "a sum of 1"
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
            f"{path} cannot be read as a vector file: {rasters.reason(error)}"
        ) from error
    if not isinstance(table, geopandas.GeoDataFrame) or table.geometry.isna().all():
        raise DatasetError(f"{path} has no geometries")
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


def cell_names(grid: GeoDataFrame, column: str | None) -> list[str]:
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
        names = Counter(_file_names(ids))
        twice = [text for text in ids if not text]
        twice += [text for text in names if names[text] > 1]
        if not twice:
            break
        if column:
            raise DatasetError(
                f"--id_column {column}: {len(twice)} ids are not unique or empty, as "
                f"{twice[0]!r}; name another column"
            )
    else:
        ids = [str(row) for row in range(1, len(grid) + 1)]
    return _file_names(ids)


def _file_names(ids: Sequence[str]) -> list[str]:
    """Ids as the names of patches; numbers are filled up so that they sort."""
    digits = max([3, *(len(text) for text in ids if text.isdecimal())])
    return [f"patch_{t.zfill(digits) if t.isdecimal() else t}" for t in ids]


def _id_text(value) -> str:
    """An id as part of a file name; separators and the like become underscores."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return re.sub(r"[^\w.-]+", "_", str(value)).strip("._")


def read_grid(config: ExtractionConfig, image: rasterio.DatasetReader):
    """The cells of ``--grid``, and why others cannot be cut.

    Returns:
        cells, {name: reason} of those that cannot be used.

    Raises:
        DatasetError: Not such a file, a cell that is absurdly large, or none over the image.
    """
    import shapely

    grid = read_vector(config.grid)
    names = cell_names(grid, config.id_column)
    cells, skipped = [], {}
    for name, outline in zip(names, in_pixels(grid, image, config.grid)):
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
                f"{name} of {config.grid} covers {window.width} x {window.height} pixels, more "
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
            f"No cell of {config.grid} lies on {image.name} ({_first_reason(skipped)}); check the CRS "
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
            label = np.where(label == MISSING, self.unlabelled, label)
            strange = np.unique(label[(label < 0) | (label > self.unlabelled)])
            if strange.size:
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
def open_label(config: ExtractionConfig, image) -> Iterator[Label]:
    """The label of a scene, a raster on any pixel grid or a vector file.

    Raises:
        SegmentationError: It cannot be used.
    """
    suffix = Path(config.label).suffix.lower()
    names = split_list(config.class_names) or None
    if config.label_column or suffix in VECTOR_SUFFIXES:
        yield _vector_label(config, image, names)
        return
    with ExitStack() as stack:
        raster = stack.enter_context(rasters.open_raster(config.label))
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

        yield Label(config.label, read, whole_values(config.label_values), names)


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
            raise DatasetError(f"{label.name} does not overlap {image.name}")


def _vector_label(config: ExtractionConfig, image, names: list[str] | None) -> Label:
    """Polygons burnt onto the image's pixels where their centre lies inside; the last wins."""
    import pandas
    from rasterio.features import rasterize

    table = read_vector(config.label)
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
                    f"{config.label} has fractions or infinities in {config.label_column}; "
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
            f"{config.label} is a vector file"
        )
    outlines = in_pixels(table, image, config.label)
    usable = ~(outlines.isna() | outlines.is_empty)
    outlines, codes = outlines[usable].reset_index(drop=True), codes[usable]
    index = outlines.sindex
    if not len(index.intersection((0, 0, image.width, image.height))):
        raise DatasetError(f"{config.label} does not overlap {image.name}")
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

    return Label(config.label, read, values, names)


# --- patches --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Patch:
    """Pixels of one cell, ready to be written."""

    image: np.ndarray  # (C, H, W)
    valid: np.ndarray  # (H, W) bool
    label: np.ndarray  # (H, W)
    transform: Affine
    valid_share: float


def cut_cell(
    cell: Cell, image, bands: Sequence[int], label: Label, config: ExtractionConfig
) -> Patch | str:
    """Read one cell; a patch of ``--patch_size``, or the reason why there is none."""
    height, width = int(cell.window.height), int(cell.window.width)
    pixels, valid = rasters.read_image(image, cell.window, bands)
    inside = cell_mask(cell)
    share = float(valid[inside].mean()) if inside.any() else 0.0
    if share < config.min_valid or not share:
        return f"less than {config.min_valid:.0%} valid" if share else "no valid pixel"
    classes = label.classes(cell.window)
    classes[~(inside & valid)] = label.unlabelled
    if (classes == label.unlabelled).all():
        return "no labelled pixel"
    size = config.patch_size
    transform = image.transform * Affine.translation(
        cell.window.col_off, cell.window.row_off
    )
    if (height, width) != (size, size):
        nodata = declared_nodata(image, bands)
        pixels, valid = resize_image(pixels, valid, size, config.interpolation, nodata)
        classes = resize_label(classes, size)
        if (classes == label.unlabelled).all():
            return "no labelled pixel after resizing"
        transform *= Affine.scale(width / size, height / size)
    return Patch(pixels, valid, classes, transform, share)


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
    nodata: float | None
    descriptions: tuple[str | None, ...]
    colours: tuple
    label_nodata: int
    class_names: list[str] | None

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
    """A split for each of ``count`` patches, drawn at random with a seed."""
    names = np.repeat(rasters.SPLITS, split_counts(count, ratios))
    return np.random.default_rng(seed).permutation(names).tolist()


# --- extraction -----------------------------------------------------------------------------


def extract(config: ExtractionConfig) -> dict:
    """Cut all cells of a grid and share them among the splits.

    Patches are written aside; the folder ``Patch`` appears when all of them are there.

    Returns:
        What ``--save_metadata`` writes.

    Raises:
        SegmentationError: Anything in the data that cannot be right.
    """
    target = Path(config.output) / "Patch"
    if target.exists() and not target.is_dir():
        raise DatasetError(f"{target} is a file; choose another --output")
    if not config.overwrite and target.is_dir() and any(target.iterdir()):
        raise DatasetError(
            f"{target} already holds patches; choose another --output, or give --overwrite"
        )
    with ExitStack() as stack:
        image = stack.enter_context(rasters.open_raster(config.image))
        rasters.require_georeference(image)
        bands = rasters.select_bands(image, config.bands)
        if config.image_channels not in (None, len(bands)):
            raise RasterError(
                f"--image_channels {config.image_channels}, but {image.name} gives {len(bands)} "
                "bands; select them with --bands"
            )
        label = stack.enter_context(open_label(config, image))
        cells, skipped = read_grid(config, image)
        staging = stack.enter_context(staging_folder(target))
        records, reasons = cut_cells(cells, image, bands, label, config, staging)
        skipped |= reasons
        if not records:
            raise DatasetError(
                f"None of the {len(cells)} cells of {config.grid} gives a patch "
                f"({_first_reason(skipped)})"
            )
        splits = assign_splits(len(records), config.ratios, config.seed)
        for record, split in zip(records, splits):
            record["split"] = split
            for kind in ("images", "labels"):
                name = f"{record['name']}.tif"
                (staging / kind / name).rename(staging / split / kind / name)
        report = {
            "version": rasters.VERSION,
            "settings": asdict(config),
            "crs": image.crs.to_string(),
            "bands": [
                {"band": band, "description": image.descriptions[band - 1]}
                for band in bands
            ],
            "label_values": label.values,
            "class_names": label.names,
            "unlabelled": label.unlabelled,
            "patches": records,
            "skipped": skipped,
        }
        for kind in ("images", "labels"):
            (staging / kind).rmdir()
        if config.save_metadata:
            rasters.write_json(staging / "metadata.json", report)
        publish(staging, target)
    return report


@contextmanager
def staging_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside ``target`` with the folders of a dataset, gone in the end."""
    parent = target.parent
    made = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".Patch-", dir=target.parent))
    try:
        staging.chmod(0o777 & ~rasters.umask())
        for kind in ("images", "labels"):
            (staging / kind).mkdir()
            for split in rasters.SPLITS:
                (staging / split / kind).mkdir(parents=True)
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        for folder in made:
            if not any(folder.iterdir()):
                folder.rmdir()


def publish(staging: Path, target: Path) -> None:
    """Flush a finished folder to disk and give it its name; what had the name is removed."""
    os.sync()
    if not target.exists():
        staging.rename(target)
        return
    former = target.with_name(f"{staging.name}-former")
    target.rename(former)
    staging.rename(target)
    if former.is_symlink():
        former.unlink()
    else:
        shutil.rmtree(former)


def cut_cells(cells, image, bands, label, config, staging: Path):
    """Write the patches of all cells to ``staging/{images,labels}``.

    Cells are read in the order of the image's rows, so that a decoded block serves its neighbours.

    Returns:
        A record per patch in the order of the grid, {name: reason} of the cells without one.
    """
    from tqdm import tqdm

    profile = Profile(
        image.crs,
        declared_nodata(image, bands),
        tuple(image.descriptions[band - 1] for band in bands),
        tuple(_role(image.colorinterp[band - 1]) for band in bands),
        label.unlabelled,
        label.names,
    )
    order = sorted(
        range(len(cells)),
        key=lambda i: (cells[i].window.row_off, cells[i].window.col_off),
    )
    records, skipped = {}, {}
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        for index in tqdm(
            order, desc="cutting cells", unit="cell", leave=False, disable=None
        ):
            cell = cells[index]
            patch = cut_cell(cell, image, bands, label, config)
            if isinstance(patch, str):
                skipped[cell.name] = patch
                continue
            name = f"{cell.name}.tif"
            profile.write(patch, staging / "images" / name, staging / "labels" / name)
            counts = np.bincount(patch.label[patch.label != label.unlabelled])
            window = cell.window
            records[index] = {
                "name": cell.name,
                "window": [
                    int(v)
                    for v in (
                        window.col_off,
                        window.row_off,
                        window.width,
                        window.height,
                    )
                ],
                "transform": list(patch.transform[:6]),
                "valid_share": round(patch.valid_share, 4),
                "class_pixels": counts.tolist(),
            }
    return [records[index] for index in sorted(records)], skipped


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


def report_extraction(report: dict, config: ExtractionConfig) -> None:
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
        for reason, count in Counter(skipped.values()).most_common():
            of_these = [name for name, why in skipped.items() if why == reason]
            more = ", ... (--save_metadata stores all)" if count > 12 else ""
            log.warning("  %s: %s%s", reason, ", ".join(of_these[:12]), more)
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


def dataset_info(config: InfoConfig) -> dict:
    """Patches, sizes, bands, dtypes and class shares of a dataset, by split.

    Raises:
        DatasetError: Not a dataset, or a file that cannot be read.
    """
    from tqdm import tqdm

    report = {"dataset_root": config.output, "class_names": None, "splits": {}}
    for split in rasters.SPLITS:
        pairs = rasters.list_pairs(config.output, split, required=split == "train")
        summary, kinds = SplitSummary(), Counter()
        for pair in tqdm(pairs, desc=split, unit="patch", leave=False, disable=None):
            kinds[rasters.patch_header(pair.image)] += 1
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
    return report


def read_classes(label: rasterio.DatasetReader) -> np.ndarray:
    """The classes of a label patch (H, W) int64, negative where unlabelled."""
    window = Window(0, 0, label.width, label.height)
    classes = rasters.read_label(label, window, MISSING)
    if label.dtypes[0] == "uint8":  # wider ones may have a class of that number
        classes[classes == rasters.UNLABELLED] = MISSING
    return classes


def print_info(report: dict, stored: Path) -> None:
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
    print("\n" + split_table(summaries, report["class_names"]))
    print(f"\nReport: {stored}")


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


def run_extract(config: ExtractionConfig) -> None:
    report_extraction(extract(config), config)


def run_visualize(config: SampleConfig) -> None:
    picture = draw_sample(config)
    print(picture)
    if config.show:
        open_window(picture)


def run_info(config: InfoConfig) -> None:
    report = dataset_info(config)
    stored = Path(config.output) / "dataset_info.json"
    rasters.write_json(stored, report)
    print_info(report, stored)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 could not be done, 2 wrong command line, 130 interrupted."""
    arguments = build_parser().parse_args(argv)
    rasters.show_messages()
    try:
        config = rasters.settings_from(arguments.config_class, arguments)
        with rasterio.Env(**rasters.GDAL_OPTIONS):
            arguments.run(config)
    except OptionError as error:
        if arguments.debug:
            raise
        arguments.parser.error(str(error))
    except (SegmentationError, OSError) as error:
        if arguments.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
