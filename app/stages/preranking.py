"""Pre-ranking: a linear model over named features, cheap enough for everything that retrieval found.

It owns the arithmetic of the linear model, not that of the features (features.py) nor how many go on
(`Scored.top` in funnel.py).
"""

import asyncio
import time
from concurrent.futures import Executor

import numpy as np
from numpy.typing import NDArray

from app.bundle import Generation
from app.features import Inputs, named_features
from app.flow import Candidates, Query, RequestScope, Scored, Stage, sealed


class Preranking:
    """Candidates → Scored: logistic(bias + features · weights), a probability."""

    stage = Stage.PRERANKING

    def __init__(self, generation: Generation, threads: Executor) -> None:
        self.generation, self.threads = generation, threads
        self.model = generation.pre_ranker

    def wanted(self, scope: RequestScope, query: Query, given: Candidates) -> int:
        return len(given)

    async def run(self, scope: RequestScope, query: Query, given: Candidates, until: float) -> Scored:
        """The arithmetic in a thread; what is late goes on there unheard."""
        work = asyncio.get_running_loop().run_in_executor(self.threads, self.score, query, given)
        return await asyncio.wait_for(work, until - time.monotonic())

    def score(self, query: Query, candidates: Candidates) -> Scored:
        """A score for each candidate, in the candidates' order."""
        sent = query.sent_with(candidates.rows)
        given = Inputs(self.generation.tables, query.person, candidates, sent)
        logits = named_features(self.model.names, given) @ self.model.weights + self.model.bias
        with np.errstate(over="ignore"):  # exp(88) is infinite in float32 and its probability is 0
            scores = 1 / (1 + np.exp(-logits))
        return Scored(candidates, sealed(scores), self.stage, _all(self.stage, len(scores)))

    def substitute(self, scope: RequestScope, query: Query, given: Candidates) -> Scored:
        """The retrieval scores as they are, and said to be so."""
        n = len(given)
        return Scored(given, given.retrieval_scores, Stage.RETRIEVAL, _all(Stage.RETRIEVAL, n))


def _all(stage: Stage, n: int) -> NDArray[np.uint8]:
    return sealed(np.full(n, stage, np.uint8))
