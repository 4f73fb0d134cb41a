"""From a loaded bundle to a generation that may serve: golden requests must give their scores again.

Running them also warms everything up: memory maps, the runtime's memory plans, FAISS's buffers.
"""

import time
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import numpy as np
import orjson

from app import users, wire
from app.bundle import Generation, Golden
from app.control.deadline import Deadline
from app.errors import BundleError, ClientError
from app.flow import Query, Ranking
from app.funnel import Funnel, offline_funnel

TOLERANCE = 1e-4  # of a score; other CPUs add in another order, and reach 1e-6 on scores near 1
UNHURRIED_S = 600.0


def offline_query(request: dict[str, Any], generation: Generation) -> Query:
    """A request in wire form, resolved as online. Raises ClientError."""
    parsed = wire.parse(orjson.dumps(request))
    found = users.look_up(parsed.user.id, generation)
    return wire.to_query(parsed, parsed.request_id or "offline", generation, found)


async def rank_offline(funnel: Funnel, query: Query, watched: tuple[int, ...] = ()) -> Ranking:
    """The whole funnel with all the time it wants."""
    return await funnel.rank(query, Deadline(time.monotonic(), UNHURRIED_S), watched)


async def prove(generation: Generation) -> None:
    """Run the golden requests. Raises BundleError that names the first that isn't reproduced."""
    with ThreadPoolExecutor(1, "prove") as threads:
        for number, golden in enumerate(generation.manifest.golden):
            await _prove_one(generation, golden, number, threads)


async def _prove_one(generation: Generation, golden: Golden, number: int, threads: Executor) -> None:
    where = f"manifest.json: golden request {number}"
    try:
        query = offline_query(golden.request, generation)
    except ClientError as e:
        raise BundleError(f"{where} is not a request this bundle can answer ({e})") from e
    ranking = await rank_offline(offline_funnel(generation, threads), query)
    if ranking.degradations:
        lost = ranking.degradations[0]
        raise BundleError(f"{where} fails in {lost.stage.label} ({lost.reason})")
    found = dict(zip(generation.ids.external(ranking.rows), ranking.scores.tolist(), strict=True))
    if len(found) != len(golden.items):
        raise BundleError(f"{where} gives {len(found)} items, the manifest says {len(golden.items)}")
    for item, expected, at_place in zip(golden.items, golden.scores, ranking.scores.tolist(), strict=True):
        # Where two items changed places, both scores must still be what they were: a tie, to the tolerance.
        if item not in found or not np.allclose((found[item], at_place), expected, TOLERANCE, TOLERANCE):
            raise BundleError(f"{where} gives item {item} the score {found.get(item)}, the manifest says {expected}")
