"""The files that a raster's pixels come from: whether all are there and whole."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
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
        require_complete(file)
        if len(checked) > 1:
            try:  # whatever kind of raster the VRT makes something of
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", NotGeoreferencedWarning)
                    rasterio.open(file).close()
            except RasterioIOError as error:
                raise RasterError(
                    f"{path}: a source is missing: {unreadable(file, error)}"
                ) from error
        if file.lower().endswith(".vrt"):
            todo += sources_of_vrt(Path(file))


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
