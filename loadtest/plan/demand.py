"""From single requests at several widths to what a request takes whom: lines by width, shapes, waits. Pure.

Each was taken its whole way by one worker: nothing here says what sharing one costs (recipe.py, FAN_OUT_S).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from loadtest.observed import Floats
from loadtest.plan.calibration import Configuration, Demand
from loadtest.plan.costs import Line, line
from loadtest.plan.metering import Spent

COLUMNS = ("queue", "users", "retrieval", "preranking", "reranking", "selection", "total")  # of an answer's took_ms
CLIENT_GUESS_S = 4e-4  # CPU of the generator a request, until it is metered
NICE_WEIGHT = 1.25  # the scheduler's: a step of niceness is a fifth less


@dataclass(frozen=True, slots=True)
class Single:
    """Requests sent one at a time at one width of re-ranking.

    took: seconds by stage, f64[n, 7], in the order of COLUMNS. spent: a request. retrieve: at least so many were found,
    0 for the base's width.
    """

    rerank: int
    took: Floats
    spent: Spent
    retrieve: int = 0


def demand_of(runs: Sequence[Single], base_runs: Sequence[Single], base: Configuration, nice: int) -> Demand:
    """The costs by width from runs at several, the shapes from those at the base widths. Pure."""
    at = {name: i for i, name in enumerate(COLUMNS)}
    every = [*runs, *base_runs]

    def found(run: Single) -> int:
        return max(run.retrieve or base.retrieve, run.rerank)

    def by_width(stage: str, width: Callable[[Single], int]) -> Line:
        points = _medians((width(run), float(run.took[:, at[stage]].mean())) for run in every)
        return replace(line(points), points=tuple(points))

    retrieval, preranking = by_width("retrieval", found), by_width("preranking", found)
    shard = by_width("reranking", lambda run: run.rerank)

    def others(run: Single) -> float:
        """A worker's CPU that is no stage's."""
        return run.spent.workers - retrieval(found(run)) - preranking(found(run)) - shard(run.rerank)

    users_s = max(0.0, float(np.median([others(run) for run in every])))
    loop_s = float(np.median([run.spent.loop for run in every]))
    took = np.concatenate([run.took for run in base_runs])
    narrow_took, rerank_took = took[:, at["retrieval"]] + took[:, at["preranking"]], took[:, at["reranking"]]
    rest_took = took[:, at["total"]] - narrow_took - rerank_took
    shapes = np.column_stack([_shape(x) for x in (rest_took, narrow_took, rerank_took)])
    return Demand(
        loop_s=loop_s,
        users_s=users_s,
        retrieval=retrieval,
        preranking=preranking,
        shard=shard,
        trip_s=max(0.0, float(rest_took.mean()) - loop_s - users_s),
        client_s=CLIENT_GUESS_S,
        worker_weight=NICE_WEIGHT**-nice,
        shapes=tuple(map(tuple, shapes.round(4).tolist())),
    )


def _medians(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """One point a size: the median of its seconds."""
    by_size: dict[float, list[float]] = {}
    for size, seconds in points:
        by_size.setdefault(float(size), []).append(seconds)
    return [(size, float(np.median(seconds))) for size, seconds in sorted(by_size.items())]


def _shape(seconds: Floats) -> Floats:
    """Single values over their mean; what rounding made negative is 0."""
    return np.maximum(seconds, 0.0) / max(float(seconds.mean()), 1e-9)
