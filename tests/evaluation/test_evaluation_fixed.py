"""Faults of evaluation in version 1.1 that must not come back, by their numbers."""

from __future__ import annotations

import numpy as np
import pytest

from common.scores import HEADLINES
from evaluation.areas import estimate_areas
from evaluation.matrices import block_bootstrap, fold_statistics, fold_summary
from evaluation.tables import area_table, report_text, with_interval

fault = pytest.mark.fault


def sample_of_patches(labelled: int, unlabelled: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    patches = rng.integers(1, 50, (labelled, 2, 2)) + 100 * np.eye(2, dtype=int)
    empty = np.zeros((unlabelled, 2, 2), int)
    return rng.permutation(np.concatenate([patches, empty]))


@fault(8)
def test_unlabelled_patches_are_no_part_of_the_sample_of_areas():
    patches, mapped = sample_of_patches(5, 95), [700, 300]
    labelled = patches[patches.any(axis=(1, 2))]
    assert estimate_areas(patches, mapped) == estimate_areas(labelled, mapped)


@fault(8)
def test_areas_without_a_labelled_patch_are_unknown():
    found = estimate_areas(np.zeros((3, 2, 2)), [700, 300], 100)
    assert found["overall_accuracy"]["value"] is None
    assert all(entry["share"]["interval_95"] is None for entry in found["per_class"])


@fault(8)
def test_blocks_without_a_label_are_not_drawn():
    patches = sample_of_patches(5, 95)
    labelled = patches[patches.any(axis=(1, 2))]

    def measure(matrix):
        value = np.trace(matrix) / matrix.sum()
        return dict.fromkeys(HEADLINES, value)

    found = block_bootstrap(patches, measure, 3)
    assert found == block_bootstrap(labelled, measure, 3)
    one_labelled = sample_of_patches(1, 9)
    assert set(block_bootstrap(one_labelled, measure, 3).values()) == {None}


@fault(60)
def test_an_interval_over_folds_ends_at_what_is_possible():
    assert fold_statistics([0.2, 0.62, 0.99])["interval_95"][1] == 1
    assert fold_statistics([0.01, 0.2, 0.5])["interval_95"][0] == 0
    results = [dict.fromkeys(HEADLINES, value) for value in (0.01, 0.2, 0.9)]
    summary = fold_summary(results)
    assert summary["f1"]["interval_95"] == [0, 1]
    assert summary["kappa"]["interval_95"][0] < 0


@fault(60)
def test_what_has_no_interval_says_why():
    assert with_interval(0.5, None) == "0.500"
    one_patch = np.array([[[30, 5], [4, 20]]])
    text = area_table(named(estimate_areas(one_patch, [700, 300])))
    assert "[-" not in text and "fewer than two test patches" in text
    several = sample_of_patches(8, 0)
    assert "fewer than" not in area_table(named(estimate_areas(several, [700, 300])))


def named(areas: dict) -> dict:
    for entry in areas["per_class"]:
        entry["name"] = str(entry["class"])
    return areas


@fault(60)
@pytest.mark.parametrize(("blocks", "said"), [(4, True), (10, False), (None, False)])
def test_few_blocks_are_reported(blocks, said):
    values = {"mean": 0.5, "std": 0.1, "interval_95": [0.4, 0.6]}
    report = {"summary": {"iou": values}, "blocks": blocks}
    text = report_text(report)
    assert ("come from 4 blocks only, and are too narrow" in text) == said
    assert ("or of whole scenes or values more" in text) == said
