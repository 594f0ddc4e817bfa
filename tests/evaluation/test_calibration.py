"""Calibration, the temperature, and the pixels that it is fitted on."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from evaluation_helpers import logits_and_truth
from helpers import drawn_pixels
from scipy import stats
from sklearn import metrics as reference
from sklearn.calibration import calibration_curve

from evaluation.calibration import (
    TEMPERATURES,
    Calibration,
    fit_temperature,
    negative_log_likelihood,
)
from evaluation.reliability import expected_calibration_error
from model_training import class_probabilities, predict_classes


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


# --- calibration ----------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_bins_agree_with_scikit_learn(classes):
    rng = np.random.default_rng(classes)
    logits, truth = logits_and_truth(rng, classes=classes, temperature=2)
    calibration = Calibration()
    for part in np.array_split(np.arange(len(truth)), 7):  # batches
        calibration.add(logits[part], truth[part])
    probabilities = class_probabilities(torch.from_numpy(logits)).numpy()
    if classes == 1:
        probabilities = np.hstack([1 - probabilities, probabilities])
    confidence = probabilities.max(1).clip(max=1)
    hits = probabilities.argmax(1) == truth
    accuracy, mean = calibration_curve(hits, confidence, n_bins=Calibration.BINS)
    report = calibration.report()
    filled = np.array(report["pixels"]) > 0
    assert np.array(report["accuracy"])[filled].tolist() == pytest.approx(accuracy)
    assert np.array(report["confidence"])[filled].tolist() == pytest.approx(mean)
    weights = np.array(report["pixels"])[filled] / len(truth)
    error = expected_calibration_error(calibration)
    assert error == pytest.approx((weights * abs(accuracy - mean)).sum())
    assert report["expected_calibration_error"] == error
    json.dumps(report, allow_nan=False)


def test_calibration_of_two_pixels_by_hand():
    calibration = Calibration()
    nine, six = math.log(9), math.log(1.5)  # foreground probabilities 0.9 and 0.6
    calibration.add(np.float32([[nine], [six], [-nine]]), np.array([1, 0, 255]))
    assert calibration.pixels.sum() == 2 and calibration.hits.sum() == 1
    assert expected_calibration_error(calibration) == pytest.approx(0.35)


def test_calibration_of_maps_leaves_out_what_is_unlabelled():
    rng = np.random.default_rng(3)
    logits = torch.from_numpy(rng.normal(0, 2, (2, 3, 8, 8)))
    mask = torch.from_numpy(rng.choice([0, 1, 2, 255, -1], (2, 8, 8)))
    maps, pixels = Calibration(), Calibration()
    maps.add(logits, mask)
    known = (mask >= 0) & (mask < 3)
    pixels.add(logits.movedim(1, -1)[known], mask[known])
    assert maps.report() == pixels.report()
    assert maps.pixels.sum() == known.sum()


def test_calibration_without_pixels_is_none():
    report = Calibration().report()
    assert report["expected_calibration_error"] is None
    assert set(report["accuracy"]) == {None}


# --- temperature ----------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [1, 3, 8])
@pytest.mark.parametrize("factor", [0.4, 2.5])
def test_temperature_finds_the_factor_that_logits_were_multiplied_by(classes, factor):
    rng = np.random.default_rng(classes)
    logits, truth = logits_and_truth(rng, 40_000, classes, factor)
    temperature = fit_temperature(logits, truth)
    assert temperature == pytest.approx(factor, rel=0.05)
    before, after = Calibration(), Calibration()
    before.add(logits, truth)
    after.add(logits, truth, temperature)
    error = expected_calibration_error(after)
    assert error < 0.012 < expected_calibration_error(before)
    assert after.hits.sum() == before.hits.sum()  # the classes stay


@pytest.mark.parametrize("classes", [1, 5])
def test_temperature_is_where_the_slope_of_the_loss_is_zero(classes):
    rng = np.random.default_rng(9)
    logits, truth = logits_and_truth(rng, 5_000, classes, 3)
    temperature = torch.tensor(fit_temperature(logits, truth), requires_grad=True)
    scaled = torch.from_numpy(logits).double() / temperature
    if classes == 1:
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            scaled[:, 0], torch.from_numpy(truth).double()
        )
    else:
        loss = torch.nn.functional.cross_entropy(scaled, torch.from_numpy(truth))
    loss.backward()
    assert abs(temperature.grad.item()) < 1e-5


@pytest.mark.parametrize("classes", [1, 4])
def test_likelihood_agrees_with_scikit_learn(classes):
    logits, truth = logits_and_truth(np.random.default_rng(2), 500, classes)
    probabilities = class_probabilities(torch.from_numpy(logits).double()).numpy()
    if classes == 1:
        probabilities = np.hstack([1 - probabilities, probabilities])
    expected = reference.log_loss(truth, probabilities, labels=range(max(2, classes)))
    found = negative_log_likelihood(logits, truth)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("temperature", [0.05, 0.7, 20.0])
@pytest.mark.parametrize("classes", [1, 4])
def test_temperature_changes_no_class(classes, temperature):
    rng = np.random.default_rng(4)
    logits = torch.from_numpy(rng.normal(0, 5, (2, classes, 32, 32))).float()
    plain = predict_classes(logits)
    assert torch.equal(predict_classes(logits / temperature), plain)


def test_temperature_without_a_better_one_is_one():
    assert fit_temperature(np.empty((0, 3), np.float32), np.empty(0, np.int64)) == 1
    flat = np.zeros((50, 3), np.float32)  # the same at any temperature
    assert fit_temperature(flat, np.arange(50) % 3) == 1
    broken = np.full((50, 3), np.nan, np.float32)
    assert fit_temperature(broken, np.arange(50) % 3) == 1


def test_temperature_stays_within_its_bounds():
    logits = np.float32([[4, 0], [0, 4]] * 10)
    right, wrong = np.array([0, 1] * 10), np.array([1, 0] * 10)
    low, high = TEMPERATURES
    sure = fit_temperature(logits, right)
    assert low <= sure < 0.3  # the loss is zero from there on, in float32
    assert fit_temperature(logits, wrong) == pytest.approx(high, rel=0.01)
    large = logits * 1e4  # no overflow
    assert low <= fit_temperature(large, right) <= high


# --- sampled pixels -------------------------------------------------------------------------


def numbered_batches(count, size=8, classes=2, batch=2):
    """Logits that tell each pixel's number; a quarter of the pixels is unlabelled."""
    numbers = torch.arange(count * size * size).reshape(count, 1, size, size).float()
    shift = 0.25 * torch.arange(classes)[:, None, None]
    logits = numbers.repeat(1, classes, 1, 1) + shift
    mask = (numbers[:, 0] % classes).long()
    mask[numbers[:, 0] % 4 == 3] = 255
    return list(zip(logits.split(batch), mask.split(batch)))


def test_a_sample_larger_than_the_data_is_all_labelled_pixels():
    batches = numbered_batches(5, classes=3)
    logits, target = drawn_pixels(batches)
    expected = np.arange(320)[np.arange(320) % 4 != 3]
    assert logits[:, 0].tolist() == expected.tolist()
    assert (logits[:, 2] - logits[:, 0] == 0.5).all()
    assert target.tolist() == (expected % 3).tolist()
    assert logits.dtype == np.float32 and target.dtype == np.int64


def test_a_sample_is_of_the_size_on_average_seeded_and_blind_to_the_batch_size():
    logits, target = drawn_pixels(numbered_batches(60), 1000, seed=1)
    assert abs(len(logits) - 1000) < 4 * math.sqrt(1000 * (1 - 1000 / 2880))
    assert logits.shape == (len(target), 2) and len(set(logits[:, 0])) == len(logits)
    assert (target == logits[:, 0] % 2).all()
    again, _ = drawn_pixels(numbered_batches(60, batch=7), 1000, seed=1)
    assert (again == logits).all()
    other, _ = drawn_pixels(numbered_batches(60), 1000, seed=2)
    assert len(other) != len(logits) or (other != logits).any()


def test_every_labelled_pixel_has_the_same_chance():
    counts = np.zeros(256)
    for seed in range(1500):
        logits, _ = drawn_pixels(numbered_batches(4, batch=1), 48, seed)
        counts[logits[:, 0].astype(int)] += 1
    labelled = np.arange(256) % 4 != 3
    assert counts[~labelled].sum() == 0
    mean = 1500 * 48 / 192
    spread = ((counts[labelled] - mean) ** 2).sum() / (mean * (1 - 48 / 192))
    assert 0.001 < stats.chi2.sf(spread, 192) < 0.999
    for part in np.split(counts[labelled], 4):  # early and late batches alike
        assert part.mean() == pytest.approx(mean, rel=0.03)


def test_samples_of_binary_models_and_of_unlabelled_batches():
    logits = torch.randn(2, 1, 4, 4)
    mask = torch.full((2, 4, 4), 255)
    sampled, target = drawn_pixels([(logits, mask)], 10)
    assert sampled.shape == (0, 1) and len(target) == 0
    mask[0] = 1
    sampled, target = drawn_pixels([(logits, mask)] * 3)
    assert sampled.shape == (48, 1) and target.tolist() == [1] * 48
