"""Deadlines: pure rules on numbers. The clock is an argument; nobody here looks at one.

A deadline is made once a request, from the moment its first header byte was read, and is an absolute instant
of the process's monotonic clock. Stages have no shares of the timeout: a request that had to wait has used nobody's,
and what is left of its time is for whoever needs it.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Deadline:
    """When the answer must leave. Both in seconds; `started_at` on the monotonic clock."""

    started_at: float
    timeout_s: float

    def limit(self, now: float, reserve_s: float) -> float:
        """Seconds that are left to all stages.

        `reserve_s` is kept back for what comes after the last stage (selection, writing the answer);
        never more than three tenths of the timeout, else a short timeout would leave no time at all.
        """
        return max(0.0, self.started_at + self.timeout_s - min(reserve_s, 0.3 * self.timeout_s) - now)
