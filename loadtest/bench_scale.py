"""`make bench-scale`: a catalogue of ten million items, or of any size, against its bars; it is made if it isn't there.

    python -m models synthesize --items N ─▶ bundle ─▶ service: ready when?  ─▶ 20 a second: p50
                                                       highest rate ─▶ half of it: p99 ─▶ memory of all processes
    the same at 20 a second on W1 ─▶ how p50 grows with the catalogue: exponent of N

A hundred million items take three quarters of an hour to make, and 60 GB of disk meanwhile; docs/performance.md says
what that gave:

    --items 100_000_000 --rate 5 --most-p99-ms 100 --most-gib 20 --least-recall 0.80 --most-ready-s inf --warm

A bundle that is made is asked for that recall: an index of more bits has more, and may not fit in memory beside the
rows that it has scored exactly.

Memory is PSS: pages of maps that were touched count, once for all processes. Exit codes: 0, 1 when a bar is missed, 2
for what can't be used.
"""

import argparse
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from loadtest import capacity, launch
from loadtest.arrivals import constant, poisson
from loadtest.lab.bodies import for_bundle
from loadtest.launch import ROOT, Server
from loadtest.limits.command import machine, progress
from loadtest.limits.cpu import tree
from loadtest.limits.measure import POOL, UNLOADED_RATE
from loadtest.observed import Observed
from loadtest.open_loop import Attack, Generator
from loadtest.plan.bundles import manifest_of
from loadtest.plan.memory import GIB
from loadtest.plan.metering import smaps
from loadtest.table import Figure, verdict

Say = Callable[[str], None]

SMALL = Path("models/bundles/w1")
UNLOADED_S, LOADED_S, SEARCH_S = 20.0, 60.0, 10.0
READY_S = 10.0
PATIENCE_S = 6 * 3600.0  # to make a bundle


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.bench_scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=10_000_000)
    parser.add_argument("--bundle", type=Path, help="made if it isn't there; models/bundles/w<items> if absent")
    parser.add_argument("--small", type=Path, default=SMALL, help="the bundle that growth is measured from")
    parser.add_argument("--rate", type=float, help="requests a second, instead of half of the highest")
    parser.add_argument("--seconds", type=float, default=LOADED_S, help="of the run at that rate")
    parser.add_argument("--most-p99-ms", type=float, default=25.0)
    parser.add_argument("--most-gib", type=float, default=6.0)
    parser.add_argument("--least-recall", type=float, default=0.90)
    parser.add_argument(
        "--warm", action="store_true", help="ask each request once before: its pages are in memory then"
    )
    parser.add_argument("--most-ready-s", type=float, default=READY_S, help="inf: whatever it takes to read the bundle")
    parsed = parser.parse_args(arguments)
    say, began = progress(time.monotonic()), time.monotonic()
    bundle = parsed.bundle or SMALL.with_name(f"w{parsed.items}")
    try:
        if not (bundle / "manifest.json").is_file():
            make(bundle, parsed.items, parsed.least_recall, say)
        small_n, small_p50 = unloaded(parsed.small, say, is_warm=parsed.warm)
        large_n, figures, p50 = measured(bundle, parsed, say)
    except (RuntimeError, OSError, ValueError, subprocess.SubprocessError) as e:
        print(f"not measured: {e}", file=sys.stderr)
        return 2
    exponent = math.log(p50 / small_p50) / math.log(large_n / small_n) if large_n != small_n else math.nan
    growth = (
        Figure(f"p50 of {small_n:,} items at {UNLOADED_RATE:g}/s", small_p50, unit="ms"),
        Figure(f"p50 of {large_n:,} items at {UNLOADED_RATE:g}/s", p50, unit="ms"),
        Figure("growth of p50: exponent of the catalogue's size", exponent, most=1.0),
    )
    facts = machine() | {"items": large_n, "seconds": round(time.monotonic() - began)}
    groups = [(f"{large_n:,} items", figures), ("growth", growth)]
    return 0 if verdict("scale", groups, sys.stdout, facts, heading="what") else 1


def make(bundle: Path, items: int, recall: float, say: Say) -> None:
    """Synthesize it, showing how it goes. Raises RuntimeError."""
    bundle.parent.mkdir(parents=True, exist_ok=True)
    say(f"{bundle}: {items:,} items are made; {shutil.disk_usage(bundle.parent).free / GIB:.0f} GiB of disk are free")
    command = [sys.executable, "-m", "models", "synthesize", "--items", str(items), "--out", str(bundle)]
    command += ["--recall", str(recall), "--force"]
    done = subprocess.run(command, cwd=ROOT, stdout=sys.stderr, timeout=PATIENCE_S)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} ended with {done.returncode}")


def unloaded(bundle: Path, say: Say, *, is_warm: bool) -> tuple[int, float]:
    """Items of the bundle, and p50 in ms at 20 requests a second."""
    bodies = for_bundle(bundle, POOL)
    with launch.service(bundle, os.cpu_count() or 1) as server:
        p50 = quiet_p50(server, bodies, say, is_warm=is_warm)
    return manifest_of(bundle)["retrievers"][0]["n"], p50


def quiet_p50(server: Server, bodies: list[bytes], say: Say, *, is_warm: bool) -> float:
    """In ms, at 20 requests a second; is_warm: with each of the requests for the second time."""
    capacity.settle(server)
    if is_warm:
        due_s = constant(UNLOADED_RATE, POOL / UNLOADED_RATE)
        first = Generator(Attack(server.port, bodies, due_s)).result()
        p50 = f"p50 {first.percentile_s(50) * 1e3:.2f} ms"
        say(f"  {UNLOADED_RATE:g}/s, for the first time: {p50}, coverage {capacity.covered(first):.3f}")
        capacity.settle(server)
    seen = whole(Generator(Attack(server.port, bodies, constant(UNLOADED_RATE, UNLOADED_S))).result())
    say(f"  {UNLOADED_RATE:g}/s: p50 {seen.percentile_s(50) * 1e3:.2f} ms, p99 {seen.percentile_s(99) * 1e3:.2f} ms")
    return seen.percentile_s(50) * 1e3


def measured(bundle: Path, parsed: argparse.Namespace, say: Say) -> tuple[int, tuple[Figure, ...], float]:
    """Items, figures, and p50 in ms at 20 requests a second."""
    bodies, retriever, started = for_bundle(bundle, POOL), manifest_of(bundle)["retrievers"][0], time.monotonic()
    with launch.service(bundle, os.cpu_count() or 1) as server:
        ready_s = time.monotonic() - started
        say(f"{bundle}: ready after {ready_s:.1f} s")
        p50 = quiet_p50(server, bodies, say, is_warm=parsed.warm)
        rate = parsed.rate
        if rate is None:
            rate = capacity.find(
                server, lambda due_s: Generator(Attack(server.port, bodies, due_s)).result(), SEARCH_S, say
            )
            rate /= 2
        capacity.settle(server)
        seen = whole(Generator(Attack(server.port, bodies, poisson(rate, parsed.seconds))).result())
        held = sum(smaps(pid, "Pss") for pid in tree(server.process.pid)) / GIB
    on_disk = sum(file.stat().st_size for file in bundle.rglob("*") if file.is_file()) / GIB
    loaded = f"{rate:.0f} a second, {len(seen):,} requests"
    most_ready_s = parsed.most_ready_s if math.isfinite(parsed.most_ready_s) else None
    figures = (
        Figure(f"p99 at {loaded}", seen.percentile_s(99) * 1e3, most=parsed.most_p99_ms, unit="ms"),
        Figure(f"p50 at {loaded}", seen.percentile_s(50) * 1e3, unit="ms"),
        Figure(f"mean coverage at {loaded}", capacity.covered(seen), least=capacity.LEAST_COVERAGE),
        Figure("memory, PSS of all processes", held, most=parsed.most_gib, unit="GiB"),
        Figure(f"recall@{retriever['recall']['at']:,}", retriever["recall"]["reached"], least=parsed.least_recall),
        Figure("ready, with every sum verified", ready_s, most=most_ready_s, unit="s"),
        Figure("on disk", on_disk, unit="GiB"),
    )
    return retriever["n"], figures, p50


def whole(seen: Observed) -> Observed:
    """Raises RuntimeError for a run in which requests failed: its latencies say nothing."""
    if seen.is_ok.mean() < capacity.LEAST_ANSWERED:
        raise RuntimeError(f"{int((~seen.is_ok).sum())} of {len(seen)} requests failed")
    return seen


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers and generators are ended too
    sys.exit(main())
