"""Measures by numbers: places, gains, and intervals on data whose answer is arithmetic."""

import math

import numpy as np
import pytest

from models import metrics


def test_a_target_outside_the_list_is_missed() -> None:
    assert metrics.rank_of(np.array([7, 3, 5]), 5) == 2
    assert metrics.rank_of(np.array([7, 3, 5]), 4) == metrics.MISSED


def test_equal_scores_are_ordered_by_row() -> None:
    scores = np.array([1.0, 2.0, 1.0, 2.0], np.float32)
    assert [metrics.rank_in(scores, row) for row in range(4)] == [2, 0, 3, 1]


def test_hits_and_gains_of_known_places() -> None:
    ranks = np.array([0, 2, 9, 10, metrics.MISSED])
    np.testing.assert_array_equal(metrics.hit(ranks), [1, 1, 1, 0, 0])
    expected = [1.0, 1 / math.log2(2 + 2), 1 / math.log2(9 + 2), 0.0, 0.0]
    np.testing.assert_allclose(metrics.ndcg(ranks), expected)


def test_the_loss_is_what_the_gains_by_place_leave_of_the_ideal() -> None:
    ideal = metrics.place_gains(2)
    np.testing.assert_allclose(ideal, [1.0, 1 / 2])
    best = 1 / math.log2(2) + (1 / 2) / math.log2(3)
    assert metrics.dcg(ideal) == pytest.approx(best)
    shown = np.array([[1.0, 0.5], [0.5, 1.0], [0.0, 1.0], [0.0, 0.0]])
    expected = [0.0, 1 - (0.5 + 1 / math.log2(3)) / best, 1 - 1 / math.log2(3) / best, 1.0]
    np.testing.assert_allclose(metrics.ndcg_loss(shown, ideal), expected, atol=1e-12)


def test_where_nothing_can_be_gained_nothing_is_lost() -> None:
    assert metrics.ndcg_loss(np.zeros((3, 0)), np.zeros(0)).tolist() == [0.0, 0.0, 0.0]


def test_bins_of_equal_mass_measure_the_gap() -> None:
    p = np.array([0.1, 0.1, 0.6, 0.6])
    label = np.array([0.0, 0.0, 1.0, 0.0])
    expected = (2 * abs(0.1 - 0.0) + 2 * abs(0.6 - 0.5)) / 4
    assert metrics.calibration_error(p, label, bins=2) == pytest.approx(expected)


def test_a_calibrated_probability_has_next_to_no_error() -> None:
    rng = np.random.default_rng(0)
    p = rng.uniform(size=200_000)
    assert metrics.calibration_error(p, (rng.uniform(size=p.size) < p).astype(float)) < 0.01


def test_the_interval_is_over_people_and_not_over_queries() -> None:
    # Two people of 500 queries each, all of one equal: there are 2 observations, not 1,000.
    person = np.repeat([0, 1], 500)
    values = np.repeat([0.0, 1.0], 500)
    estimate = metrics.over_people(person, values)
    assert estimate.value == 0.5
    assert (estimate.low, estimate.high) == (0.0, 1.0)


def test_the_interval_has_the_width_of_the_normal_one() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(size=400)
    estimate = metrics.over_people(np.arange(400), values)
    half = 1.96 * values.std() / math.sqrt(400)
    assert estimate.high - estimate.low == pytest.approx(2 * half, rel=0.1)


def test_the_calibration_interval_holds_the_error_of_shifted_probabilities() -> None:
    rng = np.random.default_rng(2)
    person, p = np.repeat(np.arange(300), 20), rng.uniform(0.1, 0.5, 6_000)
    label = (rng.uniform(size=p.size) < p + 0.1).astype(float)
    estimate = metrics.calibration_over_people(person, p, label)
    assert estimate.low < 0.1 < estimate.high
