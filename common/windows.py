"""Windows: parts of a raster in whole pixels."""

from __future__ import annotations

import math

from rasterio.windows import Window


def window_within(window: Window, width: int, height: int) -> Window | None:
    """The part of a window inside a raster, or None."""
    left, top = max(0, window.col_off), max(0, window.row_off)
    right = min(width, window.col_off + window.width)
    bottom = min(height, window.row_off + window.height)
    if right <= left or bottom <= top:
        return None
    return Window(left, top, right - left, bottom - top)


def window_starts(length: int, patch_size: int, stride: int) -> list[int]:
    """Offsets that cover ``[0, length)`` with the fewest windows; the last ends at the edge."""
    if length <= patch_size:
        return [0]
    return [*range(0, length - patch_size, stride), length - patch_size]


def pixel_bounds(coordinates: tuple[float, float, float, float]) -> Window:
    """The window between bounds given in pixels (left, top, right, bottom), edges rounded.

    A pixel belongs to the window when its centre lies between the bounds, so that cells that
    share an edge share no pixel; a thousandth of a pixel of projection noise makes no difference.
    """
    left, top, right, bottom = (math.floor(round(v, 3) + 0.5) for v in coordinates)
    return Window(left, top, right - left, bottom - top)
