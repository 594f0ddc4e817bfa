"""Polygons as class labels: which polygon a pixel belongs to, classes by a column."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from rasterio.transform import Affine
from rasterio.windows import Window

from common import MISSING
from common.errors import DatasetError, OptionError, unknown_name
from common.options import split_list, whole_values
from common.vectors import in_pixels, read_vector

if TYPE_CHECKING:
    from geopandas import GeoDataFrame

ReadLabel = Callable[[Window], np.ndarray]  # window -> (H, W) values, MISSING if none


class PolygonClasses(NamedTuple):
    """Polygons on the pixels of an image, and how their values become classes: see ``Label``."""

    read: ReadLabel
    values: list[int] | None
    texts: list[str] | None  # of the column, in class order
    advice: Callable[[], str | None]


def read_polygons(
    source: str, image, column: str | None, asked: str | None
) -> PolygonClasses:
    """Polygons as classes of the pixels whose centre they contain; the last one wins.

    Args:
        source: The file.
        image: The scene.
        column: ``--label_column``.
        asked: ``--label_values``.

    Raises:
        SegmentationError: They cannot be used.
    """
    from rasterio.features import rasterize

    table = read_vector(source)
    values, texts, fill, codes = None, None, 0, np.ones(len(table), np.int64)
    if column:
        fill = MISSING
        codes, values, texts = _column_codes(table, column, asked, source)
    elif asked:
        raise OptionError(
            f"--label_values {asked}: expected --label_column with it, since {source} is a vector "
            "file"
        )
    outlines = in_pixels(table, image, source)
    usable = ~(outlines.isna() | outlines.is_empty)
    outlines, codes = outlines[usable].reset_index(drop=True), codes[usable]
    index = outlines.sindex
    if not len(index.intersection((0, 0, image.width, image.height))):
        raise no_overlap(source, table.crs, image)
    # GDAL burns 32-bit numbers, so it burns row numbers that stand for the codes
    codes = np.concatenate([[fill], codes])

    def read(window: Window) -> np.ndarray:
        shape = (int(window.height), int(window.width))
        left, top = window.col_off, window.row_off
        hits = sorted(index.intersection((left, top, left + shape[1], top + shape[0])))
        if not len(hits):
            return np.full(shape, fill, np.int64)
        shapes = [(outlines[hit], int(hit) + 1) for hit in hits]
        origin = Affine.translation(left, top)
        return codes[rasterize(shapes, shape, 0, transform=origin, dtype="int32")]

    advice = (lambda: None) if column else partial(_column_advice, table, source)
    return PolygonClasses(read, values, texts, advice)


def _column_advice(table: GeoDataFrame, source: str) -> str | None:
    """Which columns of polygons that all become one class may name several."""
    from pandas.api.types import is_numeric_dtype, is_string_dtype

    columns = table.drop(columns=table.geometry.name)
    named = [
        name
        for name in columns
        if is_string_dtype(known := columns[name].dropna())
        and not is_numeric_dtype(known)
        and known.nunique() > 1
    ]
    if not named:
        return None
    return (
        f"all polygons of {source} are class 1, everything else is class 0; for classes by the "
        f"texts of a column name it with --label_column ({', '.join(named[:12])})"
    )


def _column_codes(table: GeoDataFrame, name: str, asked: str | None, source: str):
    """The classes of polygons by a column.

    Returns:
        A code per polygon, ``MISSING`` where there is none; the codes that are classes, in class
        order (None: they are classes already); and their texts, None of a column of numbers.
    """
    import pandas

    if name not in table.columns:
        columns = [column for column in table.columns if column != "geometry"]
        raise unknown_name("--label_column", name, columns)
    column = table[name]
    if pandas.api.types.is_numeric_dtype(column):
        known = column.fillna(0).to_numpy()
        if not np.isfinite(known).all() or (known != np.round(known)).any():
            raise DatasetError(
                f"{source} has fractions or infinities in {name}; classes are whole numbers or texts"
            )
        codes = np.where(column.isna(), MISSING, known).astype(np.int64)
        return codes, whole_values(asked), None
    texts = [None if pandas.isna(text) else str(text) for text in column]
    present = sorted({text for text in texts if text})
    order = split_list(asked) or present
    absent = [text for text in order if text not in texts]
    if absent:
        raise unknown_name("--label_values", absent[0], present)
    numbers = {text: number for number, text in enumerate(order)}
    codes = np.array([numbers.get(text, MISSING) for text in texts])
    return codes, list(range(len(order))), order


def no_overlap(source: str, crs, image) -> DatasetError:
    """The error of a label that lies elsewhere than its image."""
    return DatasetError(
        f"{source} does not overlap {image.name}; check the CRS of both: {crs.to_string()} and "
        f"{image.crs.to_string()}"
    )
