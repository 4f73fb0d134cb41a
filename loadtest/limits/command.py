"""The command line of `python -m loadtest limits`: what to measure; the table and the line of JSON."""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from loadtest.lab.bodies import for_bundle
from loadtest.limits.measure import (
    POOL,
    QUICK,
    TOLERANCE,
    UNLOADED_RATE,
    Lengths,
    Limits,
    Ratio,
    measure_by_hand,
    measure_limits,
)

BUNDLE = Path("models/bundles/w1")


def add_arguments(limits: argparse.ArgumentParser) -> None:
    limits.add_argument("--bundle", type=Path, default=BUNDLE)
    limits.add_argument("--requests", type=Path, help="JSON, one a line; BUNDLE.requests.jsonl, or made up, if absent")
    limits.add_argument(
        "--kernels-of", type=Path, help="the bundle that --bundle was made from: models hoist, quantise"
    )
    limits.add_argument("--tolerance", type=float, default=TOLERANCE, help="how far scores may be from the kernels'")
    limits.add_argument("--rate", type=float, help="requests a second, instead of half of the highest, which is found")
    limits.add_argument("--unloaded-rate", type=float, default=UNLOADED_RATE, help="requests a second for p50")
    limits.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    limits.add_argument("--sla-ms", type=float, default=100.0)
    limits.add_argument("--rounds", type=int, help="pairs of runs")
    limits.add_argument(
        "--by-hand", action="store_true", help="then the same of the kernels behind FastAPI, glued by hand"
    )
    limits.add_argument("--json", action="store_true", help="end with one line of JSON")
    limits.add_argument("--quick", action="store_true", help="short runs, to see that it works: no measurement")


def run(parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> int:
    """Returns the exit code: 0, or 1 where nothing could be measured."""
    for name in ("rate", "unloaded_rate", "workers", "sla_ms", "rounds", "tolerance"):
        value = getattr(parsed, name)
        if value is not None and not 0 < value < float("inf"):
            parser.error(f"--{name.replace('_', '-')} {value:g}: must be over 0")
    if parsed.kernels_of and not (parsed.kernels_of / "manifest.json").is_file():
        parser.error(f"--kernels-of {parsed.kernels_of}: there is no bundle")
    bodies = read_requests(parser, parsed.bundle, parsed.requests)
    began = time.monotonic()
    lengths, by_hand, say = QUICK if parsed.quick else Lengths(), None, progress(began)
    lengths = replace(lengths, rounds=parsed.rounds or lengths.rounds)
    try:
        found = measure_limits(
            parsed.bundle,
            bodies,
            say,
            rate=parsed.rate,
            unloaded_rate=parsed.unloaded_rate,
            lengths=lengths,
            workers=parsed.workers,
            kernels_of=parsed.kernels_of,
            tolerance=parsed.tolerance,
            SLA_MS=str(parsed.sla_ms),
        )
        if parsed.by_hand:
            say("glued by hand, in the service's place")
            by_hand = measure_by_hand(
                parsed.kernels_of or parsed.bundle,
                bodies,
                say,
                found.rate,
                unloaded_rate=parsed.unloaded_rate,
                lengths=lengths,
                processes=parsed.workers,
                is_searched=parsed.rate is None,
            )
    except RuntimeError as e:
        print(f"not measured: {e}", file=sys.stderr)
        return 1
    report(found, sys.stdout)
    if by_hand:
        print("\nThe kernels glued by hand, where it says service:\n")
        report(by_hand, sys.stdout)
    if parsed.quick:
        print("\n--quick: too short to be a measurement")
    if parsed.json:
        facts = {"bundle": parsed.bundle.name, "is_quick": parsed.quick, "seconds": round(time.monotonic() - began)}
        beside = {"by_hand": as_json(by_hand)} if by_hand else {}
        print(json.dumps({"bench": "limits"} | machine() | facts | as_json(found) | beside))
    return 0


def read_requests(parser: argparse.ArgumentParser, bundle: Path, requests: Path | None) -> list[bytes]:
    """The pool, one JSON body a request. Ends the program with 2 if there is none."""
    try:
        return for_bundle(bundle, POOL, requests)
    except (ValueError, OSError) as e:
        parser.error(f"--bundle, --requests: {e}")


def progress(began: float) -> Callable[[str], None]:
    """Says a line on standard error, with the seconds since."""
    return lambda line: print(f"{time.monotonic() - began:7.1f} s  {line}", file=sys.stderr, flush=True)


def machine() -> dict[str, Any]:
    """What a figure is to be read with."""
    cores = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    return {"date": time.strftime("%Y-%m-%d"), "machine": cores}


# ----------------------------------------------------------------------------------------------- the answer


def as_json(found: Limits) -> dict[str, Any]:
    """The ratios, their spread over the rounds, and the parts of each: medians over the rounds, in ms a request."""
    ratios = {"cpu_ratio": found.cpu_ratio, "p50_ratio": found.p50_ratio, "p99_over_p50": found.p99_over_p50}
    return {
        **{name: ratio.value for name, ratio in ratios.items()},
        "share_of_kernel_bound": found.share_of_kernel_bound,
        "spread": {name: [ratio.low, ratio.high] for name, ratio in ratios.items()},
        "highest_rate": found.highest_rate,
        "rate": found.rate,
        "unloaded_rate": found.unloaded_rate,
        "kernels": {"hot": middle(found.hot), "paced": middle(found.paced)},
        "service": {"loaded": middle(found.loaded), "unloaded": middle(found.unloaded)},
        "left_out": found.left_out,
    }


def middle(runs: Sequence[Any]) -> dict[str, Any]:
    """The median over the runs, field by field, and in a field of parts part by part."""

    def of(values: list[Any]) -> Any:
        if isinstance(values[0], dict):
            names = dict.fromkeys(name for v in values for name in v)
            return {name: statistics.median(v.get(name, 0.0) for v in values) for name in names}
        return statistics.median(values)

    return {name: of([getattr(run, name) for run in runs]) for name in runs[0].__slots__}


def report(found: Limits, out: TextIO) -> None:
    """Parts and ratios, in Markdown."""
    hot, paced, loaded, unloaded = map(middle, (found.hot, found.paced, found.loaded, found.unloaded))
    hot_ms, paced_ms = hot["cpu_parts_ms"], paced["p50_parts_ms"]
    rows = [(part, hot_ms[part], paced_ms[part], None, None) for part in hot_ms]
    rows += [(f"service: {stage}", None, None, None, ms) for stage, ms in unloaded["stage_ms"].items()]
    rows += [(f"service: {part}", None, None, ms, None) for part, ms in loaded["cpu_parts_ms"].items()]
    rows += [("whole request", hot["cpu_ms"], paced["p50_ms"], loaded["cpu_ms"], unloaded["p50_ms"])]
    heads = ("kernels, hot: CPU", f"kernels at {found.unloaded_rate:g}/s: p50")
    heads += (f"service at {found.rate:.0f}/s: CPU", f"service at {found.unloaded_rate:g}/s: p50, stages' means")
    print(f"| ms a request | {' | '.join(heads)} |\n|---|---|---|---|---|", file=out)
    for name, *values in rows:
        print(f"| {name} | {' | '.join('' if v is None else f'{v:.3f}' for v in values)} |", file=out)
    print("\n| ratio | median | least | most |\n|---|---|---|---|", file=out)

    def ratio(name: str, r: Ratio) -> None:
        print(f"| {name} | {r.value:.3f} | {r.low:.3f} | {r.high:.3f} |", file=out)

    ratio("CPU of the service / of the kernels", found.cpu_ratio)
    ratio(f"p50 of the service / of the kernels, at {found.unloaded_rate:g}/s", found.p50_ratio)
    ratio(f"p99 / p50 of the service at {found.rate:.0f}/s", found.p99_over_p50)
    if found.share_of_kernel_bound is not None:
        what = f"highest rate, {found.highest_rate:.0f}/s, over what the kernels alone would allow"
        print(f"| {what} | {found.share_of_kernel_bound:.3f} | | |", file=out)
