"""The options that say what of a label is which class."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from common.errors import require
from common.label_values import ClassValues, parse_label_values, parse_names
from common.options import class_colors_setting, require_colour_count, setting


@dataclass(frozen=True, kw_only=True)
class LabelOptions:
    """What of a label is which class, and what the classes are called."""

    label_values: str | None = setting(
        None,
        "label values (texts of --label_column, colours of a picture) that are classes, in class "
        "order: 1=water,5+6=forest,9 merges 5 and 6, and names; @FILE has a class a line; all "
        "others become unlabelled",
        "labels",
        shown="the label holds 0, 1, 2...",
    )
    other: str | None = setting(
        None,
        "name of a last class of all other values; nodata, empty texts and ground outside of all "
        "polygons stay unlabelled",
        "labels",
        shown="no such class",
    )
    label_column: str | None = setting(
        None,
        "column of a vector label that holds the class; outside its polygons is unlabelled",
        "labels",
        shown="every polygon is class 1, everything else class 0",
    )
    label_crs: str | None = setting(
        None, "CRS of the columns x and y of a CSV label, as EPSG:32633", "labels",
        shown="longitude and latitude in degrees",
    )  # fmt: skip
    label_buffer: float = setting(
        0.0,
        "metres around points and lines that have their class",
        "labels",
        least=0,
    )
    class_names: str | None = setting(
        None,
        "names in class order, separated by commas; they go with the patches to the map",
        "labels",
        shown="those in --label_values, else its values, or the texts of --label_column",
    )
    class_colors: str | None = class_colors_setting(
        "labels", "those of the label's colour table, else of a palette"
    )

    def __post_init__(self):
        if hasattr(super(), "__post_init__"):  # settings that these are a part of
            super().__post_init__()
        classes, names = (
            self.asked_classes,
            parse_names(self.class_names, "--class_names"),
        )
        values, other = self.label_values, self.other
        require(not other or classes, "--other", other, "--label_values with it")
        fine = not classes or len(classes) + bool(other) >= 2
        require(fine, "--label_values", values, "at least two classes")
        twice = any(other == one.title for one in classes)
        require(not twice, "--other", other, "a name that no other class has")
        both = bool(names) and any(one.name for one in classes)
        require(
            not both, "--class_names", self.class_names, "no names in --label_values"
        )
        fine = not (classes and names) or len(classes) == len(names)
        expected = f"{len(classes)} names, as many as --label_values"
        require(fine, "--class_names", self.class_names, expected)
        require(other not in names, "--other", other, "a name that no other class has")
        if count := len(classes or names) + bool(other):
            require_colour_count(self.class_colors, count)

    @cached_property
    def asked_classes(self) -> list[ClassValues]:
        """``--label_values``, without ``--other``."""
        return parse_label_values(self.label_values) if self.label_values else []

    @property
    def asked_names(self) -> list[str] | None:
        """The names of the classes by ``--class_names`` and ``--label_values``; None without."""
        names = parse_names(self.class_names, "--class_names")
        names = names or [one.title for one in self.asked_classes]
        return [*names, *[self.other] * bool(self.other)] or None
