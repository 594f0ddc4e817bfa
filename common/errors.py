"""The errors that a user can fix, and one line for any that ends a script."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from difflib import get_close_matches


class SegmentationError(Exception):
    """A problem that the user can fix: the message says what, where and how."""


class RasterError(SegmentationError, ValueError):
    """A raster that cannot be used as it is."""


class DatasetError(SegmentationError, ValueError):
    """Patch folders, image-label pairs, label values, alignment."""


class OptionError(SegmentationError, ValueError):
    """An option whose value cannot be right, whatever the data; scripts exit with status 2."""


class CheckpointError(SegmentationError, ValueError):
    """A checkpoint that cannot be read, or that contradicts the data or the options."""


class UndescribedError(CheckpointError):
    """A file of weights that does not say of which model."""


def require(condition: bool, option: str, value, expected: str) -> None:
    """Raise OptionError naming an option, its value and what was expected."""
    if not condition:
        raise OptionError(f"{option} {value}: expected {expected}")


def unknown_name(kind: str, name: str, known: Sequence[str]) -> OptionError:
    """The error for a name that is not in ``known``, with the nearest known one."""
    lower = {text.lower(): text for text in known}
    near = get_close_matches(name.lower(), lower, n=1)
    hint = f"; did you mean {lower[near[0]]!r}?" if near else ""
    listed = ", ".join(known) if len(known) <= 24 else f"{len(known)} names are known"
    return OptionError(f"Unknown {kind} {name!r}{hint} ({listed})")


# the note of an error that ends a run whose finished work stays
WORK_IS_KEPT = "What is finished is kept: --resume continues from there"

DISK_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


def error_message(error: BaseException, scarce: str) -> str:
    """One line for an error that ends a script, with the error's notes as sentences after it.

    ``scarce`` are the options that take memory.
    """
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError):
        text = f"The memory is too small ({text or 'nothing left'}); lower {scarce}"
    elif isinstance(error, OSError) and error.errno in DISK_FULL:
        text = f"{text}; free some, or write elsewhere"
    return ". ".join([text, *getattr(error, "__notes__", [])])


def gdal_message(error: BaseException) -> str:
    """What went wrong, in one line: GDAL's own words where rasterio only points at them."""
    cause = error.__cause__ if "previous exception" in str(error) else None
    lines = str(cause or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
