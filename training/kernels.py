"""The first layer's kernels for the bands of the data, from those of other bands."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from common.errors import OptionError

SIDE = 128  # pixels of an image that every network takes as it is, without padding


def band_layers(module: nn.Module, bands: int) -> list[str]:
    """The names of the convolutions that read the bands, of a network or encoder.

    They are several in encoders whose first layer is a sum of parallel ones (RepVGG, MobileOne).

    Raises:
        OptionError: There is none, since the image is rearranged before.
    """
    image = torch.zeros(1, bands, SIDE, SIDE)
    found, hooks = [], []

    def note(name: str, given: Tensor) -> None:
        if given.shape == image.shape and given.data_ptr() == image.data_ptr():
            found.append(name)

    for name, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d):
            hook = partial(lambda name, layer, inputs: note(name, inputs[0]), name)
            hooks.append(layer.register_forward_pre_hook(hook))
    trains = module.training
    with torch.inference_mode():
        module.eval()(image)
    module.train(trains)
    for hook in hooks:
        hook.remove()
    if not found:
        raise OptionError(
            "The encoder rearranges the image before its first layer, whose weights cannot be brought "
            "to the bands of the patches; take another --encoder_name, or train from random weights"
        )
    return found


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
