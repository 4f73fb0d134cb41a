"""The raw kernels give the funnel's answers, whatever the index and the features; and where time goes is seen there."""

import itertools
import json
import time
from dataclasses import replace

import numpy as np
import pytest

from app import wire
from app.bundle import Generation, Ids, PreRanker
from app.funnel import offline_funnel
from loadtest.agreement import Reference, differs
from loadtest.limits.kernels import PARTS, Asked, Kernels, full_answer, hot, look_up, paced
from tests import world
from tests.app.test_filters import SEARCH, TABLES, N, index_of

BURNT_S = 0.005


def some(ids: Ids, *rows: int) -> list:
    return ids.external(np.array(rows))


def requests(g: Generation) -> list[dict]:
    """Known and unknown people, what is sent before what is known, exclusions, another width; all answered in full."""
    seen, out = some(g.ids, 3, 8, 21), some(g.ids, 22, 23, 0)
    return [
        {},
        {"user": {"id": "cho"}, "k": 20},
        {"user": {"id": "nobody"}, "query": {"freshness": 0.7}},
        {"user": {"id": "eve", "history": seen, "features": {"age": 33, "occupation": "pilot"}}, "k": 32},
        {"user": {"history": []}, "exclude": out},
        {"user": {"history": [*seen, "unknown"]}, "exclude": [*out, *seen], "rerank_count": 10, "k": 10},
        {"user": {"features": {"occupation": "nobody's"}}, "rerank_count": 45},
        {"user": {"id": "dee"}, "rerank_count": 45, "k": 45},  # everything that retrieval found
    ]


@pytest.fixture(scope="module", params=["tiny", *SEARCH])
def served(request, generation):
    """The tiny world, and a larger random one with each kind of index and features of every sort."""
    if request.param == "tiny":
        return generation
    kind = request.param
    retriever = generation.manifest.retrievers[0].model_copy(
        update={"kind": kind, "n": N, "search": SEARCH[kind], "overfetch": 1.5 if kind.startswith("ivf") else 1.0}
    )
    tables = TABLES | {"year": np.nan_to_num(TABLES["year"])}
    names = ("retrieval_score", "item.year", "item.genres.1", "history_max.embedding", "history_log_count", "user.age")
    weights = np.array([1.0, -0.3, 0.4, 0.5, -0.2, 0.01], np.float32)
    return replace(
        generation,
        ids=Ids(np.arange(N) + 5, np.arange(N)),
        tables=tables,
        index=index_of(kind),
        pre_ranker=PreRanker(names, weights, np.float32(0.5)),
        manifest=generation.manifest.model_copy(update={"retrievers": (retriever,)}),
    )


async def test_the_kernels_give_the_funnels_answer(served, unhurried):
    kernels, funnel = Kernels(served), offline_funnel(served)
    for body in requests(served):
        query = wire.to_query(wire.parse(json.dumps(body).encode(), wire.RankRequest), "x", served)
        ranking = await world.rank_by(unhurried, funnel, query)
        asked = look_up(served, body)
        full = full_answer(kernels, asked)
        reference = Reference(tuple(full["ids"]), np.array(full["scores"], np.float32))
        ids = served.ids.external(ranking.rows)
        assert not ranking.degradations
        assert len(ids) == min(full["k"], len(full["ids"]))
        assert differs(ids, ranking.scores, reference, 1e-5) == "", body
        rows, scores = kernels.answer(asked)
        assert served.ids.external(rows) == full["ids"][: len(ids)]
        assert scores.tolist() == full["scores"][: len(ids)]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({"filters": [{"field": "year", "gte": 1960}]}, "has filters"),
        ({"candidates": [1000]}, "has candidates"),
        ({"k": 33}, "asks for more items than are re-ranked"),
        ({"k": 11, "rerank_count": 10}, "asks for more items than are re-ranked"),
    ],
)
def test_requests_that_need_other_kernels_are_told_apart(generation, body, why):
    assert look_up(generation, body) == why


def burn(seconds: float) -> None:
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


@pytest.mark.parametrize(("step", "part"), [("prerank", "preranking"), ("rerank", "reranking"), ("index", "index")])
def test_a_slow_kernel_shows_in_its_part_and_in_the_sum(generation, monkeypatch, step, part):
    kernels, asked = Kernels(generation), look_up(generation, {"user": {"id": "cho"}})
    assert isinstance(asked, Asked)
    whole = getattr(kernels, step)

    def slow(*given):
        burn(BURNT_S)
        return whole(*given)

    monkeypatch.setattr(kernels, step, slow)
    found = hot(kernels, itertools.repeat(asked), 10 * BURNT_S)
    assert found["n"] >= 1
    assert tuple(found["cpu_parts_ms"]) == tuple(found["p50_parts_ms"]) == PARTS
    assert found["cpu_parts_ms"][part] >= BURNT_S * 1e3
    assert found["p50_parts_ms"][part] >= BURNT_S * 1e3
    assert sum(found["cpu_parts_ms"].values()) <= found["cpu_ms"] * 1.01  # the clocks themselves are in the whole
    # The others take some tens of microseconds here: none is charged with the slow one's time.
    assert max(ms for name, ms in found["cpu_parts_ms"].items() if name != part) < BURNT_S * 1e3


def test_paced_requests_come_at_their_instants_and_waiting_is_not_their_time(generation):
    asked, began = look_up(generation, {}), time.perf_counter()
    found = paced(Kernels(generation), itertools.repeat(asked), rate=20, n=4)
    took_s = time.perf_counter() - began
    assert found["n"] == 4
    assert took_s >= 3 / 20
    assert found["cpu_ms"] < 1e3 / 20
