"""Checkpoints of other hands: earlier versions' files, and weights that nothing describes."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch

from common.architectures import ARCHITECTURES, ModelConfig, default_class_names
from common.earlier_models import registered_name
from common.errors import CheckpointError, OptionError
from model_training import Normalization, build_model, load_checkpoint

PLAIN = ModelConfig("unet-dropout", 3, 2, None)
BINARY = replace(PLAIN, num_classes=1)
ENCODED = ModelConfig("linknet", 3, 2, "resnet18")
OPTIONS = ("model_name", "encoder_name", "in_channels", "num_classes")


def options_of(config: ModelConfig) -> dict:
    """What a user says who describes a file whole; an unsaid encoder is None."""
    return {name: getattr(config, name) for name in OPTIONS}


def build(config: ModelConfig):
    return build_model(config).eval()


def network_state(config: ModelConfig) -> dict:
    """The weights as the library's own module has them, without our wrapper."""
    return build(config).network.state_dict()


def prefixed(state: dict, prefix: str) -> dict:
    return {prefix + key: value for key, value in state.items()}


def write(folder: Path, content) -> Path:
    path = folder / "weights.pth"
    torch.save(content, path)
    return path


def metadata_of(config: ModelConfig, **changes) -> dict:
    """The documented keys; a change to None takes one out."""
    keys = options_of(config) | {"mode": config.mode, "normalization": "percentile_99"}
    return {k: v for k, v in (keys | changes).items() if v is not None}


def write_described(folder: Path, config: ModelConfig, key="metadata", **changes):
    metadata = metadata_of(config, **changes)
    return write(folder, {"model_state_dict": network_state(config), key: metadata})


def one_line(caught) -> str:
    message = str(caught.value)
    assert "\n" not in message and "weights.pth" in message
    return message


def assert_equal_logits(model, other) -> None:
    images = torch.rand(1, 3, 32, 40)
    with torch.inference_mode():
        assert torch.equal(model(images), other(images))


# --- files without a description ------------------------------------------------------------


@pytest.mark.parametrize("config", [PLAIN, BINARY, ENCODED], ids=str)
@pytest.mark.parametrize("place", [None, "model_state_dict", "state_dict"])
def test_described_weights_give_the_logits_of_their_model(tmp_path, config, place):
    model = build(config)
    state = model.network.state_dict()
    content = {place: state, "epoch": 3, "val_loss": 0.5} if place else state
    loaded = load_checkpoint(write(tmp_path, content), described=options_of(config))
    assert_equal_logits(loaded.model, model)
    assert loaded.config == config
    assert loaded.normalization == Normalization("image")
    assert not loaded.model.training
    assert loaded.class_names == default_class_names(config.num_classes)
    assert loaded.metadata["model_name"] == config.model_name


def test_weights_of_the_library_itself_give_its_own_logits(tmp_path):
    model = smp.Linknet("resnet18", encoder_weights=None, in_channels=3, classes=2)
    path = write(tmp_path, model.eval().state_dict())
    loaded = load_checkpoint(path, described=options_of(ENCODED))
    images = torch.rand(1, 3, 32, 64)
    with torch.inference_mode():
        assert torch.equal(loaded.model(images), model(images))


def test_a_training_checkpoint_with_its_optimizer_opens(tmp_path):
    model = build(PLAIN)
    optimizer = torch.optim.AdamW(model.network.parameters())
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    content = {
        "epoch": 7,
        "model_state_dict": model.network.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "scheduler_state_dict": scheduler.state_dict(),
        "val_iou": np.float64(0.5),
        "mode": "multiclass",
    }
    path = write(tmp_path, content)
    loaded = load_checkpoint(path, described=options_of(PLAIN))
    assert_equal_logits(loaded.model, model)


@pytest.mark.parametrize("num_classes", [1, 2])
def test_a_binary_file_takes_its_outputs_or_its_classes(tmp_path, num_classes):
    content = {"model_state_dict": network_state(BINARY), "mode": "binary"}
    described = options_of(BINARY) | {"num_classes": num_classes}
    loaded = load_checkpoint(write(tmp_path, content), described=described)
    assert loaded.config == BINARY
    assert loaded.class_names == ["background", "foreground"]


@pytest.mark.parametrize("prefix", ["module.", "network.", "module.network."])
def test_the_prefix_of_a_wrapper_is_taken_off(tmp_path, prefix):
    model = build(PLAIN)
    path = write(tmp_path, prefixed(model.network.state_dict(), prefix))
    loaded = load_checkpoint(path, described=options_of(PLAIN))
    assert_equal_logits(loaded.model, model)


def test_the_prefix_is_taken_off_a_described_file_too(tmp_path):
    model = build(PLAIN)
    state = prefixed(model.network.state_dict(), "module.")
    content = {"model_state_dict": state, "metadata": metadata_of(PLAIN)}
    assert_equal_logits(load_checkpoint(write(tmp_path, content)).model, model)


def test_a_prefix_on_some_keys_stays(tmp_path):
    state = network_state(PLAIN)
    first = next(iter(state))
    state["module." + first] = state.pop(first)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(write(tmp_path, state), described=options_of(PLAIN))
    assert "module." + first in one_line(caught)


@pytest.mark.parametrize("described", [None, {}, dict.fromkeys(OPTIONS)], ids=str)
@pytest.mark.parametrize("rest", [{}, {"metadata": {}}, {"mode": "binary"}], ids=str)
def test_weights_without_a_description_name_the_options(tmp_path, described, rest):
    path = write(tmp_path, {"model_state_dict": {"a": torch.zeros(1)}} | rest)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, described=described)
    assert one_line(caught) == (
        f"{path} holds weights without a description; give --model_name, --encoder_name, "
        "--in_channels, --num_classes (1 for binary)"
    )


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        (["model_name"], ["encoder_name", "in_channels", "num_classes"]),
        (["encoder_name", "in_channels"], ["model_name", "num_classes"]),
        (["model_name", "encoder_name", "num_classes"], ["in_channels"]),
        (["model_name", "in_channels", "num_classes"], ["encoder_name"]),
    ],
)
def test_a_partial_description_names_just_the_missing_options(tmp_path, given, missing):
    path = write(tmp_path, {"weight": torch.zeros(1)})
    described = {name: options_of(ENCODED)[name] for name in given}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, described=described)
    message = one_line(caught)
    assert [name for name in OPTIONS if f"--{name}" in message] == missing
    assert ("1 for binary" in message) == ("num_classes" in missing)


def test_a_model_without_an_encoder_needs_none_named(tmp_path):
    path = write(tmp_path, {"weight": torch.zeros(1)})
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, described={"model_name": "unet-dropout"})
    assert "give --in_channels, --num_classes" in one_line(caught)


@pytest.mark.parametrize(
    "wrong",
    [
        {"model_name": "fpn"},
        {"model_name": "unet-dropout"},
        {"encoder_name": "resnet34"},
        {"encoder_name": "no_such"},
        {"in_channels": 4},
        {"num_classes": 1},
        {"num_classes": 3},
    ],
    ids=str,
)
def test_a_wrong_description_is_refused(tmp_path, wrong):
    path = write(tmp_path, network_state(ENCODED))
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, described=options_of(ENCODED) | wrong)
    one_line(caught)


def test_an_unknown_model_name_is_a_wrong_option(tmp_path):
    path = write(tmp_path, network_state(PLAIN))
    with pytest.raises(OptionError, match="did you mean 'linknet'"):
        load_checkpoint(path, described=options_of(PLAIN) | {"model_name": "linkne"})


@pytest.mark.parametrize(
    "content",
    [{}, {"state_dict": {}}, {"state_dict": [1]}, {"weight": 1}, {3: torch.zeros(1)}],
    ids=str,
)
def test_a_file_without_tensors_stays_no_checkpoint(tmp_path, content):
    path = write(tmp_path, content)
    with pytest.raises(CheckpointError, match="no model_state_dict") as caught:
        load_checkpoint(path, described=options_of(PLAIN))
    one_line(caught)


def test_bare_weights_that_are_no_numbers_are_refused(tmp_path):
    state = network_state(PLAIN)
    next(iter(state.values())).view(-1)[0] = torch.nan
    with pytest.raises(CheckpointError, match="not numbers") as caught:
        load_checkpoint(write(tmp_path, state), described=options_of(PLAIN))
    one_line(caught)


class Malicious:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("place", ["state_dict", "model_state_dict", "optimizer"])
def test_code_beside_or_in_bare_weights_never_runs(tmp_path, place):
    trace = tmp_path / "trace"
    content = {"state_dict": network_state(PLAIN), place: Malicious(trace)}
    path = write(tmp_path, content)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, described=options_of(PLAIN))
    one_line(caught)
    assert not trace.exists()


# --- files that describe themselves ---------------------------------------------------------


@pytest.mark.parametrize("config", [BINARY, ENCODED], ids=str)
def test_options_that_agree_with_the_file_are_accepted(tmp_path, config):
    path = write_described(tmp_path, config)
    for name, value in options_of(config).items():
        assert load_checkpoint(path, described={name: value}).config == config
    described = {"num_classes": config.label_classes}
    assert load_checkpoint(path, described=described).config == config


def test_an_option_names_the_model_exactly(tmp_path):
    path = write_described(tmp_path, ENCODED)
    with pytest.raises(OptionError, match="did you mean 'linknet'"):
        load_checkpoint(path, described={"model_name": "LinkNet"})


@pytest.mark.parametrize(
    ("given", "fact"),
    [
        ({"model_name": "fpn"}, "--model_name fpn, but {} is a linknet"),
        ({"encoder_name": "resnet34"}, "--encoder_name resnet34, but {} has resnet18"),
        ({"in_channels": 4}, "--in_channels 4, but {} takes 3 bands"),
        ({"num_classes": 6}, "--num_classes 6, but {} has 2 classes"),
        ({"num_classes": 1}, "--num_classes 1, but {} has 2 classes"),
    ],
    ids=str,
)
def test_a_contradiction_says_both_values(tmp_path, given, fact):
    path = write_described(tmp_path, ENCODED)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, described=given)
    assert one_line(caught) == f"{fact.format(path)}; leave it out"


def test_an_option_fills_what_the_file_leaves_open(tmp_path):
    path = write_described(tmp_path, ENCODED, encoder_name=None)
    with pytest.raises(CheckpointError, match="without a full description") as caught:
        load_checkpoint(path)
    assert one_line(caught).endswith("; give --encoder_name")
    loaded = load_checkpoint(path, described={"encoder_name": "resnet18"})
    assert loaded.config == ENCODED


# --- earlier SemanticSeg4EO -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("UNet", "unet"),
        ("U_Net", "unet"),
        ("UNet++", "unet++"),
        ("UnetPlusPlus", "unet++"),
        ("unet_plus_plus", "unet++"),
        ("unetpp", "unet++"),
        ("MAnet", "manet"),
        ("Linknet", "linknet"),
        ("DeepLabV3", "deeplabv3"),
        ("DeepLabV3+", "deeplabv3+"),
        ("DeepLabV3Plus", "deeplabv3+"),
        ("deeplab-v3-plus", "deeplabv3+"),
        ("UNet-Dropout", "unet-dropout"),
        ("unet_dropout", "unet-dropout"),
        ("deeplabv3_resnet50", "deeplabv3_resnet50"),
    ],
)
def test_names_of_earlier_versions_are_known(spelling, name):
    assert registered_name(spelling) == name


def test_every_registered_name_stands_for_itself():
    assert [registered_name(name) for name in ARCHITECTURES] == list(ARCHITECTURES)


def test_an_unknown_name_in_a_file_names_the_file(tmp_path):
    path = write_described(tmp_path, PLAIN, model_name="segformer-b2")
    with pytest.raises(CheckpointError, match="Unknown model 'segformer-b2'") as caught:
        load_checkpoint(path)
    one_line(caught)


@pytest.mark.parametrize("key", ["metadata", "config"])
def test_an_earlier_file_opens_with_its_spelling_and_scalars(tmp_path, key):
    path = write_described(
        tmp_path,
        ENCODED,
        key,
        model_name="LinkNet",
        in_channels=np.int64(3),
        num_classes=np.int32(2),
        input_size=(224, 224),
        training_params={"best_val_iou": np.float64(0.5)},
    )
    loaded = load_checkpoint(path)
    assert loaded.config == ENCODED
    assert loaded.normalization == Normalization("image")
    assert loaded.metadata["model_name"] == "linknet"
    assert type(loaded.config.in_channels) is int


@pytest.mark.parametrize("config", [PLAIN, BINARY], ids=str)
def test_a_file_without_a_mode_has_that_of_its_classes(tmp_path, config):
    loaded = load_checkpoint(write_described(tmp_path, config, mode=None))
    assert loaded.config == config


@pytest.mark.parametrize("num_classes", [1, 2])
def test_a_binary_model_has_one_channel_whatever_its_file_counts(tmp_path, num_classes):
    path = write_described(tmp_path, BINARY, num_classes=num_classes)
    assert load_checkpoint(path).config == BINARY


def test_a_binary_model_with_a_channel_per_class_keeps_both(tmp_path):
    model = build(PLAIN)
    metadata = metadata_of(PLAIN, mode="binary")
    content = {"model_state_dict": model.network.state_dict(), "metadata": metadata}
    loaded = load_checkpoint(write(tmp_path, content))
    assert loaded.config == PLAIN and loaded.config.mode == "multiclass"
    assert loaded.class_names == ["background", "foreground"]
    assert_equal_logits(loaded.model, model)


def test_a_binary_file_of_other_outputs_is_refused(tmp_path):
    path = write_described(tmp_path, replace(PLAIN, num_classes=3), mode="binary")
    with pytest.raises(CheckpointError, match="are not those of unet-dropout:"):
        load_checkpoint(path)


# --- class codes ----------------------------------------------------------------------------


@pytest.mark.parametrize("codes", [[40, "wheat"], [-3, 2**40], None])
def test_codes_of_classes_are_those_of_the_file_else_the_numbers(tmp_path, codes):
    path = write_described(tmp_path, PLAIN, class_codes=codes)
    assert load_checkpoint(path).class_codes == (codes or [0, 1])
    assert load_checkpoint(write_described(tmp_path, BINARY)).class_codes == [0, 1]


@pytest.mark.parametrize("codes", [[1], [1, 2.5], [True, 2], "12", [1, 2, 3]])
def test_codes_that_do_not_fit_the_classes_are_refused(tmp_path, codes):
    path = write_described(tmp_path, PLAIN, class_codes=codes)
    with pytest.raises(CheckpointError, match="expected 2 numbers or texts") as caught:
        load_checkpoint(path)
    one_line(caught)
