"""The numbers of a machine that show only under load: warmth, busiest, lone, wake_s, beyond_s, stretch. Pure.

What a request takes is metered one request at a time. Under load its CPU is another: on cores that idle in between
caches are cold, on busy ones they are warm, but neighbours are in the way. `warmth` is a line through the CPU a request
that was metered in the loaded runs, over what the demand says, by how busy the cores were. It ends at the busiest of
them: gone on with, it said .66 for cores without a pause where .95 had been met at 55 %, and three highest rates were
14 to 30 % too high (2026-11-28).

`lone` is the median of what a request took one worker, over what it took the base's at the same rate: .93 and .94 on
two cores, where two, three, four and six workers took within 4 % of each other (2026-11-28). One has a core for itself,
and finds its caches as it left them.

The medians of those runs that leave the cores some time say two things more. `beyond_s` is what every latency holds
that nobody meters: the kernel's way from the generator and back, cores that wake up. `wake_s` is how long who wakes
waits for a turn while all cores are busy: the shortest with which, and with the best `beyond_s` for it, the simulated
medians come nearest to the measured, by the mean absolute log ratio, on a grid that is made finer. Medians alone, since
p99s also hold the stalls of the machine, which are nobody's load: `stretch` is how much farther over their median the
measured p99s are than the simulated ones, the median over these runs.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from loadtest.plan.calibration import MOST_STRETCH, Calibration, Loaded
from loadtest.plan.recipe import model

WARMTH = (0.5, 2.0)  # of the demand, on idle and on busy cores
WAKE_S = (0.0, 1e-2)  # up to a few of the scheduler's turns
GRID, ROUNDS, ALIKE = 7, 2, 0.004  # beyond half a millisecond medians hardly move: a longer wait must show
LONE = (0.7, 1.2)  # one worker's CPU for a request over several workers': beyond, something else ran meanwhile
SPREAD = 0.25  # of the cores: runs less different say what the CPU is, but not how it changes
LEAST_COVERAGE = 0.98  # of a run: a narrowed funnel is another configuration
MOST_P99_S = 0.2  # beyond it a queue grew, and a run's length decides its figures
EASY = 0.75  # of the cores' time, up to which latencies tell of waits for a core, and not of a queue that is touchy
LEAST_OVER_S = 1e-4  # a p99 so close to its median says nothing of how far it lies over it
MOST_SECONDS = 20.0  # simulated of each run
TIMES = 8  # that a run is simulated for its p99: of a thousand requests it is a tenth off by chance


def fit(calibration: Calibration) -> Calibration:
    """The calibration with all of them, and with the error that is left."""
    runs = [run for run in calibration.loaded if is_usable(run)]
    if not runs:
        return calibration
    busiest = min(1.0, max(run.work for run in runs) / calibration.cores)
    warm = replace(calibration, warmth=warmth(calibration, runs), busiest=busiest, lone=lone(runs))
    runs = [run for run in runs if run.work <= EASY * calibration.cores] or runs[:1]
    wake_s, beyond_s = waits(warm, runs)
    fitted = replace(warm, wake_s=wake_s, beyond_s=beyond_s)
    simulated = [_simulated(fitted, run) for run in runs]
    wide = stretch([(run.p50_s, run.p99_s) for run in runs], simulated)
    return replace(fitted, stretch=wide, n_fitted=len(runs), error=error(runs, simulated, wide))


def is_usable(run: Loaded) -> bool:
    """Whether it says something of the full funnel and of cores that hold the load."""
    return run.coverage >= LEAST_COVERAGE and 0 < run.p99_s <= MOST_P99_S


def warmth(calibration: Calibration, runs: Sequence[Loaded]) -> tuple[float, float]:
    """What a request's CPU is of the demand on idle cores, and what is added to that, times the share that is busy."""
    busy = np.array([run.work / calibration.cores for run in runs])
    ratio = np.array([run.cpu_s for run in runs]) / _alone_s(calibration)
    if np.ptp(busy) < SPREAD:
        return float(np.clip(ratio.mean(), *WARMTH)), 0.0
    more, cold = np.polyfit(busy, ratio, 1)
    busiest = min(1.0, float(busy.max()))
    cold, hot = np.clip([cold, cold + more * busiest], *WARMTH)
    return float(cold), float(hot - cold) / busiest


def lone(runs: Sequence[Loaded]) -> float:
    """What a request takes one worker, of what it takes the base's; 1 where none was asked."""
    shares = [run.lone_s / run.cpu_s for run in runs if run.lone_s]
    return float(np.clip(np.median(shares), *LONE)) if shares else 1.0


def slower(calibration: Calibration, run: Loaded) -> float:
    """How much slower the machine was in this run, of the base configuration, than in the calibration: by its CPU."""
    cold, more = calibration.warmth
    return run.cpu_s / (_alone_s(calibration) * (cold + more * min(calibration.busiest, run.work / calibration.cores)))


def _alone_s(calibration: Calibration) -> float:
    """CPU of a request of the base configuration, one at a time."""
    return sum(model(calibration, calibration.base).means().values())


def waits(calibration: Calibration, runs: Sequence[Loaded]) -> tuple[float, float]:
    """wake_s, the shortest that does as well as any, nearly; and beyond_s with it."""
    span, tried = WAKE_S, dict[float, tuple[float, float]]()
    measured = np.array([run.p50_s for run in runs])

    def off(wake_s: float) -> tuple[float, float]:
        with_it = replace(calibration, wake_s=wake_s)
        simulated = np.array([_simulated(with_it, run, 1)[0] for run in runs])
        beyond_s = max(0.0, float(np.median(measured - simulated)))
        return float(np.abs(np.log((simulated + beyond_s) / measured)).mean()), beyond_s

    def shortest() -> float:
        least = min(far for far, _ in tried.values())
        return min(w for w, (far, _) in tried.items() if far <= least + ALIKE)

    for _ in range(ROUNDS):
        tried |= {float(w): off(float(w)) for w in np.linspace(*span, GRID) if float(w) not in tried}
        step = (span[1] - span[0]) / (GRID - 1)
        span = max(WAKE_S[0], shortest() - step), min(WAKE_S[1], shortest() + step)
    return shortest(), tried[shortest()][1]


def stretch(measured: Sequence[tuple[float, float]], simulated: Sequence[tuple[float, float]]) -> float:
    """How much farther over the median the measured p99s are than the simulated; 1 where no run has any distance.

    measured, simulated: p50 and p99 of each run, seconds.
    """
    distances = [(one[1] - one[0], other[1] - other[0]) for one, other in zip(measured, simulated, strict=True)]
    over = [one / other for one, other in distances if min(one, other) > LEAST_OVER_S]
    return float(np.clip(np.median(over), 1 / MOST_STRETCH, MOST_STRETCH)) if over else 1.0


def error(runs: Sequence[Loaded], simulated: Sequence[tuple[float, float]], stretch: float) -> float:
    """How far the stretched simulation is from p50s and p99s: the mean of |ln(simulated / measured)|."""
    off = []
    for run, (p50_s, p99_s) in zip(runs, simulated, strict=True):
        off += [p50_s / run.p50_s, (p50_s + stretch * (p99_s - p50_s)) / run.p99_s]
    return float(np.abs(np.log(off)).mean())


def _simulated(calibration: Calibration, run: Loaded, times: int = TIMES) -> tuple[float, float]:
    """p50 and p99 that a run should have had, seconds: means over several; runs of one rate share arrivals."""
    base = replace(calibration, demand=replace(calibration.demand, client_s=run.client_s))
    here = model(base, base.base, has_client=True)
    first = TIMES * round(run.rate)
    seen = [here.at(run.rate, min(run.seconds, MOST_SECONDS), first + i) for i in range(times)]
    p50s, p99s = ([one.percentile_s(p) for one in seen] for p in (50, 99))
    return float(np.mean(p50s)), float(np.mean(p99s))
