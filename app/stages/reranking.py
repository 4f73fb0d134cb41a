"""Re-ranking: the deep model over the best of the pre-ranked, in shards over the workers.

It owns how candidates are dealt out to shards and how what comes back is put together; processes and messages
are workers/. Shards are dealt round-robin from the pre-rank order, so that a lost shard costs an even sample
of the list and not its head; each is scored best first, so that a late one costs its tail. What isn't scored in
time keeps the score it came with, brought to the deep model's scale by the bundle's calibration and by what was
scored (control/carrying.py), so that fresh and carried compare.
"""

import asyncio
import time

import numpy as np

from app.bundle import Generation
from app.control.carrying import to_request_scale
from app.errors import StageFailed, require
from app.flow import Positions, Query, RequestScope, Scored, Scores, Stage, sealed
from app.workers.scoring import Answer, Shard, ShardScorer

MIN_SHARD = 16  # rows: below this the round trip costs more than the rows


class Reranking:
    """Scored (pre-ranked, best first) → Scored (re-ranked): same candidates, same order."""

    stage = Stage.RERANKING

    def __init__(self, generation: Generation, scorer: ShardScorer) -> None:
        self.generation = generation
        self.scorer = self.cost = scorer

    def wanted(self, scope: RequestScope, query: Query, given: Scored) -> int:
        return min(scope.rerank_width, len(given))

    async def run(self, scope: RequestScope, query: Query, given: Scored, until: float) -> Scored:
        """Score the `scope.width` best; what isn't back by the instant `until` (seconds, monotonic) is carried."""
        n, n_workers = scope.width, self.scorer.n_workers
        if not n:
            return self.substitute(scope, query, given)
        require(n_workers > 0, "no worker is alive", StageFailed)
        scores, scored_by = np.zeros_like(given.scores), given.scored_by.copy()
        scope.shards = max(1, min(n_workers, n // MIN_SHARD))

        def submit(at: Positions) -> Answer:
            def deliver(start: int, sliced: Scores) -> None:
                rows = at[start : start + len(sliced)]
                scores[rows], scored_by[rows] = sliced, self.stage

            candidates = given.candidates.take(at)
            shard = Shard(query.person, candidates, query.sent_with(candidates.rows), until)
            return self.scorer.submit(shard, deliver)

        answers = [submit(np.arange(s, n, scope.shards)) for s in range(scope.shards)]
        try:
            if waiting := [a for a in answers if isinstance(a, asyncio.Future)]:
                await asyncio.wait(waiting, timeout=max(0.0, until - time.monotonic()))
        finally:
            for answer in answers:
                answer.cancel()
        errors = [answer.exception() for answer in answers if not answer.cancelled()]
        if defects := [e for e in errors if e and not isinstance(e, StageFailed)]:  # of no worker: can't be carried
            raise defects[0]
        scope.shards_ok = errors.count(None)
        is_fresh = scored_by == self.stage
        if not is_fresh.all():
            scores = np.where(is_fresh, scores, to_request_scale(self._carried(given), scores, is_fresh))
        return Scored(given.candidates, sealed(scores), self.stage, sealed(scored_by))

    def substitute(self, scope: RequestScope, query: Query, given: Scored) -> Scored:
        """Everything carried."""
        return Scored(given.candidates, sealed(self._carried(given)), self.stage, given.scored_by)

    def _carried(self, coarse: Scored) -> Scores:
        calibration = self.generation.manifest.calibration
        return (calibration.preranking if coarse.stage is Stage.PRERANKING else calibration.retrieval)(coarse.scores)
