"""The options of ``Predict_large_image.py``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common.architectures import PRECISIONS, TTA_TRANSFORMS
from common.earlier_models import DESCRIPTION
from common.errors import require
from common.mask_options import MaskOptions
from common.model_options import model_setting, threshold_setting
from common.options import (
    check_limits,
    nodata_setting,
    number_or_auto,
    require_geopandas,
    setting,
)

SCARCE = "--batch_size, --patch_size or --max_memory"  # what takes memory
SIDE_MULTIPLE = 32  # a scene smaller than a patch is padded to a multiple of this


def split_part(text: str) -> tuple[int, int]:
    """The two numbers of ``--part``; zeros for anything else."""
    number, _, of = text.partition("/")
    return (int(number), int(of)) if number.isdecimal() and of.isdecimal() else (0, 0)


@dataclass(frozen=True)
class PredictionOptions:
    """The settings of a prediction, but for those of a mask and what describes a model."""

    model: Sequence[str] = model_setting()
    input: Sequence[str] = setting(
        help="scenes, anything that GDAL reads, or folders of them",
        group="files", nargs="+", may_change=True,
    )  # fmt: skip
    output: str = setting(
        help="class map to write (.tif); a folder when there are several scenes",
        group="files", may_change=True,
    )  # fmt: skip
    part: str | None = setting(
        None, "map a share of many scenes: 3/10 is the third tenth of them, as one of ten jobs",
        "files", shown="all of them", may_change=True,
    )  # fmt: skip
    resume: bool = setting(
        False, "resume an unfinished map from its last stored rows", "files", may_change=True
    )  # fmt: skip
    overwrite: bool = setting(
        False, "replace maps that exist, and start unfinished ones again", "files",
        may_change=True,
    )  # fmt: skip
    format: str = setting(
        "gtiff", "of all maps: gtiff, or cog (cloud-optimized, with overviews)", "outputs",
        choices=("gtiff", "cog"),
    )  # fmt: skip
    write_codes: bool = setting(
        False, "the map holds the codes of the classes, as the label did, not their numbers",
        "outputs",
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
        False, "write OUTPUT_probabilities.tif: a band per class, in 254 steps", "outputs"
    )  # fmt: skip
    quicklook: bool = setting(
        False, "write OUTPUT_quicklook.png: scene, map and legend", "outputs", may_change=True
    )  # fmt: skip
    polygons: str | None = setting(
        None, "areas of one class as polygons: a .gpkg, a folder when there are several scenes",
        "outputs", shown="none", may_change=True,
    )  # fmt: skip
    sieve: float | None = setting(
        None, "smallest area of one class in the map, in square metres; smaller ones join a neighbour",
        "outputs", above=0, shown="none",
    )  # fmt: skip
    min_area: float = setting(
        0.0, "smallest polygon in square metres; smaller ones join their largest neighbour",
        "outputs", least=0, may_change=True,
    )  # fmt: skip
    simplify: float | None = setting(
        None, "smooth borders of polygons, which neighbours share, to within about as many metres",
        "outputs", above=0, shown="none", may_change=True,
    )  # fmt: skip
    suggest: int | None = setting(
        None, "write OUTPUT_suggestions.gpkg: that many cells of a scene that are worth labelling "
        "next; also OUTPUT_uncertainty.tif, by which they are chosen",
        "outputs", least=1, most=65535, shown="none", may_change=True,
    )  # fmt: skip
    cell_size: int | None = setting(
        None, "side of those cells in pixels", "outputs", least=8, most=65535,
        shown="that of the training patches", may_change=True,
    )  # fmt: skip
    area: str | None = setting(
        None, "polygons, in any CRS, of what is to be mapped; the map covers their bounds",
        "scene", shown="all of it",
    )  # fmt: skip
    combine: str | None = setting(
        None, "make one map of all scenes, dates on one pixel grid: mean averages the "
        "probabilities of the dates that are valid at a pixel",
        "scene", choices=("mean",), shown="a map for each scene",
    )  # fmt: skip
    bands: str | None = setting(
        None, "bands to feed, in the order of training: numbers from 1 or band descriptions",
        "scene", shown="all but alpha",
    )  # fmt: skip
    nodata: float | None = nodata_setting("scene")
    patch_size: int | None = setting(
        None, "side of the sliding window in pixels", "window", least=SIDE_MULTIPLE,
        shown="the largest of 512, 256 and the training's that keeps the classes of the latter",
    )  # fmt: skip
    overlap: int | None = setting(
        None, "pixels that neighbouring windows share; 25-50 %% of the window", "window", least=0,
        shown="a quarter of the window",
    )  # fmt: skip
    blend: str = setting(
        "hann", "weights where windows overlap; none is their plain mean", "window",
        choices=("hann", "gaussian", "linear", "none"),
    )  # fmt: skip
    tta: str = setting(
        "none", "average over 4 mirrored (flip) or 8 turned (d4) views", "window",
        choices=tuple(TTA_TRANSFORMS),
    )  # fmt: skip
    threshold: float = threshold_setting("window")
    device: str | None = setting(
        None, "cpu, cuda, cuda:1..., mps", "speed",
        shown="cuda where there is one, else cpu", may_change=True,
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
        None, "GB for the rows in work; wider scenes are mapped in several columns", "speed",
        shown="0.5 on the CPU, at most an eighth of the free memory", least=1e-6, may_change=True,
    )  # fmt: skip

    def __post_init__(self):
        check_limits(self)
        both = self.overwrite and self.resume
        require(not both, "--overwrite", "and --resume", "one of the two")
        size, overlap, batch = self.patch_size, self.overlap, self.batch_size
        if size and overlap is not None:
            expected = f"0 to {size - 1}, less than --patch_size {size}"
            require(0 <= overlap < size, "--overlap", overlap, expected)
        require(number_or_auto(batch, 1), "--batch_size", batch, "at least 1, or auto")
        if self.part is not None:
            number, of = split_part(self.part)
            fine = 1 <= number <= of
            require(fine, "--part", self.part, "K/N, as 3/10, with K from 1 to N")
            one = "no --combine beside it, which makes a single map"
            require(not self.combine, "--part", self.part, one)
        for name in ("min_area", "simplify"):
            value = getattr(self, name)
            alone = value and not self.polygons
            require(not alone, f"--{name}", value, "--polygons beside it")
        alone = self.cell_size and not self.suggest
        require(not alone, "--cell_size", self.cell_size, "--suggest beside it")
        require_geopandas(self, "area", "polygons", "suggest")
        if self.suggest:  # the cells are chosen by what it writes
            object.__setattr__(self, "save_uncertainty", True)

    @property
    def shared(self) -> int:
        """Pixels that neighbouring windows share."""
        return self.patch_size // 4 if self.overlap is None else self.overlap


@dataclass(frozen=True, kw_only=True)
class DescriptionOptions:
    """What the user says of a model whose file does not describe it."""

    model_name: str | None = setting(
        None, "architecture, of a checkpoint that does not name it", "model",
        shown="the checkpoint's", may_change=True,
    )  # fmt: skip
    encoder_name: str | None = setting(
        None, "encoder, likewise", "model", shown="the checkpoint's", may_change=True
    )
    in_channels: int | None = setting(
        None, "bands that the model takes", "model", shown="the checkpoint's",
        least=1, most=65535, may_change=True,
    )  # fmt: skip
    num_classes: int | None = setting(
        None, "classes of the model; 1 or 2 of a binary one", "model",
        shown="the checkpoint's", least=1, most=65535, may_change=True,
    )  # fmt: skip

    @property
    def described(self) -> dict:
        """What the options say of the model."""
        given = {name: getattr(self, name) for name in DESCRIPTION}
        return {name: value for name, value in given.items() if value is not None}


# the fields of the last class come first, so that --help begins with the files
@dataclass(frozen=True)
class PredictionConfig(MaskOptions, DescriptionOptions, PredictionOptions):
    """Every setting of a prediction; the options are made from these fields."""
