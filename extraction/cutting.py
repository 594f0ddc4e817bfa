"""From a cell to the two files of a patch: reading, resizing, writing."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import rasterio
from rasterio.enums import ColorInterp
from rasterio.transform import Affine
from tqdm import tqdm

from common.colours import Colour
from common.errors import DatasetError, RasterError
from common.labels import Label, class_tags, open_label
from common.machine import available_cores, bounded_map, fits_in_memory, free_memory
from common.nodata import is_no_measurement
from common.provenance import scene_facts
from common.rasters import Source, as_dtype, band_scaling, open_raster
from common.tiffs import create_tiff, write_errors
from extraction.cells import Cell, cell_mask, reading_order
from extraction.journal import Journal, Skipped
from extraction.scenes import ScenePlan
from extraction.settings import ExtractionOptions


@dataclass(frozen=True)
class Patch:
    """One cell: first as it was read, then of ``--patch_size``."""

    cell: Cell
    image: np.ndarray  # (C, H, W)
    valid: np.ndarray  # (H, W) bool
    label: np.ndarray  # (H, W) uint8 or uint16
    valid_share: float  # of the pixels in the cell

    @property
    def bytes(self) -> int:
        """Of main memory, with what resizing one band takes."""
        arrays = self.image, self.valid, self.label
        return sum(array.nbytes for array in arrays) + 16 * self.valid.size


def read_cell(
    cell: Cell, image: Source, label: Label, config: ExtractionOptions
) -> Patch | Skipped:
    """Read one cell, unless there is no patch of it.

    Raises:
        SegmentationError: It cannot be read, or is too large for the memory.
    """
    height, width = int(cell.window.height), int(cell.window.width)
    pixel = (
        len(image.bands) * image.dtype.itemsize + 18
    )  # two labels of int64, validity
    if not fits_in_memory(size := pixel * height * width):
        raise DatasetError(
            f"{cell.name} covers {width} x {height} pixels, {size / 1e9:.1f} GB, more than fits "
            "into memory; use a finer grid or a smaller --patch_size"
        )
    pixels, valid = image.read(cell.window)
    inside = cell_mask(cell)
    share = float(valid[inside].mean()) if inside.any() else 0.0
    if share < config.min_valid or not share:
        few = f"less than {config.min_valid:.0%} valid"
        return Skipped(few if share else "no valid pixel")
    classes = label.classes(cell.window)
    classes[~(inside & valid)] = label.unlabelled
    if (classes == label.unlabelled).all():
        return Skipped("no labelled pixel")
    return Patch(cell, pixels, valid, classes, share)


def resize_label(label: np.ndarray, size: int) -> np.ndarray:
    """Labels (H, W) as (size, size): each pixel from the nearest one."""
    import cv2

    return cv2.resize(label, (size, size), interpolation=cv2.INTER_NEAREST_EXACT)


def resize_image(
    image: np.ndarray, valid: np.ndarray, size: int, interpolation: str, nodata=None
):
    """Resize an image without letting invalid pixels bleed into valid ones.

    Args:
        image: (C, H, W), any dtype; it is kept.
        valid: (H, W) bool.
        size: Side of the result in pixels.
        interpolation: A choice of ``--interpolation``.
        nodata: A value that may make no valid pixel invalid; the next one takes its place.

    Returns:
        image (C, size, size), valid (size, size): where valid pixels make up half the weight.
    """
    import cv2

    methods = {
        "nearest": cv2.INTER_NEAREST_EXACT,
        "bilinear": cv2.INTER_LINEAR,
        "cubic": cv2.INTER_CUBIC,
        "area": cv2.INTER_AREA,
    }
    if interpolation == "auto":
        interpolation = "area" if min(valid.shape) >= size else "bilinear"

    def resize(layer):
        return cv2.resize(layer, (size, size), interpolation=methods[interpolation])

    if interpolation == "nearest":
        # by position, since OpenCV does not know every dtype
        places = resize(np.arange(valid.size, dtype=np.float64).reshape(valid.shape))
        rows, columns = np.divmod(places.astype(np.int64), valid.shape[1])
        return image[:, rows, columns], valid[rows, columns]
    exact = np.float32 if image.dtype.itemsize < 4 else np.float64
    weight = resize(valid.astype(exact))
    kept = weight >= 0.5
    resized = np.zeros((len(image), size, size), image.dtype)
    for target, band in zip(resized, image):
        values = resize(np.where(valid, band, 0).astype(exact))[kept] / weight[kept]
        if image.dtype.kind in "iu":
            limits = np.iinfo(image.dtype)
            values = np.clip(np.rint(values), limits.min, limits.max)
        target[kept] = values.astype(image.dtype)
    if nodata is not None:
        held = (resized == nodata) & kept
        if not is_no_measurement(nodata):
            held &= held.all(axis=0)
        resized[held] = next_to(nodata)
    return resized, kept


def next_to(value: np.generic) -> np.generic:
    """The next larger number of the same dtype, or the next smaller of the largest."""
    if value.dtype.kind == "f":
        return np.nextafter(value, value.dtype.type(np.inf))
    step = 1 if value < np.iinfo(value.dtype).max else -1
    return value.dtype.type(int(value) + step)


def declared_nodata(image: Source):
    """The nodata value that all bands share and that their dtype can hold, or None."""
    if len(set(map(repr, image.declared))) != 1:  # NaN equals NaN
        return None
    return as_dtype(image.declared[0], image.dtype)


class PatchWriter:
    """What all patches of a scene have in common, and how they are written."""

    def __init__(
        self, image: Source, label: Label, colours: Sequence[Colour | None] = ()
    ):
        scene, bands = image.dataset, image.bands
        self.crs, self.transform = scene.crs, scene.transform
        self.nodata, self.label_nodata = declared_nodata(image), label.unlabelled
        self.class_tags = class_tags(label.names, label.codes, colours)
        self.descriptions = tuple(scene.descriptions[band - 1] for band in bands)
        self.scaling = band_scaling(scene, bands)
        self.origin = scene_facts(scene).tags()
        # an alpha band that was selected is data
        self.colours = tuple(
            ColorInterp.undefined if role == ColorInterp.alpha else role
            for role in (scene.colorinterp[band - 1] for band in bands)
        )

    def transform_of(self, patch: Patch) -> Affine:
        """The geotransform of a patch: its corners are those of its cell's window."""
        window, (height, width) = patch.cell.window, patch.valid.shape
        corner = Affine.translation(window.col_off, window.row_off)
        scale = Affine.scale(window.width / width, window.height / height)
        return self.transform * corner * scale

    def write(self, patch: Patch, image_path: Path, label_path: Path) -> None:
        """Write a patch as two GeoTIFFs that any reader opens.

        Invalid pixels become the declared nodata value; without one, an internal mask marks them.
        """
        pixels, masked = patch.image, not patch.valid.all()
        if masked and self.nodata is not None:
            pixels = np.where(patch.valid, pixels, self.nodata)
        with (
            write_errors(image_path),
            self._create(image_path, patch, pixels, self.nodata) as file,
        ):
            file.descriptions = self.descriptions
            file.colorinterp = self.colours
            file.update_tags(**self.origin)
            if self.scaling:
                file.scales, file.offsets = self.scaling
            file.write(pixels)
            if masked and self.nodata is None:
                file.write_mask(patch.valid)
        label = patch.label[None]
        with (
            write_errors(label_path),
            self._create(label_path, patch, label, self.label_nodata) as file,
        ):
            file.update_tags(**self.class_tags)
            file.write(label)

    def _create(self, path: Path, patch: Patch, pixels: np.ndarray, nodata):
        count, height, width = pixels.shape
        return create_tiff(
            path,
            width=width,
            height=height,
            count=count,
            dtype=pixels.dtype,
            crs=self.crs,
            transform=self.transform_of(patch),
            nodata=nodata,
            compress="deflate",
            zlevel=1,
            # tifffile alone cannot undo the predictor for floats
            predictor=2 if pixels.dtype.kind in "iu" else 1,
            interleave="band",
            blockysize=height,
        )


def write_cell(
    patch: Patch, writer: PatchWriter, config: ExtractionOptions, staging: Path
) -> dict | Skipped:
    """Resize a cell to ``--patch_size`` and write it; the record of the patch."""
    cell, size = patch.cell, config.patch_size
    if patch.label.shape != (size, size):
        image, valid = resize_image(
            patch.image, patch.valid, size, config.interpolation, writer.nodata
        )
        label = resize_label(patch.label, size)
        if (label == writer.label_nodata).all():
            return Skipped("no labelled pixel after resizing")
        patch = replace(patch, image=image, valid=valid, label=label)
    paths = (staging / kind / f"{cell.name}.tif" for kind in ("images", "labels"))
    with rasterio.Env(GDAL_NUM_THREADS=1, GDAL_TIFF_INTERNAL_MASK=True):
        writer.write(patch, *paths)
    counts = np.bincount(patch.label[patch.label != writer.label_nodata])
    return {
        "name": cell.name,
        "window": [int(side) for side in cell.window.flatten()],
        "transform": list(writer.transform_of(patch)[:6]),
        "valid_share": round(patch.valid_share, 4),
        "class_pixels": counts.tolist(),
    }


def bytes_of(outcome: Patch | Skipped) -> int:
    """The main memory that what was read of a cell takes."""
    return outcome.bytes if isinstance(outcome, Patch) else 0


def cut_scene(
    plan: ScenePlan, config: ExtractionOptions, staging: Path, journal: Journal
) -> None:
    """Write the patches of a scene to ``staging/{images,labels}``.

    One thread reads the cells, others resize and write them.

    Raises:
        SegmentationError: A cell that cannot be read, unless ``--skip_errors``.
    """
    done = journal.records.keys() | journal.skipped.keys()
    cells = [cell for cell in plan.cells if cell.name not in done]
    if not cells:
        return
    with (
        open_raster(plan.scene.image) as dataset,
        open_label(plan.scene.label, dataset, config) as label,
    ):
        bands = [entry["band"] for entry in plan.bands]
        image = Source(dataset, bands, nodata=config.nodata, mask=plan.scene.mask)
        writer = PatchWriter(image, label, plan.colours)
        cells = reading_order(cells, image)

        def read(cell: Cell) -> Patch | Skipped:
            try:
                return read_cell(cell, image, label, config)
            except (RasterError, DatasetError) as error:
                if not config.skip_errors:
                    raise
                return Skipped(str(error), is_error=True)

        def write(outcome: Patch | Skipped) -> dict | Skipped:
            if isinstance(outcome, Skipped):
                return outcome
            return write_cell(outcome, writer, config, staging)

        threads = config.workers or min(8, available_cores())
        outcomes = bounded_map(
            write, map(read, cells), threads, threads, bytes_of, free_memory() // 4
        )
        title, count = Path(plan.scene.image).name, len(cells)
        style = {"unit": "cell", "leave": False, "disable": None}
        with closing(outcomes):
            for cell, outcome in tqdm(zip(cells, outcomes), title, count, **style):
                if isinstance(outcome, dict):
                    outcome["scene"] = plan.scene.image
                journal.note(cell.name, outcome)
