"""Masks: rasters that say which pixels of a scene are invalid, read onto the scene's pixels."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from typing import Self
from xml.etree.ElementTree import Element, SubElement, tostring

import numpy as np
import rasterio
from rasterio.crs import CRS
from rasterio.enums import ColorInterp, MaskFlags, Resampling
from rasterio.transform import Affine
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window

from common.coarsening import Place, largest_within, mean_count
from common.errors import RasterError, require
from common.ground import covered_share, pixel_sides
from common.mask_options import Mask, MaskRule
from common.text import some_of

VALID, CLOUD, FILL = 0, 1, 2  # what a pixel of a mask means; a buffer grows only clouds
SQUARE = 1.01  # the longer side of a pixel that counts as square, in the shorter one's lengths
LARGER = 1.02  # pixels of the mask in one of the scene: fewer are one, up to rounding
WHOLE = 0.999  # a share of a scene that is all of it: half a pixel of a coarse mask may be missing


def classify(values: np.ndarray, rule: MaskRule) -> np.ndarray:
    """What pixels mean by a rule: VALID, CLOUD (whatever is masked) or FILL, uint8."""
    if rule.keep is not None:
        return np.where(np.isin(values, rule.keep), VALID, CLOUD).astype(np.uint8)
    if rule.bits:
        values = values.astype(np.int64)
        masked = values & sum(1 << bit for bit in rule.bits) != 0
        fill = values & sum(1 << bit for bit in rule.fill_bits) != 0
    else:
        masked, fill = np.isin(values, rule.values), np.isin(values, rule.fill_values)
    meaning = masked.astype(np.uint8)
    meaning[fill] = FILL
    return meaning


def grown(cloud: np.ndarray, reach: tuple[float, float]) -> np.ndarray:
    """Pixels (H, W) whose centre is near that of one that is set.

    Args:
        cloud: (H, W) bool.
        reach: How near, in pixels across and in pixels down.
    """
    across, down = reach
    if max(reach) < 1 or not cloud.any():
        return cloud
    if max(reach) < SQUARE * min(reach):
        import cv2  # ten times as fast

        clear, size = (~cloud).astype(np.uint8), math.sqrt(across * down)
        away = cv2.distanceTransform(clear, cv2.DIST_L2, cv2.DIST_MASK_PRECISE) / size
    else:
        from scipy.ndimage import distance_transform_edt

        away = distance_transform_edt(~cloud, sampling=(1 / down, 1 / across))
    return away <= 1.005  # metres of a projection are true to half a percent


def has_own_mask(mask: rasterio.DatasetReader) -> bool:
    """Whether a raster has a mask band, in it or in a file beside it, or an alpha band."""
    flags = {flag for band in mask.mask_flag_enums for flag in band}
    return MaskFlags.per_dataset in flags or ColorInterp.alpha in mask.colorinterp


def extent_vrt(mask: rasterio.DatasetReader) -> str:
    """A VRT, as XML, of a raster's pixels and nothing in them."""
    size = {"rasterXSize": str(mask.width), "rasterYSize": str(mask.height)}
    root = Element("VRTDataset", size)
    SubElement(root, "SRS").text = mask.crs.to_wkt()
    place = ",".join(map(repr, mask.transform.to_gdal()))
    SubElement(root, "GeoTransform").text = place
    SubElement(root, "VRTRasterBand", dataType="Byte", band="1")
    return tostring(root, "unicode")


def warped_onto(place, source: rasterio.DatasetReader) -> WarpedVRT:
    """A raster on the pixels of a place, nearest neighbour, with what says where it has none."""
    # nodata is looked up apart
    return WarpedVRT(
        source, crs=place.crs, transform=place.transform, width=place.width, height=place.height,
        resampling=Resampling.nearest, src_nodata=None, nodata=None,
        add_alpha=ColorInterp.alpha not in source.colorinterp, tolerance=0.125,
    )  # fmt: skip


@dataclass
class MaskReader:
    """A mask read onto the pixels of a scene.

    A pixel of the scene is what the nearest pixel of the mask is; where the mask has smaller ones,
    all that lie in it count, since the scene's pixel holds a part of what each of them shows.
    What the mask declares as nodata is invalid, unless the rule names the value, and so is what a
    mask or an alpha band of its own masks; pixels beyond its edge are valid. The shares of both are
    counted over what was read. It is open from the start, and closed at the end of a ``with`` block,
    or when it goes.

    Raises:
        RasterError: It cannot be read, has no CRS, or lacks a band.
    """

    path: str
    rule: MaskRule
    crs: CRS
    transform: Affine  # of the scene
    size: tuple[int, int]  # width, height of the scene
    bands: Sequence[int] = (1,)
    # pixels by which clouds grow, across and down
    buffer: tuple[float, float] = (0.0, 0.0)
    name: str = ""  # in messages, where it is not the path
    counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("pixels", "masked", "beyond"), 0)
    )

    def __post_init__(self):
        self.name = self.name or self.path
        try:
            self.source = rasterio.open(self.path)
        except rasterio.errors.RasterioIOError as error:
            raise RasterError(f"Cannot read the mask {self.name}: {error}") from error
        problem = self._problem()
        if problem:
            self.source.close()
            raise RasterError(f"The mask {self.name} {problem}")
        place = self.place
        self.warped = self.edge = warped_onto(place, self.source)
        self.opened = [self.warped, self.source]
        self.own = None  # the mask on its own pixels, where these are smaller
        if mean_count(place, self.source) > LARGER:
            self.own = warped_onto(self.source, self.source)
            self.opened.insert(0, self.own)
        if has_own_mask(self.source):  # which hides where the edge is
            extent = rasterio.open(extent_vrt(self.source))
            self.edge = warped_onto(place, extent)
            self.opened = [self.edge, extent, *self.opened]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        for dataset in self.opened:
            dataset.close()

    def _problem(self) -> str | None:
        source = self.source
        if source.crs is None:
            return "has no CRS; assign one (gdal_edit.py -a_srs)"
        if max(self.bands) > source.count:
            return f"has {source.count} bands, expected {max(self.bands)}"
        kinds = {np.dtype(source.dtypes[band - 1]).kind for band in self.bands}
        if self.rule.bits and not kinds <= {"i", "u"}:
            return "does not hold whole numbers, which have bits; give --mask_values"
        return None

    @property
    def place(self) -> Place:
        """The pixels of the scene."""
        return Place(self.crs, self.transform, *self.size)

    @property
    def width(self) -> int:
        """Of the scene, as its ``crs`` and ``transform``."""
        return self.size[0]

    @property
    def height(self) -> int:
        return self.size[1]

    @cached_property
    def covered(self) -> float:
        """The share of the scene that lies within the mask's edge."""
        return covered_share(self, self.source)

    def read(
        self,
        window: Window,
        out_shape: tuple[int, int] | None = None,
    ) -> np.ndarray:
        """The valid pixels (H, W) bool of a window of the scene.

        Args:
            window: Whole pixels within the scene.
            out_shape: Rows and columns that the window is thinned to, without a buffer.
        """
        if out_shape is not None:
            return self._meaning(window, out_shape)[0] == VALID
        across, down = map(math.ceil, self.buffer)
        left = max(0, window.col_off - across)
        top = max(0, window.row_off - down)
        right = min(self.size[0], window.col_off + window.width + across)
        bottom = min(self.size[1], window.row_off + window.height + down)
        meaning, inside = self._meaning(Window(left, top, right - left, bottom - top))
        cloud = grown(meaning == CLOUD, self.buffer)
        invalid = cloud | (meaning == FILL)
        rows = slice(window.row_off - top, window.row_off - top + window.height)
        columns = slice(window.col_off - left, window.col_off - left + window.width)
        invalid, inside = invalid[rows, columns], inside[rows, columns]
        self.counts["pixels"] += invalid.size
        self.counts["masked"] += int(invalid.sum())
        self.counts["beyond"] += int((~inside).sum())
        return ~invalid

    def _meaning(
        self, window: Window, out_shape: tuple[int, int] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """What the pixels of a window mean, and the centre of which lies within the mask."""
        where = {"window": window, "out_shape": out_shape}
        try:
            inside = self.edge.read_masks(1, **where) > 0
            if self.own and out_shape is None:
                return self._worst(window), inside
            meaning = self._classified(self.warped, **where)
        except rasterio.errors.RasterioIOError as error:
            raise RasterError(f"Cannot read the mask {self.name}: {error}") from error
        meaning[~inside] = VALID
        return meaning, inside

    def _classified(self, mask: WarpedVRT, **where) -> np.ndarray:
        """What the pixels of a part of the mask mean, on whichever grid."""
        found = [np.uint8(VALID)]
        for band in self.bands:
            values = mask.read(band, **where)
            meaning = classify(values, self.rule)
            nodata = self.source.nodatavals[band - 1]
            if nodata is not None and nodata not in self.rule.named:
                same = np.isnan(values) if math.isnan(nodata) else values == nodata
                meaning[same] = FILL
            found.append(meaning)
        if self.edge is not self.warped:
            hidden = mask.read_masks(1, **where) == 0
            found.append(np.where(hidden, np.uint8(FILL), np.uint8(VALID)))
        return reduce(np.maximum, found)

    def _worst(self, window: Window) -> np.ndarray:
        """What the pixels of a window mean where any of the mask's pixels in them counts."""

        def kinds(part: Window) -> np.ndarray:
            meaning = self._classified(self.own, window=part)
            return np.stack([meaning == CLOUD, meaning == FILL]).astype(np.uint8)

        cloud, fill = largest_within(kinds, self.source, self.place, window) > 0
        return np.select([cloud, fill], [CLOUD, FILL], VALID).astype(np.uint8)

    def summary(self) -> MaskSummary:
        """What was found so far, which outlives the open file."""
        declared = (self.source.nodatavals[band - 1] for band in self.bands)
        nodata = next((value for value in declared if value is not None), None)
        named = nodata in self.rule.named
        return MaskSummary(dict(self.counts), self.covered, nodata, named)


def buffer_in_pixels(metres: float, grid) -> tuple[float, float]:
    """``--mask_buffer`` in pixels of a raster or grid, across and down.

    Raises:
        OptionError: Nobody knows the size of its pixels.
    """
    sides = pixel_sides(grid) if metres else (1.0, 1.0)
    none = f"0, since pixels of {grid.crs} have no size in metres"
    require(sides is not None, "--mask_buffer", f"{metres:g}", none)
    return metres / sides[0], metres / sides[1]


def open_mask(mask: Mask, scene: rasterio.DatasetReader) -> MaskReader:
    """``--mask`` on the pixels of a scene."""
    size, buffer = (scene.width, scene.height), buffer_in_pixels(mask.buffer, scene)
    place = scene.crs, scene.transform, size
    return MaskReader(mask.path, mask.rule, *place, buffer=buffer)


@dataclass(frozen=True)
class MaskSummary:
    """What a mask says of a scene, by the pixels that were read."""

    counts: dict[str, int]
    covered: float  # share of the scene within the mask's edge
    nodata: float | None  # that the mask declares
    named: bool  # whether the rule names that value, which it then is no more


def report_text(name: str, found: Sequence[MaskSummary]) -> str:
    """Which share of the pixels a mask makes invalid, and which lies beyond its edge.

    Args:
        name: The mask, or the pattern of several.
        found: What it says of each scene.
    """
    counts = sum((Counter(one.counts) for one in found), Counter())
    total = max(counts["pixels"], 1)
    masked, beyond = (100 * counts[key] / total for key in ("masked", "beyond"))
    text = f"{masked:.1f} % masked, {beyond:.1f} % beyond its edge (valid) by {name}"
    named = [one.nodata for one in found if one.named]
    if named:
        text += (
            f"; its nodata value {named[0]:g} is named, so it counts as the option says"
        )
    return text


def coverage_lines(path: str, covered: dict[str, float]) -> list[str]:
    """Lines on the scenes that a mask misses, and on those that reach beyond its edge.

    Args:
        path: The mask.
        covered: ``MaskReader.covered`` of each scene, by its name.

    Raises:
        RasterError: It has no ground in common with any of them.
    """
    missed = [scene for scene, share in covered.items() if not share]
    if covered and len(missed) == len(covered):
        raise RasterError(
            f"The mask {path} has no ground in common with {some_of(missed)}; give the mask of "
            "this place, or correct its CRS (gdal_edit.py -a_srs)"
        )
    if len(covered) == 1:  # the shares say it
        return []
    partly = [scene for scene, share in covered.items() if 0 < share < WHOLE]
    lines = []
    if missed:
        lines.append(
            f"warning: {path} has no ground in common with {len(missed)} of {len(covered)} scenes, "
            f"which it leaves valid: {some_of(missed)}"
        )
    if partly:
        lines.append(
            f"{path} ends within {len(partly)} of {len(covered)} scenes, which are valid beyond its "
            f"edge: {some_of(partly)}"
        )
    return lines
