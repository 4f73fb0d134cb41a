"""The classic sum is arithmetic for a lone request, and queueing for many."""

import pytest

from loadtest.plan import classic
from loadtest.plan.classic import Sum

CLASSIC = Sum(documents=500, document_s=1e-3)


def test_500_documents_at_1_ms_are_500_ms_on_one_shard_and_100_on_five() -> None:
    assert [CLASSIC.alone_s(n) for n in (1, 5)] == [pytest.approx(0.5), pytest.approx(0.1)]


def test_a_fan_out_is_paid_for_each_shard() -> None:
    assert Sum(500, 1e-3, 2e-3).alone_s(5) == pytest.approx(0.1 + 5 * 2e-3)


def test_workers_are_enough_for_the_work_and_for_the_p99(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classic, "REQUESTS", 600)
    workers = CLASSIC.workers(20, 10, 0.08)
    assert workers >= CLASSIC.fewest(20, 10) >= 20 * 500 * 1e-3
    p50, p99 = CLASSIC.percentiles_s(20, 10, workers)
    assert 0.05 - 1e-9 <= p50.likely <= p99.likely <= 0.08
    assert CLASSIC.workers(20, 10, 0.06) >= workers


def test_no_number_of_workers_helps_a_lone_request_that_is_too_slow() -> None:
    assert CLASSIC.workers(1, 1, 0.1) == 0
    assert CLASSIC.hinders(1, 1, 0.1) == "a lone request is too slow"


def test_no_number_of_workers_helps_who_deals_out() -> None:
    dealt = Sum(500, 1e-3, 1e-3)
    assert dealt.alone_s(10) <= 0.1
    assert dealt.workers(100, 10, 0.1) == 0
    assert dealt.hinders(100, 10, 0.1) == "dealing out takes 100% of its one core"
