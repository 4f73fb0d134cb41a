"""Then refusal: how many requests may run at once when narrowing is no longer enough. A pure rule.

    limit <- limit + 1 / limit     for a request that ended well inside the SLA while the limit was in use
    limit <- inflight · share      for one that didn't, at most once an SLA; share = comfort · SLA / latency
    limit <= most                  beyond which no answer in time can be hoped for, whatever the quality

By Little's law so many requests as `inflight · share` would have had that latency cut to what is comfortable.

One less request in a hundred is turned away late rather than early: what is refused is refused at once, what is let
in is answered in time. At quality's floor low priority may fill half of the permits, normal nine tenths, high all of
them; above it whoever comes first may, since what gives way there is quality.
"""

from dataclasses import dataclass

LOWEST = 4.0  # permits: below it the cores idle between two requests
STEEPEST = 0.5  # share of the permits that one slow request leaves at least
COMFORT = 0.4  # of the SLA: the rest is for what varies, so that 99 of 100 that are let in are in time
IN_LOOP_S = 2e-3  # that a request takes the event loop: parsing, handing out shards, the answer
SLACK = 1.6  # times what is in time at the floor, since in the loop most take less than that
PRIORITY_SHARE = {"low": 0.5, "normal": 0.9, "high": 1.0}


def most_in_time(sla_s: float, floor_s: float) -> float:
    """Beyond how many in flight an answer in time can't be hoped for, by Little's law: slack · SLA / (loop + floor).

    floor_s: what a request takes the stages and workers at quality's floor.
    """
    return max(LOWEST, SLACK * sla_s / (IN_LOOP_S + floor_s))


@dataclass(slots=True)
class Admission:
    """An adaptive concurrency limit. most: permits there are at all; sla_s: seconds; limit: none until one is slow."""

    most: float
    sla_s: float
    limit: float = float("inf")
    backed_off_at: float = 0.0

    @property
    def permits(self) -> float:
        """The limit in force at quality's floor."""
        return min(self.limit, self.most)

    def may_enter(self, inflight: int, priority: str, *, is_at_floor: bool) -> bool:
        """Whether one more may run. Above quality's floor only the hard limit refuses."""
        limit = self.permits * PRIORITY_SHARE[priority] if is_at_floor else self.most
        return inflight < max(1.0, limit)

    def finished(self, now: float, latency_s: float, inflight: int, *, is_at_floor: bool) -> None:
        """A request ended after so many seconds, with so many in flight (itself included)."""
        if latency_s <= COMFORT * self.sla_s:
            if 2 * inflight >= self.limit or not is_at_floor:
                self.limit = max(self.limit, min(self.most, self.limit + 1 / self.limit))
        elif is_at_floor and now - self.backed_off_at > self.sla_s:
            share = max(STEEPEST, COMFORT * self.sla_s / latency_s)
            self.limit = max(LOWEST, min(self.limit, inflight) * share)
            self.backed_off_at = now
