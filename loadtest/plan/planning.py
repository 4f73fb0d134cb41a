"""A question (rate, p99, catalogue, prices) ─▶ a plan, by simulation of one machine and arithmetic over many. Pure.

Requests are spread over machines at random, so each sees Poisson arrivals of its share: one is simulated, and the
others are like it. More than one machine was never measured here, and a plan says so.

The highest rate is where p99 leaves the SLA or, before that, coverage falls under .99, as full quality ends: a request
that takes 0.85 of the SLA makes the service narrow its funnel for those who come after, and one beside which many wait
is narrowed itself (recipe.py's `coverage`).
Intervals come from the speeds that the calibration met (their 10th and 90th percentile), two seeds, and, for another
catalogue, the interval of the exponent.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from loadtest.plan.calibration import Calibration, Configuration
from loadtest.plan.costs import Exponent
from loadtest.plan.recipe import Model, model

REQUESTS = 4_000  # simulated for a yes or no
EXPECTED_REQUESTS = 8_000  # for a figure that is shown
WITHIN = 0.02  # of a rate that is searched
LEAST_COVERAGE = 0.99  # at the highest rate
SEEDS = (0, 1)
# Lists grow with the root of the catalogue and so many more are probed: between a graph's logarithm and a flat scan.
ASSUMED = Exponent(0.5, 0.3, 0.7)


@dataclass(frozen=True, slots=True)
class Question:
    """qps: requests a second in all. p99_s: the SLA. price: of a core-hour, in any currency."""

    qps: float
    p99_s: float
    items: int
    retrieve: int
    rerank: int
    cores: int
    workers: int | None = None
    price: float | None = None


@dataclass(frozen=True, slots=True)
class Interval:
    likely: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Plan:
    """The answer. rate: the highest at the SLA of one machine. headroom: what could come on top, over qps, by loss.

    is_shared: several workers share a request's re-ranking. machines: 0 when no rate keeps the SLA.
    stage_s: CPU seconds of a request by stage. busy: share of the cores.
    """

    configuration: Configuration
    is_shared: bool
    machines: int
    rate: Interval
    p50_s: Interval
    p99_s: Interval
    headroom: dict[str, float]
    stage_s: dict[str, float]
    busy: float
    per_million: float | None
    by_workers: dict[int, float]


def plan(calibration: Calibration, question: Question) -> Plan:
    """The number of workers with the highest rate, and as many machines as it takes."""
    likely, fast, slow = variants(calibration, question)
    tried = [question.workers] if question.workers else list(range(1, question.cores + 1))
    by_workers = {w: highest_rate(with_workers(likely, w), REQUESTS) for w in tried}
    most = max(by_workers.values())
    workers = min(w for w, rate in by_workers.items() if rate >= (1 - WITHIN) * most)
    here, quick, slowly = (with_workers(m, workers) for m in (likely, fast, slow))
    rates = [highest_rate(m, REQUESTS) for m in (quick, slowly)]
    rate = Interval(by_workers[workers], min(rates), max(rates))
    machines = math.ceil(question.qps / rate.likely) if rate.likely else 0
    p50, p99, busy = _expected((here, quick, slowly), question.qps / max(machines, 1))
    without = highest_rate(with_workers(likely, workers - 1), REQUESTS) if workers > 1 else 0.0
    return Plan(
        here.configuration,
        here.is_shared(here.configuration),
        machines,
        rate,
        p50,
        p99,
        _headroom(question.qps, machines, rate.likely, min(without, rate.likely)),  # a loss is never a gain
        here.means(),
        busy,
        _per_million(question, machines),
        by_workers,
    )


def variants(calibration: Calibration, question: Question) -> tuple[Model, Model, Model]:
    """The service as asked for on one machine: as calibrated, on its fast and on its slow minutes."""
    slower = np.asarray(calibration.speeds)
    exponent = growth_of(calibration)
    growths = exponent.growth(question.items / calibration.items)
    chosen = Configuration(question.retrieve, question.rerank, question.workers or question.cores, question.p99_s)
    scales = (1.0, min(1.0, float(np.quantile(slower, 0.1))), max(1.0, float(np.quantile(slower, 0.9))))
    made = []
    for scale, growth in zip(scales, growths, strict=True):
        found = calibration.demand.retrieval
        other = replace(calibration, demand=replace(calibration.demand, retrieval=found.times(growth)))
        made.append(model(other, chosen, scale=scale, cores=question.cores))
    return made[0], made[1], made[2]


def growth_of(calibration: Calibration) -> Exponent:
    """How retrieval's cost grows with the catalogue: measured, or assumed and saying so."""
    return calibration.exponents.get("retrieval", {}).get("items", ASSUMED)


def with_workers(one: Model, workers: int) -> Model:
    return replace(one, configuration=replace(one.configuration, workers=workers))


@lru_cache
def highest_rate(one: Model, requests: int, run_s: float = math.inf, tries: int = 1) -> float:
    """Requests a second up to which the service is in time with its coverage; 0 if a lone request is too slow.

    run_s: the length of a run that begins without anybody, as measurements do; by default there is one long run. Then
    it is the rate that half of all searches let pass, whose runs are repeated up to so many `tries`.
    """
    sla_s = one.configuration.sla_s
    share = 1 - 0.5 ** (1 / tries)  # of runs that must hold, for one of `tries` to hold as often as not

    def holds(rate: float) -> bool:
        runs = max(1, math.ceil(requests / rate / run_s))
        seen = (one.at(rate, min(run_s, requests / rate), seed) for seed in range(runs))
        here = replace(one, warm=one.factor(rate))
        met = [here.coverage(run) if run.percentile_s(99) <= sla_s else 0.0 for run in seen]
        return bool(np.quantile(met, 1 - share) >= LEAST_COVERAGE)

    high = one.bound
    low = high / 64
    if not holds(low):
        return 0.0
    while high / low > 1 + WITHIN:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _expected(models: tuple[Model, Model, Model], rate: float) -> tuple[Interval, Interval, float]:
    """p50 and p99 at this rate: likely, and the least and most of the models and seeds. And the cores' busy share."""
    runs = [one.at(rate, EXPECTED_REQUESTS / rate, seed) for one in models for seed in SEEDS]
    values = {p: [run.percentile_s(p) for run in runs] for p in (50, 99)}
    p50, p99 = (Interval(float(np.mean(v[: len(SEEDS)])), min(v), max(v)) for v in values.values())
    return p50, p99, runs[0].busy / models[0].machine.cores


def _headroom(qps: float, machines: int, rate: float, without_one: float) -> dict[str, float]:
    """What could come on top of qps, as a share of it; negative: so much of it can't be served at the SLA."""
    whole = {
        "nothing lost": machines * rate,
        "one worker lost": (machines - 1) * rate + without_one,
        "one machine lost": (machines - 1) * rate,
        "one worker and one machine lost": (machines - 2) * rate + without_one if machines > 1 else 0.0,
    }
    return {name: left / qps - 1 for name, left in whole.items()} if machines else {}


def _per_million(question: Question, machines: int) -> float | None:
    if question.price is None or not machines:
        return None
    return machines * question.cores * question.price / (question.qps * 3600) * 1e6
