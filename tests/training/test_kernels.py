"""The first layer for the bands of the data."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import conv2d

from common.architectures import ModelConfig
from common.errors import OptionError
from model_training import build_model
from training.kernels import band_layers, match_kernels


def test_bands_in_another_order_give_the_same_output():
    weight, images = torch.rand(4, 13, 3, 3), torch.rand(1, 13, 8, 8)
    order = torch.randperm(13).tolist()
    other = conv2d(images[:, order], match_kernels(weight, order))
    torch.testing.assert_close(other, conv2d(images, weight))


def test_an_unknown_band_gets_the_mean_and_the_output_keeps_its_size():
    weight = torch.rand(2, 3, 1, 1)
    kernels = match_kernels(weight, [2, None, None, 0, None, 1])
    torch.testing.assert_close(kernels[:, 0], weight[:, 2] / 2)
    torch.testing.assert_close(kernels[:, 1], weight.mean(dim=1) / 2)
    torch.testing.assert_close(kernels.sum(dim=1), weight.sum(dim=1))


@pytest.mark.parametrize(
    "model, encoder, count",
    [
        ("unet", "tu-test_resnet", 1),
        ("linknet", "mobileone_s0", 2),
        ("deeplabv3_resnet50", None, 1),
        ("unet-dropout", None, 1),
        ("pixel", None, 1),
    ],
)
def test_every_convolution_that_reads_the_bands_is_found(model, encoder, count):
    one, other = (
        build_model(ModelConfig(model, bands, 3, encoder)).network for bands in (5, 6)
    )
    shapes = {name: value.shape for name, value in other.state_dict().items()}
    differ = [k for k, v in one.state_dict().items() if v.shape != shapes[k]]
    assert {f"{layer}.weight" for layer in band_layers(one, 5)} == set(differ)
    assert len(differ) == count and one.training


def test_an_image_that_is_rearranged_first_is_refused():
    network = torch.nn.Sequential(torch.nn.PixelUnshuffle(2), torch.nn.Conv2d(8, 1, 1))
    with pytest.raises(OptionError, match="another --encoder_name"):
        band_layers(network, 2)
