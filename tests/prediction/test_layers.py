"""From probabilities to the layers of a map."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from prediction_helpers import configure

from common.errors import SegmentationError
from prediction.layers import (
    classify,
    compute_layers,
    list_layers,
    map_nodata,
    mask_layers,
)
from prediction.statistics import confidence_counts


def classes_and_confidence(probabilities, threshold=0.5):
    return [one.numpy() for one in classify(torch.as_tensor(probabilities), threshold)]


def test_the_threshold_itself_is_foreground():
    foreground = np.array([[[0.0, 0.29, 0.3, 0.31, 0.9]]], np.float32)
    classes, confidence = classes_and_confidence(foreground, 0.3)
    assert classes.dtype == np.uint8 and confidence.dtype == np.float32
    assert classes.tolist() == [[0, 0, 1, 1, 1]]
    np.testing.assert_allclose(confidence, [[1, 0.71, 0.3, 0.31, 0.9]], rtol=1e-6)


def test_the_likeliest_class_wins_and_its_probability_is_the_confidence():
    probabilities = np.array([[[0.2, 0.5]], [[0.7, 0.1]], [[0.1, 0.4]]], np.float32)
    classes, confidence = classes_and_confidence(probabilities, 0.9)
    assert classes.tolist() == [[1, 0]]
    np.testing.assert_allclose(confidence, [[0.7, 0.5]], rtol=1e-6)


def test_the_first_of_classes_that_are_as_likely_wins():
    rng = np.random.default_rng(0)
    probabilities = rng.integers(0, 3, (5, 40, 40)).astype(np.float32) / 2
    before = probabilities.copy()
    classes, confidence = classes_and_confidence(probabilities)
    np.testing.assert_array_equal(classes, probabilities.argmax(axis=0))
    np.testing.assert_array_equal(confidence, probabilities.max(axis=0))
    np.testing.assert_array_equal(probabilities, before)


def layers_of(names, models=1, **wanted):
    return list_layers(configure(**wanted), names, models)


@pytest.mark.parametrize("channels", [1, 3])
def test_invalid_pixels_are_nodata_in_every_layer(channels):
    names = ["a", "b", "c"][: max(2, channels)]
    wanted = ("save_confidence", "save_uncertainty", "save_probabilities")
    layers = layers_of(names, 2, **dict.fromkeys(wanted, True))
    blended = torch.full((channels + 1, 1, 2), 0.9)
    tensors = compute_layers(blended, layers, channels, 0.5)
    arrays = mask_layers(tensors, np.array([[True, False]]), layers)
    assert set(arrays) == set(layers) and "confidence" in layers
    for name, layer in layers.items():
        array = arrays[name]
        assert array.dtype == layer.dtype and array.shape == (len(layer.bands), 1, 2)
        assert (array[..., 1] == layer.nodata).all()
        assert (array[..., 0] != layer.nodata).all()
    assert arrays["confidence"][0, 0, 0] == np.float32(0.9)


def test_probabilities_that_are_not_numbers_make_no_map():
    tensors = compute_layers(torch.full((2, 1, 2), torch.nan), {}, 2, 0.5)
    both = tensors["classes"][0], tensors["confidence"][0]
    confidence_counts(*both, np.zeros((1, 2), bool), 2)  # none is seen
    with pytest.raises(SegmentationError, match="not numbers"):
        confidence_counts(*both, np.array([[False, True]]), 2)
    with pytest.raises(SegmentationError, match="not numbers"):
        confidence_counts(*both, np.ones((1, 2), bool), 2)


def test_confidence_never_passes_one():
    above = np.nextafter(np.float32(1), np.float32(2))
    for channels in (1, 2):
        probabilities = np.full((channels, 1, 1), above)
        classes, confidence = classes_and_confidence(probabilities)
        assert classes.item() == 2 - channels and confidence.item() == 1


@pytest.mark.parametrize(
    ("classes", "nodata", "dtype"),
    [
        (2, 255, "uint8"),
        (255, 255, "uint8"),
        (256, 65535, "uint16"),
        (300, 65535, "uint16"),
    ],
)
def test_past_255_classes_a_map_has_sixteen_bits(classes, nodata, dtype):
    assert map_nodata(classes) == nodata
    layers = layers_of([f"class {number}" for number in range(classes)])
    probabilities = torch.zeros(classes, 1, 2)
    probabilities[-1] = 1
    tensors = compute_layers(probabilities, layers, classes, 0.5)
    found = mask_layers(tensors, np.array([[True, False]]), layers)
    found = found["classes"]
    assert found.dtype == dtype and found.tolist() == [[[classes - 1, nodata]]]
