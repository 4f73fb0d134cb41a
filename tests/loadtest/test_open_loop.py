"""The generator: latency from the intended instant, what a failure is called, what it keeps of an answer."""

import asyncio
import json
import time

import numpy as np
import pytest

from loadtest import open_loop
from loadtest.arrivals import constant
from loadtest.observed import BROKEN, SILENT, UNREACHABLE, joined, parse, percentile_s
from loadtest.open_loop import Attack, Generator, fly
from tests.loadtest.servers import ok, serving
from tests.running import free_port

ANSWER = {
    "generation": "tiny@1#abc",
    "items": [
        {"id": 7, "score": 0.5, "stage": "reranking", "propensity": 1.0},
        {"id": 3, "score": None, "stage": "preranking", "propensity": 1.0},
    ],
    "coverage": {"wanted": 8, "reranked": 2, "shards_ok": 1, "shards": 2},
    "degraded": [{"stage": "reranking", "reason": "partial", "substitute": "x"}],
    "expected_ndcg_loss": 0.25,
}


def answering(*said: bytes):
    """Says these in turn, then the last again and again."""
    left = list(said)

    async def answer() -> bytes:
        return left.pop(0) if len(left) > 1 else left[0]

    return answer


async def test_a_stall_is_seen_by_everybody_who_was_due_in_it():
    """40 a second for 4 s; the server stalls from 1 s to 2 s. Those due in it, a quarter, wait evenly between 1 s
    and 0: longer than w wait (1 - w) / 4 of all, which is a tenth for w = 0.6 s."""
    loop, over, count = asyncio.get_running_loop(), asyncio.Event(), 0

    async def stalls_once() -> bytes:
        nonlocal count
        count += 1
        if count == 40:
            loop.call_later(1.0, over.set)
        if count >= 40:
            await over.wait()
        return ok()

    async with serving(stalls_once) as port:
        seen, _ = await fly(Attack(port, [b"{}"], constant(40, 4)))
    assert seen.is_ok.all()
    # A reading that waits for answers says a few ms. A busy machine adds to the stall and takes nothing from it.
    assert seen.percentile_s(90) >= 0.59
    assert seen.percentile_s(50) < 0.59
    in_it = (seen.due_s >= 1) & (seen.due_s < 1.95)
    assert (seen.latency_s[in_it] >= 1.97 - seen.due_s[in_it]).all()


async def test_it_is_awake_before_an_instant_unless_something_is_under_way(monkeypatch):
    """Alone; a moment after another; when it would be awake while another is under way."""
    monkeypatch.setattr(open_loop, "EARLY_S", 0.2)
    monkeypatch.setattr(open_loop, "FAR_S", 0.25)
    instants, took_s, begun_late_s = (time.monotonic() + np.array([0.5, 0.51, 1.4])).tolist(), (0.3, 0.8, 0.1), []

    async def send(i: int) -> None:
        begun_late_s.append(time.monotonic() - instants[i])
        await asyncio.sleep(took_s[i])

    await open_loop._on_time(send, instants)
    assert begun_late_s[0] < 0 <= min(begun_late_s[1:])


async def test_none_is_sent_too_soon():
    begun, started = [], []

    async def answer() -> bytes:
        begun.append(time.monotonic())
        return ok()

    async with serving(answer) as port:
        seen, _ = await fly(Attack(port, [b"{}"], np.array([0.1, 0.1005, 0.2])), started.append)
    assert seen.is_ok.all()
    assert (seen.sent_late_s >= 0).all()
    assert (np.array(begun) - started[0] >= seen.due_s).all()


async def test_nothing_listening_is_unreachable_and_its_latency_is_kept():
    seen, _ = await fly(Attack(free_port(), [b"{}"], constant(100, 0.05)))
    assert seen.error == [UNREACHABLE] * 5
    assert (seen.status == 0).all() and (seen.latency_s > 0).all()


async def test_a_connection_that_breaks_and_one_that_says_nothing_are_told_apart():
    async def never() -> bytes:
        await asyncio.get_running_loop().create_future()
        raise AssertionError

    async with serving(answering(b"")) as port:
        seen, _ = await fly(Attack(port, [b"{}"], np.zeros(1)))
        assert seen.error == [BROKEN]
    async with serving(never) as port:
        seen, _ = await fly(Attack(port, [b"{}"], np.zeros(1), patience_s=0.05))
        assert seen.error == [SILENT]


async def test_refusals_keep_their_status_and_when_to_come_back():
    refusal = b"HTTP/1.1 503 X\r\nretry-after: 2\r\ncontent-length: 0\r\n\r\n"
    async with serving(answering(refusal, ok())) as port:
        seen, _ = await fly(Attack(port, [b"{}"], constant(10, 0.2)))
    assert (seen.status.tolist(), seen.retry_after.tolist()) == ([503, 200], [2, -1])
    assert seen.is_ok.tolist() == [False, True]


async def test_answers_become_columns():
    async with serving(answering(ok(json.dumps(ANSWER).encode()), ok())) as port:
        seen, raw = await fly(Attack(port, [b"{}", b"{ }"], constant(10, 0.2)))
    parse(seen, raw)
    assert seen.generation == ["tiny@1#abc", ""]
    assert seen.cause == ["reranking partial", ""]
    assert seen.coverage.tolist() == [2 / 8, 1]  # nothing wanted is all of it
    assert seen.ids == [[7, 3], []]
    assert seen.is_fresh[0].tolist() == [True, False]
    assert seen.scores[0][0] == 0.5 and np.isnan(seen.scores[0][1])
    assert seen.expected_loss[0] == 0.25 and np.isnan(seen.expected_loss[1])
    assert seen.body.tolist() == [0, 1]
    both = joined([seen, seen])
    assert len(both) == 4 and both.cause == ["reranking partial", ""] * 2 and both.wall_s == 2 * seen.wall_s
    assert both.stolen_s == 2 * seen.stolen_s >= 0


async def test_a_generator_runs_in_a_process_of_its_own():
    async with serving(answering(ok(json.dumps(ANSWER).encode()))) as port:
        attack = Attack(port, [b"{}"], constant(100, 0.1))
        generator = await asyncio.to_thread(Generator, attack)
        seen = await asyncio.to_thread(generator.result)
    assert seen.is_ok.sum() == 10
    assert seen.started_at == generator.started_at
    assert 0 < seen.cpu_s < 5
    assert seen.is_degraded.all()


async def test_a_generator_that_fails_says_why():
    with pytest.raises(RuntimeError, match="the generator failed: ZeroDivision"):
        await asyncio.to_thread(lambda: Generator(Attack(1, [], constant(100, 0.1))).result())


def test_percentiles_are_kept_to_three_digits():
    latencies = np.arange(1, 1_001) / 1e3
    assert percentile_s(latencies, 99) == pytest.approx(0.990, rel=1e-3)
    assert np.isnan(percentile_s(np.empty(0), 99))
