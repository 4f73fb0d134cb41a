"""What answers say: the loss they expect of themselves, the same list whoever scores it, and how shards divide time.

Losses are measured against the full funnel's own answer to the same request (agreement.py).
"""

import json
import os
import signal
from collections import defaultdict
from collections.abc import Iterator
from http import HTTPStatus

import numpy as np

from loadtest.agreement import Reference, differs, loss
from loadtest.arrivals import constant, poisson
from loadtest.capacity import settle
from loadtest.faults.lab import SLA_S, UNHURRIED_MS, Lab, failed, row, sleep_until
from loadtest.launch import Server
from loadtest.observed import Observed
from loadtest.table import Figure, Row, summary

FIFTHS = 5  # of coverage
ENOUGH = 500  # answers in a cell before its means are compared
MOST_GAP = 0.01
WORKER_COUNTS = (1, 2, 4, 8)
SAME, TOLERANCE = 100, 1e-5  # requests compared; distance of scores
PACED_ROW_MS, PACED_DOCUMENTS = 1.0, 500

# ---------------------------------------------------------------------------------------- the paced re-ranker


def paced(lab: Lab) -> Iterator[Row]:
    """1 ms a document, as an accelerator's latency would be: it waits and uses no CPU.

    Requests come evenly: by chance two would meet and wait for one another. One worker gets one a second, since two
    of half a second each would be all it can do.
    """
    for workers, rate, low_ms, high_ms in ((5, 2.0, None, 105.0), (1, 1.0, 475.0, 575.0)):
        bodies = lab.bodies_with(timeout_ms=1_000)
        with lab.service(workers=workers, PACED_ROW_MS=PACED_ROW_MS) as server:
            seen = lab.attack(server, constant(rate, lab.seconds(60)), bodies)
        p50 = Figure("p50", seen.percentile_s(50) * 1e3, least=low_ms, most=high_ms, unit="ms")
        documents = Figure("documents re-ranked", float(seen.reranked.min()), least=PACED_DOCUMENTS)
        yield row(
            f"paced, {workers} workers" if workers > 1 else "paced, one worker", seen, p50, documents, failed(seen)
        )


# --------------------------------------------------------------------------------------------- the same list


def same(lab: Lab) -> Iterator[Row]:
    """The same requests under 1, 2, 4, 8 workers, idle and loaded: the list of one idle worker."""
    _, full = lab.references(lab.bundle)
    n = min(SAME, len(full))
    for workers in WORKER_COUNTS:
        with lab.service(workers=workers) as server:
            idle = _compared(lab, server, full)
            seconds = lab.seconds(30)
            with lab.load(server, poisson(lab.half, seconds)) as generator:
                sleep_until(generator, 0)
                loaded = _compared(lab, server, full)
                seen = generator.result()
        figures = []
        for name, (different, whole) in (("idle", idle), ("loaded", loaded)):
            figures.append(Figure(f"lists that differ, {name}", float(different), most=0))
            figures.append(Figure(f"whole answers compared, {name}", float(whole), least=n if name == "idle" else 1))
        yield Row(f"same list, {workers} workers", tuple(figures), summary(seen, SLA_S))


def _compared(lab: Lab, server: Server, full: list[Reference]) -> tuple[int, int]:
    """How many whole answers differ from the full ones, and how many were whole."""
    different = whole = 0
    for body, reference in list(zip(lab.bodies_with(timeout_ms=UNHURRIED_MS, priority="high"), full, strict=True))[
        :SAME
    ]:
        status, said = server.call("POST", "/v1/rank", body)
        if status == HTTPStatus.SERVICE_UNAVAILABLE:  # eight workers on two cores
            continue
        if status != HTTPStatus.OK:
            raise RuntimeError(f"status {status}: {said!r}")
        answer = json.loads(said)
        if answer["degraded"]:
            continue
        items, whole = answer["items"], whole + 1
        scores = np.array([i["score"] for i in items], np.float32)
        if why := differs([i["id"] for i in items], scores, reference, TOLERANCE):
            lab.say(f"  {why}")
            different += 1
    return different, whole


# ------------------------------------------------------------------------------------------- expected losses


def losses(lab: Lab) -> Iterator[Row]:
    """Answers degraded in every way we know, by cause and fifth of coverage: expected against measured loss."""
    _, full = lab.references(lab.bundle)
    cells: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    for name, seen in _ways_to_degrade(lab):
        lab.say(f"  {name}: {int(seen.is_degraded.sum()):,} degraded of {len(seen):,}")
        for i in np.flatnonzero(seen.is_ok & seen.is_degraded).tolist():
            fifth = min(int(seen.coverage[i] * FIFTHS), FIFTHS - 1)
            measured = loss(seen.ids[i], full[seen.body[i]].ids[: len(seen.ids[i])])
            cells[seen.cause[i], fifth].append((float(seen.expected_loss[i]), measured))
    unknown = sum(not np.isfinite(e) for cell in cells.values() for e, _ in cell)
    figures = [Figure("degraded answers that expect nothing", float(unknown), most=0)]
    for (cause, fifth), pairs in sorted(cells.items()):
        expected, measured = np.array(pairs).mean(axis=0)
        name = f"{cause}, coverage {fifth / FIFTHS:.1f} to {(fifth + 1) / FIFTHS:.1f}"
        enough = MOST_GAP if len(pairs) >= ENOUGH else None
        figures.append(Figure(f"{name}: answers", float(len(pairs))))
        figures.append(Figure(f"{name}: loss expected", float(expected)))
        figures.append(Figure(f"{name}: loss measured", float(measured)))
        figures.append(Figure(f"{name}: difference", abs(float(expected - measured)), most=enough))
    yield Row("expected loss", tuple(figures))


def _ways_to_degrade(lab: Lab) -> Iterator[tuple[str, Observed]]:
    with lab.service() as server:
        for timeout_ms in (5, 8, 10, 12, 16, 20):
            bodies = lab.bodies_with(timeout_ms=timeout_ms)
            yield f"{timeout_ms} ms", lab.attack(server, poisson(lab.half, lab.seconds(40)), bodies)
        for times in (1.3, 1.6, 2.0, 3.0):
            yield f"{times} x", lab.attack(server, poisson(times * lab.full_rate, lab.seconds(40)))
            settle(server)
        for victims in (1, lab.workers):
            yield f"{victims} killed", _while_killed(lab, server, victims)


def _while_killed(lab: Lab, server: Server, victims: int) -> Observed:
    """Load while so many workers are killed each half second."""
    seconds = lab.seconds(40)
    with lab.load(server, poisson(lab.half, seconds)) as generator:
        for at_s in np.arange(0, seconds, 0.5):
            sleep_until(generator, float(at_s))
            for pid in list(server.workers().values())[:victims]:
                os.kill(pid, signal.SIGKILL)
        return generator.result()
