"""Splits that the user has: named by a column of the grid, or by a test area."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from common import SPLITS
from common.errors import DatasetError
from common.ground import to_one_crs
from common.vectors import find_column, polygonal, read_vector
from extraction.journal import Skipped, patch_footprint
from extraction.scenes import ScenePlan
from extraction.settings import ExtractionOptions

if TYPE_CHECKING:
    from geopandas import GeoSeries
    from pandas import DataFrame

log = logging.getLogger("semanticseg4eo")

SPLIT_WORDS = dict(
    zip(
        SPLITS,
        (
            ("train", "training", "tr"),
            ("validation", "valid", "val", "dev"),
            ("test", "testing", "te"),
        ),
    )
)


def column_splits(
    plans: Sequence[ScenePlan], config: ExtractionOptions
) -> dict[str, str]:
    """The splits that ``--split_column`` names, by the names of the cells.

    Raises:
        OptionError: A grid has no such column.
        DatasetError: A cell with another word than those of ``SPLIT_WORDS``.
    """
    if config.split_column is None:
        return {}
    given, cells = {}, 0
    for plan in plans:
        splits = _splits_of(plan.columns, plan, config.split_column)
        given |= splits
        cells += len(plan.cells)
    text = "--split_column %s names the split of %d of %d cells"
    log.info(text, config.split_column, len(given), cells)
    return given


def _splits_of(columns: DataFrame, plan: ScenePlan, asked: str) -> dict[str, str]:
    """The splits of the cells of a scene that the column ``asked`` names."""
    import pandas

    name = find_column(columns, f"--split_column of {plan.scene.grid}", asked)
    by_word = {word: split for split, words in SPLIT_WORDS.items() for word in words}
    found = {}
    for cell, value in zip(plan.cells, columns[name]):
        text = "" if pandas.isna(value) else str(value).strip()
        if not text:
            continue
        if text.lower() not in by_word:
            raise DatasetError(
                f"{plan.scene.grid}: cell {cell.name} has {text[:80]!r} in {name}, expected "
                f"{', '.join(by_word)} or nothing"
            )
        found[cell.name] = by_word[text.lower()]
    return found


def read_area(path: str | None) -> GeoSeries | None:
    """The polygons of ``--test_area``, in their own CRS; None without it.

    Raises:
        DatasetError: It cannot be read, or has no polygons.
    """
    if path is None:
        return None
    import geopandas

    table = read_vector(path)
    polygons = [one for one in map(polygonal, table.geometry) if one is not None]
    if not polygons:
        raise DatasetError(f"--test_area {path} has no polygons; draw some into it")
    return geopandas.GeoSeries(polygons, crs=table.crs)


def divide_by_area(
    found: Sequence[tuple[ScenePlan, dict]],
    area: GeoSeries,
    skipped: dict[str, Skipped],
    config: ExtractionOptions,
) -> tuple[list[tuple[ScenePlan, dict]], dict[str, str]]:
    """Which patches have their centre in a test area; others that touch it are left out.

    Args:
        found: The scene and the record of each patch.
        area: Polygons.
        skipped: Receives those that are left out.
        config: The options.

    Returns:
        ``found`` without them, and the split of those inside, by name.

    Raises:
        DatasetError: All patches lie inside or touch it, or none lies inside.
    """
    import shapely
    from pyproj.exceptions import ProjError

    shapes = np.array([patch_footprint(record, config) for _, record in found])
    systems = [plan.crs for plan, _ in found]
    try:
        centres = to_one_crs(shapely.centroid(shapes), systems, area.crs)
        cells = to_one_crs(shapes, systems, area.crs).to_numpy()
    except ProjError as error:
        raise DatasetError(
            f"--test_area {config.test_area} cannot be brought to the CRS of the cells: {error}"
        ) from error
    # neighbours along a border touch it, whatever a projection leaves between them
    grown = shapely.buffer(cells, 1e-3 * np.sqrt(shapely.area(cells)))
    inside = set(area.sindex.query(centres, predicate="intersects")[0].tolist())
    touching = set(area.sindex.query(grown, predicate="intersects")[0].tolist())
    if not inside:
        raise DatasetError(
            f"No cell has its centre in --test_area {config.test_area}; check where its polygons "
            f"lie, and their CRS ({area.crs.to_string()})"
        )
    if len(inside | touching) == len(found):
        raise DatasetError(
            f"All {len(found)} cells lie in --test_area {config.test_area} or touch it; for a "
            "dataset of one split give --test_ratio 1 instead"
        )
    names = [record["name"] for _, record in found]
    for index in touching - inside:
        skipped[names[index]] = Skipped("touches --test_area")
    kept = [i for i in range(len(found)) if i in inside or i not in touching]
    return [found[i] for i in kept], {names[i]: "test" for i in sorted(inside)}
