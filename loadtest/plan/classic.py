"""The classic sum: so many documents at so much each, over so many shards. Parameters by hand, no calibration. Pure.

    a lone request     documents / shards · seconds a document + a fan-out a shard
    many               Poisson arrivals, first come first served, on so many workers with a core or accelerator each

How many workers keep a p99 is searched by simulation, from the fewest that can do the work at all.
"""

import math
from dataclasses import dataclass

import numpy as np

from loadtest.plan.planning import Interval
from loadtest.plan.simulation import Machine, Station, Step, simulate

REQUESTS = 6_000
SEEDS = (0, 1)
BUSIEST = 0.97  # of the workers' time: beyond it a queue takes hours to settle, and no p99 can be promised
ROUNDING_S = 1e-9
GROWTH = 1.05  # of the workers, until p99 holds
MOST_TRIES = 60


@dataclass(frozen=True, slots=True)
class Sum:
    """documents of a request; seconds a document; seconds of fan-out a shard, spent by the one who deals out."""

    documents: int
    document_s: float
    fan_out_s: float = 0.0

    def alone_s(self, shards: int) -> float:
        """What a lone request takes."""
        return math.ceil(self.documents / shards) * self.document_s + shards * self.fan_out_s

    def hinders(self, qps: float, shards: int, p99_s: float) -> str:
        """Why no number of workers is enough; for when there is none."""
        if self.alone_s(shards) > p99_s + ROUNDING_S:
            return "a lone request is too slow"
        share = qps * shards * self.fan_out_s
        return f"dealing out takes {share:.0%} of its one core" if share else "no number of workers is enough"

    def fewest(self, qps: float, shards: int) -> int:
        """Workers that are 97 % busy at this rate."""
        return max(shards, math.ceil(qps * self.documents * self.document_s / BUSIEST))

    def percentiles_s(self, qps: float, shards: int, workers: int) -> tuple[Interval, Interval]:
        """p50 and p99 at this rate: mean, least and most of two seeds."""
        met = []
        for seed in SEEDS:
            rng = np.random.default_rng(seed)
            arrivals = np.cumsum(rng.exponential(1 / qps, REQUESTS))
            parts = np.full((REQUESTS, shards), math.ceil(self.documents / shards) * self.document_s)
            stations = [Station("dealer", 1, 0.0), Station("workers", workers, 0.0)]
            steps = [Step(0, np.full(REQUESTS, shards * self.fan_out_s)), Step(1, parts)]
            run = simulate(arrivals, steps, stations, Machine(1))
            met.append((run.percentile_s(50), run.percentile_s(99)))
        p50, p99 = (Interval(float(np.mean(v)), min(v), max(v)) for v in zip(*met, strict=True))
        return p50, p99

    def workers(self, qps: float, shards: int, p99_s: float) -> int:
        """The fewest workers at which p99 holds; 0 when there is no such number."""
        if self.alone_s(shards) > p99_s + ROUNDING_S or qps * shards * self.fan_out_s > BUSIEST:
            return 0
        workers = self.fewest(qps, shards)
        for _ in range(MOST_TRIES):
            if self.percentiles_s(qps, shards, workers)[1].likely <= p99_s + ROUNDING_S:
                return workers
            workers = max(workers + 1, math.ceil(workers * GROWTH))
        return 0
