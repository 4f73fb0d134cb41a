"""Some minutes with the real service, from outside: HTTP, its answers' `took_ms`, and /proc for whose CPU it took.

    one request at a time, at several widths, in rounds       ─▶ who spends what by width; the shapes of single requests
    open-loop load at rising rates, and down again            ─▶ what load does (fit.py)
    smaps                                                     ─▶ memory

Widths vary by the request's `rerank_count`, which widens retrieval too where it exceeds it; so the bundle is served at
narrow widths, and one service shows all that are wider. A second one at half of them shows what is narrower, and under
load a third what a request takes one worker alone. Widths take turns, and the many single requests at the base's beside
them, so that a minute in which the machine is slow is slow for all. No piece of work beside the service tells how fast
that is: such a probe moved by a third while what a request took the service stayed within a twelfth of its median
(2026-11-27, W1, 24 runs of 8 s), so it is the service's own CPU that tells. It is over 250 lines because single
requests and loads are metered by the same hands.
"""

import contextlib
import http.client
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from loadtest import launch
from loadtest.arrivals import poisson
from loadtest.launch import Server
from loadtest.observed import Floats, Observed, joined
from loadtest.open_loop import Attack, attack
from loadtest.plan import bundles, fit
from loadtest.plan.calibration import Calibration, Configuration, Demand, Loaded
from loadtest.plan.demand import COLUMNS, Single, demand_of
from loadtest.plan.metering import Spent, niceness, read_memory, spent
from loadtest.plan.recipe import Model
from loadtest.plan.report import of_load
from loadtest.plan.simulation import Machine

UNHURRIED_S = 10.0  # the SLA of a calibration: nothing is narrowed, and one worker takes a request its whole way
POOL = 500  # requests
ROUNDS, A_ROUND = 8, 12  # of every width, and requests of it in each
SINGLE = 1_500  # requests at the base widths: their shapes
LOAD, GROWTH, LOADS = 0.2, 1.3, 5  # of what cores can do, at first; by which it rises or falls; rates
LOAD_S = 8.5  # seconds of a run
LONE_S, LONE_BUSY = (1.0, 4.0), 0.75  # of one worker's, the first to get warm; of its time, up to which it is asked
CALM, TRIES = 0.01, 4  # of the cores' time a hypervisor may take from a run, or it is taken again; how often at most
WIDEST = 10_000  # that a request may ask for
NO_LOG = Path(os.devnull)
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Target:
    """A running service and the requests to ask it. pids: of its workers. retrieve: its width, 0 for the base's."""

    server: Server
    bodies: Sequence[bytes]
    pids: tuple[int, ...]
    retrieve: int = 0

    def with_fields(self, **sent: Any) -> list[bytes]:
        return [json.dumps(json.loads(body) | sent).encode() for body in self.bodies]

    def spent(self) -> Spent:
        """CPU so far."""
        return spent(self.server.process.pid, self.pids)


After = Callable[[Target, float], None]


def aim(server: Server, bodies: Sequence[bytes]) -> Target:
    """Asks for the workers once: while something is metered, nothing else is to be asked of the service."""
    return Target(server, bodies, tuple(server.workers().values()))


def calibrate(
    bundle: Path,
    asked: Sequence[bytes],
    workers: int,
    say: Say,
    *,
    source: Path | None = None,
    narrower: Path | None = None,
    is_quick: bool = False,
    after: After = lambda *_: None,
) -> Calibration:
    """Serve the bundle and measure it with these requests; `source` is what it was narrowed from.

    narrower: the same at less than its widths, for single requests, which no request can ask for.
    after: called with the service and the rate of each run under load that it held.
    Raises RuntimeError when it can't be measured.
    """
    manifest = bundles.manifest_of(bundle)
    retriever, base = manifest["retrievers"][0], _configuration(bundle, workers)
    short = 10 if is_quick else 1
    with serve(bundle, base) as server:
        target = aim(server, asked)
        say(f"one request at a time, {base}")
        single(target, base.rerank, 50)  # nobody's first request counts
        with _beside(narrower, asked, workers) as narrow:
            demand, speeds = _demand(target, narrow, base, short, say)
        memory = read_memory(server, bundle)
        with _beside(bundle if workers > 1 else None, asked, 1) as lone:
            loaded = _loads(target, lone, base, demand, LOAD_S / (4 if is_quick else 1), say, after)
    if loaded:
        demand = replace(demand, client_s=float(np.median([run.client_s for run in loaded])))
    calibration = Calibration(
        date=time.strftime("%Y-%m-%d %H:%M"),
        machine=f"{platform.machine()}, {os.cpu_count()} cores",
        versions={"python": platform.python_version()} | {p: version(p) for p in ("onnxruntime", "faiss-cpu", "numpy")},
        cores=os.cpu_count() or 1,
        bundle=bundle.name,
        path=str(source or bundle),
        contents=bundles.contents_of(manifest),
        items=retriever["n"],
        d=dimension(bundle),
        kind=retriever["kind"],
        model_bytes=(bundle / "re_ranker.onnx").stat().st_size,
        base=base,
        speeds=speeds,
        demand=demand,
        loaded=tuple(loaded),
        memory=memory,
        is_quick=is_quick,
    )
    say("fitting what load does")
    fitted = fit.fit(calibration)
    say(f"{of_load(fitted)}; the simulation is off by {fitted.error:.0%}")
    return fitted


def serve(bundle: Path, configuration: Configuration) -> Any:
    """The service in this configuration; the bundle has its widths. Without a log: nobody here is to read it."""
    return launch.service(bundle, configuration.workers, log=NO_LOG, SLA_MS=f"{configuration.sla_s * 1e3:g}")


def dimension(bundle: Path) -> int:
    return int(np.load(bundle / "items/embedding.npy", mmap_mode="r").shape[1])


# --------------------------------------------------------------------------------------- one at a time


def single(target: Target, rerank: int, n: int) -> Single:
    """Send n requests of this width, each when the one before is answered."""
    sent = target.with_fields(rerank_count=rerank)
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", target.server.port, timeout=60)) as connection:
        _ask(connection, sent[-1])  # opens the connection, and isn't counted
        before = target.spent()
        answers = [_ask(connection, sent[i % len(sent)]) for i in range(n)]
        used = target.spent().since(before, n)
    whole = [answer for answer in answers if not answer["degraded"]]
    if 2 * len(whole) < n:
        raise RuntimeError(f"{n - len(whole)} of {n} answers were degraded without load")
    took = [[answer["took_ms"].get(name, 0.0) / 1e3 for name in COLUMNS] for answer in whole]
    return Single(rerank, np.asarray(took), used, target.retrieve)


def _ask(connection: http.client.HTTPConnection, body: bytes) -> Any:
    """The answer. Raises RuntimeError when it isn't 200."""
    connection.request("POST", "/v1/rank", body, {"content-type": "application/json"})
    answer = connection.getresponse()
    said = json.loads(answer.read())
    if answer.status != 200:
        raise RuntimeError(f"status {answer.status}: {said}")
    return said


@contextlib.contextmanager
def _beside(bundle: Path | None, asked: Sequence[bytes], workers: int) -> Iterator[Target | None]:
    """A second service, warm; None for no bundle."""
    if not bundle:
        yield None
        return
    configuration = _configuration(bundle, workers)
    with serve(bundle, configuration) as server:
        target = replace(aim(server, asked), retrieve=configuration.retrieve)
        single(target, configuration.rerank, 50)
        yield target


def _configuration(bundle: Path, workers: int) -> Configuration:
    """The bundle at its own widths, unhurried."""
    funnel = bundles.manifest_of(bundle)["funnel"]
    return Configuration(funnel["retrieve"], funnel["rerank"], workers, UNHURRIED_S)


def widths(base: Configuration) -> list[int]:
    """Re-ranking widths to measure: from half of the base's up to four times what retrieval finds."""
    several = [times * base.rerank // 2 for times in (1, 2, 4)] + [times * base.retrieve for times in (1, 2, 4)]
    return sorted({min(width, WIDEST) for width in several})


def _demand(
    target: Target, narrow: Target | None, base: Configuration, short: int, say: Say
) -> tuple[Demand, tuple[float, ...]]:
    """What a request takes whom, by width; and how slow each part was, over the median."""
    asked = [(target, width) for width in widths(base)]
    if narrow:
        asked = [*((narrow, max(1, base.rerank // by)) for by in (4, 2)), *asked]
    say("widths " + ", ".join(f"{max(of.retrieve or base.retrieve, width)} -> {width}" for of, width in asked))
    rounds, alike = list[list[Single]](), list[Single]()
    for _ in range(max(2, ROUNDS // short)):
        rounds.append([single(of, width, A_ROUND) for of, width in asked])
        alike.append(single(target, base.rerank, SINGLE // ROUNDS // short))
    demand = demand_of([run for one in rounds for run in one], alike, base, niceness(target.server))
    return demand, (*_slower(rounds), *_slower([[run] for run in alike]))


def _slower(parts: Sequence[Sequence[Single]]) -> list[float]:
    """What the requests of each part took the service, over the median of the parts."""
    took = [sum(run.spent.loop + run.spent.workers for run in part) for part in parts]
    return [one / float(np.median(took)) for one in took]


# ------------------------------------------------------------------------------------------- under load


def _loads(
    target: Target, lone: Target | None, base: Configuration, demand: Demand, seconds: float, say: Say, after: After
) -> list[Loaded]:
    """Runs at rising rates, up to the first that the cores can't hold; at falling ones while they hold none.

    lone: the base with one worker, which is asked the same for a moment where it can hold it.
    Then the same rates once more, the other way round: a machine that gets faster in that minute must not look like one
    that likes load.
    """
    means = Model(demand, base, base, Machine(os.cpu_count() or 1), has_client=True).means()
    rate, runs = LOAD * (os.cpu_count() or 1) / sum(means.values()), list[Loaded]()
    metered(target, rate, seconds, seed=2 * LOADS)  # nobody's first load counts either
    for number in range(LOADS):
        runs += _held(target, lone, rate, seconds, number, say, after)
        if runs and runs[-1].rate != rate:
            break
        rate = rate * GROWTH if runs else rate / GROWTH**2
    for number, rate in enumerate([one.rate for one in reversed(runs)], LOADS):
        runs += _held(target, lone, rate, seconds, number, say, after)
    return runs


def _held(
    target: Target, lone: Target | None, rate: float, seconds: float, seed: int, say: Say, after: After
) -> list[Loaded]:
    """The run, if the cores held it."""
    _, one = metered(target, rate, seconds, seed=seed)
    met = f"p50 {one.p50_s * 1e3:.1f} ms, p99 {one.p99_s * 1e3:.1f} ms, coverage {one.coverage:.3f}"
    say(f"{rate:.0f} a second: {met}, CPU {one.cpu_s * 1e3:.2f} ms, a hypervisor took {one.stolen:.1%}")
    if not fit.is_usable(one):
        return []
    after(target, rate)
    if lone and rate * one.cpu_s <= LONE_BUSY:
        metered(lone, rate, LONE_S[0], seed=seed)
        _, by_one = metered(lone, rate, LONE_S[1], seed=seed)
        one = replace(one, lone_s=by_one.cpu_s)
        say(f"{rate:.0f} a second: CPU {by_one.cpu_s * 1e3:.2f} ms with one worker")
    return [one]


def metered(
    target: Target,
    rate: float,
    seconds: float,
    *,
    parts: int = 1,
    seed: int = 0,
    between: Callable[[], None] = lambda: None,
) -> tuple[Observed, Loaded]:
    """Open-loop load in parts, `between` called before each: all parts as one, and what they come to.

    The service's CPU is of the processes that it had when `target` was aimed. A part from which a hypervisor took the
    cores is taken again, with the same arrivals; where none of its tries was calm the calmest counts.
    """
    seen, cpu_s = list[Observed](), 0.0
    for part in range(parts):
        between()
        one, used_s = _calm(target, poisson(rate, seconds / parts, 1_000 * seed + part))
        seen.append(one)
        cpu_s += used_s
    whole = joined(seen)
    return whole, summed_up(whole, rate, seconds, cpu_s / len(whole))


def _calm(target: Target, due_s: Floats) -> tuple[Observed, float]:
    """A run with these arrivals in which the machine was there, and the service's CPU in it, seconds."""
    tried = list[tuple[Observed, float]]()
    for _ in range(TRIES):
        before = target.spent()
        seen = attack(Attack(target.server.port, target.bodies, due_s))
        used = target.spent().since(before, 1)
        tried.append((seen, used.loop + used.workers))
        if seen.stolen_share <= CALM:
            break
    return min(tried, key=lambda one: one[0].stolen_share)


def summed_up(seen: Observed, rate: float, seconds: float, cpu_s: float) -> Loaded:
    ok = seen.is_ok
    return Loaded(
        rate=rate,
        requests=len(seen),
        p50_s=seen.percentile_s(50),
        p99_s=seen.percentile_s(99),
        coverage=float(np.where(ok, np.nan_to_num(seen.coverage), 0.0).mean()),
        client_s=seen.cpu_s / len(seen),
        cpu_s=cpu_s,
        seconds=seconds,
        stolen=seen.stolen_share,
    )
