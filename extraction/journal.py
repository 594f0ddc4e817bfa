"""What became of each cell: what an interrupted extraction is resumed from."""

from __future__ import annotations

import json
from pathlib import Path

from common.errors import DatasetError
from common.tiffs import tiff_header
from extraction.scenes import ERROR


class Journal:
    """What became of each cell, in memory and in a file that an interrupted run is resumed from."""

    def __init__(self, path: Path):
        self.path = path
        self.records: dict[str, dict] = {}
        self.skipped: dict[str, str] = {}
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # the last line may be cut off
        if whole != text:
            path.write_text(whole)
        for entry in map(json.loads, whole.splitlines()):
            if "skipped" not in entry:
                self.records[entry["name"]] = entry
            elif not entry["skipped"].startswith(ERROR):  # errors are tried again
                self.skipped[entry["name"]] = entry["skipped"]
        # a line at a time, so that what is there is whole when the process is killed
        self.file = open(path, "a", buffering=1)  # noqa: SIM115

    def close(self) -> None:
        self.file.close()

    def note(self, name: str, outcome: dict | str) -> None:
        """Keep the record of a patch, or the reason why there is none."""
        if isinstance(outcome, str):
            self.skipped[name] = outcome
            outcome = {"name": name, "skipped": outcome}
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
