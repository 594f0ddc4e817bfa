"""The classes of a map and of its labels, and which of them are the same."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import rasterio

from common.architectures import BINARY_NAMES, default_class_names
from common.errors import DatasetError
from common.map_classes import class_numbers, classes_of_map
from common.styles import read_categories
from common.text import listed

MOST_CLASSES = 255  # of a map and its labels together


@dataclass(frozen=True)
class Classes:
    """Classes of a raster or of labels: the value of each pixel of one, and its name."""

    values: list[int]
    names: list[str]
    named: bool  # by somebody, and not by its number alone
    codes: tuple[int | str, ...] = ()  # in the labels of the training, where known

    @classmethod
    def numbered(cls, values: Iterable[int]) -> Classes:
        """Classes that are known by their numbers alone."""
        numbers = sorted(map(int, values))
        return cls(numbers, [str(number) for number in numbers], False)


class Pairing(NamedTuple):
    """Which classes of a map and its labels are the same."""

    kind: str  # by "name" or by "number"
    names: list[str]  # the map's classes, then those of the labels alone
    of_label: list[int]  # the place in ``names`` of each class of the labels


def stored_classes(raster: rasterio.DatasetReader) -> Classes | None:
    """The classes that a raster describes itself: by tags, attribute table or category names."""
    known = classes_of_map(raster) or {}
    found = {value: one.name for value, one in known.items()}
    codes = tuple(one.code for one in known.values())
    if not found:
        names = read_categories(f"{raster.name}.aux.xml")
        found = {number: name for number, name in enumerate(names) if name}
    if not found:
        return None
    values, names = list(found), list(found.values())
    defaults = default_class_names(len(names)), BINARY_NAMES, list(map(str, values))
    return Classes(values, names, names not in defaults, codes)


def pair_classes(
    mapped: Classes, label: Classes, codes: Sequence[int] | None
) -> Pairing:
    """Which classes are the same: those of equal names, else those of equal numbers.

    Where neither side has names, what stands for them are numbers of two kinds, and no names.

    Args:
        mapped: Of the map.
        label: Of the labels, whose values are the numbers that they are read as.
        codes: What those numbers stand for in the file, if that is something else; these count
            where the map's values are codes too.

    Raises:
        DatasetError: Both have names, and not one in common; or there are too many.
    """
    if len(mapped.names) > MOST_CLASSES:
        raise DatasetError(
            f"The map has {len(mapped.names)} classes; one of more than {MOST_CLASSES} cannot be "
            "compared with labels, but a sample of it can be drawn (--sample)"
        )
    plain = [_plain_names(classes.names) for classes in (mapped, label)]
    if any(
        len(set(names)) < len(names) for names in plain
    ):  # they differ by case alone
        plain = [mapped.names, label.names]
    kind, ours, theirs = "name", *plain
    unnamed = not (mapped.named or label.named)
    if unnamed or not set(ours) & set(theirs):
        if mapped.named and label.named:
            raise DatasetError(
                f"The map's classes ({_listed(mapped.names)}) and those of the labels "
                f"({_listed(label.names)}) have no name in common; name the labels as the map does"
            )
        are_codes = codes and mapped.values != list(range(len(mapped.values)))
        kind, ours, theirs = (
            "number",
            mapped.values,
            list(codes if are_codes else label.values),
        )
    place = {key: number for number, key in enumerate(ours)}
    names, of_label = list(mapped.names), []
    for key, name in zip(theirs, label.names):
        if key not in place:
            place[key] = len(names)
            names.append(name)
        of_label.append(place[key])
    if min(of_label, default=0) >= len(mapped.names):
        raise DatasetError(
            f"The map's classes ({_listed([str(value) for value in mapped.values])}) and the values of "
            f"the labels ({_listed(label.names)}) have none in common; give --label_values as in the "
            "extraction, or with the map's names, as 11=water,12=forest"
        )
    if len(names) > MOST_CLASSES:
        raise DatasetError(
            f"The map and the labels hold {len(names)} classes, more than {MOST_CLASSES}; are both "
            "rasters of classes? name those of the labels in --label_values"
        )
    return Pairing(kind, names, of_label)


def pairing_lines(mapped: Classes, label: Classes, pairing: Pairing) -> list[str]:
    """What to say of the pairs: how they meet, and what only one side has."""
    pairs = [
        name if name == pairing.names[place] else f"{name} = {pairing.names[place]}"
        for name, place in zip(label.names, pairing.of_label)
        if place < len(mapped.names)
    ]
    lines = [
        f"classes of labels and map meet by {pairing.kind}: {_listed(pairs) or 'none'}"
    ]
    missing = set(range(len(mapped.names))) - set(pairing.of_label)
    for where, names in (
        ("the map", [pairing.names[place] for place in sorted(missing)]),
        ("the labels", pairing.names[len(mapped.names) :]),
    ):
        if names:
            lines.append(
                f"only {where} can hold {_listed(names)}, which counts as wrong"
            )
    if pairing.kind == "number" and len(pairing.names) > len(mapped.names):
        lines.append(
            "where the extraction had --label_values, the labels need the same here"
        )
    return lines


def numbers_of(pixels: np.ndarray, values: Sequence[int]) -> np.ndarray:
    """The place in ``values`` of each pixel's value, -1 of others; as int16."""
    return np.maximum(class_numbers(pixels, values), -1).astype(np.int16)


def _plain_names(names: Sequence[str]) -> list[str]:
    return [name.strip().casefold() for name in names]


def _listed(names: Sequence[str]) -> str:
    more = f", and {len(names) - 24} more" if len(names) > 24 else ""
    return listed(names[:24]) + more
