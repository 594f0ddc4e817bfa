"""Faults of evaluation in version 1.1 that must not come back, by their numbers."""

from __future__ import annotations

import numpy as np
import pytest

from evaluation.areas import estimate_areas
from evaluation.matrices import block_bootstrap
from model_training import HEADLINES

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
