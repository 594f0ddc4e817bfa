"""The options of ``Predict_large_image.py``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from common.architectures import PRECISIONS, TTA_TRANSFORMS
from common.errors import require
from common.options import number_or_auto, setting

SIDE_MULTIPLE = 32  # a scene smaller than a patch is padded to a multiple of this


@dataclass(frozen=True)
class PredictionConfig:
    """Every setting of a prediction; the options are made from these fields."""

    model: Sequence[str] = setting(
        help="checkpoints (.pth) that main.py wrote, or a folder of a k-fold run; several are "
        "averaged",
        group="files",
        nargs="+",
    )
    input: Sequence[str] = setting(
        help="scenes, anything that GDAL reads, or folders of them",
        group="files",
        nargs="+",
    )
    output: str = setting(
        help="class map to write (.tif); a folder when there are several scenes",
        group="files",
    )
    resume: bool = setting(
        False, "go on with a map that was interrupted, from its last rows", "files"
    )
    format: str = setting(
        "gtiff", "of all maps: gtiff, or cog (cloud-optimized, with overviews)", "outputs",
        choices=("gtiff", "cog"),
    )  # fmt: skip
    save_confidence: bool = setting(
        False, "write OUTPUT_confidence.tif: probability of the class", "outputs"
    )
    save_uncertainty: bool = setting(
        False,
        "write OUTPUT_uncertainty.tif: entropy and, of several models, their disagreement",
        "outputs",
    )
    save_probabilities: bool = setting(
        False,
        "write OUTPUT_probabilities.tif: a band per class, in 254 steps",
        "outputs",
    )
    quicklook: bool = setting(
        False, "write OUTPUT_quicklook.png: scene, map and legend", "outputs"
    )
    polygons: str | None = setting(
        None,
        "areas of one class as polygons: a .gpkg, a folder when there are several scenes",
        "outputs",
        shown="none",
    )
    min_area: float = setting(
        0.0,
        "smallest polygon in square metres; smaller ones join their largest neighbour",
        "outputs",
    )
    model_name: str | None = setting(
        None, "architecture, of a checkpoint that does not say", "model",
        shown="the checkpoint's",
    )  # fmt: skip
    encoder_name: str | None = setting(
        None, "encoder, likewise", "model", shown="the checkpoint's"
    )
    in_channels: int | None = setting(
        None, "bands that the model takes", "model", shown="the checkpoint's"
    )
    num_classes: int | None = setting(
        None, "classes of the model; 1 or 2 of a binary one", "model",
        shown="the checkpoint's",
    )  # fmt: skip
    bands: str | None = setting(
        None,
        "bands to feed, in the order of training: numbers from 1 or band descriptions",
        "scene",
        shown="all but alpha",
    )
    patch_size: int = setting(512, "side of the sliding window in pixels", "window")
    overlap: int = setting(
        128, "pixels that neighbouring windows share; 25-50 %% of the window", "window"
    )
    blend: str = setting(
        "hann", "weights where windows overlap; none is their plain mean", "window",
        choices=("hann", "gaussian", "linear", "none"),
    )  # fmt: skip
    tta: str = setting(
        "none", "average over 4 mirrored (flip) or 8 turned (d4) views", "window",
        choices=tuple(TTA_TRANSFORMS),
    )  # fmt: skip
    threshold: float = setting(
        0.5, "least foreground probability of a binary map, 0 to 1", "window"
    )
    device: str | None = setting(
        None, "cpu, cuda, cuda:1...", "speed", shown="cuda where there is one, else cpu"
    )  # fmt: skip
    precision: str = setting(
        "auto", "of the forward pass; auto is the fastest that keeps 99.9 %% of the classes",
        "speed", choices=PRECISIONS,
    )  # fmt: skip
    batch_size: str = setting(
        "auto", "windows per step; halved when memory runs out", "speed"
    )
    compile: bool = setting(
        False, "compile the model first: a minute that pays on long jobs", "speed"
    )
    max_memory: float | None = setting(
        None, "GB for the rows in work; wider scenes are mapped in several columns",
        "speed", shown="0.5 on the CPU, at most an eighth of what is free",
    )  # fmt: skip

    def __post_init__(self):
        size, overlap = self.patch_size, self.overlap
        require(size >= SIDE_MULTIPLE, "--patch_size", size, f"{SIDE_MULTIPLE} or more")
        require(
            0 <= overlap < size,
            "--overlap",
            overlap,
            f"0 to {size - 1}, less than --patch_size {size}",
        )
        fine = number_or_auto(self.batch_size, 1)
        require(fine, "--batch_size", self.batch_size, "at least 1, or auto")
        require(0 <= self.threshold <= 1, "--threshold", self.threshold, "0 to 1")
        area = self.min_area
        require(0 <= area < math.inf, "--min_area", area, "0 or more square metres")
        fine = self.polygons or not area
        require(fine, "--min_area", area, "--polygons beside it")
        memory = self.max_memory
        fine = memory is None or 1e-6 <= memory < math.inf
        require(fine, "--max_memory", memory, "more than 0 GB, at least 0.000001")
        for name in ("in_channels", "num_classes"):
            value = getattr(self, name)
            fine = value is None or 1 <= value <= 65535
            require(fine, f"--{name}", value, "1 to 65535")

    @property
    def described(self) -> dict:
        """What the options say of the model."""
        names = ("model_name", "encoder_name", "in_channels", "num_classes")
        given = {name: getattr(self, name) for name in names}
        return {name: value for name, value in given.items() if value is not None}
