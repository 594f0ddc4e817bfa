"""The first layer's kernels for the bands of the data, from those of other bands."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def first_conv(module: nn.Module) -> str:
    """The name of the convolution that reads the bands: the first of a network or encoder."""
    return next(
        name for name, layer in module.named_modules() if isinstance(layer, nn.Conv2d)
    )


def last_conv(module: nn.Module) -> str:
    """The name of the convolution that gives the logits: the last of a network."""
    return [
        name for name, layer in module.named_modules() if isinstance(layer, nn.Conv2d)
    ][-1]


def match_kernels(weight: Tensor, matches: Sequence[int | None]) -> Tensor:
    """The kernels of a first layer for other bands.

    Args:
        weight: (O, C, h, w), of the model or the weights to start from.
        matches: Per band of the data the one of ``weight``, see ``common.sensors.match_bands``;
            None gets the mean of all C.

    Returns:
        (O, len(matches), h, w), scaled by C over the number of bands, so that the output of the
        layer keeps its size.
    """
    mean = weight.mean(dim=1)
    kernels = [mean if match is None else weight[:, match] for match in matches]
    return torch.stack(kernels, dim=1) * (weight.shape[1] / len(matches))
