"""One contract for every scorer: pre-ranking, re-ranking in this process, re-ranking through worker processes."""

import time
from dataclasses import dataclass, replace

import numpy as np
import pytest
import pytest_asyncio

from app.control.deadline import Deadline
from app.flow import Query, Scored, Stage
from app.funnel import Funnel, offline_funnel
from app.metrics import Metrics
from app.stages.reranking import Reranking
from app.warmup import offline_query
from app.workers.pool import WorkerPool
from tests import world

pytestmark = pytest.mark.asyncio(loop_scope="module")

REQUEST = {
    "user": {"id": "eve"},
    "query": {"freshness": 3},
    "candidates": [{"id": world.item_id(r), "features": {"bid": r}} for r in range(world.N)],
}
HISTORY, AGE, OCCUPATION, BIDS = world.HISTORIES[4], world.AGES[4], 1, np.arange(world.N)
EXPECTED = {
    Stage.PRERANKING: world.prerank_scores(HISTORY, bid=BIDS),
    Stage.RERANKING: world.rerank_scores(HISTORY, freshness=3, age=AGE, occupation=OCCUPATION, bid=BIDS),
}


@dataclass
class Scorer:
    """A scoring stage with what it needs to be run on some rows."""

    funnel: Funnel
    stage: object
    query: Query

    async def score(self, rows) -> tuple[object, Scored]:
        """What it was given, and what it made of it."""
        scope = self.funnel.open_scope(self.query, Deadline(time.monotonic(), 600.0))
        scope.width = len(rows)
        found = self.funnel.retrieval.search(self.query, world.N)
        order = np.argsort(found.rows)
        given = found.take(order[np.asarray(rows, np.int64)])
        if self.stage.stage is Stage.RERANKING:
            given = self.funnel.preranking.score(self.query, given)
        return given, await self.stage.run(scope, self.query, given, time.monotonic() + 600.0)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pool(generation):
    pool = WorkerPool(generation, 2, Metrics(1.0, {}))
    await pool.start()
    yield pool
    await pool.close()


@pytest.fixture(params=["preranking", "reranking in process", "reranking in workers"])
def scorer(request, generation, pool):
    funnel = offline_funnel(generation)
    stage = {
        "preranking": funnel.preranking,
        "reranking in process": funnel.reranking,
        "reranking in workers": Reranking(generation, pool),
    }[request.param]
    return Scorer(funnel, stage, offline_query(REQUEST, generation))


SOME = [49, 0, 7, 30, 31, 8, 20, 41, *range(10, 20), *range(32, 40), *range(21, 30)]  # 35: two shards


def arrays_of(given):
    candidates = given.candidates if isinstance(given, Scored) else given
    person = [given.scores, given.scored_by] if isinstance(given, Scored) else []
    return [candidates.rows, candidates.retrieval_scores, candidates.origins, candidates.user_embedding, *person]


async def test_it_keeps_length_and_order(scorer):
    given, scored = await scorer.score(SOME)
    assert scored.candidates is (given.candidates if isinstance(given, Scored) else given)
    assert scored.candidates.rows.tolist() == SOME
    assert scored.scores.shape == scored.scored_by.shape == (len(SOME),)


async def test_each_candidate_gets_its_own_score(scorer):
    _, scored = await scorer.score(SOME)
    np.testing.assert_allclose(scored.scores, EXPECTED[scored.stage][SOME], rtol=1e-5)
    assert scored.is_fresh.all()


async def test_scores_are_finite_float32(scorer):
    _, scored = await scorer.score(SOME)
    assert scored.scores.dtype == np.float32
    assert np.isfinite(scored.scores).all()


async def test_nothing_in_is_nothing_out(scorer):
    _, scored = await scorer.score([])
    assert len(scored) == 0
    assert scored.scores.dtype == np.float32


async def test_one_item_alone_scores_as_in_a_batch(scorer):
    _, batch = await scorer.score(SOME)
    for at in (0, 7, len(SOME) - 1):
        _, single = await scorer.score([SOME[at]])
        np.testing.assert_allclose(single.scores, batch.scores[[at]], rtol=1e-5)


async def test_the_order_of_the_candidates_does_not_matter(scorer):
    _, forward = await scorer.score(SOME)
    _, backward = await scorer.score(SOME[::-1])
    np.testing.assert_allclose(backward.scores[::-1], forward.scores, rtol=1e-5)


async def test_it_does_not_write_what_it_was_given(scorer):
    scorer.query.person.history.flags.writeable = False
    before = [a.copy() for a in arrays_of((await scorer.score(SOME))[0])]
    given, _ = await scorer.score(SOME)
    for array, copy in zip(arrays_of(given), before, strict=True):
        assert not array.flags.writeable
        np.testing.assert_array_equal(array, copy)


async def test_what_it_gives_is_read_only(scorer):
    _, scored = await scorer.score(SOME)
    assert not scored.scores.flags.writeable
    assert not scored.scored_by.flags.writeable


async def test_the_same_again_gives_the_same(scorer):
    (_, first), (_, second) = await scorer.score(SOME), await scorer.score(SOME)
    np.testing.assert_array_equal(first.scores, second.scores)


async def test_a_person_nothing_is_known_of_is_scored_too(scorer, generation):
    scorer.query = replace(offline_query({}, generation), candidates=scorer.query.candidates)
    _, scored = await scorer.score(SOME)
    nobody = {Stage.PRERANKING: world.prerank_scores(), Stage.RERANKING: world.rerank_scores()}
    np.testing.assert_allclose(scored.scores, nobody[scored.stage][SOME], rtol=1e-4, atol=1e-6)
