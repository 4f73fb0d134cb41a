"""Timeouts of 10, 20, 50 and 100 ms: how late the latest answers are, what was covered, and what it cost.

Every run of the service is followed by one of a server that does nothing, under the same load (A B A B). A pair
counts only when that server's own p99.9 stays under 2 ms: else the machine or the generator was late, and says
nothing of the service. The cost is agreement (NDCG) with the full funnel's own answer to the same request; more
time must not make it worse, by a paired bootstrap over requests.
"""

from collections.abc import Iterator

import numpy as np

from loadtest import launch
from loadtest.agreement import Floats, by_request, ndcg, paired_step
from loadtest.arrivals import poisson
from loadtest.faults.lab import Lab, failed, row
from loadtest.launch import Server
from loadtest.observed import Observed, joined
from loadtest.table import Figure, Row

TIMEOUTS_MS = (10, 20, 50, 100)
REQUESTS, PARTS = 20_000, 2  # for each timeout, in so many runs
QUICK = 200  # in each run of a quick one
MOST_PAIRS = 6  # tried for each timeout
MOST_LATE_MS, CALM_MS = 5.0, 2.0


def deadlines(lab: Lab) -> Iterator[Row]:
    """A row for each timeout, and one for the steps between them."""
    _, full = lab.references(lab.bundle)
    agreements: list[Floats] = []
    with lab.service() as server:
        answer_size = len(server.call("POST", "/v1/rank", lab.bodies[0])[1])
        with launch.noop(answer_size) as control:
            for timeout_ms in TIMEOUTS_MS:
                runs, n_calm, control_ms = _pairs(lab, server, control, timeout_ms)
                seen = joined(runs)
                ok = np.flatnonzero(seen.is_ok)
                each = np.array([_agreement(seen, i, full[seen.body[i]].ids) for i in ok.tolist()])
                agreements.append(by_request(seen.body[ok], each, len(lab.bodies)))
                yield row(
                    f"timeout {timeout_ms} ms",
                    seen,
                    Figure("requests in calm runs", float(n_calm), least=1 if lab.is_quick else REQUESTS),
                    Figure(
                        "p99.9 after the timeout",
                        seen.percentile_s(99.9) * 1e3 - timeout_ms,
                        most=MOST_LATE_MS,
                        unit="ms",
                    ),
                    Figure("the control's p99.9", control_ms, most=CALM_MS, unit="ms"),
                    Figure("agreement with the full funnel, NDCG", float(each.mean())),
                    failed(seen),
                )
    yield Row("more time", tuple(_steps(agreements)))


def _pairs(lab: Lab, server: Server, control: Server, timeout_ms: int) -> tuple[list[Observed], int, float]:
    """The service's runs whose control was calm, how many requests these were, and the worst p99.9 of the controls.

    Where none was calm, what was seen all the same: the bar is missed, but coverage and agreement can be read.
    """
    n, bodies = QUICK if lab.is_quick else REQUESTS // PARTS, lab.bodies_with(timeout_ms=timeout_ms)
    runs, calm, wild, wild_runs = [], [0.0], [], []
    for attempt in range(MOST_PAIRS):
        due_s = poisson(lab.half, 1.1 * n / lab.half, seed=attempt)[:n]
        seen = lab.attack(server, due_s, bodies)
        control_ms = lab.attack(control, due_s, bodies).percentile_s(99.9) * 1e3
        lab.say(f"  {timeout_ms} ms: p99.9 {seen.percentile_s(99.9) * 1e3:.1f} ms, control {control_ms:.2f} ms")
        if control_ms < CALM_MS:
            runs.append(seen)
            calm.append(control_ms)
        else:
            wild.append(control_ms)
            wild_runs.append(seen)
        if len(runs) == PARTS:
            break
    return runs or wild_runs, sum(map(len, runs)), max(calm) if runs else min(wild)


def _agreement(seen: Observed, i: int, full: tuple[int | str, ...]) -> float:
    return ndcg(seen.ids[i], full[: len(seen.ids[i])])


def _steps(agreements: list[Floats]) -> Iterator[Figure]:
    """For each step up in time the mean change of agreement; the end of its interval mustn't be below 0."""
    pairs = zip(TIMEOUTS_MS, TIMEOUTS_MS[1:], agreements, agreements[1:], strict=False)
    for shorter, longer, before, after in pairs:
        mean, low, high = paired_step(before, after)
        step = f"change of agreement from {shorter} to {longer} ms"
        yield Figure(step, mean)
        yield Figure(f"{step}, lower end of 95 %", low)
        yield Figure(f"{step}, upper end of 95 %", high, least=0)
