"""What flows through the funnel: Query → Candidates → Scored → Ranking.

Frozen records with arrays in columns: one array a field, not one object an item. Arrays are read-only
from the moment they are in a record (`sealed`). Rows are numbers in the catalogue of one generation and
mean nothing outside it. What a stage may do to these records is checked in funnel.py, nowhere else.
It is over 250 lines because the records of the whole way are read together, in its order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag, StrEnum
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from app.control.deadline import Deadline

Array = NDArray[Any]
Arrays = Mapping[str, NDArray[Any]]
Rows = NDArray[np.int64]
Positions = NDArray[np.intp]  # in columns, where rows are numbers in the catalogue
F32 = NDArray[np.float32]
Scores = F32  # one a candidate
Mask = NDArray[np.bool_]
A = TypeVar("A", bound=np.generic)


class Stage(IntEnum):
    """The stages in order; the number is what `scored_by` and `Ranking.stages` hold."""

    RETRIEVAL = 0
    PRERANKING = 1
    RERANKING = 2
    SELECTION = 3

    @property
    def label(self) -> str:
        return LABELS[self]


LABELS = tuple(stage.name.lower() for stage in Stage)


class Origin(IntFlag):
    """How a candidate came in: a bit for each way."""

    INDEX = 1
    CALLER = 2
    POPULAR = 4


class Outcome(StrEnum):
    """How a stage ended: whole, on a part of its width, not asked, over its time, or in a fault."""

    OK = "ok"
    PARTIAL = "partial"
    SKIPPED = "skipped"
    LATE = "late"
    FAILED = "failed"


def sealed(array: NDArray[A]) -> NDArray[A]:
    """The same array, from now on read-only."""
    array.setflags(write=False)
    return array


def best_first(scores: Scores, rows: Rows, m: int | None = None) -> Positions:
    """Positions of the m best, or of all, in falling order of score; what isn't finite sinks; ties break by row."""
    keys = -scores
    if not (is_finite := np.isfinite(keys)).all():
        keys[~is_finite] = np.inf
    if m is not None and 0 < m < len(keys) // 2:  # with all that tie with the last of them
        near = np.flatnonzero(keys <= np.partition(keys, m - 1)[m - 1])
        return near[best_first(scores[near], rows[near])[:m]]
    at = keys.argsort()
    ranked = keys[at]
    if (is_tie := ranked[1:] == ranked[:-1]).any():  # these by two keys: of all it takes more than twice as long
        tied = np.flatnonzero(np.append(is_tie, False) | np.append(False, is_tie))
        at[tied] = at[tied[np.lexsort((rows[at[tied]], ranked[tied]))]]
    return at


@dataclass(frozen=True, slots=True)
class Person:
    """What is known of the person a request is for.

    history: item rows, oldest first, i64[h]; may be empty.
    fields: request-level feature values by their schema key ("user.age"), each [1, *shape].
    is_known: the id was found in the bundle's user table. is_late: finding out took too long.
    """

    history: Rows
    fields: Arrays
    is_known: bool = False
    is_late: bool = False


@dataclass(frozen=True, slots=True)
class Filter:
    """A condition on an item table; of a row with several values, any may satisfy it.

    values: the allowed values (`eq`, `in`), or None; low, high: inclusive bounds, or None.
    """

    table: str
    values: Array | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Live:
    """One epoch of a catalogue: what it has become since it was loaded (live.py makes the next).

    n_added: rows behind those that were loaded. bits: of all rows, packed, 1 for those that may be found; without any,
    all may. n_lost: of those that were loaded, how many may not. moved: where items are now that were added
    again, row by row.
    """

    epoch: int = 0
    n_added: int = 0
    bits: NDArray[np.uint8] = field(default_factory=lambda: np.empty(0, np.uint8))
    n_lost: int = 0
    moved: Mapping[int, int] = field(default_factory=dict)

    def keeps(self, rows: Rows) -> Mask:
        """bool[len(rows)]: those that may be found."""
        return (self.bits[rows >> 3] >> (rows & 7) & 1).astype(np.bool_) if self.epoch else np.ones(len(rows), np.bool_)

    def present(self, rows: Rows) -> Rows:
        """The rows that these items have now."""
        return np.array([self.moved.get(r, r) for r in rows.tolist()], np.int64) if self.moved else rows


class Sent(NamedTuple):
    """A request as its client sent it, with its id, and the width of re-ranking that it names, if it does."""

    request_id: str
    body: bytes
    rerank_count: int | None


@dataclass(frozen=True, slots=True)
class Query:
    """One request, resolved against one generation: nothing in it is an external id any more.

    candidates: the rows the caller wants ranked, or None to retrieve them.
    candidate_fields: what the caller sent with the candidates, each [len(candidates), *shape].
    exclude: rows that must not be in the answer, sorted.
    rerank_count: the caller's width for re-ranking, or None for the bundle's.
    ignored: by the field of the wire, how much of what was sent there is in no table or vocabulary, or came twice.
    live: the epoch it is answered from.
    """

    request_id: str
    person: Person
    k: int
    filters: tuple[Filter, ...] = ()
    exclude: Rows = field(default_factory=lambda: np.empty(0, np.int64))
    candidates: Rows | None = None
    candidate_fields: Arrays = field(default_factory=dict)
    rerank_count: int | None = None
    ignored: Mapping[str, int] = field(default_factory=dict)
    live: Live = field(default_factory=Live)

    def sent_with(self, rows: Rows) -> dict[str, Array]:
        """What the caller sent with these of its candidates, each [len(rows), *shape]."""
        if not self.candidate_fields or self.candidates is None:
            return {}
        order = np.argsort(self.candidates)
        at = order[np.searchsorted(self.candidates, rows, sorter=order)]
        return {name: values[at] for name, values in self.candidate_fields.items()}


@dataclass(frozen=True, slots=True)
class Candidates:
    """What retrieval found.

    rows: i64[n], unique. retrieval_scores: f32[n]. origins: u32[n], bits of `Origin`.
    user_embedding: f32[d], the user tower's output; zeros if the tower failed.
    """

    rows: Rows
    retrieval_scores: Scores
    origins: NDArray[np.uint32]
    user_embedding: F32

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, at: Positions) -> Candidates:
        """The candidates at these positions, in this order."""
        scores, origins = sealed(self.retrieval_scores[at]), sealed(self.origins[at])
        return Candidates(sealed(self.rows[at]), scores, origins, self.user_embedding)


@dataclass(frozen=True, slots=True)
class Scored:
    """Candidates with a score each, in the candidates' own order.

    scores: f32[n]. scored_by: u8[n], the `Stage` that made each score: where it isn't `stage`, the score is
    carried over from before, brought to this stage's scale by the bundle's calibration.
    """

    candidates: Candidates
    scores: Scores
    stage: Stage
    scored_by: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def is_fresh(self) -> Mask:
        """bool[n]: scored by this stage itself, not carried."""
        return np.equal(self.scored_by, self.stage)

    def top(self, m: int) -> Scored:
        """The m best, best first; all of them in order when there are no more than m."""
        at = best_first(self.scores, self.candidates.rows, m)[:m]
        return Scored(self.candidates.take(at), sealed(self.scores[at]), self.stage, sealed(self.scored_by[at]))


class Degradation(NamedTuple):
    """A recorded departure from the full funnel: where, why, and what took its place."""

    stage: Stage
    reason: str
    substitute: str


class StageReport(NamedTuple):
    """What one stage did for one request. `wanted` and `done` are widths, in candidates."""

    stage: Stage
    wanted: int
    done: int
    n_out: int
    seconds: float
    outcome: Outcome
    shards: int = 0
    shards_ok: int = 0


@dataclass(slots=True)
class RequestScope:
    """The state of one request while it is in the funnel; the only record that grows.

    Widths in candidates: retrieve_width is asked of retrieval, keep go on from pre-ranking, rerank_width
    of those are scored by re-ranking; `width` is what the stage that runs now is given of its own.
    quality: what its widths are multiplied by under load, by the powers in control/quality.py.
    extra_s: what the widths that were not run would have taken, without pre-ranking of what retrieval wasn't to find;
    infinite once time was short.
    is_late: the time of the stages that run now is over, and substitutes take their places.
    reports: of the stages that have run, to be had by `Stage`.
    """

    generation: str
    deadline: Deadline
    retrieve_width: int
    rerank_width: int
    keep: int
    quality: float = 1.0
    width: int = 0
    extra_s: float = 0.0
    is_late: bool = False
    shards: int = 0
    shards_ok: int = 0
    reports: list[StageReport] = field(default_factory=list)
    degradations: list[Degradation] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Ranking:
    """The answer, best first.

    rows: i64[k]. scores: f32[k], all on the re-ranker's scale. values: f32[k], what the order is by.
    stages: u8[k], who scored each item. propensities: f64[k] in (0, 1], the probability that the item
    was shown where it is. reports: of all four stages, to be had by `Stage`. empty_reason: why there is no item, or
    None. expected_ndcg_loss: see control/loss.py; None where the bundle has no measurement of it. extra_s: what the
    full widths would have taken on top, seconds; infinite if time was short.
    """

    rows: Rows
    scores: Scores
    values: Scores
    stages: NDArray[np.uint8]
    propensities: NDArray[np.float64]
    generation: str
    degradations: tuple[Degradation, ...]
    reports: tuple[StageReport, ...] = ()
    empty_reason: str | None = None
    expected_ndcg_loss: float | None = 0.0
    extra_s: float = 0.0

    def __len__(self) -> int:
        return len(self.rows)


class Told(NamedTuple):
    """An answer as it leaves the process that made it: written already, with what is counted and logged of it.

    body: the wire's JSON up to `took_ms`. reports: of all four stages. first: stage and score of the first items.
    is_searched: in the catalogue, not among the caller's own candidates. seconds: of the worker that took the request
    its whole way; None if none did.
    """

    body: bytes
    reports: tuple[StageReport, ...]
    degradations: tuple[Degradation, ...]
    first: tuple[tuple[int, float], ...]
    extra_s: float
    is_searched: bool
    logged: dict[str, Any]
    seconds: float | None = None
