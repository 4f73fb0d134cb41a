"""The whole funnel over the tiny world: right answers, conservation, contracts, degradation."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from app import wire
from app.control.carrying import PRIOR_ROWS, to_request_scale
from app.control.costs import Cost
from app.control.deadline import Deadline
from app.errors import ContractError, Deadly, StageFailed
from app.flow import Candidates, Degradation, Origin, Outcome, Query, Ranking, Scored, Sent, Stage, best_first, sealed
from app.funnel import Funnel, offline_funnel
from app.metrics import Metrics
from app.settings import Limits
from app.stages import selection
from app.warmup import offline_query, rank_offline
from app.workers.scoring import InProcess, ShardModel
from tests import world

CHO = 2  # has seen item 20
EVERY_ROW = tuple(range(world.N))


@pytest.fixture
def ask(generation):
    """A request in wire form, resolved."""

    def resolved(**request) -> Query:
        return offline_query(request, generation)

    return resolved


def ids(*rows: int) -> list[int]:
    return [world.item_id(r) for r in rows]


# ------------------------------------------------------------------------------------- right answers


@pytest.mark.parametrize("number", range(len(world.USER_IDS)))
async def test_a_known_person_gets_the_items_next_to_what_they_have_seen(funnel, ask, number):
    history = world.HISTORIES[number]
    ranking = await rank_offline(funnel, ask(user={"id": world.USER_IDS[number]}))
    scores = world.rerank_scores(history, age=world.AGES[number], occupation=1 + number % 2)
    expected = world.best(scores, world.K, but=history)
    assert ranking.rows.tolist() == expected
    assert expected[:2] == [number * 10 + 1 + (number == 4), number * 10 + 2 + (number == 4)]
    np.testing.assert_allclose(ranking.scores, scores[expected], rtol=1e-5)
    assert ranking.degradations == ()
    assert set(ranking.stages.tolist()) == {Stage.RERANKING}


async def test_an_unknown_person_is_served_from_the_history_in_the_request(funnel, ask):
    known = await rank_offline(funnel, ask(user={"id": "cho"}))
    unknown = await rank_offline(funnel, ask(user={"id": "nobody", "history": ids(20)}))
    assert unknown.rows.tolist() == known.rows.tolist() == [21, 22, 23, 24, 25]


async def test_a_history_in_the_request_comes_before_the_known_one(funnel, ask):
    ranking = await rank_offline(funnel, ask(user={"id": "ann", "history": ids(20)}))
    assert ranking.rows.tolist() == [21, 22, 23, 24, 25]


async def test_a_person_nothing_is_known_of_gets_what_the_towers_constant_likes(funnel, ask):
    assert (await rank_offline(funnel, ask())).rows.tolist() == [0, 1, 2, 3, 4]


async def test_the_last_of_the_history_counts_most(funnel, ask):
    first = await rank_offline(funnel, ask(user={"history": ids(10, 20)}))
    second = await rank_offline(funnel, ask(user={"history": ids(20, 10)}))
    assert first.rows.tolist() == world.best(world.rerank_scores((10, 20)), world.K, but=(10, 20))
    assert second.rows.tolist() == world.best(world.rerank_scores((20, 10)), world.K, but=(20, 10))
    assert first.rows[0] == 21
    assert second.rows[0] == 11


async def test_re_ranking_reorders_what_pre_ranking_let_through(funnel, ask):
    query = ask(user={"history": ids(20)}, query={"freshness": 100})
    ranking = await rank_offline(funnel, query)
    kept = world.best(world.prerank_scores((20,)), world.RERANK, but=(20,))
    scores = world.rerank_scores((20,), freshness=100)
    assert ranking.rows.tolist() == sorted(kept, key=lambda r: -scores[r])[: world.K]
    assert ranking.rows.tolist() != [21, 22, 23, 24, 25]


async def test_rerank_count_narrows_and_the_rest_is_carried_on_the_same_scale(funnel, ask, generation):
    query = ask(user={"history": ids(20)}, rerank_count=2, k=4)
    ranking = await rank_offline(funnel, query)
    carried = generation.manifest.calibration.preranking(world.prerank_scores((20,)).astype(np.float32))
    rows, is_fresh = [21, 22, 23, 24], np.array([True, True, False, False])
    scores = world.rerank_scores((20,)).astype(np.float32)
    on_its_scale = to_request_scale(carried[rows], scores[rows], is_fresh)
    expected = dict(zip(rows, np.where(is_fresh, scores[rows], on_its_scale).tolist(), strict=True))
    assert ranking.rows.tolist() == sorted(expected, key=lambda r: -expected[r])
    np.testing.assert_allclose(ranking.scores, [expected[r] for r in ranking.rows.tolist()], rtol=1e-5)
    stages = dict(zip(ranking.rows.tolist(), ranking.stages.tolist(), strict=True))
    assert stages == {21: Stage.RERANKING, 22: Stage.RERANKING, 23: Stage.PRERANKING, 24: Stage.PRERANKING}
    assert ranking.degradations == ()


async def test_a_candidates_own_features_reach_its_score(funnel, ask):
    sent = [{"id": world.item_id(r), "features": {"bid": bid}} for r, bid in ((3, 100), (0, 0), (7, 400))]
    ranking = await rank_offline(funnel, ask(candidates=[*sent, world.item_id(1)]))
    scores = world.rerank_scores() + 0.1 * np.sqrt([{3: 100.0, 7: 400.0}.get(r, 0.0) for r in EVERY_ROW])
    assert ranking.rows.tolist() == [7, 3, 0, 1]
    np.testing.assert_allclose(ranking.scores, scores[[7, 3, 0, 1]], rtol=1e-5)


async def test_the_callers_candidates_may_be_in_the_history_but_not_excluded(funnel, ask):
    query = ask(user={"id": "cho"}, candidates=ids(20, 21, 22), exclude=ids(21))
    assert (await rank_offline(funnel, query)).rows.tolist() == [20, 22]


async def test_excluded_items_and_the_history_are_not_shown(funnel, ask):
    query = ask(user={"id": "cho"}, exclude=ids(21, 23))
    assert (await rank_offline(funnel, query)).rows.tolist() == [22, 24, 25, 26, 27]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ([{"field": "genres", "eq": "comedy"}], [10, 11, 12, 13, 14]),
        ([{"field": "genres", "eq": 1}, {"field": "year", "gte": 1967}], [17, 18, 19]),
        ([{"field": "genres", "in": ["short", "silent"]}], [0, 2, 6, 8, 12]),
        ([{"field": "year", "gte": 1952, "lte": 1953}], [2, 3]),
        ([{"field": "year", "in": [1999, 1990.0, 2050]}], [40, 49]),
        ([{"field": "genres", "eq": "no such genre"}], []),
        ([{"field": "genres", "in": [-1]}], []),
    ],
)
async def test_filters_hold_by_name_and_by_number(funnel, ask, filters, expected):
    assert (await rank_offline(funnel, ask(filters=filters))).rows.tolist() == expected


@pytest.mark.parametrize("k", [1, 7, 49, 50, 1000])
async def test_k_items_or_as_many_as_there_are(funnel, ask, k):
    ranking = await rank_offline(funnel, ask(k=k, rerank_count=max(k, world.RERANK)))
    assert ranking.rows.tolist() == list(range(min(k, world.N)))
    narrow = await rank_offline(funnel, ask(k=k))
    assert len(narrow) == min(k, world.N)
    assert np.all(np.diff(narrow.scores) <= 0)  # fresh and carried on one scale


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        ({"candidates": []}, "none of the candidates"),
        ({"candidates": [1, 2, 3]}, "none of the candidates"),
        ({"filters": [{"field": "year", "gte": 3000}]}, "no item satisfies the filters"),
        ({"exclude": [world.item_id(r) for r in EVERY_ROW]}, "every item is excluded"),
    ],
)
async def test_an_empty_answer_says_why(funnel, ask, request_, why):
    ranking = await rank_offline(funnel, ask(**request_))
    assert len(ranking) == 0
    assert ranking.empty_reason.startswith(why)
    assert ranking.degradations == ()


async def test_scores_that_are_no_number_sink_to_the_end(funnel, ask):
    sent = [{"id": world.item_id(r), "features": {"bid": -1.0 if r in (5, 2) else 0.0}} for r in (5, 2, 9, 0)]
    ranking = await rank_offline(funnel, ask(candidates=sent))
    assert ranking.rows.tolist() == [0, 9, 2, 5]
    assert np.isnan(ranking.scores).tolist() == [False, False, True, True]


async def test_ties_break_by_row(funnel, ask):
    funnel.reranking.scorer = Workers(1, lambda number, shard: np.zeros(len(shard.candidates), np.float32))
    query = ask(candidates=ids(30, 4, 17, 2, 44))
    assert (await rank_offline(funnel, query)).rows.tolist() == [2, 4, 17, 30, 44]


async def test_text_ids_give_the_same_ranking(text_generation):
    request = {"user": {"id": 3}, "exclude": [f"item-{world.item_id(21)}"]}
    query = offline_query(request, text_generation)
    ranking = await rank_offline(offline_funnel(text_generation), query)
    assert query.person.is_known
    assert ranking.rows.tolist() == [22, 23, 24, 25, 26]
    assert text_generation.ids.external(ranking.rows)[0] == f"item-{world.item_id(22)}"


# -------------------------------------------------------------------------------------- conservation


REQUESTS = [
    {"user": {"id": "ann"}},
    {"user": {"id": "eve"}, "query": {"freshness": 50}, "rerank_count": 10},
    {"filters": [{"field": "genres", "eq": "drama"}], "k": 3},
    {"candidates": [world.item_id(r) for r in range(0, 50, 2)], "k": 20},
    {"k": 50},
    {"candidates": []},
]
FAULTS = [(), ("retrieval",), ("preranking",), ("reranking",), ("retrieval", "preranking", "reranking")]


@pytest.mark.parametrize("faults", FAULTS, ids="+".join)
@pytest.mark.parametrize("request_", REQUESTS, ids=str)
async def test_every_item_that_was_retrieved_is_shown_or_dropped_once(funnel, ask, request_, faults):
    for name in faults:
        fail(getattr(funnel, name))
    query = ask(**request_)
    outputs = []
    run = funnel.run

    async def kept(*given):
        outputs.append(await run(*given))
        return outputs[-1]

    funnel.run = kept
    ranking = await rank_offline(funnel, query)
    retrieved, coarse, fine = outputs[0].rows.tolist(), *(scored.candidates.rows.tolist() for scored in outputs[1:])
    shown = ranking.rows.tolist()
    assert len(set(retrieved)) == len(retrieved) == ranking.reports[Stage.RETRIEVAL].n_out
    assert coarse == retrieved
    dropped = set(coarse) - set(fine), set(fine) - set(shown)  # before re-ranking, and by selection
    assert sorted([*shown, *dropped[0], *dropped[1]]) == sorted(retrieved)
    assert len(shown) == min(query.k, len(retrieved))


async def test_the_best_come_first_ties_by_row_and_what_is_not_finite_last():
    rng = np.random.default_rng(0)
    for _ in range(300):
        n = int(rng.integers(0, 60))
        scores, rows = rng.integers(0, 12, n).astype(np.float32), rng.permutation(1_000)[:n]
        scores[rng.random(n) < 0.1], scores[rng.random(n) < 0.1] = np.nan, -np.inf
        by_both = np.lexsort((rows, np.where(np.isfinite(scores), -scores, np.inf)))
        assert best_first(scores, rows).tolist() == by_both.tolist()
        for m in (0, 1, n // 3, n - 1, n, n + 5):
            if m >= 0:
                assert best_first(scores, rows, m)[:m].tolist() == by_both[:m].tolist()


async def test_reports_give_the_widths_of_the_drawing(funnel, ask):
    ranking = await rank_offline(funnel, ask(user={"id": "cho"}))
    assert [(r.stage, r.wanted, r.done, r.n_out, r.outcome) for r in ranking.reports] == [
        (Stage.RETRIEVAL, 40, 40, 40, Outcome.OK),
        (Stage.PRERANKING, 40, 40, 40, Outcome.OK),
        (Stage.RERANKING, 32, 32, 32, Outcome.OK),
        (Stage.SELECTION, 32, 32, 5, Outcome.OK),
    ]


# --------------------------------------------------------------------------------------- degradation


class Workers:
    """A scorer whose answers the test decides: scores, an exception to set, or None for never."""

    def __init__(self, n_workers, answer) -> None:
        self.n_workers = n_workers
        self.answer, self.n_shards = answer, 0

    def fits(self, budget_s):
        return 10_000

    def seconds(self, n):
        return n / 1000

    def submit(self, shard, deliver):
        future = asyncio.get_running_loop().create_future()
        answer = self.answer(self.n_shards, shard)
        self.n_shards += 1
        if isinstance(answer, Exception):
            future.set_exception(answer)
        elif answer is not None:
            deliver(0, answer)
            if len(answer) == len(shard.candidates):
                future.set_result(None)
        return future


def fail(stage, error=None) -> None:
    async def run(*_):
        raise error or StageFailed("on purpose")

    stage.run = run


@pytest.mark.parametrize(("error", "reason"), [(StageFailed("broken"), "failed"), (TimeoutError(), "late")])
async def test_without_retrieval_the_popular_items_take_its_place(funnel, ask, error, reason):
    fail(funnel.retrieval, error)
    funnel.reranking.scorer = Workers(1, lambda *_: StageFailed("as well"))
    excluded = ids(49, 47)
    ranking = await rank_offline(
        funnel, ask(exclude=excluded, user={"id": "eve"}, filters=[{"field": "year", "lte": 1998}])
    )
    assert ranking.degradations[0] == Degradation(Stage.RETRIEVAL, reason, "popular items")
    assert ranking.rows.tolist() == [48, 46, 45, 44, 43]


async def test_a_narrowed_search_that_finds_fewer_still_was_narrowed(funnel, ask):
    """Fewer lists may hold fewer than its width: no time ran out."""
    search = funnel.retrieval.search
    funnel.retrieval.search = lambda query, width: search(query, width).take(np.arange(20))
    query, deadline = ask(), Deadline(time.monotonic(), 60.0)
    _, ranking = await funnel.finish(*await funnel.narrow(lambda is_late: query, deadline, 0.5))
    assert [(r.wanted, r.done) for r in ranking.reports[:2]] == [(40, 20), (20, 20)]
    assert ranking.degradations[0] == Degradation(Stage.RETRIEVAL, "narrowed_by_load", "fewer candidates")


async def test_popular_items_keep_their_order_through_the_other_stages(funnel, ask):
    fail(funnel.retrieval)
    ranking = await rank_offline(funnel, ask(k=40))
    rows = ranking.rows.tolist()
    assert set(rows) == set(world.POPULAR[:40].tolist())
    found = funnel.retrieval.substitute(funnel.open_scope(ask(), Deadline(0, 1)), ask(), None)
    assert np.all(np.diff(found.retrieval_scores) < 0)
    assert set(found.origins.tolist()) == {Origin.POPULAR}


async def test_without_retrieval_the_callers_candidates_are_still_ranked(funnel, ask):
    fail(funnel.retrieval)
    ranking = await rank_offline(funnel, ask(candidates=ids(5, 9, 7), exclude=ids(9)))
    assert sorted(ranking.rows.tolist()) == [5, 7]


async def test_a_search_that_hangs_is_late_and_the_request_is_answered(generation, ask):
    released = threading.Event()
    funnel = offline_funnel(generation)
    funnel.retrieval.search = lambda *_: released.wait(60)
    ranking = await world.rank_by(Deadline(time.monotonic(), 1.0), funnel, ask())
    released.set()
    assert Degradation(Stage.RETRIEVAL, "late", "popular items") in ranking.degradations
    assert len(ranking) == world.K


async def test_what_a_request_takes_follows_its_quality_and_what_is_side_by_side(funnel):
    funnel.retrieval.cost, funnel.preranking.cost = Cost(1e-3, 1e-5), Cost(0.0, 1e-5)
    funnel.reranking.cost, scorer = Cost(2e-3, 1e-4), funnel.reranking.scorer
    widths = funnel.generation.manifest.funnel
    retrieve, rerank = max(widths.retrieve // 2, widths.rerank), widths.rerank // 4
    one, all_on_one = funnel.seconds(0.5), funnel.seconds(1.0)
    scorer.n_workers = 2
    assert funnel.seconds(0.5) == pytest.approx((1e-3 + 2e-5 * retrieve) / 2 + 2e-3 + 1e-4 * rerank)
    assert all_on_one > one > funnel.seconds(0.5)


@pytest.mark.parametrize("sent", [{}, {"candidates": ids(*range(20))}], ids=["found by search", "the caller's"])
async def test_under_load_retrieval_and_re_ranking_are_narrowed_and_what_was_found_is_pre_ranked(funnel, ask, sent):
    query, deadline, widths = ask(**sent), Deadline(time.monotonic(), 60.0), funnel.generation.manifest.funnel
    narrowed = await funnel.narrow(lambda **_: query, deadline, 0.5)
    _, ranking = await funnel.finish(*narrowed)
    retrieved, preranked, reranked, _ = ranking.reports
    found = 20 if sent else max(widths.retrieve // 2, widths.rerank, widths.k)
    assert retrieved.done == preranked.done == preranked.wanted == found < widths.retrieve
    assert reranked.done == min(found, widths.rerank) // 4


async def test_a_stage_may_take_what_is_left_but_a_quarter_for_those_that_follow(funnel, ask):
    """60 s, of which the request has waited for 54: shares of the whole would have left the first stages none."""
    deadline, seen = Deadline(time.monotonic() - 54, 60.0), {}
    for stage in (funnel.retrieval, funnel.preranking, funnel.reranking):

        async def run(scope, query, given, until, stage=stage, whole=stage.run):
            seen[stage.stage] = until - deadline.started_at - 54
            return await whole(scope, query, given, until)

        stage.run = run
    ranking = await world.rank_by(deadline, funnel, ask())
    assert ranking.degradations == ()
    assert seen == pytest.approx({Stage.RETRIEVAL: 4.5, Stage.PRERANKING: 4.5, Stage.RERANKING: 6.0}, abs=0.5)


async def test_the_runner_may_begin_as_long_as_the_first_half_fits(generation, funnel):
    begun_until = []

    class Runner:
        async def rank(self, sent, deadline, quality, until):
            begun_until.append(until)
            return "told"

    funnel.runner, widths = Runner(), generation.manifest.funnel
    n = max(widths.retrieve // 2, widths.rerank)
    deadline = Deadline(time.monotonic(), 60.0)
    for expected_s, waits_s in ((6.0, 0.9 * 54), (600.0, 0.9 * 40)):  # what is thought too dear is tried in a third
        funnel.retrieval.cost = funnel.preranking.cost = Cost(0.0, expected_s / 2 / n)
        assert await funnel.rank(lambda **_: None, deadline, 0.5, Sent("sent", b"{}", None)) == "told"
        assert begun_until.pop() - deadline.started_at == pytest.approx(waits_s, abs=1.0)


async def test_a_first_half_that_was_thought_too_dear_is_tried_and_found_out(generation, funnel):
    funnel.retrieval.cost = Cost(1e3, 1e-3)
    resolve = partial(wire.to_query, wire.RankRequest(), "dear", generation)
    for _ in range(3):
        expected_s = funnel.narrow_s(1.0)
        _, ranking = await funnel.rank(resolve, Deadline(time.monotonic(), 30.0))
        assert ranking.reports[Stage.RETRIEVAL].done > 0
        assert funnel.narrow_s(1.0) < expected_s


async def test_a_person_who_was_found_stays_known_when_the_search_hangs(generation):
    released = threading.Event()
    resolved = []

    def resolve(*, is_late):
        resolved.append(is_late)
        return offline_query({"user": {"id": "ann"}}, generation)

    funnel = offline_funnel(generation)
    funnel.retrieval.search = lambda *_: released.wait(60)
    query, ranking = await funnel.rank(resolve, Deadline(time.monotonic(), 0.5))
    released.set()
    assert resolved == [False, False]  # the first went down with its search
    assert query.person.is_known
    assert [(d.stage, d.reason) for d in ranking.degradations][:2] == [
        (Stage.RETRIEVAL, "late"),
        (Stage.PRERANKING, "late"),
    ]
    assert not set(world.HISTORIES[0]) & set(ranking.rows.tolist())


async def test_a_small_request_whose_time_is_over_waits_for_no_thread(generation):
    released, only = threading.Event(), ThreadPoolExecutor(1)
    asyncio.get_running_loop().set_default_executor(only)
    only.submit(released.wait, 60)
    funnel, small = offline_funnel(generation), Sent("small", b"{}", None)

    def resolve(*, is_late):
        return wire.to_query(wire.RankRequest(), "small", generation, is_late=is_late)

    try:
        async with asyncio.timeout(20):  # the only thread is taken for longer
            _, ranking = await funnel.rank(resolve, Deadline(time.monotonic(), 0.02), sent=small)
    finally:
        released.set()
    assert len(ranking) == world.K
    assert [(d.stage, d.reason) for d in ranking.degradations][:1] == [(Stage.RETRIEVAL, "late")]


@pytest.mark.parametrize(
    ("n_bytes", "most_popular", "is_by_loop"),
    [
        (Limits.LARGE_BODY, len(world.POPULAR), True),
        (Limits.LARGE_BODY + 1, len(world.POPULAR), False),
        (2, len(world.POPULAR) - 1, False),
    ],
)
async def test_without_time_nobody_is_looked_up_and_the_loop_ranks_only_what_is_small(
    generation, monkeypatch, n_bytes, most_popular, is_by_loop
):
    monkeypatch.setattr("app.funnel.MOST_POPULAR", most_popular)
    resolved = []

    def resolve(*, is_late):
        resolved.append((is_late, threading.current_thread() is threading.main_thread()))
        return wire.to_query(wire.RankRequest(), "late", generation, is_late=is_late)

    late, sent = Deadline(time.monotonic() - 1, 0.02), Sent("late", b" " * n_bytes, None)
    _, ranking = await offline_funnel(generation).rank(resolve, late, sent=sent)
    assert resolved == [(True, is_by_loop)]
    assert len(ranking) == world.K


async def test_of_no_candidates_nothing_is_late(generation, ask):
    """Nor counted as such: of a width of 0 there is no share."""

    class Runner:
        async def rank(self, *given):
            raise Deadly

    funnel = Funnel(generation, InProcess(ShardModel(generation)), runner=Runner())
    query = ask(candidates=[])
    _, ranking = await funnel.rank(lambda is_late: query, Deadline(time.monotonic(), 5.0), sent=Sent("x", b"", None))
    assert (len(ranking), ranking.degradations) == (0, ())
    assert {report.outcome for report in ranking.reports} == {Outcome.SKIPPED}
    Metrics(0.1, {}).ranked(wire.told(query, ranking, generation))


@pytest.mark.parametrize(("error", "reason"), [(StageFailed("broken"), "failed"), (TimeoutError(), "late")])
async def test_without_pre_ranking_the_retrieval_scores_take_its_place(funnel, ask, generation, error, reason):
    fail(funnel.preranking, error)
    ranking = await rank_offline(funnel, ask(user={"history": ids(20)}, rerank_count=1, k=3))
    assert ranking.degradations == (Degradation(Stage.PRERANKING, reason, "retrieval scores"),)
    scores = world.retrieval_scores((20,)).astype(np.float32)
    carried = generation.manifest.calibration.retrieval(scores)
    fresh = world.rerank_scores((20,))[21]
    shift = (fresh - carried[21]) / (1 + PRIOR_ROWS)  # one row was scored
    expected = {21: fresh, 22: carried[22] + shift, 23: carried[23] + shift}
    assert sorted(ranking.rows.tolist()) == [21, 22, 23]
    for row, score, stage in zip(ranking.rows.tolist(), ranking.scores, ranking.stages, strict=True):
        assert score == pytest.approx(expected[row], rel=1e-5)
        assert stage == (Stage.RERANKING if row == 21 else Stage.RETRIEVAL)


async def test_when_no_worker_answers_the_pre_rank_scores_stand(funnel, ask, generation):
    funnel.reranking.scorer = Workers(2, lambda *_: None)
    ranking = await world.rank_by(Deadline(time.monotonic(), 0.5), funnel, ask(user={"history": ids(20)}))
    report = ranking.reports[Stage.RERANKING]
    assert (report.wanted, report.done, report.shards, report.shards_ok) == (32, 0, 2, 0)
    assert report.outcome is Outcome.LATE
    assert Degradation(Stage.RERANKING, "late", "pre-rank scores") in ranking.degradations
    assert ranking.rows.tolist() == [21, 22, 23, 24, 25]


async def test_when_every_worker_fails_it_says_failed_and_not_late(funnel, ask):
    funnel.reranking.scorer = Workers(2, lambda *_: StageFailed("no memory"))
    ranking = await rank_offline(funnel, ask())
    assert ranking.degradations == (Degradation(Stage.RERANKING, "failed", "pre-rank scores"),)
    assert set(ranking.stages.tolist()) == {Stage.PRERANKING}


async def test_late_shards_keep_their_pre_rank_score(funnel, ask, generation):
    carried = generation.manifest.calibration.preranking(world.prerank_scores((20,)).astype(np.float32))
    answer = lambda number, shard: None if number else carried[shard.candidates.rows] + np.float32(3)  # noqa: E731
    funnel.reranking.scorer = Workers(2, answer)
    query = ask(user={"history": ids(20)}, k=32)
    ranking = await world.rank_by(Deadline(time.monotonic(), 1.0), funnel, query)
    report = ranking.reports[Stage.RERANKING]
    assert (report.wanted, report.done, report.shards, report.shards_ok) == (32, 16, 2, 1)
    assert ranking.degradations == (Degradation(Stage.RERANKING, "partial", "pre-rank scores"),)
    best = world.best(world.prerank_scores((20,)), 32, but=(20,))
    scored, late = best[0::2], best[1::2]  # dealt round-robin from the pre-rank order
    # All 16 that were scored are 3 above what the calibration says of them.
    expected = {r: carried[r] + 3 for r in scored} | {r: carried[r] + 3 * 16 / (16 + PRIOR_ROWS) for r in late}
    assert ranking.rows.tolist() == sorted(expected, key=lambda r: -expected[r])
    np.testing.assert_allclose(ranking.scores, [expected[r] for r in ranking.rows.tolist()], rtol=1e-5)
    assert 0 < ranking.expected_ndcg_loss < 1


async def test_a_shard_nobody_waits_for_any_more_is_cancelled(funnel, ask):
    submitted = []

    class Hung(Workers):
        def submit(self, shard, deliver):
            submitted.append(super().submit(shard, deliver))
            return submitted[-1]

    funnel.reranking.scorer = Hung(2, lambda *_: None)
    await world.rank_by(Deadline(time.monotonic(), 0.2), funnel, ask())
    assert [f.cancelled() for f in submitted] == [True, True]


async def test_with_everything_broken_there_are_still_k_items(funnel, ask):
    for stage in (funnel.retrieval, funnel.preranking, funnel.reranking):
        fail(stage)
    ranking = await rank_offline(funnel, ask(user={"id": "ann"}))
    assert [d.stage for d in ranking.degradations] == [Stage.RETRIEVAL, Stage.PRERANKING, Stage.RERANKING]
    assert ranking.rows.tolist() == [49, 48, 47, 46, 45]


async def test_a_deadline_that_has_passed_still_gives_k_items(funnel, ask):
    funnel.reranking.scorer = Workers(1, lambda *_: None)
    ranking = await world.rank_by(Deadline(time.monotonic() - 1.0, 0.5), funnel, ask())
    assert len(ranking) == world.K
    assert [d.reason for d in ranking.degradations] == ["late"] * 3


async def test_what_has_expired_is_not_searched_for(funnel, ask):
    searched, search = [], funnel.retrieval.search
    funnel.retrieval.search = lambda *given: (searched.append(1), search(*given))[1]
    for _ in range(10):
        await world.rank_by(Deadline(time.monotonic() - 1.0, 0.5), funnel, ask())
    assert searched == []


async def test_a_user_that_was_late_is_said(funnel, ask):
    query = ask()
    query = replace(query, person=replace(query.person, is_late=True))
    ranking = await rank_offline(funnel, query)
    assert [(d.stage, d.reason) for d in ranking.degradations] == [(Stage.RETRIEVAL, "user_late")]


@pytest.mark.parametrize("error", [TypeError("None has no len"), KeyError("x"), IndexError(), AssertionError()])
@pytest.mark.parametrize("name", ["retrieval", "preranking", "reranking"])
async def test_a_programmers_error_is_never_degraded_away(funnel, ask, name, error):
    fail(getattr(funnel, name), error)
    with pytest.raises(type(error)):
        await rank_offline(funnel, ask())


@pytest.mark.parametrize("name", ["retrieval", "preranking"])
async def test_nor_is_one_in_the_stages_thread(funnel, ask, name, monkeypatch):
    stage = getattr(funnel, name)

    def broken(*_):
        raise TypeError("a defect")

    monkeypatch.setattr(stage, "search" if name == "retrieval" else "score", broken)
    with pytest.raises(TypeError, match="a defect"):
        await rank_offline(funnel, ask())


async def test_nor_is_one_in_a_worker(funnel, ask):
    funnel.reranking.scorer = Workers(2, lambda *_: ContractError("in a worker: TypeError"))
    with pytest.raises(ContractError, match="in a worker"):
        await rank_offline(funnel, ask())


@pytest.mark.parametrize("name", ["retrieval", "preranking", "reranking"])
async def test_cancelling_a_request_is_not_swallowed(funnel, ask, name):
    fail(getattr(funnel, name), asyncio.CancelledError())
    with pytest.raises(asyncio.CancelledError):
        await rank_offline(funnel, ask())


# ----------------------------------------------------------------------------------------- contracts


def candidates(rows, scores=None, dtype=np.int64) -> Candidates:
    rows = np.array(rows, dtype)
    scores = np.zeros(len(rows), np.float32) if scores is None else scores
    return Candidates(rows, scores, np.zeros(len(rows), np.uint32), np.zeros(world.D, np.float32))


def give(stage, make) -> None:
    async def run(scope, query, given, until):
        return make(given)

    stage.run = run


@pytest.mark.parametrize(
    "found",
    [
        candidates([1, 2, 1]),
        candidates([-1]),
        candidates([world.N]),
        candidates([1, 2], scores=np.zeros(3, np.float32)),
        candidates([1, 2], dtype=np.int32),
        replace(candidates([1, 2]), origins=np.zeros(1, np.uint32)),
    ],
    ids=["twice", "negative", "beyond", "more scores", "dtype", "fewer origins"],
)
async def test_retrieval_gives_rows_of_the_catalogue_each_once(funnel, ask, found):
    give(funnel.retrieval, lambda _: found)
    with pytest.raises(ContractError, match="retrieval"):
        await rank_offline(funnel, ask())


def scored(given, scores, of=None) -> Scored:
    of = of or (given.candidates if isinstance(given, Scored) else given)
    return Scored(of, scores, Stage.PRERANKING, np.full(len(of), Stage.PRERANKING, np.uint8))


def shorter(given):
    rows = given.candidates if isinstance(given, Scored) else given
    return rows.take(np.arange(len(rows) - 1))


def reversed_(given):
    rows = given.candidates if isinstance(given, Scored) else given
    return rows.take(np.arange(len(rows))[::-1])


@pytest.mark.parametrize("name", ["preranking", "reranking"])
@pytest.mark.parametrize(
    "make",
    [
        lambda given: scored(given, np.zeros(len(given) - 1, np.float32)),
        lambda given: scored(given, np.zeros(len(given) - 1, np.float32), of=shorter(given)),
        lambda given: scored(given, np.zeros(len(given), np.float32), of=reversed_(given)),
        lambda given: scored(given, np.zeros((len(given), 1), np.float32)),
        lambda given: scored(given, np.zeros(len(given), np.float64)),
        lambda given: replace(scored(given, np.zeros(len(given), "f4")), scored_by=np.zeros(1, np.uint8)),
    ],
    ids=["fewer scores", "fewer candidates", "other order", "two axes", "dtype", "fewer stages"],
)
async def test_a_scorer_keeps_length_and_order(funnel, ask, name, make):
    give(getattr(funnel, name), make)
    with pytest.raises(ContractError):
        await rank_offline(funnel, ask())


def changed(**columns):
    whole = selection.select

    def select(scope, query, fine) -> Ranking:
        return replace(whole(scope, query, fine), **columns)

    return select


@pytest.mark.parametrize(
    "columns",
    [
        {"rows": np.array([0, 1, 2, 3])},
        {"rows": np.array([0, 1, 2, 3, 3])},
        {"rows": np.array([0, 1, 2, 3, 49])},
        {"propensities": np.array([1, 1, 1, 1, 0.0])},
        {"propensities": np.array([1, 1, 1, 1, 1.1])},
        {"propensities": np.array([1, 1, 1, 1, np.nan])},
        {"propensities": np.array([1, 1, 1, 1.0])},
        {"scores": np.zeros(4, np.float32)},
    ],
    ids=["too few", "twice", "no candidate", "never shown", "too sure", "nan", "fewer propensities", "fewer scores"],
)
async def test_selection_shows_min_k_candidates_each_once_with_a_propensity(funnel, ask, columns, monkeypatch):
    monkeypatch.setattr(selection, "select", changed(**{name: sealed(a) for name, a in columns.items()}))
    with pytest.raises(ContractError, match="selection"):
        await rank_offline(funnel, ask())


async def test_a_request_is_not_mixed_up_with_others(funnel: Funnel, ask):
    numbers = [n % 5 for n in range(40)]
    queries = [ask(user={"id": world.USER_IDS[n]}, request_id=f"r{i}") for i, n in enumerate(numbers)]
    rankings = await asyncio.gather(*(rank_offline(funnel, q) for q in queries))
    for n, ranking in zip(numbers, rankings, strict=True):
        assert ranking.rows[0] == n * 10 + 1 + (n == 4)
