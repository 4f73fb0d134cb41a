"""What a generator has done so far, in memory that it shares: it counts, anybody reads, nobody waits for anybody.

Single counts are exact, though not all of one moment; percentiles are within 5 %. What is measured is observed.py's,
from every request, when all is over.
"""

import math
from multiprocessing import get_context
from typing import Any

import numpy as np

SHORTEST_S, GROWTH = 1e-4, 1.05  # buckets 5 % apart from 0.1 ms on
N_BUCKETS = 288  # up to two minutes
SENT, ANSWERED, FAILED, MOST_OPEN, BUCKETS = range(5)  # where what stands; the buckets to the end


class Tally:
    """Counts of one run. The process that sends calls `sent` and `ended`."""

    def __init__(self, cells: Any = None) -> None:
        """cells: shared with another process, from `shared()`; without, this process's own."""
        self.cells = [0] * (BUCKETS + N_BUCKETS) if cells is None else cells

    @classmethod
    def shared(cls) -> "Tally":
        """With cells that a spawned process can be given."""
        return cls(get_context("spawn").RawArray("q", BUCKETS + N_BUCKETS))

    def sent(self) -> None:
        cells = self.cells
        cells[SENT] += 1
        n_open = cells[SENT] - cells[ANSWERED] - cells[FAILED]
        if n_open > cells[MOST_OPEN]:
            cells[MOST_OPEN] = n_open

    def ended(self, latency_s: float, is_ok: bool) -> None:
        """is_ok: with a 200; only then its latency counts."""
        self.cells[ANSWERED if is_ok else FAILED] += 1
        if is_ok:
            bucket = int(math.log(max(latency_s, SHORTEST_S) / SHORTEST_S) / math.log(GROWTH))
            self.cells[BUCKETS + min(bucket, N_BUCKETS - 1)] += 1

    def counts(self) -> tuple[int, int, int]:
        """Sent, answered with 200, ended otherwise."""
        return self.cells[SENT], self.cells[ANSWERED], self.cells[FAILED]

    @property
    def most_open(self) -> int:
        """Requests in flight at once, at most."""
        return int(self.cells[MOST_OPEN])

    def percentile_s(self, p: float) -> float:
        """The p-th percentile of latency so far, the middle of its bucket; NaN for none."""
        counts = np.array(self.cells[BUCKETS:], np.int64)
        if not counts.sum():
            return math.nan
        bucket = int(np.searchsorted(np.cumsum(counts), p / 100 * counts.sum()))
        return SHORTEST_S * GROWTH ** (bucket + 0.5)
