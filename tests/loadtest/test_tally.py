"""What a generator has done so far; bodies in a file."""

import math

import pytest

from loadtest.spool import Spool
from loadtest.tally import Tally


@pytest.mark.parametrize("tally", [Tally(), Tally.shared()], ids=["own", "shared"])
def test_a_tally_counts_what_is_open_and_knows_percentiles_to_a_twentieth(tally):
    for _ in range(100):
        tally.sent()
    for i in range(90):
        tally.ended((i + 1) / 1e3, is_ok=i % 3 != 0)  # 60 answered: 2, 3, 5, 6, … 89, 90 ms
    assert tally.counts() == (100, 60, 30)
    assert tally.most_open == 100
    assert tally.percentile_s(50) == pytest.approx(0.045, rel=0.05)
    assert tally.percentile_s(99) == pytest.approx(0.090, rel=0.05)


def test_a_tally_of_nothing_has_no_percentile_and_takes_any_latency():
    tally = Tally()
    assert math.isnan(tally.percentile_s(50))
    tally.ended(0.0, is_ok=True)
    tally.ended(1e9, is_ok=True)
    assert 0 < tally.percentile_s(1) < 2e-4 and tally.percentile_s(99) > 100


def test_bodies_come_back_from_the_file_in_any_order():
    spool = Spool(3)
    spool[2], spool[0] = b"second", b"first"
    assert [spool[i] for i in range(len(spool))] == [b"first", b"", b"second"]
    spool.close()
