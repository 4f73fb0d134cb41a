"""Lines and powers are found again where they were planted."""

import numpy as np
import pytest

from loadtest.plan.costs import Exponent, Line, line, power


def test_a_planted_line_is_found() -> None:
    found = line([(n, 0.002 + 5e-6 * n) for n in (100, 500, 2_000)])
    assert (found.fixed, found.each) == (pytest.approx(0.002), pytest.approx(5e-6))
    assert found(1_000) == pytest.approx(0.007)


def test_a_line_never_has_a_negative_part() -> None:
    assert line([(10, 0.1), (100, 2.0)]).fixed == 0
    assert line([(10, 2.0), (100, 1.0)]).each == 0


def test_one_width_costs_in_proportion() -> None:
    assert line([(100, 0.5), (100, 0.7)]) == Line(0.0, pytest.approx(0.006))


def test_a_line_with_points_goes_through_them_and_on_by_its_slope() -> None:
    bent = Line(1.0, 0.01, ((100, 1.0), (200, 1.5), (400, 3.5)))
    assert [bent(n) for n in (100, 150, 300, 400)] == pytest.approx([1.0, 1.25, 2.5, 3.5])
    assert [bent(n) for n in (500, 50, 0)] == pytest.approx([4.5, 0.5, 0.0])
    assert Line(1.0, 0.01, ((100, 0.2),))(50) == 0.0
    grown = bent.times(2)
    assert (grown(150), grown(500)) == (pytest.approx(2.5), pytest.approx(9.0))
    assert Line(1.0, 0.01).times(2)(100) == pytest.approx(4.0)


def test_planted_exponents_are_inside_their_intervals() -> None:
    rng = np.random.default_rng(3)
    n, width = np.repeat([1e5, 3e5, 1e6, 3e6], 4), np.tile([100.0, 400, 1_600, 6_400], 4)
    seconds = 1e-7 * n**0.5 * width**0.8 * np.exp(rng.normal(0, 0.02, 16))
    found = power({"items": n, "width": width, "model": np.ones(16)}, seconds)
    assert set(found) == {"items", "width"}
    for name, planted in (("items", 0.5), ("width", 0.8)):
        assert found[name].low < planted < found[name].high
        assert found[name].high - found[name].low < 0.1


def test_intervals_hold_though_each_world_has_luck_of_its_own() -> None:
    rng, missed = np.random.default_rng(0), 0
    items = np.repeat([5e4, 1e5, 2e5, 4e5, 5e4, 5e4], 4)
    width, worlds = np.tile([2_000.0, 2_000, 2_000, 4_000], 6), np.repeat(range(6), 4)
    for _ in range(200):
        luck = np.repeat(rng.normal(0, 0.15, 6), 4)
        seconds = 1e-7 * items**0.5 * width**0.8 * np.exp(luck + rng.normal(0, 0.02, 24))
        found = power({"items": items, "width": width}, seconds, worlds.tolist())["items"]
        missed += not found.low < 0.5 < found.high
    assert 1 <= missed <= 200 * 0.15  # 10 % are to miss; of points taken as independent half would


def test_too_few_points_are_no_fit() -> None:
    with pytest.raises(ValueError, match="2 points"):
        power({"items": [1.0, 2.0]}, [1.0, 2.0])


def test_growth_widens_with_the_distance() -> None:
    near, far = (Exponent(0.5, 0.4, 0.6).growth(ratio) for ratio in (4, 100))
    assert near == (pytest.approx(2), pytest.approx(4**0.4), pytest.approx(4**0.6))
    assert far[2] / far[1] > near[2] / near[1]
    shrunk = Exponent(0.5, 0.4, 0.6).growth(0.25)
    assert shrunk[1] < shrunk[0] < shrunk[2]
