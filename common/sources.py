"""The files that a raster's pixels come from: whether all are there and whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from common.errors import RasterError
from common.rasters import open_raster
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
            try:
                open_raster(file).close()
            except RasterError as error:
                raise RasterError(f"{path}: a source is missing: {error}") from error
        if file.lower().endswith(".vrt"):
            todo += sources_of_vrt(Path(file))


def sources_of_vrt(path: Path) -> Iterator[str]:
    """What a VRT file names as its sources, as GDAL opens them."""
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError):
        return  # GDAL says more of it
    for tag in ("SourceFilename", "SourceDataset"):
        for element in root.iter(tag):
            if name := (element.text or "").strip():
                relative = element.get("relativeToVRT") == "1"
                yield os.path.join(path.parent, name) if relative else name
