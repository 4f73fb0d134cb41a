"""Carried scores on the scale of their request: a line by least squares, shrunk to the calibration."""

import numpy as np
import pytest

from app.control.carrying import LEAST_SLOPE, PRIOR_ROWS, to_request_scale


def scores(*values: float):
    return np.array(values, np.float32)


def test_with_nothing_fresh_carried_scores_stay_as_they_are():
    carried = scores(0.3, 0.1, 0.7)
    np.testing.assert_array_equal(to_request_scale(carried, carried, np.zeros(3, bool)), carried)


def test_one_fresh_row_shifts_the_others_by_its_share_of_the_evidence():
    shifted = to_request_scale(scores(1, 2, 3), scores(4, 0, 0), np.array([True, False, False]))
    assert shifted[1:] == pytest.approx(np.array([2, 3]) + (4 - 1) / (1 + PRIOR_ROWS))


def test_two_fresh_rows_give_the_line_that_is_least_squares_with_the_prior():
    carried, fresh = scores(1, 3, 2, 4), scores(2, 6, 0, 0)  # fresh - carried: 1 and 3, about their mean carried, 2
    line = to_request_scale(carried, fresh, np.array([True, True, False, False]))
    variance = np.var([1, 3, 2, 4])
    slope = ((1 - 2) * 1 + (3 - 2) * 3) / ((1 - 2) ** 2 + (3 - 2) ** 2 + PRIOR_ROWS * variance)
    shift = (1 + 3) / (2 + PRIOR_ROWS)
    assert line == pytest.approx(np.array([1, 3, 2, 4]) + shift + slope * (np.array([1, 3, 2, 4]) - 2))


def test_with_many_fresh_rows_the_requests_own_line_is_found():
    carried = np.linspace(-1, 1, 4_000).astype(np.float32)
    is_fresh = np.arange(4_000) % 2 == 0
    np.testing.assert_allclose(to_request_scale(carried, 5 + 2 * carried, is_fresh), 5 + 2 * carried, atol=0.01)


def test_carried_scores_keep_their_order_even_where_the_fresh_fall():
    carried = scores(0, 1, 2, 3, 4, 5)
    line = to_request_scale(carried, -50 * carried, np.array([True, True, True, True, False, False]))
    assert np.diff(line) == pytest.approx(LEAST_SLOPE, rel=1e-3)


def test_scores_that_are_no_numbers_say_nothing_and_stay_so():
    carried, fresh = scores(1, 2, np.nan, 4), scores(np.nan, 5, 9, 0)
    line = to_request_scale(carried, fresh, np.array([True, True, True, False]))
    assert line[3] == pytest.approx(4 + (5 - 2) / (1 + PRIOR_ROWS))
    assert np.isnan(line[2])


def test_variants_are_independent_rows():
    rng = np.random.default_rng(0)
    carried, fresh = rng.normal(size=(2, 30)).astype(np.float32)
    masks = rng.random((5, 30)) < 0.4
    alone = [to_request_scale(carried, fresh, mask) for mask in masks]
    np.testing.assert_allclose(to_request_scale(carried, fresh, masks), alone, rtol=1e-6)


@pytest.mark.parametrize("n", [0, 1])
def test_no_candidate_and_a_single_one_are_carried_too(n):
    carried = np.full(n, 0.5, np.float32)
    np.testing.assert_array_equal(to_request_scale(carried, carried, np.ones(n, bool)), carried)
