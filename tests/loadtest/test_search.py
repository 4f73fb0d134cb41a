"""The search for the highest rate, and the ramp to the peak, over runs that are arithmetic."""

import numpy as np
import pytest

from loadtest.capacity import Bars
from loadtest.search import highest_rate, peak
from tests.loadtest.lab.made import observed


@pytest.mark.parametrize("capacity", [7.0, 50.0, 333.0, 2_000.0])
def test_the_search_ends_within_its_tolerance_below_the_capacity(capacity):
    found = highest_rate(lambda rate: rate <= capacity, 50.0, within=0.05)
    assert capacity / 1.05 <= found <= capacity


def test_one_bad_run_does_not_end_the_search():
    runs = []

    def holds(rate):
        runs.append(rate)
        return rate <= 100 and len(runs) != 2

    assert highest_rate(holds, 50.0) == pytest.approx(100, rel=0.05)


def test_a_service_that_never_holds_has_no_rate():
    assert highest_rate(lambda rate: False, 50.0, tries=1) == 0


def test_a_search_without_an_end_is_ended():
    with pytest.raises(RuntimeError, match="no end of the search"):
        highest_rate(lambda rate: True, 50.0)


def test_the_peak_is_the_best_of_the_ramp():
    best, rate = peak(lambda rate: min(rate, 100.0), 10.0)
    assert (best, rate) == (100, pytest.approx(10 * 1.3**9))  # the first step over 100
    last = 10 * 1.3**8  # under 100
    assert peak(lambda rate: rate if rate <= 100 else 0.0, 10.0) == pytest.approx((last, last))


def test_a_run_that_holds_nothing_says_which_bars_it_missed():
    bars = Bars(p99_s=0.05, narrowed=0.01, late_s=0.005)
    assert bars.missed(observed()) == []
    late = observed(sent_late_s=np.full(400, 0.006))
    assert bars.missed(late) == ["the generator itself was late, by 6.0 ms > 5"]
    slow = observed(latency_s=np.full(400, 0.06), reranked=np.full(400, 98.0))
    assert bars.missed(slow) == ["coverage 0.9800 < 0.99", "p99 60.0 ms > 50"]
    causes = [("reranking narrowed_by_load",)] * 8 + [()] * 392
    assert bars.missed(observed(causes=causes)) == ["narrowed by load 0.0200 > 0.01"]
    assert bars.missed(observed(status=np.full(400, 503, np.int16)))[0] == "answered 0.0000 < 0.999"
