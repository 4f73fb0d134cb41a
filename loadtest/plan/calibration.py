"""What some minutes with the real service said of it and of this machine: kept as JSON, so that plans are instant.

All seconds are as the machine had them in those minutes. How it is measured is measure.py's, what is made of it
recipe.py's.
"""

import json
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from statistics import median
from typing import Any

from loadtest.plan.bundles import contents_of, manifest_of
from loadtest.plan.costs import Exponent, Line

FORMAT = 13
MOST_ERROR, LEAST_RUNS = 0.4, 2  # of the simulation, on runs under load: beyond, something else used the machine
MOST_STOLEN = 0.05  # of the cores' time by a hypervisor, in the median run under load
MOST_STRETCH = 2.0  # or its inverse: beyond it a p99 is made by what the simulation doesn't know
SIZES = ("items", "width", "dimension", "model", "workers")  # of which costs are powers


class CalibrationError(ValueError):
    """A calibration that can't be used; says why."""


@dataclass(frozen=True, slots=True)
class Configuration:
    """What can be chosen: widths in candidates; workers of one machine; the SLA, which decides who shares work."""

    retrieve: int
    rerank: int
    workers: int
    sla_s: float

    def __str__(self) -> str:
        return f"{self.retrieve} -> {self.rerank}, {self.workers} worker{'s' * (self.workers != 1)}"


@dataclass(frozen=True, slots=True)
class Loaded:
    """A run under load. client_s, cpu_s: CPU of the load generator and of the service, a request.

    stolen: what a hypervisor took of the cores, a share. lone_s: CPU a request at this rate with one worker, right
    after; 0 where that wasn't asked.
    """

    rate: float
    requests: int
    p50_s: float
    p99_s: float
    coverage: float
    client_s: float
    cpu_s: float
    seconds: float
    stolen: float = 0.0
    lone_s: float = 0.0

    @property
    def work(self) -> float:
        """CPU seconds a second."""
        return self.rate * (self.cpu_s + self.client_s)


@dataclass(frozen=True, slots=True)
class Demand:
    """What a request takes whom.

    loop_s: CPU of the event loop. users_s: CPU of a worker that is no stage's: it reads the request, finds out who
    asks, selects, packs the answer. retrieval, preranking: by width; shard: re-ranking by rows. trip_s: without CPU, on
    the way to a worker and back. client_s: CPU of the load generator, a request.
    shapes: of single requests, all outside the three stages, the first two, re-ranking, over their means: what the
    tails are made of.
    """

    loop_s: float
    users_s: float
    retrieval: Line
    preranking: Line
    shard: Line
    trip_s: float
    client_s: float
    worker_weight: float
    shapes: tuple[tuple[float, float, float], ...]


@dataclass(frozen=True, slots=True)
class Memory:
    """bytes a process or a machine. shared: bundle files that all map; predicted: from formulas, of everything."""

    pss: int
    main_private: int
    worker_private: int
    files: int
    processes: int


@dataclass(frozen=True, slots=True)
class Calibration:
    """One calibration. warmth, busiest, lone, wake_s, beyond_s, stretch: of the machine, fitted on `loaded` (fit.py).

    busiest: share of the cores' time up to which `warmth` was met. lone: what a request takes one worker, which has a
    core for itself, of what it takes the base's.
    briefly: what the base takes over the line of its CPU where it is asked for seconds, between others (again.py); None
    where nobody asked: only the bench does.
    error: what the fit left. n_fitted: how many of these told of waits. speeds: what requests took the service in each
    round, over the median. path: of the bundle as the caller named it. contents: of its files, whatever its widths
    (bundles.py).
    """

    date: str
    machine: str
    versions: dict[str, str]
    cores: int
    bundle: str
    path: str
    contents: str
    items: int
    d: int
    kind: str
    model_bytes: int
    base: Configuration
    speeds: tuple[float, ...]
    demand: Demand
    loaded: tuple[Loaded, ...]
    memory: Memory
    warmth: tuple[float, float] = (1.0, 0.0)
    busiest: float = 1.0
    lone: float = 1.0
    wake_s: float = 0.0
    beyond_s: float = 0.0
    stretch: float = 1.0
    briefly: float | None = None
    n_fitted: int = 0
    error: float = float("nan")
    exponents: dict[str, dict[str, Exponent]] = field(default_factory=dict)
    is_quick: bool = False

    @property
    def doubt(self) -> str | None:
        """Why no plan should be trusted that is made from it, if that is so."""
        if self.is_quick:
            return "a quick calibration only shows that it works"
        if self.n_fitted < LEAST_RUNS:
            return f"only {self.n_fitted} of its runs under load kept the whole funnel and left the cores some time"
        if not self.error <= MOST_ERROR:
            return f"its simulation is off by {self.error:.0%} on its own {self.n_fitted} runs"
        if (stolen := median([run.stolen for run in self.loaded] or [0.0])) > MOST_STOLEN:
            return f"a hypervisor took {stolen:.1%} of the cores under load"
        if not 1 / MOST_STRETCH < self.stretch < MOST_STRETCH:
            return f"its p99s lie {self.stretch:.1f} times as far over the median as simulated"
        return None


def write(calibration: Calibration, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"format": FORMAT} | asdict(calibration), indent=1) + "\n")


def read(file: Path) -> Calibration:
    """Raises CalibrationError when it isn't one of this format."""
    try:
        found = json.loads(file.read_text())
        if found.pop("format") != FORMAT:
            raise CalibrationError(f"{file}: another format; calibrate again")
        return _made(Calibration, found)  # type: ignore[no-any-return]
    except OSError as e:
        raise CalibrationError(f"{file}: {e.strerror}; `plan --calibrate` makes it") from e
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as e:
        raise CalibrationError(f"{file}: is no calibration ({e!r}); calibrate again") from e


def check_is_of(calibration: Calibration, bundle: Path) -> None:
    """Raises CalibrationError when another bundle was measured, OSError when this one can't be read."""
    if contents_of(manifest_of(bundle)) != calibration.contents:
        raise CalibrationError(
            f"{bundle}: the calibration is of {calibration.path}, with other files; "
            "calibrate again (--calibrate), or name that --bundle or another --calibration"
        )


PARTS: dict[str, Any] = {
    "base": Configuration,
    "demand": Demand,
    "memory": Memory,
    "retrieval": Line,
    "preranking": Line,
    "shard": Line,
}


def _made(kind: Any, found: dict[str, Any]) -> Any:
    """A dataclass from what JSON left of it."""
    made = {}
    for f in fields(kind):
        value = found[f.name]
        if f.name in PARTS and is_dataclass(PARTS[f.name]):
            value = _made(PARTS[f.name], value)
        elif f.name == "loaded":
            value = tuple(_made(Loaded, one) for one in value)
        elif f.name == "exponents":
            value = {s: {name: Exponent(**one) for name, one in sizes.items()} for s, sizes in value.items()}
        elif isinstance(value, list):
            value = tuple(tuple(one) if isinstance(one, list) else one for one in value)
        made[f.name] = value
    return kind(**made)
