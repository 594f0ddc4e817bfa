"""What the values of a class map stand for: numbers of classes, or with --write_codes their codes.

A code is what the label held for a class before it was numbered: a number, or a text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import rasterio
from rasterio.enums import ColorInterp

from common.colours import Colour
from common.errors import OptionError, RasterError
from common.labels import class_codes_of, class_names_of, class_tags, tag_list
from common.styles import read_class_table
from common.vector_labels import Groups

DTYPES = ("uint8", "uint16", "int16", "int32")  # of a map of codes, the smallest first
VALUES_TAG = "CLASS_VALUES"  # of a map of codes: what it holds for each class


class MapClass(NamedTuple):
    """A class of a map."""

    number: int
    code: int | str
    name: str


@dataclass(frozen=True)
class MapValues:
    """What a map of codes holds for the classes."""

    values: tuple[int, ...]  # in class order
    dtype: str
    nodata: int  # none of the values

    def of_numbers(self, classes: np.ndarray, nodata: int) -> np.ndarray:
        """The values of class numbers (unsigned), among which ``nodata`` is none."""
        table = np.full(nodata + 1, self.nodata, self.dtype)
        table[: len(self.values)] = self.values
        return table[classes]


def values_of_codes(codes: Sequence[int | str]) -> MapValues:
    """The smallest type that holds all codes and a nodata value, its largest that is no code.

    Raises:
        OptionError: Codes that are texts, equal, or too large.
    """
    texts = [code for code in codes if isinstance(code, str)]
    if texts:
        raise OptionError(
            f"--write_codes: a map holds numbers, but codes of the model's classes are texts "
            f"({', '.join(texts[:4])}); leave it out: polygons and attribute table have the codes"
        )
    if len(set(codes)) < len(codes):
        raise OptionError(
            "--write_codes: several classes of the model have one code; leave it out"
        )
    for dtype in DTYPES:
        limits = np.iinfo(dtype)
        fit = limits.min <= min(codes) and max(codes) <= limits.max
        if fit and len(codes) <= limits.max - limits.min:
            taken, nodata = set(codes), limits.max
            while nodata in taken:
                nodata -= 1
            return MapValues(tuple(codes), dtype, int(nodata))
    raise OptionError(
        f"--write_codes: codes from {min(codes)} to {max(codes)} do not fit into 32 bits; leave it "
        "out"
    )


def colours_of_map(dataset: rasterio.DatasetReader) -> dict[int, Colour]:
    """The colours of a map's values: by its colour table, else by its attribute table."""
    if dataset.colorinterp[0] == ColorInterp.palette:
        return {value: colour[:3] for value, colour in dataset.colormap(1).items()}
    table = read_class_table(f"{dataset.name}.aux.xml")
    return {row.value: row.colour for row in table if row.colour}


def class_numbers(pixels: np.ndarray, values: Sequence[int]) -> np.ndarray:
    """The class of each pixel of a map that holds ``values``; ``MISSING`` where it is none."""
    return Groups([(value,) for value in values]).numbers(pixels)


def map_class_tags(
    names: Sequence[str], codes: Sequence[int | str], values: Sequence[int] | None
) -> dict[str, str]:
    """What ``classes_of_map`` reads, as GeoTIFF tags; codes and values where they say more.

    Args:
        names: Of the classes.
        codes: Likewise.
        values: That a map of codes holds; None: the numbers of the classes.
    """
    numbers = list(range(len(names)))
    tags = class_tags(names, codes if list(codes) != numbers else None, None)
    return tags | ({VALUES_TAG: json.dumps(list(values))} if values else {})


def classes_of_map(dataset: rasterio.DatasetReader) -> dict[int, MapClass] | None:
    """Which class each value of a map is: by its tags, else by its attribute table.

    Returns:
        The classes by values, in the order of tags or table; None for a raster that has neither.

    Raises:
        RasterError: Tags or table contradict themselves.
    """
    if names := class_names_of(dataset):
        numbers = list(range(len(names)))
        codes = class_codes_of(dataset) or numbers
        values = tag_list(dataset, VALUES_TAG, (int,)) or numbers
        rows = list(zip(values, numbers, codes, names))
        fine = len(names) == len(codes) == len(values)
    else:
        rows = [row[:4] for row in read_class_table(f"{dataset.name}.aux.xml")]
        fine = len({row[1] for row in rows}) == len(rows)
    if not fine or len({row[0] for row in rows}) < len(rows):
        raise RasterError(
            f"{dataset.name} does not say of each value which class it is: its class names, codes "
            "and values contradict each other; map the scene again"
        )
    return {value: MapClass(*known) for value, *known in rows} or None
