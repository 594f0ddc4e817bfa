"""The weights that a training begins with: of the library, or of a file of encoder weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from common.architectures import ModelConfig, is_weights_file
from common.errors import CheckpointError, SegmentationError, require
from common.pictures import rgb_bands
from model_training import build_model, check_architecture, load_safely
from training.samples import SampleIndex
from training.settings import TrainingConfig


def build_initial_model(
    config: ModelConfig,
    weights: str | None = None,
    rgb_channels: Sequence[int] | None = None,
) -> nn.Module:
    """Build the network that a training begins with.

    Args:
        config: What to build.
        weights: None (random), the name of weights that the library downloads, or a file of
            encoder weights.
        rgb_channels: Channels (from 0) of red, green and blue: they get the pretrained kernels
            of their colour, the others the mean of the three.

    Raises:
        OptionError: See ``build_model``.
        SegmentationError: Weights that are missing or do not fit.
    """
    check_architecture(config, weights)
    if is_weights_file(weights):
        model = build_model(config)
        three_bands = load_encoder(model.network, Path(weights), config)
    else:
        model = build_model(config, weights)
        three_bands = bool(weights)
    if three_bands and rgb_channels:
        _align_first_kernels(model.network, config.in_channels, rgb_channels)
    return model


def _first_conv(module: nn.Module) -> nn.Module:
    return next(layer for layer in module.modules() if isinstance(layer, nn.Conv2d))


def _align_first_kernels(
    network: nn.Module, in_channels: int, rgb_channels: Sequence[int]
):
    """Give each colour its own kernel; libraries assign kernels by index, red to channel 0."""
    if in_channels < 3:
        return
    encoder = getattr(network, "encoder", None) or network.backbone
    weight = _first_conv(encoder).weight.data  # (O, C, h, w), the RGB kernels repeated
    colours = weight[:, :3].clone()
    weight[:] = colours.mean(dim=1, keepdim=True)
    for colour, channel in enumerate(rgb_channels):
        weight[:, channel] = colours[:, colour]


def load_encoder(network: nn.Module, file: Path, config: ModelConfig) -> bool:
    """Load encoder weights from a local file (.pth, .pt, .bin or .safetensors), strictly.

    Only what lies in none of the encoder's own layers may be in the file in addition: that is the
    classifier, which is left out. RGB weights are spread over other band counts.

    Returns:
        Whether the weights are for three bands.

    Raises:
        SegmentationError: Not such a file, or the weights of another encoder.
    """
    from timm.models import adapt_input_conv

    state = _read_state(file)
    encoder = getattr(network, "encoder", None) or network.backbone
    own = encoder.state_dict()

    def plain(key: str) -> str:
        # timm's encoders have "model.stages_0" where their files have "stages.0"
        return key.removeprefix("model.").replace(".", "_")

    known = {plain(key): key for key in own}
    layers = {plain(key.removeprefix("model.").split(".")[0]) + "_" for key in own}
    state = {
        known.get(plain(key), key): value
        for key, value in state.items()
        if plain(key) in known or plain(key).startswith(tuple(layers))
    }
    first = next(key for key, value in own.items() if value.ndim == 4)
    rgb = first in state and state[first].ndim == 4 and state[first].shape[1] == 3
    if rgb and config.in_channels != 3:
        state[first] = adapt_input_conv(config.in_channels, state[first])
    try:
        # the base class's, since encoders override it to be lenient
        nn.Module.load_state_dict(encoder, state, strict=True)
    except RuntimeError as error:
        raise SegmentationError(
            f"{file} does not hold the weights of {config.encoder_name}: "
            f"{str(error).splitlines()[1].strip()[:200]}"
        ) from error
    return rgb


def _read_state(file: Path) -> dict:
    from safetensors import SafetensorError

    if not file.is_file():
        raise SegmentationError(f"No weights file {file}")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(file)
        else:
            state = dict(load_safely(file))
    except (SafetensorError, CheckpointError, ValueError, TypeError) as error:
        raise SegmentationError(f"{file} is no file of weights: {error}") from error
    if not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise SegmentationError(
            f"{file} is no file of weights: it holds more than tensors"
        )
    return state


def rgb_channels(config: TrainingConfig, index: SampleIndex) -> list[int] | None:
    """Channels (from 0) of red, green, blue: ``--rgb_bands``, else by band descriptions."""
    bands = len(index.descriptions)
    if config.rgb_bands:
        parts = config.rgb_bands.split(",")
        fine = len(parts) == 3 and all(p.strip().isdecimal() for p in parts)
        fine = fine and all(1 <= int(p) <= bands for p in parts)
        require(
            fine, "--rgb_bands", config.rgb_bands, f"three band numbers, 1 to {bands}"
        )
        return [int(part) - 1 for part in parts]
    if bands < 3 or not any(index.descriptions):
        return None
    return [band - 1 for band in rgb_bands(index.descriptions)]
