"""Small rasters with known pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import rasterio
from helpers import write_geotiff
from rasterio.enums import ColorInterp
from rasterio.transform import from_origin
from rasterio.windows import Window

from common.patches import PatchPair
from common.rasters import (
    Source,
    image_bands,
    open_raster,
    select_bands,
)

CRS = "EPSG:32631"
TRANSFORM = from_origin(431_240, 4_912_560, 10, 10)
WHOLE = Window(0, 0, 8, 8)
RGBA = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]
VRT_TYPES = {"uint8": "Byte", "uint16": "UInt16", "float32": "Float32"}


def ramp(bands: int = 1, size: int = 8, dtype="uint16") -> np.ndarray:
    """(bands, size, size); the values count from 1, and no two pixels of a band are equal."""
    count = np.arange(1, size * size + 1).reshape(size, size)
    return np.stack([count + 100 * band for band in range(bands)]).astype(dtype)


def rgba() -> np.ndarray:
    """Three bands of a ramp and an opaque alpha."""
    pixels = ramp(4)
    pixels[3] = 65535
    return pixels


def write_vrt(path: Path, bands: list[tuple[Path, float | str | None]]) -> Path:
    """A VRT whose bands are the first bands of files, each with its own nodata value."""
    text = ""
    for number, (source, nodata) in enumerate(bands, start=1):
        with rasterio.open(source) as file:
            kind, (height, width) = VRT_TYPES[file.dtypes[0]], file.shape
        text += f'<VRTRasterBand dataType="{kind}" band="{number}">'
        text += "" if nodata is None else f"<NoDataValue>{nodata}</NoDataValue>"
        text += f"<SimpleSource><SourceFilename>{source}</SourceFilename>"
        text += "<SourceBand>1</SourceBand></SimpleSource></VRTRasterBand>"
    transform = ", ".join(map(str, TRANSFORM.to_gdal()))
    path.write_text(
        f'<VRTDataset rasterXSize="{width}" rasterYSize="{height}"><SRS>{CRS}</SRS>'
        f"<GeoTransform>{transform}</GeoTransform>{text}</VRTDataset>"
    )
    return path


def invalid_pixels(path: Path, bands=None, window: Window = WHOLE) -> set:
    """(row, column) of the invalid pixels of a window."""
    with open_raster(path) as file:
        chosen = bands or image_bands(file)
        _, valid = Source(file, chosen).read(window)
    return {tuple(place) for place in np.argwhere(~valid).tolist()}


def described(path: Path, *descriptions: str | None) -> Path:
    """A raster whose bands have these descriptions."""
    return write_geotiff(path, ramp(len(descriptions)), descriptions)


def bands_of(path: Path, text: str | None) -> list[int]:
    with open_raster(path) as file:
        return select_bands(file, text)


def write_patches(folder: Path, names=("a", "b"), suffix=".tif") -> Path:
    """Image-label pairs in ``folder/images`` and ``folder/labels``."""
    for name in names:
        write_geotiff(folder / "images" / f"{name}{suffix}", ramp(2))
        write_geotiff(folder / "labels" / f"{name}{suffix}", ramp() % 3, dtype="uint8")
    return folder


def write_pair(folder: Path, image=None, label=None, image_more=None, label_more=None):
    """One pair; what is not given is 8 px of valid pixels."""
    image = ramp(2) if image is None else image
    label = ramp(dtype="uint8") % 3 if label is None else label
    return PatchPair(
        write_geotiff(folder / "image.tif", image, **(image_more or {})),
        write_geotiff(folder / "label.tif", label, **(label_more or {})),
    )
