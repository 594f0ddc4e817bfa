"""The options of ``extract``, ``batch``, ``visualize`` and ``info``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

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
LABEL_PATTERN = "Label_<id>.tif"
RATIOS = (0.75, 0.15, 0.10)  # of training, validation and test, where none is given


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
        "Image_<id>.*",
        "names of scenes, with folders where they lie in some; <id> pairs them, * is anything but /",
        "data",
    )
    label_pattern: str = setting(LABEL_PATTERN, "names of labels", "data")
    label: str | None = setting(
        None,
        "one label for all scenes, as for several dates of one place",
        "data",
        shown="those of --label_pattern",
    )
    grid_pattern: str = setting("Grid_<id>.*", "names of grids", "data")
    recursive: bool = setting(False, "search subfolders too", "data")
    exclude: Sequence[str] | None = setting(
        None,
        "shell patterns of files to leave out, by their whole path below the folder, as 'old/*': * is "
        "anything, ? a character, [ab] one of them; may be given again",
        "data",
        shown="none",
        nargs="+",
        action="extend",
    )
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
    train_ratio: float | None = setting(
        None,
        "share of the training split, 0 to 1; ratios that are not given share what the given ones "
        "leave, in proportion to their defaults",
        "split",
        shown=f"{RATIOS[0]:.2f}",
        least=0,
        most=1,
        may_change=True,
    )
    val_ratio: float | None = setting(
        None,
        "share of the validation split",
        "split",
        shown=f"{RATIOS[1]:.2f}",
        least=0,
        most=1,
        may_change=True,
    )
    test_ratio: float | None = setting(
        None,
        "share of the test split",
        "split",
        shown=f"{RATIOS[2]:.2f}",
        least=0,
        most=1,
        may_change=True,
    )
    split_by: str = setting(
        "random",
        "draw cell by cell, in square blocks, which keeps neighbours together, or whole scenes, as "
        "for maps of new dates",
        "split",
        choices=("random", "block", "scene"),
        may_change=True,
    )
    split_column: str | None = setting(
        None,
        "grid column that names the split of a cell: train, validation, test or a short form; "
        "cells without one are drawn",
        "split",
        shown="all cells are drawn",
        may_change=True,
    )
    test_area: str | None = setting(
        None,
        "vector file of polygons, in any CRS: cells whose centre lies in them are the test split, "
        "others that touch them are left out",
        "split",
        shown="none",
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
        stride, grid = self.stride, self.grid
        fine = stride is None or grid is None
        require(fine, "--stride with --grid", grid, "one of the two")
        fine = self.id_column is None or self._has_grid
        require(fine, "--id_column", self.id_column, "--grid with it")
        both = self.overwrite and self.resume
        require(not both, "--overwrite", "and --resume", "one of the two")
        self._check_splits()

    def _check_splits(self) -> None:
        block, column, area = self.block_size, self.split_column, self.test_area
        fine = block is None or self.split_by == "block"
        require(fine, "--block_size", block, "--split_by block with it")
        fine = column is None or self._has_grid
        require(fine, "--split_column", column, "--grid with it")
        fine = area is None or column is None
        require(fine, "--test_area with --split_column", column, "one of the two")
        fine = area is None or not self.test_ratio
        expected = "one of the two: no other cell becomes test"
        require(fine, "--test_area with --test_ratio", self.test_ratio, expected)
        given = [ratio for ratio in self._given_ratios if ratio is not None]
        expected = "a sum of 1" if len(given) == 3 else "1 at most"
        require(
            sum(given) < 1 + 1e-6 and (len(given) < 3 or sum(given) > 1 - 1e-6),
            "--train_ratio, --val_ratio and --test_ratio",
            f"sum to {sum(given):g}",
            expected + " of the first two, beside --test_area" * (area is not None),
        )

    @property
    def _has_grid(self) -> bool:
        return bool(self.grid) or getattr(self, "use_per_image_grid", False)

    @property
    def _given_ratios(self) -> tuple[float | None, ...]:
        """Of the cells that are drawn, of which none becomes test beside ``--test_area``."""
        drawn_test = self.test_ratio if self.test_area is None else 0.0
        return self.train_ratio, self.val_ratio, drawn_test

    @property
    def ratios(self) -> tuple[float, ...]:
        """The shares of training, validation and test; they sum to 1."""
        pairs = list(zip(self._given_ratios, RATIOS))
        left = round(1 - sum(given or 0 for given, _ in pairs), 9)
        open_shares = sum(usual for given, usual in pairs if given is None)
        return tuple(
            left * usual / open_shares if given is None else given
            for given, usual in pairs
        )


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
            below = not os.path.isabs(text) and ".." not in PurePath(text).parts
            require(below, f"--{name}", text, "a path below --data_dir")
        fine = self.label is None or self.label_pattern == LABEL_PATTERN
        require(fine, "--label with --label_pattern", self.label_pattern, "one of them")


@dataclass(frozen=True)
class SampleConfig:
    """Every setting of ``visualize``."""

    output: str = setting(help="dataset folder that extract wrote", group="data")
    split: str | None = setting(
        None,
        "which split to draw from",
        "data",
        shown="the first that has patches",
        choices=SPLITS,
    )
    sample_index: int = setting(0, "which patch of the split, from 0", "data")
    show: bool = setting(False, "open a window too", "output")


@dataclass(frozen=True)
class InfoConfig:
    """Every setting of ``info``."""

    output: str = setting(help="dataset folder that extract wrote", group="data")
