"""CPU seconds of a process and all below it, by process and by thread, as Linux counts them in /proc.

It counts; who is a worker and who the event loop is said by whoever asks. The kernel counts in ticks of 10 ms, a
thread's apart from its process's: over some seconds of CPU that is nothing, over less it shows.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TICK_S = 1 / os.sysconf("SC_CLK_TCK")
PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Used:
    """CPU seconds so far, user and system.

    processes: by process id and start, with threads that have ended. threads: by the same and thread id, with the name
    that the system knows.
    """

    processes: dict[tuple[int, int], float]
    threads: dict[tuple[int, int, int], tuple[str, float]]


@dataclass(frozen=True, slots=True)
class Spent:
    """CPU seconds between two looks: by process id; by process id, thread id and name."""

    processes: dict[int, float]
    threads: dict[tuple[int, int, str], float]

    @property
    def total_s(self) -> float:
        return sum(self.processes.values())


def used(root: int) -> Used:
    """By this process and all that descend from it. Raises RuntimeError if there is no such process."""
    processes: dict[tuple[int, int], float] = {}
    threads: dict[tuple[int, int, int], tuple[str, float]] = {}
    for pid in tree(root):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            name, _, started, seconds = _read(PROC / str(pid))
            processes[pid, started] = seconds
            for task in (PROC / str(pid) / "task").iterdir():
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    name, _, _, seconds = _read(task)
                    threads[pid, started, int(task.name)] = name, seconds
    return Used(processes, threads)


def spent(before: Used, after: Used) -> Spent:
    """Between the two. What is new counts from its start; RuntimeError if a process is gone, and its CPU with it."""
    if gone := before.processes.keys() - after.processes.keys():
        raise RuntimeError(f"processes ended while they were measured: {sorted(pid for pid, _ in gone)}")
    processes = {key[0]: s - before.processes.get(key, 0.0) for key, s in after.processes.items()}
    threads = {
        (pid, tid, name): s - before.threads.get((pid, started, tid), ("", 0.0))[1]
        for (pid, started, tid), (name, s) in after.threads.items()
    }
    return Spent(processes, threads)


def tree(root: int) -> list[int]:
    """The process and all that descend from it. Raises RuntimeError if there is none."""
    children: dict[int, list[int]] = {}
    for pid, parent in _parents():
        children.setdefault(parent, []).append(pid)
    if not (PROC / str(root)).exists():
        raise RuntimeError(f"there is no process {root}")
    found = [root]
    for pid in found:  # grows while it is walked
        found.extend(children.get(pid, ()))
    return found


def _parents() -> Iterator[tuple[int, int]]:
    for folder in PROC.iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                yield int(folder.name), _read(folder)[1]


def _read(folder: Path) -> tuple[str, int, int, float]:
    """Name, parent, start in ticks since boot, CPU seconds; of a process or a thread."""
    head, _, tail = (folder / "stat").read_text().rpartition(")")  # a name may hold spaces and brackets
    fields = tail.split()  # from field 3 of proc(5) on
    return head.partition("(")[2], int(fields[1]), int(fields[19]), (int(fields[11]) + int(fields[12])) * TICK_S
