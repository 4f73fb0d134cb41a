"""Retrieval: the person's embedding, then the items nearest to it by inner product.

It owns the user tower and the index, and it alone adds candidates. Filters and exclusions hold inside the search:
where few rows match a filter, or so many were removed that the index finds too few, what is left is searched exactly.
So are items that were added since the index was made; what was removed since is left out of it. Scores are always
exact inner products with the stored embeddings, whatever the index approximates.

A narrower search of an inverted file looks in as much fewer of its lists. One for 600 instead of 2,000 takes 0.33 ms
in .3 of the lists and 0.52 in all of them, and finds .467 and .471 of what the full funnel shows, by gain (W1, 200
requests, AVX-512, 2026-11).

FAISS keeps what it has found in a heap, which takes half of a search for 2,000. Where the bundle says so, a sample
tells first how near an item must be, and all that are so near are collected (`nearest`): the same items. The whole
search takes 0.65 ms so, and 0.92 with the heap; for 600, in .3 of the lists, 0.29 and 0.33 (W1, medians of 300 requests
in turn, AVX-512, 2026-11-28). Not where there are filters, of whose rows the sample says nothing.
"""

from functools import reduce
from math import ceil, inf, sqrt
from operator import and_
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from app.bundle import NO_ROW, Generation, run_model
from app.control.costs import Cost
from app.errors import StageFailed, require
from app.features import request_inputs
from app.flow import F32, Candidates, Filter, Mask, Origin, Query, RequestScope, Rows, Scores, Stage, best_first, sealed

# Up to so many matching rows are searched exactly: 20,000 × 64 take about 5 ms, and a selective search in
# a graph or an inverted file finds too few of them.
EXACT_ROWS = 20_000
# A sample is looked at from so many fetched on: for 300 in 12 lists both take 0.11 ms, for 165 in 7 the heap 0.07 and
# the sample 0.09 (W1, as above, without exact scores). And up to so large a share of the rows removed: it has them
# still, and what passes is a quarter more than is fetched at 2,200.
LEAST_SAMPLED, MOST_LOST = 300, 0.05
BLOCK = 65_536  # rows gathered at a time in an exact search, 16 MB at d = 64


class Retrieval:
    """Query → Candidates, at most as many as wanted; the caller's own candidates are all kept."""

    stage = Stage.RETRIEVAL

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self.retriever = generation.manifest.retrievers[0]
        self.cost = Cost(1e-3, 1e-7)

    def wanted(self, scope: RequestScope, query: Query, given: None) -> int:
        return scope.retrieve_width if query.candidates is None else len(query.candidates)

    async def run(self, scope: RequestScope, query: Query, given: None, until: float) -> Candidates:
        """The search, `scope.width` wide; it can't be stopped half-way."""
        return self.search(query, scope.width)

    def search(self, query: Query, width: int) -> Candidates:
        """Candidates, the nearest first. Raises StageFailed if tower or index fail."""
        user = self.embed(query)
        if query.candidates is not None:
            rows = query.candidates[self._is_allowed(query, query.candidates)]
            return self._candidates(rows, self._inner_products(rows, user), Origin.CALLER, user)
        return self._candidates(*self._search(query, user, width), Origin.INDEX, user)

    def substitute(self, scope: RequestScope, query: Query, given: None) -> Candidates:
        """The bundle's popular items (or the caller's own), all with a typical score, best first."""
        if query.candidates is None:
            rows, origin, most = query.live.present(self.generation.popular), Origin.POPULAR, scope.retrieve_width
        else:
            rows, origin, most = query.candidates, Origin.CALLER, len(query.candidates)
        rows = rows[self._is_allowed(query, rows)][:most]
        typical = self.generation.manifest.calibration.typical_retrieval_score
        # A step well above float32's resolution keeps the order, and moves no score by more than a thousandth.
        step = np.float32(1e-3 * max(abs(typical), 1.0) / max(len(rows), 1))
        scores = np.float32(typical) - np.arange(len(rows), dtype=np.float32) * step
        return self._candidates(rows, scores, origin, np.zeros(self.generation.d, np.float32))

    def embed(self, query: Query) -> F32:
        """The user tower's output, f32[d]."""
        feeds = request_inputs(self.generation.manifest.features.user_tower, self.generation.tables, query.person)
        user = np.asarray(run_model(self.generation.user_tower, feeds), np.float32).reshape(-1)
        is_embedding = user.shape == (self.generation.d,) and bool(np.isfinite(user).all())
        require(is_embedding, "the user tower's output is not a finite embedding", StageFailed)
        return user

    def _candidates(self, rows: Rows, scores: Scores, origin: Origin, user: F32) -> Candidates:
        origins = np.full(len(rows), origin, np.uint32)
        return Candidates(sealed(np.array(rows, np.int64)), sealed(scores), sealed(origins), sealed(user))

    # ------------------------------------------------------------------------------------- search

    def _search(self, query: Query, user: F32, width: int) -> tuple[Rows, Scores]:
        excluded, live = self._excluded(query), query.live
        if not query.filters:
            rows, scores = self._search_index(query, user, width + len(excluded))
            is_allowed = is_other(rows, excluded)
            found = rows[is_allowed][:width], scores[is_allowed][:width]
            if 2 * len(rows) > width or not live.n_lost:
                return found
        n = len(self.generation.ids) + live.n_added  # filters leave few; or what was removed does, of what is near
        eligible = np.ones(n, np.bool_) & self._matching(query.filters, slice(n))
        if live.epoch:
            eligible &= np.unpackbits(live.bits, count=n, bitorder="little").view(np.bool_)
        eligible[excluded[excluded < n]] = False
        if np.count_nonzero(eligible) > max(EXACT_ROWS, width):
            found = self._search_index(query, user, width, eligible) if query.filters else found
            if len(found[0]) == width or not query.filters:
                return found
        return self._search_exactly(np.flatnonzero(eligible), user, width)

    def _search_index(self, query: Query, user: F32, width: int, eligible: Mask | None = None) -> tuple[Rows, Scores]:
        n, live = min(self.generation.index.ntotal, int(width * self.retriever.overfetch)), query.live
        bits = (live.bits if live.n_lost else None) if eligible is None else np.packbits(eligible, bitorder="little")
        # Where a filter leaves few of a list all lists are needed, or what is left would have to be searched exactly.
        share = min(1, width / self.generation.manifest.funnel.retrieve) if eligible is None else 1
        parameters = self._parameters(None if bits is None else faiss.IDSelectorBitmap(bits), n, share)
        try:
            sampled = self.retriever.sampled * (eligible is None and live.n_lost <= MOST_LOST * self.retriever.n)
            rows, scores = nearest(self.generation.index, user[None], n, parameters, sampled)
        except RuntimeError as e:
            raise StageFailed(f"index: {e}") from e
        rows, scores = rows[rows >= 0], scores[rows >= 0]
        if live.n_added:
            fresh = len(self.generation.ids) + np.arange(live.n_added)
            rows = np.append(rows, fresh[live.keeps(fresh) if eligible is None else eligible[fresh]])
        if live.n_added or self.retriever.kind.startswith("ivf"):
            return self._search_exactly(rows, user, width)
        return rows[:width], scores[:width]

    def _parameters(self, selector: Any, n_fetched: int, share: float) -> Any:
        if self.retriever.kind == "flat":
            return faiss.SearchParameters(sel=selector)
        if self.retriever.kind == "hnsw":
            return faiss.SearchParametersHNSW(efSearch=max(self.retriever.search["efSearch"], n_fetched), sel=selector)
        return faiss.SearchParametersIVF(nprobe=ceil(share * self.retriever.search["nprobe"]), sel=selector)

    def _search_exactly(self, rows: Rows, user: F32, width: int) -> tuple[Rows, Scores]:
        scores = self._inner_products(rows, user)
        order = best_first(scores, rows, width)[:width]
        return rows[order], scores[order]

    def _inner_products(self, rows: Rows, user: F32) -> Scores:
        embedding, scores = self.generation.tables["embedding"], np.empty(len(rows), np.float32)
        for start in range(0, len(rows), BLOCK):
            block = rows[start : start + BLOCK]
            scores[start : start + BLOCK] = np.asarray(embedding.take(block, axis=0), np.float32) @ user
        return scores

    # --------------------------------------------------------------------------- what may be found

    def _excluded(self, query: Query) -> Rows:
        """Rows that must not be found, sorted. A caller's candidate may be in the history."""
        if query.candidates is not None or not self.generation.manifest.funnel.exclude_history:
            return query.exclude
        return np.sort(np.concatenate([query.exclude, query.live.present(query.person.history)]))

    def _is_allowed(self, query: Query, rows: Rows) -> Mask:
        """bool[len(rows)]: what filters and exclusions leave."""
        return is_other(rows, self._excluded(query)) & self._matching(query.filters, rows) & query.live.keeps(rows)

    def _matching(self, filters: tuple[Filter, ...], rows: Rows | slice) -> Mask:
        """Whether each of these rows satisfies every filter, of which there may be none."""
        tables = self.generation.tables
        held = (matches(condition, tables[condition.table][rows]) for condition in filters)  # one mask at a time
        return np.asarray(reduce(and_, held, np.True_))


def nearest(index: faiss.Index, user: F32, n: int, parameters: Any, sampled: int) -> tuple[Rows, Scores]:
    """The n best rows and their scores, those of a sampled search in no order; -1 for a row where there are fewer.

    Whatever the sample says, n rows that pass one score hold the n best (of equals at the edge, others than the heap's
    may be kept). Where fewer pass, the heap is filled after all.
    user: f32[1, d]. parameters: of the search. sampled: see `near`; 0 for none.
    """
    if sampled and n >= LEAST_SAMPLED:
        rows, scores = near(index, user, n, parameters, sampled)
        if len(rows) >= n:
            best = np.argpartition(scores, -n)[-n:]
            return rows[best], scores[best]
    (scores,), (rows,) = index.search(user, n, params=parameters)
    return rows, scores


def near(index: faiss.Index, user: F32, n: int, parameters: Any, sampled: int) -> tuple[Rows, Scores]:
    """What passes the score that a sample expects n rows to pass: some more as a rule, none if it is too small.

        e = n / sampled,   score of the sample's best but ceil(e + 3 √e) - 1

    Of a fair sample so many are among the n best once in 700 searches. It is the first of `sampled` parts of all rows,
    which lie together in each list.
    """
    first = faiss.IDSelectorRange(0, index.ntotal // sampled, True)  # of rows in order
    sample = faiss.SearchParametersIVF(nprobe=parameters.nprobe, sel=first)
    (scores,), (rows,) = index.search(user, ceil(n / sampled + 3 * sqrt(n / sampled)), params=sample)
    _, scores, rows = index.range_search(user, float(scores[-1]) if rows[-1] >= 0 else inf, params=parameters)
    return rows, scores


def is_other(rows: Rows, excluded: Rows) -> Mask:
    """bool[len(rows)]: rows that are not among these, which are sorted. For fifty, half of np.isin's time."""
    n = len(excluded)
    return np.asarray(excluded[np.searchsorted(excluded, rows) % n] != rows) if n else np.ones(len(rows), np.bool_)


def matches(condition: Filter, values: NDArray[Any]) -> Mask:
    """bool[n]: whether any of a row's values satisfies the condition; the -1 that pads a row is no value.

    Numbers are compared in the table's own type: 0.1 is what a float32 table holds where 0.1 was stored.
    values: [n] or [n, m].
    """
    held: Mask = np.ones(values.shape, np.bool_)
    with np.errstate(over="ignore"):  # beyond the table's type is infinite in it
        if condition.values is not None:
            wanted = condition.values
            held &= np.isin(values, wanted.astype(values.dtype) if values.dtype.kind == "f" else wanted)
        if condition.low is not None:
            held &= values >= condition.low
        if condition.high is not None:
            held &= values <= condition.high
    if held.ndim == 1:
        return held
    if values.dtype.kind in "iu":
        held &= values != NO_ROW
    return np.asarray(held.any(axis=1))
