"""The map from earlier scores to the re-ranker's scale: order kept, planted lines found again."""

import numpy as np
import pytest

from models.score_scale import fit


def test_a_planted_line_is_found_again() -> None:
    x = np.linspace(0, 1, 10_000)
    knots = fit(x, 3 * x - 1)
    assert knots(np.array([0.25, 0.9], np.float32)) == pytest.approx([3 * 0.25 - 1, 3 * 0.9 - 1], abs=1e-5)


def test_noise_averages_out_around_the_planted_curve() -> None:
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 1, 50_000)
    knots = fit(x, x**2 + rng.normal(0, 0.1, len(x)))
    at = np.array([0.1, 0.5, 0.9], np.float32)
    assert knots(at) == pytest.approx(at**2, abs=0.02)


def test_knots_rise_strictly_where_the_scores_do_not() -> None:
    x = np.linspace(0, 1, 4_000)
    y = np.where(x < 0.5, x, 1 - x)  # rises, then falls
    knots = fit(x, y)
    assert np.all(np.diff(knots.x) > 0)
    assert np.all(np.diff(knots.y) > 0)
    # From about x = .25 on a rising function can do no better than the mean.
    assert knots.y[-1] == pytest.approx(np.mean(y[x >= knots.y[-1]]), abs=0.02)


def test_falling_scores_make_an_almost_flat_map_around_the_mean() -> None:
    x = np.linspace(0, 1, 2_000)
    knots = fit(x, 5 - x)
    assert len(knots.x) == 2
    assert np.mean(knots.y) == pytest.approx(5 - 0.5)
    assert 0 < knots.y[1] - knots.y[0] < 0.01


def test_one_single_earlier_score_still_makes_a_rising_map() -> None:
    knots = fit(np.full(300, 0.7), np.linspace(0, 1, 300))
    assert np.mean(knots.x) == pytest.approx(0.7)
    assert knots.y[0] < 0.5 < knots.y[1]


def test_pairs_that_are_not_finite_are_left_out() -> None:
    x, y = np.linspace(0, 1, 1_000), 2 * np.linspace(0, 1, 1_000)
    x[::7], y[::11] = np.nan, np.inf
    assert fit(x, y)(np.array([0.5], np.float32)) == pytest.approx([1.0], abs=1e-3)


def test_no_finite_pair_is_an_error() -> None:
    with pytest.raises(ValueError, match="no candidate"):
        fit(np.array([np.nan]), np.array([1.0]))


@pytest.mark.parametrize("n", [1, 2, 3, 250, 5_000])
def test_the_map_keeps_the_order_for_any_number_of_candidates(n: int) -> None:
    rng = np.random.default_rng(n)
    x = rng.normal(size=n)
    knots = fit(x, rng.normal(size=n))
    mapped = knots(np.linspace(-3, 3, 50).astype(np.float32))
    assert np.all(np.diff(mapped) > 0)
