"""Polygons, lines and points as class labels: which one a pixel belongs to, classes by a column."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from rasterio.transform import Affine
from rasterio.windows import Window

from common import MISSING
from common.errors import DatasetError, OptionError, require, unknown_name
from common.label_options import LabelOptions
from common.label_values import ClassValues, whole_numbers
from common.point_tables import buffer_points, has_areas, is_point_table, read_points
from common.shapefiles import ASSUMED
from common.vectors import in_pixels, is_vector, polygonal, read_vector

if TYPE_CHECKING:
    from geopandas import GeoDataFrame, GeoSeries

ReadLabel = Callable[[Window], np.ndarray]  # window -> (H, W) values, MISSING if none


class Groups(NamedTuple):
    """Which values of a label are which class."""

    values: list[tuple[int, ...]]  # of each class, in class order
    other: bool = False  # the class after these is all other values
    none: tuple[int, ...] = ()  # values that no class has even so

    def __len__(self) -> int:
        return len(self.values) + self.other

    def numbers(self, label: np.ndarray) -> np.ndarray:
        """The class of each value, int64; ``MISSING`` where it is none."""
        if label.dtype in (np.uint8, np.uint16):  # a table is 10 times as fast
            return self.numbers(np.arange(np.iinfo(label.dtype).max + 1))[label]
        pairs = sorted((v, n) for n, group in enumerate(self.values) for v in group)
        values, numbers = np.array(pairs, np.int64).T
        index = np.searchsorted(values, label).clip(max=len(values) - 1)
        rest = len(self.values) if self.other else MISSING
        rest = np.where(np.isin(label, (MISSING, *self.none)), MISSING, rest)
        return np.where(values[index] == label, numbers[index], rest)


class PolygonClasses(NamedTuple):
    """Polygons on the pixels of an image, and how their values become classes: see ``Label``."""

    read: ReadLabel
    groups: Groups | None
    texts: list[str] | None  # of the column, in class order
    present: list[str] | None  # all texts that the column holds
    advice: Callable[[], list[str | None]]


def is_drawn(source: str) -> bool:
    """Whether a label is a vector file or a CSV table of points, by its suffix."""
    return is_vector(source) or is_point_table(source)


def read_drawn(source: str, image, options: LabelOptions) -> GeoDataFrame:
    """Polygons, or points and lines with the ground around them.

    Raises:
        SegmentationError: They cannot be used, or the options do not fit them.
    """
    crs, metres = options.label_crs, options.label_buffer
    if is_point_table(source):
        table = read_points(source, crs)
    else:
        table = read_vector(source)
        fine = crs is None
        require(fine, "--label_crs", crs, f"a CSV label with it, which {source} is not")
    if has_areas(table):
        fine = f"points or lines with it, but {source} has polygons alone"
        require(not metres, "--label_buffer", metres, fine)
    elif not options.label_column:
        columns = table.columns.drop(table.geometry.name)
        raise OptionError(
            f"{source} has points or lines, which say nothing of the ground beside them; name the "
            f"column of their class with --label_column ({', '.join(map(str, columns[:12]))})"
        )
    return buffer_points(table, metres, image) if metres else table


def read_polygons(source: str, image, options: LabelOptions) -> PolygonClasses:
    """Polygons as classes of the pixels whose centre they contain, lines and points of those that
    they touch; the last one wins.

    Args:
        source: The file.
        image: The scene.
        options: Which column and values are which class.

    Raises:
        SegmentationError: They cannot be used.
    """
    from rasterio.features import rasterize

    column, table = options.label_column, read_drawn(source, image, options)
    groups, texts, present = None, None, None
    fill, codes = 0, np.ones(len(table), np.int64)
    if column:
        fill = MISSING
        codes, groups, texts, present = _column_codes(table, column, options, source)
    elif options.label_values:
        raise OptionError(
            f"--label_values {options.label_values}: expected --label_column with it, since "
            f"{source} is a vector file"
        )
    outlines = in_pixels(table, image, source, cut=True)
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

    def advice() -> list[str | None]:
        if not column:
            return [_column_advice(table, source)]
        lines = [
            _encoding_advice(table, column, source),
            _spelling_advice(table, column, source),
        ]
        kinds = codes[1:] if groups is None else groups.numbers(codes[1:])
        near = index.intersection((0, 0, image.width, image.height))
        hidden, areas = hidden_areas(outlines, kinds, np.sort(near), image.shape)
        words = texts or options.asked_names
        return [*lines, _overlap_advice(hidden, areas, kinds, words, source)]

    return PolygonClasses(read, groups, texts, present, advice)


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


def _encoding_advice(table: GeoDataFrame, column: str, source: str) -> str | None:
    """Which encoding of the texts of a column had to be assumed."""
    if table.attrs.get("encoding") != ASSUMED:
        return None
    foreign = [text for text in map(str, table[column].dropna()) if not text.isascii()]
    if not foreign:
        return None
    return (
        f"{source} does not say how its texts are encoded; read as {ASSUMED} {column} holds "
        f"{foreign[0]!r}; if that is garbled, write the right encoding, as CP1252, into a .cpg file "
        "beside it"
    )


def _spelling_advice(table: GeoDataFrame, column: str, source: str) -> str | None:
    """Which texts of a column differ by case or blanks alone."""
    alike: dict[str, list[str]] = {}
    counts = Counter(str(text) for text in table[column].dropna())
    for text in sorted(counts):
        plain = unicodedata.normalize("NFKC", text).casefold()
        alike.setdefault("".join(plain.split()), []).append(text)
    groups = [
        " and ".join(f"{text!r} ({counts[text]} polygons)" for text in texts)
        for texts in alike.values()
        if len(texts) > 1
    ]
    if not groups:
        return None
    more = f", and {len(groups) - 4} more" if len(groups) > 4 else ""
    return (
        f"names in {column} of {source} differ by case or blanks alone and are different classes: "
        f"{', '.join(groups[:4])}{more}; write them alike in the file if they mean one class"
    )


def hidden_areas(
    outlines: GeoSeries, kinds: np.ndarray, near: np.ndarray, shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Which part of each polygon later polygons of other classes cover.

    Args:
        outlines: Polygons (P,) in pixels, in the order of the file.
        kinds: The class of each (P,); ``MISSING`` is none.
        near: The numbers of those that may lie in the image.
        shape: Height and width of the image.

    Returns:
        Pixels hidden and pixels in all, of each polygon (P,); those that lie in the image.
    """
    import shapely

    frame = shapely.box(0, 0, shape[1], shape[0])
    hidden, areas = np.zeros((2, len(kinds)))
    shapes = [
        polygonal(outline) if np.isfinite(outline.bounds).all() else None
        for outline in outlines.iloc[near]
    ]
    shapes = shapely.intersection(np.array(shapes, object), frame)
    areas[near] = np.nan_to_num(shapely.area(shapes))
    first, later = shapely.STRtree(shapes).query(shapes, predicate="intersects")
    kind = kinds[near]
    covered = (first < later) & (kind[first] != kind[later]) & (kind[first] != MISSING)
    first, later = first[covered], later[covered]
    shared = shapely.intersection(shapes[first], shapes[later])
    first, shared = first[shapely.area(shared) > 0], shared[shapely.area(shared) > 0]
    order = np.argsort(first, kind="stable")
    numbers, starts = np.unique(first[order], return_index=True)
    for number, parts in zip(numbers, np.split(shared[order], starts[1:])):
        hidden[near[number]] = shapely.area(shapely.union_all(parts))
    return hidden, areas


def _overlap_advice(
    hidden: np.ndarray,
    areas: np.ndarray,
    kinds: np.ndarray,
    texts: list[str] | None,
    source: str,
) -> str | None:
    """How much ground each class loses to later polygons of other classes; see ``hidden_areas``."""
    if hidden.sum() < 1:
        return None
    losses = {}
    for kind in np.unique(kinds[hidden > 0]):
        lost, whole = hidden[kinds == kind].sum(), areas[kinds == kind].sum()
        losses[texts[kind] if texts else str(kind)] = lost / whole
    listed = sorted(losses.items(), key=lambda item: -item[1])
    told = ", ".join(f"{name} {share:.1%}" for name, share in listed[:12])
    return (
        f"polygons of different classes overlap in {source}, where the later one in the file "
        f"counts: about {hidden.sum():,.0f} pixels are covered so, of the classes {told} of their "
        "ground; cut the polygons or change their order if that is wrong"
    )


def _column_codes(
    table: GeoDataFrame, name: str, options: LabelOptions, source: str
) -> tuple[np.ndarray, Groups | None, list[str] | None, list[str] | None]:
    """The classes of polygons by a column.

    Returns:
        A code per polygon, ``MISSING`` where there is none; which codes are which class (None: they
        are classes already); their texts, and all that the column holds, None of one of numbers.
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
        return codes, groups_of(options), None, None
    texts = [None if pandas.isna(text) else str(text) for text in column]
    present = sorted({text for text in texts if text and text.strip()})
    order = options.asked_classes or [ClassValues((text,)) for text in present]
    numbers = {text: number for number, one in enumerate(order) for text in one.values}
    rest = dict.fromkeys(present, len(order)) if options.other else {}
    codes = np.array([(rest | numbers).get(text, MISSING) for text in texts])
    titles = [*(one.title for one in order), *[options.other] * bool(options.other)]
    return codes, Groups([(number,) for number in range(len(titles))]), titles, present


def require_texts(options: LabelOptions, held: Sequence[list[str] | None]) -> None:
    """Raise OptionError where ``--label_values`` names a text that none of some labels holds.

    Args:
        options: What is which class.
        held: The texts that each label holds; None of one without texts.
    """
    if None in held:
        return
    present = {text for texts in held for text in texts}
    asked = [text for one in options.asked_classes for text in one.values]
    if absent := [text for text in asked if text not in present]:
        raise unknown_name("--label_values", absent[0], sorted(present))


def groups_of(options: LabelOptions) -> Groups | None:
    """Which whole numbers are which class by ``--label_values``; None without.

    Raises:
        OptionError: They are no whole numbers.
    """
    asked = options.asked_classes
    return Groups(whole_numbers(asked), bool(options.other)) if asked else None


def no_overlap(source: str, crs, image) -> DatasetError:
    """The error of a label that lies elsewhere than its image."""
    return DatasetError(
        f"{source} does not overlap {image.name}; check the CRS of both: {crs.to_string()} and "
        f"{image.crs.to_string()}"
    )
