"""Rasters and patch folders: what extraction, training and prediction share, without torch.

Contents, in order: errors, settings, the machine, opening, valid pixels, windows, bands, labels,
patch folders, footprints, files that appear whole, polygons, colours and pictures.

Conventions: images are (C, H, W) as rasterio reads them, masks and validity (H, W); bands count
from 1; a window is a ``rasterio.windows.Window`` in pixels (col_off, row_off, width, height).
"""

from __future__ import annotations

import _thread
import errno
import functools
import glob
import json
import logging
import math
import os
import re
import shutil
import signal
import struct
import sys
import tempfile
import threading
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from heapq import heapify, heappop, heappush
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, get_args, get_type_hints
from weakref import WeakKeyDictionary

import numpy as np
import rasterio
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.windows import Window

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

if TYPE_CHECKING:
    from affine import Affine
    from geopandas import GeoSeries
    from matplotlib.figure import Figure
    from shapely import Geometry

VERSION = "1.1.0"
UNLABELLED = 255  # the default --ignore_index, and what extraction writes
SPLITS = ("train", "validation", "test")
TIFF_SUFFIXES = (".tif", ".tiff")
# GDAL drivers by suffix: a file of another format than its name says is refused
DRIVERS = {
    **dict.fromkeys(TIFF_SUFFIXES, ("GTiff",)),
    ".vrt": ("VRT",),
    ".jp2": ("JP2OpenJPEG", "JP2KAK", "JP2ECW", "JP2MrSID"),
    ".img": ("HFA", "ENVI"),
}
SCENE_SUFFIXES = tuple(DRIVERS)
# GDAL keeps up to 5 % of the machine's memory as block cache; a fixed size keeps memory flat.
# rasterio hands the number on as bytes, where GDAL itself would take a small one as megabytes.
GDAL_OPTIONS = {"GDAL_CACHEMAX": 256 * 2**20, "GDAL_NUM_THREADS": "ALL_CPUS"}


# --- errors ---------------------------------------------------------------------------------


class SegmentationError(Exception):
    """A problem that the user can mend: the message says what, where and how."""


class RasterError(SegmentationError, ValueError):
    """A raster that cannot be used as it is."""


class DatasetError(SegmentationError, ValueError):
    """Patch folders, image-label pairs, label values, alignment."""


class OptionError(SegmentationError, ValueError):
    """An option whose value cannot be right, whatever the data; scripts exit with status 2."""


def require_folder(option: str, folder: str | Path) -> None:
    """Raise SegmentationError unless a folder is there, or can be made, and written to."""
    path = Path(folder).absolute()
    existing = next(p for p in (path, *path.parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise SegmentationError(
            f"{option} {folder}: {existing} cannot be written to; choose another folder"
        )


@contextmanager
def sole_run(option: str, name: str | Path, folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder, which is made, while this one writes to it.

    The lock ends with the process, however that ends. Where the system or the disk knows none
    (Windows, some network disks), nobody is kept out. A folder that was made and stays empty is
    removed.

    Args:
        option: The option that named the output, and ``name``, what it said.
        name: See ``option``.
        folder: To be locked.

    Raises:
        SegmentationError: Another run is at it.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY) if fcntl else None
    try:
        if fcntl:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SegmentationError(
                    f"Another run into {name} is under way; wait for it, or choose another {option}"
                ) from None
            except OSError:
                pass  # a disk that knows none
        yield
    finally:
        if fcntl:
            os.close(handle)
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def explain(error: BaseException, scarce: str) -> str:
    """One line for an error that ends a script; ``scarce`` are the options that take memory."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError):
        return f"The memory is too small ({text or 'nothing left'}); lower {scarce}"
    full = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
    if isinstance(error, OSError) and error.errno in full:
        return f"{text}; free some, or write elsewhere"
    return text


class Faults(list):
    """What stands against a run, a line each: a look ahead tells all of them, not only the first."""

    def attempt(self, action: Callable, *arguments):
        """What ``action`` gives; None, and its fault noted, where it cannot."""
        try:
            return action(*arguments)
        except (SegmentationError, OSError) as error:
            self.note(str(error))
            return None

    def note(self, fault: str) -> None:
        if fault not in self:
            self.append(fault)

    def tell(self) -> int:
        """Print them on stderr, in the process that tells for all; how many there are."""
        if leads():
            for fault in self:
                print(f"error: {fault}", file=sys.stderr)
        return len(self)


def leads() -> bool:
    """Whether this process tells for all that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def show_messages() -> None:
    """Send the toolkit's messages to stderr, and keep the libraries' own out of them."""
    log = logging.getLogger("semanticseg4eo")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO if leads() else logging.ERROR)
    # what they log, our own errors say too
    for library in ("rasterio", "tifffile", "huggingface_hub", "httpx"):
        logging.getLogger(library).setLevel(logging.CRITICAL)


def reason(error: BaseException) -> str:
    """What went wrong, in one line: GDAL's own words where rasterio only points at them."""
    cause = error.__cause__ if "previous exception" in str(error) else None
    lines = str(cause or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def unknown_name(kind: str, name: str, known: Sequence[str]) -> OptionError:
    """The error for a name that is not in ``known``, with the nearest known one."""
    lower = {text.lower(): text for text in known}
    near = get_close_matches(name.lower(), lower, n=1)
    hint = f"; did you mean {lower[near[0]]!r}?" if near else ""
    listed = ", ".join(known) if len(known) <= 24 else f"{len(known)} names are known"
    return OptionError(f"Unknown {kind} {name!r}{hint} ({listed})")


# --- settings -------------------------------------------------------------------------------


def setting(default=MISSING, help: str = "", group: str = "options", **more):
    """A field of a configuration dataclass that is also a command-line option.

    Args:
        default: Its default; without one the option is required.
        help: What it is, with its unit.
        group: The heading under which ``--help`` lists it.
        **more: ``choices``, ``nargs``, ``alias`` (a second flag), ``shown`` (words for a
            default that is found at run time).
    """
    return field(default=default, metadata={"help": help, "group": group, **more})


def add_settings(parser, config_class) -> None:
    """Give an argument parser one option per field of a configuration dataclass."""
    hints = get_type_hints(config_class)
    groups: dict[str, object] = {}
    for item in fields(config_class):
        more = dict(item.metadata)
        text, group = more.pop("help"), more.pop("group")
        flags = [f"--{item.name}", *([more.pop("alias")] if "alias" in more else [])]
        shown = more.pop("shown", None)
        more["required"] = item.default is MISSING
        if not more["required"]:
            more["default"] = item.default
            if item.default is not False:
                text += f" (default: {shown or '%(default)s'})"
        kind = next(
            (t for t in get_args(hints[item.name]) if t is not type(None)), None
        )
        kind = kind or hints[item.name]
        if kind is bool:
            more["action"] = "store_true"
        else:
            more["type"] = whole_number if kind is int else kind
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        groups[group].add_argument(*flags, dest=item.name, help=text, **more)


def whole_number(text: str) -> int:
    """An option's whole number; none needs one that 32 bits do not hold."""
    from argparse import ArgumentTypeError

    try:
        value = int(text)
    except ValueError:
        raise ArgumentTypeError(f"invalid int value: {text!r:.40}") from None
    if abs(value) >= 2**32:
        raise ArgumentTypeError("expected a smaller number")
    return value


def settings_from(config_class, arguments):
    """The configuration that parsed arguments describe."""
    return config_class(
        **{f.name: getattr(arguments, f.name) for f in fields(config_class)}
    )


def number_or_auto(text: str, least: int, most: int = 2**32 - 1) -> bool:
    """Whether an option that takes a whole number or ``auto`` has a fitting value."""
    # ten digits are enough, and Python reads no number of thousands of them
    number = text.isdecimal() and len(text) <= 10
    return text == "auto" or (number and least <= int(text) <= most)


def require(condition: bool, option: str, value, expected: str) -> None:
    """Raise OptionError naming an option, its value and what was expected."""
    if not condition:
        raise OptionError(f"{option} {value}: expected {expected}")


# --- the machine ----------------------------------------------------------------------------


def free_memory() -> int:
    """Bytes of main memory that this process can still take, by the system and its container."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(li.split()[1]) << 10 for li in lines if "MemAvailable" in li)
        group = Path("/sys/fs/cgroup")
        most = (group / "memory.max").read_text().strip()
        if most != "max":
            used = int((group / "memory.current").read_text())
            # what files leave in memory goes when it is needed
            lines = (group / "memory.stat").read_text().splitlines()
            counts = dict(line.split() for line in lines)
            used -= int(counts.get("inactive_file", 0))
            free = min(free, max(int(most) - used, 0))
    except (OSError, StopIteration):
        free = 4 << 30  # neither told: another system
    return free


def fits_in_memory(size: int) -> bool:
    """Whether bytes that a file asks for are half of the free memory at most.

    Where the system does not tell (it is not Linux), nothing is refused.
    """
    known = os.path.exists("/proc/meminfo")
    return size < 2**28 or not known or size <= free_memory() / 2


def peak_memory() -> int | None:
    """Bytes of main memory that this process has held at most; None where nobody counts."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most << 10


def own_cores() -> int:
    """The processor's cores that this process may use: its share of those of the machine."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@contextmanager
def ending_as_ctrl_c() -> Iterator[None]:
    """Have SIGTERM end a program as Ctrl-C does, so that what is open can be closed.

    Neither is lost: where it falls into a call whose exceptions Python drops (PyTorch has one
    whenever a tensor goes), it comes again a moment later.
    """

    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    def dropped(unraisable) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            again = threading.Timer(0.01, _thread.interrupt_main, [signal.SIGTERM])
            again.start()
        else:
            former_hook(unraisable)

    former, former_hook = signal.signal(signal.SIGTERM, interrupt), sys.unraisablehook
    sys.unraisablehook = dropped
    try:
        yield
    finally:
        sys.unraisablehook = former_hook
        signal.signal(signal.SIGTERM, former)


# --- opening --------------------------------------------------------------------------------


def open_raster(path: str | Path) -> rasterio.DatasetReader:
    """Open anything that GDAL reads, unless the file is not what its name says.

    Raises:
        RasterError: The file is missing, unreadable, of another format than its suffix, holds
            complex numbers, or has no bands.
    """
    suffix = Path(str(path)).suffix.lower()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            # TIFFs are opened as such only: a VRT can point at any file of the machine
            tiff = {"driver": "GTiff"} if suffix in TIFF_SUFFIXES else {}
            dataset = rasterio.open(path, **tiff)
    except rasterio.errors.RasterioIOError as error:
        there = "; is it a whole raster? copy or write it again" * os.path.isfile(path)
        raise RasterError(f"Cannot read {path}: {reason(error)}{there}") from error
    fault = _fault_of(dataset, suffix)
    if fault:
        dataset.close()
        raise RasterError(f"{path} {fault}")
    return dataset


def _fault_of(dataset: rasterio.DatasetReader, suffix: str) -> str | None:
    """Why an open raster cannot be used, or None."""
    driver = dataset.driver
    if driver == "VRT" and suffix != ".vrt":
        return "is a VRT under another name; rename it to .vrt"
    if driver not in DRIVERS.get(suffix, (driver,)):
        return f"is no {suffix} file but one of format {driver}; give it its right name"
    if dataset.count == 0:
        return "has no bands; name one of its subdatasets"
    if any("complex" in dtype for dtype in dataset.dtypes):
        return "holds complex numbers; convert it to amplitude or dB"
    (height, width), dtype = dataset.block_shapes[0], np.dtype(dataset.dtypes[0])
    together = dataset.tags(ns="IMAGE_STRUCTURE").get("INTERLEAVE") == "PIXEL"
    bands = dataset.count if together else 1
    if not fits_in_memory(size := height * width * dtype.itemsize * bands):
        return (
            f"is stored in blocks of {height} x {width} pixels, {size / 1e9:.0f} GB each, which the "
            "memory does not hold; write it again in tiles (gdal_translate -co TILED=YES)"
        )
    return None


def require_whole(path: str | Path) -> None:
    """Raise RasterError where a TIFF points at pixels beyond its end: it was cut off.

    GDAL opens such a file, and fails at the first block that is not there.
    """
    import tifffile

    if Path(path).suffix.lower() not in TIFF_SUFFIXES or not os.path.isfile(path):
        return
    try:
        with tifffile.TiffFile(path) as tiff:
            end = last_byte(tiff.pages.first)
    except (tifffile.TiffFileError, IndexError, ValueError, struct.error):
        return  # GDAL knows more kinds of TIFF
    if end > os.path.getsize(path):
        raise RasterError(f"{path} is cut off; copy or download it again")


def last_byte(page) -> int:
    """Where the pixels of tifffile's page end in the file; 0 when there are none."""
    ends = np.add(page.dataoffsets, page.databytecounts)
    return int(ends.max(initial=0))


def require_georeference(dataset: rasterio.DatasetReader) -> None:
    """Raise RasterError unless the raster has a coordinate reference system."""
    if dataset.crs is None:
        raise RasterError(
            f"{dataset.name} has no CRS; assign one (gdal_edit.py -a_srs)"
        )


def same_pixel_grid(a, b, tolerance: float = 0.01) -> bool:
    """Whether two rasters have the same CRS, shape and transform (to a share of a pixel)."""
    if a.crs != b.crs or a.shape != b.shape:
        return False
    corners = [(0, 0), (a.width, 0), (0, a.height)]
    shifts = [np.subtract(~a.transform * (b.transform * c), c) for c in corners]
    return bool(np.abs(shifts).max() <= tolerance)


def in_true_metres(crs) -> bool:
    """Whether lengths in a CRS are metres on the ground.

    Not in degrees or feet, and not in Mercator projections, whose scale grows with the latitude.
    """
    return crs.is_projected and crs.linear_units_factor[1] == 1 and not _mercator(crs)


def _mercator(crs) -> bool:
    from pyproj import CRS

    known = CRS.from_wkt(crs.to_wkt())
    known = known.sub_crs_list[0] if known.is_compound else known
    method = known.coordinate_operation.method_name
    return "Mercator" in method and "Transverse" not in method


def pixel_areas(dataset: rasterio.DatasetReader) -> np.ndarray | None:
    """Square metres of a pixel in each row, (H,); None when the CRS does not tell.

    In degrees, and in Mercator projections, whose scale grows with the latitude, a pixel is measured
    on the ellipsoid, in the middle column.
    """
    crs, transform = dataset.crs, dataset.transform
    if crs is None or not (crs.is_projected or crs.is_geographic):
        return None
    from pyproj import CRS, Transformer

    if crs.is_projected and not _mercator(crs):
        metres = crs.linear_units_factor[1]
        return np.full(dataset.height, abs(transform.determinant) * metres**2)
    known = CRS.from_wkt(crs.to_wkt())
    known = known.sub_crs_list[0] if known.is_compound else known
    column = dataset.width // 2 + np.array([0, 0, 1, 1])
    row = np.arange(dataset.height)[:, None] + np.array([0, 1, 1, 0])
    a, b, c, d, e, f = transform[:6]
    corners = a * column + b * row + c, d * column + e * row + f
    geodetic = known.geodetic_crs
    degrees = np.degrees(geodetic.axis_info[0].unit_conversion_factor)  # of its unit
    ground = Transformer.from_crs(known, geodetic, always_xy=True)
    longitudes, latitudes = (degrees * v for v in ground.transform(*corners))
    latitudes = np.clip(np.where(np.isfinite(latitudes), latitudes, 90), -90, 90)
    geod = known.get_geod()
    return np.array(
        [
            abs(geod.polygon_area_perimeter(*pair)[0])
            for pair in zip(longitudes, latitudes)
        ]
    )


# --- valid pixels ---------------------------------------------------------------------------


def once_per_raster(look_up):
    """Remember what a function finds of an open raster; rasterio looks it up at every access."""
    known: WeakKeyDictionary = WeakKeyDictionary()

    @functools.wraps(look_up)
    def remembered(dataset: rasterio.DatasetReader, bands: Sequence[int] = ()):
        found, key = known.setdefault(dataset, {}), tuple(bands)
        if key not in found:
            found[key] = look_up(dataset, bands) if key else look_up(dataset)
        return found[key]

    return remembered


@once_per_raster
def image_bands(dataset: rasterio.DatasetReader) -> list[int]:
    """The band numbers that hold the image: all but alpha."""
    return [
        index
        for index, role in enumerate(dataset.colorinterp, start=1)
        if role != ColorInterp.alpha
    ]


def select_bands(dataset: rasterio.DatasetReader, bands: str | None) -> list[int]:
    """Band numbers for a ``--bands`` text: 1-based numbers or band descriptions.

    Without a text: all bands but alpha. A description matches whole, or by its first word
    ("B04" for "B04 red"), whatever its case.

    Raises:
        RasterError: A number outside the raster, an unknown or ambiguous description.
    """
    if bands is None:
        chosen = image_bands(dataset)
        if not chosen:
            raise RasterError(f"{dataset.name} has no band beside alpha")
        return chosen
    chosen = []
    for item in (part.strip() for part in bands.split(",")):
        if not item:
            raise RasterError(
                f"--bands {bands!r}: expected names or numbers between commas"
            )
        if item.isdecimal():
            if not 1 <= int(item) <= dataset.count:
                raise RasterError(
                    f"--bands {item}: {dataset.name} has bands 1 to {dataset.count}"
                )
            chosen.append(int(item))
            continue
        names = [(text or "").strip().lower() for text in dataset.descriptions]
        found = [i for i, name in enumerate(names, 1) if name == item.lower()]
        found = found or [
            i for i, name in enumerate(names, 1) if name.split()[:1] == [item.lower()]
        ]
        if len(found) != 1:
            raise RasterError(
                f"--bands {item!r}: {len(found)} bands of {dataset.name} have that "
                f"description ({', '.join(name or '-' for name in names)})"
            )
        chosen.append(found[0])
    return chosen


class Validity(NamedTuple):
    """What tells the valid pixels of some bands of a raster."""

    one_dtype: bool
    dtype: np.dtype  # that holds all bands
    nodata: list  # a value or None per band
    shared_mask: bool  # one mask band for all bands
    alphas: list[int]  # alpha bands beside the bands


@once_per_raster
def validity(dataset: rasterio.DatasetReader, bands: Sequence[int]) -> Validity:
    """What tells the valid pixels of these bands.

    GDAL's own masks let one kind shadow another (nodata hides alpha); here all of them count.
    """
    dtypes = [np.dtype(dataset.dtypes[band - 1]) for band in bands]
    values = [dataset.nodatavals[band - 1] for band in bands]
    flags = dataset.mask_flag_enums[bands[0] - 1]
    roles = enumerate(dataset.colorinterp, start=1)
    return Validity(
        len(set(dtypes)) == 1,
        np.result_type(*dataset.dtypes),
        [as_dtype(value, dtype) for value, dtype in zip(values, dtypes)],
        MaskFlags.per_dataset in flags and MaskFlags.alpha not in flags,
        [i for i, role in roles if role == ColorInterp.alpha and i not in bands],
    )


def _read(dataset: rasterio.DatasetReader, bands: Sequence[int], **where):
    """Pixels (C, H, W) and validity (H, W) of a part inside a raster."""
    known = validity(dataset, bands)
    try:
        if known.one_dtype:
            pixels = dataset.read(list(bands), **where)
        else:  # rasterio reads bands of one dtype together
            pixels = np.stack([dataset.read(band, **where) for band in bands])
        seen = np.ones(pixels.shape[1:], bool)
        if pixels.dtype.kind == "f":
            seen &= np.isfinite(pixels).all(axis=0)
        for nodata, values in zip(known.nodata, pixels):
            if nodata is not None:
                seen &= values != nodata
        if known.shared_mask:
            seen &= dataset.read_masks(bands[0], **where) > 0
        for band in known.alphas:
            seen &= dataset.read(band, **where) > 0
    except rasterio.errors.RasterioIOError as error:
        raise RasterError(
            f"Cannot read {dataset.name}: {reason(error).rstrip('.')}; copy or write it again"
        ) from error
    return pixels.astype(known.dtype, copy=False), seen


def as_dtype(value: float | None, dtype: np.dtype):
    """A nodata value in a dtype; None when there is none or the dtype cannot hold it."""
    if value is None or dtype.kind == "f":
        return None if value is None else dtype.type(value)
    limits = np.iinfo(dtype)
    whole = math.isfinite(value) and value == int(value)
    return (
        dtype.type(int(value)) if whole and limits.min <= value <= limits.max else None
    )


def read_image(
    dataset: rasterio.DatasetReader, window: Window, bands: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Read a window that may reach beyond the raster.

    A pixel is valid when it lies inside the raster and its mask (nodata of any band, mask band,
    alpha), and is neither NaN nor infinite in any of the bands.

    Args:
        dataset: An open raster.
        window: Whole pixels; parts outside the raster come back as zeros, invalid.
        bands: 1-based band numbers; an alpha band among them is read as data.

    Returns:
        image (C, H, W) in the raster's dtype, valid (H, W) bool.

    Raises:
        RasterError: A block cannot be read.
    """
    inside = window_within(window, dataset.width, dataset.height)
    shape = (int(window.height), int(window.width))
    dtype = validity(dataset, bands).dtype
    if inside == window:
        return _read(dataset, bands, window=inside)
    if inside is None:
        return np.zeros((len(bands), *shape), dtype), np.zeros(shape, bool)
    return _placed(window, inside, *_read(dataset, bands, window=inside))


def _placed(window: Window, inside: Window, pixels: np.ndarray, seen: np.ndarray):
    """Pixels of the part of a window inside a raster, amid zeros that are not valid."""
    shape = (int(window.height), int(window.width))
    image, valid = np.zeros((len(pixels), *shape), pixels.dtype), np.zeros(shape, bool)
    rows = slice(
        int(inside.row_off - window.row_off),
        int(inside.row_off - window.row_off + inside.height),
    )
    cols = slice(
        int(inside.col_off - window.col_off),
        int(inside.col_off - window.col_off + inside.width),
    )
    image[:, rows, cols] = pixels
    valid[rows, cols] = seen
    return image, valid


# --- windows --------------------------------------------------------------------------------


def window_within(window: Window, width: int, height: int) -> Window | None:
    """The part of a window inside a raster, or None."""
    left, top = max(0, window.col_off), max(0, window.row_off)
    right = min(width, window.col_off + window.width)
    bottom = min(height, window.row_off + window.height)
    if right <= left or bottom <= top:
        return None
    return Window(left, top, right - left, bottom - top)


def window_starts(length: int, patch_size: int, stride: int) -> list[int]:
    """Offsets that cover ``[0, length)`` with the fewest windows; the last ends at the edge."""
    if length <= patch_size:
        return [0]
    return [*range(0, length - patch_size, stride), length - patch_size]


def pixel_bounds(coordinates: tuple[float, float, float, float]) -> Window:
    """The window between bounds given in pixels (left, top, right, bottom), edges rounded.

    A pixel belongs to the window when its centre lies between the bounds, so that cells that
    share an edge share no pixel; a thousandth of a pixel of projection noise makes no difference.
    """
    left, top, right, bottom = (math.floor(round(v, 3) + 0.5) for v in coordinates)
    return Window(left, top, right - left, bottom - top)


# --- bands ----------------------------------------------------------------------------------


def rgb_bands(descriptions: Sequence[str | None], colours: Sequence = ()) -> list[int]:
    """The 1-based bands to show as red, green, blue; a single entry means grey.

    By colour interpretation, else by descriptions ("red", or the Sentinel-2 and Landsat 8 names
    B4, B3, B2; for Landsat 4-7, known by six bands B1-B5 and B7, B3, B2, B1), else the first
    three bands (false colour), else the first band.
    """
    roles = [ColorInterp.red, ColorInterp.green, ColorInterp.blue]
    if all(role in colours for role in roles):
        return [list(colours).index(role) + 1 for role in roles]
    names = [(text or "").lower() for text in descriptions]

    def first(pattern: str) -> int | None:
        hits = [i for i, name in enumerate(names, 1) if re.search(pattern, name)]
        return hits[0] if hits else None

    by_word = [
        first(rf"^(b\d+\W?)?{c}$") or first(rf"(?<![a-z]){c}(?!.?edge)")
        for c in ("red", "green", "blue")
    ]
    if None not in by_word:
        return by_word
    landsat = {name for name in names if re.fullmatch(r"b0?\d+", name)}
    order = "321" if landsat == {"b1", "b2", "b3", "b4", "b5", "b7"} else "432"
    by_number = [first(rf"^b0?{digit}\b") for digit in order]
    if None not in by_number:
        return by_number
    return [1, 2, 3] if len(names) >= 3 else [1]


def stretch(image: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """An RGB picture (H, W, 3) uint8: each band from its 2nd to 98th percentile, invalid white."""
    picture = np.full((*valid.shape, 3), 255, np.uint8)
    if valid.any():
        for channel, band in enumerate(np.broadcast_to(image, (3, *valid.shape))):
            low, high = np.percentile(band[valid], [2, 98])
            scaled = (band[valid].astype(np.float32) - low) / ((high - low) or 1)
            picture[valid, channel] = np.clip(scaled * 255, 0, 255)
    return picture


# --- labels ---------------------------------------------------------------------------------


def whole_labels(label: np.ndarray, valid: np.ndarray, source: str) -> np.ndarray:
    """Labels as int64; float rasters are fine as long as every labelled value is whole.

    Raises:
        DatasetError: A labelled pixel holds a fraction.
    """
    if label.dtype.kind == "f":
        values = label[valid]
        if (values != np.round(values)).any():
            bad = values[values != np.round(values)][0]
            raise DatasetError(
                f"{source} holds {bad:g}, which is no class; labels are whole numbers"
            )
        # beyond int64 a cast would wrap around
        label = np.clip(np.where(valid, label, 0), -(2.0**62), 2.0**62)
    return label.astype(np.int64)


def read_label(dataset: rasterio.DatasetReader, window: Window, unlabelled: int):
    """A window of a one-band label raster as (H, W) int64; invalid pixels get ``unlabelled``."""
    label, valid = read_image(dataset, window, image_bands(dataset)[:1])
    return np.where(valid, whole_labels(label[0], valid, dataset.name), unlabelled)


def require_one_band(dataset: rasterio.DatasetReader) -> None:
    """Raise DatasetError unless a label raster has one band (beside alpha)."""
    if len(image_bands(dataset)) != 1:
        raise DatasetError(
            f"{dataset.name} has {dataset.count} bands; a label has one, with a class number "
            "per pixel"
        )


# --- patch folders --------------------------------------------------------------------------


@dataclass(frozen=True)
class PatchPair:
    """An image patch and the label patch of the same stem."""

    image: Path
    label: Path

    @property
    def name(self) -> str:
        return self.image.stem


def patch_root(dataset_root: str | Path) -> Path:
    """The folder that holds the splits: ``ROOT/Patch`` when it is there, else ``ROOT``."""
    root = Path(dataset_root)
    if not root.is_dir():
        raise DatasetError(f"No folder {root}; give the --output of the extraction")
    return root / "Patch" if (root / "Patch").is_dir() else root


def list_tiffs(folder: Path) -> dict[str, Path]:
    """The TIFF files of a folder by stem, sorted; hidden files are left out."""
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.suffix.lower() in TIFF_SUFFIXES and not path.name.startswith("."):
            if path.stem in files:
                raise DatasetError(
                    f"{path} and {files[path.stem].name} have the same stem; remove one"
                )
            files[path.stem] = path
    return files


def list_pairs(dataset_root: str | Path, split: str, required: bool = True):
    """The patch pairs of a split, by name.

    Returns:
        A list of ``PatchPair``; empty when the split is not ``required`` and has no images.

    Raises:
        DatasetError: No images, or an image or label without its partner.
    """
    folder = patch_root(dataset_root) / split
    images, labels = list_tiffs(folder / "images"), list_tiffs(folder / "labels")
    if not images and (required or labels):
        raise DatasetError(
            f"No images found in {folder / 'images'} (looked for .tif, .tiff)"
        )
    for missing, there, kind in (
        (images.keys() - labels.keys(), images, "label"),
        (labels.keys() - images.keys(), labels, "image"),
    ):
        if missing:
            example = there[min(missing)]
            raise DatasetError(
                f"{example} has no {kind} of the same name ({len(missing)} such files); "
                f"add {'them' if len(missing) > 1 else 'it'} or remove the patch"
            )
    return [PatchPair(images[stem], labels[stem]) for stem in images]


@dataclass(frozen=True)
class PatchHeader:
    """What a patch says of itself before it is decoded."""

    bands: int
    height: int
    width: int
    dtype: str


def patch_header(path: Path) -> PatchHeader:
    """The header of a patch, read without decoding a pixel.

    Raises:
        DatasetError: Not a TIFF, or cut off: it points at data beyond its end.
    """
    import tifffile

    try:
        with tifffile.TiffFile(path) as tiff:
            page = tiff.pages.first
            tiff.filehandle.seek(page.offset)
            layout = tiff.tiff
            count = tiff.filehandle.read(layout.tagnosize)
            (tags,) = struct.unpack(layout.tagnoformat, count)
            end = last_byte(page)
            header = PatchHeader(
                page.samplesperpixel, page.imagelength, page.imagewidth, str(page.dtype)
            )
    except (tifffile.TiffFileError, IndexError, ValueError, struct.error) as error:
        raise DatasetError(f"{path} is not a readable TIFF; write it again") from error
    if not 0 < end <= path.stat().st_size or len(page.tags) != tags:
        raise DatasetError(f"{path} is cut off; write it again")
    return header


def read_patch(pair: PatchPair, ignore_index: int = UNLABELLED):
    """Read a pair as the network needs it.

    Returns:
        image (C, H, W) in the file's dtype, valid (H, W) bool, mask (H, W) int64 with
        ``ignore_index`` where the label is nodata or the image is invalid.

    Raises:
        DatasetError: The two do not fit each other.
    """
    with open_raster(pair.image) as image_file, open_raster(pair.label) as label_file:
        require_one_band(label_file)
        if image_file.shape != label_file.shape:
            raise DatasetError(
                f"{pair.image} is {image_file.height} x {image_file.width} pixels but its label "
                f"is {label_file.height} x {label_file.width}"
            )
        if (
            image_file.crs
            and label_file.crs
            and not same_pixel_grid(image_file, label_file, 0.5)
        ):
            raise DatasetError(
                f"{pair.image} and its label lie on different ground; extract them again"
            )
        pixel = 4 * image_file.count + 9  # beside float32, a mask of int64 and validity
        if not fits_in_memory(pixel * image_file.height * image_file.width):
            raise DatasetError(
                f"{pair.image} is {image_file.height} x {image_file.width} pixels, more than the "
                "memory holds; cut it into patches"
            )
        window = Window(0, 0, image_file.width, image_file.height)
        image, valid = read_image(image_file, window, image_bands(image_file))
        mask = read_label(label_file, window, ignore_index)
    return image, valid, np.where(valid, mask, ignore_index)


def class_name_tags(names: Sequence[str]) -> dict[str, str]:
    """Class names as a GeoTIFF tag, which ``class_names_of`` reads."""
    return {"CLASS_NAMES": json.dumps(list(names), ensure_ascii=False)}


def class_names_of(dataset: rasterio.DatasetReader) -> list[str] | None:
    """The class names stored in a label or a map, or None."""
    try:
        names = json.loads(dataset.tags().get("CLASS_NAMES", "null"))
    except json.JSONDecodeError:
        return None  # another program's tag
    fine = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return names if fine and names else None


# --- footprints -----------------------------------------------------------------------------


def footprint(transform: Affine, height: int, width: int) -> Geometry:
    """The ground of a patch as a polygon."""
    import shapely

    corners = [(0, 0), (width, 0), (width, height), (0, height)]
    return shapely.Polygon([transform * corner for corner in corners])


def on_the_ground(footprints: Sequence[Geometry], systems: Sequence) -> GeoSeries:
    """Footprints of several CRS in one of metres: their own, or an equal-area one around them.

    Args:
        footprints: The ground of each patch.
        systems: The CRS of each.
    """
    import geopandas
    import pandas

    texts = pandas.Series([crs.to_wkt() for crs in systems])
    if texts.nunique() == 1 and in_true_metres(systems[0]):
        return geopandas.GeoSeries(list(footprints), crs=systems[0])
    degrees = geopandas.GeoSeries(list(footprints), crs="EPSG:4326")
    for text, rows in texts.groupby(texts).groups.items():
        part = geopandas.GeoSeries(degrees[rows].to_numpy(), crs=text)
        degrees[rows] = part.to_crs("EPSG:4326").to_numpy()
    west, south, east, north = degrees.total_bounds
    middle = f"+lat_0={(south + north) / 2} +lon_0={(west + east) / 2}"
    return degrees.to_crs(f"+proj=laea {middle} +datum=WGS84 +units=m")


def side_of(footprints: GeoSeries) -> float:
    """The side of a usual patch."""
    return float(np.sqrt(footprints.area.median()))


def block_numbers(footprints: GeoSeries, size: float) -> np.ndarray:
    """A number per patch, 0, 1...: the square block of ``size`` metres that its centre lies in."""
    centres = np.stack([footprints.centroid.x, footprints.centroid.y], axis=1)
    origin = centres.min(axis=0) - side_of(footprints) / 2
    blocks = np.floor((centres - origin) / size).astype(int)
    return np.unique(blocks, axis=0, return_inverse=True)[1].ravel()


def common_ground(footprints: GeoSeries, pairs: np.ndarray) -> np.ndarray:
    """The share of the smaller patch's ground that lies in the other, per pair (M, 2)."""
    import shapely

    shapes, areas = footprints.to_numpy(), footprints.area.to_numpy()
    left, right = pairs.T
    common = shapely.area(shapely.intersection(shapes[left], shapes[right]))
    return common / np.minimum(areas[left], areas[right])


def near_pairs(footprints: GeoSeries, parts: Sequence[int], distance: float):
    """Pairs of patches of different parts that lie nearer than a distance to each other.

    Args:
        footprints: In a CRS of metres.
        parts: A whole number per patch.
        distance: Metres. At 0 they share ground; what only touches does not count.

    Returns:
        (M, 2) indices, the first of the part with the lower number.
    """
    parts, index = np.asarray(parts), footprints.sindex
    if distance:
        reach = max(0.0, distance - 1e-6 * side_of(footprints))
        pairs = index.query(footprints, predicate="dwithin", distance=reach).T
    else:
        pairs = index.query(footprints, predicate="intersects").T
    pairs = pairs[parts[pairs[:, 0]] < parts[pairs[:, 1]]]
    # a ten-thousandth is what projections leave between neighbours
    return pairs if distance else pairs[common_ground(footprints, pairs) > 1e-4]


def patch_footprints(pairs: Sequence[PatchPair]) -> GeoSeries:
    """Where patches lie: their outlines in one CRS of metres, from the headers of the images.

    Raises:
        DatasetError: A patch without a CRS, or without a place on the Earth.
    """
    from pyproj.exceptions import ProjError
    from tqdm import tqdm

    shapes, systems = [], []
    bar = {"leave": False, "disable": None, "delay": 2}
    for pair in tqdm(pairs, desc="reading places", unit="patch", **bar):
        with open_raster(pair.image) as file:
            crs = file.crs
            if crs is None or not (crs.is_projected or crs.is_geographic):
                raise DatasetError(
                    f"{pair.image} has no CRS, and --fold_by block and column need to know where "
                    "patches lie; give --fold_by random, or extract from a georeferenced scene"
                )
            shapes.append(footprint(file.transform, file.height, file.width))
            systems.append(crs)
    try:
        ground = on_the_ground(shapes, systems)
        known = np.isfinite(ground.bounds.to_numpy()).all()
    except ProjError:
        known = False
    if not known:
        raise DatasetError(
            f"Patches like {pairs[0].image} do not all lie on the Earth: a transform does not fit "
            "its CRS; mend it, or give --fold_by random"
        )
    return ground


# --- files that appear whole ----------------------------------------------------------------


@contextmanager
def whole_file(target: str | Path, aside: Path | None = None) -> Iterator[Path]:
    """Write a file aside; it gets its name only when the block ends well.

    Args:
        target: The file to be (its folder is made).
        aside: A folder on the same disk for what is unfinished; by default the target's.

    Yields:
        A temporary path. It is flushed to disk and renamed at the end, and removed when the block
        raises. What GDAL keeps in an ``.aux.xml`` beside a raster goes with it.
    """
    target = Path(target)
    if target.is_dir():
        raise SegmentationError(f"{target} is a folder; give the name of a file")
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = aside or target.parent
    handle, name = tempfile.mkstemp(".part", _aside(target), folder)
    os.close(handle)
    part, beside = Path(name), Path(f"{name}.aux.xml")
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        part.chmod(0o666 & ~umask())
        part.replace(target)
        for ending in (".ovr", ".msk", ".aux.xml"):  # GDAL's, of the former file
            if os.path.exists(f"{target}{ending}"):
                os.unlink(f"{target}{ending}")
        if beside.exists():
            beside.replace(f"{target}.aux.xml")
    finally:
        part.unlink(missing_ok=True)
        beside.unlink(missing_ok=True)


def _aside(target: Path) -> str:
    """How the names begin under which a file is written; no other file's do."""
    return f".{target.stem[:40]}-{zlib.crc32(os.fsencode(target.name)):08x}-"


def drop_unfinished(targets: Iterable[Path]) -> None:
    """Remove what a killed run has left of files that ``whole_file`` writes.

    For the run that now writes them alone (see ``sole_run``).
    """
    for target in targets:
        for path in target.parent.glob(f"{glob.escape(_aside(target))}????????.part*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def copy_whole(source: Path, target: Path) -> None:
    """Give a finished file of the toolkit a second name, which appears whole; a copy if need be."""
    with whole_file(target) as part:
        part.unlink()
        try:
            os.link(source, part)
        except OSError:  # a disk without links
            shutil.copyfile(source, part)


@contextmanager
def create_tiff(path: str | Path, **profile) -> Iterator[rasterio.io.DatasetWriter]:
    """A GeoTIFF to write to.

    Raises:
        RasterError: Not all of it was written, which GDAL tells only in its log.
    """
    with rasterio.open(path, "w", driver="GTiff", **profile) as raster:
        yield raster
    require_whole_tiff(path)


def require_whole_tiff(path: str | Path) -> None:
    """Raise RasterError unless all of a TIFF was written."""
    try:
        patch_header(Path(path))
    except DatasetError as error:
        raise RasterError(f"{path} was not written whole; is the disk full?") from error


def umask() -> int:
    """The permissions that new files of this process do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(target: str | Path, content: dict | list) -> None:
    """Write JSON that any reader accepts: NaN and infinity are defects, not values."""
    with whole_file(target) as part:
        part.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


# --- polygons -------------------------------------------------------------------------------

STRIP = 256  # rows of a map that are turned into polygons at a time


@dataclass
class Areas:
    """Connected areas of a map, in the order of their first pixels: an entry for each."""

    classes: np.ndarray  # int32; -1 is nodata, whose areas are counted too
    pixels: np.ndarray  # int64
    extent: np.ndarray  # float64, square metres; NaN when the map does not tell
    last: np.ndarray  # int32, the last row

    def united(self, number: np.ndarray, count: int) -> Areas:
        """The ``count`` areas of which these are parts; ``number`` says of which each is."""
        classes, last = np.zeros((2, count), np.int32)
        classes[number] = self.classes
        np.maximum.at(last, number, self.last)
        pixels = np.bincount(number, self.pixels, count).astype(np.int64)
        return Areas(classes, pixels, np.bincount(number, self.extent, count), last)


def join(count: int, pairs: np.ndarray) -> tuple[int, np.ndarray]:
    """Unite what pairs (2, n) connect, directly or through others.

    Returns:
        How many groups there are, and for each of the ``count`` the number of its group; groups
        are numbered in the order of their first members.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    links = np.ones(pairs.shape[1], bool), tuple(pairs)
    return connected_components(coo_array(links, shape=(count, count)), directed=False)


def distinct_pairs(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The pairs (2, n) int64 of different numbers below 2**31 in two arrays, each once."""
    differ = first != second
    first, second = first[differ].astype(np.int64), second[differ].astype(np.int64)
    keys = np.unique(np.minimum(first, second) << 32 | np.maximum(first, second))
    return np.stack([keys >> 32, keys & 0xFFFFFFFF])


def label_strip(classes: np.ndarray, top: int, row_areas: np.ndarray):
    """Find the 4-connected areas of a strip.

    Args:
        classes: (h, W) int32, -1 where nodata.
        top: The strip's first row in the map.
        row_areas: Square metres of a pixel in each row of the map.

    Returns:
        For each pixel the number of its area, (h, W) int32, and the ``Areas``.
    """
    # runs, pieces of a row of one class, are mostly far fewer than pixels
    starts = np.ones(classes.shape, bool)
    starts[:, 1:] = classes[:, 1:] != classes[:, :-1]
    runs = np.cumsum(starts, dtype=np.int32).reshape(classes.shape) - 1
    below = (classes[1:] == classes[:-1]) & (starts[1:] | starts[:-1])
    begin = np.flatnonzero(starts)
    count, number = join(len(begin), np.stack([runs[:-1][below], runs[1:][below]]))
    pixels = np.diff(begin, append=classes.size)
    rows = (top + begin // classes.shape[1]).astype(np.int32)
    parts = Areas(classes.ravel()[begin], pixels, pixels * row_areas[rows], rows)
    return number.astype(np.int32)[runs], parts.united(number, count)


def labelled_strips(dataset, num_classes: int, rows: int, title: str) -> Iterator:
    """Cut a class map into strips and find the areas of each.

    Args:
        dataset: The map.
        num_classes: Classes 0 to ``num_classes`` - 1 may occur.
        rows: Of a strip.
        title: Of the progress bar.

    Yields:
        First row, numbers (h, W) int32 that go on from strip to strip, and the strip's ``Areas``.

    Raises:
        RasterError: A class that has no name.
    """
    from tqdm import tqdm

    row_areas = pixel_areas(dataset)
    row_areas = np.full(dataset.height, np.nan) if row_areas is None else row_areas
    base = 0
    tops = range(0, dataset.height, rows)
    for top in tqdm(tops, desc=title, unit="strip", disable=None):
        height = min(rows, dataset.height - top)
        window = Window(0, top, dataset.width, height)
        classes = read_label(dataset, window, -1)
        if classes.max() >= num_classes:
            raise RasterError(
                f"{dataset.name} holds class {classes.max()}, but there are names for "
                f"{num_classes} classes only; name all"
            )
        labels, areas = label_strip(classes.astype(np.int32), top, row_areas)
        yield top, labels + np.int32(base), areas
        base += len(areas.classes)


def find_areas(strips: Iterator, min_area: float) -> tuple[np.ndarray, Areas]:
    """Put the areas of strips together to those of the map, and sieve them.

    Returns:
        For each number of the strips the area that it belongs to, int32, and the areas.
    """
    tables, pairs, above = [], [np.zeros((2, 0), np.int64)], None
    for _, labels, table in strips:
        if above is not None:
            pairs.append(distinct_pairs(above, labels[0]))
        if min_area > 0:
            pairs.append(distinct_pairs(labels[:, :-1], labels[:, 1:]))
            pairs.append(distinct_pairs(labels[:-1], labels[1:]))
        above = labels[-1].copy()
        tables.append(table)
    columns = zip(*(vars(table).values() for table in tables))
    areas, pairs = Areas(*map(np.concatenate, columns)), np.concatenate(pairs, axis=1)
    same = areas.classes[pairs[0]] == areas.classes[pairs[1]]
    count, number = join(len(areas.classes), pairs[:, same])
    areas = areas.united(number, count)
    if min_area > 0:
        pairs = distinct_pairs(*number[pairs[:, ~same]])
        pairs = pairs[:, (areas.classes[pairs] >= 0).all(axis=0)]
        heirs, areas.classes = sieve(areas, pairs, min_area)
        first, merged = np.unique(heirs, return_inverse=True)
        number, areas = merged[number], areas.united(merged, len(first))
    return number.astype(np.int32), areas


def sieve(areas: Areas, pairs: np.ndarray, min_area: float):
    """Give areas that are too small to their neighbours; the rule is ``write_polygons``'s.

    Args:
        areas: Of the map.
        pairs: (2, n), neighbours of different classes, each pair once.
        min_area: Square metres.

    Returns:
        For each area the first one of those that it is united with, and its class.
    """
    limit = min_area * (1 - 1e-9)  # sums of fractions are not exact
    count = len(areas.classes)
    small = (areas.extent < limit) & (areas.classes >= 0)
    ends = np.concatenate([pairs, pairs[::-1]], axis=1)
    ends = ends[:, small[ends[0]]]
    ends = ends[:, np.argsort(ends[0], kind="stable")]
    bounds = memoryview(np.searchsorted(ends[0], np.arange(count + 1)))
    neighbours = ends[1].astype(np.int32)
    # plain numbers from memory views are quicker than NumPy's, and less than lists
    heirs, following = np.arange(count), np.arange(count)
    heir, ring = memoryview(heirs), memoryview(following)  # a ring of members each
    columns = (areas.classes, areas.pixels, areas.extent)
    classes, pixels, extent = (memoryview(column.copy()) for column in columns)

    def find(area: int) -> int:
        while heir[area] != area:
            heir[area] = area = heir[heir[area]]
        return area

    def around(area: int) -> set[int]:
        found, member = set(), area
        while True:
            found.update(neighbours[bounds[member] : bounds[member + 1]].tolist())
            member = ring[member]
            if member == area:
                return {find(other) for other in found} - {area}

    waiting = [(pixels[area], area) for area in np.flatnonzero(small).tolist()]
    heapify(waiting)
    while waiting:
        size, area = heappop(waiting)
        if heir[area] != area or pixels[area] != size:
            continue  # it has grown since
        others = around(area)
        if not others:
            continue
        largest = max(
            others, key=lambda other: (pixels[other], -classes[other], -other)
        )
        class_ = classes[largest]
        group = [area, *(other for other in others if classes[other] == class_)]
        first = min(group)
        pixels[first] = sum(pixels[member] for member in group)
        extent[first] = sum(extent[member] for member in group)
        classes[first] = class_
        for member in group:
            heir[member] = first
            if member != first:
                ring[first], ring[member] = ring[member], ring[first]
        if extent[first] < limit:
            heappush(waiting, (pixels[first], first))
    while (heirs != heirs[heirs]).any():
        heirs = heirs[heirs]
    return heirs, np.asarray(classes)[heirs]


def outlines(areas: np.ndarray, valid: np.ndarray, top: int) -> Iterator:
    """The polygons of a strip's areas, in pixels of the map, each with its area's number."""
    import shapely
    from rasterio import features

    shift = rasterio.Affine.translation(0, top)
    found = features.shapes(areas, valid, connectivity=4, transform=shift)
    while batch := list(islice(found, 10_000)):
        polygons = [shape["coordinates"] for shape, _ in batch]
        rings = list(chain.from_iterable(polygons))
        points = np.array(list(chain.from_iterable(rings)))
        offsets = [np.cumsum([0, *map(len, parts)]) for parts in (rings, polygons)]
        polygons = shapely.from_ragged_array(
            shapely.GeometryType.POLYGON, points, offsets
        )
        yield from zip((int(area) for _, area in batch), polygons)


def unite(parts: Sequence):
    """The polygon that an area's polygons in several strips make together."""
    import shapely

    # where a part meets a seam it is open: its holes are whole and stay as they are
    shells = shapely.get_exterior_ring(parts)
    whole = shapely.union_all(shapely.polygons(shells))
    holes = [hole for polygon in (whole, *parts) for hole in polygon.interiors]
    return shapely.Polygon(whole.exterior, holes)


def straighten(polygons: Sequence) -> np.ndarray:
    """Leave out the vertices of polygons along pixel edges that are no corners."""
    import shapely

    kind, points, (ends, shells) = shapely.to_ragged_array(polygons)
    starts, stops = ends[:-1], ends[1:] - 1  # a ring ends with its first vertex
    before, after = np.arange(len(points)) - 1, np.arange(len(points)) + 1
    before[starts], after[stops] = stops - 1, starts + 1
    straight = (points[before] == points) & (points[after] == points)
    corner = ~straight.any(axis=1)
    corner[stops] = False
    points, lengths = points[corner], np.add.reduceat(corner, starts, dtype=np.int64)
    ends = np.cumsum([0, *lengths])
    points = np.insert(points, ends[1:], points[ends[:-1]], axis=0)  # close the rings
    ends += np.arange(len(ends))
    return shapely.from_ragged_array(kind, points, (ends, shells))


def whole_polygons(strips: Iterator, belongs: np.ndarray, areas: Areas) -> Iterator:
    """Turn areas into polygons strip by strip, without seams.

    Args:
        strips: See ``labelled_strips``.
        belongs: The area of each number of the strips.
        areas: Of the map.

    Yields:
        Numbers of areas and their polygons in pixels, ordered by last row and first pixel; areas
        that go on in the next strip wait for it.
    """
    import shapely

    parts: dict[int, list] = {}
    for top, labels, _ in strips:
        numbers = belongs[labels]
        for area, polygon in outlines(numbers, areas.classes[numbers] >= 0, top):
            parts.setdefault(area, []).append(polygon)
        bottom = top + len(labels)
        ended = [area for area in parts if areas.last[area] < bottom]
        ended.sort(key=lambda area: (areas.last[area], area))
        pieces = map(parts.pop, ended)
        polygons = [unite(p) if len(p) > 1 else p[0] for p in pieces]
        if ended:
            yield ended, shapely.normalize(straighten(polygons))


def feature_table(numbers, polygons, areas: Areas, names, transform) -> dict:
    """The columns of a layer: areas by number, their polygons brought from pixels to the ground."""
    import shapely

    a, b, c, d, e, f = transform[:6]
    matrix, origin = np.array([[a, d], [b, e]]), (c, f)
    return {
        "class": areas.classes[numbers],
        "class_name": np.array(names, object)[areas.classes[numbers]],
        "area_ha": areas.extent[numbers] / 1e4,
        "geometry": shapely.transform(polygons, lambda xy: xy @ matrix + origin),
    }


def append_features(file: Path, layer: str, table: dict, crs) -> None:
    """Add features to a layer of a GeoPackage, which is made when it is not there.

    Raises:
        SegmentationError: They cannot be written.
    """
    import geopandas
    from pyogrio.errors import DataLayerError, DataSourceError

    frame = geopandas.GeoDataFrame(table, crs=crs and crs.to_wkt())
    options = {"layer": layer, "driver": "GPKG", "geometry_type": "Polygon"}
    options["mode"] = "a" if file.exists() else "w"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "'crs' was not provided")
            frame.to_file(file, engine="pyogrio", **options)
    except (DataSourceError, DataLayerError) as error:
        raise SegmentationError(  # GDAL may quote pages of SQL
            f"Cannot write the polygons {layer}: {reason(error):.120}; "
            "is the disk full?"
        ) from error


def write_polygons(
    map_path: Path,
    target: Path,
    names: Sequence[str],
    min_area: float = 0.0,
    rows: int = STRIP,
) -> int:
    """Write a class map as a GeoPackage with a polygon per connected area of one class.

    Pixels are connected through their edges. The columns are class, class_name and area_ha: the
    hectares of the area's pixels as ``pixel_areas`` measures them, null without a CRS. The
    map is read in strips of rows, and memory holds one of them, a few numbers per area, and the
    outlines of areas that reach into the next strip; the polygons are the same for all strips.

    With ``min_area``, areas smaller than that many square metres are merged into others. The one
    of fewest pixels comes first (of several the one whose first pixel comes first, row by row). It
    takes the class of its neighbour with most pixels (then the lowest class, then the first pixel)
    and forms one area with all its neighbours of that class, which takes its turn again if it is
    still too small. An area without neighbours, an island in nodata, stays as it is.

    Args:
        map_path: One band of classes; nodata gives no polygon.
        target: The GeoPackage; its layer has the name of the file.
        names: Of all classes.
        min_area: Smallest area in square metres.
        rows: Of a strip.

    Returns:
        The number of polygons.

    Raises:
        RasterError: A class without a name, or ``min_area`` for a map whose CRS does not tell the
            size of its pixels.
        SegmentationError: The GeoPackage cannot be written.
    """
    with (
        open_raster(map_path) as dataset,
        whole_file(target) as part,
        # SQLite's own files lie beside a GeoPackage while it grows
        tempfile.TemporaryDirectory(
            ".part", _aside(Path(target)), part.parent
        ) as folder,
    ):
        require_one_band(dataset)
        if min_area > 0 and pixel_areas(dataset) is None:
            raise RasterError(
                f"{map_path} has no CRS that tells the size of its pixels, and so no smallest "
                "area; assign one (gdal_edit.py -a_srs)"
            )
        strips = labelled_strips(dataset, len(names), rows, "areas")
        belongs, areas = find_areas(strips, min_area)
        strips = labelled_strips(dataset, len(names), rows, "polygons")
        file, total = Path(folder) / "map.gpkg", 0
        none = np.zeros(0, int), np.zeros(0, object)  # makes the layer of an empty map
        for numbers, polygons in chain([none], whole_polygons(strips, belongs, areas)):
            table = feature_table(numbers, polygons, areas, names, dataset.transform)
            append_features(file, Path(target).stem, table, dataset.crs)
            total += len(numbers)
        file.replace(part)
    return total


# --- colours and pictures -------------------------------------------------------------------

_COLOURS = [
    (31, 119, 180), (214, 57, 40), (232, 197, 71), (34, 120, 60), (155, 204, 101),
    (148, 90, 170), (240, 140, 50), (90, 200, 210), (140, 86, 75), (230, 120, 190),
    (110, 110, 110), (20, 50, 110), (250, 220, 180), (120, 20, 50), (170, 220, 250),
    (80, 80, 20),
]  # fmt: skip


def class_colours(num_classes: int) -> list[tuple[int, int, int]]:
    """One RGB colour per class, 0..255; the two classes of a binary map are grey and red."""
    if num_classes <= 2:
        return [(225, 225, 225), (200, 40, 40)]
    import colorsys

    golden = 0.618034
    more = (
        colorsys.hsv_to_rgb(
            (i * golden) % 1, 0.55 + 0.4 * (i % 2), 0.6 + 0.15 * (i % 3)
        )
        for i in range(max(0, num_classes - len(_COLOURS)))
    )
    return [*_COLOURS, *(tuple(round(255 * v) for v in c) for c in more)][:num_classes]


def colour_map(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Class ids (H, W) as an RGB picture (H, W, 3) uint8; anything else is white."""
    palette = np.full((num_classes + 1, 3), 255, np.uint8)
    palette[:num_classes] = class_colours(num_classes)[:num_classes]
    labels = labels.astype(np.int64)
    known = (labels >= 0) & (labels < num_classes)
    return palette[np.where(known, labels, num_classes)]


def overview(
    dataset: rasterio.DatasetReader, bands: Sequence[int], longest: int = 1000
):
    """A whole raster, thinned to at most ``longest`` pixels a side: image, valid."""
    scale = min(1.0, longest / max(dataset.shape))
    height, width = (max(1, round(side * scale)) for side in dataset.shape)
    return _read(dataset, bands, out_shape=(height, width))


def draw_panels(
    panels: Sequence[dict], legend=(), title: str = "", columns: int = 0
) -> Figure:
    """Draw pictures side by side.

    Args:
        panels: Each with "title", "picture" (an array for imshow) and, for a single band,
            optional "limits" (low, high), which adds a colour bar.
        legend: (name, RGB 0..255) pairs.
        title: One line above all panels.
        columns: Panels in a row (default: all).
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    columns = columns or len(panels)
    rows = math.ceil(len(panels) / columns)
    width = 4.6 * columns  # inches; a name takes 0.09 a letter and 0.7 beside
    longest = max((len(name) for name, _ in legend), default=0)
    in_a_row = min(max(1, int(width / (0.09 * longest + 0.7))), len(legend) or 1)
    below = 0.25 * math.ceil(len(legend) / in_a_row)
    figure = Figure(figsize=(width, 4.6 * rows + 0.5 + below), layout="constrained")
    for number, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, number)
        limits = panel.get("limits")
        style = (
            {"cmap": "viridis", "vmin": limits[0], "vmax": limits[1]} if limits else {}
        )
        drawn = axes.imshow(panel["picture"], interpolation="nearest", **style)
        axes.set_title(panel["title"], fontsize=11, parse_math=False)
        axes.set_axis_off()
        if limits:
            figure.colorbar(drawn, ax=axes, shrink=0.7)
    if title:
        figure.suptitle(title, parse_math=False)
    if legend:
        handles = [
            Patch(facecolor=np.divide(colour, 255), edgecolor="grey", label=name)
            for name, colour in legend
        ]
        drawn = figure.legend(
            handles=handles,
            loc="outside lower center",
            ncols=in_a_row,
            frameon=False,
        )
        for text in drawn.get_texts():
            text.set_parse_math(False)
    return figure


def save_figure(figure: Figure, target: str | Path) -> None:
    """Store a figure as a PNG."""
    with whole_file(target) as part:
        figure.savefig(part, format="png", dpi=110)
