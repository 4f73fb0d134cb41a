"""The door to the funnel: who may run now, and why not.

It owns the life of the process as requests see it (starting, serving, draining), the permits, and a short queue for
them; the rules are control/admission.py and control/quality.py. Quality goes first: only at its floor, or at the hard
limit, is anybody refused. Who would find no room is refused before it is a task (`has_room`, asked by api.refusal); the
queue is for those who name a priority, or who come together.
"""

import asyncio
import time
from bisect import insort
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from enum import StrEnum

from app.control.admission import PRIORITY_SHARE, Admission, most_in_time
from app.control.quality import Quality, at_depth
from app.errors import CapacityError, require
from app.metrics import Metrics

WAIT_SHARE = 0.01  # of the SLA that a request may wait for a permit: enough for an order by priority
AIM = 0.85  # of the SLA, where quality puts its percentile: a client's clock starts before ours and ends after it
QUEUE_SHARE = 0.25  # of the limit that may wait


class Phase(StrEnum):
    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"


class Gate:
    """Gives permits, and steers quality and their number by what became of those who had one."""

    def __init__(self, most: int, sla_s: float, metrics: Metrics) -> None:
        self.most, self.sla_s = most, sla_s
        self.quality, self.admission = Quality(), Admission(most, sla_s)
        self.phase = Phase.STARTING
        # Those that are coming have found room, and will ask for a permit in a moment.
        self.n_workers, self.inflight, self.coming = 1, 0, 0
        # With its priority; the highest first, and of one priority the oldest.
        self.waiting: list[tuple[str, asyncio.Future[None]]] = []
        self._is_idle = asyncio.Event()
        metrics.inflight.set_function(lambda: self.inflight)
        metrics.quality.set_function(self.quality_now)
        metrics.admission_limit.set_function(lambda: self.admission.permits)

    @asynccontextmanager
    async def permit(self, priority: str) -> AsyncIterator[None]:
        """The right to run, for the length of the block. Raises CapacityError.

        Everybody queues, and is let in at once if there is room.
        """
        require(self.phase is Phase.SERVING, f"the service is {self.phase.value}", CapacityError)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        insort(self.waiting, (priority, turn), key=lambda waiter: -PRIORITY_SHARE[waiter[0]])
        self._let_in()
        if len(self.waiting) > max(1.0, QUEUE_SHARE * self.admission.permits):
            self.waiting[-1][1].cancel()
        try:
            if not turn.done():
                await asyncio.wait([turn], timeout=WAIT_SHARE * self.sla_s)
            if turn.cancelled() or not turn.done():
                raise self.refusal()
            yield
        finally:
            turn.cancel()  # too late for who was let in
            if not turn.cancelled():
                self.inflight -= 1
            self._let_in()

    def quality_now(self) -> float:
        """The quality of a request that comes, or is begun, now."""
        return min(self.quality.now(time.monotonic()), at_depth((self.inflight - self.n_workers) / self.admission.most))

    def has_room(self) -> bool:
        """Whether a request of normal priority could get a permit now, or is answered otherwise."""
        return self._may_enter("normal", self.inflight + self.coming) or self.phase is not Phase.SERVING

    def refusal(self) -> CapacityError:
        """What a request without a permit is told; counts as one that was late."""
        self.quality.finished(time.monotonic(), is_in_time=False)
        return CapacityError(f"{self.inflight} requests are in flight; no permit for this priority")

    def expects(self, floor_s: float, n_workers: int) -> None:
        """What stages and workers take for a request at quality's floor; more than fit an SLA are never let in."""
        self.n_workers, self.admission.most = max(n_workers, 1), min(self.most, most_in_time(self.sla_s, floor_s))

    def finished(self, began_at: float, latency_s: float, extra_s: float) -> None:
        """A request of the service's own SLA ended; extra_s: what its full widths would have taken on top.

        That it was slow says that the floor isn't enough only if it began when the backlog of better days was gone.
        """
        now = time.monotonic()
        is_at_floor = self.quality.is_at_floor(now) and self.quality.floored_at + self.sla_s <= began_at
        self.admission.finished(now, latency_s, self.inflight, is_at_floor=is_at_floor)
        self.quality.finished(now, is_in_time=latency_s + extra_s <= AIM * self.sla_s)

    def _let_in(self) -> None:
        """Give permits that are free to those who wait, in their order."""
        self.waiting = [waiter for waiter in self.waiting if not waiter[1].done()]  # without those who gave up
        while self.waiting and self._may_enter(self.waiting[0][0], self.inflight):
            _, turn = self.waiting.pop(0)
            self.inflight += 1
            turn.set_result(None)
        if not self.inflight:
            self._is_idle.set()

    def _may_enter(self, priority: str, inflight: int) -> bool:
        return self.admission.may_enter(inflight, priority, is_at_floor=self.quality.is_at_floor(time.monotonic()))

    async def drain(self, limit_s: float) -> bool:
        """No new permits; wait for those in flight. False if some were still running after limit_s."""
        self.phase = Phase.DRAINING
        if self.inflight:
            self._is_idle.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._is_idle.wait(), limit_s)
        return not self.inflight
