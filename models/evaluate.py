"""Running a bundle's funnel offline, in this process, over requests in wire form.

The same stages as online, without a deadline and without worker processes. Packing reads from here what it
calibrates on and the golden scores; `python -m models evaluate` says what the funnel loses against its own
re-ranker. It alone among models/ knows the funnel.
"""

import asyncio
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.bundle import Generation, run_model
from app.control.deadline import Deadline
from app.errors import ClientError, StageFailed
from app.features import Inputs, item_inputs
from app.flow import Candidates, Query, Ranking, Rows, Scored, Stage, best_first
from app.funnel import offline_funnel
from app.warmup import offline_query, prove, rank_offline
from app.workers.scoring import ShardModel
from models.pack_config import PackError

STAGES = [stage.label for stage in Stage]
UNHURRIED = Deadline(0.0, 600.0)
Floats = NDArray[np.float32]
Request = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ScoredThrough:
    """Everything that retrieval found for one query, scored by every stage; f32[n] each."""

    query: Query
    candidates: Candidates
    preranking: Floats
    reranking: Floats


def read_requests(file: Path) -> list[Request]:
    """One JSON object a line; blank lines don't count. Raises PackError that names the line."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise PackError(f"{file}: can't be read ({e})") from e
    requests = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            request = json.loads(line)
        except ValueError as e:
            raise PackError(f"{file.name}: line {number} is not JSON ({e})") from e
        if not isinstance(request, dict):
            raise PackError(f"{file.name}: line {number} is no object; allowed is a request of POST /v1/rank")
        requests.append(request)
    return requests


def resolve(generation: Generation, requests: Sequence[Request], numbers: Iterable[int] | None = None) -> list[Query]:
    """Requests as the service would see them. Raises PackError that names the first wrong one.

    numbers: by which they are named; counted from 1 if absent.
    """
    queries = []
    for number, request in zip(numbers or range(1, len(requests) + 1), requests, strict=True):
        try:
            queries.append(offline_query(request, generation))
        except ClientError as e:
            raise PackError(f"sample request {number} is not one that this bundle could answer: {e}") from e
    return queries


def embed(generation: Generation, queries: Iterable[Query]) -> Floats:
    """The user tower's outputs, f32[q, d]. Raises PackError if it fails."""
    retrieval = offline_funnel(generation).retrieval
    try:
        return np.stack([retrieval.embed(query) for query in queries])
    except StageFailed as e:
        raise PackError(f"user_tower.onnx: fails on a sample request ({_first_line(e)})") from e


def re_ranker_feeds(generation: Generation, query: Query, candidates: Candidates) -> dict[str, NDArray[Any]]:
    """What the re-ranker gets for these candidates, by input name."""
    given = Inputs(generation.tables, query.person, candidates, query.sent_with(candidates.rows))
    model = ShardModel(generation)
    return model.request_inputs(given.person, candidates.user_embedding) | item_inputs(model.inputs, given)


def re_rank(generation: Generation, query: Query, candidates: Candidates) -> Floats:
    """The re-ranker's scores of all these candidates, f32[n]. Raises PackError if it fails."""
    if not len(candidates):
        return np.empty(0, np.float32)
    doubled = candidates.take(np.zeros(2, np.intp)) if len(candidates) == 1 else candidates  # as the service does
    try:
        scores = run_model(generation.re_ranker, re_ranker_feeds(generation, query, doubled))
    except StageFailed as e:
        raise PackError(f"re_ranker.onnx: fails on a sample request ({_first_line(e)})") from e
    return np.asarray(scores, np.float32).reshape(-1)[: len(candidates)]


def prerank(
    generation: Generation, queries: Iterable[Query], *, is_popular: bool = False
) -> Iterator[tuple[Query, Scored]]:
    """Retrieval at its configured width, and the linear stage's scores of what it found.

    is_popular: with what takes retrieval's place when it fails.
    """
    width = generation.manifest.funnel.retrieve
    funnel = offline_funnel(generation)
    for query in queries:
        if is_popular:
            found = funnel.retrieval.substitute(funnel.open_scope(query, UNHURRIED), query, None)
        else:
            found = funnel.retrieval.search(query, width)
        yield query, funnel.preranking.score(query, found)


def kept(generation: Generation, queries: Iterable[Query]) -> Iterator[tuple[Query, Candidates]]:
    """What reaches re-ranking, best first."""
    for query, coarse in prerank(generation, queries):
        yield query, coarse.top(generation.manifest.funnel.rerank).candidates


def score_through(
    generation: Generation, queries: Iterable[Query], *, is_popular: bool = False
) -> Iterator[ScoredThrough]:
    """The same, and the re-ranker on everything found."""
    for query, coarse in prerank(generation, queries, is_popular=is_popular):
        found = coarse.candidates
        yield ScoredThrough(query, found, coarse.scores, re_rank(generation, query, found))


def narrower(generation: Generation, whole: ScoredThrough, shares: Iterable[float]) -> dict[float, NDArray[np.int32]]:
    """What searches for these shares of the width find of what the whole one did: places in it, in their order.

    All of it where the caller says what to rank. Nothing is said of an index that finds the first of it.
    """
    rows, searched = whole.candidates.rows, [share for share in shares if share < 1]
    if whole.query.candidates is not None:
        return dict.fromkeys(searched, np.arange(len(rows), dtype=np.int32))
    if not generation.manifest.retrievers[0].kind.startswith("ivf"):
        return {}
    retrieval, width = offline_funnel(generation).retrieval, generation.manifest.funnel.retrieve
    place = {row: at for at, row in enumerate(rows.tolist())}
    found = {share: retrieval.search(whole.query, ceil(share * width)).rows.tolist() for share in searched}
    return {share: np.array([place[row] for row in of if row in place], np.int32) for share, of in found.items()}


def run_funnel(generation: Generation, queries: Sequence[Query]) -> list[Ranking]:
    """The whole funnel's ranking for each query, with all the time it wants."""
    funnel = offline_funnel(generation)

    async def rank_all() -> list[Ranking]:
        return [await rank_offline(funnel, query) for query in queries]

    return asyncio.run(rank_all())


def prove_golden(generation: Generation) -> None:
    """The golden requests give their scores again. Raises BundleError that names the first that doesn't."""
    asyncio.run(prove(generation))


def rank_everything(generation: Generation, query: Query, k: int) -> Rows:
    """The re-ranker's own k best rows over the whole catalogue, under the query's filters and exclusions."""
    if query.candidates is None:
        history = query.person.history if generation.manifest.funnel.exclude_history else query.exclude
        rows = np.setdiff1d(np.arange(generation.n_items), np.union1d(query.exclude, history))
        query = replace(query, candidates=rows)
    found = offline_funnel(generation).retrieval.search(query, k)
    return found.rows[best_first(re_rank(generation, query, found), found.rows)[:k]]


def survival(generation: Generation, queries: Sequence[Query], k: int = 10) -> float:
    """Mean share of `rank_everything`'s k best that retrieval and pre-ranking let through to the re-ranker."""
    keep = generation.manifest.funnel.rerank
    shares = []
    for query, coarse in prerank(generation, queries):
        best = rank_everything(generation, query, k)
        if len(best):
            shares.append(float(np.isin(best, coarse.top(keep).candidates.rows).mean()))
    return float(np.mean(shares)) if shares else 1.0


def spread(n: int, most: int) -> list[int]:
    """So many places out of n, evenly; all where there are fewer."""
    return list(np.unique(np.linspace(0, n - 1, most).astype(int)).tolist())


def report(generation: Generation, file: Path, most: int, k: int) -> None:
    """Print what the funnel loses and takes, on at most so many of the file's requests. Raises PackError."""
    requests = read_requests(file)
    if not requests:
        raise PackError(f"{file.name}: has no request")
    chosen = spread(len(requests), most)
    queries = resolve(generation, [requests[at] for at in chosen], [at + 1 for at in chosen])
    rankings = run_funnel(generation, queries)
    seconds = [[r.seconds for r in ranking.reports] for ranking in rankings]
    widths = generation.manifest.funnel
    of = "" if len(queries) == len(requests) else f" of {len(requests):,}"
    print(f"{generation.name}: {len(queries)}{of} requests, {widths.retrieve} -> {widths.rerank} -> {widths.k}")
    print(f"  of the re-ranker's own best {k} over all items, {survival(generation, queries, k):.3f} reach it")
    for name, took in zip(STAGES, np.median(seconds, axis=0), strict=True):
        print(f"  {name:<11} {took * 1e3:6.2f} ms, median, in one process without load")


def _first_line(e: Exception) -> str:
    return str(e).strip().splitlines()[0]
