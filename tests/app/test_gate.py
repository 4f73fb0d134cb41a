"""The door: who gets a permit, who waits for one, who goes first, and what is learnt from those who had one."""

import asyncio
import math

import pytest

from app.control.quality import FLOOR, Quality
from app.errors import CapacityError
from app.gate import QUEUE_SHARE, Gate, Phase
from app.metrics import Metrics

MOST, SLA_S = 256, 1_000.0  # so long that nobody's wait ends by itself


@pytest.fixture
def gate() -> Gate:
    """Serving, at the floor of quality and full for everybody: 8 permits."""
    gate = Gate(MOST, SLA_S, Metrics(SLA_S, {}))
    gate.phase = Phase.SERVING
    gate.quality = Quality(FLOOR, at=math.inf)  # time alone doesn't lift it
    gate.admission.limit = 8.0
    return gate


class Caller:
    """One request: enters, holds its permit until it is told to leave."""

    def __init__(self, gate: Gate, priority: str = "high") -> None:
        self.entered, self.leave = asyncio.Event(), asyncio.Event()
        self.task = asyncio.create_task(self.run(gate, priority))

    async def run(self, gate: Gate, priority: str) -> None:
        async with gate.permit(priority):
            self.entered.set()
            await self.leave.wait()


async def fill(gate: Gate, n: int = 8) -> list[Caller]:
    callers = [Caller(gate) for _ in range(n)]
    for caller in callers:
        await caller.entered.wait()
    return callers


async def go(*callers: Caller) -> None:
    for caller in callers:
        caller.leave.set()
    await asyncio.gather(*(c.task for c in callers))


async def test_who_waits_gets_the_permit_that_comes_back(gate):
    inside = await fill(gate)
    waiting = Caller(gate)
    await asyncio.sleep(0)
    assert not waiting.entered.is_set()
    await go(inside[0])
    await waiting.entered.wait()
    assert gate.inflight == 8
    await go(waiting, *inside[1:])
    assert gate.inflight == 0


async def test_the_highest_priority_is_let_in_first_then_the_oldest(gate):
    inside = await fill(gate)
    gate.admission.limit = 16.0  # room in the queue for four
    gate.inflight += 8
    low, normal, first, second = (Caller(gate, p) for p in ("low", "normal", "high", "high"))
    await asyncio.sleep(0)
    gate.inflight -= 7  # as if those had left
    await go(inside.pop())
    await first.entered.wait()
    await second.entered.wait()
    await normal.entered.wait()
    gate.inflight -= 1
    await go(first, second, normal, *inside)
    await low.entered.wait()
    await go(low)


async def test_a_full_queue_turns_away_the_lowest_priority_that_came_last(gate):
    inside = await fill(gate)
    assert QUEUE_SHARE * 8 == 2
    low, high, normal = Caller(gate, "low"), Caller(gate), Caller(gate, "normal")
    with pytest.raises(CapacityError, match="8 requests are in flight"):
        await low.task
    newest = Caller(gate, "normal")
    with pytest.raises(CapacityError):
        await newest.task
    assert not normal.task.done()
    await go(*inside)
    await go(high, normal)


async def test_a_wait_ends_in_a_refusal_and_leaves_nothing_behind(gate):
    gate.sla_s = 1e-3
    inside = await fill(gate)
    with pytest.raises(CapacityError):
        await Caller(gate).task
    assert gate.waiting == []
    await go(*inside)
    assert gate.inflight == 0


async def test_a_caller_that_leaves_while_it_waits_takes_no_permit(gate):
    inside = await fill(gate)
    waiting = Caller(gate)
    await asyncio.sleep(0)
    waiting.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting.task
    await go(*inside)
    assert (gate.inflight, gate.waiting) == (0, [])


async def test_a_caller_that_leaves_as_it_is_let_in_gives_its_permit_back(gate):
    inside = await fill(gate)
    waiting = Caller(gate)
    await asyncio.sleep(0)
    inside[0].leave.set()
    await inside[0].task  # now the permit is the waiting caller's, who doesn't know it yet
    waiting.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting.task
    await go(*inside[1:])
    assert gate.inflight == 0


async def test_a_refusal_keeps_quality_at_its_floor(gate):
    gate.sla_s = 1e-3
    gate.quality = Quality(FLOOR + 0.05, at=math.inf)
    inside = await fill(gate)
    with pytest.raises(CapacityError):
        await Caller(gate).task
    assert gate.quality.value == FLOOR
    await go(*inside)


async def test_above_the_floor_nobody_is_refused_below_the_hard_limit(gate):
    gate.quality = Quality()
    await go(*await fill(gate, 100))


async def test_beside_whom_many_wait_is_narrowed_by_their_number(gate):
    gate.quality, gate.admission.most, gate.n_workers = Quality(at=math.inf), 20.0, 3
    assert gate.quality_now() == 1.0
    callers = await fill(gate, 11)  # eight wait: halfway between three and five tenths of 20
    assert gate.quality_now() == pytest.approx((1 + FLOOR) / 2)
    gate.n_workers = 8  # they would be at work
    assert gate.quality_now() == 1.0
    gate.n_workers = 3
    gate.quality = Quality(0.3, at=math.inf)  # the smaller holds
    assert gate.quality_now() == pytest.approx(0.3)
    for caller in callers:
        caller.leave.set()
        await caller.task
    assert gate.quality.value == pytest.approx(0.3)


async def test_what_the_full_widths_would_have_taken_counts_against_quality(gate):
    gate.quality = Quality()
    gate.finished(0.0, 0.4 * SLA_S, extra_s=0.4 * SLA_S)
    assert gate.quality.value == 1.0
    gate.finished(0.0, 0.4 * SLA_S, extra_s=0.5 * SLA_S)
    assert gate.quality.value < 1.0


async def test_what_began_with_the_backlog_of_better_days_takes_no_permits(gate):
    gate.quality = Quality(FLOOR, at=math.inf, floored_at=10 * SLA_S)
    gate.finished(10.9 * SLA_S, 0.9 * SLA_S, extra_s=0.0)
    assert gate.admission.limit == 8
    gate.finished(11.1 * SLA_S, 0.9 * SLA_S, extra_s=0.0)
    assert gate.admission.limit < 8


async def test_a_slow_request_in_quiet_times_takes_no_permits(gate):
    gate.quality = Quality()
    for at in (1.0, 5.0, 9.0):
        gate.finished(at * SLA_S, 0.7 * SLA_S, extra_s=0.0)
    assert gate.admission.limit == 8


async def test_more_than_an_sla_holds_at_the_floor_are_not_let_in_at_any_quality(gate):
    gate.quality = Quality()
    gate.expects(floor_s=SLA_S, n_workers=2)
    await go(*await fill(gate, 4))
    await fill(gate, 4)
    assert not gate.has_room()
    gate.expects(floor_s=0.0, n_workers=2)
    assert gate.has_room()
    assert gate.admission.most == MOST
