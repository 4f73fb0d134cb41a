"""What came back from an open-loop run: a column a field, a place a request; latencies in an HdrHistogram.

It knows the form of an answer and keeps what rows compare. What an answer is worth is agreement.py's.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import orjson
from hdrh.histogram import HdrHistogram
from numpy.typing import NDArray

from loadtest.spool import Spool

Floats = NDArray[np.float64]
LONGEST_PROBLEM = 300  # characters that are kept
US, LONGEST_US = 1e6, 120_000_000  # histograms count microseconds, to three digits

# Why there was no answer: nothing listened; the connection broke after it was made; patience ended; it was no JSON.
UNREACHABLE, BROKEN, SILENT, GARBLED = "unreachable", "broken", "silent", "garbled"
# What an answer's took_ms names
STAGES = ("queue", "users", "retrieval", "preranking", "reranking", "selection", "total")


@dataclass(slots=True)
class Observed:
    """What came back, a place a request [n].

    due_s, sent_late_s, latency_s: seconds; latency from the instant it was due, also of failures.
    status: 0 where there was no answer, and then `error` says why. retry_after: whole seconds, -1 without.
    body: which of the bodies. cause: "stage reason" of the first degradation, "" for none; causes: of all of them.
    problem: what an error's body says, "" if nothing. wanted, reranked: widths. expected_loss: NaN where the answer has
    none. took_s: f64[n, STAGES], NaN where the answer doesn't say. ids, scores, is_fresh: the items, best first;
    is_fresh where the re-ranker scored. started_at: time.monotonic() of instant 0, any process's. most_open: requests
    in flight at once. stolen_s: what a hypervisor took from all cores meanwhile (stolen.py).
    """

    due_s: Floats
    sent_late_s: Floats
    latency_s: Floats
    status: NDArray[np.int16]
    retry_after: NDArray[np.int32]
    body: NDArray[np.int64]
    error: list[str]
    started_at: float = 0.0
    cpu_s: float = 0.0
    wall_s: float = 0.0
    stolen_s: float = 0.0
    most_open: int = 0
    wanted: Floats = field(default_factory=lambda: np.empty(0))
    reranked: Floats = field(default_factory=lambda: np.empty(0))
    expected_loss: Floats = field(default_factory=lambda: np.empty(0))
    took_s: Floats = field(default_factory=lambda: np.empty((0, len(STAGES))))
    cause: list[str] = field(default_factory=list)
    causes: list[tuple[str, ...]] = field(default_factory=list)
    problem: list[str] = field(default_factory=list)
    generation: list[str] = field(default_factory=list)
    ids: list[list[int | str]] = field(default_factory=list)
    scores: list[NDArray[np.float32]] = field(default_factory=list)
    is_fresh: list[NDArray[np.bool_]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.due_s)

    @property
    def is_ok(self) -> NDArray[np.bool_]:
        """bool[n]: answered with 200."""
        return np.equal(self.status, 200)

    @property
    def is_degraded(self) -> NDArray[np.bool_]:
        """bool[n]: an answer that says what it gave up."""
        return np.array([bool(c) for c in self.cause], np.bool_)

    @property
    def coverage(self) -> Floats:
        """f64[n]: reranked over wanted; 1 where nothing was wanted, NaN without an answer."""
        share = np.divide(self.reranked, self.wanted, out=np.ones(len(self)), where=self.wanted > 0)
        return np.where(self.is_ok, share, np.nan)

    def percentile_s(self, p: float, where: NDArray[np.bool_] | None = None) -> float:
        """The p-th percentile of latency, p in [0, 100], of the answered or of those in `where`; NaN for none."""
        return percentile_s(self.latency_s[self.is_ok if where is None else where], p)

    @property
    def cpu_share(self) -> float:
        """The generator's own CPU, in cores."""
        return self.cpu_s / self.wall_s if self.wall_s else 0.0

    @property
    def stolen_share(self) -> float:
        """What a hypervisor took of this machine's cores, in [0, 1]."""
        return self.stolen_s / self.wall_s / (os.cpu_count() or 1) if self.wall_s else 0.0


def joined(runs: Sequence[Observed]) -> Observed:
    """Several runs as one; its instants are each run's own."""

    def all_of(name: str) -> Any:
        parts = [getattr(run, name) for run in runs]
        if isinstance(parts[0], np.ndarray):
            return np.concatenate(parts)
        return sum(parts, start=type(parts[0])())

    return Observed(**{f.name: all_of(f.name) for f in fields(Observed)})


def histogram(latency_s: Floats) -> HdrHistogram:
    """Counts of microseconds with three digits, up to two minutes."""
    counts = HdrHistogram(1, LONGEST_US, 3)
    for us in (np.asarray(latency_s) * US).clip(1, LONGEST_US).astype(np.int64).tolist():
        counts.record_value(us)
    return counts


def percentile_s(latency_s: Floats, p: float) -> float:
    """The p-th percentile in seconds; NaN for none."""
    return histogram(latency_s).get_value_at_percentile(p) / US if len(latency_s) else float("nan")


def parse(seen: Observed, raw: Sequence[bytes] | Spool, *, keeps_items: bool = True) -> None:
    """Fill the columns that are in the bodies of the answers; without `keeps_items` the items stay away."""
    n, nothing = len(raw), orjson.loads(b"{}")
    seen.wanted, seen.reranked, seen.expected_loss = np.zeros(n), np.zeros(n), np.full(n, np.nan)
    seen.took_s = np.full((n, len(STAGES)), np.nan)
    for i in range(n):
        said = _object(raw[i])
        if seen.status[i] == 200 and said is None:
            seen.status[i], seen.error[i] = 0, GARBLED
        answer = nothing if seen.status[i] != 200 or said is None else said
        seen.problem.append("" if seen.status[i] == 200 or said is None else _why(said))
        causes = [sys.intern(f"{d['stage']} {d['reason']}") for d in answer.get("degraded", ())]
        seen.cause.append(causes[0] if causes else "")
        seen.causes.append(tuple(causes))
        seen.generation.append(sys.intern(answer.get("generation", "")))
        coverage, loss = answer.get("coverage", nothing), answer.get("expected_ndcg_loss")
        seen.wanted[i], seen.reranked[i] = coverage.get("wanted", 0), coverage.get("reranked", 0)
        seen.expected_loss[i] = np.nan if loss is None else loss
        took_ms = answer.get("took_ms", nothing)
        seen.took_s[i] = [took_ms.get(stage, np.nan) / 1e3 for stage in STAGES]
        if keeps_items:
            items = answer.get("items", ())
            seen.ids.append([item["id"] for item in items])
            seen.scores.append(np.array([item["score"] for item in items], np.float32))
            seen.is_fresh.append(np.array([item["stage"] == "reranking" for item in items], np.bool_))


def _object(body: bytes) -> dict[str, Any] | None:
    try:
        said = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    return said if isinstance(said, dict) else None


def _why(problem: dict[str, Any]) -> str:
    """What an RFC 9457 problem says: its first field, or its detail."""
    fields = problem.get("errors") or ()
    said = " ".join(str(fields[0].get(part, "")) for part in ("field", "value", "allowed")) if fields else ""
    return sys.intern((said or str(problem.get("detail") or ""))[:LONGEST_PROBLEM])
