"""The index over the item embeddings: its kind by catalogue size and width, its search parameter by measured recall.

    up to 20,000 items     flat      exact: 0.2 ms at d = 64
    up to 1 million        hnsw      efSearch from the width up; only for widths up to 500
    up to 20 million       ivf_sq8   nprobe, 1.1 × the width fetched and scored exactly
    above                  ivf_sq4   four bits a dimension; nprobe, 1.5 × the width fetched and scored exactly

The parameter is the smallest that reaches the target on the queries: the tower's outputs for sample requests.
A kind that can't reach it gives way to another, at last to exact search, and that is said. How an index is
searched online is stages/retrieval.py; here the same calls are compared with exact search. Same inputs, same
index: seeds are fixed, a graph is built on one thread, and what a search takes is told but decides nothing. It is over
250 lines because what is built is chosen by what is measured, and both are searches of the same index.

Where many are fetched from lists of a scalar quantiser, a sixteenth of the rows is a sample that tells how near an item
must be, if it is a fair one, which is tried: rows in the order of their embeddings make none. On W1 a search for 2,200
in 89 of 4,096 lists takes 0.34 ms so and 0.65 with FAISS's heap, one for 660 in 27 of them 0.13 and 0.20 (medians of
500; 2 cores, AVX-512, 2026-11-28, one thread).

Sizes follow times measured at 1M and 10M × 64 (2 cores, AVX-512, 2026-11); recall is measured anew each time. With
trained towers, whose best rows score nearly alike, two bits a dimension reach a recall@2,000 of .73 of ten million at
most; four (of a product quantiser, 4 × fetched) reach .91 with 128 of 16,384 lists. Four bits of a product quantiser
(`ivf_pq`, fast scan) are searched in half the time of as many of a scalar one, but FAISS copies them into each process,
where it maps the others: at 100M each of the service's would hold 4 GB of its own. On W1's million, 64 of 4,096 lists,
the recall@2,000 is .785, .774 and .789 with four bits, four of a product quantiser and eight where 1.1 × the width is
fetched, .789, .788 and .789 at 2 ×, in 0.97, 0.41 and 0.92 ms (2 cores, AVX-512, 2026-11-27, one thread, items with
noise as queries).
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import faiss
import numpy as np
from numpy.typing import NDArray

from app.manifest import Recall
from app.stages.retrieval import LEAST_SAMPLED, near, nearest

Kind = Literal["flat", "hnsw", "ivf_sq8", "ivf_sq4", "ivf_pq"]
Rows = NDArray[np.int64]
Floats = NDArray[np.float32]
Say = Callable[[str], None]

FLAT_MOST, HNSW_MOST, SQ8_MOST = 20_000, 1_000_000, 20_000_000  # items
# Candidates. A graph visits as many nodes or more. At recall .95 of 100,000 clustered items × 64, graph and inverted
# file (CPU time, 2026-11): 0.6 and 0.2 ms for 100, 2.0 and 0.5 for 500, 7.1 and 1.6 for 2,000; 23 and 3 s to build.
HNSW_WIDEST = 500
# What takes over when a kind misses the target. A graph can miss it at any efSearch: inner products of embeddings
# of different lengths, or of separate clusters, leave parts of it that no path reaches.
NEXT: dict[Kind, Kind] = {"ivf_pq": "ivf_sq8", "ivf_sq4": "ivf_sq8", "hnsw": "ivf_sq8", "ivf_sq8": "flat"}
# Eight bits lose nothing but the order at the edge: 1.1 × has the recall of 2 × (0.900 at 1M, width 2,000). What is
# fetched on top costs pages: each row is one, and above 20 million they don't all stay in memory.
OVERFETCH: dict[Kind, float] = {"ivf_pq": 4.0, "ivf_sq4": 1.5, "ivf_sq8": 1.1, "hnsw": 1.0, "flat": 1.0}
BLOCK = 262_144  # items converted, added or searched at a time: 64 MB at d = 64
HNSW_LINKS, HNSW_BUILD = 32, 80  # efConstruction: recall .998 at 1M items
WIDEST_HNSW = 16  # × the width: beyond it a graph is slower than a flat index of its size
# Parts of the rows, whose first is the sample. With one half as large a search of W1 takes as long (1.3 × what is
# expected asked of it: 0.32 ms and 0.32, AVX-512, 2026-11-28), and spreads more widely in how many pass.
SAMPLED = 16
FAIR, MOST_PASSED = 0.95, 2  # of the queries; times what is fetched: where more pass, it was no sample of what is near
LARGEST_PROBED = 4  # at most 1 / 4 of the lists: beyond it the search reads most of the catalogue
TRAIN_POINTS = 64  # a list; more changes nothing that k-means finds
MOST_LISTS = 16_384  # k-means takes as their square, since each brings its points
GRAPH_MOST = 4_096  # lists; of more, a graph over their centroids finds each row's
LONG = 4_000_000  # rows, from which on it says how far it is
SEED = 20
ENOUGH_QUERIES = 50  # different ones; with fewer, items stand in for people
MOST_QUERIES = 1_000
TIMED_QUERIES = 100
NOISE = 0.5  # of an embedding's spread: what a stand-in differs from its item


@dataclass(frozen=True, slots=True)
class Built:
    """An index, how to search it, and what that reaches. search_s: seconds a query, alone on one thread, median."""

    index: faiss.Index
    kind: Kind
    search: dict[Literal["nprobe", "efSearch"], int]
    overfetch: float
    sampled: int
    recall: Recall
    search_s: float


def build(
    embeddings: NDArray[Any], users: Floats, width: int, target: float, *, kind: Kind | None = None, say: Say = print
) -> Built:
    """The index for this catalogue, with the cheapest parameter that reaches the target.

    Args:
        embeddings: f16 or f32 [N, d]. users: f32[q, d], the tower's outputs; may be too few, or all alike.
        width: how many candidates retrieval finds. target: recall@width wanted, in (0, 1].
        kind: to begin with, instead of the one that the size suggests.
    """
    n = len(embeddings)
    width = min(width, n)
    queries = enough_queries(embeddings, users, say)
    exact = search_exactly(embeddings, queries, width, os.cpu_count() or 1, say)
    tried = kind or kind_for(n, width)
    while True:
        built = _build(tried, embeddings, queries, exact, target, say)
        if built.recall.reached >= target or tried == "flat":
            return built
        say(f"index: {tried} reaches recall@{width} {built.recall.reached:.3f} only; trying {NEXT[tried]}")
        tried = NEXT[tried]


def kind_for(n: int, width: int) -> Kind:
    """What the size of the catalogue and the width of retrieval suggest."""
    if n <= FLAT_MOST:
        return "flat"
    if n <= HNSW_MOST and width <= HNSW_WIDEST:
        return "hnsw"
    return "ivf_sq8" if n <= SQ8_MOST else "ivf_sq4"


# ------------------------------------------------------------------------------------------ measuring


def enough_queries(embeddings: NDArray[Any], users: Floats, say: Say = print) -> Floats:
    """At most 1,000 of the users, as often as they come; with fewer than 50 different ones, items with noise as well.

    Repeated embeddings stay: they are the people nothing is known of, whose search is often the hardest.
    """
    rng = np.random.default_rng(SEED)
    chosen = np.sort(rng.choice(len(users), min(len(users), MOST_QUERIES), replace=False))
    queries = np.asarray(users[chosen], np.float32)
    n_different = len(np.unique(users, axis=0))
    if n_different >= ENOUGH_QUERIES:
        return queries
    say(f"index: only {n_different} different user embeddings; recall is measured on items with noise as well")
    rows = np.sort(rng.choice(len(embeddings), min(len(embeddings), 4 * ENOUGH_QUERIES), replace=False))
    items = np.asarray(embeddings[rows], np.float32)
    noise = rng.standard_normal(items.shape).astype(np.float32) * items.std(axis=0) * NOISE
    return np.concatenate([queries, items + noise])


def search_exactly(
    embeddings: NDArray[Any], queries: Floats, width: int, n_threads: int = 1, say: Say = lambda _: None
) -> Rows:
    """The best rows of each query by inner product, i64[q, width], block by block."""
    scores = np.empty((len(queries), 0), np.float32)
    rows = np.empty((len(queries), 0), np.int64)
    with _threads(n_threads):
        for start, block in _blocks(embeddings):
            more, found = faiss.knn(queries, block, min(width, len(block)), metric=faiss.METRIC_INNER_PRODUCT)
            scores, rows = np.concatenate([scores, more], axis=1), np.concatenate([rows, found + start], axis=1)
            kept = np.argsort(-scores, axis=1, kind="stable")[:, :width]
            scores, rows = np.take_along_axis(scores, kept, axis=1), np.take_along_axis(rows, kept, axis=1)
            if len(embeddings) > LONG and start % (16 * BLOCK) == 0:
                say(f"index: exact search, {start + len(block):,} of {len(embeddings):,} rows")
    return rows


def recall_of(found: Rows, exact: Rows) -> float:
    """The share of the exact rows that were found, mean over the queries; both i64[q, ...]."""
    return float(np.mean([np.isin(e, f).mean() for e, f in zip(exact, found, strict=True)]))


def search(index: faiss.Index, kind: Kind, queries: Floats, n_fetched: int, parameter: int) -> Rows:
    """What retrieval fetches from this index: i64[q, n_fetched], -1 where there is nothing."""
    return np.asarray(index.search(queries, n_fetched, params=_parameters(kind, n_fetched, parameter))[1])


def _parameters(kind: Kind, n_fetched: int, parameter: int) -> faiss.SearchParameters | None:
    if kind == "hnsw":
        return faiss.SearchParametersHNSW(efSearch=max(parameter, n_fetched))
    return None if kind == "flat" else faiss.SearchParametersIVF(nprobe=parameter)


def smallest(low: int, high: int, reaches: Callable[[int], bool]) -> int:
    """The smallest parameter in [low, high] that reaches the target, or `high` if none does.

    Doubles, then halves the gap: recall rises with the parameter but for noise well under a thousandth.
    """
    tried = low
    while not reaches(tried):
        if tried == high:
            return high
        low, tried = tried + 1, min(2 * tried, high)
    high = tried
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(middle) else (middle + 1, high)
    return high


# ------------------------------------------------------------------------------------------- building


def _build(kind: Kind, embeddings: NDArray[Any], queries: Floats, exact: Rows, target: float, say: Say) -> Built:
    n, width, overfetch = len(embeddings), exact.shape[1], OVERFETCH[kind]
    n_fetched = min(n, int(width * overfetch))
    index = _filled(kind, embeddings, say)

    def recall_at(parameter: int) -> float:
        return recall_of(search(index, kind, queries, n_fetched, parameter), exact)

    low, high = {"flat": (0, 0), "hnsw": (width, min(n, WIDEST_HNSW * width))}.get(
        kind, (1, max(1, n_lists(n) // LARGEST_PROBED))
    )
    parameter = smallest(low, high, lambda p: recall_at(p) >= target)
    found = search(index, kind, queries, n_fetched, parameter)
    reached, sampled = recall_of(found, exact), sampled_by(index, kind, queries, n_fetched, parameter)
    return Built(
        index,
        kind,
        {} if kind == "flat" else {"efSearch": parameter} if kind == "hnsw" else {"nprobe": parameter},
        overfetch,
        sampled,
        Recall(target=target, reached=reached, at=width, n_queries=len(queries)),
        _seconds(index, kind, embeddings, queries[:TIMED_QUERIES], (n_fetched, width, parameter, sampled)),
    )


def sampled_by(index: faiss.Index, kind: Kind, queries: Floats, n_fetched: int, parameter: int) -> int:
    """Into how many parts the rows are cut for a sample of them: SAMPLED, or 0 where it would be of no use.

    It is of use where enough rows pass the score that it tells, and not far too many.
    """
    if not kind.startswith("ivf_sq") or n_fetched < LEAST_SAMPLED:
        return 0
    parameters = _parameters(kind, n_fetched, parameter)
    passed = np.array([len(near(index, query[None], n_fetched, parameters, SAMPLED)[0]) for query in queries])
    is_fair = (passed >= n_fetched) & (passed <= MOST_PASSED * n_fetched)
    return SAMPLED if is_fair.mean() >= FAIR else 0


def _seconds(
    index: faiss.Index, kind: Kind, embeddings: NDArray[Any], queries: Floats, numbers: tuple[int, int, int, int]
) -> float:
    """Median time of a search with its exact scoring, as retrieval does them.

    numbers: fetched, width, parameter, parts of which the first is the sample.
    """
    n_fetched, width, parameter, sampled = numbers
    took = []
    for query in queries:
        started = time.perf_counter()
        rows, _ = nearest(index, query[None], n_fetched, _parameters(kind, n_fetched, parameter), sampled)
        if OVERFETCH[kind] > 1 and len(rows := rows[rows >= 0]):
            scores = np.asarray(embeddings[rows], np.float32) @ query
            np.argpartition(-scores, min(width, len(rows)) - 1)
        took.append(time.perf_counter() - started)
    return float(np.median(took))


def n_lists(n: int) -> int:
    """Lists of an inverted file: the power of two nearest to 4 √n, up to a most; 4,096 for a million items."""
    return min(MOST_LISTS, int(2 ** round(np.log2(4 * np.sqrt(n)))))


def _filled(kind: Kind, embeddings: NDArray[Any], say: Say = lambda _: None) -> faiss.Index:
    n, d = embeddings.shape
    is_long = n > LONG  # to make
    metric = faiss.METRIC_INNER_PRODUCT
    if kind == "flat":
        index: faiss.Index = faiss.IndexFlatIP(d)
    elif kind == "hnsw":
        index = faiss.IndexHNSWFlat(d, HNSW_LINKS, metric)
        index.hnsw.efConstruction = HNSW_BUILD
    else:
        code = f"PQ{d}x4fs" if kind == "ivf_pq" else kind.removeprefix("ivf_").upper()
        index = faiss.index_factory(d, f"IVF{n_lists(n)},{code}", metric)
        index.cp.seed = SEED
        rows = np.random.default_rng(SEED).permutation(n)[: TRAIN_POINTS * n_lists(n)]
        if is_long:
            say(f"index: {kind}, k-means of {len(rows):,} rows in {n_lists(n):,} lists")
        index.train(np.ascontiguousarray(embeddings[np.sort(rows)], np.float32))
    # Rows go to lists, one at a time: which, and in what order, doesn't hang on the threads.
    with _threads(1 if kind == "hnsw" else os.cpu_count() or 1), _found_by_graph(index):
        for start, block in _blocks(embeddings):
            index.add(block)
            if is_long and start % (16 * BLOCK) == 0:
                say(f"index: {kind}, {start + len(block):,} of {n:,} rows")
    return index


@contextlib.contextmanager
def _threads(n: int) -> Iterator[None]:
    """For what FAISS does meanwhile; otherwise it has one."""
    faiss.omp_set_num_threads(n)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(1)


@contextlib.contextmanager
def _found_by_graph(index: faiss.Index) -> Iterator[None]:
    """Meanwhile rows that are added find their lists by a graph over the centroids, where these are many.

    Now and then a row gets its second-best list; the recall that is measured afterwards knows.
    """
    lists = faiss.try_extract_index_ivf(index)
    if lists is None or lists.nlist <= GRAPH_MOST:
        yield
        return
    exact, graph = lists.quantizer, faiss.IndexHNSWFlat(index.d, HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
    graph.add(exact.reconstruct_n(0, lists.nlist))
    lists.quantizer = graph
    try:
        yield
    finally:
        lists.quantizer = exact


def _blocks(embeddings: NDArray[Any]) -> Iterator[tuple[int, Floats]]:
    for start in range(0, len(embeddings), BLOCK):
        yield start, np.ascontiguousarray(embeddings[start : start + BLOCK], np.float32)
