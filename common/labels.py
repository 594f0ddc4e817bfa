"""Class labels: rasters or polygons on the pixel grid of an image, values, names.

Labels are (H, W) int64 when read; ``MISSING`` marks a pixel without a class.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import rasterio
from rasterio.enums import ColorInterp, Resampling
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window

from common import MISSING, UNLABELLED
from common.colours import Colour, colour_of_hex, hex_of_colour
from common.errors import (
    DatasetError,
    require,
)
from common.label_checks import (
    is_map_of_picture,
    label_nodata_advice,
    require_overlap,
    require_same_pixels,
)
from common.label_options import LabelOptions
from common.label_pictures import is_picture, jpeg_advice, picture_classes, read_picture
from common.label_values import HIGHEST
from common.options import is_legend, split_list
from common.rasters import (
    PICTURES,
    SCENE_SUFFIXES,
    Source,
    has_no_location,
    image_bands,
    open_raster,
    require_georeference,
    same_pixel_grid,
)
from common.sources import require_whole
from common.vector_labels import (
    Groups,
    PolygonClasses,
    ReadLabel,
    groups_of,
    is_drawn,
    read_polygons,
)


def whole_labels(label: np.ndarray, valid: np.ndarray, source: str) -> np.ndarray:
    """Labels as int64; float rasters are accepted when every labelled value is whole.

    Raises:
        DatasetError: A labelled pixel holds a fraction.
    """
    if label.dtype.kind == "f":
        values = label[valid]
        if (values != np.round(values)).any():
            bad = values[values != np.round(values)][0]
            raise DatasetError(
                f"{source} holds {bad:g}, which is not a class; labels are whole numbers"
            )
        # beyond int64 a cast would wrap around
        label = np.clip(np.where(valid, label, 0), -float(HIGHEST), float(HIGHEST))
    return label.astype(np.int64)


def read_label(
    source: Source, unlabelled: int, window: Window | None = None
) -> np.ndarray:
    """A label raster of one band, or a window of it, (H, W) int64; ``unlabelled`` if invalid."""
    label, valid = source.read(window)
    labels = whole_labels(label[0], valid, source.dataset.name)
    return np.where(valid, labels, unlabelled)


def require_one_band(dataset: rasterio.DatasetReader) -> None:
    """Raise DatasetError unless a raster of labels, or a map, has one band (beside alpha)."""
    if len(image_bands(dataset)) != 1:
        raise DatasetError(
            f"{dataset.name} has {dataset.count} bands; a label or a class map has one, with a class "
            "number per pixel"
        )


def class_name_tags(names: Sequence[str]) -> dict[str, str]:
    """Class names as a GeoTIFF tag, which ``class_names_of`` reads."""
    return {"CLASS_NAMES": json.dumps(list(names), ensure_ascii=False)}


def class_tags(
    names: Sequence[str] | None,
    codes: Sequence[int | str] | None,
    colours: Sequence[Colour | None] | None,
) -> dict[str, str]:
    """What is known of the classes of a label patch, as GeoTIFF tags."""
    tags = class_name_tags(names) if names else {}
    if codes:
        tags["CLASS_CODES"] = json.dumps(list(codes), ensure_ascii=False)
    if colours:
        texts = [colour and hex_of_colour(colour) for colour in colours]
        tags["CLASS_COLORS"] = json.dumps(texts)
    return tags


def tag_list(dataset: rasterio.DatasetReader, tag: str, kinds: tuple) -> list | None:
    """A tag that holds a list as JSON; None where there is none, or another program's."""
    try:
        items = json.loads(dataset.tags().get(tag, "null"))
    except json.JSONDecodeError:
        return None
    fine = isinstance(items, list) and all(isinstance(item, kinds) for item in items)
    return items if fine and items else None


def class_names_of(dataset: rasterio.DatasetReader) -> list[str] | None:
    """The class names stored in a label or a map, or None."""
    return tag_list(dataset, "CLASS_NAMES", (str,))


def class_codes_of(dataset: rasterio.DatasetReader) -> list[int | str] | None:
    """The values that classes had before they were numbered, stored in a label patch, or None."""
    return tag_list(dataset, "CLASS_CODES", (int, str))


def class_colours_of(dataset: rasterio.DatasetReader) -> list[Colour | None] | None:
    """The colours of classes stored in a label patch, None for those that nobody gave; or None."""
    texts = tag_list(dataset, "CLASS_COLORS", (str, type(None)))
    return texts and [text and colour_of_hex(text) for text in texts]


def _colour_table(
    raster: rasterio.DatasetReader, classes: list[int] | None
) -> dict[int, Colour]:
    """The colours in a label raster's colour table of values that are, or may be, classes."""
    try:
        entries = raster.colormap(image_bands(raster)[0])
    except ValueError:  # it has none
        return {}
    if classes:  # GDAL makes nodata transparent, which may be named as a class
        return {k: tuple(entries[k][:3]) for k in classes if k in entries}
    return {
        value: tuple(colour[:3])
        for value, colour in entries.items()
        if colour[3] and value != raster.nodata and value < UNLABELLED
    }


def read_classes(label: rasterio.DatasetReader) -> np.ndarray:
    """The classes of a label patch (H, W) int64, negative where unlabelled."""
    classes = read_label(Source(label), MISSING)
    if label.dtypes[0] == "uint8":  # wider ones may have a class of that number
        classes[classes == UNLABELLED] = MISSING
    return classes


@dataclass(frozen=True)
class Label:
    """A label on the image's pixel grid, and how its values become classes."""

    source: str
    read: ReadLabel
    groups: Groups | None  # which values are which class; None: they are class numbers
    names: list[str] | None
    nodata: int | None = None  # declared, though it looks like a class
    advice: Callable[[], list[str | None]] = list  # what the user should know of it
    warped: bool = False  # onto the image's pixels
    codes: Sequence[int | str] | None = None  # values or texts that became classes
    table: dict[int, Colour] = field(default_factory=dict)  # colours by values
    limits: Sequence[tuple[str, int]] = ()  # how many classes which option lists
    texts: list[str] | None = None  # all that the column of a vector label holds

    @property
    def unlabelled(self) -> int:
        """What is written where there is no class: 255, or 65535 past 255 classes."""
        many = self.groups is not None and len(self.groups) > UNLABELLED
        return 65535 if many else UNLABELLED

    @property
    def stored_values(self) -> list[int | list[int]] | None:
        """The values that are classes, in class order, as plain values for JSON."""
        if self.groups is None:
            return None
        return [
            group[0] if len(group) == 1 else list(group) for group in self.groups.values
        ]

    def classes(self, window: Window) -> np.ndarray:
        """The classes of a window, (H, W) uint8 (uint16 past 255 classes).

        Raises:
            DatasetError: Values that are not classes, or more classes than names or colours.
        """
        label = self._numbered(window)
        if self.limits:
            highest = label[label != self.unlabelled].max(initial=0)
            for option, count in self.limits:
                if highest >= count:
                    raise DatasetError(
                        f"{option} {count} classes, but {self.source} holds class {highest}"
                    )
        return label

    def _numbered(self, window: Window) -> np.ndarray:
        label = self.read(window)
        dtype = np.uint8 if self.unlabelled == UNLABELLED else np.uint16
        if self.groups is None:
            label[label == MISSING] = self.unlabelled
            if label.min() < 0 or label.max() > self.unlabelled:
                strange = np.unique(label[(label < 0) | (label > self.unlabelled)])
                raise DatasetError(
                    f"{self.source} holds {', '.join(map(str, strange[:8]))}: classes are 0 to "
                    "254, 255 is unlabelled; name the values that are classes with "
                    "--label_values"
                )
            return label.astype(dtype)
        numbers = self.groups.numbers(label)
        return np.where(numbers == MISSING, self.unlabelled, numbers).astype(dtype)


@contextmanager
def open_label(
    source: str, image: rasterio.DatasetReader, options: LabelOptions
) -> Iterator[Label]:
    """The label of a scene, a raster on any pixel grid or a vector file.

    Args:
        source: The file.
        image: The scene, whose pixel grid the label gets.
        options: What of it is which class.

    Raises:
        SegmentationError: It cannot be used.
    """
    names, limits = options.asked_names, _limits(options)
    is_raster = Path(source).suffix.lower() in (*SCENE_SUFFIXES, *PICTURES)
    for name in ("label_column", "label_crs", "label_buffer"):
        value = getattr(options, name)
        expected = f"a vector label with it, but {source} is a raster"
        require(not value or not is_raster, f"--{name}", value, expected)
    if options.label_column or is_drawn(source):
        drawn = read_polygons(source, image, options)
        yield _polygon_label(source, drawn, options, limits)
        return
    with ExitStack() as stack:
        raster = stack.enter_context(open_raster(source))
        require_whole(source)
        placed = not (has_no_location(image) or is_map_of_picture(image, raster))
        if placed:
            require_georeference(raster)
        else:
            require_same_pixels(image, raster)
        groups, codes, table, named = _raster_classes(raster, options)
        nodata = None if groups else _class_like_nodata(raster)
        lossy = jpeg_advice(raster)
        warped = placed and not same_pixel_grid(image, raster)
        if warped:
            require_overlap(image, raster)
            raster = stack.enter_context(_warped(raster, image, named))
        pixels = Source(raster)
        if named:
            pixels.nodata = [None] * len(pixels.bands)

        def read(window: Window) -> np.ndarray:
            if len(pixels.bands) == 3:
                return read_picture(pixels, window)
            return read_label(pixels, MISSING, window)

        def advice() -> list[str | None]:
            return [label_nodata_advice(source, nodata), lossy]

        yield Label(
            source, read, groups, names, nodata, advice, warped, codes, table, limits
        )  # fmt: skip


def _raster_classes(raster: rasterio.DatasetReader, options: LabelOptions) -> tuple:
    """What of a label raster is which class.

    Returns:
        Its values, codes and colours, for ``Label``; and whether the declared nodata is named as a
        class, which it is then, whatever the file declares.
    """
    nodata = raster.nodata
    if is_picture(raster):
        groups, codes, table = picture_classes(raster, options)
        nodata = nodata and nodata * 0x010101
    else:
        require_one_band(raster)
        groups = groups_of(options)
        if groups and raster.dtypes[0] == "uint8":  # --other does not take 255
            groups = Groups(groups.values, groups.other, (UNLABELLED,))
        codes = class_codes(options, groups)
        table = _colour_table(raster, groups and codes)
    values = [value for group in groups.values for value in group] if groups else []
    return groups, codes, table, nodata is not None and nodata in values


def _polygon_label(
    source: str, drawn: PolygonClasses, options: LabelOptions, limits
) -> Label:
    """The label that polygons are, with classes by a column or inside and outside of them."""
    codes = [0, 1]
    if options.label_column:
        texts = [one.values[0] for one in options.asked_classes] or drawn.texts
        texts = [*(texts or []), *[options.other] * bool(options.other)]
        codes = texts if drawn.texts else class_codes(options, drawn.groups)
    return Label(
        source,
        drawn.read,
        drawn.groups,
        options.asked_names or drawn.texts,
        advice=drawn.advice,
        codes=codes,
        limits=limits,
        texts=drawn.present,
    )


def class_codes(options: LabelOptions, groups: Groups | None) -> list[int] | None:
    """A number for each class: the first of its values, and for ``--other`` one that is free."""
    if groups is None:
        return None
    codes = [group[0] for group in groups.values]
    taken = {value for group in groups.values for value in group}
    free = next(number for number in range(len(taken) + 1) if number not in taken)
    return [*codes, *[free] * groups.other]


def _limits(options: LabelOptions) -> list[tuple[str, int]]:
    """How many classes the options list, with the words for it."""
    colours = options.class_colors or ""
    names = options.asked_names if options.class_names else None  # --other with them
    lists = {
        "--class_names names": names or [],
        "--class_colors colours": [] if is_legend(colours) else split_list(colours),
    }
    return [(words, len(items)) for words, items in lists.items() if items]


def _warped(raster, image, nodata_is_class: bool) -> WarpedVRT:
    """A label raster on the pixel grid of an image."""
    alpha = ColorInterp.alpha in raster.colorinterp
    masked = alpha or (raster.nodata is not None and not nodata_is_class)
    options = {} if masked else {"add_alpha": True}
    if nodata_is_class:
        options |= {"src_nodata": None, "nodata": None}
    return WarpedVRT(
        raster,
        crs=image.crs,
        transform=image.transform,
        width=image.width,
        height=image.height,
        resampling=Resampling.nearest,
        **options,
    )


def _class_like_nodata(raster: rasterio.DatasetReader) -> int | None:
    """The declared nodata value of a label where it could be the number of a class."""
    value = raster.nodata
    fine = value is not None and 0 <= value < UNLABELLED and value == int(value)
    return int(value) if fine else None
