"""The exported graph repeats prediction: what is invalid, scaling, temperature, mean."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from export_helpers import (
    BANDS,
    HIGH,
    LOW,
    SIDE,
    make_checkpoint,
    random_scene,
)
from helpers import ENCODER, write_geotiff

from common.nodata import nodata_pixels
from common.rasters import Source, as_dtype, open_raster
from exporting.export import trial_images
from exporting.graph import InvalidPixels, ProbabilityGraph, limits
from model_training import Normalization, normalize
from prediction.predictor import Predictor

CPU = torch.device("cpu")


def predicted(checkpoints, scene) -> torch.Tensor:
    """The probabilities that prediction gives for a scene of one window."""
    with open_raster(scene) as dataset:
        image, valid = Source(dataset).read()
    images = torch.from_numpy(image.astype(np.float32))[None]
    return Predictor(checkpoints, CPU)(images, torch.from_numpy(valid)[None])


def exported(checkpoints, scene) -> torch.Tensor:
    """What the graph makes of the scene's own values."""
    with open_raster(scene) as dataset:
        values = torch.from_numpy(dataset.read().astype(np.float32))
    with torch.inference_mode():
        return ProbabilityGraph(checkpoints)(values[None])


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize(
    ("kind", "nodata", "where"),
    [
        ("uint16", 65535, "one band"),
        ("uint16", 0, "all bands"),
        ("uint16", 0, "one band"),
        ("int16", -9999, "one band"),
        ("float32", np.nan, "one band"),
        ("float32", -9999, "one band"),
        ("float32", np.finfo(np.float32).min, "one band"),
        ("uint16", None, "one band"),
    ],
)
def test_pixels_without_data_are_those_of_prediction(
    tmp_path, outputs, kind, nodata, where
):
    declared = None if nodata is None else [float(nodata)] * BANDS
    checkpoints = [
        make_checkpoint(
            "linknet", outputs, encoder=ENCODER, nodata=declared, data_type=kind
        )
    ]
    pixels = random_scene().astype(kind)
    pixels[:, 20:, 5] = 0  # data, unless 0 is declared
    bands = slice(None) if where == "all bands" else slice(1)
    if nodata is not None:
        pixels[bands, 4:12, 8:20] = nodata
    if kind == "float32":
        pixels[2, 25, 3:9] = np.inf
    scene = write_geotiff(tmp_path / "scene.tif", pixels, nodata=nodata)
    expected, found = predicted(checkpoints, scene), exported(checkpoints, scene)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
    assert found.shape[1] == outputs
    assert found.std() > 0.05, "the comparison means nothing"


def test_older_checkpoints_know_no_nodata_but_nan():
    (rule,) = ProbabilityGraph([make_checkpoint()]).rules
    values = torch.full((1, BANDS, 1, 4), 65535.0)
    values[0, 1, 0, 2], values[0, 2, 0, 3] = torch.nan, -torch.inf
    assert rule(values).flatten().tolist() == [False, False, True, True]


@pytest.mark.parametrize("value", [-9999.0, 0.0])
def test_patches_of_several_types_have_their_nodata_too(tmp_path, value):
    checkpoints = [make_checkpoint(nodata=[value] * BANDS, data_type=None)]
    pixels = random_scene().astype("int16")
    pixels[:, 4:12, 8:20] = value
    pixels[1, 20:25, 8:20] = value  # data where it is 0
    scene = write_geotiff(tmp_path / "scene.tif", pixels, nodata=value)
    expected, found = predicted(checkpoints, scene), exported(checkpoints, scene)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)


def test_bands_may_declare_values_of_their_own():
    values = [0, None, 65535]
    declared = [as_dtype(value, np.dtype("uint16")) for value in values]
    pixels = np.array(list(np.ndindex(2, 2, 2)), np.uint16).T[:, None] * 65535
    expected = nodata_pixels(pixels, declared)
    found = InvalidPixels(declared)(torch.from_numpy(pixels.astype(np.float32))[None])
    assert found[0, 0].numpy().tolist() == expected.tolist()
    assert 0 < expected.sum() < expected.size


def test_a_mean_of_models_is_that_of_prediction(tmp_path):
    checkpoints = [
        make_checkpoint(seed=seed, temperature=seed / 4 + 0.3) for seed in range(3)
    ]
    scene = write_geotiff(tmp_path / "scene.tif", random_scene())
    expected, found = predicted(checkpoints, scene), exported(checkpoints, scene)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
    assert (found - exported(checkpoints[:1], scene)).abs().max() > 0.01


def test_nodata_of_any_model_makes_a_pixel_invalid_for_all():
    graph = ProbabilityGraph(
        [
            make_checkpoint(nodata=[value] * BANDS, data_type="int16")
            for value in (-1.0, -9999.0)
        ]
    )
    assert len(graph.rules) == 2
    values = torch.tensor([-1.0, -9999.0, 5000.0]).expand(1, BANDS, 1, 3)
    with torch.inference_mode():
        a, b, c = graph(values).unbind(-1)
    torch.testing.assert_close(a, b)
    assert (a - c).abs().max() > 0.01


def test_scaling_is_that_of_normalize():
    rule = Normalization("dataset", LOW, HIGH)
    values = torch.from_numpy(random_scene().astype(np.float32))
    low, span = limits(rule)
    assert torch.equal(
        ((values - low) / span).clamp(0, 1), normalize(values, None, rule)
    )


def test_trial_images_reach_beyond_the_percentiles_and_have_invalid_pixels():
    images = trial_images(make_checkpoint(), SIDE)
    first = images[1, 0]
    assert first.min() < LOW[0] and first.max() > HIGH[0]
    assert images.isnan().any() and images.isinf().any()
