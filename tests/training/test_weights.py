"""Pretrained weights: of the libraries, and of files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers import (
    SENTINEL,
    TINY_ENCODER,
    settings,
)
from timm.models import adapt_input_conv

from common.architectures import (
    ModelConfig,
)
from common.errors import OptionError, SegmentationError
from model_training import (
    build_model,
)
from training.file_bands import rgb_channels
from training.samples import (
    SampleIndex,
)
from training.weights import build_initial_model


def encoder_of(network) -> torch.nn.Module:
    return network.network.encoder


def first_kernels(network) -> torch.Tensor:
    layers = network.network.modules()
    return next(m for m in layers if isinstance(m, torch.nn.Conv2d)).weight.detach()


def encoder_file(folder: Path, name: str = "resnet18", bands: int = 3) -> Path:
    """A file with the weights of a freshly built encoder."""
    torch.manual_seed(99)
    path = folder / f"{name}_{bands}.pth"
    source = build_model(ModelConfig("unet", bands, 1, name))
    torch.save(encoder_of(source).state_dict(), path)
    return path


@pytest.mark.parametrize(
    ("model", "encoder"),
    [
        ("unet", "resnet18"),
        ("unet", "tu-resnet18"),
        ("deeplabv3_resnet50", "resnet50"),
    ],
)
def test_without_a_network_pretrained_says_what_to_do(model, encoder):
    with pytest.raises(SegmentationError) as caught:
        build_initial_model(ModelConfig(model, 3, 1, encoder), "imagenet")
    message = str(caught.value)
    assert encoder in message and "--encoder_weights" in message
    assert "\n" not in message


def test_an_unknown_name_of_weights_is_refused():
    with pytest.raises(OptionError, match="no_such_weights"):
        build_initial_model(ModelConfig("unet", 3, 1, "resnet18"), "no_such_weights")


@pytest.mark.parametrize(
    ("model", "encoder"),
    [("unet", "tu-resnet18"), ("deeplabv3_resnet50", "resnet50")],
)
def test_an_unknown_name_of_weights_is_refused_by_every_library(model, encoder):
    with pytest.raises(OptionError, match="no_such_weights.*imagenet"):
        build_initial_model(ModelConfig(model, 3, 1, encoder), "no_such_weights")


def test_unet_dropout_has_no_pretrained_weights():
    with pytest.raises(OptionError, match="unet-dropout has no pretrained"):
        build_initial_model(ModelConfig("unet-dropout", 3, 1, None), "imagenet")


FAMILY_ENCODERS = [
    "resnet18",
    "mobilenet_v2",
    "tu-mobilenetv3_small_050",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("efficientnet-b0", "vgg11", "densenet121")
    ),
]


@pytest.mark.parametrize("encoder", FAMILY_ENCODERS)
def test_encoder_weights_of_a_file_are_loaded_whole(tmp_path, encoder):
    file = encoder_file(tmp_path, encoder)
    torch.manual_seed(1)
    network = build_initial_model(ModelConfig("unet", 3, 1, encoder), str(file))
    stored = torch.load(file, weights_only=True)
    loaded = encoder_of(network).state_dict()
    assert stored.keys() == loaded.keys()
    assert all(torch.equal(stored[key], loaded[key]) for key in stored)


@pytest.mark.parametrize("bands", [2, 4, 10])
def test_rgb_kernels_are_spread_over_other_band_counts(tmp_path, bands):
    file = encoder_file(tmp_path)
    rgb = torch.load(file, weights_only=True)["conv1.weight"]
    network = build_initial_model(ModelConfig("unet", bands, 1, "resnet18"), str(file))
    kernels = first_kernels(network)
    for band in range(bands):
        torch.testing.assert_close(kernels[:, band], rgb[:, band % 3] * 3 / bands)


def test_spread_kernels_of_equal_colours_keep_the_size_of_the_output():
    kernels = torch.rand(4, 1, 3, 3).expand(4, 3, 3, 3)
    for bands in (1, 2, 5, 12):
        spread = adapt_input_conv(bands, kernels)
        torch.testing.assert_close(spread.sum(dim=1), kernels.sum(dim=1))


@pytest.mark.parametrize("encoder", ["resnet18", TINY_ENCODER])
def test_each_colour_gets_its_own_kernel_and_the_rest_their_mean(tmp_path, encoder):
    file = encoder_file(tmp_path, encoder)
    rgb = first_kernels(
        build_initial_model(ModelConfig("unet", 3, 1, encoder), str(file))
    )
    network = build_initial_model(
        ModelConfig("unet", 10, 1, encoder), str(file), [2, 1, 0]
    )
    kernels = first_kernels(network) * 10 / 3
    for colour, channel in enumerate([2, 1, 0]):
        torch.testing.assert_close(kernels[:, channel], rgb[:, colour])
    for channel in range(3, 10):
        torch.testing.assert_close(kernels[:, channel], rgb.mean(dim=1))


def test_three_bands_in_another_order_get_their_kernels(tmp_path):
    file = encoder_file(tmp_path)
    rgb = torch.load(file, weights_only=True)["conv1.weight"]
    config = ModelConfig("unet", 3, 1, "resnet18")
    kernels = first_kernels(build_initial_model(config, str(file), [2, 1, 0]))
    torch.testing.assert_close(kernels, rgb.flip(1))


def test_weights_made_for_the_same_bands_are_left_as_they_are(tmp_path):
    file = encoder_file(tmp_path, bands=10)
    stored = torch.load(file, weights_only=True)["conv1.weight"]
    config = ModelConfig("unet", 10, 1, "resnet18")
    network = build_initial_model(config, str(file), [2, 1, 0])
    torch.testing.assert_close(first_kernels(network), stored)


@pytest.mark.parametrize(
    ("descriptions", "option", "expected"),
    [
        (SENTINEL, None, [2, 1, 0]),
        (SENTINEL, "7, 3,2", [6, 2, 1]),
        (("nir", "red", "green", "blue"), None, [1, 2, 3]),
        ((None, None, None, None), None, None),
        ((None, None, None, None), "4,3,2", [3, 2, 1]),
        (("VV", "VH"), None, None),
    ],
)
def test_colours_are_found_by_option_or_description(descriptions, option, expected):
    found = SampleIndex(
        [], np.empty(0), [], (len(descriptions), 8, 8), descriptions, None, []
    )
    assert rgb_channels(settings(rgb_bands=option, pretrained=True), found) == expected


@pytest.mark.parametrize(
    "option", ["1,2", "0,1,2", "1,2,11", "red,green,blue", "1,2,3,4"]
)
def test_rgb_bands_must_be_three_bands_of_the_data(option):
    found = SampleIndex([], np.empty(0), [], (10, 8, 8), SENTINEL, None, [])
    with pytest.raises(OptionError, match="--rgb_bands"):
        rgb_channels(settings(rgb_bands=option, pretrained=True), found)


def test_a_classifier_head_in_the_file_is_left_out(tmp_path):
    file = encoder_file(tmp_path)
    state = torch.load(file, weights_only=True)
    head = {"fc.weight": torch.rand(1000, 512), "fc.bias": torch.rand(1000)}
    torch.save(state | head, file)
    network = build_initial_model(ModelConfig("unet", 3, 1, "resnet18"), str(file))
    torch.testing.assert_close(first_kernels(network), state["conv1.weight"])


@pytest.mark.parametrize(
    ("encoder", "depth", "source"),
    [
        ("resnet18", 5, "resnet34"),  # all layers of the former, and more in each
        ("resnet18", 3, "resnet34"),
        ("tu-test_resnet", 5, "resnet34"),
        ("tu-mobilenetv3_small_050", 3, "mobilenetv3_large_100"),
        pytest.param("tu-densenet121", 5, "densenet169", marks=pytest.mark.slow),
        pytest.param("tu-convnext_atto", 5, "convnext_femto", marks=pytest.mark.slow),
        pytest.param(
            "tu-efficientnet_b0", 3, "efficientnet_b1", marks=pytest.mark.slow
        ),
    ],
)
def test_the_weights_of_a_larger_encoder_are_refused(tmp_path, encoder, depth, source):
    file = tmp_path / "larger.pth"
    torch.save(timm.create_model(source).state_dict(), file)
    config = ModelConfig("unet", 3, 1, encoder, encoder_depth=depth)
    with pytest.raises(SegmentationError, match="does not hold the weights of"):
        build_initial_model(config, str(file))


SHALLOWER_ENCODERS = [
    ("resnet18", 3),
    ("efficientnet-b0", 4),
    ("tu-mobilenetv3_small_050", 3),
    ("tu-cspnext_tiny", 3),  # timm builds it without the levels
    *(
        pytest.param(name, 3, marks=pytest.mark.slow)
        for name in ("mobilenet_v2", "densenet121", "vgg11", "dpn68", "inceptionv4")
    ),
]


@pytest.mark.parametrize(("encoder", "depth"), SHALLOWER_ENCODERS)
def test_fewer_levels_take_their_part_of_a_file(tmp_path, encoder, depth):
    file = encoder_file(tmp_path, encoder)
    torch.manual_seed(1)
    config = ModelConfig("unet", 3, 1, encoder, encoder_depth=depth)
    network = build_initial_model(config, str(file))
    stored = torch.load(file, weights_only=True)
    loaded = encoder_of(network).state_dict()
    assert loaded.keys() < stored.keys()
    assert all(torch.equal(stored[key], loaded[key]) for key in loaded)


def test_fewer_levels_take_their_part_of_the_file_that_timm_distributes(tmp_path):
    source = timm.create_model("mobilenetv3_small_050")
    torch.save(source.state_dict(), tmp_path / "model.pth")
    config = ModelConfig("unet", 10, 1, TINY_ENCODER, encoder_depth=3)
    network = build_initial_model(config, str(tmp_path / "model.pth"), [2, 1, 0])
    blocks = encoder_of(network).model.blocks
    for own, there in zip(blocks[:2], source.blocks):
        for key, value in own.state_dict().items():
            assert torch.equal(value, there.state_dict()[key])


def add_a_level(state: dict[str, torch.Tensor]):
    state["model.blocks.9.0.conv.weight"] = torch.rand(1)


def lose_a_layer(state: dict[str, torch.Tensor]):
    del state["model.blocks.0.0.conv_pw.weight"]


def widen_a_level(state: dict[str, torch.Tensor]):
    state["model.blocks.5.0.conv.weight"] = torch.rand(9, 48, 1, 1)


@pytest.mark.parametrize("change", [add_a_level, lose_a_layer, widen_a_level])
def test_fewer_levels_take_no_other_file(tmp_path, change):
    file = encoder_file(tmp_path, TINY_ENCODER)
    state = torch.load(file, weights_only=True)
    change(state)
    torch.save(state, file)
    config = ModelConfig("unet", 3, 1, TINY_ENCODER, encoder_depth=3)
    with pytest.raises(SegmentationError, match="does not hold the weights of"):
        build_initial_model(config, str(file))


@pytest.mark.parametrize("encoder", ["test_resnet", "test_convnext", "regnetx_002"])
def test_heads_of_many_families_are_left_out(tmp_path, encoder):
    file = tmp_path / "whole.pth"
    source = timm.create_model(encoder).state_dict()
    torch.save(source, file)
    network = build_initial_model(ModelConfig("unet", 3, 1, f"tu-{encoder}"), str(file))
    loaded = encoder_of(network).state_dict().values()
    values = {tuple(value.flatten()[:3].tolist()) for value in source.values()}
    assert len(loaded) < len(source)
    assert all(tuple(value.flatten()[:3].tolist()) in values for value in loaded)


def test_safetensors_files_are_read(tmp_path):
    from safetensors.torch import save_file

    state = torch.load(encoder_file(tmp_path), weights_only=True)
    save_file(state, tmp_path / "w.safetensors")
    config = ModelConfig("unet", 3, 1, "resnet18")
    network = build_initial_model(config, str(tmp_path / "w.safetensors"))
    torch.testing.assert_close(first_kernels(network), state["conv1.weight"])


def test_torchvision_weights_go_into_the_backbone(tmp_path):
    from torchvision.models import resnet50

    source = resnet50()
    torch.save(source.state_dict(), tmp_path / "r50.pth")
    config = ModelConfig("deeplabv3_resnet50", 3, 1, "resnet50")
    network = build_initial_model(config, str(tmp_path / "r50.pth"))
    torch.testing.assert_close(
        network.network.backbone.conv1.weight, source.conv1.weight
    )


@pytest.mark.parametrize(
    "encoder",
    [
        "resnet18",
        *(
            pytest.param(
                name,
            )
            for name in ("mobilenetv3_small_050", "efficientnet_b0", "densenet121")
        ),
    ],
)
def test_the_file_that_timm_distributes_is_read(tmp_path, encoder):
    source = timm.create_model(encoder)
    torch.save(source.state_dict(), tmp_path / "model.pth")
    config = ModelConfig("unet", 3, 1, f"tu-{encoder}")
    network = build_initial_model(config, str(tmp_path / "model.pth"))
    kernels = next(m for m in source.modules() if isinstance(m, torch.nn.Conv2d)).weight
    torch.testing.assert_close(first_kernels(network), kernels)


def write_garbage(path: Path):
    path.write_bytes(b"not weights at all")


def write_list(path: Path):
    torch.save([1, 2, 3], path)


def write_other_encoder(path: Path):
    state = build_model(ModelConfig("unet", 3, 1, "mobilenet_v2"))
    torch.save(encoder_of(state).state_dict(), path)


def write_half(path: Path):
    state = build_model(ModelConfig("unet", 3, 1, "resnet18"))
    items = list(encoder_of(state).state_dict().items())
    torch.save(dict(items[:20]), path)


def write_other_bands(path: Path):
    state = build_model(ModelConfig("unet", 7, 1, "resnet18"))
    torch.save(encoder_of(state).state_dict(), path)


def write_words(path: Path):
    state = build_model(ModelConfig("unet", 3, 1, "resnet18"))
    words = dict.fromkeys(encoder_of(state).state_dict(), "words")
    torch.save(words, path)


@pytest.mark.parametrize(
    "write",
    [
        write_garbage,
        write_list,
        write_other_encoder,
        write_half,
        write_other_bands,
        pytest.param(
            write_words,
        ),
        None,
    ],
)
def test_a_file_of_other_weights_is_refused_by_name(tmp_path, write):
    file = tmp_path / "weights.pth"
    if write:
        write(file)
    with pytest.raises(SegmentationError, match="weights.pth"):
        build_initial_model(ModelConfig("unet", 4, 1, "resnet18"), str(file))


def test_a_broken_safetensors_file_is_refused_by_name(tmp_path):
    file = tmp_path / "weights.safetensors"
    write_garbage(file)
    with pytest.raises(SegmentationError, match="weights.safetensors"):
        build_initial_model(ModelConfig("unet", 3, 1, "resnet18"), str(file))
