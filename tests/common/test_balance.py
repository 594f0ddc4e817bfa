"""The criterion of an even draw: known answers."""

from __future__ import annotations

import numpy as np
import pytest

from common.balance import absent_classes, uneven_shares, unit_shares

# four units: patches, then pixels of three classes, of which one does not occur
CONTENT = np.array([[1, 10, 0, 0], [1, 10, 0, 5], [1, 20, 0, 0], [1, 0, 0, 15]])


def test_each_column_of_shares_sums_to_one_and_absent_classes_are_left_out():
    shares = unit_shares(CONTENT)
    assert shares.shape == (4, 3)
    assert np.allclose(shares.sum(axis=0), 1)
    assert shares[1].tolist() == [0.25, 0.25, 0.25]


def test_parts_that_hold_what_they_are_to_hold_cost_nothing():
    shares = np.array([[0.75, 0.75, 0.75], [0.25, 0.25, 0.25]])
    assert uneven_shares(shares, (0.75, 0.25), np.ones(3, bool)) == 0


def test_patches_weigh_as_much_as_all_classes_together():
    shares = np.array([[0.6, 0.5, 0.5], [0.4, 0.5, 0.5]])
    assert uneven_shares(shares, (0.5, 0.5), np.zeros(3, bool)) == pytest.approx(0.4)
    shares = np.array([[0.5, 0.6, 0.5], [0.5, 0.4, 0.5]])
    assert uneven_shares(shares, (0.5, 0.5), np.zeros(3, bool)) == pytest.approx(0.2)


def test_a_part_without_a_class_that_it_must_hold_costs_ten_more():
    shares = np.array([[0.5, 1.0, 0.5], [0.5, 0.0, 0.5]])
    assert uneven_shares(shares, (0.5, 0.5), np.zeros(3, bool)) == pytest.approx(1)
    required = np.array([True, True, False])
    assert uneven_shares(shares, (0.5, 0.5), required) == pytest.approx(11)
    only_first = np.stack([required, np.zeros(3, bool)])
    assert uneven_shares(shares, (0.5, 0.5), only_first) == pytest.approx(1)


def test_patches_without_a_label_are_shared_by_their_number():
    shares = unit_shares(np.array([[1, 0], [3, 0]]))
    assert shares.tolist() == [[0.25], [0.75]]
    assert uneven_shares(shares, (0.5, 0.5), np.ones(1, bool)) == pytest.approx(0.5)


def test_absent_classes_whose_names_hold_a_comma_are_told_apart():
    names = ["barley, spring", "oats", "rye"]
    line = absent_classes("test", names, [0, 0, 5])
    assert '2 of 3 classes without a test pixel ("barley, spring", oats)' in line
