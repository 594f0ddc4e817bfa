"""``Patch/cells.gpkg``: the cells of a dataset, with what the grid holds of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common import SPLITS
from common.styles import categorized_style
from common.vectors import add_style, write_layer
from extraction.journal import class_counts
from extraction.places import SPLIT_COLOURS
from extraction.scenes import ScenePlan

if TYPE_CHECKING:
    from geopandas import GeoSeries
    from pandas import DataFrame, Series

RESERVED = ("fid", "geom", "geometry")  # what a GeoPackage, or geopandas, calls its own


def write_cells(
    path: Path, cells: GeoSeries, report: dict, plans: Sequence[ScenePlan]
) -> None:
    """The cells of the patches as a GeoPackage, coloured by split: shares, the grid's columns."""
    import geopandas

    records = report["patches"]
    pixels = class_counts(records)
    names = report["class_names"] or [""] * pixels.shape[1]
    columns = {
        key: [r[key] for r in records]
        for key in ("name", "scene", "split", "valid_share")
    }
    shares = np.zeros((len(records), len(names)))
    shares[:, : pixels.shape[1]] = pixels / pixels.sum(axis=1, keepdims=True)
    # the number keeps names apart that differ in case only
    columns |= {f"share {k} {n}".strip(): shares[:, k] for k, n in enumerate(names)}
    held = grid_columns(plans, columns["name"])
    if held is not None:
        columns |= storable_columns(held, columns)
    table = geopandas.GeoDataFrame(columns, geometry=cells.to_numpy(), crs=cells.crs)
    path.unlink(missing_ok=True)  # of a run that ended before it was published
    write_layer(table, path, driver="GPKG", layer="cells")
    colours = [SPLIT_COLOURS[split] for split in SPLITS]
    add_style(path, "cells", categorized_style("split", SPLITS, colours))


def grid_columns(plans: Sequence[ScenePlan], names: Sequence[str]) -> DataFrame | None:
    """What the grids hold of some cells, a row per cell; None where there is no grid."""
    import pandas

    tables = [
        plan.columns.set_axis([cell.name for cell in plan.cells])
        for plan in plans
        if plan.columns is not None
    ]
    if not tables:
        return None
    found = tables[0] if len(tables) == 1 else pandas.concat(tables)
    return found.loc[list(names)]


def storable_columns(table: DataFrame, taken: Iterable[str]) -> dict[str, Series]:
    """The columns of a grid as a GeoPackage takes them beside others.

    Args:
        table: A row per cell.
        taken: Names of other columns, which in a GeoPackage no case tells apart.

    Returns:
        Values by name, ``grid_NAME`` where the name is taken.
    """
    known = {name.lower() for name in (*taken, *RESERVED)}
    found = {}
    for column, values in table.items():
        name = str(column)
        while name.lower() in known:
            name = f"grid_{name}"
        known.add(name.lower())
        found[name] = storable(values).to_numpy()
    return found


def storable(values: Series) -> Series:
    """A column as a type that a GeoPackage has: numbers, dates, else texts."""
    import pandas

    values = values.astype(object).infer_objects()
    if values.dtype.kind == "u":
        return values.astype("int64")
    if values.dtype.kind in "ifbM":
        return values

    def text(value) -> str | None:
        if pandas.api.types.is_scalar(value) and pandas.isna(value):
            return None
        return str(value)

    return values.map(text)
