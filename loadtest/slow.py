"""python -m loadtest.slow PID SHARE: let a process run this share of the time, until it or we end.

A stand-in for a core that is stolen or throttled: it is stopped and continued by signals in periods of 20 ms. On
SIGTERM it is left running.
"""

import contextlib
import os
import signal
import sys
import time

PERIOD_S = 0.02


def slow(pid: int, share: float) -> None:
    """Returns when the process is gone; raises SystemExit on SIGTERM after continuing it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        with contextlib.suppress(ProcessLookupError):
            while True:
                os.kill(pid, signal.SIGCONT)
                time.sleep(PERIOD_S * share)
                os.kill(pid, signal.SIGSTOP)
                time.sleep(PERIOD_S * (1 - share))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


if __name__ == "__main__":
    slow(int(sys.argv[1]), float(sys.argv[2]))
