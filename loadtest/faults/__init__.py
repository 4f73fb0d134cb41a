"""`python -m loadtest faults`: the rows, in the order they are measured.

A row is a function over the lab that starts its own service, sends open-loop load, does its harm meanwhile and
yields what came of it with its bars. A row that can't be measured is a missed bar, not the end of the run.

    lab.py         the bundle, the requests, the capacity, what all rows share
    workers.py     killed, stopped, slowed
    overload.py    more than it can do
    bundles.py     swaps and corrupt offers
    clients.py     clients that misbehave, the stop signal, the full disk
    deadlines.py   timeouts and what they cost
    answers.py     expected loss, the same list everywhere, the paced re-ranker
"""

from collections.abc import Callable, Iterable, Iterator

from loadtest.faults import answers, bundles, clients, deadlines, overload, workers
from loadtest.faults.lab import Lab
from loadtest.table import Row, broken

ROWS: dict[str, Callable[[Lab], Iterator[Row]]] = {
    "none": workers.none,
    "kill": workers.killed,
    "stop": workers.stopped,
    "slow": workers.slowed,
    "kill-all": workers.all_killed,
    "load-1.5": overload.half_more,
    "load-2": overload.twice,
    "overload": overload.on_the_bundle,
    "overload-paced": overload.paced,
    "swaps": bundles.swaps,
    "corrupt": bundles.corrupt,
    "sigterm": clients.stop_signal,
    "slow-readers": clients.slow_readers,
    "silent": clients.silent,
    "slow-senders": clients.slow_senders,
    "leavers": clients.leavers,
    "full-disk": clients.full_disk,
    "paced": answers.paced,
    "same": answers.same,
    "loss": answers.losses,
    "deadlines": deadlines.deadlines,
}


def measure(lab: Lab, names: Iterable[str]) -> list[Row]:
    """The rows of these names; what can't be measured is in them as a missed bar."""
    rows: list[Row] = []
    for name in names:
        lab.say(f"{name} …")
        try:
            for row in ROWS[name](lab):
                rows.append(row)
                for f in row.figures:
                    lab.say(f"  {row.fault}: {f.name} {f.shown}{f' (bar {f.bar})' if f.has_bar else ''}")
        except Exception as e:  # whatever it was: the other rows are still worth having
            lab.say(f"  {name} could not be measured: {type(e).__name__}: {e}")
            rows.append(broken(name, type(e).__name__))
    return rows
