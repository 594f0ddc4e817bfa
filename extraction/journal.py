"""The outcome of each cell, from which an unfinished extraction is resumed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from rasterio.transform import Affine

from common.errors import DatasetError
from common.files import naming
from common.ground import footprint
from common.tiffs import tiff_header
from extraction.settings import ExtractionOptions

if TYPE_CHECKING:
    from shapely import Geometry

ERROR = "error: "  # begins the text of what could not be read


class Skipped(NamedTuple):
    """Why a cell, or a whole scene, gives no patch."""

    reason: str
    is_error: bool = False  # it cannot be read: only with --skip_errors

    def __str__(self) -> str:
        """As in the journal and the metadata."""
        return f"{ERROR}{self.reason}" if self.is_error else self.reason

    @classmethod
    def parse(cls, text: str) -> Skipped:
        return cls(text.removeprefix(ERROR), text.startswith(ERROR))


def class_counts(records: Sequence[dict]) -> np.ndarray:
    """The pixels of each class in patches, (P, K) int64, by their records."""
    rows = zip_longest(*(record["class_pixels"] for record in records), fillvalue=0)
    return np.array(list(rows)).T


def patch_footprint(record: dict, config: ExtractionOptions) -> Geometry:
    """The ground of a patch, in the CRS of its scene, by its record."""
    size = config.patch_size
    return footprint(Affine(*record["transform"]), size, size)


class Journal:
    """The outcome of each cell, in memory and in a file of a line per cell."""

    def __init__(self, path: Path):
        self.path = path
        self.records: dict[str, dict] = {}
        self.skipped: dict[str, Skipped] = {}
        text = path.read_text() if path.exists() else ""
        complete = text[: text.rfind("\n") + 1]  # the last line may be cut off
        if complete != text:
            with naming(path):
                path.write_text(complete)
        for entry in map(json.loads, complete.splitlines()):
            if "skipped" not in entry:
                self.records[entry["name"]] = entry
                continue
            skipped = Skipped.parse(entry["skipped"])
            if not skipped.is_error:  # errors are tried again
                self.skipped[entry["name"]] = skipped
        # a line at a time, so that lines are complete when the process is killed
        self.file = open(path, "a", buffering=1)  # noqa: SIM115

    @staticmethod
    def has_patches(path: Path) -> bool:
        """Whether a journal's file holds the record of a patch."""
        text = path.read_text() if path.exists() else ""
        lines = text[: text.rfind("\n") + 1].splitlines()
        return any("skipped" not in json.loads(line) for line in lines)

    def close(self) -> None:
        with naming(self.path):
            self.file.close()

    def note(self, name: str, outcome: dict | Skipped) -> None:
        """Keep the record of a patch, or why there is none."""
        if isinstance(outcome, Skipped):
            self.skipped[name] = outcome
            outcome = {"name": name, "skipped": str(outcome)}
        else:
            self.records[name] = outcome
        with naming(self.path):
            self.file.write(json.dumps(outcome) + "\n")

    def forget_missing(self, staging: Path) -> None:
        """Drop the records of patches that are incomplete, and patches without a record."""
        for name in list(self.records):
            try:
                for kind in ("images", "labels"):
                    tiff_header(staging / kind / f"{name}.tif")
            except (DatasetError, OSError):
                del self.records[name]
        for kind in ("images", "labels"):
            for patch in (staging / kind).iterdir():
                if patch.stem not in self.records:
                    patch.unlink()
