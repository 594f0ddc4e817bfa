"""Accuracies and areas of a map from the points of a random sample that somebody has labelled."""

from __future__ import annotations

import csv
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas

from common.errors import DatasetError, OptionError, unknown_name
from common.files import atomic_write
from common.ground import pixel_areas
from common.labels import require_one_band
from common.rasters import Source, open_raster, require_georeference
from common.vectors import file_and_layer, in_pixels, is_vector, read_vector
from evaluation.classes import Classes
from evaluation.estimation import LEAST, StratifiedSample, error_matrix, estimate
from evaluation.reading import classes_of_map, read_guess
from evaluation.sampling import count_classes
from evaluation.settings import EvaluationConfig

log = logging.getLogger("semanticseg4eo")

REFERENCE = "reference"  # the column, where none is named
OWN_OPTIONS = {"map", "label", "label_column", "output", "overwrite"}
ALIKE = 1.01  # ratio of the areas of pixels up to which they count as equal


class Labelled(NamedTuple):
    """The points of a sample, on a map."""

    strata: np.ndarray  # (n,) place in ``stratum_names``
    stratum_names: list[str]
    sizes: np.ndarray  # (H,) pixels, by the weights of all points or as noted
    mapped: np.ndarray  # (n,) class of the map, -1 of none
    reference: np.ndarray  # (n,) place in ``names``, -1 where there is none
    names: list[str]  # the map's classes, then those of references alone
    rows: np.ndarray  # (n,) of the map


def is_sample(source: str) -> bool:
    """Whether a label is a sample that ``--sample`` has drawn: points with stratum and weight."""
    if (
        not is_vector(source)
        or Path(source.partition("|")[0]).suffix.lower() == ".parquet"
    ):
        return False
    from pyogrio import list_layers, read_info
    from pyogrio.errors import DataSourceError

    file, layer = file_and_layer(source)
    try:
        layers = [name for name, kind in list_layers(file) if kind]
        found = [set(read_info(file, layer=name)["fields"]) for name in layers]
    except DataSourceError:
        return False  # reported where it is read
    wanted = [known for name, known in zip(layers, found) if layer in (None, name)]
    return len(wanted) == 1 and {"stratum", "weight"} <= wanted[0]


def estimate_map(config: EvaluationConfig) -> dict:
    """Estimate accuracies and areas of a map from a labelled sample.

    Returns:
        The report as plain numbers for JSON.

    Raises:
        SegmentationError: Map or sample cannot be used.
    """
    for item in fields(config):
        given = getattr(config, item.name) != item.default
        if given and item.name not in OWN_OPTIONS:
            raise OptionError(
                f"--{item.name} changes nothing here: {config.label} is a sample"
            )
    with open_raster(config.map) as raster:
        require_one_band(raster)
        require_georeference(raster)
        mapped = classes_of_map(raster)
        labelled = read_sample(config, raster, mapped)
        pixels, hectares = count_classes(raster, mapped)
        areas = pixel_areas(raster)
    same = by_class(labelled, mapped.names, pixels)
    sample = with_reference(labelled, areas, same)
    if same and hectares is not None:
        total = float(hectares.sum())
    else:
        total = sampled_area(config.label)
    if total is None:
        log.info("%s does not say which area it is of: areas are shares", config.label)
    found = estimate(sample, total)
    for entry, name in zip(found["per_class"], labelled.names):
        place = entry["class"]
        there = place < len(pixels)
        entry["name"] = name
        entry["mapped_share"] = float(pixels[place] / pixels.sum()) if there else 0.0
        if total is not None:
            known = hectares is not None
            entry["mapped_ha"] = (
                float(hectares[place] if there else 0) if known else None
            )
    strata = list(zip(labelled.stratum_names, labelled.sizes.tolist(), sample.points))
    return {
        "map": config.map,
        "sample": config.label,
        "strata": "classes of the map" if same else "of another map",
        "points": len(sample.strata),
        "points_without_reference": len(labelled.strata) - len(sample.strata),
        "points_outside_map": int((sample.mapped < 0).sum()),
        "strata_with_few_points": [
            name for name, size, count in strata if count < min(LEAST, size)
        ],
        "per_stratum": [
            {"name": name, "pixels": size, "points": int(count)}
            for name, size, count in strata
        ],
        **found,
        "matrix": error_matrix(sample),
    }


def with_reference(
    labelled: Labelled, areas: np.ndarray | None, same: bool
) -> StratifiedSample:
    """The points that have a reference.

    Args:
        labelled: All points.
        areas: (H,) square metres of a pixel in each row of the map; None where unknown.
        same: Whether the strata are the map's classes.

    Raises:
        DatasetError: The area of a point's pixel is unknown.
    """
    known = labelled.reference >= 0
    weights = np.ones(int(known.sum()))
    if areas is not None and areas.max() > ALIKE * areas.min():  # as in degrees
        rows = labelled.rows[known]
        if rows.min() < 0 or rows.max() >= len(areas):
            raise DatasetError(
                "Points of the sample lie north or south of the map, whose pixels differ in size: "
                "what such a point counts is unknown; give a map that covers all of them"
            )
        weights = areas[rows] / areas.mean()
    return StratifiedSample(
        labelled.strata[known],
        labelled.sizes,
        labelled.mapped[known],
        labelled.reference[known],
        weights,
        len(labelled.names),
        same,
    )


def read_sample(config: EvaluationConfig, raster, mapped: Classes) -> Labelled:
    """The points of a sample with what the map and the reference say of them.

    Raises:
        SegmentationError: It cannot be read, or a value of it cannot be used.
    """
    table = read_vector(config.label)
    column = config.label_column or REFERENCE
    if column not in table.columns:
        raise unknown_name(
            "--label_column", column, list(table.columns.drop("geometry"))
        )
    if not (table.geom_type == "Point").all():
        raise DatasetError(
            f"{config.label} holds other things than points; give a sample as drawn"
        )
    weight = pandas.to_numeric(table["weight"], errors="coerce").to_numpy(float)
    bad = ~np.isfinite(weight) | (weight <= 0) | table["stratum"].isna().to_numpy()
    if bad.any():
        raise DatasetError(
            f"{config.label} has {bad.sum()} points without a weight or stratum; draw the sample "
            "again, and change the column of references alone"
        )
    places = in_pixels(table, raster, config.label)
    rows, columns = (
        np.floor(axis.to_numpy()).astype(int) for axis in (places.y, places.x)
    )
    names, reference = read_references(table[column], mapped, config.label)
    stratum_names = list(dict.fromkeys(table["stratum"].astype(str)))
    strata = table["stratum"].astype(str).map(stratum_names.index).to_numpy()
    sizes = np.round(np.bincount(strata, weight)).astype(np.int64)
    noted = noted_of(config.label).get("STRATA", "{}")
    without = {n: c for n, c in json.loads(noted).items() if n not in stratum_names}
    stratum_names += without  # that got no point
    sizes = np.array([*sizes, *without.values()], np.int64)
    plain = [name.casefold() for name in mapped.names]
    if {name.casefold() for name in stratum_names} <= set(plain):  # in the map's order
        order = np.array([plain.index(name.casefold()) for name in stratum_names])
        strata = order[strata]
        sizes = np.bincount(order, sizes, len(plain)).astype(np.int64)
        stratum_names = list(mapped.names)
    guess = classes_at(raster, mapped, rows, columns)
    if not (reference >= 0).any():
        raise DatasetError(
            f"No point of {config.label} has a {column}; fill that column in, as in QGIS"
        )
    return Labelled(strata, stratum_names, sizes, guess, reference, names, rows)


def read_references(
    column, mapped: Classes, source: str
) -> tuple[list[str], np.ndarray]:
    """The classes that references name, by name, code or number, in any case.

    Returns:
        The map's classes and, after them, those that it lacks; the place of each reference in
        these, -1 where it is empty.

    Raises:
        SegmentationError: A text that is nearly the name of a class, a number that is none, or one
            that is the code of a class and the map's number of another.
    """
    values = {str(value): number for number, value in enumerate(mapped.values)}
    codes = {_plain_text(code): number for number, code in enumerate(mapped.codes)}
    plain = {name.strip().casefold(): n for n, name in enumerate(mapped.names)}
    place = codes | values | plain
    names, more, found = list(mapped.names), Counter(), []
    for value in column:
        text = _plain_text(value)
        kinds = {known[text] for known in (codes, values) if text in known}
        if len(kinds) == 2 and text not in plain:
            raise DatasetError(
                f"{source}: the reference {value} is the code of {names[codes[text]]}, but the map's "
                f"number of {names[values[text]]}; write the names of the classes"
            )
        if text and text not in place:
            number = text.replace("-", "").replace(".", "").isdigit()
            if number or get_close_matches(text, place, n=1, cutoff=0.8):
                raise unknown_name(f"reference in {source}", str(value), mapped.names)
            place[text] = len(names)
            names.append(str(value).strip())
        if text and place[text] >= len(mapped.names):
            more[names[place[text]]] += 1
        found.append(place[text] if text else -1)
    if more:
        listed = ", ".join(f"{name} ({count} points)" for name, count in more.items())
        log.warning("the map has no class %s, which counts as missed", listed)
    return names, np.array(found)


def _plain_text(value) -> str:
    """A reference as text in lower case; "" where it is empty."""
    if pandas.isna(value):
        return ""
    if isinstance(value, float) and value == int(value):
        value = int(value)  # a column of numbers with gaps
    return str(value).strip().casefold()


def classes_at(
    raster, mapped: Classes, rows: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    """The map's class of some pixels, -1 where it has none."""
    from rasterio.windows import Window

    source, guess = Source(raster), np.full(len(rows), -1)
    inside = (
        (rows >= 0) & (rows < raster.height) & (columns >= 0) & (columns < raster.width)
    )
    for row in np.unique(rows[inside]):
        here = np.flatnonzero(inside & (rows == row))
        line = read_guess(source, Window(0, int(row), raster.width, 1), mapped)[0]
        guess[here] = line[columns[here]]
    return guess


def by_class(labelled: Labelled, names: Sequence[str], pixels: np.ndarray) -> bool:
    """Whether the strata of a sample are the classes of the map; logs what speaks against it."""
    if labelled.stratum_names != list(names):
        return False
    alike = (labelled.strata == labelled.mapped).all()
    sizes = (labelled.sizes == pixels).all()
    if alike and not sizes:
        log.warning(
            "the weights of the points do not add up to the pixels of the map's classes: were "
            "points removed? leave them in, with an empty reference"
        )
    return bool(alike and sizes)


def sampled_area(source: str) -> float | None:
    """The hectares of the map that a sample was drawn from, which its file notes, or None."""
    noted = noted_of(source)
    return float(noted["HECTARES"]) if "HECTARES" in noted else None


def noted_of(source: str) -> dict[str, str]:
    """What the file of a sample notes of the map that it was drawn from."""
    from pyogrio import read_info

    file, layer = file_and_layer(source)
    info = read_info(file, **({"layer": layer} if layer else {}))
    return info.get("layer_metadata") or {}


COLUMNS = ("share", "area_ha", "users_accuracy", "producers_accuracy")


def write_table(target: Path, report: dict) -> None:
    """The estimates as CSV: a row per class and one of the overall accuracy."""
    head = ["class", "mapped_share", "mapped_ha"]
    for name in (*COLUMNS, "overall_accuracy"):
        head += [name, f"{name}_standard_error", f"{name}_low", f"{name}_high"]
    rows = [{"class": "all"} | _cells("overall_accuracy", report["overall_accuracy"])]
    for entry in report["per_class"]:
        row = {"class": entry["name"], "mapped_share": entry["mapped_share"],
               "mapped_ha": entry.get("mapped_ha")}  # fmt: skip
        for name in COLUMNS:
            row |= _cells(name, entry.get(name))
        rows.append(row)
    with (
        atomic_write(target) as part,
        open(part, "w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, head)
        writer.writeheader()
        writer.writerows([*rows[1:], rows[0]])


def _cells(name: str, estimate: dict | None) -> dict:
    if estimate is None:
        return {}
    low, high = estimate["interval_95"] or (None, None)
    return {name: estimate["value"], f"{name}_standard_error": estimate["standard_error"],
            f"{name}_low": low, f"{name}_high": high}  # fmt: skip
