"""From a loaded bundle to a generation that may serve: golden requests must give their scores again.

Running them also warms everything up: memory maps, the runtime's memory plans, FAISS's buffers.
"""

import asyncio
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from app import wire
from app.bundle import Generation, load
from app.control.costs import Cost, fitted
from app.control.deadline import Deadline
from app.errors import BundleError, ClientError, require
from app.flow import Query, Ranking
from app.funnel import Funnel, offline_funnel
from app.manifest import MANIFEST, UNFORESEEN, Golden, opening
from app.workers.process import yield_to_everybody

TOLERANCE = 1e-4  # of a score; other CPUs add in another order, and reach 1e-6 on scores near 1
UNHURRIED_S = 600.0
YIELDED = 3.0  # times what a measurement took, to others


def offline_query(request: dict[str, Any], generation: Generation) -> Query:
    """A request in wire form, resolved as online. Raises ClientError."""
    parsed = wire.parse(orjson.dumps(request), wire.RankRequest)
    return wire.to_query(parsed, parsed.request_id or "offline", generation)


async def rank_offline(funnel: Funnel, query: Query) -> Ranking:
    """The whole funnel with all the time it wants."""
    deadline = Deadline(time.monotonic(), UNHURRIED_S)
    _, ranking = await funnel.finish(*await funnel.narrow(lambda is_late: query, deadline))
    return ranking


def measured(generation: Generation, *, is_yielding: bool = False) -> tuple[Cost, Cost]:
    """The costs of retrieval and pre-ranking on the golden requests, at their width and at a quarter of it.

    is_yielding: three quarters of the time are left to those who are served meanwhile.
    """

    def timed(work: Callable[..., Any], *given: Any) -> tuple[float, Any]:
        started = time.monotonic()
        done = work(*given)
        seconds = time.monotonic() - started
        time.sleep(YIELDED * seconds if is_yielding else 0.0)
        return seconds, done

    funnel = offline_funnel(generation)
    width = min(generation.manifest.funnel.retrieve, generation.n_items)
    widths = (max(1, width // 4), width)
    queries = [offline_query(golden.request, generation) for golden in generation.manifest.golden]
    queries = [query for query in queries if query.candidates is None]
    for _ in ("to warm up", "to measure") if queries else ():
        searches = {n: [timed(funnel.retrieval.search, q, n) for q in queries] for n in widths}
        wide = [(q, found) for q, (_, found) in zip(queries, searches[width], strict=True)]
        scorings = {n: [timed(funnel.preranking.score, q, f, min(n, len(f))) for q, f in wide] for n in widths}
        for stage, took in ((funnel.retrieval, searches), (funnel.preranking, scorings)):
            narrow, full = ((n, float(np.median([s for s, _ in took[n]]))) for n in widths)
            stage.cost = fitted(narrow, full)
    return funnel.retrieval.cost, funnel.preranking.cost


async def prove(generation: Generation) -> None:
    """Run the golden requests. Raises BundleError if none gives an item, or that names the first not reproduced."""
    holds_items = any(golden.items for golden in generation.manifest.golden)
    require(holds_items, "manifest.json: golden must hold a request that gives items; without one nothing is proved")
    with opening(MANIFEST, "its golden requests can't be run", UNFORESEEN):
        funnel = offline_funnel(generation)
        for number, golden in enumerate(generation.manifest.golden):
            await _prove_one(funnel, golden, f"manifest.json: golden request {number}")


def prove_aside(path: Path, said: Connection, is_yielding: bool) -> None:
    """Verify and prove a bundle in a process of its own; says its digest, and why it is refused: one of them is ""."""
    if is_yielding:
        yield_to_everybody()
    try:
        asyncio.run(prove(generation := load(path)))
        said.send((generation.digest, ""))
    except BundleError as e:
        said.send(("", str(e)))


async def _prove_one(funnel: Funnel, golden: Golden, where: str) -> None:
    try:
        query = offline_query(golden.request, funnel.generation)
    except (ClientError, orjson.JSONEncodeError) as e:  # an integer of over 64 bits
        raise BundleError(f"{where} is not a request this bundle can answer ({e})") from e
    ranking = await rank_offline(funnel, query)
    for lost in ranking.degradations:
        raise BundleError(f"{where} fails in {lost.stage.label} ({lost.reason})")
    scores = ranking.scores.tolist()
    found = dict(zip(funnel.generation.ids.external(ranking.rows), scores, strict=True))
    n = f"{len(golden.items)} with {len(golden.scores)} scores"
    is_whole = len(found) == len(golden.items) == len(golden.scores)
    require(is_whole, f"{where} gives {len(found)} items, the manifest says {n}")
    for item, expected, at_place in zip(golden.items, golden.scores, scores, strict=True):
        # Where two items changed places, both scores must still be what they were: a tie, to the tolerance.
        is_same = item in found and np.allclose((found[item], at_place), expected, TOLERANCE, TOLERANCE)
        said = f"item {item} the score {found.get(item)}, and its place {at_place}; the manifest says {expected}"
        require(is_same, f"{where} gives {said}")
