"""A discrete-event simulation of requests that go through stations and share the cores of one machine. Pure.

    arrivals ─▶ step ─▶ step ─▶ …      a step: a station, CPU seconds, parts side by side, then a pause without CPU

A station has so many servers and one queue, first come first served. What is being served shares the cores: with more
at work than cores each gets its share by the scheduler's weights, never more than one core. A step of several parts is
over when the last of them is. Who begins when all cores are busy also waits to be put on one, until its turn comes
(`wake_s`) or a core is free: schedulers let who runs finish a turn. So does a job that follows another in its station
at once, though a process would go straight on.

It knows nothing of funnels: what a request's steps are is recipe.py's. The same numbers in give the same numbers out.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
NEVER = float("inf")


@dataclass(frozen=True, slots=True)
class Station:
    """servers: at once. weight: of the scheduler, 1 is a process of niceness 0; 0 takes no core (an accelerator)."""

    name: str
    servers: int
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Machine:
    """wake_s: mean wait for a turn on a core while all are busy, seconds, exponential."""

    cores: int
    wake_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Step:
    """work: CPU seconds, f64[n] or, for parts that run side by side, f64[n, parts]. pause: seconds after it, f64[n].

    holds: of one part; whoever did it takes nothing else before the next step is over (which says that it is free).
    """

    station: int
    work: Floats
    pause: Floats | None = None
    holds: bool = False


@dataclass(frozen=True, slots=True)
class Simulated:
    """arrived_s, latency_s: f64[n], the second from the first. cpu_s: seconds that cores were held, by station; busy:
    mean cores busy."""

    arrived_s: Floats
    latency_s: Floats
    cpu_s: tuple[float, ...]
    busy: float

    def percentile_s(self, p: float) -> float:
        return float(np.percentile(self.latency_s, p))


def simulate(
    arrivals: Floats, steps: Sequence[Step], stations: Sequence[Station], machine: Machine, seed: int = 0
) -> Simulated:
    """Run all requests to their end. One long function: as local variables its state costs half the time.

    Args:
        arrivals: seconds, f64[n], rising.
    Returns: their latencies, in the order of arrival.
    """
    n, n_steps, n_stations = len(arrivals), len(steps), len(stations)
    works = [step.work.reshape(n, -1).tolist() for step in steps]
    pauses = [None if step.pause is None else step.pause.tolist() for step in steps]
    of_step, holds = [step.station for step in steps], [step.holds for step in steps]
    waits = iter(np.random.default_rng(seed).exponential(machine.wake_s, 4096).tolist() * (1 + n * n_steps // 1024))
    free = [station.servers for station in stations]
    queues: list[deque[tuple[float, int, int]]] = [deque() for _ in stations]
    # Everybody in a station runs at one speed: who ends first is who needs least, on the station's own clock.
    clocks, running = [0.0] * n_stations, [0] * n_stations
    ends: list[list[tuple[float, int, int]]] = [[] for _ in stations]
    speed = _Speeds(stations, machine)
    later: list[tuple[float, int, int, int]] = []  # (when, 0 a step begins / 1 a turn on a core, request, step or wait)
    woken: dict[int, tuple[int, float, int, int]] = {}  # who waits for a core, by number of the wait: the oldest first
    numbers = count()
    left, finished = [0] * n, np.zeros(n)
    times, following, now = arrivals.tolist(), 0, 0.0
    (speeds, shares), held = speed(running), [0.0] * n_stations

    def begin(request: int, at: int) -> None:
        """A step's parts go to its station."""
        station, parts = of_step[at], works[at][request]
        left[request] = len(parts)
        for work in parts:
            if free[station]:
                free[station] -= 1
                serve(station, work, request, at)
            else:
                queues[station].append((work, request, at))

    def release(station: int) -> None:
        if queues[station]:
            serve(station, *queues[station].popleft())
        else:
            free[station] += 1

    def serve(station: int, work: float, request: int, at: int) -> None:
        if machine.wake_s and stations[station].weight and sum(running) >= machine.cores:
            number = next(numbers)
            woken[number] = station, work, request, at
            heappush(later, (now + next(waits), 1, request, number))
        else:
            run(station, work, request, at)

    def run(station: int, work: float, request: int, at: int) -> None:
        running[station] += 1
        heappush(ends[station], (clocks[station] + work, request, at))

    everybody = range(n_stations)
    while following < n or later or any(running):
        due, where = NEVER, -1
        for s in everybody:
            if running[s]:
                takes = (ends[s][0][0] - clocks[s]) / speeds[s]
                if takes < due:
                    due, where = takes, s
        due = now + due if due > 0 else now  # rounding may have left less than nothing
        arrival = times[following] if following < n else NEVER
        waiting = later[0][0] if later else NEVER
        before, now = now, min(due, arrival, waiting)
        passed = now - before
        for s in everybody:
            if running[s]:
                clocks[s] += passed * speeds[s]
                held[s] += passed * running[s] * shares[s]
        if due <= arrival and due <= waiting:
            _, request, at = heappop(ends[where])
            running[where] -= 1
            if woken and sum(running) < machine.cores:
                run(*woken.pop(next(iter(woken))))
            if not holds[at]:
                release(where)
            if at and holds[at - 1]:
                release(of_step[at - 1])
            left[request] -= 1
            if not left[request]:
                pause = pauses[at]
                if pause is not None and pause[request] > 0:
                    heappush(later, (now + pause[request], 0, request, at + 1))
                elif at + 1 < n_steps:
                    begin(request, at + 1)
                else:
                    finished[request] = now
        elif waiting <= arrival:
            _, is_wait, request, at = heappop(later)
            if is_wait:
                if at in woken:  # else a core was free before
                    run(*woken.pop(at))
            elif at < n_steps:
                begin(request, at)
            else:
                finished[request] = now
        else:
            following += 1
            begin(following - 1, 0)
        speeds, shares = speed(running)
    return Simulated(arrivals, finished - arrivals, tuple(held), sum(held) / now if now else 0.0)


class _Speeds:
    """How fast each station's jobs run, and which share of a core each holds, by how many run in each; remembered."""

    def __init__(self, stations: Sequence[Station], machine: Machine) -> None:
        self.weights = [station.weight for station in stations]
        self.machine = machine
        self.known: dict[tuple[int, ...], tuple[list[float], list[float]]] = {}

    def __call__(self, running: list[int]) -> tuple[list[float], list[float]]:
        key = tuple(running)
        found = self.known.get(key)
        if found is None:
            found = self.known[key] = self._of(running)
        return found

    def _of(self, running: list[int]) -> tuple[list[float], list[float]]:
        """Cores by weight, at most one each: who would get more leaves the rest to the others."""
        shares = [0.0 if weight else 1.0 for weight in self.weights]
        hungry = [s for s, count in enumerate(running) if count and self.weights[s]]
        cores = float(self.machine.cores)
        while hungry:
            each = cores / sum(running[s] * self.weights[s] for s in hungry)
            full = [s for s in hungry if each * self.weights[s] >= 1]
            if not full:
                for s in hungry:
                    shares[s] = each * self.weights[s]
                break
            for s in full:
                shares[s] = 1.0
                cores -= running[s]
                hungry.remove(s)
        return shares, [share if weight else 0.0 for share, weight in zip(shares, self.weights, strict=True)]
