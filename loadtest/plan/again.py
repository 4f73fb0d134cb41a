"""What the machine is like by now, told by the calibration's own configuration, which stays up and is asked again.

What a request takes it, over what the calibration's line says for cores as busy as those were, is how much slower the
machine is. How many times as far its p99 lies above its median as it does in the simulation is what stalls add: all
that was met so far, over simulations of machines as slow as it was each time. (One simulation, of a machine as slow as
by now, said 2.0 in quick minutes and 1.1 in slow ones, of the same requests.)

It is asked for seconds, after a pause in which others had the cores, and takes another CPU then than in the longer runs
of a calibration. What that usually is over their line is found between these runs
(`Briefly`): found after them, it held what the machine had become meanwhile (0.84 on 2026-11-28, in a minute that was
quicker than the calibration's, and all that was predicted from it was a sixth too slow).

Times when it is asked, and what is predicted with it, are bench.py's; the arithmetic is fit.py's.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import ArrayLike

from loadtest import launch
from loadtest.observed import Floats, Observed
from loadtest.plan import fit, measure
from loadtest.plan.calibration import Calibration, CalibrationError, Loaded
from loadtest.plan.recipe import Model, model

ASKED_S, AFTER = (1.0, 3.0), 2  # seconds, the first to get warm; calls of a search between two askings
SIMULATED = 3  # times what was asked, for the simulation's own noise


@dataclass
class Again:
    """The calibration's own configuration, asked again between a row's runs: what the machine is like by now.

    due: calls until it is asked. met: how slow, since that was last asked for. latency_s, simulated_s: of all its
    requests so far, and as simulated.
    """

    server: launch.Server
    bodies: Sequence[bytes]
    calibrated: Calibration
    due: int = 0
    seed: int = 0
    met: list[float] = field(default_factory=list)
    latency_s: list[float] = field(default_factory=list)
    simulated_s: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        rates = sorted(one.rate for one in self.calibrated.loaded)
        return rates[len(rates) // 2]

    def __call__(self) -> None:
        """Between two steps of a search; asks at the first call and then at every second. Raises RuntimeError."""
        if not self.due:
            self.ask()
        self.due = (self.due or AFTER) - 1

    def ask(self) -> None:
        """Now. Raises RuntimeError."""
        self.seed += 1
        seen, now = asked(measure.aim(self.server, self.bodies), self.rate, self.seed)
        if fit.is_usable(now):
            slower = fit.slower(self.calibrated, now) / (self.calibrated.briefly or 1.0)
            self.met.append(slower)
            self.latency_s += seen.latency_s[seen.is_ok].tolist()
            here = model(replace(self.calibrated, stretch=1.0), self.calibrated.base, scale=slower, has_client=True)
            self.simulated_s += simulated_s(here, seen.due_s, self.rate).tolist()

    def slower(self) -> float:
        """The median of what was met; from here on it is met anew. Raises RuntimeError where nothing was."""
        found, self.met, self.due = self.met, [], 0
        if not found:
            raise RuntimeError("the calibrated configuration could not be asked again: the machine is too busy")
        return float(np.median(found))

    def now(self) -> Calibration:
        """The calibration with the tail that the machine has by now: as it was, where nothing was met yet."""
        if not self.latency_s:
            return self.calibrated
        return replace(self.calibrated, stretch=fit.stretch([_ends(self.latency_s)], [_ends(self.simulated_s)]))


@dataclass
class Briefly:
    """Asks a service that is being calibrated after each run that it held, at that run's rate, after a pause.

    What it takes is told over the calibration's line, which knows the rate.
    """

    pause_s: float
    met: list[Loaded] = field(default_factory=list)

    def __call__(self, target: measure.Target, rate: float) -> None:
        time.sleep(self.pause_s)
        self.met.append(asked(target, rate, len(self.met))[1])

    def over(self, calibrated: Calibration) -> float:
        """What it took, over what the line of this calibration says: the median. Raises CalibrationError."""
        found = [fit.slower(calibrated, one) for one in self.met if fit.is_usable(one)]
        if not found:
            raise CalibrationError("between the runs of the calibration the service could not be asked")
        return float(np.median(found))


def asked(target: measure.Target, rate: float, seed: int) -> tuple[Observed, Loaded]:
    """What a service met and took in a few seconds, once it was warm. Raises RuntimeError."""
    measure.metered(target, rate, ASKED_S[0], seed=seed)
    return measure.metered(target, rate, ASKED_S[1], seed=seed)


def simulated_s(model: Model, due_s: Floats, rate: float) -> Floats:
    """Latencies of a run's own arrivals, several times over: chance in who comes when isn't the machine's.

    due_s: f64[n]; where it falls a part of the run begins, on a service with nothing to do.
    """
    parts = np.split(due_s, np.flatnonzero(np.diff(due_s) < 0) + 1)
    seeds = range(SIMULATED)
    return np.concatenate([model.of(part, rate, seed).latency_s for part in parts for seed in seeds])


def _ends(latency_s: ArrayLike) -> tuple[float, float]:
    """p50 and p99."""
    p50_s, p99_s = np.percentile(latency_s, (50, 99)).tolist()
    return p50_s, p99_s
