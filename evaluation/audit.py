"""Where labels deserve a second look: the patches of a run, worst first, and contradicted areas."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.colours import Colour
from common.ground import footprint, on_earth, to_one_crs
from common.patches import PatchPair
from common.pictures import save_figure
from common.rasters import open_raster
from common.scores import scores
from common.styles import categorized_style
from common.vectors import add_style, new_geopackage, write_layer
from evaluation.doubt import SHOWN, Contradiction, DoubtCollector, PatchRecord, doubt_of
from evaluation.examples import draw_rows

# shares of the list that have doubts, from its head, by name and colour of the style
LEVELS = (
    ("first 5 %", 0.05, (178, 24, 43)),
    ("first 20 %", 0.20, (244, 165, 130)),
    ("others", 1.0, (146, 197, 222)),
)
TRAINED_ON = "trained on", (217, 217, 217)
NO_LABEL = "no label", (255, 255, 255)
MOST_COLUMNS = 1000  # of classes: a table of a GeoPackage holds 2,000 in all


@dataclass(frozen=True)
class PatchRow:
    """A patch of a run: what the final model finds in it, and what one that never saw it."""

    pair: PatchPair
    split: str
    final: PatchRecord
    unseen: PatchRecord | None  # None where every model trained on it
    fold: int | None = None

    @property
    def doubt(self) -> float | None:
        return self.unseen and doubt_of(self.unseen)

    @property
    def wrong_share(self) -> float | None:
        """Of the labelled pixels, by the final model."""
        labelled = self.final.matrix.sum()
        return float(1 - self.final.matrix.trace() / labelled) if labelled else None


def in_order(rows: Sequence[PatchRow]) -> list[PatchRow]:
    """The most doubtful first; then those without doubt, by their wrong share."""

    def place(row: PatchRow) -> tuple:
        doubt, wrong = row.doubt, row.wrong_share
        return doubt is None, -(doubt or 0), -(wrong or 0), row.pair.name

    return sorted(rows, key=place)


def levels(rows: Sequence[PatchRow]) -> list[str]:
    """The level of each of the ordered rows, as the style colours them."""
    doubtful = sum(row.doubt is not None for row in rows)
    found = []
    for number, row in enumerate(rows):
        if row.doubt is None:
            found.append((NO_LABEL if row.wrong_share is None else TRAINED_ON)[0])
            continue
        found.append(
            next(n for n, share, _ in LEVELS if number < np.ceil(share * doubtful))
        )
    return found


def numbers(values: Iterable[float | None]) -> np.ndarray:
    """A column of numbers also where all of them are unknown: None becomes NaN."""
    return np.array(list(values), float)


def class_columns(
    rows: Sequence[PatchRow], names: Sequence[str], binary: bool
) -> dict[str, np.ndarray]:
    """The IoU of each class in each patch, by the names of the columns."""
    ious = [
        [entry["iou"] for entry in scores(row.final.matrix, names, binary)["per_class"]]
        for row in rows
    ]
    # the number tells names of another case apart
    return {
        f"iou {number} {name}": numbers(values[number] for values in ious)
        for number, name in enumerate(names)
    }


def write_patches(
    target: Path, rows: Sequence[PatchRow], names: Sequence[str], binary: bool
) -> None:
    """Write the patches of a run as polygons, the most doubtful first, coloured by level.

    Scores are of the final model, doubt is of a model that did not train on the patch, empty where
    there is none. The IoU of each class has a column where there are no more than ``MOST_COLUMNS``.
    Patches of several CRS are in that of the first; without a CRS they are in their own coordinates.
    """
    import pandas

    rows = in_order(rows)
    columns: dict[str, Sequence] = {
        "name": [row.pair.name for row in rows],
        "split": [row.split for row in rows],
        "fold": pandas.array([row.fold for row in rows], "Int32"),
        "level": levels(rows),
        "doubt": numbers(row.doubt for row in rows),
        "contradicted": numbers(row.unseen and row.unseen.contradicted for row in rows),
        "wrong_share": numbers(row.wrong_share for row in rows),
    }
    if len(names) <= MOST_COLUMNS:
        columns |= class_columns(rows, names, binary)
    shapes, systems, shares = [], [], []
    for row in rows:
        with open_raster(row.pair.image) as file:
            shapes.append(footprint(file.transform, file.height, file.width))
            systems.append(file.crs)
            shares.append(float(row.final.matrix.sum() / (file.height * file.width)))
    columns["labelled_share"] = shares
    kinds = [*((name, colour) for name, _, colour in LEVELS), TRAINED_ON, NO_LABEL]
    style = categorized_style("level", *zip(*kinds))
    write_one_layer(target, columns, shapes, systems, style)


def write_contradictions(
    target: Path,
    found: Sequence[Contradiction],
    names: Sequence[str],
    colours: Sequence[Colour],
) -> None:
    """Write the contradicted areas as polygons, coloured by the class that the model sees there."""
    found = sorted(found, key=lambda one: -(one.square_metres or 0))
    columns = {
        "patch": [one.pair.name for one in found],
        "given": [names[one.given] for one in found],
        "predicted": [names[one.predicted] for one in found],
        "confidence": numbers(one.confidence for one in found),
        "square_metres": numbers(one.square_metres for one in found),
    }
    systems = []
    for one in found:
        with open_raster(one.pair.image) as file:
            systems.append(file.crs)
    shapes = [one.outline for one in found]
    style = categorized_style("predicted", names, colours)
    write_one_layer(target, columns, shapes, systems, style)


def write_one_layer(
    target: Path, columns: dict, shapes: Sequence, systems: Sequence, style: str
) -> None:
    """Write polygons of several CRS as a GeoPackage of one layer, named after the file.

    It is in the first CRS that lies on the Earth, else in the first. One without a CRS beside others
    that have one, in a local CRS beside others, or off the Earth, gets no outline, since its place is
    unknown.
    """
    import geopandas

    known = [crs for crs in systems if crs is not None]
    first = next(filter(on_earth, known), known[0] if known else None)
    outlines = list(shapes)
    if first is not None:
        outlines = [None] * len(shapes)
        here = [crs is not None and (crs == first or on_earth(crs)) for crs in systems]
        there = np.flatnonzero(here)
        parts = [shapes[n] for n in there], [systems[n] for n in there]
        for number, outline in zip(there, to_one_crs(*parts, first.to_wkt())):
            if np.isfinite(outline.bounds).all():
                outlines[number] = outline
    crs = None if first is None else first.to_wkt()
    table = geopandas.GeoDataFrame(columns, geometry=outlines, crs=crs)
    with new_geopackage(target) as file:
        kind = {"geometry_type": "Polygon"}
        write_layer(table, file, driver="GPKG", layer=target.stem, **kind)
        add_style(file, target.stem, style)


def draw_doubtful(
    target: Path,
    collectors: Sequence[DoubtCollector],
    names: Sequence[str],
    colours: Sequence[Colour],
    ignore_index: int,
) -> None:
    """Draw the most doubtful patches: image, label, prediction and where they differ, a row each."""
    found = [
        (-negative, collector.pairs[number], guess)
        for collector in collectors
        for negative, number, guess in collector.worst
    ]
    found.sort(key=lambda entry: (-entry[0], entry[1].name))
    rows = [(f"doubt {doubt:.2f}", pair, guess) for doubt, pair, guess in found[:SHOWN]]
    title = "labels to look at first, by models that did not train on them"
    figure = draw_rows(rows, "label", names, colours, ignore_index, title)
    if figure is not None:
        save_figure(figure, target)
