"""Re-ranking: the deep model over the best of the pre-ranked, in shards over the workers.

It owns how candidates are dealt out to shards and how what comes back is put together; processes and messages
are workers/. Shards are dealt round-robin from the pre-rank order, so that a lost shard costs an even sample
of the list and not its head. What isn't scored in time keeps the score it came with, brought to
the deep model's scale by the bundle's calibration, so that fresh and carried scores compare.
"""

import asyncio
import time

import numpy as np
from numpy.typing import NDArray

from app.bundle import Generation
from app.errors import ContractError
from app.flow import Query, RequestScope, Scored, Scores, Stage, sealed
from app.workers.scoring import Shard, ShardScorer

MIN_SHARD = 16  # rows: below this the round trip costs more than the rows


class Reranking:
    """Scored (pre-ranked, best first) → Scored (re-ranked): same candidates, same order."""

    stage = Stage.RERANKING

    def __init__(self, generation: Generation, scorer: ShardScorer) -> None:
        self.generation = generation
        self.scorer = scorer

    def wanted(self, scope: RequestScope, query: Query, given: Scored) -> int:
        return min(scope.rerank_width, len(given))

    async def run(self, scope: RequestScope, query: Query, given: Scored, until: float) -> Scored:
        """Score the best; what isn't back by the instant `until` (seconds, monotonic) is carried."""
        n = self.wanted(scope, query, given)
        if not n:
            return self._put_together(given, [])
        n_shards = max(1, min(self.scorer.n_workers, n // MIN_SHARD))
        dealt = [np.arange(s, n, n_shards) for s in range(n_shards)]
        answers = [self.scorer.submit(self._shard(query, given, at, until)) for at in dealt]
        limit = max(0.0, until - time.monotonic())
        try:
            await asyncio.wait(answers, timeout=limit)
        finally:
            for answer in answers:
                answer.cancel()
        scope.shards = n_shards
        fresh: list[tuple[NDArray[np.intp], Scores]] = [
            (at, answer.result()) for at, answer in zip(dealt, answers, strict=True) if is_scored(answer)
        ]
        scope.shards_ok = len(fresh)
        return self._put_together(given, fresh)

    def substitute(self, scope: RequestScope, query: Query, given: Scored) -> Scored:
        """Everything carried."""
        return self._put_together(given, [])

    def _shard(self, query: Query, coarse: Scored, at: NDArray[np.intp], until: float) -> Shard:
        candidates = coarse.candidates.take(at)
        return Shard(query.person, candidates, query.sent_with(candidates.rows), until)

    def _put_together(self, coarse: Scored, fresh: list[tuple[NDArray[np.intp], Scores]]) -> Scored:
        scores, scored_by = self._carried(coarse), coarse.scored_by.copy()
        for at, shard_scores in fresh:
            scores[at] = shard_scores
            scored_by[at] = self.stage
        return Scored(coarse.candidates, sealed(scores), self.stage, sealed(scored_by))

    def _carried(self, coarse: Scored) -> Scores:
        calibration = self.generation.manifest.calibration
        is_preranked = coarse.stage is Stage.PRERANKING
        return (calibration.preranking if is_preranked else calibration.retrieval)(coarse.scores)


def is_scored(answer: "asyncio.Future[Scores]") -> bool:
    """The shard came back in time and whole. Raises ContractError: a defect is no fault to be carried over."""
    if not answer.done() or answer.cancelled():
        return False
    if isinstance(error := answer.exception(), ContractError):
        raise error
    return error is None
