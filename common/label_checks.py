"""Whether a label raster fits its image, and what its nodata hides."""

from __future__ import annotations

import numpy as np
import rasterio

from common.alpha import sample_windows
from common.errors import DatasetError, RasterError
from common.rasters import has_no_location, image_bands, open_raster, sensor_model
from common.text import share_text
from common.vector_labels import no_overlap


def label_nodata_advice(source: str, nodata: int | None) -> str | None:
    """What a nodata value that may be a class makes unlabelled, and the ways out."""
    if nodata is None:
        return None
    try:
        with open_raster(source) as raster:
            band, windows = image_bands(raster)[0], sample_windows(raster)
            read = [raster.read(band, window=window).ravel() for window in windows]
    except (RasterError, rasterio.errors.RasterioIOError):
        return None  # reported where it is read
    share = float((np.concatenate(read) == nodata).mean())
    if not share:
        return None
    return (
        f"{source} declares {nodata} as nodata, which makes {share_text(share)} of it unlabelled; if "
        f"{nodata} is a class, name it in --label_values (as {nodata},{nodata + 1}), or remove the "
        "declaration (gdal_edit.py -unsetnodata)"
    )


def is_map_of_picture(image, label) -> bool:
    """Whether a raster lies nowhere, as the map of a picture does, and so does its label."""
    return not (image.crs or sensor_model(image)) and has_no_location(label)


def require_same_pixels(image, label) -> None:
    """Raise DatasetError unless a label belongs to a picture without a location."""
    if label.crs is not None or label.shape != image.shape:
        what = "has a CRS" if label.crs else f"is {label.height} x {label.width} pixels"
        raise DatasetError(
            f"{label.name} {what}, but {image.name} is a picture of {image.height} x {image.width} "
            "pixels without a location; give a picture of that size"
        )


def require_overlap(image, label) -> None:
    from rasterio._err import CPLE_BaseError
    from rasterio.errors import CRSError
    from rasterio.warp import transform_bounds

    try:
        theirs = transform_bounds(label.crs, image.crs, *label.bounds)
    except (CRSError, CPLE_BaseError) as error:
        raise DatasetError(
            f"{label.name} cannot be transformed to the CRS of {image.name}: {error}"
        ) from error
    # (west, east) and (south, north), whichever way the rows run
    for axis in (0, 1):
        low, high = sorted(theirs[axis::2])
        first, last = sorted(image.bounds[axis::2])
        if low >= last or high <= first:
            raise no_overlap(label.name, label.crs, image)
