"""Rasters: opening, bands, valid pixels.

Images are (C, H, W) as rasterio reads them, masks and validity (H, W); bands count from 1; a window
is a ``rasterio.windows.Window`` in pixels (col_off, row_off, width, height).
"""

from __future__ import annotations

import logging
import math
import os
import re
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import rasterio
from rasterio.enums import MaskFlags
from rasterio.windows import Window

from common.alpha import alpha_bands, flagged_bands
from common.errors import RasterError, gdal_message
from common.machine import available_cores, fits_in_memory
from common.mask_options import Mask
from common.masks import open_mask
from common.nodata import nodata_pixels
from common.tiffs import TIFF_SUFFIXES
from common.windows import window_within

log = logging.getLogger("semanticseg4eo")

# by suffix: a file of another format is refused
DRIVERS = {
    **dict.fromkeys(TIFF_SUFFIXES, ("GTiff",)),
    ".vrt": ("VRT",),
    ".jp2": ("JP2OpenJPEG", "JP2KAK", "JP2ECW", "JP2MrSID"),
    ".img": ("HFA", "ENVI"),
}
SCENE_SUFFIXES = tuple(DRIVERS)
PICTURES = {".png": ("PNG",), ".jpg": ("JPEG",), ".jpeg": ("JPEG",)}
# bytes of GDAL's block cache, which else is 5 % of the machine's memory
GDAL_CACHE = 256 * 2**20


def gdal_options(cache: int = GDAL_CACHE) -> dict[str, int]:
    """What GDAL is told for a run: bytes of its block cache, threads that decode and encode."""
    return {"GDAL_CACHEMAX": cache, "GDAL_NUM_THREADS": available_cores()}


def open_raster(path: str | Path) -> rasterio.DatasetReader:
    """Open anything that GDAL reads, unless its format is not that of its suffix.

    Raises:
        RasterError: The file is missing, unreadable, of another format than its suffix, holds
            complex numbers, or has no bands.
    """
    suffix = Path(str(path)).suffix.lower()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            # TIFFs are opened as such only: a VRT can point at any file of the machine
            tiff = {"driver": "GTiff"} if suffix in TIFF_SUFFIXES else {}
            dataset = rasterio.open(path, **tiff)
    except rasterio.errors.RasterioIOError as error:
        raise unreadable(path, error) from error
    problem = _problem_of(dataset, suffix)
    if problem:
        dataset.close()
        raise RasterError(f"{path} {problem}")
    return dataset


def unreadable(path: str | Path, error: BaseException) -> RasterError:
    """The error for a raster that GDAL does not open, or of which it cannot read a block."""
    chain, cause = "", error
    while cause is not None:
        chain, cause = f"{chain}{cause}\n", cause.__cause__
    if codec := re.search(r"missing codec (?:of code )?(\w[\w-]*)", chain):
        return RasterError(
            f"Cannot read {path}: it is compressed by {codec[1]}, a codec that this GDAL lacks; "
            "write it again where it opens (gdal_translate -co COMPRESS=DEFLATE)"
        )
    message, suffix = gdal_message(error).rstrip("."), Path(str(path)).suffix.lower()
    there = os.path.isfile(path)
    if there and "not recognized as being" in message and suffix not in DRIVERS:
        return RasterError(
            f"Cannot read {path}: this GDAL does not know its format, or the file is incomplete; "
            "convert it where it opens (gdal_translate)"
        )
    return RasterError(
        f"Cannot read {path}: {message}"
        + "; copy or write it again, it may be incomplete" * there
    )


def files_of_raster(path: str | Path) -> list[str]:
    """The files that the pixels and masks of a raster come from, a VRT's sources and theirs too.

    What GDAL or QGIS may add or change later, overviews and statistics, is left out.
    """
    found, todo = {}, [str(path)]
    while todo:
        file = todo.pop(0)
        if file in found or file.endswith((".ovr", ".aux.xml")):
            continue
        found[file] = None
        if len(found) == 1 or file.lower().endswith(".vrt"):
            # one that cannot be read is reported where its pixels are needed
            with suppress(RasterError), open_raster(file) as dataset:
                todo += dataset.files
    return list(found)


def _problem_of(dataset: rasterio.DatasetReader, suffix: str) -> str | None:
    """Why an open raster cannot be used, or None."""
    driver = dataset.driver
    if driver == "VRT" and suffix != ".vrt":
        return "is a VRT under another name; rename it to .vrt"
    if driver not in (DRIVERS | PICTURES).get(suffix, (driver,)):
        return f"is not a {suffix} file: its format is {driver}; rename it"
    if dataset.count == 0:
        return "has no bands; name one of its subdatasets"
    if any("complex" in dtype for dtype in dataset.dtypes):
        return "holds complex numbers; convert it to amplitude or dB"
    (height, width), dtype = dataset.block_shapes[0], np.dtype(dataset.dtypes[0])
    together = dataset.tags(ns="IMAGE_STRUCTURE").get("INTERLEAVE") == "PIXEL"
    bands = dataset.count if together else 1
    if not fits_in_memory(size := height * width * dtype.itemsize * bands):
        return (
            f"is stored in blocks of {height} x {width} pixels, {size / 1e9:.0f} GB each, more "
            "than fits into memory; write it again in tiles (gdal_translate -co TILED=YES)"
        )
    return None


# what locates pixels without a CRS, and how gdalwarp uses it
SENSOR_MODELS = {"ground control points": "-tps", "RPCs": "-rpc"}


def sensor_model(dataset: rasterio.DatasetReader) -> str | None:
    """Which of the ``SENSOR_MODELS`` a raster has, if any."""
    points, rpcs = SENSOR_MODELS
    return points if dataset.gcps[0] else rpcs if dataset.rpcs else None


def require_georeference(dataset: rasterio.DatasetReader) -> None:
    """Raise RasterError unless the raster has a coordinate reference system."""
    if dataset.crs is None and (located := sensor_model(dataset)):
        raise RasterError(
            f"{dataset.name} is located by {located} only, and its rows and columns are those of "
            f"the sensor; put it on the ground first (gdalwarp {SENSOR_MODELS[located]})"
        )
    if dataset.crs is None:
        raise RasterError(
            f"{dataset.name} has no CRS; assign one (gdal_edit.py -a_srs)"
        )


def has_no_location(dataset: rasterio.DatasetReader) -> bool:
    """Whether a raster is a picture that says nothing of where its pixels lie."""
    located = dataset.crs or sensor_model(dataset)
    return not located and Path(dataset.name).suffix.lower() in PICTURES


def same_pixel_grid(a, b, tolerance: float = 0.01) -> bool:
    """Whether two rasters have the same CRS, shape and transform (to a share of a pixel)."""
    if a.crs != b.crs or a.shape != b.shape:
        return False
    corners = [(0, 0), (a.width, 0), (0, a.height)]
    shifts = [np.subtract(~a.transform * (b.transform * c), c) for c in corners]
    return bool(np.abs(shifts).max() <= tolerance)


def image_bands(dataset: rasterio.DatasetReader) -> list[int]:
    """The band numbers that hold the image: all but alpha."""
    alpha = alpha_bands(dataset)
    return [band for band in dataset.indexes if band not in alpha]


def _report_alpha(dataset: rasterio.DatasetReader) -> None:
    """Log which bands flagged as alpha are left out, which are data, and how to change it."""
    alpha, count = alpha_bands(dataset), dataset.count
    for band in flagged_bands(dataset):
        others = ",".join(str(b) for b in dataset.indexes if b != band)
        log.info(
            "%s: band %d is left out, since it holds transparency; --bands 1-%d keeps it"
            if band in alpha
            else "%s: band %d is flagged as transparency but holds data, and is kept; --bands %s "
            "leaves it out",
            dataset.name,
            band,
            count if band in alpha else others,
        )


def select_bands(dataset: rasterio.DatasetReader, bands: str | None) -> list[int]:
    """Band numbers for a ``--bands`` text: 1-based numbers or band descriptions.

    Without a text: all bands but alpha. A range is two numbers (1-17). A description matches whole,
    or by its first word ("B04" for "B04 red"), whatever its case.

    Raises:
        RasterError: A number outside the raster, an unknown or ambiguous description.
    """
    if bands is None:
        chosen = image_bands(dataset)
        if not chosen:
            raise RasterError(f"{dataset.name} has no band besides alpha")
        _report_alpha(dataset)
        return chosen
    chosen = []
    for item in (part.strip() for part in bands.split(",")):
        if not item:
            raise RasterError(
                f"--bands {bands!r}: expected names or numbers between commas"
            )
        if re.fullmatch(r"\d{1,99}(\s*-\s*\d{1,99})?", item):
            first, *last = map(int, item.split("-"))
            numbers = range(first, (last or [first])[0] + 1)
            if not numbers or first < 1 or numbers[-1] > dataset.count:
                raise RasterError(
                    f"--bands {item}: {dataset.name} has bands 1 to {dataset.count}"
                )
            chosen += numbers
            continue
        names = [(text or "").strip().lower() for text in dataset.descriptions]
        found = [i for i, name in enumerate(names, 1) if name == item.lower()]
        found = found or [
            i for i, name in enumerate(names, 1) if name.split()[:1] == [item.lower()]
        ]
        if len(found) != 1:
            raise RasterError(
                f"--bands {item!r}: {len(found)} bands of {dataset.name} have that "
                f"description ({', '.join(name or '-' for name in names)})"
            )
        chosen.append(found[0])
    return chosen


def band_scaling(
    dataset: rasterio.DatasetReader, bands: Sequence[int]
) -> tuple[list[float], list[float]] | None:
    """The tags of scale and offset of bands, which turn numbers into values; None without any.

    Scale 1 and offset 0 are what GDAL says of a raster without tags, too.
    """
    scales = [float(dataset.scales[band - 1]) for band in bands]
    offsets = [float(dataset.offsets[band - 1]) for band in bands]
    return (scales, offsets) if {*scales} != {1.0} or any(offsets) else None


def as_dtype(value: float | None, dtype: np.dtype):
    """A nodata value in a dtype; None when there is none or the dtype cannot hold it."""
    if value is None or dtype.kind == "f":
        return None if value is None else dtype.type(value)
    limits = np.iinfo(dtype)
    whole = math.isfinite(value) and value == int(value)
    return (
        dtype.type(int(value)) if whole and limits.min <= value <= limits.max else None
    )


class Source:
    """Bands of an open raster, to be read with their validity.

    A pixel is valid when it lies inside the raster and its masks (band, alpha, ``--mask``), is not
    nodata (see ``nodata.nodata_pixels``), and is neither NaN nor infinite in any of the bands.
    GDAL's own masks let one kind shadow another (nodata hides alpha); here all of them count.
    """

    def __init__(
        self,
        dataset: rasterio.DatasetReader,
        bands: Sequence[int] | None = None,
        alphas: Sequence[int] | None = None,
        nodata: float | None = None,
        mask: Mask | None = None,
    ):
        """Look up what ``read`` needs, once: rasterio takes 0.1 to 0.3 ms for it each time.

        Args:
            dataset: An open raster.
            bands: 1-based band numbers; an alpha band among them is read as data. By default all
                bands but alpha.
            alphas: Those that hold transparency; by default ``alpha_bands``.
            nodata: ``--nodata``: as if the raster declared this value.
            mask: ``--mask``: another raster that says which pixels are invalid.

        Raises:
            RasterError: No band can hold ``nodata``, or the mask cannot be used.
        """
        self.dataset, self.bands = dataset, list(bands or image_bands(dataset))
        dtypes = [np.dtype(dataset.dtypes[band - 1]) for band in self.bands]
        self.declared = [
            dataset.nodatavals[band - 1] if nodata is None else nodata
            for band in self.bands
        ]
        flags = dataset.mask_flag_enums[self.bands[0] - 1]
        alphas = alpha_bands(dataset) if alphas is None else alphas
        self.dtype = np.result_type(*dtypes)  # that holds all of them
        self.one_dtype = len(set(dtypes)) == 1
        self.nodata = [as_dtype(*pair) for pair in zip(self.declared, dtypes)]
        if nodata is not None and not any(v is not None for v in self.nodata):
            raise RasterError(
                f"--nodata {nodata:g}: {dataset.name} holds {self.dtype}, which has no such value"
            )
        self.given = {"nodata": nodata, "mask": mask}
        self.has_mask = MaskFlags.per_dataset in flags and MaskFlags.alpha not in flags
        self.alphas = [band for band in alphas if band not in self.bands]
        self.mask = None
        if mask is not None:
            require_georeference(dataset)
            self.mask = open_mask(mask, dataset)
        # pixels of all bands are often stored together: each block is decoded once
        fit = self.one_dtype and {dataset.dtypes[a - 1] for a in self.alphas} <= {
            dataset.dtypes[self.bands[0] - 1]
        }
        self.bands_read = self.bands + (self.alphas if fit else [])

    def reopened(self, dataset: rasterio.DatasetReader) -> Source:
        """The same bands with the same validity, of the raster opened once more."""
        return Source(dataset, self.bands, self.alphas, **self.given)

    def read(
        self, window: Window | None = None, out: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Read a window that may reach beyond the raster.

        Args:
            window: Whole pixels; parts outside the raster come back as zeros, invalid. By
                default the whole raster.
            out: What a window within the raster is read into, (bands_read, H, W) of ``dtype``;
                the image is its first part.

        Returns:
            image (C, H, W) in the raster's dtype, valid (H, W) bool.

        Raises:
            RasterError: A block cannot be read.
        """
        if window is None:
            return self._read()
        inside = window_within(window, self.dataset.width, self.dataset.height)
        if inside == window:
            return self._read(out, window=inside)
        shape = (int(window.height), int(window.width))
        image = np.zeros((len(self.bands), *shape), self.dtype)
        valid = np.zeros(shape, bool)
        if inside is not None:
            top = int(inside.row_off - window.row_off)
            left = int(inside.col_off - window.col_off)
            rows = slice(top, top + int(inside.height))
            columns = slice(left, left + int(inside.width))
            image[:, rows, columns], valid[rows, columns] = self._read(window=inside)
        return image, valid

    def overview(
        self, longest: int = 1000, window: Window | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """A part of the raster, by default all, thinned to at most ``longest`` pixels a side.

        See ``read``.
        """
        window = window or Window(0, 0, self.dataset.width, self.dataset.height)
        sides = window.height, window.width
        scale = min(1.0, longest / max(sides))
        height, width = (max(1, round(side * scale)) for side in sides)
        return self._read(out_shape=(height, width), window=window)

    def _read(self, out=None, **where) -> tuple[np.ndarray, np.ndarray]:
        """Pixels (C, H, W) and validity (H, W) of a part inside the raster."""
        dataset = self.dataset
        try:
            if self.one_dtype:
                pixels = dataset.read(self.bands_read, out=out, **where)
            else:  # rasterio reads bands of one dtype together
                parts = [dataset.read(band, **where) for band in self.bands]
                kind = {"dtype": self.dtype} if out is None else {"out": out}
                pixels = np.stack(parts, **kind)
            valid = np.ones(pixels.shape[1:], bool)
            if pixels.dtype.kind == "f":
                valid &= np.isfinite(pixels).all(axis=0)
            if any(value is not None for value in self.nodata):
                valid &= ~nodata_pixels(pixels, self.nodata)
            if self.has_mask:
                valid &= dataset.read_masks(self.bands[0], **where) > 0
            pixels, alphas = np.split(pixels, [len(self.bands)])
            if len(alphas) < len(self.alphas):
                alphas = [dataset.read(band, **where) for band in self.alphas]
            for alpha in alphas:
                valid &= alpha > 0
            if self.mask:
                place = where.get("window") or Window(0, 0, *dataset.shape[::-1])
                shape = where.get("out_shape")
                valid &= self.mask.read(place, out_shape=shape)
        except rasterio.errors.RasterioIOError as error:
            raise unreadable(dataset.name, error) from error
        return pixels, valid
