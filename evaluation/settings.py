"""The options of ``Evaluate_map.py``."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path

from common import SPLITS
from common.errors import OptionError, require
from common.label_options import LabelOptions
from common.options import check_limits, setting

SCARCE = "--block_size or --boundary_tolerance"  # what takes memory
BOUNDARY_TOLERANCE = 2  # pixels
MOST_TOLERANT = 64  # pixels

LABEL_OPTIONS = [item.name for item in fields(LabelOptions)]
# what each kind of evaluation needs, and what else it takes beside --output and --overwrite
KINDS = {
    "map": (
        ("map", "label"),
        (*LABEL_OPTIONS, "boundary_tolerance", "block_size", "seed"),
    ),
    "sample": (("map", "sample"), ("allocate", "min_per_class", "seed", "model")),
    "model": (("model", "dataset_root"), ("split", "boundary_tolerance", "device")),
}
USAGE = "give --map with --label or --sample, or --model with --dataset_root"


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """The settings of an evaluation, but for those of labels."""

    map: str | None = setting(
        None, "class map to evaluate: of Predict_large_image.py, or any raster of classes",
        "files", shown="none",
    )  # fmt: skip
    label: str | None = setting(
        None, "what the map is compared with: a raster or vector file as extraction takes them, in "
        "any CRS",
        "files", shown="none",
    )  # fmt: skip
    sample: int | None = setting(
        None, "draw so many points of the map at random, to be labelled by hand", "sample",
        shown="none", least=1,
    )  # fmt: skip
    allocate: str = setting(
        "proportional", "points of each class: proportional to its pixels, equal, or neyman, which "
        "also counts how right the test of the model says it is",
        "sample", choices=("proportional", "equal", "neyman"),
    )  # fmt: skip
    min_per_class: int = setting(
        30, "points of each class at least, taken from the classes with most points", "sample", least=0
    )  # fmt: skip
    model: str | None = setting(
        None, "checkpoint (.pth), or folder of a run, to examine on the patches of --dataset_root; for "
        "--allocate neyman what made the map", "files", shown="none; for neyman what the map's statistics name"
    )  # fmt: skip
    dataset_root: str | None = setting(
        None, "dataset that --model is examined on", "files", shown="none"
    )  # fmt: skip
    split: str = setting("test", "which of its splits", "files", choices=SPLITS)
    output: str | None = setting(
        None, "folder to write to; with --sample a GeoPackage (.gpkg)", "files",
        shown="MAP_evaluation beside the map, or MODEL_evaluation; MAP_sample.gpkg",
    )  # fmt: skip
    overwrite: bool = setting(False, "replace files that exist", "files")
    boundary_tolerance: str = setting(
        str(BOUNDARY_TOLERANCE), "distance within which boundaries agree: pixels, or metres as 20m", "measures"
    )  # fmt: skip
    block_size: float | None = setting(
        None, "side in metres of the blocks that the intervals are drawn from", "measures",
        shown="a tenth of the map", above=0,
    )  # fmt: skip
    seed: int = setting(42, "of all random draws", "measures", least=0)
    device: str | None = setting(
        None, "of --model: cpu, cuda, cuda:1..., mps", "performance",
        shown="cuda where there is one, else cpu",
    )  # fmt: skip

    def __post_init__(self):
        check_limits(self)
        tolerance(self.boundary_tolerance)
        needed, taken = KINDS[self.kind]
        for name in needed:
            if getattr(self, name) is None:
                raise OptionError(f"--{name} is missing: {USAGE}")
        if self.kind == "sample":
            ends = Path(self.output_path).suffix == ".gpkg"
            require(ends, "--output", self.output, "a .gpkg with --sample")
            fine = self.model is None or self.allocate == "neyman"
            require(fine, "--model", self.model, "--allocate neyman with it")
        known = {*needed, *taken, "output", "overwrite"}
        for item in fields(self):
            given = getattr(self, item.name) != item.default
            if given and item.name not in known:
                raise OptionError(f"--{item.name} changes nothing here: {USAGE}")

    @property
    def kind(self) -> str:
        """What is evaluated: one of ``KINDS``."""
        if self.sample is not None:
            return "sample"
        return "model" if self.model or self.dataset_root else "map"

    @property
    def output_path(self) -> str:
        """``--output``, or what it is without it."""
        source = self.model if self.kind == "model" else self.map
        ending = "_sample.gpkg" if self.kind == "sample" else "_evaluation"
        return self.output or str(Path(source).with_suffix("")) + ending


# the fields of the last class come first, so that --help begins with the files
@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(LabelOptions, EvaluationOptions):
    """Every setting of ``Evaluate_map.py``."""


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
        if abs(value - round(value)) <= 0.005 * value:  # projections stretch pixels
            value = float(round(value))
    most = f"at most {MOST_TOLERANT} pixels"
    require(value <= MOST_TOLERANT, "--boundary_tolerance", text, most)
    return value


def reach_in_pixels(
    text: str, sides: tuple[float, float] | None
) -> tuple[float, float]:
    """``--boundary_tolerance`` in pixels across and down, by their width and height in metres."""
    across, down = (tolerance_in_pixels(text, side) for side in sides or (None, None))
    return across, down
