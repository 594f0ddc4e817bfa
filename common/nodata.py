"""Nodata: the pixels that a declared value makes invalid, and those that hold it in part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from common.alpha import sample_windows
from common.errors import RasterError

if TYPE_CHECKING:
    from common.rasters import Source


def is_no_measurement(value: np.generic) -> bool:
    """Whether no sensor measures a nodata value, given in the dtype of its band.

    So it is of one that is negative, NaN, or the largest of a signed or 16-bit type. Others, as 0
    and 255 of uint8, are dark and bright pixels too.
    """
    if value.dtype.kind == "f":
        return bool(not value >= 0 or value == np.finfo(value.dtype).max)
    signed_or_short = value.dtype.kind == "i" or value.dtype.itemsize == 2
    return bool(value < 0 or (signed_or_short and value == np.iinfo(value.dtype).max))


def nodata_pixels(pixels: np.ndarray, values: Sequence) -> np.ndarray:
    """The pixels that are nodata: (H, W) bool.

    A value that no sensor measures counts in any band. Others count where all bands that declare
    one hold theirs.

    Args:
        pixels: (C, H, W).
        values: The nodata value of each band in its dtype, None where there is none.
    """
    found, everywhere = np.zeros(pixels.shape[1:], bool), None
    for value, band in zip(values, pixels):
        if value is None:
            continue
        held = band == value
        if is_no_measurement(value):
            found |= held
        elif everywhere is None:
            everywhere = held
        else:
            everywhere &= held
    return found if everywhere is None else found | everywhere


def partly_nodata(pixels: np.ndarray, valid: np.ndarray, values: Sequence) -> int:
    """How many valid pixels hold the nodata value of a band, though not those of all."""
    held = np.zeros(valid.shape, bool)
    for value, band in zip(values, pixels):
        if value is not None:
            held |= band == value
    return int((held & valid).sum())


def partly_text(name: str, values: Sequence, partly: int, pixels: int) -> str | None:
    """The line on pixels that hold nodata in some bands; None without any."""
    if not partly:
        return None
    named = ", ".join(dict.fromkeys(str(v) for v in values if v is not None))
    return (
        f"{name}: {share_text(partly / pixels)} of the pixels hold the nodata value {named} in "
        "some of the bands only; they count as valid"
    )


def share_text(share: float) -> str:
    return f"about {share:.1%}" if share >= 0.0005 else "less than 0.1%"


def nodata_advice(source: Source) -> str | None:
    """The line on pixels of a scene that hold nodata in some bands, by small windows of it."""
    counted = pixels = 0
    if all(value is None for value in source.nodata):
        return None
    for window in sample_windows(source.dataset, most=4):
        try:
            image, valid = source.read(window)
        except RasterError:
            continue  # reported where its pixels are needed
        counted += partly_nodata(image, valid, source.nodata)
        pixels += valid.size
    return partly_text(source.dataset.name, source.nodata, counted, pixels)
