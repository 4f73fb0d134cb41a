"""Kernels and service in turn, and what the service costs over them: ratios of neighbouring runs.

    kernels hot · service at `rate` · kernels hot · service at `rate` · …          CPU a request
    kernels paced · service unloaded · kernels paced · service unloaded · …       p50, both at `unloaded_rate`

The machine's speed moves by a factor of two within a minute, so each run of the service is divided by the mean of the
kernels' runs right before and right after it, and the median of these ratios is the figure. The service's CPU is that
of all its processes, idle cost included. Before anything is timed, the kernels must give the service's own answers.
A server glued by hand (by_hand.py) is measured in the service's place, by the same runs at the same rates, where asked.
It prints nothing: command.py and bench_speed.py do. It is over 250 lines because what a ratio is of stands beside how
both of its sides are taken.
"""

import itertools
import json
import os
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from loadtest import capacity, launch
from loadtest.agreement import differs
from loadtest.arrivals import constant, poisson
from loadtest.launch import Server
from loadtest.limits import cpu
from loadtest.limits.bare_loop import BareLoop, Timing, bare_loop
from loadtest.observed import Floats
from loadtest.open_loop import Attack, Generator

POOL = 1_000  # requests
UNLOADED_RATE = 20.0  # a second
UNHURRIED_MS = 10_000
TOLERANCE = 1e-5  # of scores: what the contract allows
MOST_BROKEN = 3  # runs in which the service gave something up, before there is no measurement
SEARCH_HOT_S = 1.0  # of kernels before each run of the search
STAGES = ("retrieval", "preranking", "reranking", "selection")


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long it all takes: pairs of runs, seconds of each run, how close the search gets, answers compared."""

    rounds: int = 5
    hot_s: float = 3.0
    loaded_s: float = 10.0
    unloaded_s: float = 10.0
    search_s: float = 10.0
    within: float = 0.05
    compared: int = 50


QUICK = Lengths(rounds=2, hot_s=0.3, loaded_s=1.5, unloaded_s=1.0, search_s=2.0, within=0.25, compared=10)


@dataclass(frozen=True, slots=True)
class Load:
    """One run of the service: CPU a request in all and by part, latencies, its stages' means; in milliseconds.

    sent_late_ms: 99th percentile of the generator's own lateness, which is in the latencies.
    """

    n: int
    cpu_ms: float
    cpu_parts_ms: dict[str, float]
    p50_ms: float
    p99_ms: float
    stage_ms: dict[str, float]
    sent_late_ms: float


@dataclass(frozen=True, slots=True)
class Ratio:
    """The median over the rounds, and the least and the most."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Ratio":
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class Limits:
    """All runs, in order. hot and paced have one more than loaded and unloaded. highest_rate: None if not searched.

    search_cpu_ms: the kernels' CPU before each run of the search.
    """

    rate: float
    unloaded_rate: float
    highest_rate: float | None
    hot: list[Timing]
    loaded: list[Load]
    paced: list[Timing]
    unloaded: list[Load]
    left_out: dict[str, int]
    search_cpu_ms: list[float] = field(default_factory=list)
    cores: int = os.cpu_count() or 1

    @property
    def cpu_ratio(self) -> Ratio:
        """CPU a request of the whole service at `rate` / of the kernels, hot."""
        return Ratio.of(over_neighbours([r.cpu_ms for r in self.loaded], [r.cpu_ms for r in self.hot]))

    @property
    def p50_ratio(self) -> Ratio:
        """p50 of the service / of the kernels, both at `unloaded_rate`."""
        return Ratio.of(over_neighbours([r.p50_ms for r in self.unloaded], [r.p50_ms for r in self.paced]))

    @property
    def p99_over_p50(self) -> Ratio:
        """Of the service at `rate`."""
        return Ratio.of([r.p99_ms / r.p50_ms for r in self.loaded])

    @property
    def share_of_kernel_bound(self) -> float | None:
        """highest_rate × CPU seconds of the kernels while it was searched / cores."""
        if self.highest_rate is None:
            return None
        return self.highest_rate * statistics.median(self.search_cpu_ms) / 1e3 / self.cores


def measure_limits(
    bundle: Path,
    bodies: Sequence[bytes],
    say: Callable[[str], None],
    *,
    rate: float | None = None,
    unloaded_rate: float = UNLOADED_RATE,
    lengths: Lengths = Lengths(),
    workers: int = os.cpu_count() or 1,
    kernels_of: Path | None = None,
    tolerance: float = TOLERANCE,
    **settings: str,
) -> Limits:
    """One measurement of one bundle. rate: of the loaded runs; half of the highest, which is searched, if None.

    kernels_of: the bundle whose kernels are run, where the service's was made from it and its re-ranker cut.
    tolerance: how far a score may be from the kernels'; a re-ranker in eight bits gives other scores than they do.
    settings: of the service, as in launch.service. Raises: RuntimeError where kernels and service don't agree, where
    none of the requests can be timed, or where the service gives up quality again and again.
    """
    with bare_loop(kernels_of or bundle, bodies) as kernels, launch.service(bundle, workers, **settings) as server:
        if kernels.left_out:
            say(f"  left out: {kernels.left_out}")
        compare(server, kernels, lengths.compared, tolerance)
        return in_rounds(kernels, server, say, rate, unloaded_rate, lengths, is_searched=rate is None)


def measure_by_hand(
    bundle: Path,
    bodies: Sequence[bytes],
    say: Callable[[str], None],
    rate: float,
    *,
    unloaded_rate: float = UNLOADED_RATE,
    lengths: Lengths = Lengths(),
    processes: int = os.cpu_count() or 1,
    is_searched: bool = True,
) -> Limits:
    """The same of the server that is glued by hand, at the rates that the service had. is_searched: its highest, too.

    Raises RuntimeError as `measure_limits` does.
    """
    with bare_loop(bundle, bodies) as kernels, launch.by_hand(bundle, processes) as server:
        compare(server, kernels, lengths.compared)
        return in_rounds(kernels, server, say, rate, unloaded_rate, lengths, is_searched=is_searched)


def in_rounds(
    kernels: BareLoop,
    server: Server,
    say: Callable[[str], None],
    rate: float | None,
    unloaded_rate: float,
    lengths: Lengths,
    *,
    is_searched: bool,
) -> Limits:
    """The highest rate if it is searched, then the server loaded and unloaded, the kernels before and after each run.

    rate: half of the highest if None.
    """
    highest: float | None = None
    search_cpu_ms: list[float] = []
    if is_searched:
        highest = capacity.find(
            server if server.admin_port else None,
            lambda due_s: Generator(Attack(server.port, kernels.bodies, due_s)).result(),
            lengths.search_s,
            say,
            within=lengths.within,
            before=lambda: search_cpu_ms.append(kernels.hot(min(SEARCH_HOT_S, lengths.hot_s)).cpu_ms),
        )
    rate = rate or (highest or 0.0) / 2

    def service(due_s: Floats) -> Load | None:
        run = load(server, kernels.bodies, due_s)
        say(f"  service: {run.cpu_ms:.2f} ms CPU, p50 {run.p50_ms:.2f} ms" if run else "  service: gave quality up")
        return run

    def bare(timing: Timing) -> Timing:
        say(f"  kernels: {timing.cpu_ms:.2f} ms CPU, p50 {timing.p50_ms:.2f} ms")
        return timing

    at = itertools.count()  # another draw of the arrivals each time
    say(f"  kernels hot, the service at {rate:.0f}/s")
    hot, loads = in_turn(
        lambda: bare(kernels.hot(lengths.hot_s)),
        lambda: service(poisson(rate, lengths.loaded_s, next(at))),
        lengths.rounds,
    )
    say(f"  both at {unloaded_rate:g}/s")
    paced, unloaded = in_turn(
        lambda: bare(kernels.paced(unloaded_rate, lengths.unloaded_s)),
        lambda: service(constant(unloaded_rate, lengths.unloaded_s)),
        lengths.rounds,
    )
    return Limits(rate, unloaded_rate, highest, hot, loads, paced, unloaded, dict(kernels.left_out), search_cpu_ms)


def compare(server: Server, kernels: BareLoop, n: int, tolerance: float = TOLERANCE) -> None:
    """The service's full answers to n of the requests are the kernels'. Raises RuntimeError that says which isn't."""
    for number in np.unique(np.linspace(0, len(kernels.bodies) - 1, n).astype(int)).tolist():
        given, (full, k) = unhurried(server, kernels.bodies[number]), kernels.answer(number)
        ids = [item["id"] for item in given["items"]]
        scores = np.array([item["score"] for item in given["items"]], np.float32)
        if given["degraded"]:
            why = f"degraded without load: {given['degraded']}"
        elif len(ids) != min(k, len(full.ids)):
            why = f"{len(ids)} items, not {min(k, len(full.ids))}"
        else:
            why = differs(ids, scores, full, tolerance)
        if why:
            raise RuntimeError(f"request {number}: the service's answer isn't the kernels': {why}")


def unhurried(server: Server, body: bytes) -> Any:
    """The answer with ten seconds to make it; asked again where a busy machine had lowered the quality."""
    patient = json.dumps(json.loads(body) | {"timeout_ms": UNHURRIED_MS}).encode()
    for _ in range(MOST_BROKEN):
        answer = server.rank(patient)
        if not answer["degraded"]:
            break
        capacity.settle(server)
    return answer


def load(server: Server, bodies: Sequence[bytes], due_s: Floats) -> Load | None:
    """One run of the service; None if it gave something up, since a narrower answer is cheaper.

    A server without an admin port can't be asked for its stages, nor who of its processes is a worker.
    """
    has_admin = bool(server.admin_port)
    if has_admin:
        capacity.settle(server)
    workers = set(server.workers().values()) if has_admin else set[int]()
    stages_before = stage_sums(server) if has_admin else {}
    generator = Generator(Attack(server.port, bodies, due_s))
    before = cpu.used(server.process.pid)
    seen = generator.result()
    spent = cpu.spent(before, cpu.used(server.process.pid))
    if not capacity.is_whole(seen):
        return None
    n = int(seen.is_ok.sum())
    after = stage_sums(server) if has_admin else {}
    gone = {s: np.subtract(sums, stages_before[s]) for s, sums in after.items()}
    return Load(
        n=n,
        cpu_ms=spent.total_s / n * 1e3,
        cpu_parts_ms={part: s / n * 1e3 for part, s in parts(spent, server.process.pid, workers).items()},
        p50_ms=seen.percentile_s(50) * 1e3,
        p99_ms=seen.percentile_s(99) * 1e3,
        stage_ms={stage: float(seconds / count) * 1e3 for stage, (seconds, count) in gone.items()},
        sent_late_ms=float(np.quantile(seen.sent_late_s, 0.99)) * 1e3,
    )


def parts(spent: cpu.Spent, main: int, workers: set[int]) -> dict[str, float]:
    """CPU seconds by who used them; they add up to all.

    The event loop is the main process's first thread. Threads that the system knows by no name of their own (it does
    from Python 3.14 on) are "other threads": those of the stages, and the log's.
    """
    named = {name for pid, tid, name in spent.threads if (pid, tid) == (main, main)}
    found = {"event loop": 0.0, "other threads": spent.processes[main], "workers": 0.0, "other processes": 0.0}
    for (pid, tid, name), seconds in spent.threads.items():
        if pid == main and (tid == main or name not in named):
            part = "event loop" if tid == main else f"threads {re.sub(r'[-_ ]?[0-9]+$', '', name)}"
            found[part] = found.get(part, 0.0) + seconds
            found["other threads"] -= seconds  # what remains has no name, or has ended
    for pid, seconds in spent.processes.items():
        if pid != main:
            found["workers" if pid in workers else "other processes"] += seconds
    return found


def stage_sums(server: Server) -> dict[str, tuple[float, float]]:
    """Seconds that each stage has taken so far, and how often it ran."""
    names = ("winnow_stage_seconds_sum", "winnow_stage_seconds_count")
    return {s: (server.metric(names[0], stage=s), server.metric(names[1], stage=s)) for s in STAGES}


def in_turn(
    kernels: Callable[[], Timing], service: Callable[[], Load | None], rounds: int
) -> tuple[list[Timing], list[Load]]:
    """Kernels, service, kernels, service, …, kernels. Raises RuntimeError when too many of the service's runs fail."""
    bare, loads, broken = [kernels()], list[Load](), 0
    while len(loads) < rounds:
        given = service()
        after = kernels()
        if given:
            loads.append(given)
            bare.append(after)
        else:
            bare[-1], broken = after, broken + 1
            if broken > MOST_BROKEN:
                raise RuntimeError("the service gives up quality or answers at this rate: its CPU says nothing")
    return bare, loads


def over_neighbours(service: Sequence[float], kernels: Sequence[float]) -> list[float]:
    """Each of the service's n over the mean of the two of the kernels' n + 1 right before and right after it."""
    return [mine * 2 / (a + b) for mine, (a, b) in zip(service, itertools.pairwise(kernels), strict=True)]
