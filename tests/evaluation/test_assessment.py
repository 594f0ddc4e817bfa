"""Areas with their errors, calibration and the pictures of good and bad patches."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from helpers import SENTINEL, drawn_pixels, patch_everywhere
from matplotlib.figure import Figure
from scipy import stats
from sklearn import metrics as reference
from sklearn.calibration import calibration_curve

from common.patches import PatchPair, list_pairs, read_patch
from common.pictures import class_colours, draw_panels
from evaluation.areas import estimate_areas
from evaluation.calibration import (
    TEMPERATURES,
    Calibration,
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihood,
)
from evaluation.examples import Examples, draw_examples, patch_accuracy, worth_showing
from evaluation.reports import plot_reliability
from evaluation.tables import score_table
from model_training import class_probabilities, predict_classes, scores

# Olofsson et al. 2014, tables 8 and 9: deforestation, forest gain, stable forest, stable
# non-forest; rows are the map there, and the truth here
SAMPLE = np.array([[66, 0, 5, 4], [0, 55, 8, 12], [1, 0, 153, 11], [2, 1, 9, 313]]).T
MAPPED = np.array([200_000, 150_000, 3_200_000, 6_450_000])  # pixels of 30 m


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def logits_and_truth(rng, count=20_000, classes=4, temperature=1.0):
    """Logits of a model that is too sure of itself by a known factor, and the truth."""
    honest = rng.normal(0, 2, (count, classes))
    if classes == 1:
        truth = rng.random(count) < 1 / (1 + np.exp(-honest[:, 0]))
    else:
        truth = (honest + rng.gumbel(size=honest.shape)).argmax(1)
    return (honest * temperature).astype(np.float32), truth.astype(np.int64)


def column(result, measure, key="value"):
    return [entry[measure][key] for entry in result["per_class"]]


def half_widths(result, measure):
    return 1.96 * np.array(column(result, measure, "standard_error"))


# --- areas ----------------------------------------------------------------------------------


def test_the_example_of_the_paper_comes_out():
    result = estimate_areas(SAMPLE, MAPPED, pixel_area=900)
    hectares = [21_158, 11_686, 285_770, 581_386]
    assert column(result, "area_ha") == pytest.approx(hectares, abs=0.5)
    widths = [6_158, 3_756, 15_510, 16_282]
    assert half_widths(result, "area_ha") == pytest.approx(widths, abs=0.5)
    assert column(result, "share") == pytest.approx(
        [0.0235, 0.0130, 0.3175, 0.6460], abs=5e-5
    )
    users, producers = [0.88, 0.73, 0.93, 0.96], [0.75, 0.85, 0.93, 0.96]
    assert column(result, "users_accuracy") == pytest.approx(users, abs=0.005)
    assert column(result, "producers_accuracy") == pytest.approx(producers, abs=0.005)
    assert half_widths(result, "users_accuracy") == pytest.approx(
        [0.07, 0.10, 0.04, 0.02], abs=0.005
    )
    # the paper prints 0.21, 0.23, 0.03 and 0.01; its own equation 7 gives 0.254 and 0.018
    assert half_widths(result, "producers_accuracy") == pytest.approx(
        [0.213, 0.254, 0.034, 0.018], abs=0.0006
    )
    overall = result["overall_accuracy"]
    assert overall["value"] == pytest.approx(0.9465, abs=5e-5)
    assert 1.96 * overall["standard_error"] == pytest.approx(0.0185, abs=5e-5)
    # 68,418 pixels are 1.96 errors of 34,907, which the paper prints as 34,097
    assert 1e7 * column(result, "share", "standard_error")[0] == pytest.approx(
        34_907, 1e-4
    )
    assert [entry["mapped_ha"] for entry in result["per_class"]] == [
        18_000, 13_500, 288_000, 580_500
    ]  # fmt: skip
    low, high = result["per_class"][0]["area_ha"]["interval_95"]
    assert (low, high) == pytest.approx((15_000, 27_315), abs=1)


def test_errors_are_those_of_redrawn_samples():
    rng = np.random.default_rng(0)
    # large, since the producer's accuracy is a ratio, and biased when small
    sample = 10 * SAMPLE
    rates, sampled = SAMPLE / SAMPLE.sum(axis=0), sample.sum(axis=0)
    drawn = []
    for _ in range(600):
        rows = [rng.multinomial(n, p) for n, p in zip(sampled, rates.T)]
        drawn.append(estimate_areas(np.array(rows).T, MAPPED))
    expected = estimate_areas(sample, MAPPED)
    for measure in ("share", "users_accuracy", "producers_accuracy"):
        values = np.array([column(one, measure) for one in drawn])
        errors = column(expected, measure, "standard_error")
        assert values.std(axis=0) == pytest.approx(errors, rel=0.12)
        assert values.mean(axis=0) == pytest.approx(column(expected, measure), rel=0.01)
    overall = [one["overall_accuracy"]["value"] for one in drawn]
    error = expected["overall_accuracy"]["standard_error"]
    assert np.std(overall) == pytest.approx(error, rel=0.12)


def test_a_sample_in_proportion_to_the_map_has_the_plain_accuracies():
    result = estimate_areas(SAMPLE, SAMPLE.sum(axis=0))
    hits = np.diag(SAMPLE)
    assert column(result, "users_accuracy") == pytest.approx(hits / SAMPLE.sum(axis=0))
    assert column(result, "producers_accuracy") == pytest.approx(
        hits / SAMPLE.sum(axis=1)
    )
    assert result["overall_accuracy"]["value"] == pytest.approx(hits.sum() / 640)
    assert column(result, "share") == pytest.approx(SAMPLE.sum(axis=1) / 640)
    assert "area_ha" not in result["per_class"][0]  # no area of a pixel


def test_a_perfect_map_keeps_its_areas_without_error():
    result = estimate_areas(np.diag([50, 60]), [300, 100], pixel_area=1e4)
    assert column(result, "area_ha") == [300, 100]
    assert column(result, "area_ha", "interval_95") == [[300, 300], [100, 100]]
    assert result["overall_accuracy"]["interval_95"] == [1, 1]


def test_areas_sum_to_the_map_and_scale_with_the_pixel():
    rng = np.random.default_rng(1)
    matrix, mapped = rng.integers(0, 90, (5, 5)), rng.integers(1, 10_000, 5)
    result = estimate_areas(matrix, mapped, pixel_area=100)
    assert sum(column(result, "area_ha")) == pytest.approx(mapped.sum() / 100)
    in_metres = estimate_areas(matrix, mapped * 100.0, pixel_area=1)
    assert column(in_metres, "area_ha") == pytest.approx(column(result, "area_ha"))


def test_a_class_that_the_map_lacks_has_the_area_that_others_hide():
    matrix = np.array([[90, 0, 0], [10, 100, 0], [0, 0, 0]])
    result = estimate_areas(matrix, [1000, 0, 0], pixel_area=1e4)
    first, hidden, nowhere = result["per_class"]
    assert first["area_ha"]["value"] == pytest.approx(900)
    assert hidden["area_ha"]["value"] == pytest.approx(100)
    assert hidden["area_ha"]["standard_error"] > 0
    assert hidden["producers_accuracy"]["value"] == 0
    assert hidden["users_accuracy"]["value"] == 1  # where the sample's map has it
    assert nowhere["area_ha"]["value"] == 0
    assert nowhere["users_accuracy"]["value"] is None
    assert nowhere["producers_accuracy"]["value"] is None
    assert result["assessed_share"] == 1


def test_a_mapped_class_without_sample_is_left_out_and_said():
    matrix = np.array([[90, 5, 0], [10, 95, 0], [1, 0, 0]])
    result = estimate_areas(matrix, [500, 400, 100], pixel_area=1e4)
    assert result["assessed_share"] == pytest.approx(0.9)
    unknown = result["per_class"][2]
    assert unknown["mapped_ha"] == 100
    for measure in ("share", "area_ha", "users_accuracy", "producers_accuracy"):
        assert set(unknown[measure].values()) == {None}
    alone = estimate_areas(matrix, [500, 400, 0], pixel_area=1e4)
    for measure in ("area_ha", "users_accuracy", "producers_accuracy"):
        for key in ("value", "standard_error"):
            assert column(result, measure, key)[:2] == column(alone, measure, key)[:2]


def test_a_single_sample_gives_values_without_errors():
    result = estimate_areas([[1, 2], [0, 8]], [10, 90])
    assert column(result, "users_accuracy") == [1, 0.8]
    assert column(result, "users_accuracy", "interval_95")[0] is None
    assert column(result, "users_accuracy", "standard_error")[1] > 0
    assert column(result, "share") == pytest.approx([0.28, 0.72])
    assert column(result, "share", "standard_error") == [None, None]
    assert result["overall_accuracy"]["interval_95"] is None


@pytest.mark.parametrize("matrix", [np.zeros((3, 3)), np.eye(3), SAMPLE[:3, :3]])
@pytest.mark.parametrize("mapped", [[0, 0, 0], [5, 0, 0], [1, 2, 3]])
def test_what_is_undefined_is_none_and_never_nan(matrix, mapped):
    result = estimate_areas(matrix, mapped, pixel_area=900)
    json.dumps(result, allow_nan=False)
    result = estimate_areas(np.stack([matrix] * 3), mapped, pixel_area=900)
    json.dumps(result, allow_nan=False)


def test_intervals_end_at_what_is_possible():
    result = estimate_areas([[9, 1], [1, 2]], [97, 3], pixel_area=1e4)
    low, high = result["per_class"][1]["area_ha"]["interval_95"]
    assert low == 0 and high < 100
    assert result["overall_accuracy"]["interval_95"][1] == 1


def patch_matrices(rng, patches, classes=3, size=400):
    """Counts of patches that differ in their classes and in how well they are mapped."""
    truth = rng.dirichlet(np.ones(classes), patches)
    skill = rng.beta(4, 1, (patches, 1, 1))
    rates = skill * np.eye(classes) + (1 - skill) / classes
    shares = truth[:, :, None] * rates
    return np.stack([rng.multinomial(size, s.ravel()) for s in shares]).reshape(
        patches, classes, classes
    )


def test_matrices_of_single_pixels_give_the_errors_of_the_paper():
    cells = np.argwhere(np.ones((4, 4)))
    pixels = np.zeros((SAMPLE.sum(), 4, 4))
    row, column_of = np.repeat(cells, SAMPLE.ravel(), axis=0).T
    pixels[np.arange(len(pixels)), row, column_of] = 1
    result, expected = (estimate_areas(m, MAPPED, 900) for m in (pixels, SAMPLE))
    for measure in ("share", "area_ha", "users_accuracy", "producers_accuracy"):
        assert column(result, measure) == pytest.approx(column(expected, measure))
        errors = column(expected, measure, "standard_error")
        assert column(result, measure, "standard_error") == pytest.approx(errors, 0.01)


def test_errors_of_patches_are_those_of_redrawn_patches():
    rng, mapped = np.random.default_rng(0), [500, 300, 200]
    results = [estimate_areas(patch_matrices(rng, 60), mapped) for _ in range(400)]
    for measure in ("share", "users_accuracy", "producers_accuracy"):
        values = np.array([column(one, measure) for one in results])
        errors = [column(one, measure, "standard_error") for one in results]
        spread = values.std(axis=0)
        assert np.mean(errors, axis=0) == pytest.approx(spread, rel=0.15)
    overall = [one["overall_accuracy"] for one in results]
    errors = [one["standard_error"] for one in overall]
    spread = np.std([one["value"] for one in overall])
    assert np.mean(errors) == pytest.approx(spread, rel=0.15)
    true_value = np.mean([one["value"] for one in overall])
    inside = [low <= true_value <= high for low, high in
              (one["interval_95"] for one in overall)]  # fmt: skip
    assert np.mean(inside) == pytest.approx(0.95, abs=0.03)


def test_errors_of_patches_agree_with_the_jackknife():
    rng, mapped = np.random.default_rng(5), [500, 300, 200]
    patches = patch_matrices(rng, 100)
    result, whole = estimate_areas(patches, mapped), patches.sum(axis=0)
    without = [estimate_areas(whole - patch, mapped) for patch in patches]
    for measure in ("share", "users_accuracy", "producers_accuracy"):
        values = np.array([column(one, measure) for one in without])
        errors = np.sqrt(99 / 100 * ((values - values.mean(axis=0)) ** 2).sum(axis=0))
        assert column(result, measure, "standard_error") == pytest.approx(errors, 0.05)


def test_a_class_in_a_single_patch_leaves_errors_unknown():
    patches = np.array([np.diag([5, 3]), np.diag([5, 0])])
    result = estimate_areas(patches, [10, 10])
    assert column(result, "users_accuracy", "standard_error") == [0, None]
    assert column(result, "share", "standard_error") == [None, None]
    lone = estimate_areas(patches[:1], [10, 10])
    assert lone["overall_accuracy"]["value"] == 1
    assert lone["overall_accuracy"]["interval_95"] is None


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


# --- examples -------------------------------------------------------------------------------


def test_accuracy_of_a_patch_counts_labelled_pixels_alone():
    prediction, mask = np.array([[0, 1], [1, 1]]), np.array([[0, 0], [1, 255]])
    assert patch_accuracy(prediction, mask, 2) == pytest.approx(2 / 3)
    assert patch_accuracy(prediction, np.full((2, 2), 255), 2) is None


def test_patches_with_few_labels_are_no_examples():
    counts = np.array([[100, 0], [40, 50], [3, 0], [0, 0], [0, 60]])
    assert worth_showing(counts).tolist() == [True, True, False, False, True]
    assert not worth_showing(np.zeros((2, 2))).any()


@pytest.mark.parametrize("count", [0, 1, 5, 6, 7, 40])
def test_examples_are_the_worst_and_the_best_each_once(count):
    values = np.random.default_rng(count).permutation(count) / 100
    examples = Examples(3)
    for value in values:
        examples.add(float(value), PatchPair(value, value), np.zeros((2, 2)))
    examples.add(None, None, None)
    ranked = sorted(values)
    expected = ranked if count <= 6 else ranked[:3] + ranked[-3:]
    assert [entry[0] for entry in examples.entries] == expected
    assert examples.seen == count


def test_examples_keep_copies_of_predictions():
    batch = np.zeros((4, 8, 8))
    examples = Examples()
    examples.add(0.5, None, batch[1])
    assert examples.entries[0][2].base is None


def pictures(target, make_dataset, monkeypatch, patches, classes):
    """The panels that ``draw_examples`` draws of as many patches, the first all right."""
    root = make_dataset(
        0, 0, patches, classes=classes, unlabelled_rows=4, descriptions=SENTINEL
    )
    examples, drawn = Examples(3), []
    for number, pair in enumerate(list_pairs(root, "test")):
        _, _, mask = read_patch(pair)
        prediction = np.where(mask == 255, 0, mask)
        prediction[:number] = (prediction[:number] + 1) % classes
        score = patch_accuracy(prediction, mask, classes)
        examples.add(score, pair, prediction)
    real = draw_panels

    def spy(panels, legend, title, columns):
        drawn.append((panels, legend, title, columns))
        return real(panels, legend, title, columns)

    patch_everywhere(monkeypatch, "common.pictures.draw_panels", spy)
    names = [f"class {k}" for k in range(classes)]
    draw_examples(target, examples, names)
    return drawn


@pytest.mark.parametrize("classes", [2, 4])
def test_drawn_examples_show_right_wrong_and_unlabelled(
    tmp_path, make_dataset, monkeypatch, classes
):
    target = tmp_path / "examples.png"
    ((panels, legend, title, columns),) = pictures(
        target, make_dataset, monkeypatch, 8, classes
    )
    assert target.stat().st_size > 10_000
    assert columns == 4 and len(panels) == 24
    assert "3 worst" in title and "8 patches" in title
    assert [name for name, _ in legend] == [f"class {k}" for k in range(classes)]
    titles = [panel["title"] for panel in panels]
    numbers = [7, 6, 5, 2, 1, 0]  # patches by their wrong rows
    assert titles[::4] == [f"patch_{number:03}" for number in numbers]
    assert titles[3::4] == [f"{n / 28:.1%} wrong (red)" for n in numbers]
    worst = panels[3]["picture"]
    grey, red = class_colours(2)
    assert (worst[:7] == red).all() and (worst[7:28] == grey).all()
    assert (worst[28:] == 255).all()  # unlabelled
    truth = panels[1]["picture"]
    assert (truth[28:] == 255).all() and (truth[:28] != 255).any(axis=-1).all()


def test_few_patches_are_drawn_once_each(tmp_path, make_dataset, monkeypatch):
    target = tmp_path / "examples.png"
    ((panels, _, title, _),) = pictures(target, make_dataset, monkeypatch, 2, 3)
    assert [panel["title"] for panel in panels[::4]] == ["patch_001", "patch_000"]
    assert "all patches" in title


def test_no_example_draws_nothing(tmp_path):
    draw_examples(tmp_path / "examples.png", Examples(), ["a", "b"])
    assert not list(tmp_path.iterdir())


# --- text and figures -----------------------------------------------------------------------


def test_score_table_is_aligned_and_names_the_accuracies():
    names = ["water", "a rather long name of a class"]
    result = scores(np.array([[1_234_567, 30], [200, 10]]), names, binary=True)
    lines = score_table(result).splitlines()
    assert len({len(line) for line in lines[:4]}) == 1
    heads = ["pixels", "user's acc.", "producer's acc.", "F1", "IoU"]
    places = [lines[0].index(head) + len(head) for head in heads]
    assert [place for place in places if lines[1][place - 1] == " "] == []
    assert lines[1].split() == ["water", "1,234,597", *["1.000"] * 4]
    assert lines[2].split()[-5:] == ["210", "0.250", "0.048", "0.080", "0.042"]
    assert lines[4] == "overall accuracy 1.000, kappa 0.080"


def test_score_table_shows_absent_classes_as_dashes():
    result = scores(np.diag([5, 0]), ["a", "b"], binary=False)
    lines = score_table(result).splitlines()
    assert lines[2].split() == ["b", "0", "-", "-", "-", "-"]
    assert lines[4] == "overall accuracy 1.000, kappa -"


def test_reliability_is_drawn_before_and_after(tmp_path):
    logits, truth = logits_and_truth(np.random.default_rng(0), 5_000, 4, 3)
    curves = {}
    for name, temperature in (("before", 1), ("after", 3)):
        calibration = Calibration()
        calibration.add(logits, truth, temperature)
        curves[name] = calibration.report()
    axes = Figure().subplots()
    plot_reliability(axes, curves | {"none": Calibration().report()})
    _, labels = axes.get_legend_handles_labels()
    assert len(labels) == 3 and labels[1].startswith("before: ECE 0.1")
    assert axes.lines[2].get_xdata()[-1] == curves["after"]["confidence"][-1]
    axes.figure.savefig(tmp_path / "reliability.png")
