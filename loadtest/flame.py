"""python -m loadtest flame FILE.svg: where the service's processes spend their time under load, as a flame graph.

The real service is sampled by py-spy, all its processes at once, at half of what it can answer or so; waiting isn't
drawn. What py-spy writes names the processes by their command lines and so by paths of this machine: here they get the
names of what they do.
"""

import argparse
import re
import subprocess
import sysconfig
import time
from collections.abc import Mapping
from pathlib import Path

from loadtest import launch
from loadtest.arrivals import poisson
from loadtest.lab.bodies import MOST, for_bundle
from loadtest.open_loop import Attack, Generator

WARM_S, SAMPLED_S, AFTER_S = 5.0, 20.0, 5.0
SAMPLES_PER_S = 200
CELL = re.compile(
    r"<g><title>(?P<name>.*?) (?P<share>\([\d,]+ samples, [\d.]+%\))</title>"
    r"(?P<box>.*?)<text (?P<at>[^>]*)>(?P<shown>.*?)</text></g>"
)
TITLE = re.compile(r'(<text id="title"[^>]*>)[^<]*')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.add_argument("out", type=Path, help="file to write, .svg")
    parser.add_argument("--bundle", type=Path, default=Path("models/bundles/w1"))
    parser.add_argument("--requests", type=Path, help="JSON, one a line; BUNDLE.requests.jsonl, or made up, if absent")
    parser.add_argument("--rate", type=float, default=200.0, help="requests a second")
    parser.add_argument("--workers", type=int, default=2)


def run(parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> int:
    """Returns the exit code."""
    try:
        bodies = for_bundle(parsed.bundle, MOST, parsed.requests)
    except (ValueError, OSError) as e:
        parser.error(str(e))
    with launch.service(parsed.bundle, parsed.workers) as server:
        due_s = poisson(parsed.rate, WARM_S + SAMPLED_S + AFTER_S, seed=1)
        generator = Generator(Attack(server.port, bodies, due_s))
        time.sleep(WARM_S)
        record(server.process.pid, parsed.out)
        names = {pid: f"worker {number}" for number, pid in server.workers().items()}
        names[server.process.pid] = f"service, {parsed.rate:g} requests a second"
        generator.result()
    parsed.out.write_text(named(parsed.out.read_text(), names))
    print(f"flame graph of {SAMPLED_S:g} s in {parsed.out}")
    return 0


def record(pid: int, out: Path) -> None:
    """Write the flame graph of this process and its descendants. Raises SystemExit where py-spy can't."""
    spy = Path(sysconfig.get_path("scripts")) / "py-spy"
    if not spy.exists():
        raise SystemExit("py-spy isn't installed: `make flame` installs it")
    how = ["--subprocesses", "--rate", str(SAMPLES_PER_S), "--duration", f"{SAMPLED_S:g}", "--output", str(out)]
    done = subprocess.run([spy, "record", "--pid", str(pid), *how], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"py-spy: {done.stderr.strip()}")


def named(svg: str, names: Mapping[int, str]) -> str:
    """The drawing with processes named: those in `names`, and what workers are forked from."""

    def renamed(cell: re.Match[str]) -> str:
        name, shown = cell["name"], cell["shown"]
        if process := re.match(r"process (\d+):", name):
            name = names.get(int(process[1]), "server of forks")
        elif name.startswith(" main("):  # the second line of a command
            name = "forked"
        shown = shown if name == cell["name"] else name if len(name) <= len(shown) else ""
        return f"<g><title>{name} {cell['share']}</title>{cell['box']}<text {cell['at']}>{shown}</text></g>"

    return TITLE.sub(r"\1Where time goes", CELL.sub(renamed, svg))
