"""What the kernel knows of the service's processes: whose CPU it was, and whose memory. Reads /proc only."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loadtest.launch import Server
from loadtest.plan.calibration import Memory


@dataclass(frozen=True, slots=True)
class Spent:
    """CPU seconds so far: the event loop's thread, the workers."""

    loop: float
    workers: float

    def since(self, before: "Spent", n: int) -> "Spent":
        """A request's, of n since then."""
        return Spent((self.loop - before.loop) / n, (self.workers - before.workers) / n)


def spent(main: int, workers: Iterable[int]) -> Spent:
    """CPU so far, in nanoseconds' precision. Raises RuntimeError where it isn't to be had: says why."""
    try:
        of_workers = [sum(map(_cpu, Path(f"/proc/{pid}/task").iterdir())) for pid in workers]
    except FileNotFoundError as e:
        raise RuntimeError(f"a worker ended while its CPU was metered ({e.filename})") from e
    if not (loop := _cpu(Path(f"/proc/{main}/task/{main}"))):
        raise RuntimeError("/proc/…/schedstat: this kernel doesn't count, a calibration needs it")
    return Spent(loop, sum(of_workers))


def _cpu(task: Path) -> float:
    try:
        return int((task / "schedstat").read_text().split()[0]) / 1e9
    except (OSError, IndexError):  # a thread that has just ended
        return 0.0


def niceness(server: Server) -> int:
    """Of the workers, as the scheduler has it."""
    pid = next(iter(server.workers().values()))
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[16])


def read_memory(server: Server, bundle: Path) -> Memory:
    """What the service's processes hold: proportional shares, and what is each one's own."""
    workers = list(server.workers().values())
    own = {pid: smaps(pid, "Private_Dirty") for pid in (server.process.pid, *workers)}
    files = sum(entry["size"] for entry in json.loads((bundle / "manifest.json").read_text())["files"].values())
    return Memory(
        pss=sum(smaps(pid, "Pss") for pid in own),
        main_private=own[server.process.pid],
        worker_private=int(np.mean([own[pid] for pid in workers])),
        files=files,
        processes=len(own),
    )


def smaps(pid: int, name: str) -> int:
    """Bytes of one line of the sum over all maps."""
    for row in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if row.startswith(f"{name}:"):
            return 1024 * int(row.split()[1])
    return 0
