"""The rules that keep a service inside its SLA, by numbers: costs, quality, admission, hedges."""

import math

import pytest

from app.control.admission import COMFORT, IN_LOOP_S, LOWEST, PRIORITY_SHARE, SLACK, STEEPEST, Admission, most_in_time
from app.control.costs import QUANTILE, STEP, Cost, fitted
from app.control.hedging import MOST, SHARE, HedgeBudget, late_after
from app.control.quality import FEW, FLOOR, MANY, PERCENTILE, RECOVERY_PER_S, Quality, at_depth
from app.control.quality import STEP as RISE

PULL = RISE * PERCENTILE / (1 - PERCENTILE)


# --------------------------------------------------------------------------------------------- costs


def test_a_cost_goes_through_both_of_its_measurements():
    cost = fitted((500, 2e-3), (2_000, 5e-3))
    assert cost.per_item == pytest.approx((5e-3 - 2e-3) / 1_500)
    assert cost.seconds(500) == pytest.approx(2e-3)
    assert cost.seconds(2_000) == pytest.approx(5e-3)


def test_a_width_costs_nothing_less_when_it_was_measured_faster():
    assert fitted((500, 3e-3), (2_000, 2e-3)).seconds(2_000) == pytest.approx(2e-3, abs=1e-8 * 2_000)


def test_what_fits_is_what_is_left_after_the_fixed_part():
    cost = Cost(fixed=1e-3, per_item=1e-5)
    assert cost.fits(3e-3 + 1e-9) == (3e-3 - 1e-3) / 1e-5
    assert cost.fits(1e-3) == cost.fits(0.0) == 0


def test_what_fits_is_done_in_time():
    cost = Cost(fixed=7e-4, per_item=3e-6, log_scale=0.4)
    for budget in (1e-3, 5e-3, 0.1):
        assert cost.seconds(cost.fits(budget)) <= budget * (1 + 1e-9) or cost.fits(budget) == 0


def test_one_pause_moves_the_estimate_no_more_than_one_slow_request():
    slow, paused = Cost(1e-3, 1e-5), Cost(1e-3, 1e-5)
    slow.observe(100, 2.1e-3)
    paused.observe(100, 60.0)
    assert slow == paused
    assert slow.log_scale == pytest.approx(STEP * QUANTILE)


def test_the_estimate_settles_at_its_quantile_of_the_time_met():
    cost = Cost(fixed=1e-3, per_item=0.0)
    times = [1e-3 * (1 + i / 100) for i in range(100)]  # 1 to 2 ms, each as often
    for i in range(20_000):
        cost.observe(1, times[i * 37 % 100])
    assert cost.seconds(1) == pytest.approx(1e-3 * (1 + QUANTILE), rel=0.05)


# ------------------------------------------------------------------------------------------- quality


def test_a_request_that_would_be_late_pulls_as_much_as_99_in_time():
    quality = Quality()
    quality.finished(0.0, is_in_time=False)
    assert quality.value == pytest.approx(1 - 99 * RISE)
    for _ in range(99):
        quality.finished(0.0, is_in_time=True)
    assert quality.value == pytest.approx(1.0)


def test_quality_stays_between_its_floor_and_one():
    quality = Quality()
    for _ in range(50):
        quality.finished(0.0, is_in_time=False)
    assert quality.value == FLOOR
    for _ in range(5_000):
        quality.finished(0.0, is_in_time=True)
    assert quality.value == 1.0


def test_time_alone_brings_it_from_floor_to_one_within_two_seconds():
    quality = Quality(FLOOR, at=10.0)
    assert quality.now(10.9) == pytest.approx((FLOOR + 1) / 2)
    assert quality.now(11.8) == pytest.approx(1.0)
    assert quality.now(9.0) == FLOOR  # a clock that was read a little earlier


def test_it_settles_where_the_percentile_of_latency_is_in_time():
    """In a world where q / 25 of the requests are late."""
    quality, rate, late_credit, n_late, n = Quality(), 1_000.0, 0.0, 0, 60_000
    for i in range(n):
        late_credit += quality.now(i / rate) / 25  # 4 % late at full quality
        is_late = late_credit >= 1
        late_credit -= is_late
        quality.finished(i / rate, is_in_time=not is_late)
        n_late += is_late
    expected = (RISE + RECOVERY_PER_S / rate) / (PULL + RISE)  # rises and pulls are even
    assert n_late / n == pytest.approx(expected, rel=0.1)


def test_within_one_pull_of_the_floor_counts_as_the_floor():
    assert Quality(FLOOR + 0.9 * PULL, at=0.0).is_at_floor(0.0)
    assert not Quality(FLOOR + 1.1 * PULL, at=0.0).is_at_floor(0.0)
    assert not Quality(FLOOR, at=0.0).is_at_floor(PULL / RECOVERY_PER_S + 0.01)


def test_it_knows_since_when_it_is_at_its_floor():
    quality = Quality(FLOOR + 1.5 * PULL, at=5.0)
    quality.finished(5.0, is_in_time=False)
    quality.finished(5.1, is_in_time=False)
    assert quality.is_at_floor(5.1)
    assert quality.floored_at == 5.0
    quality.finished(7.0, is_in_time=True)  # time has lifted it meanwhile
    for _ in range(9):
        quality.finished(7.0, is_in_time=False)
    quality.finished(7.1, is_in_time=False)
    assert quality.floored_at == 7.0


def test_others_in_flight_narrow_whom_they_hold_up_and_only_from_a_number_on():
    found = [at_depth(share) for share in (-0.1, FEW, (FEW + MANY) / 2, MANY, 5.0)]
    assert found == pytest.approx([1.0, 1.0, (1 + FLOOR) / 2, FLOOR, FLOOR])
    assert PRIORITY_SHARE["normal"] > MANY  # the floor comes before refusals


# ----------------------------------------------------------------------------------------- admission


def test_no_more_are_in_flight_than_the_floor_can_answer_in_an_sla():
    assert most_in_time(0.1, 3e-3) == pytest.approx(SLACK * 0.1 / (IN_LOOP_S + 3e-3))
    assert most_in_time(0.1, 0.0) == pytest.approx(SLACK * 0.1 / IN_LOOP_S)
    assert most_in_time(0.1, 10.0) == LOWEST


def test_the_bound_holds_at_the_floor_and_above_it():
    admission = Admission(most=100, sla_s=0.1)
    admission.most = 20.0
    assert admission.permits == 20.0
    for is_at_floor, n in ((True, 18), (False, 20)):
        assert admission.may_enter(n - 1, "normal", is_at_floor=is_at_floor)
        assert not admission.may_enter(n, "normal", is_at_floor=is_at_floor)


@pytest.mark.parametrize("priority", PRIORITY_SHARE)
def test_above_the_floor_only_the_hard_limit_refuses_whatever_the_priority(priority):
    admission = Admission(most=100, sla_s=0.1, limit=10.0)
    assert admission.may_enter(99, priority, is_at_floor=False)
    assert not admission.may_enter(100, priority, is_at_floor=False)
    assert not admission.may_enter(10, priority, is_at_floor=True)


@pytest.mark.parametrize(("priority", "share"), PRIORITY_SHARE.items())
def test_low_priority_goes_first(priority, share):
    admission = Admission(most=100, sla_s=0.1, limit=40.0)
    assert admission.may_enter(math.ceil(40 * share) - 1, priority, is_at_floor=True)
    assert not admission.may_enter(math.ceil(40 * share), priority, is_at_floor=True)


def test_one_request_is_let_in_whatever_the_limit():
    assert Admission(most=1, sla_s=0.1, limit=LOWEST).may_enter(0, "low", is_at_floor=True)


def test_the_limit_backs_off_once_an_sla_and_from_what_was_in_flight():
    admission = Admission(most=256, sla_s=0.1)
    for at in (1.0, 1.05, 1.09):
        admission.finished(at, latency_s=0.06, inflight=50, is_at_floor=True)
    share = COMFORT * 0.1 / 0.06
    assert admission.limit == pytest.approx(50 * share)
    admission.finished(1.11, latency_s=0.06, inflight=60, is_at_floor=True)
    assert admission.limit == pytest.approx(50 * share**2)


def test_a_very_slow_request_leaves_half_of_the_permits():
    admission = Admission(most=256, sla_s=0.1)
    admission.finished(1.0, latency_s=5.0, inflight=80, is_at_floor=True)
    assert admission.limit == 80 * STEEPEST


def test_the_limit_rises_by_one_for_as_many_comfortable_requests_as_it_is():
    admission = Admission(most=256, sla_s=0.1, limit=20.0)
    for _ in range(20):
        admission.finished(1.0, latency_s=COMFORT * 0.1, inflight=20, is_at_floor=True)
    assert admission.limit == pytest.approx(21, abs=0.05)


def test_a_limit_that_is_not_in_use_does_not_rise():
    admission = Admission(most=256, sla_s=0.1, limit=20.0)
    admission.finished(1.0, latency_s=0.001, inflight=9, is_at_floor=True)
    assert admission.limit == 20.0


def test_a_bound_that_is_lifted_again_leaves_the_limit_where_it_was():
    admission = Admission(most=100, sla_s=0.1, limit=50.0)
    admission.most = 5.0
    admission.finished(1.0, latency_s=0.001, inflight=5, is_at_floor=False)
    assert (admission.limit, admission.permits) == (50.0, 5.0)
    admission.most = 100.0
    assert admission.permits == 50.0


def test_the_limit_never_falls_below_the_least():
    admission = Admission(most=256, sla_s=0.1)
    for i in range(100):
        admission.finished(float(i), latency_s=1.0, inflight=5, is_at_floor=True)
    assert admission.limit == LOWEST


# -------------------------------------------------------------------------------------------- hedges


def test_a_hedge_is_paid_for_with_a_share_of_the_rows_scored():
    budget = HedgeBudget()
    assert not budget.spend(1)
    budget.earn(1_000)
    assert budget.spend(int(1_000 * SHARE))
    assert not budget.spend(1)


def test_extra_work_stays_within_its_share_of_any_long_stretch():
    budget, first, again = HedgeBudget(), 0, 0
    for _ in range(10_000):
        budget.earn(250)
        first += 250
        again += 250 * budget.spend(250)
    assert again <= SHARE * first
    assert again >= 0.99 * SHARE * first - MOST


def test_what_is_earned_is_not_hoarded():
    budget = HedgeBudget()
    for _ in range(1_000):
        budget.earn(250)
    assert budget.left == MOST


def test_a_shard_is_late_after_twice_its_time_and_two_milliseconds():
    assert late_after(5e-3) == pytest.approx(2 * 5e-3 + 2e-3)


def test_a_job_larger_than_the_hoard_can_still_be_hedged_after_twenty_of_them():
    budget, n = HedgeBudget(), 2 * int(MOST)
    for _ in range(19):
        budget.earn(n)
    assert not budget.spend(n)
    budget.earn(n)
    assert budget.spend(n)
