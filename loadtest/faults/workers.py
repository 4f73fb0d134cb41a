"""Faults of workers: killed again and again, stopped, slowed, all killed at once; and no fault, to compare with.

Workers are found through the admin port and harmed by signals to their pids. A worker is back when another pid
is listed under its number.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np

from loadtest.arrivals import poisson
from loadtest.capacity import RECOVERY_S
from loadtest.faults.lab import Lab, coverage, failed, p99, row, sleep_until
from loadtest.launch import ROOT, Server, stop, wait_for
from loadtest.table import Figure, Row

HARM_AT_S = 5.0
KILL_EVERY_S = 5.0
MOST_RECOVERY_S = 2.0
MOST_EXTRA = 0.05


def none(lab: Lab) -> Iterator[Row]:
    """Half of the capacity, and nothing wrong."""
    with lab.service() as server:
        seen = lab.attack(server, poisson(lab.half, lab.seconds(30)))
        yield row("none", seen, failed(seen), p99(seen), coverage(seen, 0.95))


def killed(lab: Lab) -> Iterator[Row]:
    """SIGKILL to one worker after the other, every 5 s for a minute."""
    seconds, back_s = lab.seconds(60), [0.0]
    with lab.service() as server, lab.load(server, poisson(lab.half, seconds)) as generator:
        for turn, at_s in enumerate(np.arange(1.0, seconds, KILL_EVERY_S)):
            sleep_until(generator, at_s)
            alive = list(server.workers().items())
            number, pid = alive[turn % len(alive)]
            os.kill(pid, signal.SIGKILL)
            back_s.append(_replaced_after(server, {number: pid}))
        seen = generator.result()
        slowest = Figure("slowest replacement", max(back_s), most=MOST_RECOVERY_S, unit="s")
        yield row("kill", seen, failed(seen), p99(seen), coverage(seen, 0.95), slowest, recovery_s=max(back_s))


def stopped(lab: Lab) -> Iterator[Row]:
    """SIGSTOP to one worker: it is there and does nothing."""
    with lab.service() as server, lab.load(server, poisson(lab.half, lab.seconds(30))) as generator:
        sleep_until(generator, HARM_AT_S / 2)
        number, pid = next(iter(server.workers().items()))
        at_s = time.monotonic() - generator.started_at
        os.kill(pid, signal.SIGSTOP)
        try:
            back_s = _replaced_after(server, {number: pid})
            seen = generator.result()
        finally:
            _release(pid)
        yield row("stop", seen, failed(seen), p99(seen), coverage(seen, 0.95, round(at_s + 1, 1)), recovery_s=back_s)


def slowed(lab: Lab) -> Iterator[Row]:
    """One worker gets a tenth of its time; if it is replaced, the next one is slowed too."""
    seconds = lab.seconds(30)
    with lab.service() as server:
        number = next(iter(server.workers()))
        before = _rows_scored(server)
        with lab.load(server, poisson(lab.half, seconds)) as generator, contextlib.ExitStack() as slowing:
            pid, end_s = 0, generator.started_at + seconds
            while time.monotonic() < end_s:
                now = server.workers().get(number, pid)
                if now != pid:
                    pid = now
                    helper = subprocess.Popen([sys.executable, "-m", "loadtest.slow", str(pid), "0.1"], cwd=ROOT)
                    slowing.callback(stop, helper)
                time.sleep(0.25)
            seen = generator.result()
        first, again = (after - was for after, was in zip(_rows_scored(server), before, strict=True))
        extra = Figure("rows scored twice over rows", again / first if first else 0.0, most=MOST_EXTRA)
        yield row("slow", seen, failed(seen), p99(seen), coverage(seen, 0.85), extra)


def all_killed(lab: Lab) -> Iterator[Row]:
    """SIGKILL to every worker at once: pre-rank answers until they are back."""
    with lab.service() as server, lab.load(server, poisson(lab.half, lab.seconds(20))) as generator:
        sleep_until(generator, HARM_AT_S / 2)
        pids = server.workers()
        at_s = time.monotonic() - generator.started_at
        for pid in pids.values():
            os.kill(pid, signal.SIGKILL)
        back_s = _replaced_after(server, pids)
        seen = generator.result()
        # The first moments may still have answers whose shards were done; the last may have workers again.
        meanwhile = (seen.due_s > at_s + 0.05) & (seen.due_s < at_s + back_s / 2) & seen.is_ok
        share = float(seen.is_degraded[meanwhile].mean()) if meanwhile.any() else 1.0
        said = Figure("degraded, of the answers without workers", share, least=1)
        back = Figure("all replaced after", back_s, unit="s")
        yield row("kill-all", seen, failed(seen), p99(seen), said, back, recovery_s=back_s)


def _replaced_after(server: Server, gone: dict[str, int]) -> float:
    """Seconds until each of these numbers has another pid."""

    def are_back() -> bool:
        now = server.workers()
        return all(now.get(number, pid) != pid for number, pid in gone.items())

    return wait_for(are_back, RECOVERY_S, f"workers {', '.join(gone)} to be replaced")


def _rows_scored(server: Server) -> tuple[float, float]:
    """Rows scored the first time, and as hedges."""
    return tuple(server.metric("winnow_rows_total", work=work) for work in ("first", "hedge"))  # type: ignore[return-value]


def _release(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
