"""The bodies of answers in a file without a name: a long run keeps no more in memory than a short one.

It is written while the run goes on, a copy into the system's cache a body, and read once it is over.
"""

import os
import tempfile

import numpy as np


class Spool:
    """As much of a list of n bodies as a run needs: set each once, in any order; b"" where nothing was set."""

    def __init__(self, n: int) -> None:
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115, closed by close()
        self._at = np.zeros((n, 2), np.int64)
        self._end = 0

    def __len__(self) -> int:
        return len(self._at)

    def __setitem__(self, i: int, body: bytes) -> None:
        self._at[i] = self._end, len(body)
        self._end += self._file.write(body)

    def __getitem__(self, i: int) -> bytes:
        start, size = self._at[i].tolist()
        return os.pread(self._file.fileno(), size, start)

    def close(self) -> None:
        self._file.close()
