"""python -m loadtest.plan.speed: how fast the machine is now, by a fixed piece of work on all cores at once.

Machines that are shared or throttled change their speed by half within minutes; a prediction is for the speed that the
calibration met. A probe before and after each run, while the service is idle, says how much faster or slower it was.
The work is the service's kind: a product of matrices, scattered reads of a large table, Python. Its wall time counts,
since a stolen core is slow as well.
"""

import contextlib
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent.parent
PIECES = 25  # a probe: about 0.1 s
ROWS, D, HIDDEN = 128, 224, 512  # a slice of re-ranking's first layer
TABLE, GATHERED = 1 << 18, 2_000  # rows of D / 4 float32, 59 MB: more than caches hold
PYTHON = 8_000  # turns of a loop
PATIENCE_S = 60.0
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # as the service's workers


@dataclass(frozen=True, slots=True)
class Probe:
    """Processes that wait to be asked, one a core."""

    processes: "tuple[subprocess.Popen[bytes], ...]"

    def __call__(self) -> float:
        """Seconds that the fixed work takes now: the median piece of each core, mean over the cores."""
        for process in self.processes:
            if process.stdin:
                os.write(process.stdin.fileno(), b"\n")
        return float(np.mean([_answer(process) for process in self.processes]))


@contextlib.contextmanager
def probing(cores: int | None = None) -> Iterator[Probe]:
    """A probe for the length of the block, warm."""
    with contextlib.ExitStack() as stack:
        processes = []
        for _ in range(cores or os.cpu_count() or 1):
            process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                cwd=ROOT,
                env=os.environ | ONE_THREAD,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            stack.enter_context(process)  # closes its pipes, and waits for it
            stack.callback(process.kill)
            processes.append(process)
        probe = Probe(tuple(processes))
        probe()
        yield probe


def _answer(process: "subprocess.Popen[bytes]") -> float:
    """Raises RuntimeError when it has none."""
    out = process.stdout
    line = out.readline() if out and select.select([out], [], [], PATIENCE_S)[0] else b""
    if not line:
        raise RuntimeError(f"a speed probe said nothing (its end: {process.poll()})")
    return float(line)


def work() -> None:
    """Answer each line that comes with seconds, to the end of input."""
    rng = np.random.default_rng(0)
    rows, weights = rng.random((ROWS, D), np.float32), rng.random((D, HIDDEN), np.float32)
    table, at = rng.random((TABLE, D // 4), np.float32), rng.integers(0, TABLE, (PIECES, GATHERED))

    def piece(number: int) -> float:
        began, total = time.perf_counter(), 0
        rows @ weights
        table[at[number]].sum()
        for turn in range(PYTHON):
            total += turn * turn
        return time.perf_counter() - began

    for _ in sys.stdin:
        print(float(np.median([piece(number) for number in range(PIECES)])), flush=True)


if __name__ == "__main__":
    work()
