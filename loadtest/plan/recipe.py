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
STALLS = 0.9  # quantile of a shape beyond which it is the machine that stalled, and not the request that is larger


def shards(rerank: int, workers: int) -> int:
    """How many shards the service makes of so many candidates."""
    return max(1, min(workers, rerank // MIN_SHARD))


@dataclass(frozen=True, slots=True)
class Model:
    """What is simulated: who there is, and what a request takes them.

    base: what the demand's shapes were measured in. scale: seconds over those of the calibration.
    """

    demand: Demand
    base: Configuration
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

    def means(self, configuration: Configuration | None = None) -> dict[str, float]:
        """CPU seconds of a request by who spends them, on average."""
        d, c = self.demand, configuration or self.configuration
        n_shards = shards(c.rerank, c.workers)
        means = {
            "loop": d.loop_s + self._dealing(c),
            "users": d.users_s,
            "retrieval": d.retrieval(c.retrieve),
            "preranking": d.preranking(c.retrieve),
            "reranking": n_shards * d.shard(c.rerank / n_shards),
            "client": d.client_s if self.has_client else 0.0,
        }
        return {who: self.scale * seconds for who, seconds in means.items()}

    def steps(self, n: int, rng: np.random.Generator) -> list[Step]:
        """The steps of n requests. Their shapes are drawn whole, so that who is slow in one is so in all, as met."""
        d, c, means, base = self.demand, self.configuration, self.means(), self.means(self.base)
        drawn = np.asarray(d.shapes)
        of_loop, of_narrow, of_shards = drawn[rng.integers(0, len(drawn), n)].T
        n_shards, n_base = (shards(one.rerank, one.workers) for one in (c, self.base))
        dealing = self.scale * self._dealing(c)
        own, own_base = means["loop"] - dealing, base["loop"] - self.scale * self._dealing(self.base)
        ends = _drawn(own, own_base, of_loop, drawn[:, 0], rng)
        narrow = _drawn(_narrow(means), _narrow(base), of_narrow, drawn[:, 1], rng)
        longest = _drawn(means["reranking"] / n_shards, base["reranking"] / n_base, of_shards, drawn[:, 2], rng)
        pause = self.scale * d.round_trip_s * np.minimum(of_shards, np.quantile(drawn[:, 2], STALLS))
        steps = [
            Step(LOOP, BEFORE * ends, np.full(n, self.scale * d.hop_s)),
            Step(WORKERS if d.narrow_on == "workers" else NARROW, narrow),
            Step(LOOP, np.full(n, dealing)),
            Step(WORKERS, np.repeat(longest[:, None], n_shards, axis=1), pause),
            Step(LOOP, (1 - BEFORE) * ends),
        ]
        if self.has_client:
            half = np.full(n, means["client"] / 2)
            steps = [Step(CLIENT, half), *steps, Step(CLIENT, half)]
        return steps

    def _dealing(self, c: Configuration) -> float:
        """The loop's CPU to deal out shards and to collect them, at the reference speed."""
        return shards(c.rerank, c.workers) * self.demand.fan_out_s + c.rerank * self.demand.row_s

    def at(self, rate: float, seconds: float, seed: int = 0) -> Simulated:
        """What Poisson arrivals of this rate meet for so long; never more than 40,000 requests of it."""
        rng = np.random.default_rng([seed, 7])
        n = int(min(max(rate * seconds, 100), MOST_REQUESTS))
        arrivals: Floats = np.cumsum(rng.exponential(1 / rate, n))
        return simulate(arrivals, self.steps(n, rng), self.stations, self.machine, seed)

    @property
    def bound(self) -> float:
        """Requests a second that no arrangement exceeds: the cores' time, or the loop's own, over what one takes."""
        means, c = self.means(), self.configuration
        narrow, of_workers = _narrow(means), means["reranking"]
        if self.demand.narrow_on == "workers":
            narrow, of_workers = 0.0, of_workers + narrow
        whole = sum(means.values()) / self.machine.cores
        return 1 / max(whole, means["loop"], narrow / c.threads, of_workers / c.workers)


def _narrow(means: dict[str, float]) -> float:
    return means["users"] + means["retrieval"] + means["preranking"]


def _drawn(mean: float, base: float, shape: Floats, shapes: Floats, rng: np.random.Generator) -> Floats:
    """Seconds of single requests whose mean is `mean`, from shapes measured where it was `base`.

    What varies with the request grows with the work. The slowest tenth met stalls of the machine: those keep their
    length, and longer work meets them more often.
    """
    if base <= 0:
        return mean * shape
    edge, ratio = float(np.quantile(shapes, STALLS)), mean / base
    stalls = np.maximum(shapes - edge, 0.0)
    met = np.maximum(shape - edge, 0.0) * (rng.random(len(shape)) < ratio)
    for more in range(1, int(np.ceil(ratio))):
        again = stalls[rng.integers(0, len(stalls), len(shape))]
        met = met + again * (rng.random(len(shape)) < ratio - more)
    return np.asarray(mean * np.minimum(shape, edge) + base * met)


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
    return Model(calibration.demand, calibration.base, configuration, machine, has_client, scale)


def latencies(models: list[Model], rate: float, seconds: float, seed: int = 0) -> NDArray[np.float64]:
    """Of one run in parts, each at its own speed: all latencies together."""
    return np.concatenate([one.at(rate, seconds / len(models), seed + i).latency_s for i, one in enumerate(models)])
