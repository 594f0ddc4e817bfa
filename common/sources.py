"""The files that a raster's pixels come from: whether all are there and whole."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from xml.etree import ElementTree

import rasterio
from rasterio.errors import NotGeoreferencedWarning, RasterioIOError

from common.errors import RasterError
from common.rasters import unreadable
from common.tiffs import require_complete


def require_whole(path: str | Path) -> None:
    """Check a raster before its pixels are read, a VRT with all of its sources.

    GDAL reports a source that cannot be opened once, and may read zeros in its place from then on.

    Raises:
        RasterError: A TIFF is cut off, or a source of a VRT cannot be opened.
    """
    checked, todo = set(), [str(path)]
    while todo:
        file = todo.pop()
        if file in checked:
            continue
        checked.add(file)
        stamp = os.stat(file).st_mtime_ns if os.path.isfile(file) else None
        try:
            todo += _checked(file, stamp, is_source=len(checked) > 1)
        except RasterioIOError as error:
            raise RasterError(
                f"{path}: a source is missing: {unreadable(file, error)}"
            ) from error


@lru_cache(maxsize=100_000)  # scenes of a batch share masks and labels of many files
def _checked(file: str, stamp: int | None, is_source: bool) -> tuple[str, ...]:
    """Check a file; its sources. ``stamp`` is when it was changed."""
    require_complete(file)
    if is_source:  # whatever kind of raster the VRT makes something of
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            rasterio.open(file).close()
    return tuple(sources_of_vrt(Path(file))) if file.lower().endswith(".vrt") else ()


def sources_of_vrt(path: Path) -> Iterator[str]:
    """What a VRT file names as its sources, as GDAL opens them."""
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError):
        return  # GDAL says more of it
    bands = [b for b in root.iter() if b.get("subClass") == "VRTRawRasterBand"]
    raw = [child for band in bands for child in band]  # bytes, no raster
    for element in root.iter():
        name = (element.text or "").strip()
        # GDAL passes over the case of tags and attributes
        if element.tag.lower() not in ("sourcefilename", "sourcedataset") or not name:
            continue
        given = {key.lower(): value for key, value in element.attrib.items()}
        if given.get("relativetovrt") == "1":
            name = os.path.join(path.parent, name)
        if not (element in raw and os.path.isfile(name)):
            yield name
