"""The capacity of a running service: the highest rate at which it is quick, and gives nothing up.

It owns what that means: unless other bars are asked for, p99 of Poisson arrivals within 50 ms, all answered, quality 1
when a run begins and a mean coverage of .99 over it. The way through the rates is search.py's.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from loadtest import launch, search
from loadtest.arrivals import poisson
from loadtest.observed import Floats, Observed

EASY_S = 0.05  # p99 at the capacity
LEAST_COVERAGE, LEAST_ANSWERED = 0.99, 0.999
FIRST_GUESS = 50.0  # a second
RECOVERY_S = 30.0  # to wait for a recovery before giving up on it
NARROWED = "narrowed_by_load"  # the reason of a degradation that a quality under 1 gives


@dataclass(frozen=True, slots=True)
class Bars:
    """What a run must keep. narrowed: at most so many of the answers were narrowed by load; late_s: p99 of the
    generator's own lateness, which is in the latencies.
    """

    p99_s: float = EASY_S
    answered: float = LEAST_ANSWERED
    coverage: float = LEAST_COVERAGE
    narrowed: float = 1.0
    late_s: float = math.inf

    def are_met(self, seen: Observed) -> bool:
        return not self.missed(seen)

    def missed(self, seen: Observed) -> list[str]:
        """Of a run, in words."""
        answered, p99_s = float(seen.is_ok.mean()), seen.percentile_s(99)
        late_s = float(np.quantile(seen.sent_late_s, 0.99))
        bars = {
            f"answered {answered:.4f} < {self.answered:g}": answered >= self.answered,
            f"coverage {covered(seen):.4f} < {self.coverage:g}": covered(seen) >= self.coverage,
            f"p99 {p99_s * 1e3:.1f} ms > {self.p99_s * 1e3:g}": p99_s <= self.p99_s,
            f"narrowed by load {narrowed(seen):.4f} > {self.narrowed:g}": narrowed(seen) <= self.narrowed,
            f"the generator itself was late, by {late_s * 1e3:.1f} ms > {self.late_s * 1e3:g}": late_s <= self.late_s,
        }
        return [what for what, is_met in bars.items() if not is_met]


class HasMetrics(Protocol):
    """A service whose admin port can be asked: launch.Server, and lab/target.py's Target."""

    def metric(self, name: str, **labels: str) -> float: ...


def find(
    server: HasMetrics | None,
    attack: Callable[[Floats], Observed],
    seconds: float,
    say: Callable[[str], None],
    *,
    within: float = 0.05,
    before: Callable[[], None] = lambda: None,
    bars: Bars = Bars(),
    start: float = FIRST_GUESS,
    growth: float = search.GROWTH,
) -> float:
    """Requests a second, to a relative `within`. `attack` sends at such instants; `before` is called before each run.

    server: None where it can't be asked for its quality; then `before` sees to it.
    Raises: RuntimeError when there is no such rate.
    """

    def holds(rate: float) -> bool:
        if server:
            settle(server)
        before()
        seen = attack(poisson(rate, seconds))
        missed, p99_ms = bars.missed(seen), seen.percentile_s(99) * 1e3
        holding = f"not held: {', '.join(missed)}" if missed else "held"
        say(f"  {rate:.0f}/s: p99 {p99_ms:.1f} ms, coverage {covered(seen):.3f}: {holding}")
        return not missed

    rate = search.highest_rate(holds, start, within=within, growth=growth)
    if not rate:
        raise RuntimeError(f"no rate has p99 <= {bars.p99_s * 1e3:g} ms at the whole width")
    say(f"  capacity: {rate:.0f} a second")
    return rate


def is_whole(seen: Observed) -> bool:
    """Nearly everything was answered, and at nearly the whole width."""
    return bool(seen.is_ok.mean() >= LEAST_ANSWERED and covered(seen) >= LEAST_COVERAGE)


def covered(seen: Observed) -> float:
    """Mean coverage of what was answered, 0 if nothing was."""
    return float(seen.coverage[seen.is_ok].mean()) if seen.is_ok.any() else 0.0


def narrowed(seen: Observed) -> float:
    """The share of what was answered that was narrowed by load, 0 if nothing was answered."""
    narrow = np.array([any(c.endswith(NARROWED) for c in causes) for causes in seen.causes], np.bool_)
    return float(narrow[seen.is_ok].mean()) if len(narrow) and seen.is_ok.any() else 0.0


def settle(server: HasMetrics) -> float:
    """Wait until the service runs at full quality; the seconds it took."""
    return launch.wait_for(lambda: server.metric("winnow_quality") >= 1, RECOVERY_S, "full quality")
