"""Splits that the user has: those that a column of the grid names."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from common import SPLITS
from common.errors import DatasetError
from common.vectors import find_column
from extraction.scenes import ScenePlan
from extraction.settings import ExtractionOptions

if TYPE_CHECKING:
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
