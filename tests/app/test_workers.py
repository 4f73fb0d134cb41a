"""Worker processes: the same ranking whatever their number, the right answer to the right caller, and faults."""

import asyncio
import os
import signal
import time
from collections import Counter
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import orjson
import pytest
import pytest_asyncio

from app import wire
from app.bundle import load
from app.control.costs import Cost
from app.control.deadline import Deadline
from app.errors import InvalidRequest, ServerError, StageFailed
from app.flow import Degradation, Outcome, Sent, Stage, Told
from app.funnel import Funnel, offline_funnel
from app.stages import reranking
from app.warmup import offline_query, rank_offline
from app.workers.messages import FORMAT, Kind, read_frames
from app.workers.pool import EARLY_S, SAVED_S, WorkerPool
from app.workers.process import FORKS, begin
from app.workers.scoring import Shard
from app.workers.worker import Given
from tests import world

pytestmark = pytest.mark.asyncio(loop_scope="module")
LONG_S = 600.0


class Watched(WorkerPool):
    """A pool that counts what became of its shards, and says when a worker was replaced."""

    def __init__(self, generation, n_workers: int, **more) -> None:
        self.outcomes: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.restarted, self.asked = asyncio.Event(), asyncio.Event()
        self.restarts = SimpleNamespace(inc=self.restarted.set)
        self.rows = SimpleNamespace(labels=lambda work: SimpleNamespace(inc=lambda n: self.sent.update({work: n})))
        super().__init__(generation, n_workers, self, **more)

    def submit(self, shard: Shard, deliver):
        self.asked.set()
        return super().submit(shard, deliver)

    def shard(self, outcome: str, _: float) -> None:
        self.outcomes[outcome] += 1

    async def score(self, shard: Shard):
        """The shard's scores, when they are all there."""
        scores = np.full(len(shard.candidates), np.nan, np.float32)

        def deliver(start: int, sliced) -> None:
            scores[start : start + len(sliced)] = sliced

        await self.submit(shard, deliver)
        return scores


class Trusted(Watched):
    """A pool that takes nobody for hung: on a busy machine anybody may be silent for a second."""

    async def _watch(self) -> None:
        await asyncio.Event().wait()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pools(generation):
    """Pools of 1, 2 and 4 workers."""
    pools = {n: Trusted(generation, n) for n in (1, 2, 4)}
    await asyncio.gather(*(p.start() for p in pools.values()))
    yield pools
    await asyncio.gather(*(p.close() for p in pools.values()))


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of 4 rows, so that 32 candidates are enough for 4 workers."""
    monkeypatch.setattr(reranking, "MIN_SHARD", 4)


def person(number: int, generation, **more):
    return offline_query({"user": {"id": world.USER_IDS[number]}, **more}, generation)


def shard_of(funnel: Funnel, query, until: float) -> Shard:
    return Shard(query.person, funnel.retrieval.search(query, 20), {}, until)


def ignore(start: int, scores) -> None:
    pass


# ------------------------------------------------------------------------------- any number of workers


REQUESTS = [
    {"user": {"id": "ann"}, "k": 32},
    {"user": {"id": "eve"}, "query": {"freshness": 20}, "k": 32},
    {"candidates": [{"id": world.item_id(r), "features": {"bid": r % 7}} for r in range(50)], "k": 32},
    {"user": {"history": [world.item_id(r) for r in (3, 13, 23, 33, 43, 5)], "features": {"age": 9.5}}, "k": 32},
    {"user": {"features": {"occupation": "pilot"}}, "filters": [{"field": "genres", "eq": "horror"}]},
]


@pytest.mark.parametrize("request_", REQUESTS, ids=str)
async def test_the_ranking_is_the_same_for_1_2_and_4_workers_as_in_process(
    pools, generation, funnel, small_shards, request_
):
    query = offline_query(request_, generation)
    alone = await rank_offline(funnel, query)
    for n, pool in pools.items():
        ranking = await rank_offline(Funnel(generation, pool), query)
        report = ranking.reports[Stage.RERANKING]
        assert report.shards == report.shards_ok == max(1, min(n, report.wanted // 4))
        assert ranking.degradations == ()
        assert ranking.rows.tolist() == alone.rows.tolist()
        np.testing.assert_allclose(ranking.scores, alone.scores, rtol=1e-5)


@pytest.mark.parametrize("n_workers", [1, 2, 4])
async def test_many_at_once_get_each_their_own_answer(pools, generation, small_shards, n_workers):
    funnel = Funnel(generation, pools[n_workers])
    queries = [person(i % 5, generation, query={"freshness": i % 3}, k=10) for i in range(60)]
    rankings = await asyncio.gather(*(rank_offline(funnel, q) for q in queries))
    for i, ranking in enumerate(rankings):
        number, freshness = i % 5, i % 3
        history = world.HISTORIES[number]
        scores = world.rerank_scores(history, freshness=freshness, age=world.AGES[number], occupation=1 + number % 2)
        kept = world.best(world.prerank_scores(history), world.RERANK, but=history)
        expected = sorted(kept, key=lambda r, s=scores: -s[r])[:10]
        assert ranking.rows.tolist() == expected
        np.testing.assert_allclose(ranking.scores, scores[expected], rtol=1e-5)


async def test_more_shards_than_workers_wait_their_turn(pools, generation, funnel):
    pool = pools[1]
    shards = [shard_of(funnel, person(n % 5, generation), time.monotonic() + LONG_S) for n in range(20)]
    answers = await asyncio.gather(*(pool.score(s) for s in shards))
    for n, scores in enumerate(answers):
        rows = shards[n].candidates.rows
        expected = world.rerank_scores(world.HISTORIES[n % 5], age=world.AGES[n % 5], occupation=1 + n % 5 % 2)
        np.testing.assert_allclose(scores, expected[rows], rtol=1e-5)


async def test_an_expired_shard_is_not_scored(pools, generation, funnel):
    pool, before = pools[2], pools[2].outcomes["expired"]
    answer = pool.submit(shard_of(funnel, person(0, generation), time.monotonic() - 1), ignore)
    with pytest.raises(StageFailed, match="expired"):
        await answer
    assert pool.outcomes["expired"] == before + 1


async def test_a_shard_nobody_waits_for_is_not_handed_out(pools, generation, funnel):
    pool = pools[1]
    first = pool.submit(shard_of(funnel, person(0, generation), time.monotonic() + LONG_S), ignore)
    given_up = pool.submit(shard_of(funnel, person(1, generation), time.monotonic() + LONG_S), ignore)
    last = pool.submit(shard_of(funnel, person(2, generation), time.monotonic() + LONG_S), ignore)
    given_up.cancel()
    before = pool.outcomes["ok"]
    await asyncio.gather(first, last)
    assert pool.outcomes["ok"] == before + 2


# ---------------------------------------------------------------------------------------------- faults


def is_running(pid: int) -> bool:
    """Not so, too, where nobody has asked for its end yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


async def replaced(pool: Watched) -> None:
    """Wait until every worker of the pool is alive."""
    await asyncio.wait_for(asyncio.gather(*(w.is_ready.wait() for w in pool.workers)), 60)


async def test_a_killed_worker_fails_no_request_and_is_replaced(generation, small_shards):
    pool = Watched(generation, 2)
    await pool.start()
    funnel = Funnel(generation, pool)
    first = pool.pids()
    os.kill(first[0], signal.SIGKILL)
    asked = 0
    while not pool.restarted.is_set():
        ranking = await rank_offline(funnel, person(2, generation))
        assert set(ranking.rows.tolist()) <= set(range(21, 30))  # fresh or carried, of the right person
        assert len(ranking) == world.K
        asked += 1
    await replaced(pool)
    assert asked
    assert pool.pids()[0] != first[0]
    assert pool.pids()[1] == first[1]
    assert (await rank_offline(funnel, person(2, generation))).degradations == ()
    await pool.close()


async def test_the_shard_of_a_dying_worker_is_scored_by_its_successor(generation):
    pool = Watched(generation, 1)
    await pool.start()
    os.kill(pool.pids()[0], signal.SIGSTOP)  # it takes the shard and will not answer
    ranking = asyncio.create_task(rank_offline(Funnel(generation, pool), person(2, generation)))
    await pool.asked.wait()
    os.kill(pool.pids()[0], signal.SIGKILL)
    ranking = await ranking
    report = ranking.reports[Stage.RERANKING]
    assert (report.wanted, report.done, report.outcome) == (32, 32, Outcome.OK)
    assert ranking.rows.tolist() == [21, 22, 23, 24, 25]
    assert (pool.outcomes["lost"], pool.sent["resend"], pool.sent["hedge"]) == (1, 32, 0)
    await pool.close()


async def test_a_spare_gets_the_shards_of_a_worker_four_times_slower_until_that_is_forgiven(generation):
    pool = Watched(generation, 2, spares=1)
    first, second, spare = pool.workers
    for worker in pool.workers:
        worker.is_ready.set()
        worker.transport = SimpleNamespace(is_closing=lambda: False)
        worker.row_s = 1e-5
    assert pool.used == [first, second]
    first.row_s = 3.9e-5
    assert pool.used == [first, second]
    first.row_s = 1e-4
    assert pool.used == [second, spare]
    first.row_s *= 0.99**92  # looks, 18 seconds of them
    assert pool.used == [first, second]
    spare.is_ready.clear()
    first.row_s = 1.0
    assert pool.used == [second, first]  # a slow one is better than none


async def test_a_spare_takes_over_at_once(generation, small_shards):
    pool = Watched(generation, 2, spares=1)
    await pool.start()
    assert (pool.n_workers, len(pool.pids())) == (2, 3)
    os.kill(pool.pids()[1], signal.SIGSTOP)
    ranking = asyncio.create_task(rank_offline(Funnel(generation, pool), person(2, generation)))
    await pool.asked.wait()
    os.kill(pool.pids()[1], signal.SIGKILL)
    assert (await ranking).reports[Stage.RERANKING].done == 32
    assert pool.n_workers == 2
    await replaced(pool)
    await pool.close()


async def test_a_worker_that_hangs_is_late_then_killed_and_replaced(generation):
    pool = Watched(generation, 1)
    await pool.start()
    funnel, pid = Funnel(generation, pool), pool.pids()[0]
    os.kill(pid, signal.SIGSTOP)
    late = await world.rank_by(Deadline(time.monotonic(), 0.5), funnel, person(0, generation))
    assert late.reports[Stage.RERANKING].outcome is Outcome.LATE
    assert Degradation(Stage.RERANKING, "late", "pre-rank scores") in late.degradations
    assert len(late) == world.K
    await asyncio.wait_for(pool.restarted.wait(), 60)  # nobody wakes it
    await replaced(pool)
    assert pool.pids()[0] != pid
    after = await rank_offline(funnel, person(2, generation))
    assert after.rows.tolist() == [21, 22, 23, 24, 25]
    assert after.degradations == ()
    await pool.close()


async def test_a_late_shard_is_hedged_within_the_budget_and_the_first_answer_wins(generation, funnel):
    pool = Watched(generation, 2)
    await pool.start()
    shard = shard_of(funnel, person(2, generation), time.monotonic() + LONG_S)
    os.kill(pool.pids()[0], signal.SIGSTOP)  # it gets the shard: it is the first
    pool.hedges.earn(20 * 20)  # a twentieth of that is the shard
    scores = await pool.score(shard)
    expected = world.rerank_scores((20,), age=40, occupation=1)[shard.candidates.rows]
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
    assert (pool.sent["hedge"], pool.outcomes["lost"]) == (20, 0)
    await pool.close()


async def test_a_shard_that_is_late_while_nobody_is_idle_is_hedged_when_somebody_is(generation, funnel):
    pool = Trusted(generation, 2, given=Given(paced_row_s=0.005))
    await pool.start()
    pool.hedges.earn(10_000)
    os.kill(pool.pids()[0], signal.SIGSTOP)
    shards = [shard_of(funnel, person(who, generation), time.monotonic() + LONG_S) for who in (0, 2)]
    held, other = (pool.submit(shard, lambda *_: None) for shard in shards)
    pool.workers[0].late_at = 0.0
    pool._hand_out()
    assert pool.sent == {"first": 40}
    await other
    assert pool.sent == {"first": 40, "hedge": 20}
    await held
    await pool.close()


@pytest.mark.parametrize("is_given_up", [True, False])
async def test_a_shard_that_nobody_waits_for_is_not_hedged(generation, funnel, is_given_up):
    """It was given up, or its time is over; its worker doesn't hear that it is to stop."""
    pool = Trusted(generation, 2)
    await pool.start()
    pool.hedges.earn(10_000)
    os.kill(pool.pids()[0], signal.SIGSTOP)
    held = pool.submit(shard_of(funnel, person(0, generation), time.monotonic() + LONG_S), lambda *_: None)
    if is_given_up:
        held.cancel()
        await asyncio.gather(held, return_exceptions=True)
    else:
        pool.workers[0].job.until = time.monotonic()
    assert pool.workers[0].job
    pool.workers[0].late_at = 0.0
    pool._hand_out()
    assert pool.sent == {"first": 20}
    await pool.close()


async def test_a_timer_that_rings_a_little_too_soon_is_believed(generation, funnel):
    pool = Trusted(generation, 2)
    await pool.start()
    pool.hedges.earn(10_000)
    os.kill(pool.pids()[0], signal.SIGSTOP)
    held = pool.submit(shard_of(funnel, person(0, generation), time.monotonic() + LONG_S), lambda *_: None)
    pool.workers[0].late_at = time.monotonic() + EARLY_S * 0.9
    pool._hand_out()
    assert pool.sent == {"first": 20, "hedge": 20}
    await held
    await pool.close()


async def test_without_budget_a_late_shard_waits(generation, funnel):
    pool = Watched(generation, 2)
    await pool.start()
    shard = shard_of(funnel, person(2, generation), time.monotonic() + LONG_S)
    os.kill(pool.pids()[0], signal.SIGSTOP)
    await pool.score(shard)  # by the other one, once the first is taken for dead
    assert (pool.sent["hedge"], pool.sent["resend"], pool.outcomes["lost"]) == (0, 20, 1)
    await pool.close()


async def test_a_shard_that_nobody_wants_any_more_frees_its_worker(generation, funnel):
    pool = Watched(generation, 1, given=Given(paced_row_s=60.0))
    await pool.start()
    given_up = pool.submit(shard_of(funnel, person(0, generation), time.monotonic() + LONG_S), ignore)
    given_up.cancel()
    while pool.workers[0].job:  # noqa: ASYNC110  (the pool has no event for it)
        await asyncio.sleep(0)
    assert (pool.outcomes["late"], pool.backlog) == (1, 0)
    assert pool.pids()  # it was stopped, not killed
    await pool.close()


async def test_more_rows_fit_into_more_time_on_more_workers(pools):
    for n, pool in pools.items():
        assert pool.fits(0.0) == 0
        assert pool.fits(1.0) == n * pool.cost.fits(1.0) > 0
        assert pool.seconds(100) == pool.cost.seconds(100 / n)


async def test_a_worker_without_sockets_says_why_at_once(generation, monkeypatch):
    """Before there is a process to ask for its end."""

    def none():
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("app.workers.pool.socket.socketpair", none)
    with pytest.raises(ServerError, match="Too many open files"):
        await asyncio.wait_for(Watched(generation, 1).start(), 5)


async def test_a_worker_that_can_not_start_says_why_at_once(copy):
    spoilt = load(copy)
    (copy / "re_ranker.onnx").write_bytes(b"no graph")
    with pytest.raises(ServerError, match=r"re_ranker\.onnx: its SHA-256"):
        await Watched(spoilt, 2).start()


async def test_with_no_worker_alive_every_request_is_still_answered(generation):
    pool = Watched(generation, 1)
    await pool.start()
    os.kill(pool.pids()[0], signal.SIGKILL)
    await asyncio.wait_for(pool.restarted.wait(), 60)
    assert pool.n_workers == 0
    ranking = await world.rank_by(Deadline(time.monotonic(), 0.2), Funnel(generation, pool), person(2, generation))
    assert len(ranking) == world.K
    assert {d.stage for d in ranking.degradations} >= {Stage.RERANKING}
    await replaced(pool)
    await pool.close()


async def test_closing_ends_every_process_and_fails_what_waits(generation, funnel):
    pool = Watched(generation, 2)
    await pool.start()
    pids = list(pool.pids().values())
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    shards = [shard_of(funnel, person(0, generation), time.monotonic() + LONG_S) for _ in range(3)]
    answers = [pool.submit(s, ignore) for s in shards]
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    await pool.close()
    outcomes = await asyncio.gather(*answers, return_exceptions=True)
    assert all(o is None or isinstance(o, StageFailed) for o in outcomes)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


async def test_an_answer_in_another_format_ends_the_worker_and_another_takes_its_place(generation, funnel, monkeypatch):
    pool = Watched(generation, 1)
    await pool.start()
    first = pool.pids()[0]
    shard = shard_of(funnel, person(0, generation), time.monotonic() + LONG_S)
    with monkeypatch.context() as patch:
        patch.setattr("app.workers.pool.read_frames", lambda held: read_frames(bytearray([FORMAT + 1]) + held[1:]))
        scored = asyncio.create_task(pool.score(shard))
        await asyncio.wait_for(pool.restarted.wait(), 60)
    assert np.isfinite(await scored).all()
    assert pool.pids()[0] != first
    await pool.close()


# ----------------------------------------------------------------------------------------- whole requests


def sent(request) -> Sent:
    return Sent(request.get("request_id", "r-1"), orjson.dumps(request), request.get("rerank_count"))


def running(pool, generation) -> Funnel:
    """As the service runs it: requests come as they were sent."""
    return Funnel(generation, pool, runner=pool)


async def rank(funnel: Funnel, request, timeout_s: float = LONG_S):
    query = offline_query(request, funnel.generation)
    found = await funnel.rank(lambda is_late: query, Deadline(time.monotonic(), timeout_s), sent=sent(request))
    return found if isinstance(found, Told) else wire.told(*found, funnel.generation)


def rows_of(told: Told) -> list[int]:
    """What was shown, best first."""
    return [world.ITEM_IDS.tolist().index(item["id"]) for item in orjson.loads(wire.finished(told, {}))["items"]]


@pytest.mark.parametrize("request_", REQUESTS, ids=str)
async def test_a_request_that_one_worker_ranks_has_the_ranking_of_the_offline_funnel(
    pools, generation, funnel, request_
):
    alone = await rank_offline(funnel, offline_query(request_, generation))
    for pool in pools.values():
        told = await rank(running(pool, generation), request_)
        answer = orjson.loads(wire.finished(told, {"total": 1.0}))
        wire.RankResponse.model_validate_json(orjson.dumps(answer))
        assert (answer["request_id"], answer["took_ms"]) == ("r-1", {"total": 1.0})
        assert answer["coverage"]["shards"] == told.reports[Stage.RERANKING].shards == 1
        assert told.degradations == () and not answer["degraded"]
        assert rows_of(told) == alone.rows.tolist()
        np.testing.assert_allclose([item["score"] for item in answer["items"]], alone.scores, rtol=1e-5)
        assert told.first == tuple((Stage.RERANKING, item["score"]) for item in answer["items"][: wire.SCORES_TOLD])


async def test_many_requests_at_once_get_each_their_own_answer(pools, generation):
    funnel = running(pools[2], generation)
    asked = [{"user": {"id": world.USER_IDS[i % 5]}, "k": 3, "request_id": f"r-{i}"} for i in range(40)]
    alone = offline_funnel(generation)
    expected = [(await rank_offline(alone, offline_query(one, generation))).rows.tolist() for one in asked[:5]]
    assert len(set(map(tuple, expected))) == 5
    answers = await asyncio.gather(*(rank(funnel, one) for one in asked))
    for i, told in enumerate(answers):
        assert rows_of(told) == expected[i % 5]
        assert orjson.loads(wire.finished(told, {}))["request_id"] == f"r-{i}"
    assert pools[2].backlog == 0


async def test_a_request_that_the_bundle_can_not_answer_is_refused_by_the_worker(pools, generation):
    funnel, wrong = running(pools[2], generation), {"filters": [{"field": "nothing", "eq": 1}]}
    with pytest.raises(InvalidRequest, match=r"filters\.0\.field"):
        await funnel.rank(lambda is_late: None, Deadline(time.monotonic(), LONG_S), sent=sent(wrong))


async def test_re_ranking_that_takes_one_worker_too_long_is_shared(generation, small_shards):
    pool = Watched(generation, 2, given=Given(paced_row_s=0.005))  # 32 rows of a wanted 32: 160 ms
    await pool.start()
    pool.given = replace(pool.given, sla_s=60.0)
    funnel = running(pool, generation)
    shared = await rank(funnel, {"user": {"id": "cho"}}, 0.15)
    assert shared.reports[Stage.RERANKING].shards == 2
    alone = await rank(funnel, {"user": {"id": "cho"}}, 0.4)
    assert alone.reports[Stage.RERANKING].shards == 1
    pool.given = replace(pool.given, sla_s=0.4)  # what is slow by the SLA narrows the funnel for all, whoever has time
    patient = await rank(funnel, {"user": {"id": "cho"}}, 60.0)
    assert patient.reports[Stage.RERANKING].shards == 2
    narrow = await rank(funnel, {"user": {"id": "cho"}, "rerank_count": 4}, 0.4)
    assert narrow.reports[Stage.RERANKING].shards == 1
    await pool.close()


async def test_a_request_that_waited_is_narrowed_by_what_waits_when_it_is_begun(generation):
    pool = Watched(generation, 1)
    await pool.start()
    funnel = running(pool, generation)
    pool.quality_now = lambda: 1.0 if len(pool.queue) > 0 else 0.5  # asked of the second when nobody is behind it
    waits = [asyncio.create_task(rank(funnel, {"user": {"id": "cho"}})) for _ in range(3)]
    done = [(await told).reports[Stage.RERANKING].done for told in waits]
    whole = generation.manifest.funnel.rerank
    assert done == [whole // 4, whole, whole // 4]  # the first was begun before the others came
    await pool.close()


@pytest.mark.parametrize(("saved_s", "is_shared"), [(0.9 * SAVED_S, False), (1.1 * SAVED_S, True)])
async def test_a_hurried_request_is_shared_where_that_saves_enough(generation, saved_s, is_shared):
    """Two workers save half of what re-ranking takes one; it has a hundredth of that."""
    pool = Watched(generation, 2, given=Given(sla_s=60.0))
    await pool.start()
    pool.cost = Cost(0.0, 2 * saved_s / generation.manifest.funnel.rerank)
    deadline, why = Deadline(time.monotonic(), saved_s / 50), "several" if is_shared else "begun|expired"
    with pytest.raises(StageFailed, match=why):
        await pool.rank(sent({}), deadline, 1.0, time.monotonic() - 1)
    await pool.close()


async def test_the_request_of_a_dying_worker_is_ranked_by_another(generation):
    pool = Watched(generation, 2)
    await pool.start()
    os.kill(pool.pids()[0], signal.SIGSTOP)  # it takes the request and will not answer
    ranking = asyncio.create_task(rank(running(pool, generation), {"user": {"id": "cho"}}))
    while not pool.workers[0].job:  # noqa: ASYNC110  (the pool has no event for it)
        await asyncio.sleep(0)
    os.kill(pool.pids()[0], signal.SIGKILL)
    found = await ranking
    assert rows_of(found) == [21, 22, 23, 24, 25]
    assert found.degradations == ()
    assert (pool.outcomes["lost"], pool.sent["hedge"]) == (1, 0)
    await pool.close()


async def test_a_worker_whose_socket_has_just_ended_is_given_nothing(generation):
    """Before its end was noticed; and it comes back, though it was never given anything."""
    pool = Watched(generation, 1)
    await pool.start()
    pool.workers[0].transport.close()
    assert pool.workers[0].is_ready.is_set()
    assert rows_of(await rank(running(pool, generation), {"user": {"id": "cho"}})) == [21, 22, 23, 24, 25]
    await asyncio.wait_for(pool.restarted.wait(), 20)
    await replaced(pool)
    assert pool.workers[0].job is None
    found = await rank(running(pool, generation), {"user": {"id": "cho"}})
    assert found.degradations == ()
    await pool.close()


async def test_a_request_over_which_two_workers_died_is_searched_for_by_nobody_else(generation, monkeypatch):
    pool = Trusted(generation, 2, spares=1)
    await pool.start()
    funnel = running(pool, generation)
    monkeypatch.setattr(funnel.retrieval, "search", None)  # in the service's own process
    for pid in pool.pids().values():
        os.kill(pid, signal.SIGSTOP)
    ranking = asyncio.create_task(rank(funnel, {"user": {"id": "cho"}}, 5.0))
    for _ in range(2):
        while not (at := [w for w in pool.workers if w.job]):  # noqa: ASYNC110
            await asyncio.sleep(0)
        pid, owner = at[0].process.pid, at[0]
        os.kill(pid, signal.SIGKILL)
        while owner.job and owner.process.pid == pid:  # noqa: ASYNC110
            await asyncio.sleep(0)
    for pid in pool.pids().values():
        os.kill(pid, signal.SIGCONT)
    found = await ranking
    assert len(rows_of(found)) == world.K
    assert Degradation(Stage.RETRIEVAL, "late", "popular items") in found.degradations
    assert Degradation(Stage.RERANKING, "late", "pre-rank scores") in found.degradations
    assert sum(pool.sent.values()) == 2 * pool.sent["resend"]  # to two workers, and to the third nothing
    assert not pool.asked.is_set()  # nor a shard of it
    await pool.close()


async def test_a_request_that_is_late_is_hedged_and_the_first_answer_wins(generation):
    pool = Watched(generation, 2)
    await pool.start()
    os.kill(pool.pids()[0], signal.SIGSTOP)
    pool.hedges.left = 1e6
    found = await rank(running(pool, generation), {"user": {"id": "cho"}})
    assert rows_of(found) == [21, 22, 23, 24, 25]
    assert pool.sent["hedge"] > 0 == pool.outcomes["lost"]
    await pool.close()


async def test_a_request_is_hurried_before_nobody_waits_for_it_any_more(generation):
    pool, hurried = Watched(generation, 1), []
    await pool.start()
    ask = pool._ask

    def noted(worker, kind, *given) -> None:
        if kind is Kind.STOP and worker.job:
            hurried.append(worker.job.answer.done())
        ask(worker, kind, *given)

    pool._ask = noted
    os.kill(pool.pids()[0], signal.SIGSTOP)
    await rank(running(pool, generation), {"user": {"id": "cho"}}, 0.4)
    assert hurried[0] is False
    await pool.close()


async def test_a_search_that_a_filter_leaves_little_of_says_nothing_of_costs(pools, generation):
    pool = pools[1]
    before = [cost.log_scale for cost in pool.given.costs]
    filtered = {"filters": [{"field": "genres", "eq": "horror"}, {"field": "year", "lte": 1992}]}
    told = await rank(running(pool, generation), filtered)
    found = told.reports[Stage.RETRIEVAL]
    assert 0 < found.done < found.wanted
    assert pool.given.costs[0].log_scale == before[0]


async def test_a_request_that_no_worker_begins_in_time_is_ranked_all_the_same(generation):
    pool = Watched(generation, 1)
    await pool.start()
    os.kill(pool.pids()[0], signal.SIGSTOP)
    funnel = running(pool, generation)
    first = asyncio.create_task(rank(funnel, {"user": {"id": "cho"}}, 0.5))
    found = await rank(funnel, {"user": {"id": "cho"}}, 0.5)  # this one waits behind the first
    assert len(rows_of(found)) == len(rows_of(await first)) == world.K
    assert pool.outcomes["expired"] >= 1
    assert Degradation(Stage.RERANKING, "late", "pre-rank scores") in found.degradations
    await pool.close()


async def test_when_the_last_worker_dies_who_waits_is_ranked_without_one_at_once(generation):
    pool = Watched(generation, 1)
    await pool.start()
    os.kill(pool.pids()[0], signal.SIGSTOP)
    funnel = running(pool, generation)
    rankings = [asyncio.create_task(rank(funnel, {"user": {"id": "cho"}})) for _ in range(3)]
    while len(pool.queue) < 2:  # noqa: ASYNC110
        await asyncio.sleep(0)
    os.kill(pool.pids()[0], signal.SIGKILL)
    for told in await asyncio.gather(*rankings):  # pre-ranked here; re-ranked if the next is there so soon
        assert set(rows_of(told)) <= set(range(21, 30))
        assert len(rows_of(told)) == world.K
    await pool.close()


async def test_a_worker_is_told_to_stop_a_request_that_nobody_waits_for(generation):
    pool = Watched(generation, 1, given=Given(paced_row_s=60.0))
    await pool.start()
    with pytest.raises(asyncio.TimeoutError):
        deadline = Deadline(time.monotonic(), LONG_S)
        await asyncio.wait_for(pool.rank(sent({"user": {"id": "cho"}}), deadline, 1.0, LONG_S + time.monotonic()), 0.2)
    while pool.workers[0].job:  # noqa: ASYNC110
        await asyncio.sleep(0)
    assert pool.pids()  # it was stopped, not killed
    assert pool.backlog == 0
    await pool.close()


async def test_a_hung_worker_is_replaced_though_the_server_of_forks_is_gone(generation):
    pool = Watched(generation, 1)
    await pool.start()
    pid = pool.pids()[0]
    os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)
    os.kill(pid, signal.SIGSTOP)
    await asyncio.wait_for(pool.restarted.wait(), 20)
    await replaced(pool)
    assert pool.pids()[0] != pid
    assert not is_running(pid)
    await pool.close()


async def test_a_start_that_is_cancelled_leaves_no_process(generation):
    process = FORKS.Process(target=time.sleep, args=(600,), daemon=True)
    starting = asyncio.create_task(begin(process))
    await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    process.join(60)
    assert not process.is_alive()
