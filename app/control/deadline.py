"""Deadlines and budgets: pure rules on numbers. The clock is an argument; nobody here looks at one.

A deadline is made once a request, from the moment its first header byte was read, and is an absolute instant
of the process's monotonic clock. A budget is the share of the whole timeout by whose end a stage must have
answered; shares, not milliseconds, so that a request with a shorter timeout shortens every stage alike.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Deadline:
    """When the answer must leave. Both in seconds; `started_at` on the monotonic clock."""

    started_at: float
    timeout_s: float

    def limit(self, share: float, now: float, reserve_s: float) -> float:
        """Seconds a stage may still take whose budget ends at `share` of the timeout.

        `reserve_s` is kept back for what comes after the last stage (selection, writing the answer);
        never more than three tenths of the timeout, else a short timeout would leave no time at all.
        """
        most_s = self.timeout_s - min(reserve_s, 0.3 * self.timeout_s)
        return max(0.0, self.started_at + min(share * self.timeout_s, most_s) - now)
