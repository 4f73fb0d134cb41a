"""`python -m loadtest compare A.json B.json`: two kept runs in the same pictures, and what differs.

Exit codes: 0; 1 when one of the runs is invalid; 2 for what isn't a run.
"""

import argparse
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

from loadtest.lab import page
from loadtest.lab.difference import differences
from loadtest.lab.run import Run, read, without_nan


def add_arguments(compare: argparse.ArgumentParser) -> None:
    compare.add_argument("a", type=Path, metavar="A.json", help="the run.json of an attack")
    compare.add_argument("b", type=Path, metavar="B.json", help="the one that is held against it")
    compare.add_argument("--out", type=Path, metavar="FILE", help="the page; compare.html beside B.json if absent")


def run(parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> int:
    """Returns the exit code."""
    a, b = kept(parser, "A.json", parsed.a), kept(parser, "B.json", parsed.b)
    found = differences(a, b)
    out = parsed.out or parsed.b.with_name("compare.html")
    save(parser, out, page.comparison(a, b, (str(parsed.a), str(parsed.b)), found))
    print("| what | A | B | B - A | 95 % interval |\n|---|---|---|---|---|")
    for d in found:
        interval = f"{d.low:.4g} to {d.high:.4g}" if d.has_interval else ""
        print(f"| {d.name} | {' | '.join(map(told, (d.a, d.b, d.gap)))} | {interval} |")
    facts = {"bench": "compare", "a": str(parsed.a), "b": str(parsed.b), "out": str(out)}
    print(json.dumps(without_nan(facts | {"differences": [asdict(d) | {"is_clear": d.is_clear} for d in found]})))
    for what in page.unlike(a, b):
        print(f"{what}: A had {a.setup.get(what)}, B had {b.setup.get(what)}", file=sys.stderr)
    for name, one in (("A", a), ("B", b)):
        for why in one.invalid:
            print(f"{name} is INVALID: {why}", file=sys.stderr)
    return 1 if a.invalid or b.invalid else 0


def told(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "–"


def kept(parser: argparse.ArgumentParser, name: str, file: Path) -> Run:
    """The run in a file. Ends the program with 2 where there is none."""
    try:
        return read(file)
    except ValueError as e:
        parser.error(f"{name}: {e}")
    except OSError as e:
        parser.error(f"{name}: {file}: {e.strerror}; allowed is the run.json of an attack")


def save(parser: argparse.ArgumentParser, out: Path, text: str) -> None:
    """Ends the program with 2 where it can't be written."""
    try:
        out.write_text(text)
    except OSError as e:
        parser.error(f"--out {out}: {e.strerror}; allowed is a file that can be written")
    print(out, file=sys.stderr)
