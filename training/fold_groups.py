"""Folds by what ``Patch/cells.gpkg`` says of patches: their scene, or a column of the grid."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from common.errors import DatasetError
from common.ground import pairs_within
from common.patches import PatchPair, patch_root
from common.vectors import find_column, read_vector
from training.settings import TrainingConfig

if TYPE_CHECKING:
    from geopandas import GeoSeries

log = logging.getLogger("semanticseg4eo")


def value_groups(config: TrainingConfig, pairs: Sequence[PatchPair]) -> np.ndarray:
    """The number, 0, 1..., of the value that each patch has in the column of the folds.

    Raises:
        OptionError: No such column.
        DatasetError: No ``cells.gpkg``, a patch that it does not know or without a value, or fewer
            values than folds.
    """
    import pandas

    option = "--fold_by scene"
    if config.fold_column is not None:
        option = f"--fold_column {config.fold_column}"
    path = patch_root(config.dataset_root) / "cells.gpkg"
    if not path.is_file():
        raise DatasetError(
            f"{option}: no {path}, which the extraction writes; extract again, or give --fold_by block"
        )
    table = read_vector(str(path))
    column = find_column(table, f"--fold_column of {path}", config.fold_values)
    name = find_column(table, f"column of {path}", "name")
    known = dict(zip(table[name], table[column]))
    values = [known.get(pair.name) for pair in pairs]
    empty = [p.name for p, value in zip(pairs, values) if pandas.isna(value)]
    if empty:
        raise DatasetError(
            f"{option}: {path} holds no {column} of {len(empty)} of {len(pairs)} patches, as "
            f"{empty[0]}; extract again with a grid whose column is filled"
        )
    found, groups = np.unique([str(value) for value in values], return_inverse=True)
    if len(found) < config.n_splits:
        raise DatasetError(
            f"{option}: the patches for training and validation have {len(found)} different "
            f"values, fewer than --n_splits {config.n_splits}; lower it"
        )
    log.info("%s: %d different values", option, len(found))
    return groups


def report_shared_ground(
    config: TrainingConfig, groups: np.ndarray, footprints: GeoSeries | None
) -> None:
    """Log how many patches share ground with one of another value, where none is dropped for it."""
    if config.buffer or footprints is None:
        return
    shared = len(np.unique(pairs_within(footprints, groups, 0)))
    if shared:
        what = config.fold_column or "scene"
        log.warning(
            "%d of %d patches share ground with a patch of another %s: the scores hold for another "
            "%s of these places, not for new places",
            *(shared, len(groups), what, what),
        )
