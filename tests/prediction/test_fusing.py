"""Batch normalization fused into convolutions: the same network, with fewer layers."""

from __future__ import annotations

import pytest
import torch
from helpers import ENCODER
from torch import nn

from common.architectures import ModelConfig
from model_training import build_model
from prediction.predictor import fuse_batch_norm


def norms(model: nn.Module) -> int:
    return sum(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())


@pytest.mark.parametrize("encoder", [ENCODER, "resnet18", "tu-mobilenetv3_small_050"])
def test_a_fused_network_gives_the_same_logits(encoder):
    torch.manual_seed(0)
    model = build_model(ModelConfig("unet", 3, 2, encoder))
    for layer in model.modules():  # statistics that are not those of a new layer
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.uniform_(-0.5, 0.5)
            layer.running_var.uniform_(0.5, 2)
    images = torch.rand(2, 3, 64, 96)
    with torch.inference_mode():
        expected = model.eval()(images)
    assert norms(model) > 0
    fused = fuse_batch_norm(model.train(), 3)
    assert norms(fused) == 0
    with torch.inference_mode():
        torch.testing.assert_close(fused(images), expected, atol=1e-4, rtol=1e-4)


def test_a_network_that_uses_a_convolution_twice_stays_as_it_is():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution = nn.Conv2d(3, 3, 1)
            self.norm = nn.BatchNorm2d(3)

        def forward(self, images):
            features = self.convolution(images)
            return self.norm(features) + features

    model = Twice().eval()
    model.norm.running_mean.fill_(1)
    layers = [*model.modules()]
    assert [*fuse_batch_norm(model, 3).modules()] == layers
