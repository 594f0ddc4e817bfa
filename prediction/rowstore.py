"""Finished rows of a map on disk, from which an unfinished run is resumed."""

from __future__ import annotations

import logging
import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.errors import SegmentationError
from common.files import atomic_write, naming, write_json
from prediction.layers import Layer, bytes_of
from prediction.tiling import Extent

log = logging.getLogger("semanticseg4eo")


def require_room(folder: Path, layers: dict[str, Layer], shape, form: str) -> int:
    """The bytes that an unfinished map of shape (H, W) takes in a folder, beside its outputs.

    That is the finished rows and, where ``form`` is "cog", the GeoTIFFs that the outputs are made
    of; all without compression.

    Raises:
        SegmentationError: The disk does not hold them and the outputs.
    """
    pixels = shape[0] * shape[1]
    outputs = bytes_of(layers, written=True) * pixels
    unfinished = bytes_of(layers) * pixels + (outputs if form == "cog" else 0)
    needed = unfinished + outputs
    parents = folder.absolute(), *folder.absolute().parents
    free = shutil.disk_usage(next(path for path in parents if path.exists())).free
    for path in folder.glob("*"):  # of an earlier run: continued, or removed
        status = path.stat()
        free += getattr(status, "st_blocks", status.st_size / 512) * 512  # no holes
    if needed > free:
        raise SegmentationError(
            f"{folder.parent} has {free / 1e9:.1f} GB free, but the map takes up to "
            f"{needed / 1e9:.1f} GB while it is made; free some, or write elsewhere"
        )
    return unfinished


class RowStore:
    """Finished rows of a map on disk, from which an unfinished run is resumed.

    In a hidden folder lie ``run.json`` (what is being made), a raw file per layer in the order
    (row, band, column), and a ``done-N.txt`` per process with a line for every part of the scene
    that is safely in them: its four sides and its ``confidence_counts``. Output files are always
    made from there, from the first row to the last: they do not depend on which process finished
    which row when. A thread may read while another one writes.
    """

    def __init__(self, folder: Path, layers: dict[str, Layer], shape, number: int = 0):
        """Open what ``begin`` has made, as process ``number``; shape is (H, W)."""
        self.layers = layers
        self.height, self.width = shape
        self.covered = np.zeros(self.height, np.int64)  # finished columns of each row
        self.opened = ExitStack()

        def unbuffered(name: str, mode: str):
            file = open(folder / name, mode, buffering=0)  # noqa: SIM115
            return self.opened.enter_context(file)

        self.files = {name: unbuffered(f"{name}.raw", "r+b") for name in layers}
        self.sources = {name: unbuffered(f"{name}.raw", "rb") for name in layers}
        self.journal = unbuffered(f"done-{number}.txt", "ab")

    @staticmethod
    def begin(folder: Path, run: dict, layers: dict[str, Layer], shape) -> None:
        """Make the folder of a map of which nothing is stored yet."""
        if (folder / "run.json").exists():
            log.info("the unfinished map in %s is dropped", folder)
        RowStore.remove(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in layers:
            (folder / f"{name}.raw").touch()
        write_json(folder / "run.json", run)

    @staticmethod
    def remove(folder: Path) -> None:
        """Remove the folder; a kill while it does leaves nothing that could be resumed."""
        (folder / "run.json").unlink(missing_ok=True)
        if folder.exists():
            shutil.rmtree(folder)

    @staticmethod
    def has_parts(folder: Path) -> bool:
        """Whether a folder holds finished rows that a run can continue."""
        journals = folder.glob("done-*.txt") if (folder / "run.json").exists() else []
        return any(read_journal(journal) for journal in journals)

    @staticmethod
    def finished_parts(folder: Path) -> list[StoredPart]:
        """The parts that are stored; the journals of the earlier processes become one."""
        journals = sorted(folder.glob("done-*.txt"))
        parts = [part for journal in journals for part in read_journal(journal)]
        parts = list(dict.fromkeys(parts))  # a kill right here leaves some in two
        with atomic_write(folder / "done-0.txt") as file:
            file.write_text("".join(map(_journal_line, parts)))
        for journal in journals:
            if journal.name != "done-0.txt":
                journal.unlink()
        return parts

    def mark(self, part: Extent) -> None:
        """Count a part as finished."""
        self.covered[part.top : part.bottom] += part.right - part.left

    def write(
        self, part: Extent, arrays: dict[str, np.ndarray], counts: np.ndarray
    ) -> None:
        """Store a part, {layer: (bands, n, w)} and its ``confidence_counts``, safely."""
        for name, array in arrays.items():
            file, pixel = self.files[name], array.itemsize
            rows = np.ascontiguousarray(array.swapaxes(0, 1))
            bands = len(array)
            if array.shape[2] == self.width:
                runs = [(part.top * bands * self.width, rows)]
            else:
                runs = [
                    (((part.top + row) * bands + band) * self.width + part.left, line)
                    for row, lines in enumerate(rows)
                    for band, line in enumerate(lines)
                ]
            for offset, pixels in runs:
                file.seek(offset * pixel)
                _write_all(file, memoryview(pixels).cast("B"))
            _flush(file)
        line = _journal_line(StoredPart(part, tuple(counts.tolist())))
        _write_all(self.journal, memoryview(line.encode()))
        _flush(self.journal)
        self.mark(part)

    def read(self, name: str, top: int, bottom: int) -> np.ndarray:
        """Finished rows of a layer, (bands, n, W)."""
        layer, file = self.layers[name], self.sources[name]
        rows = np.empty((bottom - top, len(layer.bands), self.width), layer.dtype)
        file.seek(top * rows[0].nbytes)
        data = memoryview(rows).cast("B")
        while data:
            if not (count := file.readinto(data)):
                raise SegmentationError(
                    f"{file.name} is cut off; start again with --overwrite"
                )
            data = data[count:]
        return rows.swapaxes(0, 1)


class StoredPart(NamedTuple):
    """A part of a map that is safely stored."""

    part: Extent
    counts: tuple[int, ...]  # see ``confidence_counts``


def _journal_line(finished: StoredPart) -> str:
    return " ".join(map(str, finished.part + finished.counts)) + "\n"


def read_journal(path: Path) -> list[StoredPart]:
    """The stored parts that a journal lists."""
    lines = path.read_text().splitlines(keepends=True)
    # a line without an end is of a process that was killed while it wrote
    numbers = [tuple(map(int, line.split())) for line in lines if line.endswith("\n")]
    return [StoredPart(Extent(*line[:4]), line[4:]) for line in numbers]


def _write_all(file, data: memoryview) -> None:
    with naming(file.name):
        while data:
            data = data[file.write(data) :]


def _flush(file) -> None:
    with naming(file.name):
        os.fsync(file.fileno())
