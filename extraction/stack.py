"""Products and raster files as scenes: one pixel grid, one list of bands, a mask band."""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from itertools import product
from pathlib import Path

import numpy as np
import rasterio
import rasterio.shutil
from rasterio.enums import MaskFlags
from rasterio.windows import Window
from tqdm import tqdm

from common.errors import RasterError, SegmentationError, gdal_message, require
from common.files import atomic_write, exclusive_lock, naming, require_folder
from common.interruption import stop_requested, until_stopped
from common.masks import MaskReader, buffer_in_pixels, coverage_lines, report_text
from common.provenance import ACQUIRED, SENSOR
from common.rasters import GDAL_CACHE
from common.sources import require_whole
from common.tiffs import create_tiff, require_complete_tiff, write_errors
from extraction.stack_bands import MaskLayer
from extraction.stack_grid import Grid, resampling_to
from extraction.stack_inputs import read_inputs
from extraction.stack_plan import ScenePlan, list_scenes, plan_scene
from extraction.stack_settings import StackConfig
from extraction.stack_vrt import write_vrt

log = logging.getLogger("semanticseg4eo")

MASK_ROWS = 512
COPIED_AT_ONCE = GDAL_CACHE / 4  # bytes
WATCH = 0.2  # seconds between two looks at a copy under way


def stack(config: StackConfig) -> list[str]:
    """Write the scenes that a command names.

    Returns:
        Lines that say what was written and what was done to the pixels.

    Raises:
        SegmentationError: A problem in the data or the options, before anything is written.
    """
    products, files = read_inputs(config)
    plans = [
        plan_scene(target, group, files, config)
        for target, group in list_scenes(products, files, config)
    ]
    inputs = {Path(path).resolve() for path in config.input}
    for plan in plans:
        fine = plan.target.resolve() not in inputs
        require(fine, "--output", plan.target, "not an input")
        for path in (plan.target, *([] if plan.is_copy else [plan.parts])):
            if path.exists() and not config.overwrite:
                raise SegmentationError(
                    f"{path} exists; replace it with --overwrite, or choose another --output"
                )
    require_folder("--output", plans[0].target.parent)
    if config.mask is not None:
        report_coverage(plans, config)
    lines = []
    for plan in until_stopped(plans):
        shares = write_scene(plan, config)
        lines += describe(plan, shares)
    return lines


def report_coverage(plans: Sequence[ScenePlan], config: StackConfig) -> None:
    """Log the scenes that ``--mask`` does not cover.

    Raises:
        RasterError: It cannot be read, or has no ground in common with any of them.
    """
    covered = {}
    for plan in plans:
        with read_mask(plan.masks[0], plan.grid) as reader:
            covered[str(plan.target)] = reader.covered
    for line in coverage_lines(config.mask, covered):
        log.warning(line)


def read_mask(mask: MaskLayer, grid: Grid, metres: float = 0.0) -> MaskReader:
    """A mask on the pixels of a scene, its clouds grown by so many metres."""
    place = grid.crs, grid.transform, (grid.width, grid.height)
    buffer = buffer_in_pixels(metres, grid)
    return MaskReader(mask.path, mask.rule, *place, mask.numbers, buffer, name=mask.of)


def write_scene(plan: ScenePlan, config: StackConfig) -> list[str]:
    """Write a scene, which appears when it is complete; lines on the shares of its mask."""
    target = plan.target
    aside = target.with_name(f".{target.stem}.parts-partial")
    with exclusive_lock("--output", target, aside):
        for path in aside.iterdir():  # of a run that was killed
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        parts = aside / "scene.parts" if plan.is_copy else aside
        parts.mkdir(exist_ok=True)
        try:
            shares = write_mask(plan, config, parts / "mask.tif") if plan.masks else []
            things = plan.layers, plan.grid, plan.stored, plan.tags, bool(plan.masks)
            if plan.is_copy:
                write_vrt(aside / "scene.vrt", parts, parts.name, *things)
                with atomic_write(target, aside) as part:
                    copy_scene(aside / "scene.vrt", part, plan.stored[0])
            else:
                with atomic_write(target) as part:
                    write_vrt(part, parts, parts.name, *things)
                    require_readable(part)
                    write_vrt(part, parts, plan.parts.name, *things)
                    shutil.rmtree(plan.parts, ignore_errors=True)
                    if any(parts.iterdir()):
                        parts.rename(plan.parts)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    require_whole(target)
    return shares


def require_readable(vrt: Path) -> None:
    """Read a pixel of each band of a VRT and of its mask: a block of each file.

    Raises:
        RasterError: GDAL does not open it, or cannot read a band.
    """
    try:
        with rasterio.open(vrt, driver="VRT") as scene:
            middle = Window(scene.width // 2, scene.height // 2, 1, 1)
            scene.read(window=middle)
            scene.read_masks(1, window=middle)
    except rasterio.errors.RasterioIOError as error:
        raise RasterError(
            f"{vrt} could not be read, so it is not kept: {gdal_message(error)}; check the files of "
            "--input, or name other --bands"
        ) from error


def write_mask(plan: ScenePlan, config: StackConfig, path: Path) -> list[str]:
    """Write what is valid by all masks, 255 or 0, on the scene's pixels; a line for each mask."""
    grid = plan.grid
    profile = {
        "width": grid.width, "height": grid.height, "count": 1, "dtype": "uint8",
        "crs": grid.crs, "transform": grid.transform, "compress": "deflate",
    }  # fmt: skip
    if min(grid.width, grid.height) >= MASK_ROWS:
        profile |= {"tiled": True, "blockxsize": MASK_ROWS, "blockysize": MASK_ROWS}
    with ExitStack() as opened:
        readers = [
            opened.enter_context(read_mask(mask, grid, config.mask_buffer))
            for mask in plan.masks
        ]
        file = opened.enter_context(create_tiff(path, **profile))
        tops = range(0, grid.height, MASK_ROWS)
        for top in until_stopped(tqdm(tops, "mask", leave=False, disable=None)):
            rows = min(MASK_ROWS, grid.height - top)
            window = Window(0, top, grid.width, rows)
            valid = np.ones((rows, grid.width), bool)
            for reader in readers:
                valid &= reader.read(window)
            file.write(valid.astype(np.uint8) * 255, 1, window=window)
    return [
        report_text(mask.name, [reader.summary()])
        + (f"; {mask.remark}" if mask.remark else "")
        for mask, reader in zip(plan.masks, readers)
    ]


def copy_scene(vrt: Path, target: Path, dtype: str) -> None:
    """Make a cloud-optimized GeoTIFF of a VRT, with overviews.

    By way of a plain one beside the VRT, since each overview would read all of the VRT again: three
    times as fast for ten bands of JPEG 2000.
    """
    plain, floats = vrt.with_suffix(".tif"), dtype.startswith("float")
    with naming(target, plain):
        write_plain(vrt, plain, predictor=3 if floats else 2)
        copy_until_stopped(
            plain, target, driver="COG", OVERVIEW_RESAMPLING="AVERAGE", COMPRESS="DEFLATE",
            PREDICTOR="FLOATING_POINT" if floats else "STANDARD", BIGTIFF="IF_SAFER",
        )  # fmt: skip
    require_complete_tiff(target)


def write_plain(vrt: Path, target: Path, predictor: int) -> None:
    """Copy pixels, mask and metadata of a VRT to a GeoTIFF, some blocks at a time.

    Raises:
        RasterError: A block cannot be read, or not all was written.
    """
    with ExitStack() as opened:
        opened.enter_context(write_errors(target))
        opened.enter_context(rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False))
        scene = opened.enter_context(rasterio.open(vrt))
        profile = scene.profile | {
            "tiled": True, "blockxsize": MASK_ROWS, "blockysize": MASK_ROWS,
            "interleave": "band", "compress": "deflate", "zlevel": 1, "predictor": predictor,
            "bigtiff": "if_safer", "photometric": "minisblack",  # four bands of bytes are not RGBA
        }  # fmt: skip
        profile.pop("driver")
        file = opened.enter_context(create_tiff(target, **profile))
        copy_tags(scene, file)
        windows = windows_of(scene)
        if MaskFlags.per_dataset in scene.mask_flag_enums[0]:
            # first: to begin a mask disturbs the threads that compress pixels (GDAL 3.10)
            for window in until_stopped(windows):
                file.write_mask(scene.read_masks(1, window=window), window=window)
        for window in until_stopped(tqdm(windows, "copy", leave=False, disable=None)):
            try:
                pixels = scene.read(window=window)
            except rasterio.errors.RasterioIOError as error:
                raise RasterError(
                    f"{target} cannot be written, since a block of --input cannot be read: "
                    f"{gdal_message(error)}"
                ) from error
            file.write(pixels, window=window)


def windows_of(scene: rasterio.DatasetReader) -> list[Window]:
    """The windows that a scene is copied by: whole blocks, all bands of which fit into the cache.

    So the blocks of its files, whether of one band or of all, are decoded once.
    """
    side = MASK_ROWS * math.ceil(scene.block_shapes[0][0] / MASK_ROWS)
    pixel = sum(np.dtype(dtype).itemsize for dtype in scene.dtypes)
    across = side * max(1, int(COPIED_AT_ONCE / (side**2 * pixel)))
    places = product(range(0, scene.height, side), range(0, scene.width, across))
    return [
        Window(x, y, min(across, scene.width - x), min(side, scene.height - y))
        for y, x in places
    ]


def copy_tags(scene: rasterio.DatasetReader, file: rasterio.io.DatasetWriter) -> None:
    """Copy what a raster says of itself and of its bands."""
    file.update_tags(**scene.tags())
    file.descriptions = scene.descriptions
    file.scales, file.offsets = scene.scales, scene.offsets
    for band in scene.indexes:
        file.update_tags(band, **scene.tags(band))


def copy_until_stopped(source: Path, target: Path, **options: str) -> None:
    """Have GDAL copy a raster of our own, which is lost where a stop is requested.

    GDAL's copies cannot be stopped, but end when their source does.

    Raises:
        RasterError: It was not written.
    """
    with write_errors(target), ThreadPoolExecutor(1) as pool:
        copying = pool.submit(rasterio.shutil.copy, source, target, **options)
        while not (stop_requested() or wait([copying], WATCH).done):
            pass
        if stop_requested():
            os.truncate(source, 0)
            wait([copying])
            raise KeyboardInterrupt
        copying.result()


def describe(plan: ScenePlan, shares: Sequence[str]) -> list[str]:
    """What was written, in lines."""
    grid, layers = plan.grid, plan.layers
    pixel = abs(grid.transform.a)
    unit = "m" if grid.crs.is_projected else "degrees"
    dtype, nodata = plan.stored
    size = f"{grid.width} x {grid.height} pixels of {pixel:g} {unit}"
    lines = [
        f"{plan.target}: {len(layers)} bands, {size}, {grid.crs}",
        f"  bands: {', '.join(layer.name for layer in layers)}",
    ]
    tags = plan.tags
    keys = ("product", SENSOR, ACQUIRED, "tile")
    shown = [tags[key] for key in keys if key in tags]
    lines += [f"  of {', '.join(shown)}"] if shown else []
    lines.append(
        f"  values: {tags['values']}; {dtype}, "
        + ("no nodata" if nodata is None else f"nodata {nodata:g}")
    )
    methods: dict[str, list[str]] = {}
    for layer in layers:
        if grid.offset_in(layer.grid) is None:
            methods.setdefault(resampling_to(layer, grid), []).append(layer.name)
    lines += [f"  {method}: {', '.join(names)}" for method, names in methods.items()]
    lines += [f"  {line}" for line in shares]
    remote = [la for la in layers if la.band.path.startswith(("/vsizip/", "/vsitar/"))]
    if remote and not plan.is_copy:
        lines.append(
            "  refers to an archive by its full path: do not move the archive, or unpack it first"
        )
    return lines
