"""The first layer for the bands of the data."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d

from common.architectures import ModelConfig
from model_training import build_model
from training.kernels import first_conv, match_kernels


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
    "model", ["unet", "deeplabv3_resnet50", "unet-dropout", "pixel"]
)
def test_the_first_convolution_reads_the_bands(model):
    config = ModelConfig(model, 5, 3, "tu-test_resnet" if model == "unet" else None)
    network = build_model(config).network
    layer = network.get_submodule(first_conv(network))
    assert isinstance(layer, nn.Conv2d) and layer.in_channels == 5
