"""From a scene's own values to probabilities, as one module: what the exported file computes.

It repeats prediction: what is invalid, the scaling, the networks, the temperature, the mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from common.nodata import is_no_measurement
from common.rasters import as_dtype
from model_training import Checkpoint, Normalization, class_probabilities

# relative difference within which a value is nodata: readers that scale values and scale them back
# (Deepness) miss them by 2e-7
NEAR = 1e-6


class InvalidPixels(nn.Module):
    """Which pixels have no data: NaN or infinite in any band, or the training's declared nodata.

    The rule for nodata is that of ``common.nodata.nodata_pixels``, for values of one data type.
    """

    def __init__(self, values: Sequence):
        """Make ready.

        Args:
            values: The nodata value of each band in its dtype, None where there is none.
        """
        super().__init__()
        # what is infinite in float32, the input's type, is invalid anyway
        with np.errstate(over="ignore"):
            known = [v is not None and bool(np.isfinite(np.float32(v))) for v in values]
        single = [k and is_no_measurement(v) for k, v in zip(known, values)]
        joint = [k and not s for k, s in zip(known, single)]
        plain = [float(v) if k else 0.0 for k, v in zip(known, values)]
        self.singles, self.joints = sum(single), sum(joint)
        for name, numbers in (
            ("values", plain),
            ("near", [abs(value) * NEAR for value in plain]),
            ("single", single),
            ("joint", joint),
        ):
            tensor = torch.tensor(numbers, dtype=torch.float32)
            self.register_buffer(name, tensor[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) float32 to (N, 1, H, W) bool."""
        # sums, since the reductions of booleans are not in the older operator sets
        strange = torch.isnan(images) | torch.isinf(images)
        invalid = strange.to(images.dtype).sum(1, keepdim=True) > 0
        if not (self.singles or self.joints):
            return invalid
        held = ((images - self.values).abs() <= self.near).to(images.dtype)
        if self.singles:
            invalid = invalid | ((held * self.single).sum(1, keepdim=True) > 0)
        if self.joints:
            number = (held * self.joint).sum(1, keepdim=True)
            invalid = invalid | (number >= self.joints)
        return invalid


class Member(nn.Module):
    """One model: values and invalid pixels to probabilities."""

    def __init__(self, checkpoint: Checkpoint):
        super().__init__()
        self.network, self.temperature = checkpoint.model, checkpoint.temperature
        low, span = limits(checkpoint.normalization)
        self.register_buffer("low", low)
        self.register_buffer("span", span)

    def forward(self, images: Tensor, invalid: Tensor) -> Tensor:
        scaled = ((images - self.low) / self.span).clamp(0, 1)
        # last, since invalid pixels can be NaN
        logits = self.network(scaled.masked_fill(invalid, 0))
        return class_probabilities(
            logits if self.temperature == 1 else logits / self.temperature
        )


def limits(normalization: Normalization) -> tuple[Tensor, Tensor]:
    """Low end and span of each band, (C, 1, 1), of the ``dataset`` rule, as ``normalize`` has them.

    ``normalize`` itself keeps tensors between calls, which tracing must not leave behind.
    """
    low, high = (
        torch.tensor(numbers, dtype=torch.float32)[:, None, None]
        for numbers in (normalization.low, normalization.high)
    )
    return low, torch.where(high > low, high - low, 1.0)


class ProbabilityGraph(nn.Module):
    """Values (N, C, H, W) float32 to probabilities (N, K, H, W), the mean of all models."""

    def __init__(self, checkpoints: Sequence[Checkpoint]):
        """Put models of the same bands and classes together.

        A pixel is invalid where it is by what the training of any of them declared.
        """
        super().__init__()
        declared = dict.fromkeys(map(declared_nodata, checkpoints))
        self.rules = nn.ModuleList(InvalidPixels(values) for values in declared)
        self.members = nn.ModuleList(map(Member, checkpoints))
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        invalid = self.rules[0](images)
        for rule in self.rules[1:]:
            invalid = invalid | rule(images)
        total = self.members[0](images, invalid)
        for member in self.members[1:]:
            total = total + member(images, invalid)
        return total / len(self.members) if len(self.members) > 1 else total


def declared_nodata(checkpoint: Checkpoint) -> tuple:
    """The nodata value of each band in the dtype of the training patches, None where none is known.

    Where the patches are of several types, a value is taken as of float64: so it counts in any band
    where it does by every type, as a negative one.
    """
    stored = checkpoint.metadata.get("nodata")
    if stored is None:
        return (None,) * checkpoint.config.in_channels
    kind = np.dtype(checkpoint.metadata.get("data_type") or np.float64)
    return tuple(as_dtype(value, kind) for value in stored)
