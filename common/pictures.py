"""Pictures: maps in the colours of their classes, panels with a legend, PNG files."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rasterio.enums import ColorInterp

from common.colours import Colour
from common.files import atomic_write
from common.patches import PatchPair, patch_bands, read_patch
from common.rasters import open_raster

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def rgb_bands(descriptions: Sequence[str | None], colours: Sequence = ()) -> list[int]:
    """The 1-based bands to show as red, green, blue; a single entry means grey.

    By colour interpretation, else by descriptions ("red", or the Sentinel-2 and Landsat 8 names
    B4, B3, B2; for Landsat 4-7, known by six bands B1-B5 and B7, B3, B2, B1), else the first
    three bands (false colour), else the first band.
    """
    roles = [ColorInterp.red, ColorInterp.green, ColorInterp.blue]
    if all(role in colours for role in roles):
        return [list(colours).index(role) + 1 for role in roles]
    # without the date of joined scenes and what Landsat's surface reflectance begins with
    names = [
        re.sub(r"^sr_(?=b\d)|_\d{8}$", "", (text or "").lower())
        for text in descriptions
    ]

    def first(pattern: str) -> int | None:
        hits = [i for i, name in enumerate(names, 1) if re.search(pattern, name)]
        return hits[0] if hits else None

    by_word = [
        first(rf"^(b\d+\W?)?{c}$") or first(rf"(?<![a-z]){c}(?!.?edge)")
        for c in ("red", "green", "blue")
    ]
    if None not in by_word:
        return by_word
    landsat = {name for name in names if re.fullmatch(r"b0?\d+", name)}
    order = "321" if landsat == {"b1", "b2", "b3", "b4", "b5", "b7"} else "432"
    by_number = [first(rf"^b0?{digit}\b") for digit in order]
    if None not in by_number:
        return by_number
    return [1, 2, 3] if len(names) >= 3 else [1]


def stretch(image: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """An RGB picture (H, W, 3) uint8: each band from its 2nd to 98th percentile, invalid white."""
    picture = np.full((*valid.shape, 3), 255, np.uint8)
    if valid.any():
        for channel, band in enumerate(np.broadcast_to(image, (3, *valid.shape))):
            low, high = np.percentile(band[valid], [2, 98])
            scaled = (band[valid].astype(np.float32) - low) / ((high - low) or 1)
            picture[valid, channel] = np.clip(scaled * 255, 0, 255)
    return picture


def colour_map(labels: np.ndarray, colours: Sequence[Colour]) -> np.ndarray:
    """Class ids (H, W) in their colours, as RGB (H, W, 3) uint8; anything else is white."""
    num_classes = len(colours)
    palette = np.array([*colours, (255, 255, 255)], np.uint8)
    labels = labels.astype(np.int64)
    known = (labels >= 0) & (labels < num_classes)
    return palette[np.where(known, labels, num_classes)]


def draw_panels(
    panels: Sequence[dict], legend=(), title: str = "", columns: int = 0
) -> Figure:
    """Draw pictures side by side.

    Args:
        panels: Each with "title", "picture" (an array for imshow) and, for a single band,
            optional "limits" (low, high), which adds a colour bar.
        legend: (name, RGB 0..255) pairs.
        title: One line above all panels.
        columns: Panels in a row (default: all).
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    columns = columns or len(panels)
    rows = math.ceil(len(panels) / columns)
    width = 4.6 * columns  # inches; a name takes 0.09 a letter and 0.7 beside
    longest = max((len(name) for name, _ in legend), default=0)
    in_a_row = min(max(1, int(width / (0.09 * longest + 0.7))), len(legend) or 1)
    below = 0.25 * math.ceil(len(legend) / in_a_row)
    figure = Figure(figsize=(width, 4.6 * rows + 0.5 + below), layout="constrained")
    for number, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, number)
        limits = panel.get("limits")
        style = (
            {"cmap": "viridis", "vmin": limits[0], "vmax": limits[1]} if limits else {}
        )
        drawn = axes.imshow(panel["picture"], interpolation="nearest", **style)
        axes.set_title(panel["title"], fontsize=11, parse_math=False)
        axes.set_axis_off()
        if limits:
            figure.colorbar(drawn, ax=axes, shrink=0.7)
    if title:
        figure.suptitle(title, parse_math=False)
    if legend:
        handles = [
            Patch(facecolor=np.divide(colour, 255), edgecolor="grey", label=name)
            for name, colour in legend
        ]
        drawn = figure.legend(
            handles=handles,
            loc="outside lower center",
            ncols=in_a_row,
            frameon=False,
        )
        for text in drawn.get_texts():
            text.set_parse_math(False)
    return figure


def save_figure(figure: Figure, target: str | Path) -> None:
    """Store a figure as a PNG."""
    with atomic_write(target) as part:
        figure.savefig(part, format="png", dpi=110)


def read_patch_picture(pair: PatchPair, ignore_index: int):
    """A patch to look at.

    Returns:
        picture (H, W, 3) uint8, valid (H, W), mask (H, W) int64, and the numbers of the bands
        that are shown.
    """
    image, valid, mask = read_patch(pair, ignore_index)
    with open_raster(pair.image) as file:
        bands = [band - 1 for band in patch_bands(file)]
        shown = rgb_bands(
            [file.descriptions[band] for band in bands],
            [file.colorinterp[band] for band in bands],
        )
    picture = stretch(image[[band - 1 for band in shown]], valid)
    return picture, valid, mask, shown
