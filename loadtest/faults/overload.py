"""More load than the service can answer at its full width: quality falls first, then it refuses, then it recovers.

The capacity at quality's floor is the peak goodput of a ramp (answers within the SLA a second), since at the peak
the funnel is as narrow as it gets. The best of ten short steps is more than the machine holds: the rate that gave it is
run again right before and after the overload, and their mean is what the overload is compared with. The paced service
waits instead of computing, and so leaves the CPU to the generator.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from loadtest import search
from loadtest.arrivals import constant, poisson
from loadtest.capacity import settle
from loadtest.faults.lab import SLA_S, Lab, failed, p99, row, sleep_until
from loadtest.observed import Observed
from loadtest.table import Figure, Row

OVERLOAD, OVERLOAD_S = 3.0, 20.0
STEP_S, WARM_S = 6.0, 2.0  # of a step of the ramp, and what isn't counted of it
MOST_RECOVERY_S = 2.0
AROUND = 2  # steps at the peak's rate right before and right after the overload, which it is compared with
AFTER = 100  # answers after the recovery that must be whole
PACED_ROW_MS, PACED_WORKERS = 0.25, 4  # 500 rows are 31 ms, and 32 requests a second are all there is at full width


def half_more(lab: Lab) -> Iterator[Row]:
    """1.5 times the capacity: nobody is refused, quality falls instead."""
    with lab.service() as server:
        seen = lab.attack(server, poisson(1.5 * lab.full_rate, lab.seconds(OVERLOAD_S)))
        refused = Figure("refused", float((seen.status == 503).sum()), most=0)
        yield row("1.5 x the capacity", seen, refused, failed(seen), p99(seen))


def twice(lab: Lab) -> Iterator[Row]:
    """Twice the capacity: nearly all that were sent are answered in time."""
    seconds = lab.seconds(OVERLOAD_S)
    with lab.service() as server:
        seen = lab.attack(server, poisson(2 * lab.full_rate, seconds))
        share = goodput(seen, seconds) * seconds / len(seen)
        yield row("2 x the capacity", seen, Figure("answered within the SLA", share, least=0.9))


def on_the_bundle(lab: Lab) -> Iterator[Row]:
    """Three times the capacity at quality's floor, on the bundle itself."""
    yield _overload(lab, "overload", lab.full_rate, 0.75, lab.workers)


def paced(lab: Lab) -> Iterator[Row]:
    """The same where the re-ranker waits instead of computing."""
    most = PACED_WORKERS / (PACED_ROW_MS / 1e3) / 500
    yield _overload(lab, "overload, paced", most, 0.9, PACED_WORKERS, PACED_ROW_MS=PACED_ROW_MS)


def goodput(seen: Observed, seconds: float, after_s: float = 0.0) -> float:
    """Answers within the SLA a second, of what was due from `after_s` on."""
    good = seen.is_ok & (seen.latency_s <= SLA_S) & (seen.due_s >= after_s)
    return float(good.sum()) / (seconds - after_s)


def _overload(lab: Lab, fault: str, start: float, least: float, workers: int, **settings: Any) -> Row:
    with lab.service(workers=workers, **settings) as server:

        def measure(rate: float) -> float:
            seen = lab.attack(server, poisson(rate, STEP_S))
            got = goodput(seen, STEP_S, WARM_S)
            lab.say(f"  {rate:.0f}/s: {got:.0f}/s in time, coverage {np.nanmean(seen.coverage):.2f}")
            return got

        peak, rate = search.peak(measure, start)
        if not peak:
            raise RuntimeError("no rate of the ramp was answered in time")
        around = [measure(rate) for _ in range(AROUND)]
        settle(server)
        seconds = lab.seconds(OVERLOAD_S)
        with lab.load(server, poisson(OVERLOAD * peak, seconds)) as generator:
            sleep_until(generator, seconds)
            recovery_s = settle(server)
            seen = generator.result()
        after = lab.attack(server, constant(min(lab.half, start / 2), AFTER / min(lab.half, start / 2)))
        around += [measure(rate) for _ in range(AROUND)]
    refused, ok = seen.status == 503, seen.is_ok
    figures = (
        Figure("peak goodput of the ramp", peak, unit="/s"),
        Figure("the same rate again, before and after", float(np.mean(around)), unit="/s"),
        Figure("goodput over its peak", goodput(seen, seconds) / float(np.mean(around)), least=least),
        Figure("in time, of the accepted", float((seen.latency_s[ok] <= SLA_S).mean()), least=0.99),
        Figure("neither answered nor refused", float((~ok & ~refused).sum()), most=0),
        Figure("refused", float(refused.sum())),
        Figure("p99 of refusals", seen.percentile_s(99, refused) * 1e3, most=10, unit="ms"),
        Figure("refusals with Retry-After", float((seen.retry_after[refused] >= 0).mean()), least=1),
        Figure("full quality after", recovery_s, most=MOST_RECOVERY_S, unit="s"),
        Figure(f"degraded or failed, of the next {AFTER}", float((after.is_degraded | ~after.is_ok).sum()), most=0),
    )
    return row(fault, seen, *figures, recovery_s=recovery_s)
