"""The options of ``stack``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

from common.errors import require
from common.mask_options import MaskOptions
from common.options import check_limits, setting


@dataclass(frozen=True, kw_only=True)
class StackFiles:
    """What ``stack`` reads and writes, but for the mask."""

    input: Sequence[str] = setting(
        help="products (Sentinel-2 .SAFE or .zip, Landsat folder or .tar, STAC item .json) and "
        "raster files",
        group="data", nargs="+",
    )  # fmt: skip
    output: str = setting(
        help="scene to write: .vrt (refers to the files) or .tif (cloud-optimized copy); a folder "
        "for a scene of each product",
        group="data",
    )
    overwrite: bool = setting(False, "replace scenes that exist", "data")
    bands: str | None = setting(
        None, "bands to keep, in this order, by name, as B04,B03,B02", "bands",
        shown="the ten of Sentinel-2 at 10 and 20 m, the reflective ones of Landsat, all of files",
    )  # fmt: skip
    offset: int | None = setting(
        None, "what is added to the pixels, as -1000, whatever the metadata state", "bands",
        shown="as the metadata of Sentinel-2 state, else nothing", least=-32767, most=32767,
    )  # fmt: skip
    join: bool = setting(
        False, "several dates of one place become one scene, with bands called B04_20210619",
        "bands",
    )  # fmt: skip
    resolution: float | None = setting(
        None, "side of a pixel in metres", "pixel grid", shown="that of the finest band", above=0
    )  # fmt: skip
    like: str | None = setting(
        None, "raster whose CRS, extent and pixels the scene gets", "pixel grid", shown="none"
    )  # fmt: skip
    cloud_mask: bool = setting(
        False, "mask clouds, shadows and fill by the product's own layer", "mask"
    )


@dataclass(frozen=True, kw_only=True)
class StackConfig(MaskOptions, StackFiles):
    """Every setting of ``stack``."""

    MASKING = "--cloud_mask or --mask"

    @property
    def masked(self) -> bool:
        return self.cloud_mask or super().masked

    def __post_init__(self):
        super().__post_init__()
        check_limits(self)
        both = self.like is not None and self.resolution is not None
        require(not both, "--like", "and --resolution", "one of the two")
        both = self.cloud_mask and self.mask is not None
        require(not both, "--cloud_mask", "and --mask", "one of the two")
        suffix = PurePath(self.output).suffix.lower()
        fine = not self.join or suffix in (".vrt", ".tif", ".tiff")
        require(fine, "--join", self.output, "--output that ends in .vrt or .tif")
