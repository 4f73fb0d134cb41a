"""When requests are due: instants in seconds from the start, rising, all drawn before the first is sent.

    poisson    independent people; the gaps are exponential
    constant   a metronome, for comparing with tools that know nothing else
    burst      poisson at a low rate and, every so often, at a high one; the mean is the rate
    steps      poisson at one rate after the other
    trace      what happened once, at its own pace or scaled

A seed names its instants. Who sends is open_loop.py's, what is sent the caller's.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loadtest.observed import Floats

MOST_ARRIVALS = 2_000_000  # of a trace
MOST_LINE = 1 << 20  # bytes of a line of a trace: what the service takes as a body


def poisson(rate: float, seconds: float, seed: int = 0) -> Floats:
    """Instants of a Poisson process of `rate` a second, f64[n] in [0, seconds), rising."""
    rng = np.random.default_rng(seed)
    gaps = rng.exponential(1 / rate, int(rate * seconds + 10 * np.sqrt(rate * seconds) + 10))
    due = np.cumsum(gaps)
    return due[due < seconds]


def constant(rate: float, seconds: float) -> Floats:
    """Instants 1 / rate apart, from 0."""
    return np.arange(int(rate * seconds)) / rate


def steps(rates: Sequence[float], step_s: float, seed: int = 0) -> Floats:
    """Poisson arrivals whose rate changes every `step_s`."""
    return np.concatenate([poisson(r, step_s, seed + i) + i * step_s for i, r in enumerate(rates)])


def burst(rate: float, seconds: float, *, factor: float, length_s: float, every_s: float, seed: int = 0) -> Floats:
    """Poisson arrivals at factor · rate in the first `length_s` of every `every_s`, at one lower rate between.

    lower = rate · (every_s - factor · length_s) / (every_s - length_s), so that the mean over a period is `rate`.
    Raises: ValueError unless factor >= 1, 0 < length_s < every_s and factor · length_s <= every_s.
    """
    if not (factor >= 1 and 0 < length_s < every_s and factor * length_s <= every_s):
        raise ValueError(
            f"bursts of {length_s:g} s at {factor:g} times the rate every {every_s:g} s: allowed is a factor of 1 or "
            "more, over 0 s, and factor x length <= every, or there is nothing left between them"
        )
    lower = rate * (every_s - factor * length_s) / (every_s - length_s)
    high = factor * rate
    offered = poisson(high, seconds, seed)  # thinned: each is kept with probability rate then / high
    kept = np.random.default_rng((seed, 1)).random(len(offered)) < lower / high
    return offered[kept | (offered % every_s < length_s)]


def read_trace(file: Path, *, speed: float = 1.0, most: int = MOST_ARRIVALS) -> tuple[Floats, list[bytes]]:
    """Instants from 0 and the bodies, which are none or one a line.

    A line is a number of seconds, or an object {"at_s": seconds, "body": {…}} where the body may be absent from all.
    Seconds count from anywhere (a clock will do) and don't fall. At `speed` 2 it takes half as long. Blank lines are
    skipped.
    Raises: ValueError that names the line.
    """
    instants: list[float] = []
    bodies: list[bytes] = []
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            at, body = _arrival(line, f"{file}, line {number}")
            if instants and at < instants[-1]:
                raise ValueError(f"{file}, line {number}: {at:.15g} s after {instants[-1]:.15g} s: they may not fall")
            if instants and (body is None) == bool(bodies):
                raise ValueError(f"{file}, line {number}: a body in every line or in none")
            if len(instants) == most:
                raise ValueError(f"{file}: over {most:,} arrivals, as many as are allowed")
            instants.append(at)
            bodies += [] if body is None else [json.dumps(body).encode()]
    if not instants:
        raise ValueError(f"{file}: no arrivals in it")
    return (np.array(instants) - instants[0]) / speed, bodies


def _arrival(line: bytes, where: str) -> tuple[float, dict[str, Any] | None]:
    form = 'a number of seconds or {"at_s": seconds, "body": {…}}'
    try:
        said = json.loads(line) if len(line) <= MOST_LINE else None
    except ValueError:
        said = None
    at, body = (said.get("at_s"), said.get("body")) if isinstance(said, dict) else (said, None)
    is_number = isinstance(at, int | float) and not isinstance(at, bool) and math.isfinite(at)
    has_only = not isinstance(said, dict) or said.keys() <= {"at_s", "body"}
    if not is_number or not has_only or not (body is None or isinstance(body, dict)):
        raise ValueError(f"{where}: {line[:80].decode(errors='replace').strip()!r} isn't {form}")
    return float(at), body
