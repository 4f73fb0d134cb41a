"""A run as it is kept: figures, validity, series over time, histograms; JSON there and back. Not every request.

    latency      of the answered, from the instant they were due: an HdrHistogram of the whole run, counts of
                 geometric buckets 1 % wide in each bin of time, which can be added and resampled
    warm-up      the requests due in the first `warm_up_s`: in the series, in no figure

How one comes from what was observed is record.py's; what is drawn is page.py's.
"""

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from hdrh.histogram import HdrHistogram
from numpy.typing import NDArray

from loadtest.observed import Floats
from loadtest.table import Figure

SCHEMA, SCHEMA_VERSION = "winnow-attack", 1
SHORTEST_S, GROWTH, N_BUCKETS = 1e-5, 1.01, 1_640  # buckets 1 % wide, from 10 µs to two minutes
LEAST_ANSWERED = 0.999
REST, OUTSIDE = "rest", "outside"  # of the service's own time; of the latency: network, queues, the generator

Counts = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Figures:
    """Of the requests after the warm-up. Latencies of the answered; NaN for what isn't known.

    within_sla: answered with 200 within the SLA, of all that were due. server_cpu_ms: of all the service's processes,
    a request, warm-up included.
    """

    requests: int
    answered: int
    rate_due: float
    rate_answered: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    p999_ms: float
    max_ms: float
    within_sla: float
    coverage: float
    degraded: float
    expected_loss: float
    server_cpu_ms: float = math.nan


@dataclass(frozen=True, slots=True)
class Generator:
    """The generator's own: how late it sent, CPU in cores, requests in flight at once.

    stolen: what a hypervisor took of its machine's cores, a share; NaN in runs kept before it was counted.
    """

    late_p50_ms: float
    late_p99_ms: float
    late_max_ms: float
    cpu: float
    most_open: int
    stolen: float = math.nan


@dataclass(frozen=True, slots=True)
class Series:
    """A place a bin of time.

    due, within_sla, coverage, spread and degraded: of what was due in it; sent, answered, failed and errors: what was
    sent and ended in it. coverage: NaN where nothing was answered. spread: counts by bucket, [bucket, count, bucket,
    count, …]. degraded, errors: counts by cause; an answer that is degraded twice is in two.
    """

    due: list[int]
    sent: list[int]
    answered: list[int]
    failed: list[int]
    within_sla: list[int]
    coverage: list[float]
    spread: list[list[int]]
    degraded: dict[str, list[int]]
    errors: dict[str, list[int]]

    def buckets(self) -> Counts:
        """i64[bins, N_BUCKETS] of the answered."""
        counts = np.zeros((len(self.spread), N_BUCKETS), np.int64)
        for row, pairs in zip(counts, self.spread, strict=True):
            row[pairs[::2]] = pairs[1::2]
        return counts


@dataclass(frozen=True, slots=True)
class Stage:
    """Milliseconds of a stage, over the answers that name it."""

    mean_ms: float
    p50_ms: float
    p99_ms: float


@dataclass(frozen=True, slots=True)
class Run:
    """One attack. setup: what ran on what, to be shown. invalid: why it says nothing; problems: what an error's first
    answer said. histogram: an HdrHistogram of microseconds, encoded (V2, base64).
    """

    setup: dict[str, Any]
    sla_ms: float
    warm_up_s: float
    bin_s: float
    figures: Figures
    generator: Generator
    invalid: list[str]
    histogram: str
    series: Series
    stages: dict[str, Stage]
    problems: dict[str, str]

    @property
    def latency(self) -> HdrHistogram:
        return HdrHistogram.decode(self.histogram)

    def in_figures(self) -> NDArray[np.bool_]:
        """bool[bins]: after the warm-up, and something was due."""
        at_s = np.arange(len(self.series.due)) * self.bin_s
        return (at_s >= self.warm_up_s - 1e-9) & (np.array(self.series.due) > 0)

    def bars(self, least_coverage: float = 0.0) -> tuple[Figure, ...]:
        """The figures, and which of them have a bar."""
        f = self.figures
        return (
            Figure("p50", f.p50_ms, unit="ms"),
            Figure("p99", f.p99_ms, most=self.sla_ms, unit="ms"),
            Figure("p99.9", f.p999_ms, unit="ms"),
            Figure("answered, of those due", f.answered / f.requests if f.requests else math.nan, least=LEAST_ANSWERED),
            Figure("answered within the SLA, of those due", f.within_sla),
            Figure("mean coverage", f.coverage, least=least_coverage or None),
            Figure("generator's p99 lateness", self.generator.late_p99_ms, unit="ms"),
            Figure("generator's CPU", self.generator.cpu, unit="cores"),
            Figure("taken from its cores by a hypervisor", self.generator.stolen),
        )


# ---------------------------------------------------------------------------------------------- buckets


def buckets(latency_s: Floats) -> Counts:
    """i64[n]: which bucket each is in."""
    number = np.log(np.maximum(latency_s, SHORTEST_S) / SHORTEST_S) / math.log(GROWTH)
    return number.astype(np.int64).clip(0, N_BUCKETS - 1)


def bucket_ms(bucket: Any) -> Any:
    """The middle of a bucket."""
    return SHORTEST_S * GROWTH ** (np.asarray(bucket) + 0.5) * 1e3


# ------------------------------------------------------------------------------------------------- JSON


def write(run: Run, file: Path) -> None:
    said = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION} | without_nan(asdict(run))
    file.write_text(json.dumps(said, separators=(",", ":"), allow_nan=False) + "\n")


def read(file: Path) -> Run:
    """Raises ValueError that says what is wrong with the file, OSError."""
    try:
        said = json.loads(file.read_bytes())
        schema, version = said.pop("schema"), said.pop("schema_version")
    except (ValueError, AttributeError, KeyError, TypeError) as e:
        raise ValueError(f"{file}: not the JSON of a run") from e
    if (schema, version) != (SCHEMA, SCHEMA_VERSION):
        raise ValueError(f"{file}: {schema} {version}; allowed is {SCHEMA} {SCHEMA_VERSION}")
    try:
        stages = {name: Stage(**_with_nan(Stage, stage)) for name, stage in said["stages"].items()}
        figures, generator = (
            Figures(**_with_nan(Figures, said["figures"])),
            Generator(**_with_nan(Generator, said["generator"])),
        )
        coverage = [math.nan if c is None else c for c in said["series"]["coverage"]]
        series = replace(Series(**said["series"]), coverage=coverage)
        run = Run(**said | {"figures": figures, "generator": generator, "series": series, "stages": stages})
        run.series.buckets()
        _ = run.latency
    except Exception as e:  # whatever a file can hold
        raise ValueError(f"{file}: not the JSON of a run: {type(e).__name__}: {e}") from e
    return run


def without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _with_nan(kind: Any, said: dict[str, Any]) -> dict[str, Any]:
    floats = {f.name for f in fields(kind) if f.type is float}
    return {k: math.nan if v is None and k in floats else v for k, v in said.items()}
