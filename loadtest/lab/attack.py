"""`python -m loadtest attack`: one open-loop run against a service, kept as JSON and as a page to look at.

Latency counts from the instant a request was due. Exit codes: 0 when the run is valid and every bar is met; 1 when a
bar is missed or the run is invalid; 2 for what can't be used.
"""

import argparse
import contextlib
import math
import sys
import time
from pathlib import Path
from typing import Any

from loadtest import arrivals
from loadtest.lab import live, options, page, where
from loadtest.lab.record import MOST_LATE_MS, record
from loadtest.lab.run import Run, write
from loadtest.lab.target import Target
from loadtest.limits import cpu
from loadtest.observed import Floats, Observed
from loadtest.open_loop import Attack, Generator
from loadtest.table import verdict

ARRIVALS = ("poisson", "constant", "burst", "trace")
REPORTS = Path("reports")


def add_arguments(attack: argparse.ArgumentParser) -> None:
    number = options.number
    options.add_target(attack)
    when = attack.add_argument_group("when")
    when.add_argument("--arrivals", choices=ARRIVALS, default="poisson", help="default poisson")
    when.add_argument("--rate", type=number(0, 100_000, is_open=True), help="requests a second")
    when.add_argument("--seconds", type=number(0, 86_400, is_open=True), help="that count; of a trace, all if absent")
    when.add_argument(
        "--warm-up",
        type=number(0, 3_600),
        default=0.0,
        metavar="SECONDS",
        help="before them, at the same rate, in no figure",
    )
    when.add_argument(
        "--trace", type=Path, metavar="FILE", help='one arrival a line: seconds, or {"at_s": seconds, "body": {…}}'
    )
    when.add_argument(
        "--speed", type=number(0, 1_000, is_open=True), default=1.0, help="of a trace; at 2 it takes half as long"
    )
    when.add_argument("--burst-factor", type=number(1, 1_000), default=5.0, help="of a burst's rate over --rate")
    when.add_argument("--burst-seconds", type=number(0, 3_600, is_open=True), default=1.0, help="a burst's length")
    when.add_argument(
        "--burst-every", type=number(0, 3_600, is_open=True), default=10.0, help="seconds from burst to burst"
    )
    options.add_bodies(attack)
    judged = attack.add_argument_group("how it is judged and kept")
    judged.add_argument(
        "--sla-ms", type=number(0, 60_000, is_open=True), default=100.0, help="bar of the 99th percentile (default 100)"
    )
    judged.add_argument(
        "--least-coverage", type=number(0, 1), default=0.0, help="bar of the mean coverage; none if absent"
    )
    judged.add_argument(
        "--most-late-ms",
        type=number(0, 1_000, is_open=True),
        default=MOST_LATE_MS,
        help=f"p99 of the generator's own lateness in a valid run (default {MOST_LATE_MS:g})",
    )
    judged.add_argument(
        "--patience",
        type=number(0, 120, is_open=True),
        default=15.0,
        metavar="SECONDS",
        help="until a request without an answer is an error",
    )
    judged.add_argument(
        "--most",
        type=number(1, options.MOST_REQUESTS, is_whole=True),
        default=200_000,
        help="requests in one run (default 200,000)",
    )
    judged.add_argument(
        "--out", type=Path, help="directory for run.json and report.html; reports/attack-DATE-TIME if absent"
    )
    judged.add_argument("--force", action="store_true", help="replace the run that --out holds")


def run(parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> int:
    """Returns the exit code."""
    options.check(parser, parsed)
    due_s, traced, seconds = due(parser, parsed)
    bodies = options.asked(parser, parsed, len(due_s), traced)
    folder = parsed.out or REPORTS / time.strftime("attack-%Y%m%d-%H%M%S")
    if (folder / "run.json").exists() and not parsed.force:
        parser.error(f"--out {folder}: holds a run; allowed is another directory, or --force to replace it")
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        parser.error(f"--out {folder}: {e.strerror}; allowed is a directory that can be written")
    try:
        with options.target(parser, parsed) as target:
            target.first_answer(bodies[0])
            what = target.attack(bodies, due_s, patience_s=parsed.patience, keeps_items=False)
            seen, facts = fly(target, what, parsed.warm_up + seconds)
    except RuntimeError as e:
        print(f"not measured: {e}", file=sys.stderr)
        if is_new:  # what was there before stays
            with contextlib.suppress(OSError):
                folder.rmdir()
        return 2
    setup = options.described(parsed) | {"arrivals": described(parsed, seconds), "bodies sent": len(bodies)}
    kept = record(
        seen,
        setup | facts | where.surroundings(),
        sla_s=parsed.sla_ms / 1e3,
        warm_up_s=parsed.warm_up,
        seconds=seconds,
        most_connections=what.most_open,
        most_late_ms=parsed.most_late_ms,
        server_cpu_s=facts["server CPU s"] if facts["server CPU s"] is not None else math.nan,
    )
    return finish(kept, folder, parsed.least_coverage)


def due(parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> tuple[Floats, list[bytes], float]:
    """When, with the warm-up; the bodies of a trace; the seconds that count."""
    if (parsed.arrivals == "trace") != bool(parsed.trace):
        parser.error("--arrivals trace and --trace FILE: both or neither")
    if parsed.trace:
        try:
            instants, bodies = arrivals.read_trace(parsed.trace, speed=parsed.speed)
        except (ValueError, OSError) as e:
            parser.error(f"--trace: {e}")
        longest = float(instants[-1]) - parsed.warm_up
        if longest <= 0:
            parser.error(f"--warm-up {parsed.warm_up:g}: the trace ends at {instants[-1]:g} s; allowed is less")
        seconds = min(parsed.seconds or math.inf, longest)
        instants = instants[instants <= parsed.warm_up + seconds]
        return options.bounded(parser, instants, parsed.most), bodies[: len(instants)], seconds
    if not parsed.rate or not parsed.seconds:
        parser.error(f"--rate and --seconds: both are needed for {parsed.arrivals} arrivals")
    total_s = parsed.warm_up + parsed.seconds
    if parsed.rate * total_s > options.MOST_REQUESTS:  # before they are drawn
        parser.error(f"--rate x --seconds: {parsed.rate * total_s:,.0f} requests; allowed is up to --most")
    try:
        instants = {
            "poisson": lambda: arrivals.poisson(parsed.rate, total_s, parsed.seed),
            "constant": lambda: arrivals.constant(parsed.rate, total_s),
            "burst": lambda: arrivals.burst(
                parsed.rate,
                total_s,
                factor=parsed.burst_factor,
                length_s=parsed.burst_seconds,
                every_s=parsed.burst_every,
                seed=parsed.seed,
            ),
        }[parsed.arrivals]()
    except ValueError as e:
        parser.error(f"--burst-factor, --burst-seconds, --burst-every: {e}")
    return options.bounded(parser, instants, parsed.most), [], parsed.seconds


def fly(target: Target, what: Attack, seconds: float) -> tuple[Observed, dict[str, Any]]:
    """Send it all, with progress on standard error; what came back, and what the service says of itself."""
    quality = [target.metric("winnow_quality")] if target.admin else []
    generator = Generator(what)
    before = target.cpu_used()
    try:
        live.watch(generator, seconds, sys.stderr)
        seen = generator.result()
    except BaseException:
        generator.stop()
        raise
    used_s = cpu.spent(before, cpu.used(target.pid)).total_s if before and target.pid else None
    quality += [target.metric("winnow_quality")] if target.admin else []
    facts = {
        "target": target.url,
        "generation": sorted(set(seen.generation) - {""}),
        "quality before and after": quality,
        "server CPU s": used_s,
    }
    return seen, facts


def described(parsed: argparse.Namespace, seconds: float) -> str:
    """The arrivals, to be shown."""
    bursts = f"{parsed.burst_factor:g} times that for {parsed.burst_seconds:g} s every {parsed.burst_every:g} s"
    kind = {
        "trace": f"{parsed.trace} at {parsed.speed:g} times its speed",
        "burst": f"poisson, {parsed.rate or 0:g}/s in the mean, {bursts}",
    }.get(parsed.arrivals, f"{parsed.arrivals}, {parsed.rate or 0:g}/s")
    return f"{kind}, {seconds:g} s after {parsed.warm_up:g} s of warm-up"


def finish(kept: Run, folder: Path, least_coverage: float) -> int:
    """Write both files, print the figures; the exit code."""
    write(kept, folder / "run.json")
    (folder / "report.html").write_text(page.report(kept))
    facts = {"is_valid": not kept.invalid, "invalid": kept.invalid, "out": str(folder)}
    is_met = verdict("attack", [("run", kept.bars(least_coverage))], sys.stdout, facts)
    for why in kept.invalid:
        print(f"INVALID: {why}", file=sys.stderr)
    print(f"{folder / 'report.html'}", file=sys.stderr)
    return 0 if is_met and not kept.invalid else 1
