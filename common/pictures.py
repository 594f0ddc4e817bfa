"""Pictures: maps in the colours of their classes, panels with a legend, PNG files."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

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


PANEL = 4.6  # inches: the side of a square panel
LONGEST = 30.0, 18.4  # inches of the height and the width that all panels take
LETTER, LINE = 0.09, 0.22  # inches of a usual letter and of a line of text
SPACE = 0.15  # inches between panels and around them
KEY = 0.6  # inches that a name in a legend takes beside its letters
LONG_NAME = 40  # letters, after which a name goes on in the next line


def draw_panels(
    panels: Sequence[dict], legend=(), title: str = "", columns: int = 0
) -> Figure:
    """Draw pictures of about one shape: wide ones below each other, others side by side.

    Args:
        panels: Each with "title", "picture" (an array for imshow) and, for a single band,
            optional "limits" (low, high), which adds a colour bar.
        legend: (name, RGB 0..255) pairs.
        title: Above all panels.
        columns: Panels in a row (default: by their shape).
    """
    shapes = [panel["picture"].shape for panel in panels]
    aspect = float(np.median([width / height for height, width, *_ in shapes]))
    bars = any(panel.get("limits") for panel in panels)
    margins = 0.0, 0.0, 0.6 if bars else 0.0
    titles = [panel["title"] for panel in panels]
    figure = panel_figure(titles, aspect, legend, title, columns, margins)
    for axes, panel in zip(list(figure.axes), panels):
        axes.set_axis_off()
        if not (limits := panel.get("limits")):
            axes.imshow(panel["picture"], interpolation="nearest")
            continue
        style = {"cmap": "viridis", "vmin": limits[0], "vmax": limits[1]}
        drawn = axes.imshow(panel["picture"], interpolation="nearest", **style)
        place = axes.get_position()
        inch = 1 / figure.get_figwidth()
        bar = [place.x1 + 0.08 * inch, place.y0, 0.14 * inch, place.height]
        figure.colorbar(drawn, cax=figure.add_axes(bar))
    return figure


def panel_figure(
    titles: Sequence[str],
    aspect: float,
    legend=(),
    title: str = "",
    columns: int = 0,
    margins: tuple[float, float, float] = (0.0, 0.0, 0.0),
) -> Figure:
    """An empty figure for panels of one shape: its axes lie as their titles do, row by row.

    All sizes are computed, since matplotlib takes longer to find a layout than to draw. The legend
    lies below or to the right, where it makes the figure's longer side the least longer.

    Args:
        titles: One per panel.
        aspect: Width over height of a panel.
        legend: (name, RGB 0..255) pairs.
        title: Above all panels.
        columns: Panels in a row (default: by their shape).
        margins: Inches that a panel needs beside its picture: left, below, right.
    """
    from matplotlib.figure import Figure

    columns = columns or _columns(len(titles), aspect)
    rows = math.ceil(len(titles) / columns)
    width, height = _panel_size(aspect, columns, rows)
    slot = max(width + margins[0] + margins[2], 1.4)
    texts = [_wrapped(text, slot) for text in titles]
    above = LINE * (1 + max(text.count("\n") for text in texts))
    step = above + height + margins[1] + SPACE
    body = columns * (slot + SPACE) - SPACE, rows * step - SPACE
    keys = _place_legend([name for name, _ in legend], *body)
    across = max(body[0], keys.width if keys.below else 0)
    head = _wrapped(title, across)
    top = SPACE + (0.06 + 1.15 * LINE * (1 + head.count("\n")) if title else 0)
    whole = np.array([across + 2 * SPACE, body[1] + top + SPACE])
    whole += (0, keys.height + SPACE) if keys.below else (keys.width + SPACE, 0)
    figure = Figure(figsize=whole)
    # from the left and from below, in inches
    start = SPACE + (across - body[0] + slot - width + margins[0] - margins[2]) / 2
    for number, text in enumerate(texts):
        row, column = divmod(number, columns)
        x = start + column * (slot + SPACE)
        y = whole[1] - top - row * step - above - height
        axes = figure.add_axes([*(x, y) / whole, *(width, height) / whole])
        axes.set_title(text, fontsize=11, pad=4, parse_math=False)
    middle = (SPACE + across / 2) / whole[0]
    if title:
        y = 1 - SPACE / whole[1]
        figure.suptitle(head, x=middle, y=y, fontsize=12, va="top", parse_math=False)
    anchor = whole - (keys.width + SPACE, top + LINE)
    if keys.below:
        anchor = middle * whole[0], SPACE
    if legend:
        _draw_legend(figure, legend, keys, tuple(anchor / whole))
    return figure


class _Keys(NamedTuple):
    """Where a legend goes, and the inches that it takes."""

    below: bool
    columns: int
    width: float
    height: float


def _panel_size(aspect: float, columns: int, rows: int) -> tuple[float, float]:
    """Inches of width and height: the area of a usual panel, unless all together get too long."""
    width = PANEL * math.sqrt(aspect)
    width = min(width, LONGEST[0] / rows * aspect, LONGEST[1] / columns)
    return width, width / aspect


def _columns(count: int, aspect: float) -> int:
    """How many panels lie in a row: that all together are about twice as wide as high."""
    choices = range(1, count + 1)
    if count <= 6:  # without a gap in the last row
        choices = [columns for columns in choices if count % columns == 0]

    def unlike(columns: int) -> float:
        return abs(math.log(aspect * columns / math.ceil(count / columns) / 2))

    return min(choices, key=unlike)


def _wrapped(text: str, inches: float) -> str:
    """A text in lines of a width."""
    return "\n".join(textwrap.wrap(text, max(8, int(inches / 0.115)))) or text


def _wrapped_name(name: str) -> str:
    """A name of a legend in lines."""
    return "\n".join(textwrap.wrap(name, LONG_NAME)) or name


def _place_legend(names: Sequence[str], width: float, height: float) -> _Keys:
    """Where the legend of panels goes that take some inches together."""
    lines = [_wrapped_name(name).split("\n") for name in names]
    if not lines:
        return _Keys(True, 1, 0.0, 0.0)
    longest = max(len(line) for parts in lines for line in parts)
    one = LETTER * longest + KEY
    heights = [LINE + 0.17 * (len(parts) - 1) for parts in lines]

    def with_columns(below: bool, columns: int) -> _Keys:
        parts = np.array_split(heights, columns)
        return _Keys(below, columns, columns * one, max(part.sum() for part in parts))

    below = with_columns(True, max(1, min(int(width / one), len(names))))
    wanted = math.ceil(sum(heights) / max(height - max(heights), LINE))
    right = with_columns(False, min(wanted, len(names)))
    tall = height + SPACE + below.height
    wide = width + SPACE + right.width
    is_below = max(width, below.width, tall) <= max(wide, height, right.height)
    return below if is_below else right


def _draw_legend(figure: Figure, legend, keys: _Keys, anchor) -> None:
    from matplotlib.patches import Patch

    handles = [
        Patch(
            facecolor=np.divide(colour, 255),
            edgecolor="grey",
            label=_wrapped_name(name),
        )
        for name, colour in legend
    ]
    drawn = figure.legend(
        handles=handles,
        ncols=keys.columns,
        loc="lower center" if keys.below else "upper left",
        bbox_to_anchor=anchor,
        frameon=False,
        borderpad=0,
        borderaxespad=0,
        handlelength=1.5,
        labelspacing=0.35,
    )
    for text in drawn.get_texts():
        text.set_parse_math(False)


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
