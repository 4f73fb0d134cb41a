"""`python -m loadtest search`: the highest rate that a service holds, once or several times.

A rate is held by a run of Poisson arrivals whose p99 is within the SLA, of which 99.9 % are answered, which begins at
quality 1 and keeps it (at most 1 % of the answers are narrowed by load: as many as may be late), and whose mean
coverage is .99. With each rate comes what it was bought with: the CPU of the service's processes a request and, for a
service that is started here, that of the raw kernels before each run. The machine's speed moves from minute to minute,
and the rate with it: their product, in cores' worth of kernels, is what several searches must agree on.

`find` is for others. Exit codes: 0; 1 when no rate is held or the searches disagree; 2 for what can't be used.
"""

import argparse
import contextlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from loadtest import capacity, search
from loadtest.capacity import Bars
from loadtest.lab import options, where
from loadtest.lab.record import MOST_LATE_MS
from loadtest.lab.run import without_nan
from loadtest.lab.target import Target
from loadtest.limits import cpu
from loadtest.limits.bare_loop import BareLoop, bare_loop
from loadtest.observed import Floats, Observed
from loadtest.open_loop import Generator
from loadtest.table import Figure, verdict

HOT_S = 1.0  # of kernels before each run
QUIET_S = 3.0  # between runs where the service can't be asked for its quality: it recovers within 2 s
MOST_CV = 0.05  # of rate x kernel CPU over several searches
MOST_NARROWED = 0.01
POOL = 1_000  # requests where the kernels are timed on them too


@dataclass(frozen=True, slots=True)
class Attempt:
    """One run of a search. rate: requests sent a second; the others as in Figures; NaN where it isn't known."""

    rate: float
    p50_ms: float
    p99_ms: float
    answered: float
    coverage: float
    narrowed: float
    server_cpu_ms: float
    late_p99_ms: float
    is_held: bool


@dataclass(frozen=True, slots=True)
class Found:
    """The highest rate, the service's CPU a request at it, the kernels' (median over the search), and all runs."""

    rate: float
    server_cpu_ms: float
    kernel_cpu_ms: float
    attempts: list[Attempt]

    @property
    def product(self) -> float:
        """rate x CPU seconds of the kernels a request: cores' worth of kernels; NaN without them."""
        return self.rate * self.kernel_cpu_ms / 1e3


# ---------------------------------------------------------------------------------------------- one search


def find(
    target: Target,
    bodies: Sequence[bytes],
    bars: Bars,
    seconds: float,
    say: Callable[[str], None],
    *,
    within: float = 0.05,
    start: float = capacity.FIRST_GUESS,
    growth: float = search.GROWTH,
    kernels: BareLoop | None = None,
) -> Found:
    """One search over runs of so many seconds, to a relative `within`. Raises RuntimeError where no rate is held."""
    attempts, kernel_ms = list[Attempt](), list[float]()

    def before() -> None:
        if attempts and not target.admin:
            time.sleep(QUIET_S)
        if kernels:
            kernel_ms.append(kernels.hot(HOT_S).cpu_ms)

    def attack(due_s: Floats) -> Observed:
        generator = Generator(target.attack(bodies, due_s, keeps_items=False))
        try:
            used = target.cpu_used()
            seen = generator.result()
        except BaseException:
            generator.stop()
            raise
        server_s = cpu.spent(used, cpu.used(target.pid)).total_s if used and target.pid else math.nan
        attempts.append(_attempt(seen, seconds, server_s, bars))
        return seen

    server = target if target.admin else None
    how = {"within": within, "before": before, "bars": bars, "start": start, "growth": growth}
    rate = capacity.find(server, attack, seconds, say, **how)
    best = max((a for a in attempts if a.is_held), key=lambda a: a.rate)
    return Found(rate, best.server_cpu_ms, statistics.median(kernel_ms) if kernel_ms else math.nan, attempts)


def _attempt(seen: Observed, seconds: float, server_s: float, bars: Bars) -> Attempt:
    return Attempt(
        rate=len(seen) / seconds,
        p50_ms=seen.percentile_s(50) * 1e3,
        p99_ms=seen.percentile_s(99) * 1e3,
        answered=float(seen.is_ok.mean()),
        coverage=capacity.covered(seen),
        narrowed=capacity.narrowed(seen),
        server_cpu_ms=server_s / len(seen) * 1e3,
        late_p99_ms=float(np.quantile(seen.sent_late_s, 0.99)) * 1e3,
        is_held=bars.are_met(seen),
    )


# --------------------------------------------------------------------------------------------- the command


def add_arguments(search: argparse.ArgumentParser) -> None:
    number = options.number
    options.add_target(search)
    options.add_bodies(search)
    held = search.add_argument_group("what is held, and how it is looked for")
    held.add_argument("--sla-ms", type=number(0, 60_000, is_open=True), default=100.0, help="default 100")
    held.add_argument("--least-coverage", type=number(0, 1), default=capacity.LEAST_COVERAGE, help="default .99")
    held.add_argument(
        "--most-late-ms",
        type=number(0, 1_000, is_open=True),
        default=MOST_LATE_MS,
        help="p99 of the generator's own lateness",
    )
    held.add_argument("--seconds", type=number(0, 600, is_open=True), default=20.0, help="of each run (default 20)")
    held.add_argument("--within", type=number(0.001, 1), default=0.02, help="relative, of the rate (default .02)")
    held.add_argument(
        "--start",
        type=number(0, 100_000, is_open=True),
        default=capacity.FIRST_GUESS,
        help="the first rate (default 50)",
    )
    held.add_argument(
        "--repeat", type=number(1, 100, is_whole=True), default=1, help="searches; prints mean and variation"
    )
    held.add_argument("--out", type=Path, metavar="FILE", help="for the line of JSON, with every run")


def run(parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> int:
    """Returns the exit code."""
    options.check(parser, parsed)
    bodies = options.asked(parser, parsed, POOL if not parsed.url else options.MOST_REQUESTS)
    bars = Bars(
        p99_s=parsed.sla_ms / 1e3,
        coverage=parsed.least_coverage,
        narrowed=MOST_NARROWED,
        late_s=parsed.most_late_ms / 1e3,
    )
    began, found = time.monotonic(), list[Found]()

    def say(line: str) -> None:
        print(f"{time.monotonic() - began:7.1f} s  {line}", file=sys.stderr, flush=True)

    try:
        with options.target(parser, parsed) as target, _kernels(parsed, bodies, say) as kernels:
            target.first_answer(bodies[0])
            asked = kernels.bodies if kernels else bodies
            for number in range(parsed.repeat):
                say(f"search {number + 1} of {parsed.repeat}")
                how = {"within": parsed.within, "start": parsed.start, "kernels": kernels}
                how |= {"start": found[-1].rate, "growth": search.NEARBY} if found else {}
                found.append(find(target, asked, bars, parsed.seconds, say, **how))
    except RuntimeError as e:
        print(f"not measured: {e}", file=sys.stderr)
        if not found and not str(e).startswith(("no rate", "no end")):
            return 2
    facts = options.described(parsed) | where.surroundings() | {"bars": asdict(bars), "seconds": parsed.seconds}
    facts["searches"] = [asdict(f) | {"rate x kernel CPU": f.product} for f in found]
    is_met = verdict("search", [("search", figures(found, parsed.repeat))], sys.stdout, without_nan(facts))
    if parsed.out:
        parsed.out.write_text(json.dumps(without_nan(facts | {"bench": "search"})) + "\n")
    return 0 if is_met and len(found) == parsed.repeat else 1


def figures(found: Sequence[Found], n_wanted: int) -> tuple[Figure, ...]:
    """Means over the searches, and how much they vary."""
    rates, products = [f.rate for f in found], [f.product for f in found]
    has_kernels = bool(found) and all(map(math.isfinite, products))
    varied = (
        Figure("rate, coefficient of variation", variation(rates)),
        Figure(
            "rate x kernel CPU, coefficient of variation", variation(products), most=MOST_CV if has_kernels else None
        ),
    )
    return (
        Figure("searches that ended", len(found), least=n_wanted),
        Figure("highest rate held, mean", _mean(rates), unit="/s"),
        Figure("service's CPU a request at it, mean", _mean([f.server_cpu_ms for f in found]), unit="ms"),
        Figure("kernels' CPU a request, mean", _mean([f.kernel_cpu_ms for f in found]), unit="ms"),
        Figure("rate x kernel CPU, mean", _mean(products), unit="cores"),
        *(varied if n_wanted > 1 else ()),
    )


def variation(values: Sequence[float]) -> float:
    """Standard deviation, with n - 1, over mean; NaN of fewer than two and where one is."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return math.nan
    return statistics.stdev(values) / statistics.fmean(values)


@contextlib.contextmanager
def _kernels(
    parsed: argparse.Namespace, bodies: Sequence[bytes], say: Callable[[str], None]
) -> Iterator[BareLoop | None]:
    """The raw kernels of the bundle, where it is served here."""
    if parsed.url:
        yield None
        return
    with bare_loop(parsed.bundle, bodies) as kernels:
        if kernels.left_out:
            say(f"  left out: {kernels.left_out}")
        yield kernels


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan
