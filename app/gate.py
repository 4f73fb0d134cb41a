"""The door to the funnel: who may run now, and why not.

It owns the life of the process as requests see it (starting, serving, draining) and the permits. It refuses at
once and never queues here: a request that waits spends its own deadline.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum

from app.errors import CapacityError
from app.metrics import Metrics

# Share of the permits that a priority may fill: when something must go, low goes first.
PRIORITY_SHARE = {"low": 0.5, "normal": 0.9, "high": 1.0}


class Phase(StrEnum):
    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"


class Gate:
    """Counts what is in flight. `limit` permits in all."""

    def __init__(self, limit: int, metrics: Metrics) -> None:
        self.limit, self.metrics = limit, metrics
        self.phase = Phase.STARTING
        self.inflight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        metrics.admission_limit.set(limit)

    @contextmanager
    def permit(self, priority: str) -> Iterator[None]:
        """The right to run, for the length of the block. Raises CapacityError."""
        if self.phase is not Phase.SERVING:
            raise CapacityError(f"the service is {self.phase.value}")
        if self.inflight >= max(1, int(self.limit * PRIORITY_SHARE[priority])):
            raise CapacityError(f"{self.inflight} requests are in flight; no permit for priority {priority}")
        self._count(+1)
        try:
            yield
        finally:
            self._count(-1)

    def _count(self, change: int) -> None:
        self.inflight += change
        self.metrics.inflight.set(self.inflight)
        if self.inflight:
            self._idle.clear()
        else:
            self._idle.set()

    async def drain(self, limit_s: float) -> bool:
        """No new permits; wait for those in flight. False if some were still running after limit_s."""
        self.phase = Phase.DRAINING
        try:
            await asyncio.wait_for(self._idle.wait(), limit_s)
        except TimeoutError:
            return False
        return True
