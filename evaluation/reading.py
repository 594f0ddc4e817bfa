"""A map and its labels read strip by strip as classes: memory does not grow with the map."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import rasterio
from rasterio.windows import Window
from tqdm import tqdm

from common import MISSING, UNLABELLED
from common.errors import DatasetError
from common.interruption import until_stopped
from common.labels import Label, read_label
from common.rasters import Source, open_raster
from common.vector_labels import is_drawn
from evaluation.classes import (
    MOST_CLASSES,
    Classes,
    Pairing,
    numbers_of,
    stored_classes,
)

log = logging.getLogger("semanticseg4eo")

STRIP_PIXELS = 2**22  # that are read at once


def row_strips(height: int, width: int, multiple: int, halo: int) -> Iterator[tuple]:
    """Rows of a raster from top to bottom, with those around them.

    Args:
        height: Of the raster, and ``width``.
        width: See ``height``.
        multiple: The rows of a strip are a multiple of this, but for the last.
        halo: Rows to read above and below, where there are some.

    Yields:
        The window to read, and which of its rows are those of the strip.
    """
    rows = max(1, STRIP_PIXELS // (width * multiple)) * multiple
    for top in range(0, height, rows):
        bottom = min(height, top + rows)
        first, last = max(0, top - halo), min(height, bottom + halo)
        yield Window(0, first, width, last - first), slice(top - first, bottom - first)


def progress(items: list, what: str) -> Iterator:
    """The items of a loop, with a bar where it lasts."""
    return until_stopped(
        tqdm(items, what, unit="strip", leave=False, disable=None, delay=2)
    )


def classes_of_map(raster: rasterio.DatasetReader) -> Classes:
    """The classes of a map: those that it describes, else the values that it holds."""
    known = stored_classes(raster)
    if known:
        return known
    source = Source(raster)
    log.info("%s names no classes: they are its values", raster.name)
    return Classes.numbered(
        _values_of(
            lambda window: read_label(source, MISSING, window),
            raster,
            "reading the map",
            f"{raster.name} holds more than {MOST_CLASSES} values; is it a map of classes?",
        )
    )


def classes_of_label(label: Label, raster) -> tuple[Classes, list[int] | None]:
    """The classes of labels by the numbers that ``read_numbers`` gives, and their codes.

    Args:
        label: On the pixels of a map.
        raster: The map.
    """
    codes = label.codes if label.groups is not None else None
    if label.groups is not None or label.names:
        names = label.names or [str(code) for code in codes]
        known = Classes(
            list(range(len(names))), list(names), names != list(map(str, codes or []))
        )
        if codes and not all(
            isinstance(code, int) for code in codes
        ):  # texts are names
            return replace(known, named=True), None
        return known, codes and list(codes)
    stored = None
    if not is_drawn(label.source):
        with open_raster(label.source) as file:
            stored = stored_classes(file)
    if stored is None:
        stored = Classes.numbered(
            _values_of(
                lambda window: read_numbers(label, window),
                raster,
                "reading labels",
                f"{label.source} holds more than {MOST_CLASSES} values; is it a raster of classes? "
                "name those that count in --label_values",
            )
        )
    return stored, None


def _values_of(read, raster, what: str, too_many: str) -> set[int]:
    """The values that a raster or its labels hold; ``too_many`` is the error where they do."""
    found: set[int] = set()
    for window, _ in progress(list(row_strips(*raster.shape, 1, 0)), what):
        found |= set(np.unique(read(window)).tolist()) - {MISSING}
        if len(found) > MOST_CLASSES:
            raise DatasetError(too_many)
    return found


def read_numbers(label: Label, window: Window) -> np.ndarray:
    """The labels of a window, (H, W) int64: numbers of classes, or values; else MISSING."""
    if label.groups is None:
        values = label.read(window)
        return np.where(values == UNLABELLED, MISSING, values)
    classes = label.classes(window).astype(np.int64)
    return np.where(classes == label.unlabelled, MISSING, classes)


def read_guess(source: Source, window: Window, mapped: Classes) -> np.ndarray:
    """The classes of a map in a window, (H, W) int16; -1 where it has none."""
    pixels, valid = source.read(window)
    if pixels.dtype.kind == "f":
        pixels = read_label(source, MISSING, window)[None]
    guess = numbers_of(pixels[0], mapped.values)
    guess[~valid] = -1
    if (strange := valid & (guess < 0)).any():
        values = ", ".join(map(str, np.unique(pixels[0][strange])[:8]))
        raise DatasetError(
            f"{source.dataset.name} holds {values}, which its attribute table or class names do not "
            "list; is it a map of classes?"
        )
    return guess


def read_truth(label: Label, window: Window, labelled: Classes, pairing: Pairing):
    """The classes of labels in a window as those of ``pairing.names``, (H, W) int16; -1 of none."""
    numbers = read_numbers(label, window)
    places = (
        numbers_of(numbers, labelled.values) if labelled.values else numbers * 0 - 1
    )
    if (strange := (places < 0) & (numbers != MISSING)).any():
        values = ", ".join(map(str, np.unique(numbers[strange])[:8]))
        raise DatasetError(
            f"{label.source} holds {values}, which its attribute table or class names do not list; "
            "name the values that are classes in --label_values"
        )
    return np.array([*pairing.of_label, -1], np.int16)[places]


def statistics_of_map(path: str) -> tuple[Path, dict | None]:
    """The report that a prediction writes beside its map: where it would be, and what it holds.

    Raises:
        DatasetError: It is there and cannot be read.
    """
    beside = Path(path).with_name(f"{Path(path).stem}_statistics.json")
    if not beside.is_file():
        return beside, None
    try:
        found = json.loads(beside.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DatasetError(
            f"{beside} is no readable report of a map; move it"
        ) from error
    if not isinstance(found, dict):
        raise DatasetError(f"{beside} is no readable report of a map; move it")
    return beside, found
