"""What work costs here and now: seconds for n items, measured while serving. Pure: numbers in, numbers out.

    seconds(n) = scale · (fixed + per_item · n)

`fixed` and `per_item` are measured once, in the warm-up; `scale` follows what requests meet afterwards. It tracks
a quantile and not a mean: one request that met a pause of 50 ms must not make the next twenty narrow.
"""

import math
from dataclasses import dataclass
from typing import Protocol

from app.flow import Outcome, StageReport

QUANTILE = 0.8  # of the time that work takes: a width chosen by the median would be late every other time
STEP = 0.05  # of one observation, in log seconds: 14 slow ones in a row double the estimate
LARGEST = math.log(1e3)  # of the scale either way; a clock that jumps moves it no further


class Estimate(Protocol):
    """What work is expected to cost here and now."""

    def fits(self, budget_s: float) -> int:
        """How many items are expected to be done in so many seconds."""

    def seconds(self, n: int) -> float:
        """What n items are expected to take."""


@dataclass(slots=True)
class Cost:
    """The running estimate of one kind of work. fixed, per_item: seconds, not both 0."""

    fixed: float
    per_item: float
    log_scale: float = 0.0

    def seconds(self, n: float) -> float:
        return math.exp(self.log_scale) * (self.fixed + self.per_item * n)

    def fits(self, budget_s: float) -> int:
        """0 when the fixed part doesn't fit."""
        return max(0, int(min((budget_s / math.exp(self.log_scale) - self.fixed) / max(self.per_item, 1e-12), 1e9)))

    def observe(self, n: int, seconds: float) -> None:
        """n items took so long.

        log scale <- log scale + step · quantile          if it was slower than estimated
                     log scale - step · (1 - quantile)    otherwise
        """
        moved = self.log_scale + STEP * (QUANTILE if seconds > self.seconds(n) else QUANTILE - 1)
        self.log_scale = min(LARGEST, max(-LARGEST, moved))

    def learn(self, report: StageReport, way_s: float = 0.0) -> None:
        """A stage of a search in the catalogue is over, and took `way_s` besides: observed where it did all it was to.

        A filter that leaves few makes the search find fewer than it looked for.
        """
        if report.done >= report.wanted or report.outcome is Outcome.PARTIAL:
            self.observe(report.done, report.seconds + way_s)


def fitted(narrow: tuple[int, float], wide: tuple[int, float]) -> Cost:
    """The cost through two measurements (items, seconds); the fixed part is never negative."""
    (n, narrow_s), (m, wide_s) = narrow, wide
    per_item = max(0.0, (wide_s - narrow_s) / (m - n)) if m > n else wide_s / max(m, 1)
    per_item = min(per_item, wide_s / max(m, 1))
    return Cost(max(wide_s - per_item * m, 1e-9), max(per_item, 1e-9))
