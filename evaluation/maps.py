"""A map compared with labels: counts, scores, intervals by blocks."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
from rasterio.windows import Window

from common.architectures import are_binary
from common.colours import Colour, complete_colours
from common.errors import DatasetError, RasterError, require
from common.ground import pixel_sides, pixel_size
from common.labels import Label, open_label, require_one_band
from common.legends import asked_colours
from common.map_classes import colours_of_map
from common.rasters import (
    PICTURES,
    Source,
    open_raster,
    require_georeference,
    same_pixel_grid,
)
from common.scores import scores
from evaluation.boundaries import BoundaryScores
from evaluation.classes import (
    Classes,
    Pairing,
    pair_classes,
    pairing_lines,
)
from evaluation.matrices import block_bootstrap
from evaluation.reading import (
    classes_of_label,
    classes_of_map,
    progress,
    read_guess,
    read_truth,
    row_strips,
    statistics_of_map,
)
from evaluation.reliability import Reliability
from evaluation.settings import EvaluationConfig, reach_in_pixels

log = logging.getLogger("semanticseg4eo")

BLOCKS = 10  # along the longer side of a map, by default
MOST_BLOCKS = 10_000
PICTURE_SIDE = 1000  # of the map in the picture of errors


@dataclass
class Comparison:
    """What a map and its labels have in common."""

    names: list[str]
    colours: list[Colour]
    binary: bool
    matrices: np.ndarray  # (G, K, K) of each block, rows are truth
    boundaries: BoundaryScores
    reliability: Reliability | None
    thumbnails: dict[str, np.ndarray]  # "map" and "label", (h, w) int16; negative: none
    unmapped: int = 0  # labelled pixels without a class in the map


def compare(config: EvaluationConfig) -> tuple[dict, Comparison]:
    """Compare a map with its labels.

    Returns:
        The report as plain numbers for JSON, and what it is made from.

    Raises:
        SegmentationError: They cannot be compared.
    """
    with open_both(config) as (raster, label):
        for line in filter(None, label.advice()):
            log.info(line)
        mapped = classes_of_map(raster)
        labelled, codes = classes_of_label(label, raster)
        pairing = pair_classes(mapped, labelled, codes)
        for line in pairing_lines(mapped, labelled, pairing):
            log.info(line)
        metres = pixel_size(raster)
        side = block_side(config.block_size, raster, metres)
        reach = reach_in_pixels(config.boundary_tolerance, pixel_sides(raster))
        boundaries = BoundaryScores(len(pairing.names), reach)
        classes = mapped, labelled, pairing
        colours = colours_of(raster, classes, config.class_colors, label.codes)
        with open_confidence(config.map, raster) as confidence:
            found = count_pixels(
                raster, label, classes, colours, side, boundaries, confidence
            )
    if not found.matrices.any():
        raise DatasetError(
            f"No pixel of {config.map} with a class is labelled in {config.label}; check the CRS of "
            "both, --label_values, and what they declare as nodata"
        )
    missing = set(range(len(mapped.names))) - set(pairing.of_label)
    report = {
        "map": config.map,
        "label": config.label,
        "classes_met_by": pairing.kind,
        "only_in_labels": found.names[len(mapped.names) :],
        "only_in_map": [mapped.names[number] for number in sorted(missing)],
        "block_size_pixels": side,
        "block_size_metres": None if metres is None else side * metres,
    }
    return report | measures(found, metres, config.seed), found


@contextmanager
def open_both(
    config: EvaluationConfig,
) -> Iterator[tuple[rasterio.DatasetReader, Label]]:
    """The map and, on its pixels, its labels.

    Raises:
        SegmentationError: They cannot be used, or labels need the place of a map that has none.
    """
    with open_raster(config.map) as raster:
        require_one_band(raster)
        if Path(config.label).suffix.lower() not in PICTURES:
            require_georeference(raster)
        with open_label(config.label, raster, config) as label:
            yield raster, label


def measures(found: Comparison, metres: float | None, seed: int) -> dict:
    """The scores of a comparison, with intervals by blocks, as plain numbers for JSON."""
    names, binary, matrices = found.names, found.binary, found.matrices
    matrix = matrices.sum(axis=0)
    intervals = block_bootstrap(matrices, lambda one: scores(one, names, binary), seed)
    report = {
        "blocks": int(matrices.any(axis=(1, 2)).sum()),
        "labelled_pixels": int(matrix.sum()),
        "labelled_without_map": found.unmapped,
        **scores(matrix, names, binary),
        "intervals": intervals,
        "boundary": found.boundaries.report(names, metres),
    }
    if found.reliability:
        report["calibration"] = found.reliability.report()
    return report


def colours_of(
    raster, classes: tuple[Classes, Classes, Pairing], asked: str | None, codes
) -> list[Colour]:
    """A colour for each class: by ``--class_colors`` of the labels, else those of the map.

    Args:
        raster: The map.
        classes: Those of the map, of the labels, and which are the same.
        asked: The option.
        codes: What the classes of the labels are in their file.
    """
    mapped, labelled, pairing = classes
    table = colours_of_map(raster)
    known = [table.get(value) for value in mapped.values]
    known += [None] * (len(pairing.names) - len(known))
    if asked:
        given = asked_colours(asked, labelled.names, codes)
        for place, colour in zip(pairing.of_label, given):
            known[place] = colour or known[place]
    return complete_colours(known, pairing.names)


def block_side(asked: float | None, raster, metres: float | None) -> int:
    """The side in pixels of the blocks of ``--block_size``."""
    longest = max(raster.shape)
    if asked is None:
        return math.ceil(longest / BLOCKS)
    known = metres is not None
    require(
        known,
        "--block_size",
        asked,
        "none, since pixels of this map have no known size",
    )
    side = min(longest, max(1, round(asked / metres)))
    blocks = math.ceil(raster.height / side) * math.ceil(raster.width / side)
    most = f"a larger value, since it makes {blocks} blocks, more than {MOST_BLOCKS}"
    require(blocks <= MOST_BLOCKS, "--block_size", asked, most)
    return side


@contextmanager
def open_confidence(path: str, raster) -> Iterator[Source | None]:
    """The confidence that lies beside a map; None where there is none, or it is of other classes.

    Raises:
        RasterError: It lies on other pixels than the map.
    """
    beside = Path(path).with_name(f"{Path(path).stem}_confidence.tif")
    if not beside.is_file():
        yield None
        return
    _, statistics = statistics_of_map(path)
    settings = (statistics or {}).get("settings") or {}
    if settings.get("save_confidence") is False:
        log.info(
            "%s is of an earlier map, by its statistics: no calibration is computed",
            beside,
        )
        yield None
        return
    if settings.get("sieve"):
        log.info(
            "%s is of the classes before --sieve: no calibration is computed", beside
        )
        yield None
        return
    with open_raster(beside) as file:
        if not same_pixel_grid(file, raster):
            raise RasterError(
                f"{beside} is not on the pixels of {path}; move or remove it"
            )
        yield Source(file)


def count_pixels(
    raster: rasterio.DatasetReader,
    label: Label,
    classes: tuple[Classes, Classes, Pairing],
    colours: list[Colour],
    side: int,
    boundaries: BoundaryScores,
    confidence: Source | None,
) -> Comparison:
    """Count the pixels of a map by what it says and what the labels say.

    Args:
        raster: The map.
        label: On its pixels.
        classes: Those of the map, of the labels, and which are the same.
        colours: Theirs.
        side: Of the blocks, in pixels.
        boundaries: What counts those.
        confidence: That of the map.
    """
    names, count = classes[2].names, len(classes[2].names)
    height, width = raster.shape
    down, across = math.ceil(height / side), math.ceil(width / side)
    step = math.ceil(max(height, width) / PICTURE_SIDE)
    found = Comparison(
        names,
        colours,
        are_binary(names),
        np.zeros((down * across, count, count), np.int64),
        boundaries,
        Reliability() if confidence else None,
        {},
    )
    pictures = {"map": [], "label": []}
    source = Source(raster)
    strips = list(row_strips(height, width, step, boundaries.halo))
    for window, rows in progress(strips, "comparing"):
        guess = read_guess(source, window, classes[0])
        truth = read_truth(label, window, *classes[1:])
        boundaries.add(guess, truth, rows)
        guess, truth = guess[rows], truth[rows]
        top = int(window.row_off) + rows.start
        _count_blocks(found.matrices, guess, truth, top, side, across)
        found.unmapped += int(((truth >= 0) & (guess < 0)).sum())
        if confidence:
            inner = Window(0, top, width, len(guess))
            _count_confidence(found.reliability, confidence, inner, guess, truth)
        for name, array in (("map", guess), ("label", truth)):
            pictures[name].append(thumbnail(array, step))
    found.thumbnails = {name: np.concatenate(parts) for name, parts in pictures.items()}
    return found


def _count_blocks(matrices, guess, truth, top: int, side: int, across: int) -> None:
    """Add rows of a map to the confusion matrices of their blocks."""
    count = matrices.shape[1]
    known = (guess >= 0) & (truth >= 0)
    row, column = np.nonzero(known)
    first = top // side
    last = (top + len(guess) - 1) // side
    block = ((top + row) // side - first) * across + column // side
    flat = (block * count + truth[known]) * count + guess[known]
    part = matrices[first * across : (last + 1) * across]
    part += np.bincount(flat, minlength=part.size).reshape(part.shape)


def _count_confidence(reliability, confidence: Source, window, guess, truth) -> None:
    values, valid = confidence.read(window)
    counted = valid & (guess >= 0) & (truth >= 0)
    values = values[0][counted]
    if len(values) and not (0 <= values.min() and values.max() <= 1):
        raise RasterError(
            f"{confidence.dataset.name} holds values outside of 0 to 1, which are no confidence; "
            "move or remove it"
        )
    reliability.count(values, (guess == truth)[counted])


def thumbnail(array: np.ndarray, step: int) -> np.ndarray:
    """Every ``step``-th pixel of (H, W), or the largest around it where that one is negative.

    So that a few labelled pixels are seen.
    """
    height, width = (math.ceil(side / step) * step for side in array.shape)
    padded = np.full((height, width), -1, array.dtype)
    padded[: array.shape[0], : array.shape[1]] = array
    cells = padded.reshape(height // step, step, width // step, step)
    chosen = cells[:, step // 2, :, step // 2]
    return np.where(chosen >= 0, chosen, cells.max(axis=(1, 3)))
