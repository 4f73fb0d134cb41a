"""From single requests at several widths to what a request takes whom: lines by width, shapes, waits. Pure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from loadtest.observed import Floats
from loadtest.plan.calibration import Configuration, Demand
from loadtest.plan.costs import Line, line
from loadtest.plan.metering import Spent
from loadtest.plan.recipe import shards

COLUMNS = ("users", "retrieval", "preranking", "reranking", "selection", "total")  # of an answer's took_ms
CLIENT_GUESS_S = 4e-4  # CPU of the generator a request, until it is metered
NICE_WEIGHT = 1.25  # the scheduler's: a step of niceness is a fifth less


@dataclass(frozen=True, slots=True)
class Single:
    """Requests sent one at a time at one width of re-ranking.

    took: seconds by stage, f64[n, 6], in the order of COLUMNS. spent: a request.
    """

    rerank: int
    took: Floats
    spent: Spent

    def scaled(self, by: float) -> "Single":
        """On a machine that is slower by this factor."""
        s = self.spent
        return Single(self.rerank, self.took * by, Spent(s.loop * by, s.threads * by, s.workers * by))


def demand_of(runs: Sequence[Single], base_runs: Sequence[Single], base: Configuration, nice: int) -> Demand:
    """The costs by width from runs at several, the shapes from those at the base widths. Pure."""
    at = {name: i for i, name in enumerate(COLUMNS)}
    every = [*runs, *base_runs]
    users_s = float(np.median([np.median(run.took[:, at["users"]]) for run in every]))

    def found(run: Single) -> int:
        return max(base.retrieve, run.rerank)

    def by_width(stage: str) -> Line:
        return line(_medians((found(run), float(run.took[:, at[stage]].mean())) for run in every))

    retrieval, preranking = by_width("retrieval"), by_width("preranking")

    def narrow(run: Single) -> float:
        return users_s + retrieval(found(run)) + preranking(found(run))

    threads = float(np.mean([run.spent.threads / narrow(run) for run in every]))
    narrow_on = "threads" if threads > 0.5 else "workers"
    # A shard's CPU; what the narrow part took the workers, if it did, is not its.
    of_shards = []
    for run in every:
        n_shards = shards(run.rerank, base.workers)
        cpu = run.spent.workers - (narrow(run) if narrow_on == "workers" else 0.0)
        of_shards.append((run.rerank / n_shards, max(cpu, 1e-6) / n_shards))
    shard = line(_medians(of_shards))
    loop_s, fan_out_s, row_s = _loop(every, base.workers)
    took = np.concatenate([run.took for run in base_runs])
    narrow_took = took[:, at["users"]] + took[:, at["retrieval"]] + took[:, at["preranking"]]
    loop_took = took[:, at["total"]] - narrow_took - took[:, at["reranking"]]
    n_shards = shards(base.rerank, base.workers)
    dealing = n_shards * fan_out_s + base.rerank * row_s
    shapes = np.column_stack([_shape(x) for x in (loop_took, narrow_took, took[:, at["reranking"]])])
    return Demand(
        loop_s=loop_s,
        fan_out_s=fan_out_s,
        row_s=row_s,
        users_s=users_s,
        retrieval=retrieval,
        preranking=preranking,
        shard=shard,
        hop_s=max(0.0, float(loop_took.mean()) - loop_s),
        round_trip_s=max(0.0, float(took[:, at["reranking"]].mean()) - dealing - shard(base.rerank / n_shards)),
        narrow_on=narrow_on,
        client_s=CLIENT_GUESS_S,
        worker_weight=NICE_WEIGHT**-nice,
        shapes=tuple(map(tuple, shapes.round(4).tolist())),
    )


def _loop(runs: Sequence[Single], workers: int) -> tuple[float, float, float]:
    """The event loop's CPU: of a request, of each shard, of each row; none is negative."""
    x = np.array([[1.0, shards(run.rerank, workers), run.rerank] for run in runs])
    y, kept = np.array([run.spent.loop for run in runs]), [0, 1, 2]
    while True:
        fitted, *_ = np.linalg.lstsq(x[:, kept] / y[:, None], np.ones(len(y)), rcond=None)
        if (fitted >= 0).all():
            break
        kept.pop(int(np.argmin(fitted)))
    found = dict(zip(kept, fitted.tolist(), strict=True))
    return found.get(0, 0.0), found.get(1, 0.0), found.get(2, 0.0)


def _medians(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """One point a size: the median of its seconds."""
    by_size: dict[float, list[float]] = {}
    for size, seconds in points:
        by_size.setdefault(float(size), []).append(seconds)
    return [(size, float(np.median(seconds))) for size, seconds in sorted(by_size.items())]


def _shape(seconds: Floats) -> Floats:
    """Single values over their mean; what rounding made negative is 0."""
    return np.maximum(seconds, 0.0) / max(float(seconds.mean()), 1e-9)
