"""Every Prometheus metric of the service: name, unit, buckets, in one table. Nobody else knows Prometheus.

Labels come from closed, bounded sets, and every labelled child exists from the start, so that a rate over a thing
that hasn't happened yet is 0 and not absent. The event loop's process owns the registry: workers report
their timings in their replies.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric

from app.control.degradation import REASONS, USER_LATE
from app.flow import Outcome, Ranking, Stage

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each one, that nobody reads

OUTCOMES = ("ok", "degraded", "empty", "client_error", "refused", "deadline", "error")
SHARD_OUTCOMES = ("ok", "late", "failed", "lost", "expired")
STAGES = tuple(s.label for s in Stage)
NO_ARM = "none"  # until there are experiments, every request is on no arm
PAGE = 4096
SCORES_OBSERVED = 10  # of an answer: its head is what moves when a model goes wrong

# Shares of the SLA at which latency is counted: an edge exactly at it, at half and at twice.
SLA_SHARES = (0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.25, 1.5, 2, 4, 10)
SECONDS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1, 2.5)
COUNTS = (0, 1, 5, 10, 25, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000)
SHARES = (0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1)
SCORES = (-5, -2, -1, 0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 2, 5)


class Metrics:
    """One registry. Units are in the names; see the table in `__init__`."""

    def __init__(self, sla_s: float) -> None:
        self.registry = r = CollectorRegistry()
        edges = tuple(sla_s * share for share in SLA_SHARES)
        # fmt: off
        self.requests = Counter("winnow_requests", "Ranking requests by outcome.", ["outcome"], registry=r)
        self.seconds = Histogram(
            "winnow_request_seconds", "From the first header byte to the answer.", ["arm"], buckets=edges, registry=r)
        self.stage_seconds = Histogram(
            "winnow_stage_seconds", "Wall time of a stage.", ["stage"], buckets=SECONDS, registry=r)
        self.stage_candidates = Histogram(
            "winnow_stage_candidates", "Candidates wanted, scored and passed on.", ["stage", "edge"],
            buckets=COUNTS, registry=r)
        self.score = Histogram(
            "winnow_score", "Scores of the first items shown, by the stage that made them.", ["stage", "arm"],
            buckets=SCORES, registry=r)
        self.shard_seconds = Histogram(
            "winnow_shard_seconds", "Time of a shard in the model.", buckets=SECONDS, registry=r)
        self.shards = Counter("winnow_shards", "Shards by outcome.", ["outcome"], registry=r)
        self.degradations = Counter(
            "winnow_degradations", "Departures from the full funnel.", ["stage", "reason"], registry=r)
        self.inflight = Gauge("winnow_inflight", "Requests that hold a permit.", registry=r)
        self.admission_limit = Gauge("winnow_admission_limit", "Permits there are.", registry=r)
        self.quality = Gauge("winnow_quality", "Share of its configured width the funnel runs at.", registry=r)
        self.coverage = Histogram(
            "winnow_coverage_ratio", "Share of the wanted that was re-ranked.", buckets=SHARES, registry=r)
        self.restarts = Counter("winnow_worker_restarts", "Workers that ended and were replaced.", registry=r)
        # fmt: on
        self._create_children()
        ProcessCollector(registry=r)
        PlatformCollector(registry=r)

    def _create_children(self) -> None:
        self.quality.set(1)
        self.seconds.labels(NO_ARM)
        for outcome in OUTCOMES:
            self.requests.labels(outcome)
        for outcome in SHARD_OUTCOMES:
            self.shards.labels(outcome)
        for stage in STAGES:
            self.stage_seconds.labels(stage)
            for edge in ("wanted", "done", "out"):
                self.stage_candidates.labels(stage, edge)
        for stage in STAGES[:3]:
            self.score.labels(stage, NO_ARM)
            for reason in REASONS.values():
                self.degradations.labels(stage, reason)
        self.degradations.labels(USER_LATE.stage.label, USER_LATE.reason)

    def request(self, outcome: str, seconds: float) -> None:
        """Count a request that was answered, with whatever; its time only when the funnel ran."""
        self.requests.labels(outcome).inc()
        if outcome in ("ok", "degraded", "empty", "deadline"):
            self.seconds.labels(NO_ARM).observe(seconds)

    def ranking(self, ranking: Ranking) -> None:
        """Count what the funnel did for one answer."""
        for report in ranking.reports:
            stage = report.stage.label
            self.stage_seconds.labels(stage).observe(report.seconds)
            self.stage_candidates.labels(stage, "wanted").observe(report.wanted)
            self.stage_candidates.labels(stage, "done").observe(report.done)
            self.stage_candidates.labels(stage, "out").observe(report.n_out)
            if report.stage is Stage.RERANKING and report.outcome is not Outcome.SKIPPED:
                self.coverage.observe(report.done / report.wanted)
        for d in ranking.degradations:
            self.degradations.labels(d.stage.label, d.reason).inc()
        head = zip(ranking.stages[:SCORES_OBSERVED].tolist(), ranking.scores.tolist(), strict=False)
        for scored_by, score in head:
            if not math.isfinite(score):
                continue  # one NaN would make the histogram's sum NaN for good
            self.score.labels(STAGES[scored_by], NO_ARM).observe(score)

    def shard(self, outcome: str, seconds: float) -> None:
        """Count a shard; its time only when the model ran."""
        self.shards.labels(outcome).inc()
        if seconds:
            self.shard_seconds.observe(seconds)

    def watch(
        self, pids: Callable[[], Mapping[int, int]], generations: Callable[[], Iterable[tuple[str, str, float]]]
    ) -> None:
        """Read at every scrape: worker processes by number; (role, digest, loaded at) of generations."""
        self.registry.register(_AtScrape(pids, generations))

    def render(self) -> tuple[bytes, str]:
        """The exposition and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST


class _AtScrape:
    """Values that are cheaper to read when asked than to keep."""

    def __init__(
        self, pids: Callable[[], Mapping[int, int]], generations: Callable[[], Iterable[tuple[str, str, float]]]
    ) -> None:
        self.pids, self.generations = pids, generations

    def collect(self) -> Iterable[Metric]:
        rss = GaugeMetricFamily("winnow_worker_rss_bytes", "Resident memory of a worker.", labels=["worker"])
        for worker, pid in self.pids().items():
            rss.add_metric([str(worker)], resident_bytes(pid))
        info = GaugeMetricFamily("winnow_generation_info", "Generations held.", labels=["role", "digest"])
        age = GaugeMetricFamily("winnow_generation_age_seconds", "Since it was loaded.", labels=["role"])
        for role, digest, loaded_at in self.generations():
            info.add_metric([role, digest[:12]], 1)
            age.add_metric([role], time.monotonic() - loaded_at)
        return rss, info, age


def resident_bytes(pid: int) -> int:
    """Resident set of a process, 0 if it has just ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
    except (OSError, IndexError):
        return 0
