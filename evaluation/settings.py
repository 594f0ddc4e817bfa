"""The options of ``Evaluate_map.py``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from common.errors import OptionError, require
from common.options import check_limits, setting

SCARCE = "--block_size or --boundary_tolerance"  # what takes memory
MOST_TOLERANT = 64  # pixels


@dataclass(frozen=True)
class EvaluationConfig:
    """The settings of an evaluation."""

    map: str | None = setting(
        None, "class map to evaluate: of Predict_large_image.py, or any raster of classes",
        "files", shown="none",
    )  # fmt: skip
    label: str | None = setting(
        None, "what the map is compared with: a raster or vector file as extraction takes them, in "
        "any CRS",
        "files", shown="none",
    )  # fmt: skip
    label_column: str | None = setting(
        None, "column of a vector --label that holds the class", "files", shown="none"
    )  # fmt: skip
    label_values: str | None = setting(
        None, "values of --label that are classes, in class order, as in extraction", "files",
        shown="its own",
    )  # fmt: skip
    output: str | None = setting(
        None, "folder to write to", "files", shown="MAP_evaluation beside the map"
    )  # fmt: skip
    overwrite: bool = setting(False, "replace files that exist", "files")
    boundary_tolerance: str = setting(
        "2", "distance within which boundaries agree: pixels, or metres as 20m", "measures"
    )  # fmt: skip
    block_size: float | None = setting(
        None, "side in metres of the blocks that the intervals are drawn from", "measures",
        shown="a tenth of the map", above=0,
    )  # fmt: skip
    seed: int = setting(42, "of all random draws", "measures", least=0)

    def __post_init__(self):
        check_limits(self)
        tolerance(self.boundary_tolerance)
        if self.map is None or self.label is None:
            raise OptionError("--map and --label: expected both")

    @property
    def output_path(self) -> str:
        """``--output``, or what it is without it."""
        return self.output or str(Path(self.map).with_suffix("")) + "_evaluation"


def tolerance(text: str) -> tuple[float, str]:
    """``--boundary_tolerance`` as a number and its unit, "pixels" or "metres"."""
    found = re.fullmatch(r"(\d{1,6}(?:\.\d{1,9})?)\s*(m?)", text.strip())
    require(found is not None, "--boundary_tolerance", text, "pixels, or metres as 20m")
    return float(found[1]), "metres" if found[2] else "pixels"


def tolerance_in_pixels(text: str, pixel_size: float | None) -> float:
    """``--boundary_tolerance`` in pixels of a size in metres, None where that is unknown."""
    value, unit = tolerance(text)
    if unit == "metres":
        known = pixel_size is not None
        require(
            known,
            "--boundary_tolerance",
            text,
            "pixels, since these have no known size",
        )
        value /= pixel_size
    most = f"at most {MOST_TOLERANT} pixels"
    require(value <= MOST_TOLERANT, "--boundary_tolerance", text, most)
    return value
