"""The command line of `python -m loadtest faults`: which bundle, which rows; the tables and the line of JSON."""

import argparse
import os
import platform
import sys
import time
from pathlib import Path

from loadtest.faults import ROWS, measure
from loadtest.faults.lab import Lab
from loadtest.table import report

BUNDLE = Path("models/bundles/w1")


def add_arguments(faults: argparse.ArgumentParser) -> None:
    faults.add_argument("--bundle", type=Path, default=BUNDLE)
    faults.add_argument("--other", type=Path, help="another version over the same items; BUNDLE with a b at its end")
    faults.add_argument("--requests", type=Path, help="JSON requests, one a line; BUNDLE.requests.jsonl")
    faults.add_argument("--only", metavar="ROW[,ROW]", help="these rows only")
    faults.add_argument("--capacity", type=float, help="requests a second, instead of finding it")
    faults.add_argument("--quick", action="store_true", help="short runs, to see that it works: no measurement")


def run(parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> int:
    """Returns the exit code."""
    names = parsed.only.split(",") if parsed.only else list(ROWS)
    if unknown := [name for name in names if name not in ROWS]:
        parser.error(f"no row {', '.join(unknown)}; there are {', '.join(ROWS)}")
    bundle = parsed.bundle
    other = parsed.other or bundle.with_name(f"{bundle.name}b")
    requests = parsed.requests or bundle.with_name(f"{bundle.name}.requests.jsonl")
    for path in (bundle / "manifest.json", requests):
        if not path.exists():
            parser.error(f"{path} isn't there")
    began = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - began:7.1f} s  {line}", file=sys.stderr, flush=True)

    lab = Lab(bundle, other, requests, parsed.quick, say)
    if parsed.capacity:
        lab.full_rate = parsed.capacity
    rows = measure(lab, names)
    facts = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "bundle": bundle.name,
        "capacity": lab.__dict__.get("full_rate"),  # if a row asked for it
        "is_quick": parsed.quick,
        "seconds": round(time.monotonic() - began),
    }
    return 0 if report(rows, sys.stdout, facts) else 1
