"""TIFF files without GDAL: their header, whether all of their pixels are there."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
from rasterio._err import CPLE_BaseError

from common.errors import DatasetError, RasterError, gdal_message

TIFF_SUFFIXES = (".tif", ".tiff")


def list_tiffs(folder: Path) -> dict[str, Path]:
    """The TIFF files of a folder by stem, sorted; hidden files are left out."""
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.suffix.lower() in TIFF_SUFFIXES and not path.name.startswith("."):
            if path.stem in files:
                raise DatasetError(
                    f"{path} and {files[path.stem].name} have the same stem; remove one"
                )
            files[path.stem] = path
    return files


def last_byte(page) -> int:
    """Where the pixels of tifffile's page end in the file; 0 when there are none."""
    ends = np.add(page.dataoffsets, page.databytecounts)
    return int(ends.max(initial=0))


def require_complete(path: str | Path) -> None:
    """Raise RasterError where a TIFF points at pixels beyond its end: it was cut off.

    GDAL opens such a file, and fails at the first block that is not there.
    """
    import tifffile

    if Path(path).suffix.lower() not in TIFF_SUFFIXES or not os.path.isfile(path):
        return
    try:
        with tifffile.TiffFile(path) as tiff:
            end = last_byte(tiff.pages.first)
    except (tifffile.TiffFileError, IndexError, ValueError, struct.error):
        return  # GDAL knows more kinds of TIFF
    if end > os.path.getsize(path):
        raise RasterError(f"{path} is cut off; copy or download it again")


@dataclass(frozen=True)
class TiffHeader:
    """The shape and dtype of a patch, by its header."""

    bands: int
    height: int
    width: int
    dtype: str


def tiff_header(path: Path, may_be_empty: bool = False) -> TiffHeader:
    """The header of a patch, read without decoding a pixel.

    Args:
        path: Of the TIFF.
        may_be_empty: Whether none of its blocks needs to be there: they are left out where they
            hold but 0 or nodata (SPARSE_OK), as they are missing where writing was interrupted.

    Raises:
        DatasetError: Not a TIFF, or cut off: it points at data beyond its end.
    """
    import tifffile

    try:
        with tifffile.TiffFile(path) as tiff:
            page = tiff.pages.first
            tiff.filehandle.seek(page.offset)
            layout = tiff.tiff
            count = tiff.filehandle.read(layout.tagnosize)
            (tags,) = struct.unpack(layout.tagnoformat, count)
            end = last_byte(page)
            least = 0 if may_be_empty and not any(page.databytecounts) else 1
            header = TiffHeader(
                page.samplesperpixel, page.imagelength, page.imagewidth, str(page.dtype)
            )
    except (tifffile.TiffFileError, IndexError, ValueError, struct.error) as error:
        raise DatasetError(f"{path} is not a readable TIFF; write it again") from error
    if not least <= end <= path.stat().st_size or len(page.tags) != tags:
        raise DatasetError(f"{path} is cut off; write it again")
    return header


@contextmanager
def write_errors(path: str | Path) -> Iterator[None]:
    """Raise what GDAL raises where it cannot write a raster as a RasterError that names the file."""
    try:
        yield
    except (rasterio.errors.RasterioIOError, CPLE_BaseError, SystemError) as error:
        raise RasterError(
            f"{path} was not written completely ({gdal_message(error):.120}); is the disk full? "
            "free some, or write elsewhere"
        ) from error


@contextmanager
def create_tiff(path: str | Path, **profile) -> Iterator[rasterio.io.DatasetWriter]:
    """A GeoTIFF to write to.

    Raises:
        RasterError: Not all of it was written, which GDAL may report only in its log.
    """
    with rasterio.open(path, "w", driver="GTiff", **profile) as raster:
        yield raster
    require_complete_tiff(path)


def require_complete_tiff(path: str | Path) -> None:
    """Raise RasterError unless all of a TIFF was written."""
    try:
        tiff_header(Path(path))
    except DatasetError as error:
        raise RasterError(
            f"{path} was not written completely; is the disk full? free some, or write elsewhere"
        ) from error
