"""What differs between two runs, with the interval in which the difference lies: a bootstrap over bins of time.

Requests of one moment share its stalls, so whole bins are drawn and not requests; the two runs apart from each other.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loadtest.lab.run import Run, bucket_ms
from loadtest.observed import Floats

N_BOOTSTRAPS = 2_000
FEWEST_BINS = 10  # under them there is no interval


@dataclass(frozen=True, slots=True)
class Difference:
    """b - a, and its 95 % interval; NaN where there is none."""

    name: str
    a: float
    b: float
    low: float = math.nan
    high: float = math.nan

    @property
    def gap(self) -> float:
        return self.b - self.a

    @property
    def has_interval(self) -> bool:
        return math.isfinite(self.low) and math.isfinite(self.high)

    @property
    def is_clear(self) -> bool:
        """0 is outside of the interval."""
        return self.has_interval and not self.low <= 0 <= self.high


def differences(a: Run, b: Run, seed: int = 0) -> list[Difference]:
    """Of what can be compared, in the order in which one looks at it."""
    figures = a.figures, b.figures
    draws = [_draws(run, np.random.default_rng((seed, place))) for place, run in enumerate((a, b))]

    def drawn(name: str, read: Callable[..., float]) -> Difference:
        if not all(draws):
            return Difference(name, *map(read, figures))
        gaps = draws[1][name] - draws[0][name]
        low, high = np.nanquantile(gaps, (0.025, 0.975)).tolist() if np.isfinite(gaps).any() else (math.nan, math.nan)
        return Difference(name, *map(read, figures), low, high)

    return [
        drawn("p50 ms", lambda f: f.p50_ms),
        drawn("p90 ms", lambda f: f.p90_ms),
        drawn("p99 ms", lambda f: f.p99_ms),
        Difference("p99.9 ms", *(f.p999_ms for f in figures)),
        drawn("answered within the SLA, share", lambda f: f.within_sla),
        drawn("mean coverage", lambda f: f.coverage),
        Difference("degraded, share of the answers", *(f.degraded for f in figures)),
        Difference("due a second", *(f.rate_due for f in figures)),
        Difference("answered a second", *(f.rate_answered for f in figures)),
        Difference("expected loss of NDCG", *(f.expected_loss for f in figures)),
        Difference("service's CPU a request, ms", *(f.server_cpu_ms for f in figures)),
        Difference("generator's p99 lateness, ms", a.generator.late_p99_ms, b.generator.late_p99_ms),
        Difference("taken from its cores by a hypervisor", a.generator.stolen, b.generator.stolen),
    ]


def _draws(run: Run, rng: np.random.Generator) -> dict[str, Floats]:
    """Each figure of N_BOOTSTRAPS runs made of this one's bins, drawn with replacement; {} of too few."""
    kept = run.in_figures()
    n = int(kept.sum())
    if n < FEWEST_BINS:
        return {}
    counts, series = run.series.buckets()[kept], run.series
    times: NDArray[np.float64] = rng.multinomial(n, np.full(n, 1 / n), N_BOOTSTRAPS).astype(np.float64)
    used = np.flatnonzero(counts.any(axis=0))
    until = (times @ counts[:, used]).cumsum(axis=1)
    ok = counts.sum(axis=1)
    covered = np.nan_to_num(np.array(series.coverage)[kept]) * ok
    with np.errstate(invalid="ignore", divide="ignore"):
        found = {
            "answered within the SLA, share": times
            @ np.array(series.within_sla)[kept]
            / (times @ np.array(series.due)[kept]),
            "mean coverage": times @ covered / (times @ ok),
        }
    for p in (50, 90, 99) if len(used) else ():
        bucket = used[(until >= p / 100 * until[:, -1:]).argmax(axis=1)]
        found[f"p{p} ms"] = np.where(until[:, -1] > 0, bucket_ms(bucket), np.nan)
    return found if len(used) else {}
