"""NDCG against the full list, loss, the same list, and the bootstrap, by numbers."""

from math import log2

import numpy as np
import pytest

from loadtest.agreement import Reference, by_request, differs, differs_where_fresh, loss, ndcg, paired_step

FULL = ("a", "b", "c")
IDEAL = 1 + (2 / 3) / log2(3) + (1 / 3) / 2
DEEP = Reference(("a", "b", "c", "d"), np.array([0.9, 0.5, 0.5 - 5e-6, 0.1], np.float32))


def test_the_full_list_itself_loses_nothing():
    assert ndcg(FULL, FULL) == pytest.approx(1)
    assert loss(FULL, FULL) == pytest.approx(0)


def test_a_list_of_strangers_loses_everything():
    assert loss(("x", "y", "z"), FULL) == 1


def test_a_swap_and_a_stranger_cost_what_arithmetic_says():
    assert ndcg(("b", "a", "c"), FULL) == pytest.approx((2 / 3 + 1 / log2(3) + (1 / 3) / 2) / IDEAL)
    assert loss(("x", "a", "b"), FULL) == pytest.approx(1 - (1 / log2(3) + (2 / 3) / 2) / IDEAL)


def test_a_short_answer_has_only_what_it_shows():
    assert ndcg(("a",), FULL) == pytest.approx(1 / IDEAL)


def test_an_empty_full_list_can_not_be_missed():
    assert ndcg((), ()) == 1


def scores(*values):
    return np.array(values, np.float32)


def test_two_items_may_swap_only_when_their_scores_are_close():
    assert differs(["a", "c", "b"], scores(0.9, 0.5 - 5e-6, 0.5), DEEP, 1e-5) == ""
    assert "stands at place 0" in differs(["b", "a"], scores(0.5, 0.9), DEEP, 1e-5)


def test_the_last_place_may_go_to_one_beyond_when_it_is_close():
    assert differs(["a", "c"], scores(0.9, 0.5), DEEP, 1e-5) == ""
    assert "stands at place 1" in differs(["a", "d"], scores(0.9, 0.1), DEEP, 1e-5)


@pytest.mark.parametrize(
    ("ids", "given", "why"),
    [
        (["a", "b"], scores(0.9, 0.5001), "has score"),
        (["a", "x"], scores(0.9, 0.5), "isn't in the full list"),
        (["a", "a"], scores(0.9, 0.9), "1 different"),
    ],
    ids=["score", "stranger", "twice"],
)
def test_another_list_says_how_it_differs(ids, given, why):
    assert why in differs(ids, given, DEEP, 1e-5)


def test_of_a_degraded_answer_only_the_fresh_scores_are_compared():
    carried = np.array([True, False])
    assert differs_where_fresh(["a", "d"], scores(0.9, 0.7), carried, DEEP, 1e-4) == ""
    assert "item d" in differs_where_fresh(["a", "d"], scores(0.9, 0.7), ~carried, DEEP, 1e-4)


def test_values_are_averaged_by_request():
    means = by_request(np.array([0, 2, 2]), np.array([1.0, 0.0, 0.5]), 3)
    assert means[[0, 2]].tolist() == [1.0, 0.25]
    assert np.isnan(means[1])


def test_a_step_is_paired():
    """Requests differ by far more than the step, which is 0.1 in each: pairing takes that away."""
    before = np.linspace(0, 0.8, 50)
    mean, low, high = paired_step(before, before + 0.1)
    assert (mean, low, high) == pytest.approx((0.1, 0.1, 0.1))


def test_an_interval_of_noise_holds_zero():
    noise = np.random.default_rng(0).normal(0, 1, 400)
    _, low, high = paired_step(np.zeros(400), noise)
    assert low < 0 < high
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.1)  # of a mean of 400: 1 / sqrt(400)


def test_requests_without_both_are_left_out():
    assert paired_step(np.array([0.0, np.nan]), np.array([0.5, 1.0]))[0] == 0.5
