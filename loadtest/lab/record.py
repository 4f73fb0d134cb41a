"""From what was observed to a run: the figures after the warm-up, the series, and whether it says anything.

A run whose generator was late says nothing about the service and is invalid. What a run is, is run.py's.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from http import HTTPStatus
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadtest.lab.run import N_BUCKETS, OUTSIDE, REST, Counts, Figures, Generator, Run, Series, Stage, buckets
from loadtest.observed import STAGES, US, Floats, Observed, histogram

MOST_BINS = 600
MOST_LATE_MS = 5.0  # 99th percentile of the generator's lateness: a twentieth of the default SLA
MOST_CPU = 0.9  # cores: a single loop that is nearly always busy can't be on time


def record(
    seen: Observed,
    setup: dict[str, Any],
    *,
    sla_s: float,
    warm_up_s: float,
    seconds: float,
    most_connections: int,
    most_late_ms: float = MOST_LATE_MS,
    server_cpu_s: float = math.nan,
) -> Run:
    """The run over the `seconds` after the warm-up."""
    counted = seen.due_s >= warm_up_s
    ok, n = seen.is_ok & counted, int(counted.sum())
    latencies = histogram(seen.latency_s[ok])
    answered = int(ok.sum())
    p50, p90, p99, p999, longest = (
        latencies.get_value_at_percentile(p) / US * 1e3 if answered >= least else math.nan
        for p, least in ((50, 1), (90, 1), (99, 1), (99.9, 1_000), (100, 1))  # of fewer it would be the slowest
    )
    figures = Figures(
        requests=n,
        answered=answered,
        rate_due=n / seconds,
        rate_answered=answered / seconds,
        p50_ms=p50,
        p90_ms=p90,
        p99_ms=p99,
        p999_ms=p999,
        max_ms=longest,
        within_sla=int((ok & (seen.latency_s <= sla_s)).sum()) / n if n else math.nan,
        coverage=_mean(seen.coverage[ok]),
        degraded=_mean(seen.is_degraded[ok]),
        expected_loss=_mean(seen.expected_loss[ok & np.isfinite(seen.expected_loss)]),
        server_cpu_ms=server_cpu_s / max(1, len(seen)) * 1e3,
    )
    late_ms = np.maximum(seen.sent_late_s[counted], 0) * 1e3 if n else np.zeros(1)
    late_p50, late_p99 = np.quantile(late_ms, (0.5, 0.99)).tolist()
    generator = Generator(late_p50, late_p99, float(late_ms.max()), seen.cpu_share, seen.most_open, seen.stolen_share)
    bin_s = bin_width(warm_up_s + seconds)
    return Run(
        setup=setup,
        sla_ms=sla_s * 1e3,
        warm_up_s=warm_up_s,
        bin_s=bin_s,
        figures=figures,
        generator=generator,
        invalid=why_invalid(generator, n, most_connections, most_late_ms),
        histogram=latencies.encode().decode(),
        series=_series(seen, warm_up_s + seconds, bin_s, sla_s),
        stages=_stages(seen, ok),
        problems={label: p for label, p in reversed(list(zip(failures(seen), seen.problem, strict=True))) if p},
    )


def why_invalid(
    generator: Generator, requests: int, most_connections: int, most_late_ms: float = MOST_LATE_MS
) -> list[str]:
    """Every reason why a run says nothing about the service."""
    late, cpu, n_open = generator.late_p99_ms, generator.cpu, generator.most_open
    reasons = (
        (requests == 0, "nothing was due after the warm-up"),
        (late > most_late_ms, f"the generator sent late: {late:.1f} ms at its p99, allowed {most_late_ms:g} ms"),
        (cpu > MOST_CPU, f"the generator was busy: {cpu:.2f} cores, allowed {MOST_CPU:g}"),
        (n_open >= most_connections, f"{n_open:,} requests were open at once, and there are no more connections"),
    )
    return [why for is_so, why in reasons if is_so]


def bin_width(seconds: float) -> float:
    """A second; less in a run of under 20 s, more in one of over 600 s."""
    return max(1.0, math.ceil(seconds / MOST_BINS)) if seconds >= 20 else max(0.1, round(seconds / 40, 1))


def failures(seen: Observed) -> list[str]:
    """Why each request has no 200, "" where it has."""
    pairs = zip(seen.error, seen.status.tolist(), strict=True)
    return [error or ("" if status == 200 else _phrase(status)) for error, status in pairs]


def _phrase(status: int) -> str:
    try:
        return f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        return str(status)


def _series(seen: Observed, seconds: float, bin_s: float, sla_s: float) -> Series:
    ok, done_s = seen.is_ok, seen.due_s + seen.latency_s
    last_s = float(done_s.max(initial=0.0)) - bin_s  # the last answers come a moment after the end: no bin of their own
    n_bins = math.ceil(round(max(seconds, last_s) / bin_s, 6))

    def bins(at_s: Floats) -> Counts:
        return (at_s / bin_s).astype(np.int64).clip(0, n_bins - 1)

    def count(at: Counts) -> list[int]:
        return np.bincount(at, minlength=n_bins).tolist()

    due, done = bins(seen.due_s), bins(done_s)
    n_ok = np.bincount(due[ok], minlength=n_bins)
    covered = np.bincount(due[ok], seen.coverage[ok], minlength=n_bins)
    keys, counts = np.unique(due[ok] * N_BUCKETS + buckets(seen.latency_s[ok]), return_counts=True)
    starts = np.searchsorted(keys, np.arange(n_bins + 1) * N_BUCKETS)
    pairs = np.stack([keys % N_BUCKETS, counts], axis=1)
    return Series(
        due=count(due),
        sent=count(bins(seen.due_s + np.maximum(seen.sent_late_s, 0))),
        answered=count(done[ok]),
        failed=count(done[~ok]),
        within_sla=count(due[ok & (seen.latency_s <= sla_s)]),
        coverage=np.divide(covered, n_ok, out=np.full(n_bins, np.nan), where=n_ok > 0).tolist(),
        spread=[pairs[a:b].ravel().tolist() for a, b in itertools.pairwise(starts)],
        degraded=_by_cause(due, seen.causes, n_bins),
        errors=_by_cause(done, [(f,) if f else () for f in failures(seen)], n_bins),
    )


def _by_cause(at: Counts, causes: Iterable[Sequence[str]], n_bins: int) -> dict[str, list[int]]:
    """Counts by cause and bin, the most frequent first."""
    counts = Counter((cause, place) for place, several in zip(at.tolist(), causes, strict=True) for cause in several)
    totals = Counter[str]()
    for (cause, _), n in counts.items():
        totals[cause] += n
    return {cause: [counts[cause, place] for place in range(n_bins)] for cause, _ in totals.most_common()}


def _stages(seen: Observed, ok: NDArray[np.bool_]) -> dict[str, Stage]:
    """In the order in which they run, then what of the service's time is in no stage, and what is outside of it."""
    if not len(seen.took_s):
        return {}
    took_s, total = seen.took_s[ok], seen.took_s[ok][:, STAGES.index("total")]
    named = {stage: took_s[:, i] for i, stage in enumerate(STAGES) if stage != "total"}
    named[REST] = total - np.nansum(np.stack(list(named.values())), axis=0)
    named[OUTSIDE] = seen.latency_s[ok] - total
    found = {}
    for stage, all_s in named.items():
        if len(known := all_s[np.isfinite(all_s)]):
            ms = np.maximum(known, 0) * 1e3
            found[stage] = Stage(float(ms.mean()), *np.quantile(ms, (0.5, 0.99)).tolist())
    return found


def _mean(values: NDArray[Any]) -> float:
    return float(values.mean()) if len(values) else math.nan
