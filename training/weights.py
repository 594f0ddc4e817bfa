"""The weights that a training begins with: of the library, or of a file of encoder weights."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import sys
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError

import torch
from torch import Tensor, nn

from common.architectures import ModelConfig, is_weights_file
from common.errors import CheckpointError, SegmentationError
from common.text import listed
from model_training import build_model, check_architecture, load_safely
from training.dataset import names_for
from training.file_bands import FileBands, file_bands, rgb_channels
from training.kernels import band_layers, match_kernels
from training.published import PublishedWeights, published_weights
from training.samples import SampleIndex
from training.settings import TrainingConfig
from training.start import Start, start_model

log = logging.getLogger("semanticseg4eo")


def initial_model(
    config: TrainingConfig,
    index: SampleIndex,
    resumed: bool = False,
    start: Start | None = None,
) -> nn.Module:
    """Build the network that a training on some patches begins with.

    ``resumed``: its weights will be those of an unfinished run, so that none are loaded here.
    ``start``: the model of ``--start_from``.

    Raises:
        OptionError: See ``build_model``.
        SegmentationError: Weights that are missing or do not fit, or not the bands of the patches.
    """
    model_config = config.model_config(index.shape[0])
    if resumed:
        return build_initial_model(model_config)
    if start:
        return start_model(model_config, start, names_for(config, index))
    channels, bands = rgb_channels(config, index), file_bands(config, index)
    return build_initial_model(model_config, config.weights, channels, bands)


def build_initial_model(
    config: ModelConfig,
    weights: str | None = None,
    rgb_channels: Sequence[int] | None = None,
    bands: FileBands | None = None,
) -> nn.Module:
    """Build the network that a training begins with.

    Args:
        config: What to build.
        weights: None (random), the name of weights that the library downloads, a file of encoder
            weights, or the name of a published one.
        rgb_channels: Channels (from 0) of red, green and blue: they get the pretrained kernels
            of their colour, the others the mean of the three. For weights of three bands.
        bands: Whose kernels each band gets, of a file whose bands have names.

    Raises:
        OptionError: See ``build_model``.
        SegmentationError: Weights that are missing or do not fit.
    """
    check_architecture(config, weights)
    if is_weights_file(weights):
        model = build_model(config)
        three_bands = load_encoder(model.network, find_weights(weights), config, bands)
    else:
        model = build_model(config, weights)
        three_bands = bool(weights)
    if three_bands and rgb_channels:
        _align_first_kernels(model.network, config.in_channels, rgb_channels)
    return model


def _encoder(network: nn.Module) -> nn.Module:
    return getattr(network, "encoder", None) or network.backbone


def _align_first_kernels(
    network: nn.Module, in_channels: int, rgb_channels: Sequence[int]
):
    """Give each colour its own kernel; libraries assign kernels by index, red to channel 0."""
    if in_channels < 3:
        return
    encoder = _encoder(network)
    for layer in band_layers(encoder, in_channels):
        weight = encoder.get_submodule(layer).weight.data  # RGB repeated
        colours = weight[:, :3].clone()
        weight[:] = colours.mean(dim=1, keepdim=True)
        for colour, channel in enumerate(rgb_channels):
            weight[:, channel] = colours[:, colour]


def find_weights(text: str) -> Path:
    """The file of ``--encoder_weights``; a published one that is not there is downloaded.

    Raises:
        SegmentationError: It is not there, cannot be downloaded, or is not what its name says.
    """
    file, known = Path(text), published_weights(text)
    if not file.is_file() and known and file.name == text:
        file = _download(text, known)
    if not file.is_file():
        hint = f"; it is published at {known.address}" if known else ""
        raise SegmentationError(f"No weights file {text}{hint}")
    expected = _expected_digest(file)
    with open(file, "rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest() if expected else ""
    if expected and not digest.startswith(expected):
        where = f" from {known.address}" if known else ""
        raise SegmentationError(
            f"{file} is not the file that was published: its SHA-256 begins with {digest[:8]}, not "
            f"{expected} (a download that was cut off?); download it again{where}, or, if it is a file "
            "of your own, give it another name"
        )
    return file


def _expected_digest(file: Path) -> str | None:
    """How the SHA-256 of a file begins, by its name or the table of published ones.

    Eight decimal digits, which can be a date, count for published files alone.
    """
    known, named = (
        published_weights(file),
        re.search(r"-([0-9a-f]{8})\.pth$", file.name),
    )
    if known and known.sha256:
        return known.sha256
    return named[1] if named and (known or not named[1].isdecimal()) else None


def _download(name: str, known: PublishedWeights) -> Path:
    """The place of a published file in the folder of PyTorch's hub, to which it is downloaded."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / name
    if file.is_file():
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    log.info("downloading %s (%d MB)", known.address, known.megabytes)
    digest = _expected_digest(file)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            torch.hub.download_url_to_file(known.address, str(file), digest)
    except (URLError, HTTPException, TimeoutError, ConnectionError) as error:
        raise SegmentationError(
            f"{name} could not be downloaded (no network?); get it with a browser from "
            f"{known.address} and give the file with --encoder_weights"
        ) from error
    except RuntimeError as error:  # another digest; nothing is kept
        raise SegmentationError(
            f"{name} was not downloaded whole ({error}); try again, or get it with a browser from "
            f"{known.address}"
        ) from error
    return file


def load_encoder(
    network: nn.Module, file: Path, config: ModelConfig, bands: FileBands | None = None
) -> bool:
    """Load encoder weights from a local file (.pth, .pt, .bin or .safetensors), strictly.

    Only what lies in none of the encoder's own layers may be in the file in addition: that is the
    classifier, which is left out, as are the levels below the encoder's depth. The first layer's
    kernels follow ``bands``; without them those of three bands are spread over other band counts,
    and others need the count of the data.

    Returns:
        Whether the weights are for three bands without names.

    Raises:
        SegmentationError: Not such a file, or the weights of another encoder or of other bands.
    """
    from timm.models import adapt_input_conv

    encoder = _encoder(network)
    state = _fitted(encoder, _read_state(file), config)
    keys = [f"{layer}.weight" for layer in band_layers(encoder, config.in_channels)]
    first = {key: state[key] for key in keys if key in state and state[key].ndim == 4}
    counts = {weight.shape[1] for weight in first.values()}
    there = len(first) == len(keys) and len(counts) == 1
    rgb = there and not bands and counts == {3}
    if rgb and config.in_channels != 3:
        for key, weight in first.items():
            state[key] = adapt_input_conv(config.in_channels, weight)
    elif there and not rgb:
        state |= _kernels_of_bands(first, file, config, bands)
    try:
        # the base class's, since encoders override it to be lenient
        nn.Module.load_state_dict(encoder, state, strict=True)
    except RuntimeError as error:
        raise SegmentationError(
            f"{file} does not hold the weights of {config.encoder_name}: "
            f"{str(error).splitlines()[1].strip()[:200]}"
        ) from error
    if there and bands:
        log.info("%s: %s", file.name, bands)
    return bool(rgb)


def _fitted(
    encoder: nn.Module, state: dict[str, Tensor], config: ModelConfig
) -> dict[str, Tensor]:
    """A file's weights by the encoder's own keys, without a classifier and the levels left out."""
    from segmentation_models_pytorch.encoders import get_encoder

    named, own = _named_as(encoder, state), encoder.state_dict()
    if config.encoder_depth == ModelConfig.encoder_depth or named.keys() <= own.keys():
        return named
    # layers of several levels can share a name: which are left out, the whole encoder says
    whole = get_encoder(
        config.encoder_name, config.in_channels, ModelConfig.encoder_depth, weights=None
    )
    deeper = {k: v.shape for k, v in whole.state_dict().items() if k not in own}
    named = _named_as(whole, state)
    return {k: v for k, v in named.items() if deeper.get(k) != v.shape}


def _named_as(encoder: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file's weights by the encoder's own keys, without a classifier."""
    from timm.models import VisionTransformer

    own = encoder.state_dict()

    def plain(key: str) -> str:
        # timm's encoders have "model.stages_0" where their files have "stages.0"
        return key.removeprefix("model.").replace(".", "_")

    known = {plain(key): key for key in own}
    layers = {plain(key.removeprefix("model.").split(".")[0]) + "_" for key in own}
    found = {
        known.get(plain(key), key): value
        for key, value in state.items()
        if plain(key) in known or plain(key).startswith(tuple(layers))
    }
    transformer = getattr(encoder, "model", None)
    if isinstance(transformer, VisionTransformer):
        # it has kept a classifier, which nobody uses
        found = {k: v for k, v in found.items() if not plain(k).startswith("head_")}
        found |= {k: v for k, v in own.items() if plain(k).startswith("head_")}
        _resample_positions(transformer, found)
    return found


def _resample_positions(transformer: nn.Module, state: dict[str, Tensor]) -> None:
    """Bring the position embeddings of a file for images of another size to the encoder's grid."""
    from timm.layers import resample_abs_pos_embed

    own, there = transformer.pos_embed, state.get("model.pos_embed")
    if own is None or there is None or there.shape == own.shape or there.ndim != 3:
        return
    prefix = 0 if transformer.no_embed_class else transformer.num_prefix_tokens
    side = round(max(there.shape[1] - prefix, 0) ** 0.5)
    if there.shape[1] - prefix == side**2 and there.shape[2] == own.shape[2]:
        state["model.pos_embed"] = resample_abs_pos_embed(
            there, transformer.patch_embed.grid_size, num_prefix_tokens=prefix
        )


def _kernels_of_bands(
    first: dict[str, Tensor], file: Path, config: ModelConfig, bands: FileBands | None
) -> dict[str, Tensor]:
    """The first layer's kernels for the bands of the data, from a file's (O, C, h, w), by key.

    Raises:
        SegmentationError: Other bands than those named, or without names another count.
    """
    count = next(iter(first.values())).shape[1]
    if bands:
        if len(bands.names) != count:
            raise SegmentationError(
                f"{file} is for {count} bands, and {len(bands.names)} are named "
                f"({listed(bands.names)}); name each with --weights_bands, in order"
            )
        return {key: match_kernels(w, bands.matches) for key, w in first.items()}
    if count != config.in_channels:
        raise SegmentationError(
            f"{file} is for {count} bands, and the patches have {config.in_channels}; name the "
            "bands of the file, in order, with --weights_bands"
        )
    log.warning(
        "%s: its %d bands are taken for those of the patches, in their order; %s names them",
        file.name,
        count,
        "--weights_bands",
    )
    return first


def _read_state(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError

    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(file)
        else:
            state = dict(load_safely(file))
    except (SafetensorError, CheckpointError, ValueError, TypeError) as error:
        raise SegmentationError(f"{file} is no file of weights: {error}") from error
    other = [str(k) for k, value in state.items() if not isinstance(value, Tensor)]
    if other:
        raise SegmentationError(
            f"{file} is no file of weights alone: it holds more than tensors ({listed(other[:6])}); "
            "save the encoder's own state dictionary"
        )
    if any(re.search(r"features\.\d+\.\d+\.attn\.", key) for key in state):
        raise SegmentationError(
            f"{file} holds a Swin transformer of TorchVision, which no model here takes; give a "
            "ResNet or a vision transformer of docs/models.md"
        )
    return state
