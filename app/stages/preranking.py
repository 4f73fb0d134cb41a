"""Pre-ranking: a linear model over named features, cheap enough for everything that retrieval found.

It owns the arithmetic of the linear model, not that of the features (features.py) nor how many go on
(`Scored.top` in funnel.py).
"""

import numpy as np

from app.bundle import Generation
from app.control.costs import Cost
from app.features import Inputs, named_features
from app.flow import Candidates, Query, RequestScope, Scored, Stage, sealed


class Preranking:
    """Candidates → Scored: logistic(bias + features · weights), a probability."""

    stage = Stage.PRERANKING

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self.model = generation.pre_ranker
        self.cost = Cost(1e-3, 1e-7)

    def wanted(self, scope: RequestScope, query: Query, given: Candidates) -> int:
        return len(given)

    async def run(self, scope: RequestScope, query: Query, given: Candidates, until: float) -> Scored:
        """The arithmetic, for the `scope.width` nearest."""
        return self.score(query, given, scope.width)

    def score(self, query: Query, candidates: Candidates, width: int | None = None) -> Scored:
        """A score for each candidate, in the candidates' order; beyond `width` the retrieval score stands for it."""
        n = len(candidates) if width is None else width
        near = candidates if n == len(candidates) else candidates.take(np.arange(n))
        given = Inputs(self.generation.tables, query.person, near, query.sent_with(near.rows))
        logits = named_features(self.model.names, given) @ self.model.weights + self.model.bias
        with np.errstate(over="ignore"):  # exp(88) is infinite in float32 and its probability is 0
            scores = 1 / (1 + np.exp(-logits))
        scored_by = np.full(len(candidates), self.stage, np.uint8)
        if n < len(candidates):
            # Retrieval scores on this stage's scale, by way of the re-ranker's, which both are calibrated to.
            knots = self.generation.manifest.calibration
            carried = knots.preranking.inverse(knots.retrieval(candidates.retrieval_scores[n:]))
            scores = np.concatenate([scores, carried])
            scored_by[n:] = Stage.RETRIEVAL
        return Scored(candidates, sealed(scores), self.stage, sealed(scored_by))

    def substitute(self, scope: RequestScope, query: Query, given: Candidates) -> Scored:
        """The retrieval scores as they are, and said to be so."""
        scored_by = sealed(np.full(len(given), Stage.RETRIEVAL, np.uint8))
        return Scored(given, given.retrieval_scores, Stage.RETRIEVAL, scored_by)
