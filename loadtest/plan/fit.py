"""The two numbers of a machine that show only under load: `contention` and `wake_s`. Pure.

What a request takes is metered one request at a time. Under load its CPU is another: cores that are all busy disturb
each other, and caches stay warm; `contention` is by how much a core is slower, or under 0 faster, when the others work.
`wake_s` is how long who wakes waits for a core. Both are chosen so that the simulation of the loaded runs, at speeds
they met, comes nearest to what was measured of them: the CPU a request, which tells of the first, and p50 and
p99. Nearest by the mean absolute log ratio, on a grid that is made finer twice; of p50s and p99s over the better four
fifths, since one run in five meets a stall that is nobody's load.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from loadtest.plan.calibration import Calibration, Loaded
from loadtest.plan.recipe import CLIENT, model

CONTENTION = (-0.5, 0.6)  # above it two cores would do little more than one
WAKE_S = (0.0, 6e-3)  # up to two of the scheduler's turns
GRID, ROUNDS = 5, 3
BETTER = 0.8  # of p50s and p99s, which count
LEAST_COVERAGE = 0.98  # of a run: a narrowed funnel is another configuration
MOST_P99_S = 0.2  # beyond it a queue grew, and a run's length decides its figures
MOST_SECONDS = 20.0  # simulated of each run


def fit(calibration: Calibration) -> Calibration:
    """The calibration with both numbers, and with the error that is left."""
    runs = [run for run in calibration.loaded if is_usable(run)]
    if not runs:
        return calibration
    spans = [CONTENTION, WAKE_S]
    best = (float("inf"), 0.0, 0.0)
    for _ in range(ROUNDS):
        tried = [(c, w) for c in np.linspace(*spans[0], GRID) for w in np.linspace(*spans[1], GRID)]
        best = min(best, *((error(calibration, runs, float(c), float(w)), float(c), float(w)) for c, w in tried))
        spans = [_around(best[1], spans[0], CONTENTION), _around(best[2], spans[1], WAKE_S)]
    return replace(calibration, contention=best[1], wake_s=best[2], error=best[0])


def is_usable(run: Loaded) -> bool:
    """Whether it says something of the full funnel and of cores that hold the load."""
    return run.coverage >= LEAST_COVERAGE and 0 < run.p99_s <= MOST_P99_S


def error(calibration: Calibration, runs: Sequence[Loaded], contention: float, wake_s: float) -> float:
    """How far the simulation is from the runs: the mean of |ln(simulated / measured)|, see above."""
    tried = replace(calibration, contention=contention, wake_s=wake_s)
    of_time, of_cpu = [], []
    for run in runs:
        scale = scale_of(tried, run)
        base = replace(tried, demand=replace(tried.demand, client_s=run.client_s / scale))
        seen = model(base, tried.base, scale=scale, has_client=True).at(run.rate, min(run.seconds, MOST_SECONDS))
        of_time += [seen.percentile_s(50) / run.p50_s, seen.percentile_s(99) / run.p99_s]
        of_cpu.append(sum(seen.cpu_s[:CLIENT]) / len(seen.latency_s) / run.cpu_s)
    off = np.sort(np.abs(np.log(of_time)))
    return float(off[: max(1, round(BETTER * len(off)))].mean() + np.abs(np.log(of_cpu)).mean())


def scale_of(calibration: Calibration, run: Loaded) -> float:
    """How much slower than the calibration's reference the machine was in a run."""
    return float(np.mean(run.speeds)) / calibration.speed_s


def _around(at: float, span: tuple[float, float], allowed: tuple[float, float]) -> tuple[float, float]:
    """Half of the span, around what was best of it, inside what is allowed."""
    quarter = (span[1] - span[0]) / 4
    return max(allowed[0], at - quarter), min(allowed[1], at + quarter)
