"""Areas with their errors."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from evaluation.areas import estimate_areas


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


# Olofsson et al. 2014, tables 8 and 9: deforestation, forest gain, stable forest, stable
# non-forest; rows are the map there, and the truth here
SAMPLE = np.array([[66, 0, 5, 4], [0, 55, 8, 12], [1, 0, 153, 11], [2, 1, 9, 313]]).T


MAPPED = np.array([200_000, 150_000, 3_200_000, 6_450_000])  # pixels of 30 m


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
