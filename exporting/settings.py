"""The options of ``Export_model.py``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import require
from common.model_options import model_setting, threshold_setting
from common.options import check_limits, setting

SCARCE = "--patch_size"  # what takes memory


@dataclass(frozen=True)
class ExportConfig:
    """The settings of an export; the options are made from these fields."""

    model: Sequence[str] = model_setting()
    output: str = setting(help="file to write (.onnx)", group="files")
    overwrite: bool = setting(False, "replace files that exist", "files")
    patch_size: int = setting(
        512, "side in pixels of the squares that the file takes; the training's where the encoder pools "
        "over its window", "input", least=1, most=65535
    )  # fmt: skip
    resolution: float | None = setting(
        None, "side of a pixel in metres, which readers resample their scenes to", "input",
        above=0, shown="the training's",
    )  # fmt: skip
    threshold: float = threshold_setting("output")

    def __post_init__(self):
        check_limits(self)
        fine = Path(self.output).suffix == ".onnx"
        require(fine, "--output", self.output, "a name that ends in .onnx")
