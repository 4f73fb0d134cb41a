"""Searches over open-loop runs: the highest rate that holds, and a ramp to the peak of goodput.

What a run is, and what "holds" means, are arguments: here is only the way through the rates.
"""

from collections.abc import Callable

import numpy as np

GROWTH = 1.5  # of the rate, until it doesn't hold
NEARBY = 1.15  # the same where the start is the outcome of another search
MOST_RUNS = 40
TRIES = 2  # at a rate, before it fails


def highest_rate(
    holds: Callable[[float], bool],
    start: float,
    *,
    within: float = 0.05,
    tries: int = TRIES,
    least: float = 2,
    growth: float = GROWTH,
) -> float:
    """The highest rate a second that holds, to a relative `within`; 0 if none from `least` up does.

    From `start` up (or down) by `growth` until one holds and one doesn't, then bisection between them, in ratio. A rate
    fails only when it fails `tries` times: a busy neighbour must not end the search.
    """
    runs = 0

    def holds_once(rate: float) -> bool:
        nonlocal runs
        for _ in range(tries):
            runs += 1
            if runs > MOST_RUNS:
                raise RuntimeError(f"no end of the search after {MOST_RUNS} runs, at {rate:.1f} a second")
            if holds(rate):
                return True
        return False

    low = high = start
    if holds_once(start):
        while holds_once(high := high * growth):
            low = high
    else:
        while not holds_once(low := low / growth):
            high = low
            if low / growth < least:
                return 0.0
    while high / low > 1 + within:
        middle = float(np.sqrt(low * high))
        low, high = (middle, high) if holds_once(middle) else (low, middle)
    return low


def peak(
    measure: Callable[[float], float], start: float, *, growth: float = 1.3, most: int = 12
) -> tuple[float, float]:
    """The highest goodput that any rate of a ramp gave, and that rate; ends when two in turn gave less."""
    best, best_rate, worse, rate = 0.0, start, 0, start
    for _ in range(most):
        got = measure(rate)
        worse = 0 if got > best * 1.02 else worse + 1
        if got > best:
            best, best_rate = got, rate
        if worse == 2:
            break
        rate *= growth
    return best, best_rate
