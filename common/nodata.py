"""Nodata: the pixels that a declared value makes invalid, and fill that none declares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from common.alpha import sample_windows
from common.errors import RasterError
from common.masks import report_text
from common.text import ranges_text, share_text

if TYPE_CHECKING:
    from common.rasters import Source

BORDER_SHARE = 0.25  # of the border in a small window: one vector there may be fill
LEAST_FILL = 0.02  # of a scene, in large areas at its border
LEAST_AREA = 0.005  # of a scene: a large area


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


def nodata_advice(source: Source) -> tuple[str | None, str | None]:
    """Two lines on a scene: pixels that hold nodata in some bands, and fill that no value declares.

    Both are found in small windows; the scene is read, thinned, only where these show a vector
    that may be fill.
    """
    dataset, read = source.dataset, []
    for window in sample_windows(dataset, most=3):
        try:
            read.append((window, *source.read(window)))
        except RasterError:
            continue  # reported where its pixels are needed
    counts = [partly_nodata(image, valid, source.nodata) for _, image, valid in read]
    pixels = sum(valid.size for _, _, valid in read)
    partly = partly_text(dataset.name, source.nodata, sum(counts), pixels)
    return partly, _fill_advice(source, read)


def empty_bands(source: Source) -> str:
    """The end of a sentence that names the bands which make all pixels of a scene invalid, by small
    windows of it; empty without any, and where all do."""
    seen = np.zeros(len(source.bands), bool)
    for window in sample_windows(source.dataset, most=4):
        for index, (band, nodata) in enumerate(zip(source.bands, source.nodata)):
            values = source.dataset.read(band, window=window)
            known = np.isfinite(values)
            if nodata is not None and is_no_measurement(nodata):
                known &= values != nodata
            seen[index] |= known.any()
    if seen.all() or not seen.any():
        return ""
    bands = np.array(source.bands)
    empty, kept = ranges_text(bands[~seen]), ranges_text(bands[seen])
    return f"; no pixel of band {empty} is valid (--bands {kept} leaves it out)"


def mask_shares(source: Source) -> str | None:
    """The line on how much ``--mask`` makes invalid in what was read so far; None without one."""
    mask = source.mask
    shares = mask and report_text(mask.path, [mask.summary()])
    return shares and f"{source.dataset.name}: about {shares}"


def _fill_advice(source: Source, read: Sequence[tuple]) -> str | None:
    """The line on a constant vector in large areas at the border of a scene."""
    height, width = source.dataset.shape
    candidates = set()
    for window, image, valid in read:
        at_border = np.ones(valid.shape, bool)
        bottom, right = window.row_off + window.height, window.col_off + window.width
        inner = np.s_[
            int(window.row_off == 0) : -1 if bottom == height else None,
            int(window.col_off == 0) : -1 if right == width else None,
        ]
        at_border[inner] = False
        border = image[:, valid & at_border]
        if not border.size:
            continue
        vectors, counts = np.unique(border, axis=1, return_counts=True)
        if counts.max() >= BORDER_SHARE * at_border.sum():
            candidates.add(tuple(vectors[:, counts.argmax()].tolist()))
    if not candidates:
        return None
    try:
        image, valid = source.overview()
    except RasterError:
        return None
    shares = {vector: border_share(image, valid, vector) for vector in candidates}
    vector = max(shares, key=shares.get)
    if shares[vector] <= LEAST_FILL:
        return None
    texts = [f"{value:.9g}" for value in vector]
    alike = len(set(texts)) == 1
    held = f"{texts[0]} in all bands" if alike else f"({', '.join(texts)}) in its bands"
    way_out = f"give --nodata={texts[0]}" if alike else "mask it (a mask or alpha band)"
    return (
        f"warning: {share_text(shares[vector])} of {source.dataset.name}, in large areas at its "
        f"border, holds {held} and counts as valid; if that is fill, {way_out}"
    )


def border_share(image: np.ndarray, valid: np.ndarray, vector: Sequence) -> float:
    """The share of an image (C, H, W) that holds a vector in large areas that touch its border."""
    from scipy.ndimage import label

    held = (image == np.array(vector)[:, None, None]).all(axis=0) & valid
    areas, _ = label(held)
    edges = [areas[0], areas[-1], areas[:, 0], areas[:, -1]]
    at_border = np.unique(np.concatenate(edges))
    sizes = np.bincount(areas.ravel())[at_border[at_border > 0]]
    return float(sizes[sizes >= LEAST_AREA * held.size].sum() / held.size)
