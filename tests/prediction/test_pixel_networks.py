"""``--model pixel``: the map is the same whatever the windows, and the edge is like the middle."""

from __future__ import annotations

import numpy as np
import torch
from helpers import statistics
from prediction_helpers import noise, read_map, run, write_scene

from common.architectures import ModelConfig
from model_training import build_model, load_checkpoint, save_checkpoint


def test_every_window_gives_the_same_map(tmp_path):
    torch.manual_seed(0)
    config = ModelConfig("pixel", 3, 4, None)
    path = tmp_path / "pixel.pth"
    save_checkpoint(path, build_model(config), config, statistics(3), {})
    pixels = noise(90, 70).astype(np.float32)
    pixels = (pixels - pixels.min()) / np.ptp(pixels)
    scene = write_scene(tmp_path / "scene.tif", pixels)
    maps = []
    for name, windows in (
        ("a", ("--patch_size", "32", "--overlap", "0")),
        ("b", ("--patch_size", "64", "--overlap", "24")),
    ):
        output = tmp_path / f"{name}.tif"
        more = *windows, "--save_confidence", "--precision", "fp32"
        assert run(path, scene, output, *more) == 0
        maps.append((read_map(output), read_map(tmp_path / f"{name}_confidence.tif")))
    (one, sure), (other, likewise) = maps
    assert len(np.unique(one)) > 1
    np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(sure, likewise, atol=1e-6)
    loaded = load_checkpoint(path)
    with torch.inference_mode():
        logits = loaded.model(torch.from_numpy(pixels)[None])[0]
    np.testing.assert_array_equal(one, logits.argmax(dim=0).numpy())
