"""``--suggest``: the cells of a finished map that are worth labelling next.

A cell is a square of whole pixels, counted from the first pixel of the scene, as extraction without
a grid counts its patches.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rasterio.windows import Window

from common.places import outlines_in
from common.polygons import rows_of_map
from common.rasters import Source, open_raster
from common.styles import categorized_style, ramp_colours
from common.vectors import add_style, append_features, new_geopackage
from prediction.ensemble import cell_side
from prediction.jobs import SceneJob

log = logging.getLogger("semanticseg4eo")

READ_ROWS = 64  # of the map at a time
LEAST_VALID = 0.5  # share of the pixels of a cell
TOUCHING = 0.5  # pixels that a patch may reach into a cell: it only touches it


@dataclass(frozen=True)
class CellMeans:
    """What a map holds in its cells, (rows, columns) of cells each."""

    row: int  # of the first cell, counted from the scene's first pixel
    column: int
    side: int  # in pixels
    score: np.ndarray  # mean uncertainty of the valid pixels
    valid: np.ndarray  # share of the cell
    classes: np.ndarray  # the most frequent one

    def box(self, row, column, inner: float = 0.0) -> tuple:
        """The sides of a cell, or of several, in pixels of the scene, moved inwards: left, top, right, bottom."""
        left, top = (self.column + column) * self.side, (self.row + row) * self.side
        ends = left + self.side, top + self.side
        return (left + inner, top + inner, ends[0] - inner, ends[1] - inner)


def write_suggestions(job: SceneJob, target: Path) -> int:
    """Write the cells of a finished map that are worth labelling next; how many there are."""
    cells = measure_cells(job)
    open_ = (cells.valid >= LEAST_VALID) & ~labelled_cells(job, cells)
    chosen = choose_cells(cells.score, cells.classes, open_, job.config.suggest)
    if len(chosen) < job.config.suggest:
        log.warning(
            "warning: --suggest %d: %s has %s",
            job.config.suggest, job.task.scene, too_few_text(cells, open_, len(chosen)),
        )  # fmt: skip
    ranks = np.arange(1, len(chosen) + 1)
    with new_geopackage(target) as file:
        table = suggestion_table(job, cells, chosen)
        append_features(file, target.stem, table, job.scene.crs)
        colours = ramp_colours(max(2, len(chosen)))[::-1]  # the first is the brightest
        column = 'to_string("rank")'  # QGIS compares texts
        style = categorized_style(column, list(map(str, ranks)), colours[: len(ranks)])
        add_style(file, target.stem, style)
    return len(chosen)


def too_few_text(cells: CellMeans, open_: np.ndarray, count: int) -> str:
    """What a scene has in which fewer cells than asked for were found, and what gives more."""
    if not cells.valid.any():
        return "no valid pixel, so nothing to label"
    half = np.count_nonzero(cells.valid >= LEAST_VALID)
    if half and not open_.any():
        return (
            f"patches of the dataset in all its {half} cells of {cells.side} pixels on valid ground; a "
            "smaller --cell_size gives more only where these patches leave ground free"
        )
    return (
        f"{count} such cells of {cells.side} pixels on valid ground outside of the patches that do "
        "not touch each other; a smaller --cell_size gives more"
    )


def measure_cells(job: SceneJob) -> CellMeans:
    """Means over the cells of a finished map, which is read some rows at a time."""
    side = cell_side(job.config, job.models)
    top, bottom, left, right = job.area.extent
    first, column = top // side, left // side
    cells = (np.arange(left, right) // side - column).astype(np.int64)
    number, rows, classes = cells[-1] + 1, -(-bottom // side) - first, len(job.names)
    sums = np.zeros((rows, number))
    counts = np.zeros((rows, number), np.int64)
    frequent = np.zeros((rows, number), np.int64)
    with ExitStack() as stack:
        opened = stack.enter_context
        read = rows_of_map(
            opened(open_raster(job.task.output)), classes, job.values
        ).read
        raster = opened(open_raster(job.task.beside("_uncertainty.tif")))
        # the disagreement of several models, else the entropy of the one
        uncertainty = Source(raster, [raster.count])
        for row in range(rows):
            begin = max(top, (first + row) * side)
            end = min(bottom, (first + row + 1) * side)
            table = np.zeros(number * classes, np.int64)
            for start in range(begin, end, READ_ROWS):
                stop = min(start + READ_ROWS, end)
                found = read(start - top, stop - top)
                window = Window(0, start - top, right - left, stop - start)
                values = uncertainty.read(window)[0][0]
                valid = found >= 0
                where = np.broadcast_to(cells, found.shape)[valid]
                table += np.bincount(where * classes + found[valid], minlength=table.size)  # fmt: skip
                sums[row] += np.bincount(where, values[valid], number)
            per_class = table.reshape(number, classes)
            counts[row], frequent[row] = per_class.sum(axis=1), per_class.argmax(axis=1)
    score = sums / np.maximum(counts, 1)
    return CellMeans(first, column, side, score, counts / side**2, frequent)


def labelled_cells(job: SceneJob, cells: CellMeans) -> np.ndarray:
    """Which cells have ground in common with a patch of the dataset, whatever its split."""
    import shapely

    held = np.zeros(cells.score.shape, bool)
    stored = [
        checkpoint.metadata.get("places") for checkpoint in job.models.checkpoints
    ]
    found, known = zip(*(outlines_in(places, job.scene.crs) for places in stored))
    if not all(known):
        log.warning(
            "warning: --suggest: %s does not say where all patches of its dataset lie, so suggested "
            "cells may lie on them", job.models.files[known.index(False)],
        )  # fmt: skip
    outlines = [outline for several in found for outline in several]
    places = np.argwhere(cells.valid >= LEAST_VALID)
    if not outlines or not len(places):
        return held
    a, b, c, d, e, f = (~job.scene.transform)[:6]
    turn, origin = np.array([[a, d], [b, e]]), (c, f)
    patches = np.unique(shapely.to_wkb(outlines))  # models of one run have the same
    pixels = shapely.transform(shapely.from_wkb(patches), lambda xy: xy @ turn + origin)
    boxes = shapely.box(*cells.box(*places.T, inner=TOUCHING))
    taken = shapely.STRtree(pixels).query(boxes, predicate="intersects")[0]
    held[tuple(places[taken].T)] = True
    return held


def choose_cells(
    score: np.ndarray, classes: np.ndarray, open_: np.ndarray, count: int
) -> list[tuple[int, int]]:
    """The cells to label next, the first one first.

    The classes take turns, that of the highest score first: each gives the cell with the highest
    score in which it is the most frequent class. A neighbour of a chosen cell, also over a corner,
    is left out.

    Args:
        score: (rows, columns) of cells.
        classes: Likewise, the most frequent one.
        open_: Likewise, which may be chosen.
        count: How many at most.
    """
    rows, columns = np.nonzero(open_)
    order = np.lexsort((columns, rows, -score[rows, columns]))
    waiting: dict[int, list] = {}
    for row, column in zip(rows[order].tolist(), columns[order].tolist()):
        waiting.setdefault(int(classes[row, column]), []).append((row, column))
    queues = {number: iter(places) for number, places in waiting.items()}
    near, chosen = np.zeros(score.shape, bool), []
    while queues and len(chosen) < count:
        for number in list(queues):
            place = next((one for one in queues[number] if not near[one]), None)
            if place is None:
                del queues[number]
                continue
            chosen.append(place)
            row, column = place
            near[max(0, row - 1) : row + 2, max(0, column - 1) : column + 2] = True
            if len(chosen) == count:
                break
    return chosen


def suggestion_table(job: SceneJob, cells: CellMeans, chosen: Sequence) -> dict:
    """The columns of the layer."""
    import shapely

    a, b, c, d, e, f = job.scene.transform[:6]
    turn, origin = np.array([[a, d], [b, e]]), (c, f)
    boxes = np.array([shapely.box(*cells.box(*place)) for place in chosen], object)
    at = tuple(np.array(chosen, int).reshape(-1, 2).T)
    names = [f"r{cells.row + row:03}_c{cells.column + col:03}" for row, col in chosen]
    return {
        "name": np.array(names, object),
        "rank": np.arange(1, len(chosen) + 1),
        "score": cells.score[at],
        "class_name": np.array(job.names, object)[cells.classes[at]],
        "valid_share": cells.valid[at],
        "geometry": shapely.transform(boxes, lambda xy: xy @ turn + origin),
    }
