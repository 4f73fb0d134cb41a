"""Selection: what is shown, in which order, and with which probability.

It owns the value that the order is by, and it drops to k. Today the value is the score and the order is certain,
so every propensity is 1; a value of another kind (a bid times its probability), boosts and exploration belong here.
"""

import numpy as np

from app.flow import Outcome, Query, Ranking, RequestScope, Scored, Stage, sealed


def select(scope: RequestScope, query: Query, fine: Scored) -> Ranking:
    """The min(k, candidates) best by value; non-finite values sink to the end, ties break by row."""
    best = fine.top(query.k)
    return Ranking(
        rows=best.candidates.rows,
        scores=best.scores,
        values=best.scores,
        stages=best.scored_by,
        propensities=sealed(np.ones(len(best), np.float64)),
        generation=scope.generation,
        degradations=tuple(scope.degradations),
        empty_reason=None if len(best) else _why_empty(scope, query),
    )


def _why_empty(scope: RequestScope, query: Query) -> str:
    if query.candidates is not None:
        return "none of the candidates is known and left by filters and exclusions"
    if scope.reports[Stage.RETRIEVAL].outcome in (Outcome.LATE, Outcome.FAILED):
        return "retrieval fell back on popular items, and filters and exclusions leave none of them"
    unknown = f"; {n} of their names are in no vocabulary" if (n := query.ignored.get("filters")) else ""
    return f"no item satisfies the filters and is not excluded{unknown}" if query.filters else "every item is excluded"
