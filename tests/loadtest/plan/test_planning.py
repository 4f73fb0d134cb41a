"""Plans: arithmetic over machines, simulation of one, and what they do when more is asked."""

import math
from dataclasses import replace

import pytest

from loadtest.plan import planning
from loadtest.plan.calibration import Loaded
from loadtest.plan.costs import Exponent
from loadtest.plan.planning import Question, highest_rate, plan, variants
from loadtest.plan.recipe import model
from loadtest.plan.report import plan_lines
from tests.loadtest.plan.made import BASE, CALIBRATION, MS, calibration

QUESTION = Question(qps=1_000, p99_s=0.05, items=1_000_000, retrieve=500, rerank=128, cores=2, workers=2, price=0.36)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "REQUESTS", 1_000)
    monkeypatch.setattr(planning, "EXPECTED_REQUESTS", 1_000)


def test_machines_are_enough_and_one_less_is_not() -> None:
    made = plan(CALIBRATION, QUESTION)
    assert made.machines * made.rate.likely >= 1_000 > (made.machines - 1) * made.rate.likely
    assert made.p50_s.low <= made.p50_s.likely <= made.p50_s.high
    assert made.p50_s.likely < made.p99_s.likely
    assert made.rate.low <= made.rate.likely <= made.rate.high


def test_headroom_is_what_is_left_over_the_rate() -> None:
    made = plan(CALIBRATION, QUESTION)
    whole, machine = made.headroom["nothing lost"], made.headroom["one machine lost"]
    assert whole == pytest.approx(made.machines * made.rate.likely / 1_000 - 1)
    assert machine == pytest.approx((made.machines - 1) * made.rate.likely / 1_000 - 1)
    assert machine <= made.headroom["one worker lost"] <= whole
    assert made.headroom["one worker and one machine lost"] <= machine


def test_a_million_requests_cost_the_core_hours_they_take() -> None:
    made = plan(CALIBRATION, QUESTION)
    hours = 1e6 / 1_000 / 3_600
    assert made.per_million == pytest.approx(made.machines * 2 * hours * 0.36)


def test_the_number_of_workers_is_chosen_by_the_rate() -> None:
    made = plan(CALIBRATION, replace(QUESTION, workers=None))
    assert set(made.by_workers) == {1, 2}
    assert made.by_workers[made.configuration.workers] >= 0.98 * max(made.by_workers.values())


def test_an_sla_under_a_lone_request_has_no_rate() -> None:
    made = plan(CALIBRATION, replace(QUESTION, p99_s=1 * MS))
    assert made.machines == 0
    assert made.per_million is None
    assert made.headroom == {}


def test_a_request_that_takes_longer_than_the_sla_is_never_planned_however_seldom_it_comes() -> None:
    made = plan(CALIBRATION, replace(QUESTION, items=10**12, qps=1.0))  # retrieval alone takes a second
    assert made.stage_s["retrieval"] > 10 * QUESTION.p99_s
    assert made.machines == 0
    assert made.rate.likely == 0


def test_a_calibration_that_its_own_runs_contradict_is_doubted() -> None:
    run = Loaded(50.0, 500, 0.01, 0.03, 1.0, 1e-3, 5e-3, 10.0)
    good = calibration(loaded=(run, run), n_fitted=2, error=0.2)
    assert good.doubt is None
    assert "off by 157%" in str(replace(good, error=1.57).doubt)
    assert "nan" in str(replace(good, error=math.nan).doubt)
    assert "only 1" in str(replace(good, n_fitted=1).doubt)
    taken = [replace(run, stolen=share) for share in (0.0, 0.07, 0.3)]
    assert "a hypervisor took 7.0%" in str(replace(good, loaded=tuple(taken)).doubt)
    assert replace(good, loaded=(replace(run, stolen=0.04),) * 3).doubt is None
    assert "2.0 times as far" in str(replace(good, stretch=2.0).doubt)
    bad = replace(good, error=1.57)
    said = list(plan_lines(bad, QUESTION, plan(bad, QUESTION), 1e9))
    assert said[1].startswith("DO NOT TRUST IT")
    assert not any("TRUST" in line for line in plan_lines(good, QUESTION, plan(good, QUESTION), 1e9))


def test_the_highest_rate_keeps_the_sla_and_stays_under_the_bound() -> None:
    one, hurried = (model(CALIBRATION, replace(BASE, sla_s=sla_s)) for sla_s in (0.1, 0.05))
    rate = highest_rate(hurried, 2_000)
    assert rate < one.bound
    assert one.at(rate, 2_000 / rate).percentile_s(99) <= 0.85 * 0.05
    assert highest_rate(one, 2_000) >= rate
    slow = model(CALIBRATION, one.configuration, scale=2.0)
    # All of it takes twice as long, but for what the service takes its loop for: so a few more may be in flight.
    assert rate / 2 <= highest_rate(slow, 2_000) <= 1.1 * rate / 2


def test_a_larger_catalogue_grows_retrieval_by_its_exponent_and_its_interval() -> None:
    exponents = {"retrieval": {"items": Exponent(0.5, 0.4, 0.6, 9)}}
    known = calibration(exponents=exponents)
    likely, low, high = (m.demand.retrieval(500) for m in variants(known, replace(QUESTION, items=100_000_000)))
    now = known.demand.retrieval(500)
    assert (likely, low, high) == tuple(pytest.approx(now * 100**e) for e in (0.5, 0.4, 0.6))


def test_without_a_measured_exponent_the_assumed_one_says_so() -> None:
    assert planning.growth_of(CALIBRATION).is_assumed
    assert "assumed" in str(planning.growth_of(CALIBRATION))


def test_minutes_in_which_the_machine_was_slow_widen_the_interval() -> None:
    speeds = (0.9, 0.95, 1.0, 1.3, 1.4)
    calm, uneasy = (plan(c, QUESTION) for c in (CALIBRATION, calibration(speeds=speeds)))
    assert uneasy.rate.low < calm.rate.low
    assert uneasy.rate.high > calm.rate.high
    assert math.isfinite(uneasy.p99_s.high)
