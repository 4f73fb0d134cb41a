"""Progress of a run on a terminal: a line that is written over once a second; elsewhere a line every five.

It reads the generator's tally, and so costs the generator nothing. What it shows is of the whole run so far, rates
of the time since the line before.
"""

import time
from typing import TextIO

from loadtest.open_loop import Generator

TERMINAL_S, LOG_S = 1.0, 5.0
CLEAR = "\x1b[K"  # the rest of the line


def watch(generator: Generator, seconds: float, out: TextIO) -> None:
    """Returns when the generator has ended, well or not."""
    is_terminal = out.isatty()
    every_s = TERMINAL_S if is_terminal else LOG_S
    at, before = generator.started_at, (0, 0, 0)
    while not generator.has_ended(max(0.0, at + every_s - time.monotonic())):
        now, counts = time.monotonic(), generator.tally.counts()
        if now <= at:  # the first instant is still to come
            continue
        line = progress(
            generator,
            now - generator.started_at,
            seconds,
            [b - a for a, b in zip(before, counts, strict=True)],
            now - at,
        )
        print(f"\r{line}{CLEAR}" if is_terminal else line, end="" if is_terminal else "\n", file=out, flush=True)
        at, before = now, counts
    if is_terminal:
        print(file=out)


def progress(generator: Generator, at_s: float, seconds: float, since: list[int], since_s: float) -> str:
    """The line. since: sent, answered and failed in the last `since_s`."""
    tally = generator.tally
    sent, answered, failed = tally.counts()
    rates = f"sent {since[0] / since_s:6.0f}/s  answered {since[1] / since_s:6.0f}/s"
    so_far = f"errors {failed:,}  open {sent - answered - failed:,}"
    p50, p99 = (tally.percentile_s(p) * 1e3 for p in (50, 99))
    return f"{at_s:6.1f} of {seconds:.0f} s  {rates}  {so_far}  p50 {p50:.1f} ms  p99 {p99:.1f} ms"
