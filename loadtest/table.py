"""Figures with their bars, the rows they belong to, and how both are printed.

A bar is a closed range; a value that isn't a number meets none. What is measured is decided by each bench.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TextIO

import numpy as np

from loadtest.observed import Observed


@dataclass(frozen=True, slots=True)
class Figure:
    """A measured value, and the range it must be in; without a range it only informs."""

    name: str
    value: float
    least: float | None = None
    most: float | None = None
    unit: str = ""

    @property
    def has_bar(self) -> bool:
        return self.least is not None or self.most is not None

    @property
    def is_met(self) -> bool:
        """True inside the range; a figure without one is met by any value."""
        low = -math.inf if self.least is None else self.least
        high = math.inf if self.most is None else self.most
        return not self.has_bar or low <= self.value <= high

    @property
    def bar(self) -> str:
        if self.least is not None and self.least == self.most:
            return _shown(self.least, self.unit)
        if self.least is not None and self.most is not None:
            return f"{_shown(self.least)} to {_shown(self.most, self.unit)}"
        low = "" if self.least is None else f">= {_shown(self.least, self.unit)}"
        return low if self.most is None else f"<= {_shown(self.most, self.unit)}"

    @property
    def shown(self) -> str:
        return _shown(self.value, self.unit)


@dataclass(frozen=True, slots=True)
class Summary:
    """What happened to the requests of a row. failed: not 200. late: over the SLA. Latencies of the answered."""

    requests: int
    failed: int
    late: int
    degraded: int
    coverage: float
    p50_ms: float
    p99_ms: float
    cpu: float
    sent_late_ms: float  # 99th percentile of the generator's own lateness


def summary(seen: Observed, sla_s: float) -> Summary:
    """The columns of the fault table from one run."""
    ok = seen.is_ok
    return Summary(
        requests=len(seen),
        failed=int((~ok).sum()),
        late=int((seen.latency_s[ok] > sla_s).sum()),
        degraded=int(seen.is_degraded.sum()),
        coverage=float(seen.coverage[ok].mean()) if ok.any() else math.nan,
        p50_ms=seen.percentile_s(50) * 1e3,
        p99_ms=seen.percentile_s(99) * 1e3,
        cpu=seen.cpu_share,
        sent_late_ms=float(np.quantile(seen.sent_late_s, 0.99)) * 1e3,
    )


@dataclass(frozen=True, slots=True)
class Row:
    """One fault: its figures, what its requests met, and how long until all was well again (seconds)."""

    fault: str
    figures: tuple[Figure, ...]
    seen: Summary | None = None
    recovery_s: float | None = None


def broken(fault: str, why: str) -> Row:
    """The row of a fault whose measurement itself failed."""
    return Row(fault, (Figure(f"measured ({why})", math.nan, least=0),))


def report(rows: Iterable[Row], out: TextIO, facts: dict[str, object] | None = None) -> bool:
    """Print what happened and what was asked, in Markdown, and one line of JSON. Returns whether every bar is met."""
    rows = tuple(rows)
    print("| fault | requests | failed | late | degraded | coverage | p50 / p99 ms", end="", file=out)
    print(" | recovery s | generator's CPU, p99 lateness ms |\n|---|---|---|---|---|---|---|---|---|", file=out)
    for row in rows:
        if s := row.seen:
            recovery = "" if row.recovery_s is None else f"{row.recovery_s:.2f}"
            counts = f"{s.requests:,} | {s.failed:,} | {s.late:,} | {s.degraded:,} | {s.coverage:.3f}"
            times = f"{s.p50_ms:.1f} / {s.p99_ms:.1f} | {recovery} | {s.cpu:.2f}, {s.sent_late_ms:.2f}"
            print(f"| {row.fault} | {counts} | {times} |", file=out)
    print(file=out)
    return verdict("reliability", [(row.fault, row.figures) for row in rows], out, facts, heading="fault")


def verdict(
    bench: str,
    groups: Sequence[tuple[str, Sequence[Figure]]],
    out: TextIO,
    facts: dict[str, object] | None = None,
    *,
    heading: str = "what",
) -> bool:
    """Print figure, bar and value, by group, in Markdown, then one line of JSON. Returns whether every bar is met."""
    print(f"| {heading} | figure | bar | value | met |\n|---|---|---|---|---|", file=out)
    for group, figures in groups:
        for f in figures:
            met = ("yes" if f.is_met else "NO") if f.has_bar else ""
            print(f"| {group} | {f.name} | {f.bar} | {f.shown} | {met} |", file=out)
    named = [(f"{group}: {f.name}", f) for group, figures in groups for f in figures]
    missed = [name for name, f in named if not f.is_met]
    values = {name: f.value if math.isfinite(f.value) else None for name, f in named}
    print(json.dumps({"bench": bench, **(facts or {}), "figures": values, "missed": missed}), file=out)
    return not missed


def _shown(value: float, unit: str = "") -> str:
    if not math.isfinite(value):
        return "none"
    whole = f"{value:,.0f}" if value == int(value) else f"{value:.4g}"
    return f"{whole} {unit}".rstrip()
