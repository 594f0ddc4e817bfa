"""Bands flagged as alpha: whether they hold transparency, or are data that GDAL took for it."""

from __future__ import annotations

import os
import re

import numpy as np
import rasterio
from rasterio.enums import ColorInterp
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window

# descriptions of bands that measure something: NIR, B08, SWIR 1, near infrared, 842 nm...
SPECTRAL = re.compile(
    r"\b(b\d+a?|(nir|swir|mwir|lwir|tir)\w*|\w*infra ?-?red\w*|red|green|blue|yellow|"
    r"red ?-?edge\w*|coastal|cirrus|thermal|pan(chromatic)?|[\d.]+ ?(nm|um|\u00b5m))(\b|_)",
    re.IGNORECASE,
)
MOST_TRANSLUCENT = 0.05  # of an alpha band: neither opaque nor transparent


def flagged_bands(dataset: rasterio.DatasetReader) -> list[int]:
    """The bands flagged as alpha; GDAL flags the fourth of four bands of bytes by itself."""
    roles = enumerate(dataset.colorinterp, start=1)
    return [band for band, role in roles if role == ColorInterp.alpha]


def sample_windows(
    dataset: rasterio.DatasetReader, side: int = 64, most: int = 8
) -> list[Window]:
    """At most ``most`` x ``most`` small windows, evenly spread from edge to edge: quick to read
    whatever the raster's size."""
    starts = []
    for length in dataset.shape:
        step = max(side, (length - side) / (most - 1))
        starts.append([s for i in range(most) if (s := round(i * step)) < length])
    height, width = dataset.shape
    return [
        Window(left, top, min(side, width - left), min(side, height - top))
        for top in starts[0]
        for left in starts[1]
    ]


def translucent_share(dataset: rasterio.DatasetReader, band: int) -> float:
    """The share of a band's pixels that are neither 0 nor its maximum, by a sample.

    1 where its description names a spectral band, 0 where it cannot be read.
    """
    if SPECTRAL.search(dataset.descriptions[band - 1] or ""):
        return 1.0
    try:
        read = [dataset.read(band, window=w).ravel() for w in sample_windows(dataset)]
    except rasterio.errors.RasterioIOError:
        return 0.0
    values = np.concatenate(read)
    return float(((values != 0) & (values != values.max())).mean())


_alpha_bands: dict[tuple, list[int]] = {}  # of files that were looked at


def alpha_bands(dataset: rasterio.DatasetReader) -> list[int]:
    """The bands that hold transparency: flagged as such, and with hardly a value between 0 and
    the maximum, unlike a near infrared that GDAL took for alpha."""
    flagged = flagged_bands(dataset)
    if not flagged or isinstance(dataset, WarpedVRT):  # which adds an alpha of its own
        return flagged
    key = None
    if os.path.isfile(dataset.name):
        status = os.stat(dataset.name)
        key = dataset.name, status.st_size, status.st_mtime_ns
    if key not in _alpha_bands:
        found = [
            band
            for band in flagged
            if translucent_share(dataset, band) <= MOST_TRANSLUCENT
        ]
        if key is None:
            return found
        if len(_alpha_bands) > 1000:
            _alpha_bands.clear()
        _alpha_bands[key] = found
    return _alpha_bands[key]
