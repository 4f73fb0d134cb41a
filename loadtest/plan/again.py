"""What the machine is like by now, told by the calibration's own configuration, which stays up and is asked again.

What a request takes it, over what the calibration's line says for cores as busy as those were, is how much slower the
machine is. It is asked for seconds, after others had the cores, and takes another CPU then than in the longer runs of a
calibration, whose caches are its own. What that usually is over their line is found between these runs (`Briefly`), in
the same manner: after a few seconds in which another service had the cores. Found after them, it held what the machine
had become meanwhile (0.84 in a minute that was quicker than the calibration's, and all that was predicted from it was a
sixth too slow); found after a pause in which nobody had them, it was 1.02, and all CPU was predicted 6 to 16 % too high
(both 2026-11-28).

What p99s lie above medians is the calibration's, of its longer runs, in which as little was taken by a hypervisor as in
those that are predicted: in a few seconds after others it was 1.6 times the simulated where the calibration's was 1.24.

Times when it is asked, and what is predicted with it, are bench.py's; the arithmetic is fit.py's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from loadtest import launch
from loadtest.plan import fit, measure
from loadtest.plan.calibration import Calibration, CalibrationError, Loaded

ASKED_S, AFTER = (1.0, 3.0), 2  # seconds, the first to get warm; calls of a search between two askings


@dataclass
class Again:
    """The calibration's own configuration, asked again between a row's runs: what the machine is like by now.

    due: calls until it is asked. met: how slow, since that was last asked for.
    """

    server: launch.Server
    bodies: Sequence[bytes]
    calibrated: Calibration
    due: int = 0
    seed: int = 0
    met: list[float] = field(default_factory=list)

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
        now = asked(measure.aim(self.server, self.bodies), self.rate, self.seed)
        if fit.is_usable(now):
            self.met.append(fit.slower(self.calibrated, now) / (self.calibrated.briefly or 1.0))

    def slower(self) -> float:
        """The median of what was met; from here on it is met anew. Raises RuntimeError where nothing was."""
        found, self.met, self.due = self.met, [], 0
        if not found:
            raise RuntimeError("the calibrated configuration could not be asked again: the machine is too busy")
        return float(np.median(found))


@dataclass
class Briefly:
    """Asks a service that is being calibrated after each run that it held, at that run's rate, as Again asks it later.

    What it takes is told over the calibration's line, which knows the rate.
    others: called with the rate before; another service has the cores meanwhile.
    """

    others: Callable[[float], object]
    met: list[Loaded] = field(default_factory=list)

    def __call__(self, target: measure.Target, rate: float) -> None:
        self.others(rate)
        self.met.append(asked(target, rate, len(self.met)))

    def over(self, calibrated: Calibration) -> float:
        """What it took, over what the line of this calibration says: the median. Raises CalibrationError."""
        found = [fit.slower(calibrated, one) for one in self.met if fit.is_usable(one)]
        if not found:
            raise CalibrationError("between the runs of the calibration the service could not be asked")
        return float(np.median(found))


def asked(target: measure.Target, rate: float, seed: int) -> Loaded:
    """What a service took in a few seconds, once it was warm. Raises RuntimeError."""
    measure.metered(target, rate, ASKED_S[0], seed=seed)
    return measure.metered(target, rate, ASKED_S[1], seed=seed)[1]
