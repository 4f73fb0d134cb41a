"""The numbers of a machine that show only under load: `warmth`, `wake_s` and `stretch`. Pure.

What a request takes is metered one request at a time. Under load its CPU is another: on cores that idle in between
caches are cold, on busy ones they are warm, but neighbours are in the way. `warmth` is a line through the CPU a request
that was metered in the loaded runs, over what the demand says at the speeds they met, by how busy the cores were.
`wake_s` is how long who wakes waits for a turn while all cores are busy: chosen so that the simulation of those runs
that weren't near the most the cores can do comes nearest to their p50s and p99s, by the mean absolute log ratio, on a
grid that is made finer; over the better four fifths of these figures, since one run in five meets a stall that is
nobody's load. `stretch` is what then is left of those stalls: how much farther over their median the measured p99s are
than the simulated ones, the mean of the logarithms over these runs.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from loadtest.plan.calibration import Calibration, Loaded
from loadtest.plan.recipe import model

WARMTH = (0.5, 2.0)  # of the demand, on idle and on busy cores
WAKE_S = (0.0, 1e-2)  # up to a few of the scheduler's turns
GRID, ROUNDS = 7, 3
BETTER = 0.8  # of p50s and p99s, which count
SPREAD = 0.25  # of the cores: runs less different say what the CPU is, but not how it changes
LEAST_COVERAGE = 0.98  # of a run: a narrowed funnel is another configuration
MOST_P99_S = 0.2  # beyond it a queue grew, and a run's length decides its figures
EASY_P99_S = 0.06  # up to which latencies tell of waits for a core, and not of a queue that a small error would change
STRETCH = (1.0, 1.5)  # at least, for stalls only add; at most: a p99 of a thousand requests is a tenth off by chance
LEAST_OVER_S = 1e-6  # a p99 that is the median says nothing of how far it lies over it
MOST_SECONDS = 20.0  # simulated of each run


def fit(calibration: Calibration) -> Calibration:
    """The calibration with both, and with the error that is left."""
    runs = [run for run in calibration.loaded if is_usable(run)]
    if not runs:
        return calibration
    warm = replace(calibration, warmth=warmth(calibration, runs))
    runs = [run for run in runs if run.p99_s <= EASY_P99_S] or runs
    span, best = WAKE_S, (float("inf"), 0.0)
    for _ in range(ROUNDS):
        best = min(best, *((error(warm, runs, float(w)), float(w)) for w in np.linspace(*span, GRID)))
        step = (span[1] - span[0]) / (GRID - 1)
        span = max(WAKE_S[0], best[1] - step), min(WAKE_S[1], best[1] + step)
    fitted = replace(warm, wake_s=best[1])
    stretched = replace(fitted, stretch=stretch(fitted, runs))
    return replace(stretched, error=error(stretched, runs, best[1]))


def is_usable(run: Loaded) -> bool:
    """Whether it says something of the full funnel and of cores that hold the load."""
    return run.coverage >= LEAST_COVERAGE and 0 < run.p99_s <= MOST_P99_S


def warmth(calibration: Calibration, runs: Sequence[Loaded]) -> tuple[float, float]:
    """What a request's CPU is of the demand on idle cores, and what is added to that on busy ones."""
    busy = np.array([run.rate * (run.cpu_s + run.client_s) / calibration.cores for run in runs])
    alone = [
        sum(model(calibration, calibration.base, scale=scale_of(calibration, run)).means().values()) for run in runs
    ]
    ratio = np.array([run.cpu_s for run in runs]) / alone
    if np.ptp(busy) < SPREAD:
        return float(np.clip(ratio.mean(), *WARMTH)), 0.0
    more, cold = np.polyfit(busy, ratio, 1)
    cold, hot = np.clip([cold, cold + more], *WARMTH)
    return float(cold), float(hot - cold)


def error(calibration: Calibration, runs: Sequence[Loaded], wake_s: float) -> float:
    """How far the simulation is from the runs: the mean of |ln(simulated / measured)|, see above."""
    tried, of_time = replace(calibration, wake_s=wake_s), []
    for run in runs:
        p50_s, p99_s = _simulated(tried, run)
        of_time += [p50_s / run.p50_s, p99_s / run.p99_s]
    off = np.sort(np.abs(np.log(of_time)))
    return float(off[: max(1, round(BETTER * len(off)))].mean())


def stretch(calibration: Calibration, runs: Sequence[Loaded]) -> float:
    """How much farther over the median the measured p99s are than the simulated."""
    over = []
    for run in runs:
        p50_s, p99_s = _simulated(calibration, run)
        over.append(max(run.p99_s - run.p50_s, LEAST_OVER_S) / max(p99_s - p50_s, LEAST_OVER_S))
    return float(np.clip(np.exp(np.log(over).mean()), *STRETCH))


def _simulated(calibration: Calibration, run: Loaded) -> tuple[float, float]:
    """p50 and p99 that a run should have had, seconds."""
    scale = scale_of(calibration, run)
    base = replace(calibration, demand=replace(calibration.demand, client_s=run.client_s / scale))
    seen = model(base, base.base, scale=scale, has_client=True).at(run.rate, min(run.seconds, MOST_SECONDS))
    return seen.percentile_s(50), seen.percentile_s(99)


def scale_of(calibration: Calibration, run: Loaded) -> float:
    """How much slower than the calibration's reference the machine was in a run."""
    return run.speed_s / calibration.speed_s
