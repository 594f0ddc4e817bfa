"""Scenes of several dates on one pixel grid, averaged into one map."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import rasterio
import torch
from torch import Tensor

from common.errors import RasterError
from common.rasters import require_georeference, same_pixel_grid, sensor_model
from prediction.tiling import Extent

Rows = tuple[Extent, Tensor, np.ndarray]  # see ``prediction.blending.blended_rows``


def require_one_grid(scenes: Sequence[rasterio.DatasetReader]) -> None:
    """Raise RasterError unless scenes have one CRS and cover the same pixels."""
    first = scenes[0]
    if len(scenes) > 1 and sensor_model(first):
        require_georeference(first)
    for other in scenes[1:]:
        if not same_pixel_grid(first, other):
            moved = f"{Path(other.name).stem}_like.tif"
            raise RasterError(
                f"--combine: {other.name} is not on the pixel grid of {first.name}; bring it there "
                f"with Patch_extraction.py stack --input {other.name} --like {first.name} "
                f"--output {moved}"
            )


def mean_of_dates(
    dates: Sequence[Iterator[Rows]],
) -> Iterator[tuple[*Rows, np.ndarray]]:
    """Average the rows of several dates.

    Args:
        dates: Of each, what ``blended_rows`` yields for the same part of one grid.

    Yields:
        The part that is finished; per pixel the mean probabilities (K, n, w) of the dates that are
        valid there; which pixels have one (n, w) bool; and how many (n, w) uint8.
    """
    for steps in zip(*dates, strict=True):
        finished, probabilities, valid = steps[0]
        counts = np.sum([step[2] for step in steps], axis=0, dtype=np.uint8)
        if len(steps) > 1:
            total = torch.zeros_like(probabilities)
            for _, values, known in steps:
                total += values * torch.from_numpy(known).to(values.device)
            divisor = torch.from_numpy(np.maximum(counts, 1)).to(total.device)
            probabilities, valid = total / divisor, counts > 0
        yield finished, probabilities, valid, counts
