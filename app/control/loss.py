"""What a degraded answer is expected to lose: a pure rule on the bundle's table of measured losses.

A loss is 1 - DCG / ideal DCG, where the item at rank r of the full funnel's own k best gains (k - r) / k. The table
gives it by what re-ranking missed, for several shares of retrieval's width and for several shares pre-ranked; here
the parts of one request's coverage become one number. How the table is measured is the business of `pack`.
"""

from bisect import bisect
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from app.control.degradation import USER_LATE
from app.flow import Mask, Outcome, RequestScope, Scored, Stage, StageReport
from app.manifest import LossCurves, LossTable


def expected_loss(table: LossTable, scope: RequestScope, fine: Scored) -> float | None:
    """The expected loss, in [0, 1], of the answer that selection makes of `fine`; None if it was never measured.

    fine: in the order in which re-ranking received it, which is what the bands are cut from.
    """
    retrieval, wanted = scope.reports[Stage.RETRIEVAL], scope.reports[Stage.RERANKING].wanted
    missing = missing_shares(table.edges, ~fine.is_fresh[:wanted]).tolist()
    preranked = _share(scope.reports[Stage.PRERANKING])
    if retrieval.outcome in (Outcome.LATE, Outcome.FAILED):
        loss = at_share(table.popular, preranked, missing)
    else:  # fewer than wanted is no loss where there are no more
        retrieved = _share(retrieval) if retrieval.outcome is Outcome.PARTIAL else 1.0
        loss = loss_of_shares(table, retrieved, preranked, missing)
    if USER_LATE not in scope.degradations:
        return loss
    return None if table.nameless is None else 1 - (1 - loss) * (1 - table.nameless)


def loss_of_shares(table: LossTable, retrieved: float, preranked: float, missing: Sequence[float]) -> float:
    """The loss when a share of the width was retrieved, best first, and a share of that pre-ranked.

        max(retrieval(r), preranking(r p)),   p < 1

    The larger, not both: late items that weren't found would mostly have been lost for want of a pre-rank score.
    """
    found = at_share(table.retrieval, retrieved, missing, power=0.5)
    return max(found, at_share(table.preranking, retrieved * preranked, missing)) if preranked < 1 else found


def at_share(family: LossCurves, share: float, missing: Sequence[float], *, power: float = 1.0) -> float:
    """The loss between the curves of the two nearest shares; beyond the ends, that of the end.

    missing: of each band, see `missing_shares`. power: of the share, in which the loss is taken to be linear. That of
    retrieving less is nearly so in the root, since the first that are found count most.
    """
    at = bisect(family.shares[1:-1], share)
    losses = [np.interp(np.dot(c.weights, missing), c.x, c.y) for c in family.curves[at : at + 2]]
    return float(np.interp(share**power, np.power(family.shares[at : at + 2], power), losses))


def missing_shares(edges: tuple[int, ...], is_missing: Mask) -> NDArray[np.float64]:
    """Of each band's positions, the share that was wanted and not re-ranked: f64[..., bands].

    is_missing: bool[..., wanted], position by position; positions that were never wanted don't count.
    """
    padded = np.zeros((*is_missing.shape[:-1], edges[-1]))
    n = min(edges[-1], is_missing.shape[-1])
    padded[..., :n] = is_missing[..., :n]
    return np.add.reduceat(padded, edges[:-1], axis=-1) / np.subtract(edges[1:], edges[:-1])


def _share(report: StageReport) -> float:
    return min(1.0, report.done / report.wanted) if report.wanted else 1.0
