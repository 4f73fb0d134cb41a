"""`python -m loadtest report RUN.json`: the page of a kept run, drawn again. Exit codes: 0, 2 for what isn't a run."""

import argparse
from pathlib import Path

from loadtest.lab import page
from loadtest.lab.compare import kept, save


def add_arguments(report: argparse.ArgumentParser) -> None:
    report.add_argument("run", type=Path, metavar="RUN.json", help="the run.json of an attack")
    report.add_argument("--out", type=Path, metavar="FILE", help="the page; report.html beside RUN.json if absent")


def run(parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> int:
    """Returns the exit code."""
    text = page.report(kept(parser, "RUN.json", parsed.run))
    save(parser, parsed.out or parsed.run.with_name("report.html"), text)
    return 0
