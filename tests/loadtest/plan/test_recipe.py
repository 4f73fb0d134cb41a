"""Who runs what: by the service's own rules; steps add up to what was measured, whoever runs them."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from app import gate
from app.control import admission, quality
from app.control.costs import Cost
from app.control.quality import POWERS, Quality, at_depth
from app.flow import Stage
from app.funnel import Funnel
from app.settings import Settings
from app.stages import reranking
from app.workers import pool
from loadtest.plan import memory, recipe
from loadtest.plan.calibration import Configuration
from loadtest.plan.recipe import CLIENT, FAN_OUT_S, LOOP, THREADS, WORKERS, coverage, in_flight, model
from loadtest.plan.simulation import Simulated
from tests.loadtest.plan.made import BASE, CALIBRATION, MS, calibration, demand

NARROW_S = (0.2 + 0.8 + 0.5 + 0.1 + 0.1) * MS
ALONE_S = 1 * MS + NARROW_S + (0.3 + 1.28) * MS + 0.3 * MS  # loop, narrow part, 128 rows, the trip
HURRIED = replace(BASE, sla_s=5 * MS)  # 0.3 of it is less than 128 rows take


def test_the_service_s_rules_are_the_service_s() -> None:
    assert (recipe.MIN_SHARD, recipe.ALONE) == (reranking.MIN_SHARD, pool.ALONE)
    assert recipe.NARROWS_AT == gate.AIM
    of_quality = (recipe.STEP, recipe.PERCENTILE, recipe.FLOOR, recipe.RECOVERY_PER_S)
    assert of_quality == (quality.STEP, quality.PERCENTILE, quality.FLOOR, quality.RECOVERY_PER_S)
    assert (quality.FEW, quality.MANY, quality.POWERS[Stage.RERANKING]) == (recipe.FEW, recipe.MANY, recipe.POWER)
    assert Settings().max_inflight == recipe.MAX_INFLIGHT
    assert (recipe.LOWEST, recipe.SLACK, recipe.IN_LOOP_S) == (admission.LOWEST, admission.SLACK, admission.IN_LOOP_S)
    assert Settings().spares == memory.SPARES


def test_full_quality_ends_close_to_the_sla() -> None:
    one = model(CALIBRATION, replace(BASE, sla_s=0.1), has_client=True)
    assert one.narrows_at_s == pytest.approx(85 * MS)
    assert one.held_p99_s(np.linspace(0, 50 * MS, 101)) == pytest.approx(49.5 * MS)
    assert one.held_p99_s(np.linspace(0, 500 * MS, 101)) == pytest.approx(85 * MS)


def test_a_lone_request_takes_what_its_parts_take() -> None:
    seen = model(CALIBRATION, BASE).at(rate=0.01, seconds=10_000)
    assert seen.latency_s == pytest.approx(ALONE_S, rel=1e-6)


def test_a_lone_request_that_is_shared_takes_its_longest_shard_and_the_fan_out() -> None:
    seen = model(CALIBRATION, HURRIED).at(rate=0.01, seconds=10_000)
    assert seen.latency_s == pytest.approx(ALONE_S - 0.64 * MS + 2 * FAN_OUT_S, rel=1e-6)


def test_a_machine_half_as_fast_takes_twice_as_long() -> None:
    seen = model(CALIBRATION, BASE, scale=2.0).at(rate=0.01, seconds=10_000)
    assert seen.latency_s == pytest.approx(2 * ALONE_S, rel=1e-6)


@pytest.mark.parametrize(
    ("rerank", "workers", "sla_ms", "is_shared", "shards"),
    [
        (128, 2, 5.3, False, 1),  # 1.58 ms of re-ranking against 0.3 of the SLA: 1.59
        (128, 2, 5.2, True, 2),
        (128, 4, 5.2, True, 4),
        (128, 1, 1.0, False, 1),
        (31, 2, 1.0, True, 1),
        (32, 2, 1.0, True, 2),
    ],
)
def test_what_takes_one_worker_too_long_is_shared(
    rerank: int, workers: int, sla_ms: float, is_shared: bool, shards: int
) -> None:
    chosen = Configuration(500, rerank, workers, sla_ms * MS)
    one = model(CALIBRATION, chosen)
    assert (one.is_shared(chosen), one.shards(chosen)) == (is_shared, shards)


def test_on_a_slower_machine_the_same_request_is_shared() -> None:
    chosen = replace(BASE, sla_s=6 * MS)
    assert not model(CALIBRATION, chosen).is_shared(chosen)
    assert model(CALIBRATION, chosen, scale=1.5).is_shared(chosen)


def test_a_whole_request_is_one_step_of_a_worker_and_a_shared_one_begins_in_a_thread() -> None:
    def stations(c: Configuration) -> list[int]:
        return [step.station for step in model(CALIBRATION, c).steps(3, np.random.default_rng(0))]

    assert stations(BASE) == [LOOP, WORKERS, LOOP, LOOP]
    assert stations(HURRIED) == [LOOP, THREADS, LOOP, WORKERS, LOOP]


def test_the_bound_is_that_of_the_busiest() -> None:
    many = calibration(cores=8)
    assert model(many, replace(BASE, workers=1)).bound == pytest.approx(1 / (NARROW_S + 1.58 * MS))
    assert model(many, HURRIED).bound == pytest.approx(1 / (1 * MS + 2 * FAN_OUT_S))  # the loop deals out
    assert model(CALIBRATION, BASE).bound == pytest.approx(2 / (1 * MS + NARROW_S + 1.58 * MS))


def test_the_generator_is_there_only_when_asked_for() -> None:
    with_client = model(CALIBRATION, BASE, has_client=True).at(rate=0.01, seconds=10_000)
    assert with_client.latency_s == pytest.approx(ALONE_S + 0.4 * MS, rel=1e-6)
    assert len(model(CALIBRATION, BASE).steps(1, np.random.default_rng(0))) == 4


def test_the_bound_is_where_queues_begin_to_grow() -> None:
    one = model(CALIBRATION, BASE)
    below, above = (one.at(share * one.bound, 20).latency_s for share in (0.8, 1.2))
    assert below[-100:].mean() < 5 * ALONE_S
    assert above[-100:].mean() > 50 * ALONE_S


@pytest.mark.parametrize("retrieve", [100, 500, 4_000])
def test_work_keeps_its_mean_at_any_width_and_stalls_their_length(retrieve: int) -> None:
    shapes = tuple((s, s, s) for s in [0.5] * 95 + [10.5] * 5)  # their mean is 1; a stall is ten times the rest
    shared = Configuration(retrieve, 128, 2, HURRIED.sla_s)  # there the narrow part is a step of its own
    one = model(calibration(demand=demand(shapes=shapes)), shared)
    narrow = one.steps(100_000, np.random.default_rng(0))[1].work
    expected = (0.2 + 0.8 + 0.1) * MS + retrieve * 1.2e-6
    assert narrow.mean() == pytest.approx(expected, rel=0.03)
    stall = 10 * (0.2 + 0.8 + 0.1 + 0.6) * MS  # as it was at the base widths
    once = narrow[(narrow > 0.6 * expected) & (narrow < 0.5 * expected + 1.5 * stall)]
    assert once == pytest.approx(0.5 * expected + stall, rel=1e-6)


def test_a_slower_machine_takes_so_much_longer() -> None:
    met = model(CALIBRATION, BASE, scale=3.0).at(rate=0.01, seconds=40_000).latency_s
    assert met == pytest.approx(3 * ALONE_S)


def test_busy_cores_keep_caches_warm() -> None:
    """Of a request that takes 1.2 x alone and 0.8 x on busy cores: the factor is on the line at its own load."""
    one = replace(model(CALIBRATION, BASE), warmth=(1.2, -0.4))
    demand_s = sum(one.means().values())
    assert one.factor(1e-6) == pytest.approx(1.2)
    for rate in (50, 150, 300):
        factor = one.factor(rate)
        assert factor == pytest.approx(1.2 - 0.4 * rate * demand_s * factor / CALIBRATION.cores)
        assert one.cpu_s(rate) == pytest.approx(demand_s * factor)
    assert one.factor(1e6) == pytest.approx(0.8)
    assert one.bound == pytest.approx(model(CALIBRATION, BASE).bound / 0.8)


def test_beyond_the_busiest_cores_that_were_met_a_request_takes_what_it_took_there() -> None:
    line = replace(model(CALIBRATION, BASE), warmth=(1.2, -0.4))
    one = replace(line, busiest=0.5)
    assert one.factor(50) == line.factor(50)
    assert one.factor(1e6) == one.factor(1e3) == pytest.approx(1.0)
    assert one.bound == pytest.approx(model(CALIBRATION, BASE).bound)


def test_one_worker_has_a_core_for_itself_and_two_have_not() -> None:
    """By hand: the base has two workers on two cores; of three, two are one of two steps from one to all."""
    one = replace(model(CALIBRATION, BASE), lone=0.9)
    assert one.factor(50) == 1.0
    single, many = (replace(one, configuration=replace(BASE, workers=n)) for n in (1, 6))
    assert (single.factor(50), many.factor(50)) == (pytest.approx(0.9), 1.0)
    assert single.cpu_s(50) == pytest.approx(0.9 * one.cpu_s(50))
    assert single.bound == pytest.approx(replace(single, lone=1.0).bound / 0.9)
    three = replace(one, base=replace(BASE, workers=3), machine=replace(one.machine, cores=4))
    assert three.factor(50) == pytest.approx(0.95)


def test_neighbours_in_the_way_cost_until_all_cores_are_busy() -> None:
    one = replace(model(CALIBRATION, BASE), warmth=(1.0, 0.5))
    assert one.factor(1e6) == pytest.approx(1.5)
    assert 1.0 < one.factor(100) < 1.5
    seen, alone = one.at(100, 20), model(CALIBRATION, BASE).at(100, 20)
    assert sum(seen.cpu_s) == pytest.approx(one.factor(100) * sum(alone.cpu_s))


def test_a_client_s_cpu_was_metered_under_load_and_keeps_the_cores_busy_too() -> None:
    one = replace(model(CALIBRATION, BASE, has_client=True), warmth=(1.2, -0.4))
    means = model(CALIBRATION, BASE, has_client=True).means()
    client_s = means.pop("client")
    factor = one.factor(100)
    assert factor == pytest.approx(1.2 - 0.4 * 100 * (factor * sum(means.values()) + client_s) / CALIBRATION.cores)
    assert one.cpu_s(100) == pytest.approx(factor * sum(means.values()))
    seen = one.at(100, 20)
    assert seen.cpu_s[CLIENT] / len(seen.latency_s) == pytest.approx(client_s)


def test_who_is_in_flight() -> None:
    """Three come at once to one worker, which takes a second each; a fourth when all is over."""
    seen = Simulated(np.array([0.0, 0.0, 0.0, 9.0]), np.array([1.0, 2.0, 3.0, 1.0]), (), 0.0)
    assert in_flight(seen, np.array([0.0, 0.5, 1.0, 2.5, 3.0, 9.5])).tolist() == [3, 3, 2, 1, 0, 1]


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_no_more_are_in_flight_than_the_service_lets_in(workers) -> None:
    """By its own rule, given that work takes what it takes here."""

    def cost(line) -> Cost:
        return Cost(line(0), line(1) - line(0))

    d, one = CALIBRATION.demand, model(CALIBRATION, replace(BASE, workers=workers, sla_s=0.1))
    pooled, shards = SimpleNamespace(cost=cost(d.shard), n_workers=workers), SimpleNamespace(n_workers=workers)
    funnel = SimpleNamespace(
        generation=SimpleNamespace(manifest=SimpleNamespace(funnel=BASE)),
        retrieval=SimpleNamespace(cost=cost(d.retrieval)),
        preranking=SimpleNamespace(cost=cost(d.preranking)),
        reranking=SimpleNamespace(
            scorer=shards, cost=SimpleNamespace(seconds=partial(pool.WorkerPool.seconds, pooled))
        ),
    )
    funnel.narrow_s = partial(Funnel.narrow_s, funnel)
    floor_s = Funnel.seconds(funnel, quality.FLOOR)
    assert one.most == pytest.approx(admission.most_in_time(0.1, floor_s))


@pytest.mark.parametrize("n", [1, 12, 60, 200])
def test_of_many_that_come_at_once_the_last_are_narrowed_by_how_many_wait_before_them(n) -> None:
    one = model(CALIBRATION, replace(BASE, workers=2, sla_s=0.1))
    by_rank = [at_depth((rank - 2) / one.most) ** POWERS[Stage.RERANKING] for rank in range(1, n + 1)]
    assert (np.mean(by_rank) == 1) == (n <= 12)
    alone_s = sum(one.means().values())  # each is begun as it comes, and ends after the last has come
    seen = Simulated(1e-9 * np.arange(n), np.full(n, alone_s), (), 0.0)
    assert one.coverage(seen) == pytest.approx(np.mean(by_rank))


def test_coverage_is_what_the_service_s_own_rules_make_of_these_latencies() -> None:
    rng = np.random.default_rng(0)
    arrived, latency = np.cumsum(rng.exponential(1 / 100, 2_000)), rng.exponential(0.01, 2_000)
    rule, met, depths = Quality(), [], rng.uniform(0.0, 0.8, 2_000)
    happens = sorted([(t, 0, 0.0) for t in arrived] + [(t + s, 1, s) for t, s in zip(arrived, latency, strict=True)])
    for now, is_end, took_s in happens:
        if is_end:
            rule.finished(now, is_in_time=took_s <= 0.04)
        else:
            met.append(rule.now(now))
    power, seen = POWERS[Stage.RERANKING], Simulated(arrived, latency, (), 0.0)
    for at in (np.zeros(2_000), depths):
        expected = np.mean([min(q, at_depth(depth)) ** power for q, depth in zip(met, at, strict=True)])
        assert 0.2 < expected < 0.99
        assert coverage(seen, 0.04, at) == pytest.approx(expected, abs=1e-9)
    assert coverage(seen, 10.0, np.zeros(2_000)) == 1
