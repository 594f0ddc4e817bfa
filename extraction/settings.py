"""The options of ``extract``, ``batch``, ``visualize`` and ``info``."""

from __future__ import annotations

import os
from dataclasses import dataclass

from common import SPLITS
from common.errors import require
from common.label_options import LabelOptions
from common.mask_options import Mask, MaskOptions
from common.options import (
    check_limits,
    nodata_setting,
    setting,
)

LARGEST_PATCH = 16384  # pixels of a side


@dataclass(frozen=True)
class SceneFiles:
    """Files that belong together, and what their patches' names begin with."""

    image: str
    label: str
    grid: str | None
    name: str
    mask: Mask | None = None


@dataclass(frozen=True, kw_only=True)
class OneScene:
    """What ``extract`` reads."""

    image: str = setting(help="scene, anything that GDAL reads", group="data")
    label: str = setting(
        help="label raster on any pixel grid, or vector file of polygons", group="data"
    )


@dataclass(frozen=True, kw_only=True)
class SceneFolder:
    """What ``batch`` reads."""

    data_dir: str = setting(help="folder of scenes and labels", group="data")
    use_per_image_grid: bool = setting(
        False, "each scene has its own grid, found by --grid_pattern", "data"
    )
    image_pattern: str = setting(
        "Image_<id>.*", "names of scenes; <id> pairs them, * is anything", "data"
    )
    label_pattern: str = setting("Label_<id>.tif", "names of labels", "data")
    grid_pattern: str = setting("Grid_<id>.*", "names of grids", "data")
    recursive: bool = setting(False, "search subfolders too", "data")
    skip_unmatched: bool = setting(
        False, "leave out files without a partner instead of stopping", "data"
    )


@dataclass(frozen=True, kw_only=True)
class ExtractionOptions:
    """What ``extract`` and ``batch`` have in common."""

    grid: str | None = setting(
        None,
        "vector file whose polygons are the cells of the scenes, in any CRS",
        "data",
        shown="cells of --patch_size every --stride pixels",
    )
    output: str = setting(help="dataset folder to write", group="data")
    bands: str | None = setting(
        None,
        "bands to keep, in this order: numbers from 1 or band descriptions, as B04,B03,B02",
        "data",
        shown="all but alpha",
    )
    nodata: float | None = nodata_setting("data")
    image_channels: int | None = setting(
        None, "number of bands expected", "data", shown="not checked", least=1
    )
    id_column: str | None = setting(
        None,
        "grid column that names the patches",
        "data",
        shown="id or the like when there is one, else the row number",
    )
    patch_size: int = setting(
        224,
        "side of the patches in pixels; other cells are resized",
        "patches",
        least=8,
        most=LARGEST_PATCH,
    )
    stride: int | None = setting(
        None,
        "pixels from cell to cell where there is no grid",
        "patches",
        shown="--patch_size",
        least=1,
    )
    interpolation: str = setting(
        "auto",
        "how image pixels are resized (labels: nearest); auto averages when shrinking and is "
        "bilinear when enlarging",
        "patches",
        choices=("auto", "nearest", "bilinear", "cubic", "area"),
    )
    min_valid: float = setting(
        0.5,
        "smallest valid share of a cell, 0 to 1; other cells are skipped",
        "patches",
        least=0,
        most=1,
    )
    # splits are drawn when all cells are cut, so a resumed run may draw them otherwise
    train_ratio: float = setting(
        0.75, "share of the training split", "split", above=0, most=1, may_change=True
    )
    val_ratio: float = setting(
        0.15, "share of the validation split", "split", least=0, most=1, may_change=True
    )
    test_ratio: float = setting(
        0.10, "share of the test split", "split", least=0, most=1, may_change=True
    )
    split_by: str = setting(
        "random",
        "draw cell by cell, or in square blocks, which keeps neighbours together",
        "split",
        choices=("random", "block"),
        may_change=True,
    )
    block_size: float | None = setting(
        None,
        "side of a block in metres",
        "split",
        shown="four cells",
        least=0.001,
        may_change=True,
    )
    buffer: float = setting(
        0.0,
        "metres; cells nearer than that to another split are dropped",
        "split",
        least=0,
        may_change=True,
    )
    seed: int = setting(
        42,
        "seed of the split",
        "split",
        alias="--random_seed",
        least=0,
        most=2**32 - 1,
        may_change=True,
    )
    save_metadata: bool = setting(
        False,
        "write Patch/metadata.json: where each patch comes from",
        "output",
        may_change=True,
    )
    overwrite: bool = setting(
        False, "replace the patches of an earlier run", "output", may_change=True
    )
    resume: bool = setting(
        False, "complete an unfinished run", "output", may_change=True
    )
    skip_errors: bool = setting(
        False,
        "continue after a cell or scene that cannot be read; list it and end with status 1",
        "output",
        may_change=True,
    )
    workers: int | None = setting(
        None,
        "threads that resize and write patches",
        "output",
        shown="the number of CPUs, at most 8",
        least=1,
        most=1024,
        may_change=True,
    )

    def __post_init__(self):
        check_limits(self)
        stride, grid, block = self.stride, self.grid, self.block_size
        fine = stride is None or grid is None
        require(fine, "--stride with --grid", grid, "one of the two")
        fine = block is None or self.split_by == "block"
        require(fine, "--block_size", block, "--split_by block with it")
        both = self.overwrite and self.resume
        require(not both, "--overwrite", "and --resume", "one of the two")
        require(
            abs(sum(self.ratios) - 1) < 1e-6,
            "--train_ratio, --val_ratio and --test_ratio",
            f"sum to {sum(self.ratios):g}",
            "a sum of 1",
        )

    @property
    def ratios(self) -> tuple[float, float, float]:
        return self.train_ratio, self.val_ratio, self.test_ratio


# the fields of the last class come first, so that --help begins with the files
@dataclass(frozen=True, kw_only=True)
class ExtractionConfig(MaskOptions, LabelOptions, ExtractionOptions, OneScene):
    """Every setting of ``extract``."""


@dataclass(frozen=True, kw_only=True)
class BatchConfig(MaskOptions, LabelOptions, ExtractionOptions, SceneFolder):
    """Every setting of ``batch``."""

    def __post_init__(self):
        super().__post_init__()
        require(
            not (self.use_per_image_grid and (self.grid or self.stride)),
            "--use_per_image_grid",
            "with --grid or --stride",
            "one of them",
        )
        pattern = self.mask or ""
        fine = "<id>" not in os.path.dirname(pattern) and pattern.count("<id>") < 2
        require(fine, "--mask", self.mask, "one <id> at most, in the name of the file")
        for name in ("image_pattern", "label_pattern", "grid_pattern"):
            text = getattr(self, name)
            once = text.partition("|")[0].count("<id>") == text.count("<id>") == 1
            require(once, f"--{name}", text, "one <id> in it")


@dataclass(frozen=True)
class SampleConfig:
    """Every setting of ``visualize``."""

    output: str = setting(help="dataset folder that extract wrote", group="data")
    split: str = setting("train", "which split to draw from", "data", choices=SPLITS)
    sample_index: int = setting(0, "which patch of the split, from 0", "data")
    show: bool = setting(False, "open a window too", "output")


@dataclass(frozen=True)
class InfoConfig:
    """Every setting of ``info``."""

    output: str = setting(help="dataset folder that extract wrote", group="data")
