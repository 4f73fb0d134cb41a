"""WHO RUNS WHAT: a configuration becomes stations and steps. The one place that knows how the service is built.

    loop ─▶ narrow part ─▶ loop: deals out ─▶ shards, side by side ─▶ loop: collects, answers
    (one)   threads or      (one)               workers                 (one)
            workers

The narrow part is person, retrieval and pre-ranking. Whether threads or workers run it is not assumed: whose CPU it
took in the calibration decides (`Demand.narrow_on`). A load generator on the same machine is a station of its own, in
front and at the end; plans leave it out.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loadtest.plan.calibration import Calibration, Configuration, Demand
from loadtest.plan.simulation import Floats, Machine, Simulated, Station, Step, simulate

MIN_SHARD = 16  # rows: fewer are not worth a shard of their own (the service's rule)
LOOP, NARROW, WORKERS, CLIENT = range(4)
BEFORE = 0.5  # of the loop's own work comes before the narrow part; answers and requests weigh about the same
MOST_REQUESTS = 40_000  # of a simulation


def shards(rerank: int, workers: int) -> int:
    """How many shards the service makes of so many candidates."""
    return max(1, min(workers, rerank // MIN_SHARD))


@dataclass(frozen=True, slots=True)
class Model:
    """What is simulated: who there is, and what a request takes them. scale: seconds over those of the calibration."""

    demand: Demand
    configuration: Configuration
    machine: Machine
    has_client: bool = False
    scale: float = 1.0

    @property
    def stations(self) -> list[Station]:
        on_workers = self.demand.narrow_on == "workers"
        chosen = self.configuration
        return [
            Station("loop", 1),
            Station("narrow", 1 if on_workers else chosen.threads),
            Station("workers", chosen.workers, self.demand.worker_weight),
            Station("client", 1),
        ]

    def means(self) -> dict[str, float]:
        """CPU seconds of a request by who spends them, on average."""
        d, c = self.demand, self.configuration
        n_shards = shards(c.rerank, c.workers)
        retrieval, preranking = d.retrieval(c.retrieve), d.preranking(c.retrieve)
        means = {
            "loop": d.loop_s + n_shards * d.fan_out_s + c.rerank * d.row_s,
            "users": d.users_s,
            "retrieval": retrieval,
            "preranking": preranking,
            "reranking": n_shards * d.shard(c.rerank / n_shards),
            "client": d.client_s if self.has_client else 0.0,
        }
        return {who: self.scale * seconds for who, seconds in means.items()}

    def steps(self, n: int, rng: np.random.Generator) -> list[Step]:
        """The steps of n requests. Their shapes are drawn whole, so that who is slow in one is so in all, as met."""
        d, c, means = self.demand, self.configuration, self.means()
        drawn = np.asarray(d.shapes)[rng.integers(0, len(d.shapes), n)]
        of_loop, of_narrow, of_shards = drawn.T
        n_shards = shards(c.rerank, c.workers)
        dealing = self.scale * (n_shards * d.fan_out_s + c.rerank * d.row_s)
        own = means["loop"] - dealing
        narrow = means["users"] + means["retrieval"] + means["preranking"]
        parts = np.repeat((of_shards * means["reranking"] / n_shards)[:, None], n_shards, axis=1)
        steps = [
            Step(LOOP, BEFORE * own * of_loop, self.scale * d.hop_s * of_loop),
            Step(WORKERS if d.narrow_on == "workers" else NARROW, narrow * of_narrow),
            Step(LOOP, np.full(n, dealing)),
            Step(WORKERS, parts, self.scale * d.round_trip_s * of_shards),
            Step(LOOP, (1 - BEFORE) * own * of_loop),
        ]
        if self.has_client:
            half = np.full(n, means["client"] / 2)
            steps = [Step(CLIENT, half), *steps, Step(CLIENT, half)]
        return steps

    def at(self, rate: float, seconds: float, seed: int = 0) -> Simulated:
        """What Poisson arrivals of this rate meet for so long; never more than 40,000 requests of it."""
        rng = np.random.default_rng([seed, 7])
        n = int(min(max(rate * seconds, 100), MOST_REQUESTS))
        arrivals: Floats = np.cumsum(rng.exponential(1 / rate, n))
        return simulate(arrivals, self.steps(n, rng), self.stations, self.machine, seed)

    @property
    def bound(self) -> float:
        """Requests a second that no arrangement exceeds: the cores' time, or the loop's own, over what one takes."""
        means = self.means()
        whole = sum(means.values()) / self.machine.cores
        narrow = means["users"] + means["retrieval"] + means["preranking"]
        c = self.configuration
        held = {"loop": means["loop"], "workers": means["reranking"] / c.workers}
        held["workers" if self.demand.narrow_on == "workers" else "narrow"] = (
            (means["reranking"] + narrow) / c.workers if self.demand.narrow_on == "workers" else narrow / c.threads
        )
        return 1 / max(whole, *held.values())


def model(
    calibration: Calibration,
    configuration: Configuration,
    *,
    scale: float = 1.0,
    has_client: bool = False,
    cores: int | None = None,
) -> Model:
    """The calibrated service in another configuration; scale: how much slower the machine is than it was."""
    machine = Machine(cores or calibration.cores, calibration.contention, calibration.wake_s * scale)
    return Model(calibration.demand, configuration, machine, has_client, scale)


def latencies(models: list[Model], rate: float, seconds: float, seed: int = 0) -> NDArray[np.float64]:
    """Of one run in parts, each at its own speed: all latencies together."""
    return np.concatenate([one.at(rate, seconds / len(models), seed + i).latency_s for i, one in enumerate(models)])
