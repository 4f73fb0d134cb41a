"""What a hypervisor took: time in which a core of this machine had work and was given to somebody else.

Linux counts it in ticks, as `steal` in /proc/stat (proc(5)); it is 0 without a hypervisor, or where that doesn't say.
Such a stall is in every latency that it falls into, and neither the service's nor the load's.
"""

import os
from pathlib import Path

STEAL = 8  # the column, after the row's name


def stolen_s(stat: str | None = None) -> float:
    """Seconds so far, of all cores together.

    stat: as /proc/stat is written; None reads it.
    """
    try:
        row = (Path("/proc/stat").read_text() if stat is None else stat).splitlines()[0].split()
        return int(row[STEAL]) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):
        return 0.0
