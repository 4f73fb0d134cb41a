"""The two numbers of a machine that no meter shows, from runs under load: `contention` and `wake_s`. Pure.

What a request takes, everybody's CPU, is metered one request at a time. What cores lose to each other, and how long
who wakes waits for one, shows only under load. Both are chosen so that the simulation of the loaded runs, at the speeds
that those met, comes nearest to the p50 and p99 measured: by the mean absolute log ratio over the better four fifths of
them, on a grid that is made finer twice: one run in five meets a stall of the machine that is nobody's load.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from loadtest.plan.calibration import Calibration, Loaded
from loadtest.plan.recipe import latencies, model

CONTENTION = (-0.4, 0.6)  # under 0 busy cores gain: caches stay warm; above 0.6 two cores would do less than one
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
    """How far the simulation is from the runs: the mean of |ln(simulated / measured)| over the better four fifths."""
    tried = replace(calibration, contention=contention, wake_s=wake_s)
    ratios = []
    for run in runs:
        base = replace(tried, demand=replace(tried.demand, client_s=run.client_s / scale_of(tried, run)))
        scales = [speed / tried.speed_s for speed in run.speeds]
        models = [model(base, tried.base, scale=scale, has_client=True) for scale in scales]
        met = latencies(models, run.rate, min(run.seconds, MOST_SECONDS))
        ratios += [np.percentile(met, 50) / run.p50_s, np.percentile(met, 99) / run.p99_s]
    off = np.sort(np.abs(np.log(ratios)))
    return float(off[: max(1, round(BETTER * len(off)))].mean())


def scale_of(calibration: Calibration, run: Loaded) -> float:
    """How much slower than the calibration's reference the machine was in a run."""
    return float(np.mean(run.speeds)) / calibration.speed_s


def _around(at: float, span: tuple[float, float], allowed: tuple[float, float]) -> tuple[float, float]:
    """Half of the span, around what was best of it, inside what is allowed."""
    quarter = (span[1] - span[0]) / 4
    return max(allowed[0], at - quarter), min(allowed[1], at + quarter)
