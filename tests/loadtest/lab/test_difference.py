"""Intervals hold a planted difference, are wide where moments differ, and are absent where there is too little."""

import numpy as np
import pytest

from loadtest.lab.difference import differences
from tests.loadtest.lab.made import made, observed


def exponential(mean_ms: float, seed: int, n: int = 4_000):
    latency_s = np.random.default_rng(seed).exponential(mean_ms / 1e3, n)
    return made(observed(n, rate=200, latency_s=latency_s))


def by_name(a, b):
    return {d.name: d for d in differences(a, b)}


def test_a_planted_difference_is_clear_and_inside_of_its_interval():
    """Exponential latencies: the median is mean · ln 2, the 90th percentile mean · ln 10."""
    found = by_name(exponential(20, 1), exponential(25, 2))
    for name, factor in (("p50 ms", np.log(2)), ("p90 ms", np.log(10))):
        assert found[name].is_clear
        assert found[name].low < 5 * factor < found[name].high
        assert found[name].gap == pytest.approx(5 * factor, rel=0.5)


def test_the_same_twice_is_no_difference():
    found = by_name(exponential(20, 1), exponential(20, 2))
    assert not [d.name for d in found.values() if d.is_clear]
    twice = exponential(20, 1)
    assert all(d.gap == 0 for d in by_name(twice, twice).values() if np.isfinite(d.a))


def test_intervals_know_that_requests_of_one_moment_share_its_stall():
    """A tenth of the requests takes 500 ms: spread over all bins, or all of them in two of twenty."""
    spread, at_once = np.full(4_000, 0.010), np.full(4_000, 0.010)
    spread[::10] = at_once[1_000:1_400] = 0.5
    usual = made(observed(4_000, rate=200))
    evenly, clustered = (
        by_name(usual, made(observed(4_000, rate=200, latency_s=latencies)))["answered within the SLA, share"]
        for latencies in (spread, at_once)
    )
    assert evenly.gap == clustered.gap == pytest.approx(-0.1)
    assert clustered.high - clustered.low > 10 * (evenly.high - evenly.low)


def test_too_few_bins_have_no_interval():
    found = by_name(made(), made(warm_up_s=15.0))
    assert not found["p99 ms"].has_interval and not found["p99 ms"].is_clear
    assert found["p99 ms"].gap == 0


def test_a_run_without_answers_has_no_interval():
    nothing = made(observed(status=np.zeros(400, np.int16), error=["broken"] * 400))
    assert not any(d.has_interval for d in by_name(made(), nothing).values())
