"""Who runs what: steps add up to what was measured, wherever the narrow part runs."""

import numpy as np
import pytest

from loadtest.plan.calibration import Configuration
from loadtest.plan.recipe import LOOP, WORKERS, latencies, model, shards
from tests.loadtest.plan.made import BASE, CALIBRATION, MS, calibration, demand

ALONE_S = (  # loop, two shards dealt out, narrow part, a hop; 64 rows a shard, a round trip
    (1 + 2 * 0.1) * MS + (0.2 + 0.8 + 0.5 + 0.1 + 0.1) * MS + 0.1 * MS + (0.3 + 0.64) * MS + 0.2 * MS
)


def test_a_lone_request_takes_what_its_parts_take() -> None:
    seen = model(CALIBRATION, BASE).at(rate=0.01, seconds=10_000)
    assert seen.latency_s == pytest.approx(ALONE_S, rel=1e-6)


def test_a_machine_half_as_fast_takes_twice_as_long() -> None:
    seen = model(CALIBRATION, BASE, scale=2.0).at(rate=0.01, seconds=10_000)
    assert seen.latency_s == pytest.approx(2 * ALONE_S, rel=1e-6)


@pytest.mark.parametrize(
    ("rerank", "workers", "expected"), [(128, 2, 2), (31, 2, 1), (32, 2, 2), (8, 4, 1), (500, 1, 1)]
)
def test_shards_are_as_many_as_workers_but_none_is_tiny(rerank: int, workers: int, expected: int) -> None:
    assert shards(rerank, workers) == expected


def test_the_narrow_part_queues_where_its_cpu_was_spent() -> None:
    on_workers = model(calibration(demand=demand(narrow_on="workers")), BASE)
    steps = on_workers.steps(3, np.random.default_rng(0))
    assert [step.station for step in steps] == [LOOP, WORKERS, LOOP, WORKERS, LOOP]
    narrow_s, shard_s = (0.2 + 0.8 + 0.5 + 0.1 + 0.1) * MS, (0.3 + 1.28) * MS
    alone = model(calibration(cores=8, demand=demand(narrow_on="workers")), Configuration(500, 128, 1, 8))
    assert alone.bound == pytest.approx(1 / (narrow_s + shard_s))


def test_the_generator_is_there_only_when_asked_for() -> None:
    with_client = model(CALIBRATION, BASE, has_client=True).at(rate=0.01, seconds=10_000)
    assert with_client.latency_s == pytest.approx(ALONE_S + 0.4 * MS, rel=1e-6)
    assert len(model(CALIBRATION, BASE).steps(1, np.random.default_rng(0))) == 5


def test_the_bound_is_where_queues_begin_to_grow() -> None:
    one = model(CALIBRATION, BASE)
    below, above = (one.at(share * one.bound, 20).latency_s for share in (0.8, 1.2))
    assert below[-100:].mean() < 5 * ALONE_S
    assert above[-100:].mean() > 50 * ALONE_S


@pytest.mark.parametrize("retrieve", [100, 500, 4_000])
def test_work_keeps_its_mean_at_any_width_and_stalls_their_length(retrieve: int) -> None:
    shapes = tuple((s, s, s) for s in [0.5] * 95 + [10.5] * 5)  # their mean is 1; a stall is ten times the rest
    one = model(calibration(demand=demand(shapes=shapes)), Configuration(retrieve, 128, 2, 2))
    narrow = one.steps(100_000, np.random.default_rng(0))[1].work
    expected = (0.2 + 0.8 + 0.1) * MS + retrieve * 1.2e-6
    assert narrow.mean() == pytest.approx(expected, rel=0.03)
    stall = 10 * (0.2 + 0.8 + 0.1 + 0.6) * MS  # as it was at the base widths
    once = narrow[(narrow > 0.6 * expected) & (narrow < 0.5 * expected + 1.5 * stall)]
    assert once == pytest.approx(0.5 * expected + stall, rel=1e-6)


def test_a_run_in_parts_meets_each_part_s_speed() -> None:
    models = [model(CALIBRATION, BASE, scale=scale) for scale in (1.0, 3.0)]
    met = latencies(models, rate=0.01, seconds=40_000)
    assert sorted(set(np.round(met / ALONE_S, 3))) == [1.0, 3.0]
