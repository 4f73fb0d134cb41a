"""WHO RUNS WHAT: a configuration becomes stations and steps. The one place that knows how the service is built.

    whole     loop ─▶ narrow part and re-ranking, one worker ─▶ loop
    shared    loop ─▶ narrow part, a thread ─▶ loop: deals out ─▶ shards, side by side, workers ─▶ loop

One worker takes a request its whole way, unless re-ranking alone would take it more than ALONE of the SLA and there are
several: these share it. The narrow part is person, retrieval and pre-ranking. A load generator on the same machine is a
station of its own, in front and at the end; plans leave it out.
"""

from dataclasses import dataclass, replace

import numpy as np

from loadtest.plan.calibration import Calibration, Configuration, Demand
from loadtest.plan.simulation import Floats, Machine, Simulated, Station, Step, simulate

ALONE = 0.3  # of the SLA, for re-ranking by one worker (the service's rule, as the next; a test holds both to it)
NARROWS_AT = 0.85  # of the SLA: the service steers its 99th percentile there, and narrows the funnel beyond
MIN_SHARD = 16  # rows: fewer are not worth a shard of their own
MORE_THREADS, MOST_THREADS = 4, 32  # of asyncio's own pool: so many more than cores, and the most
# CPU of the loop a shard, roughly: no calibration measures it. A shard comes back in slices, so longer ones cost more.
# Met once on two busy cores (2026-11, paced rows, 2 to 5 workers): what a shared request took the loop beyond a whole
# one, over its shards, was 0.7 to 1.5 ms where a shard took 0.16 to 0.4 of the SLA, 1.3 to 4.4 ms at twice the rows.
FAN_OUT_S = 1e-3
FREED = 0.2  # of what an answer takes the loop, before its worker is given the next request: assumed, not measured
LOOP, THREADS, WORKERS, CLIENT = range(4)
MOST_REQUESTS = 40_000  # of a simulation
STEP, PERCENTILE, FLOOR = 0.001, 0.99, 0.3  # of the service's rule for quality, as what follows
RECOVERY_PER_S = (1 - FLOOR) / 1.8
FEW, MANY, POWER = 0.3, 0.5, 2  # the last of re-ranking's width, which coverage is a share of
LOWEST, SLACK, IN_LOOP_S, MAX_INFLIGHT = 4.0, 1.6, 2e-3, 256  # of the service's rule for how many may be in flight
STALLS = 0.9  # quantile of a shape beyond which it is the machine that stalled, and not the request that is larger


@dataclass(frozen=True, slots=True)
class Model:
    """What is simulated: who there is, and what a request takes them.

    base: what the demand's shapes were measured in. scale: seconds over those of the calibration. warmth:
    what the service's CPU for a request is of the demand where cores are idle, and what is added to that where all are
    busy: less than nothing if caches stay warm. busiest: up to where that was met, a share of the cores' time; beyond,
    it is as there. lone: what it is with one worker, of what it is with the base's or as many as there are cores;
    between, in proportion. warm: what it is here. beyond_s: in every latency, by nobody here.
    stretch: of what latencies are over their median. The client's was metered under load.
    """

    demand: Demand
    base: Configuration
    configuration: Configuration
    machine: Machine
    has_client: bool = False
    scale: float = 1.0
    warmth: tuple[float, float] = (1.0, 0.0)
    busiest: float = 1.0
    lone: float = 1.0
    warm: float = 1.0
    beyond_s: float = 0.0
    stretch: float = 1.0

    @property
    def stations(self) -> list[Station]:
        return [
            Station("loop", 1),
            Station("threads", self._threads),
            Station("workers", self.configuration.workers, self.demand.worker_weight),
            Station("client", 1),
        ]

    @property
    def _threads(self) -> int:
        return min(MOST_THREADS, self.machine.cores + MORE_THREADS)

    def is_shared(self, c: Configuration) -> bool:
        """Whether several workers share a request's re-ranking."""
        return c.workers > 1 and self.scale * self.demand.shard(c.rerank) > ALONE * c.sla_s

    def shards(self, c: Configuration) -> int:
        """In how many shards a request's candidates are re-ranked."""
        return max(1, min(c.workers, c.rerank // MIN_SHARD)) if self.is_shared(c) else 1

    def means(self, configuration: Configuration | None = None) -> dict[str, float]:
        """CPU seconds of a request by who spends them, on average."""
        d, c = self.demand, configuration or self.configuration
        n_shards = self.shards(c)
        means = {
            "loop": d.loop_s + self._dealing(c),
            "users": d.users_s,
            "retrieval": d.retrieval(c.retrieve),
            "preranking": d.preranking(c.retrieve),
            "reranking": n_shards * d.shard(c.rerank / n_shards),
            "client": d.client_s if self.has_client else 0.0,
        }
        return {who: self.scale * seconds * (1.0 if who == "client" else self.warm) for who, seconds in means.items()}

    def steps(self, n: int, rng: np.random.Generator) -> list[Step]:
        """The steps of n requests. Their shapes are drawn whole, so that who is slow in one is so in all, as met."""
        d, c, means, base = self.demand, self.configuration, self.means(), self.means(self.base)
        drawn = np.asarray(d.shapes)
        of_loop, of_narrow, of_shards = drawn[rng.integers(0, len(drawn), n)].T
        n_shards, n_base = self.shards(c), self.shards(self.base)
        half, trip = (np.asarray(self.scale * self.warm * s * of_loop) for s in (d.loop_s / 2, d.trip_s))
        narrow = _drawn(_narrow(means), _narrow(base), of_narrow, drawn[:, 1], rng)
        longest = _drawn(means["reranking"] / n_shards, base["reranking"] / n_base, of_shards, drawn[:, 2], rng)
        between = [Step(WORKERS, narrow + longest, trip, holds=True), Step(LOOP, FREED * half)]
        if self.is_shared(c):
            between = [
                Step(THREADS, narrow),
                Step(LOOP, np.full(n, self.scale * self.warm * self._dealing(c))),
                Step(WORKERS, np.repeat(longest[:, None], n_shards, axis=1), trip),
            ]
        rest = half if self.is_shared(c) else (1 - FREED) * half
        steps = [Step(LOOP, half), *between, Step(LOOP, rest)]  # requests and answers weigh about the same
        if self.has_client:
            client = np.full(n, means["client"] / 2)
            steps = [Step(CLIENT, client), *steps, Step(CLIENT, client)]
        return steps

    def _dealing(self, c: Configuration) -> float:
        """The loop's CPU to deal out shards and to collect them."""
        return self.shards(c) * FAN_OUT_S if self.is_shared(c) else 0.0

    @property
    def narrows_at_s(self) -> float:
        """The latency from which on the service narrows."""
        return NARROWS_AT * self.configuration.sla_s

    def held_p99_s(self, latency_s: Floats) -> float:
        """The p99 of these latencies at full widths, or where the service holds it by narrowing, if that is less."""
        return min(float(np.percentile(latency_s, 99)), self.narrows_at_s)

    @property
    def most(self) -> float:
        """In flight, beyond which the service hopes for no answer in time: its rule, on the means of what work takes.

        The service goes by the 80th percentile of what it meets, so its number is smaller.
        """
        d, c = self.demand, self.configuration
        n = max(int(FLOOR * c.retrieve), c.rerank)
        floor_s = (d.retrieval(n) + d.preranking(n)) / c.workers + d.shard(int(FLOOR**POWER * c.rerank) / c.workers)
        in_time = SLACK * c.sla_s / (IN_LOOP_S + self.scale * self.warm * floor_s)
        return min(MAX_INFLIGHT, max(LOWEST, in_time))

    def coverage(self, seen: Simulated) -> float:
        """Of these requests at full widths: the mean share that the service would have re-ranked.

        It narrows a request by who waits as it comes and, if one worker takes it whole, as it is begun.
        """
        waiting = in_flight(seen, seen.arrived_s)
        if not self.is_shared(self.configuration):
            alone_s = sum(self.means().values())
            begun = np.maximum(seen.arrived_s + seen.latency_s - alone_s, seen.arrived_s)
            waiting = np.maximum(waiting, in_flight(seen, begun))
        return coverage(seen, self.narrows_at_s, (waiting - self.configuration.workers) / self.most)

    def at(self, rate: float, seconds: float, seed: int = 0) -> Simulated:
        """What Poisson arrivals of this rate meet for so long; never more than 40,000 requests of it."""
        rng = np.random.default_rng([seed, 7])
        n = int(min(max(rate * seconds, 100), MOST_REQUESTS))
        return self._met(np.cumsum(rng.exponential(1 / rate, n)), rate, seed, rng)

    def of(self, arrivals: Floats, rate: float, seed: int = 0) -> Simulated:
        """What these arrivals meet, f64[n] rising, seconds, which come at this rate."""
        return self._met(arrivals, rate, seed, np.random.default_rng([seed, 8]))

    def _met(self, arrivals: Floats, rate: float, seed: int, rng: np.random.Generator) -> Simulated:
        here = replace(self, warm=self.factor(rate))
        steps = here.steps(len(arrivals), rng)
        seen = simulate(arrivals, steps, self.stations, self.machine, seed)
        over = np.maximum(seen.latency_s - np.median(seen.latency_s), 0.0)
        return replace(seen, latency_s=seen.latency_s + self.scale * self.beyond_s + (self.stretch - 1) * over)

    def cpu_s(self, rate: float) -> float:
        """CPU of the service for a request at this rate."""
        means = self.means()
        return self.factor(rate) * (sum(means.values()) - means["client"])

    def factor(self, rate: float) -> float:
        """What the service's CPU for a request is of the demand at this rate: by how busy it keeps the cores.

        factor = cold + more · min(busiest, busy),   busy = rate · (factor · demand + client) / cores
        """
        (cold, more), means = self._warmth, replace(self, warm=1.0).means()
        client = rate * means.pop("client") / self.machine.cores
        alone = rate * sum(means.values()) / self.machine.cores
        busy = (alone * cold + client) / (1 - alone * more) if alone * more < 1 else 1.0
        return cold + more * min(self.busiest, busy)

    @property
    def _warmth(self) -> tuple[float, float]:
        """`warmth` with so many workers."""
        others, most = self.configuration.workers - 1, max(1, min(self.base.workers, self.machine.cores) - 1)
        here = self.lone + (1 - self.lone) * min(others, most) / most
        return here * self.warmth[0], here * self.warmth[1]

    @property
    def bound(self) -> float:
        """Requests a second that no arrangement exceeds: the cores' time, or the loop's own, over what one takes."""
        means, c = self.means(), self.configuration
        of_threads, of_workers = _narrow(means), means["reranking"]
        if not self.is_shared(c):
            of_threads, of_workers = 0.0, of_threads + of_workers
        of_cores = sum(means.values()) / self.machine.cores
        cold, more = self._warmth
        fastest = 1 / min(cold, cold + more * self.busiest)
        return fastest / max(of_cores, means["loop"], of_threads / self._threads, of_workers / c.workers)


def in_flight(seen: Simulated, at: Floats) -> Floats:
    """How many requests are in flight at these instants; who comes is, who ends isn't any more."""
    ended = np.sort(seen.arrived_s + seen.latency_s)
    come, gone = (np.searchsorted(instants, at, side="right") for instants in (seen.arrived_s, ended))
    return np.asarray(come - gone, np.float64)


def coverage(seen: Simulated, narrows_at_s: float, depths: Floats) -> float:
    """Mean share of its width that re-ranking would have run at: the service's rules for quality, on these latencies.

    Who takes longer makes it narrow those who come after, for as long as quality takes to recover; where many wait,
    each is narrowed as well. That they would be done the sooner isn't simulated, and matters little where hardly any
    are narrowed.

    depths: how many wait beside each, over the most, f64[n].
    """
    by_depth = (1 - (1 - FLOOR) * np.clip((depths - FEW) / (MANY - FEW), 0.0, 1.0)).tolist()
    ended = seen.arrived_s + seen.latency_s
    order = np.argsort(ended, kind="stable")
    changes = np.where(seen.latency_s[order] <= narrows_at_s, STEP, -STEP * PERCENTILE / (1 - PERCENTILE))
    quality, at, met, arrivals = 1.0, 0.0, 0.0, seen.arrived_s.tolist()
    following = 0
    for instant, change in zip(ended[order].tolist(), changes.tolist(), strict=True):
        while following < len(arrivals) and arrivals[following] < instant:
            met += min(by_depth[following], quality + RECOVERY_PER_S * (arrivals[following] - at)) ** POWER
            following += 1
        quality = min(1.0, max(FLOOR, min(1.0, quality + RECOVERY_PER_S * (instant - at)) + change))
        at = instant
    return (met + sum(share**POWER for share in by_depth[following:])) / len(arrivals)


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
    machine = Machine(cores or calibration.cores, calibration.wake_s * scale)
    return Model(
        calibration.demand,
        calibration.base,
        configuration,
        machine,
        has_client,
        scale,
        calibration.warmth,
        calibration.busiest,
        calibration.lone,
        beyond_s=calibration.beyond_s,
        stretch=calibration.stretch,
    )
