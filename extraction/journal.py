"""What became of each cell: what an interrupted extraction is resumed from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from common.errors import DatasetError
from common.tiffs import tiff_header

ERROR = "error: "  # begins the text of what could not be read


class Skipped(NamedTuple):
    """Why there is no patch of a cell, or none of a whole scene."""

    reason: str
    is_error: bool = False  # it cannot be read, and --skip_errors lets it pass

    def __str__(self) -> str:
        """As in the journal and the metadata."""
        return f"{ERROR}{self.reason}" if self.is_error else self.reason

    @classmethod
    def parse(cls, text: str) -> Skipped:
        return cls(text.removeprefix(ERROR), text.startswith(ERROR))


class Journal:
    """What became of each cell, in memory and in a file that an interrupted run is resumed from."""

    def __init__(self, path: Path):
        self.path = path
        self.records: dict[str, dict] = {}
        self.skipped: dict[str, Skipped] = {}
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # the last line may be cut off
        if whole != text:
            path.write_text(whole)
        for entry in map(json.loads, whole.splitlines()):
            if "skipped" not in entry:
                self.records[entry["name"]] = entry
                continue
            skipped = Skipped.parse(entry["skipped"])
            if not skipped.is_error:  # errors are tried again
                self.skipped[entry["name"]] = skipped
        # a line at a time, so that what is there is whole when the process is killed
        self.file = open(path, "a", buffering=1)  # noqa: SIM115

    def close(self) -> None:
        self.file.close()

    def note(self, name: str, outcome: dict | Skipped) -> None:
        """Keep the record of a patch, or the reason why there is none."""
        if isinstance(outcome, Skipped):
            self.skipped[name] = outcome
            outcome = {"name": name, "skipped": str(outcome)}
        else:
            self.records[name] = outcome
        self.file.write(json.dumps(outcome) + "\n")

    def forget_missing(self, staging: Path) -> None:
        """Drop the records of patches that are not there whole, and patches without a record."""
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
