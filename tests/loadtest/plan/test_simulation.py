"""The simulation against queueing theory, and what must hold whatever is simulated."""

import math

import numpy as np
import pytest

from loadtest.plan.simulation import Machine, Simulated, Station, Step, simulate

N = 30_000
MANY = Machine(cores=64)  # nobody waits for a core
RNG = np.random.default_rng(1)
EXPONENTIAL, ARRIVALS = RNG.exponential(1.0, N), np.cumsum(RNG.exponential(1.0, N))


def one_station(rate: float, work: np.ndarray, servers: int = 1, machine: Machine = MANY) -> Simulated:
    return simulate(ARRIVALS / rate, [Step(0, work)], [Station("only", servers)], machine)


def erlang_c(servers: int, load: float) -> float:
    """The probability that who comes must wait, M/M/c."""
    terms = [load**k / math.factorial(k) for k in range(servers)]
    last = load**servers / math.factorial(servers) * servers / (servers - load)
    return last / (sum(terms) + last)


@pytest.mark.parametrize("load", [0.3, 0.6])
def test_one_server_with_exponential_work_waits_as_theory_says(load: float) -> None:
    seen = one_station(load, EXPONENTIAL)
    assert seen.latency_s.mean() == pytest.approx(1 / (1 - load), rel=0.1)
    assert seen.percentile_s(99) == pytest.approx(math.log(100) / (1 - load), rel=0.15)


def test_one_server_is_lindley_s_recursion_to_the_last_digit() -> None:
    wait, waits, work = 0.0, [], EXPONENTIAL[:5_000]
    for gap, before in zip(np.diff(ARRIVALS[:5_000] / 0.9), work, strict=False):
        waits.append(wait)
        wait = max(0.0, wait + before - gap)
    waits.append(wait)
    seen = simulate(ARRIVALS[:5_000] / 0.9, [Step(0, work)], [Station("only", 1)], MANY)
    assert seen.latency_s == pytest.approx(waits + work, abs=1e-6)


@pytest.mark.parametrize("load", [0.3, 0.6])
def test_one_server_with_even_work_waits_half_of_that(load: float) -> None:
    seen = one_station(load, np.ones(N))
    assert seen.latency_s.mean() == pytest.approx(1 + load / (2 * (1 - load)), rel=0.05)


@pytest.mark.parametrize("servers", [2, 4])
def test_several_servers_wait_as_erlang_says(servers: int) -> None:
    load = 0.7 * servers
    seen = one_station(load, EXPONENTIAL, servers)
    assert seen.latency_s.mean() == pytest.approx(1 + erlang_c(servers, load) / (servers - load), rel=0.1)


def test_many_jobs_on_one_core_share_it_as_theory_says() -> None:
    """M/G/1 processor sharing: work / (1 - load) on average, whatever the distribution."""
    work = np.where(RNG.random(N) < 0.1, 5.5, 0.5)  # its mean is 1
    seen = one_station(0.6, work, servers=10_000, machine=Machine(cores=1))
    assert seen.latency_s.mean() == pytest.approx(1 / (1 - 0.6), rel=0.1)


def test_parts_that_never_wait_take_as_long_as_the_longest() -> None:
    parts = RNG.exponential(1.0, (10_000, 5))
    seen = simulate(np.arange(10_000) * 100.0, [Step(0, parts)], [Station("workers", 5)], MANY)
    assert seen.latency_s == pytest.approx(parts.max(axis=1), abs=1e-6)
    assert parts.max(axis=1).mean() == pytest.approx(sum(1 / k for k in range(1, 6)), rel=0.03)  # harmonic numbers


def test_the_classic_funnel_takes_500_ms_on_one_shard_and_100_on_five() -> None:
    alone = np.arange(10.0)
    for shards, expected in ((1, 0.5), (5, 0.1)):
        work = np.full((10, shards), 500 / shards * 1e-3)
        seen = simulate(alone, [Step(0, work)], [Station("workers", shards)], Machine(cores=8))
        assert seen.latency_s == pytest.approx(expected)


def test_latency_never_falls_when_the_same_requests_come_faster() -> None:
    means = [one_station(load, EXPONENTIAL, 2, Machine(2)).latency_s.mean() for load in (0.2, 0.5, 0.8, 1.1)]
    assert means == sorted(means)


def test_all_work_is_done_and_cores_are_held_for_it_once() -> None:
    work = RNG.exponential(1.0, (2_000, 3))
    steps = [Step(0, np.full(2_000, 0.1)), Step(1, work, np.full(2_000, 0.5)), Step(0, np.full(2_000, 0.1))]
    seen = simulate(ARRIVALS[:2_000] * 2, steps, [Station("loop", 1), Station("workers", 4, 0.1)], Machine(2))
    assert seen.cpu_s[0] == pytest.approx(2_000 * 0.2)
    assert seen.cpu_s[1] == pytest.approx(work.sum())
    assert np.all(seen.latency_s >= 0.1 + work.max(axis=1) + 0.5 + 0.1 - 1e-6)


def test_who_is_nice_leaves_the_core_to_who_isn_t() -> None:
    """Of one core a weight of 3 takes three quarters until it is done; then the other has all of it."""
    stations = [Station("loop", 1, 3.0), Station("workers", 1, 1.0)]
    steps = [Step(0, np.array([3.0, 0.0])), Step(1, np.array([0.0, 1.0]))]
    seen = simulate(np.array([0.0, 1e-9]), steps, stations, Machine(1))
    assert seen.latency_s[1] == pytest.approx(4.0, rel=1e-6)


def test_an_accelerator_holds_no_core() -> None:
    stations = [Station("accelerators", 8, 0.0)]
    seen = simulate(np.zeros(8), [Step(0, np.ones(8))], stations, Machine(1))
    assert seen.latency_s == pytest.approx(1.0)
    assert seen.busy == 0


def test_the_same_seed_gives_the_same_latencies() -> None:
    machine = Machine(2, wake_s=0.1)
    first, again = (one_station(0.8, EXPONENTIAL, 3, machine).latency_s for _ in range(2))
    assert np.array_equal(first, again)


def test_waiting_for_a_core_costs_only_when_all_are_busy() -> None:
    idle = one_station(0.001, np.full(N, 1e-6), 4, Machine(2, wake_s=5.0))
    assert idle.percentile_s(99) == pytest.approx(1e-6, rel=1e-3)
    stations, steps = [Station("workers", 4, 0.1)], [Step(0, EXPONENTIAL)]
    waits, none = (simulate(ARRIVALS / 1.5, steps, stations, Machine(2, wake_s=s)).latency_s.mean() for s in (1.0, 0.0))
    assert waits > none


def test_a_wait_for_a_turn_ends_when_a_core_is_free() -> None:
    """One core, held for a second by who doesn't yield: the worker would wait far longer for its turn, but needn't."""
    stations = [Station("loop", 1), Station("workers", 1, 0.1)]
    steps = [Step(0, np.array([1.0, 0.0])), Step(1, np.array([0.0, 1.0]))]
    seen = simulate(np.array([0.0, 0.5]), steps, stations, Machine(1, wake_s=1e6))
    assert seen.latency_s[1] <= 1.5 + 1e-6


@pytest.mark.parametrize(("wake_s", "second"), [(0.0, 2.0), (1e6, 2.0), (1e-6, 2.0)])
def test_of_two_equals_the_first_is_done_the_sooner_the_longer_the_second_waits_for_a_turn(
    wake_s: float, second: float
) -> None:
    """Without a wait they share the core from the start, and both end last."""
    stations = [Station("one", 2), Station("other", 1)]
    steps = [Step(0, np.array([1.0, 0.0])), Step(1, np.array([0.0, 1.0]))]
    seen = simulate(np.array([0.0, 1e-9]), steps, stations, Machine(1, wake_s=wake_s))
    assert seen.latency_s == pytest.approx([1.0 if wake_s > 1 else 2.0, second], rel=1e-4)


@pytest.mark.parametrize("holds", [False, True])
def test_who_holds_takes_nothing_else_before_the_next_step_is_over(holds: bool) -> None:
    """Two requests, a second with the worker and 0.4 with the loop: the worker waits for the loop, or doesn't."""
    steps = [Step(0, np.ones(2), pause=np.full(2, 0.1), holds=holds), Step(1, np.full(2, 0.4))]
    seen = simulate(np.zeros(2), steps, [Station("worker", 1), Station("loop", 1)], MANY)
    assert seen.latency_s == pytest.approx([1.5, 3.0] if holds else [1.5, 2.5])
