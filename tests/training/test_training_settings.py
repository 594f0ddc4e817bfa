"""The options of main.py as a dataclass: what can be, and what is refused."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import fields

import pytest
from helpers import (
    ROOT,
    settings,
)

from common.errors import OptionError
from training.settings import TrainingConfig
from training.start import settle_model

# --- settings -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "default"),
    [
        ("val_strategy", "split"),
        ("epochs", 100),
        ("batch_size", 4),
        ("learning_rate", 1e-3),
        ("encoder", "resnet34"),
        ("pretrained", False),
        ("data_augmentation", "symmetries"),
        ("use_class_weights", False),
        ("no_calibration", False),
        ("no_baseline", False),
        ("learning_curve", False),
        ("area_estimation", False),
        ("n_splits", 5),
        ("ignore_index", 255),
        ("in_channels", None),
        ("device", None),
        ("save_dir", "trained_models"),
        ("seed", 42),
        ("loss", "dice+ce"),
        ("normalization", "dataset"),
    ],
)
def test_defaults_are_the_documented_ones(name, default):
    assert getattr(settings(), name) == default


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"model": "unet+"}, "did you mean 'unet++'"),
        ({"model": "DeepLab"}, "did you mean 'deeplabv3'"),
        ({"mode": "multiclass", "classes": 1}, "--classes 1"),
        ({"mode": "binary", "classes": 6}, "--mode multiclass"),
        ({"epochs": 0}, "--epochs 0"),
        ({"batch_size": 0}, "--batch_size 0"),
        ({"num_workers": "-1"}, "--num_workers -1"),
        ({"patience": -1}, "--patience -1"),
        ({"seed": -1}, "--seed -1"),
        ({"n_splits": 1}, "--n_splits 1"),
        ({"n_splits": 3}, "--n_splits 3: expected --val_strategy kfold with it"),
        ({"learning_rate": 0.0}, "--learning_rate 0"),
        ({"learning_rate": math.nan}, "--learning_rate nan"),
        ({"weight_decay": -0.1}, "--weight_decay -0.1"),
        ({"weight_decay": math.inf}, "--weight_decay inf"),
        ({"dropout_rate": 1.0}, "--dropout_rate 1"),
        ({"dropout_rate": -0.1}, "--dropout_rate -0.1"),
        ({"ignore_index": 1}, "--ignore_index 1"),
        ({"mode": "multiclass", "classes": 6, "ignore_index": 5}, "--ignore_index 5"),
        ({"loss": "dice+cross"}, "Unknown loss 'cross'"),
        ({"loss": "dice", "use_class_weights": True}, "--use_class_weights"),
        ({"mode": "multiclass", "classes": 3, "class_names": "a,b"}, "3 names"),
    ],
)
def test_a_setting_that_cannot_be_right_is_refused(wrong, words):
    with pytest.raises(OptionError) as caught:
        settings(**wrong)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_binary_models_have_one_output_and_two_label_classes():
    config = settings().model_config(7)
    assert (config.in_channels, config.num_classes, config.label_classes) == (7, 1, 2)
    assert config.mode == "binary"


def test_multiclass_models_have_an_output_per_class():
    config = settings(mode="multiclass", classes=6).model_config(3)
    assert (config.num_classes, config.label_classes) == (6, 6)
    assert config.mode == "multiclass"


@pytest.mark.parametrize("model", ["unet-dropout", "deeplabv3_resnet50"])
def test_an_encoder_for_a_model_without_one_is_refused(model):
    with pytest.raises(OptionError, match="resnet18.*no exchangeable encoder"):
        settings(model=model, encoder_name="resnet18").model_config(3)


def test_a_model_for_pixels_takes_no_encoder_at_all():
    with pytest.raises(OptionError, match="resnet34.*no exchangeable encoder"):
        settings(model="pixel", encoder_name="resnet34")
    assert settle_model(settings(model="pixel")).encoder_name is None
    assert settle_model(settings(model="unet-dropout")).encoder_name == "resnet34"


# --- training -------------------------------------------------------------------------------


def test_settings_can_be_imported_without_torch():
    code = "import training.settings, sys; assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_setting_has_a_help_text():
    assert all(item.metadata["help"] for item in fields(TrainingConfig))
