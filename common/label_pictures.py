"""Labels painted as pictures: each colour is a class."""

from __future__ import annotations

import re

import numpy as np
import rasterio
from rasterio.windows import Window

from common import MISSING
from common.alpha import sample_windows
from common.colours import Colour, colour_of_hex
from common.errors import DatasetError, OptionError
from common.label_options import LabelOptions
from common.rasters import Source, image_bands
from common.vector_labels import Groups

MOST_LISTED = 12  # colours of an error
OPTION = "--label_values"


def is_picture(raster: rasterio.DatasetReader) -> bool:
    """Whether a label is a picture: three bands of bytes, beside alpha."""
    bands = image_bands(raster)
    return len(bands) == 3 and all(raster.dtypes[b - 1] == "uint8" for b in bands)


def numbers_of_colours(image: np.ndarray) -> np.ndarray:
    """Colours (3, H, W) uint8 as numbers (H, W) int64: 0xrrggbb."""
    red, green, blue = image.astype(np.int64)
    return red << 16 | green << 8 | blue


def read_picture(source: Source, window: Window | None = None) -> np.ndarray:
    """The colours of a picture, or a window of it, as numbers; ``MISSING`` where invalid."""
    image, valid = source.read(window)
    return np.where(valid, numbers_of_colours(image), MISSING)


def picture_classes(
    raster: rasterio.DatasetReader, options: LabelOptions
) -> tuple[Groups, list[str], dict[str, Colour]]:
    """Which colours are which class, by ``--label_values`` in hex.

    Returns:
        The numbers of each class; the code of each, its first colour; and these as colours.

    Raises:
        DatasetError: No colours are named.
        OptionError: What is named is no colour in hex.
    """
    asked = options.asked_classes
    texts = [[text.lstrip("#").lower() for text in one.values] for one in asked]
    wrong = [t for group in texts for t in group if not re.fullmatch("[0-9a-f]{6}", t)]
    if not asked or wrong:
        text = (
            f"{raster.name} is a picture, whose classes are colours, to be named in {OPTION} as "
            f"00ff00=forest,0000ff=water; it holds {_listed_colours(raster)}"
        )
        if asked:
            raise OptionError(f"{OPTION} {options.label_values}: {text}")
        raise DatasetError(text)
    values = [tuple(int(text, 16) for text in group) for group in texts]
    codes = [group[0] for group in texts]
    table = {code: colour_of_hex(code) for code in codes}
    groups = Groups(values, bool(options.other))
    return groups, [*codes, *[options.other] * groups.other], table


def jpeg_advice(raster: rasterio.DatasetReader) -> str | None:
    """The line on a label whose file has changed its values."""
    if raster.driver != "JPEG":
        return None
    return (
        f"{raster.name} is a JPEG, which changes values near borders: pixels there are unlabelled, or in "
        "the class of --other; draw or export labels as PNG or GeoTIFF"
    )


def _listed_colours(raster: rasterio.DatasetReader) -> str:
    """The most frequent colours of a picture, by a part of it."""
    source = Source(raster)
    read = [read_picture(source, window).ravel() for window in sample_windows(raster)]
    found = np.concatenate(read)
    values, counts = np.unique(found[found != MISSING], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    more = f" and {len(order) - MOST_LISTED} more" if len(order) > MOST_LISTED else ""
    return ", ".join(f"{value:06x}" for value in values[order[:MOST_LISTED]]) + more
