"""python -m loadtest attack       open-loop load on a service, kept as JSON and as a page to look at
python -m loadtest compare      two such runs together
python -m loadtest report       the page of one, drawn again
python -m loadtest search       the highest rate that a service holds
python -m loadtest faults       break the running service in every way we know, and print what came of it
python -m loadtest limits       the raw kernels in a bare loop, and what the service costs over them
python -m loadtest flame        where its processes spend their time under load, as a flame graph
python -m loadtest plan         how many workers, machines and money a load takes
python -m loadtest capacity     what `plan` predicts against what the service does

Exit codes: 0, 1 when a bar is missed, 2 for what can't be used. Progress goes to standard error, the tables and the
one line of JSON to standard output.
"""

import argparse
import os
import signal
import sys
from importlib import import_module
from typing import NoReturn

# command → its module, which has add_arguments(parser) and run(parser, parsed) → exit code; what its help says
COMMANDS = {
    "attack": ("loadtest.lab.attack", "open-loop load, a report"),
    "compare": ("loadtest.lab.compare", "two runs together"),
    "report": ("loadtest.lab.redraw", "the page of a kept run"),
    "search": ("loadtest.lab.search", "the highest rate that a service holds"),
    "faults": ("loadtest.faults.command", "the fault table"),
    "limits": ("loadtest.limits.command", "the service over the raw kernels: the performance figure"),
    "flame": ("loadtest.flame", "a flame graph of the service under load"),
    "plan": ("loadtest.plan.command", "workers, machines, memory, money for a load"),
    "capacity": ("loadtest.plan.bench", "the planner against measurements"),
}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage, which is longer than a screen, is for --help."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = Parser(
        prog="python -m loadtest", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    runs = {}
    for name, (module, what) in COMMANDS.items():
        command = commands.add_parser(name, help=what)
        try:
            loaded = import_module(module)
        except ModuleNotFoundError as e:
            parser.error(f"{e.name} isn't installed: `make install` installs what load tests need")
        loaded.add_arguments(command)
        runs[name] = command, loaded.run
    parsed = parser.parse_args(arguments)
    command, run = runs[parsed.command]
    try:
        return int(run(command, parsed))
    except KeyboardInterrupt:
        return 130  # as a shell says it
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers and generators are ended too
    sys.exit(main())
