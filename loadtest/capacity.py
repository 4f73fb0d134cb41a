"""The capacity of a running service: the highest rate at which it is quick, and gives nothing up.

It owns what that means: p99 of Poisson arrivals within 50 ms, all answered, quality 1 when a run begins and a mean
coverage of .99 over it. The way through the rates is search.py's.
"""

from collections.abc import Callable

from loadtest import launch, search
from loadtest.arrivals import poisson
from loadtest.launch import Server
from loadtest.observed import Floats, Observed

EASY_S = 0.05  # p99 at the capacity
LEAST_COVERAGE, LEAST_ANSWERED = 0.99, 0.999
FIRST_GUESS = 50.0  # a second
RECOVERY_S = 30.0  # to wait for a recovery before giving up on it


def find(
    server: Server,
    attack: Callable[[Floats], Observed],
    seconds: float,
    say: Callable[[str], None],
    *,
    within: float = 0.05,
    before: Callable[[], None] = lambda: None,
) -> float:
    """Requests a second, to a relative `within`. `attack` sends at such instants; `before` is called before each run.

    Raises: RuntimeError when there is no such rate.
    """

    def holds(rate: float) -> bool:
        settle(server)
        before()
        seen = attack(poisson(rate, seconds))
        p99_s = seen.percentile_s(99)
        say(f"  {rate:.0f}/s: p99 {p99_s * 1e3:.1f} ms, coverage {covered(seen):.3f}")
        return is_whole(seen) and p99_s <= EASY_S

    rate = search.highest_rate(holds, FIRST_GUESS, within=within)
    if not rate:
        raise RuntimeError("no rate has p99 <= 50 ms at the whole width")
    say(f"  capacity: {rate:.0f} a second")
    return rate


def is_whole(seen: Observed) -> bool:
    """Nearly everything was answered, and at nearly the whole width."""
    return bool(seen.is_ok.mean() >= LEAST_ANSWERED and covered(seen) >= LEAST_COVERAGE)


def covered(seen: Observed) -> float:
    """Mean coverage of what was answered, 0 if nothing was."""
    return float(seen.coverage[seen.is_ok].mean()) if seen.is_ok.any() else 0.0


def settle(server: Server) -> float:
    """Wait until the service runs at full quality; the seconds it took."""
    return launch.wait_for(lambda: server.metric("winnow_quality") >= 1, RECOVERY_S, "full quality")
