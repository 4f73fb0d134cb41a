"""Every Prometheus metric of the service: name, unit, buckets, in one table. Nobody else knows Prometheus.

Labels come from closed, bounded sets, and every labelled child exists from the start, so that a rate over a thing
that hasn't happened yet is 0 and not absent. The event loop's process owns the registry: workers report
their timings in their replies.
"""

import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import prometheus_client
from prometheus_client import Counter, Gauge
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

from app.control.degradation import ALL_REASONS, USER_LATE
from app.flow import LABELS, Outcome, Stage, Told

if TYPE_CHECKING:
    from app.service import Serving

prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each one, that nobody reads

OUTCOMES = ("ok", "degraded", "empty", "client_error", "refused", "deadline", "error")
SHARD_OUTCOMES = ("ok", "late", "failed", "lost", "expired")
RANKED = LABELS[:3]  # those that score candidates
EDGES = ("wanted", "done", "out")  # of a stage: candidates wanted, scored and passed on
WORKER_STATES = ("alive", "starting", "backing_off")
WORK = ("first", "hedge", "resend")
NO_ARM = "none"  # until there are experiments, every request is on no arm

# Shares of the SLA at which latency is counted: an edge exactly at it, at half and at twice.
SLA_SHARES = (0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.25, 1.5, 2, 4, 10)
SECONDS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1, 2.5)
COUNTS = (0, 1, 5, 10, 25, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000)
SHARES = (0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1)
SCORES = (-5, -2, -1, 0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 2, 5)


MANY = 10_000  # observations, at which they are counted though nobody asks
M = TypeVar("M", Counter, Gauge)


class Observations:
    """Of one series of a histogram; counted together when asked for: one by one they cost a request 0.2 ms."""

    def __init__(self, edges: Sequence[float]) -> None:
        self.edges, self.values, self.total = (*edges, math.inf), list[float](), 0.0
        self.counts = np.zeros(len(self.edges), np.int64)

    def observe(self, value: float) -> None:
        self.values.append(value)
        if len(self.values) >= MANY:
            self.count()

    def count(self) -> None:
        self.counts += np.bincount(np.searchsorted(self.edges, self.values), minlength=len(self.edges))
        self.total += sum(self.values)
        self.values.clear()


class Histogram:
    """A histogram with a series for each combination of its labels' values."""

    def __init__(self, name: str, what: str, edges: Sequence[float], labels: Mapping[str, Sequence[str]]) -> None:
        self.name, self.what, self.names = name, what, tuple(labels)
        self.series = {values: Observations(edges) for values in product(*labels.values())}

    def labels(self, *values: str) -> Observations:
        return self.series[values]

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(self.name, self.what, labels=self.names)
        for values, seen in self.series.items():
            seen.count()
            counts = list(zip(map(floatToGoString, seen.edges), np.cumsum(seen.counts).tolist(), strict=True))
            family.add_metric(values, counts, seen.total)
            if seen.edges[0] < 0:  # a sum that can fall is no counter, and the library leaves the count out as well
                family.add_sample(f"{self.name}_count", dict(zip(self.names, values, strict=True)), counts[-1][1])
        yield family


class Metrics:
    """One registry. Units are in the names; see the table in `__init__`.

    held: the generations by role, with their workers; they are read at every scrape.
    """

    def __init__(self, sla_s: float, held: "Mapping[str, Serving]") -> None:
        self.registry, self.held = prometheus_client.CollectorRegistry(), held
        self.registry.register(self)
        add, sla, arms = self._add, tuple(round(sla_s * share, 9) for share in SLA_SHARES), (NO_ARM,)
        count = self._histogram
        self.requests = add(Counter, "requests", "Ranking requests by outcome.", outcome=OUTCOMES)
        self.seconds = count("request_seconds", "From the first header byte to the answer.", sla, arm=arms)
        seconds = count("stage_seconds", "Wall time of a stage.", SECONDS, stage=LABELS)
        n = count("stage_candidates", "Candidates by edge.", COUNTS, stage=LABELS, edge=EDGES)
        score = count("score", "First scores shown, by who made them.", SCORES, stage=RANKED, arm=arms)
        self.shard_seconds = count("shard_seconds", "Of a shard, or a whole request, in the model.", SECONDS).labels()
        self.shards = add(Counter, "shards", "Shards, and whole requests, by outcome.", outcome=SHARD_OUTCOMES)
        self.rows = add(Counter, "rows", "Rows' worth of work sent to workers: first, hedges, resends.", work=WORK)
        self.lost = add(Counter, "degradations", "Departures from the full funnel.", stage=RANKED, reason=ALL_REASONS)
        self.lost.labels(USER_LATE.stage.label, USER_LATE.reason)
        self.inflight = add(Gauge, "inflight", "Requests that hold a permit.")
        self.admission_limit = add(Gauge, "admission_limit", "Permits there are.")
        self.quality = add(Gauge, "quality", "Factor on retrieval's width, and squared on re-ranking's.")
        self.coverage = count("coverage_ratio", "Share of the wanted that was re-ranked.", SHARES).labels()
        self.restarts = add(Counter, "worker_restarts", "Workers that ended and were replaced.")
        # What every request counts, looked up once.
        self.of_stage = [(seconds.labels(s), [n.labels(s, edge) for edge in EDGES]) for s in LABELS]
        self.of_score = [score.labels(s, NO_ARM) for s in RANKED]
        prometheus_client.ProcessCollector(registry=self.registry)

    def _histogram(self, name: str, what: str, edges: Sequence[float], **labels: Sequence[str]) -> Histogram:
        histogram = Histogram(f"winnow_{name}", what, edges, labels)
        self.registry.register(histogram)
        return histogram

    def _add(self, kind: type[M], name: str, what: str, **labels: Sequence[str]) -> M:
        """A metric with a child for each combination of its labels' values."""
        metric = kind(f"winnow_{name}", what, tuple(labels), registry=self.registry)
        for values in product(*labels.values()) if labels else ():
            metric.labels(*values)
        metric.labels = cache(metric.labels)  # type: ignore[method-assign]  # the library's own takes 2 µs each time
        return metric

    def request(self, outcome: str, seconds: float) -> None:
        """Count a request that was answered, with whatever; its time only when the funnel ran."""
        self.requests.labels(outcome).inc()
        if outcome in ("ok", "degraded", "empty", "deadline"):
            self.seconds.labels(NO_ARM).observe(seconds)

    def ranked(self, told: Told) -> None:
        """Count what the funnel did for one answer."""
        for report in told.reports:
            seconds, edges = self.of_stage[report.stage]
            seconds.observe(report.seconds)
            for edge, n in zip(edges, (report.wanted, report.done, report.n_out), strict=True):
                edge.observe(n)
            if report.stage is Stage.RERANKING and report.outcome is not Outcome.SKIPPED:
                self.coverage.observe(report.done / report.wanted)
        for d in told.degradations:
            self.lost.labels(d.stage.label, d.reason).inc()
        for scored_by, score in told.first:  # finite: one NaN would make the histogram's sum NaN for good
            self.of_score[scored_by].observe(score)

    def shard(self, outcome: str, seconds: float) -> None:
        """Count a shard; its time only when the model ran."""
        self.shards.labels(outcome).inc()
        if seconds:
            self.shard_seconds.observe(seconds)

    def render(self) -> tuple[bytes, str]:
        """The exposition and its content type."""
        return prometheus_client.generate_latest(self.registry), prometheus_client.CONTENT_TYPE_LATEST

    def collect(self) -> Iterable[Metric]:
        """What is cheaper to read when a scrape asks for it than to keep."""
        pool = self.held["serving"].pool if "serving" in self.held else None
        rss = GaugeMetricFamily("winnow_worker_rss_bytes", "Resident memory of a worker.", labels=["worker"])
        cpu = CounterMetricFamily("winnow_worker_cpu_seconds", "CPU time of a worker.", labels=["worker"])
        for worker, pid in pool.pids().items() if pool else ():
            with suppress(OSError, IndexError):  # it has just ended
                said = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                rss.add_metric([str(worker)], int(said[21]) * os.sysconf("SC_PAGE_SIZE"))
                cpu.add_metric([str(worker)], (int(said[11]) + int(said[12])) / os.sysconf("SC_CLK_TCK"))
        workers = GaugeMetricFamily("winnow_workers", "Workers by state.", labels=["state"])
        for state in WORKER_STATES:
            workers.add_metric([state], sum(w.state == state for w in pool.workers) if pool else 0)
        info = GaugeMetricFamily("winnow_generation_info", "Generations held.", labels=["role", "digest"])
        age = GaugeMetricFamily("winnow_generation_age_seconds", "Since it was loaded.", labels=["role"])
        epoch = GaugeMetricFamily("winnow_generation_epoch", "Items added and removed since.", labels=["role"])
        for role, one in self.held.items():
            info.add_metric([role, one.generation.digest[:12]], 1)
            age.add_metric([role], time.monotonic() - one.loaded_at)
            epoch.add_metric([role], one.generation.live.epoch)
        return rss, cpu, workers, info, age, epoch
