"""Raster files as bands of a scene: names from descriptions, else from the files' names."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

import rasterio

from common.errors import RasterError
from common.provenance import scene_facts
from common.rasters import band_scaling, image_bands, open_raster
from extraction.stack_bands import Band, Product
from extraction.stack_files import full_path

# names of files as Sentinel-2 and Landsat products hold them, and of their bands
BAND_AT_END = re.compile(r"(?:.*?_)?((?:SR_|ST_)?B\d{1,2}A?)(?:_\d\dm)?", re.IGNORECASE)
SENTINEL2_FILE = re.compile(
    r"(?:.*_)?T\d{2}[A-Z]{3}_(?:.*_)?B(?:\d\d|8A)(?:_\d\dm)?", re.IGNORECASE
)
SENTINEL2_BAND = re.compile(r"B(?:0\d|1[0-2]|8A)", re.IGNORECASE)


def read_files(paths: Sequence[str], offset: int | None) -> Product:
    """All bands of raster files, in their order.

    Args:
        paths: Anything that GDAL opens.
        offset: ``--offset``, where it is for these files.

    Raises:
        RasterError: A file cannot be used, or two bands have the same name.
    """
    bands: dict[str, Band] = {}
    for path in paths:
        with open_raster(path) as file:
            for band in bands_of(file, path, offset):
                if other := bands.get(band.name):
                    raise RasterError(
                        f"{other.path} and {path} both have a band {band.name}; rename the files, "
                        "or describe their bands"
                    )
                bands[band.name] = band
    name = os.path.basename(paths[0]) if len(paths) == 1 else f"{len(paths)} files"
    return Product(
        name, "files", bands, tuple(bands), doubtful=offset is None,
        no_mask="are files without a cloud mask of their own; give one with --mask",
    )  # fmt: skip


def bands_of(file: rasterio.DatasetReader, path: str, offset: int | None) -> list[Band]:
    """The bands of an open file, but alpha."""
    numbers, facts = image_bands(file), scene_facts(file)
    found = []
    for number in numbers:
        name = (file.descriptions[number - 1] or "").strip()
        name = name or name_of(path, number if len(numbers) > 1 else None)
        dtype = file.dtypes[number - 1]
        measured = dtype == "uint16" and looks_like_sentinel2(path, name)
        nodata = file.nodatavals[number - 1]
        # as in products; of signed numbers 0 is one like others
        if nodata is None and (measured or (offset and dtype.startswith("uint"))):
            nodata = 0
        scaling = None
        if tags := band_scaling(file, [number]):
            scaling = tags[0][0], tags[1][0]
        added = offset or 0
        place = full_path(path)
        found.append(Band(name, place, number, added, nodata, scaling, measured, facts))
    return found


def name_of(path: str, number: int | None) -> str:
    """What a band without description is called, by the file's name."""
    stem = os.path.splitext(os.path.basename(path))[0]
    if number is None and (found := BAND_AT_END.fullmatch(stem)):
        return found[1].upper()
    return stem if number is None else f"{stem}_{number}"


def looks_like_sentinel2(path: str, name: str) -> bool:
    """Whether a band comes from a Sentinel-2 product, by the names of file and band."""
    stem = os.path.splitext(os.path.basename(path))[0]
    return bool(SENTINEL2_FILE.fullmatch(stem) or SENTINEL2_BAND.fullmatch(name))
