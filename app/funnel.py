"""THE RECIPE: one request's way through the funnel, on one screen.

    query ─▶ retrieval ─▶ pre-ranking ─▶ top keep ─▶ re-ranking ─▶ selection ─▶ ranking

It owns the order of the stages, their time, what happens when one is late or fails, and the contracts between
them. It does not own what a stage does (stages/), what replaces what (control/degradation.py) or the time
rules (control/deadline.py). A fault costs quality, never the answer; a broken contract is our bug and raises.
"""

import logging
import time
from concurrent.futures import Executor
from dataclasses import replace
from typing import Protocol, TypeVar

import numpy as np

from app.bundle import Generation
from app.control.deadline import Deadline
from app.control.degradation import REASONS, USER_LATE, degradation
from app.errors import ContractError, DeadlineMissed, StageFailed
from app.flow import Candidates, Fate, Outcome, Query, Ranking, RequestScope, Scored, Stage, StageReport, best_first
from app.stages.preranking import Preranking
from app.stages.reranking import Reranking
from app.stages.retrieval import Retrieval
from app.stages.selection import Selection
from app.workers.scoring import InProcess, ShardScorer

log = logging.getLogger(__name__)

Given = TypeVar("Given", contravariant=True)
Output = TypeVar("Output", Candidates, Scored, covariant=True)


class FunnelStage(Protocol[Given, Output]):
    """What `run` asks of a stage."""

    stage: Stage

    def wanted(self, scope: RequestScope, query: Query, given: Given) -> int:
        """The width at which nothing is given up, in candidates."""

    async def run(self, scope: RequestScope, query: Query, given: Given, until: float) -> Output:
        """The output by the instant `until`, else TimeoutError; StageFailed for a fault."""

    def substitute(self, scope: RequestScope, query: Query, given: Given) -> Output:
        """What takes its place; quick, and never fails."""


class Funnel:
    """The funnel over one generation. `threads` run what holds no Python lock; `scorer` runs the deep model."""

    def __init__(
        self, generation: Generation, scorer: ShardScorer, threads: Executor, reply_reserve_s: float = 0.0
    ) -> None:
        self.generation, self.reply_reserve_s = generation, reply_reserve_s
        self.retrieval = Retrieval(generation, threads)
        self.preranking = Preranking(generation, threads)
        self.reranking = Reranking(generation, scorer)
        self.selection = Selection()

    async def rank(self, query: Query, deadline: Deadline, watched: tuple[int, ...] = ()) -> Ranking:
        """The best min(k, candidates) items, in time. Raises ContractError, which is always our bug."""
        scope = self.open_scope(query, deadline, watched)
        found = await self.run(self.retrieval, scope, query, None)
        coarse = await self.run(self.preranking, scope, query, found)
        fine = await self.run(self.reranking, scope, query, coarse.top(scope.keep))
        return self.select(scope, query, fine)

    def open_scope(self, query: Query, deadline: Deadline, watched: tuple[int, ...] = ()) -> RequestScope:
        """Pin the generation and the widths. `keep` is never under k, so that an answer is never short."""
        widths = self.generation.manifest.funnel
        rerank_width = query.rerank_count or widths.rerank
        return RequestScope(
            generation=self.generation.name,
            deadline=deadline,
            retrieve_width=max(widths.retrieve, rerank_width, query.k),
            rerank_width=rerank_width,
            keep=max(rerank_width, query.k),
            watched=watched,
            degradations=[USER_LATE] if query.person.is_late else [],
        )

    async def run(self, stage: FunnelStage[Given, Output], scope: RequestScope, query: Query, given: Given) -> Output:
        """One stage within its budget: its output, or what takes its place; checked and reported."""
        started = time.monotonic()
        share = getattr(self.generation.manifest.funnel.budgets, stage.stage.label)
        until = started + scope.deadline.limit(share, started, self.reply_reserve_s)
        wanted, fault = stage.wanted(scope, query, given), None
        try:
            output = await stage.run(scope, query, given, until)
        except TimeoutError:
            output, fault = stage.substitute(scope, query, given), Outcome.LATE
        except StageFailed as e:
            log.warning("%s failed: %s", stage.stage.label, e)
            output, fault = stage.substitute(scope, query, given), Outcome.FAILED
        _check_output(given, output, self.generation.n_items)
        done = 0 if fault else _n_done(output)
        now = time.monotonic()
        outcome = fault or _outcome(stage.stage, wanted, done, is_late=now >= until)
        report = StageReport(stage.stage, wanted, done, len(output), now - started, outcome)
        scope.note(replace(report, fates=_fates(scope.watched, output)))
        if outcome in REASONS:
            scope.degradations.append(degradation(stage.stage, outcome))
        return output

    def select(self, scope: RequestScope, query: Query, fine: Scored) -> Ranking:
        """The answer; selection is arithmetic on k items and has no fallback."""
        started = time.monotonic()
        ranking = self.selection.select(scope, query, fine)
        _check_ranking(query, fine, ranking)
        took, outcome = time.monotonic() - started, Outcome.OK if len(fine) else Outcome.SKIPPED
        report = StageReport(Stage.SELECTION, len(fine), len(fine), len(ranking), took, outcome)
        scope.note(replace(report, fates=_fates(scope.watched, fine, shown=ranking.rows.tolist())))
        return replace(ranking, reports=tuple(scope.reports))


def offline_funnel(generation: Generation, threads: Executor) -> Funnel:
    """The same funnel with the deep model in this process: packing, evaluation, golden requests."""
    features = generation.manifest.features
    return Funnel(generation, InProcess(generation.re_ranker, features.re_ranker, generation.tables), threads)


def require_full(ranking: Ranking) -> Ranking:
    """The ranking, unless something was given up. Raises DeadlineMissed that says what."""
    if ranking.degradations:
        lost = ", ".join(f"{d.stage.label} {d.reason}" for d in ranking.degradations)
        raise DeadlineMissed(f"the full funnel did not fit: {lost}")
    return ranking


def _n_done(output: Candidates | Scored) -> int:
    return len(output) if isinstance(output, Candidates) else int(output.is_fresh.sum())


def _outcome(stage: Stage, wanted: int, done: int, *, is_late: bool) -> Outcome:
    if done >= wanted or stage is Stage.RETRIEVAL:  # a catalogue may have fewer items than are wanted
        return Outcome.OK if wanted else Outcome.SKIPPED
    if done:
        return Outcome.PARTIAL
    return Outcome.LATE if is_late else Outcome.FAILED


def _fates(watched: tuple[int, ...], output: Candidates | Scored, shown: list[int] | None = None) -> tuple[Fate, ...]:
    """What became of each watched row in this output; `shown` is the order that was chosen, if one was."""
    if not watched:
        return ()
    if isinstance(output, Candidates):
        rows, scores = output.rows, output.retrieval_scores
    else:
        rows, scores = output.candidates.rows, output.scores
    score = dict(zip(rows.tolist(), scores.tolist(), strict=True))
    order = rows[best_first(scores, rows)].tolist() if shown is None else shown
    rank = {row: i for i, row in enumerate(order)}
    return tuple(Fate(row, score.get(row), rank.get(row), _why_dropped(row, rank, score)) for row in watched)


def _why_dropped(row: int, rank: dict[int, int], score: dict[int, float]) -> str | None:
    if row in rank:
        return None
    return "below the k best" if row in score else "did not reach this stage"


# ------------------------------------------------------------------------------------------ contracts


def _check_output(given: object, output: Candidates | Scored, n_items: int) -> None:
    """Only retrieval adds candidates; a scorer keeps length and order."""
    if isinstance(output, Candidates):
        return _check_candidates(output, n_items)
    return _check_scored(given.candidates if isinstance(given, Scored) else given, output)


def _check_candidates(found: Candidates, n_items: int) -> None:
    n, rows = len(found), found.rows
    if rows.dtype != np.int64 or found.retrieval_scores.shape != (n,) or found.origins.shape != (n,):
        raise ContractError("retrieval: columns of different lengths, or rows that aren't int64")
    if n and (rows.min() < 0 or rows.max() >= n_items or len(np.unique(rows)) != n):
        raise ContractError("retrieval: rows outside the catalogue, or the same row twice")


def _check_scored(given: object, scored: Scored) -> None:
    columns = scored.scores.shape, scored.scored_by.shape
    if scored.candidates is not given or set(columns) != {(len(scored.candidates),)}:
        raise ContractError(f"{scored.stage.label}: a scorer keeps length and order")
    if scored.scores.dtype != np.float32:
        raise ContractError(f"{scored.stage.label}: scores are {scored.scores.dtype}, not float32")


def _check_ranking(query: Query, fine: Scored, ranking: Ranking) -> None:
    rows = ranking.rows
    if len(rows) != min(query.k, len(fine)) or len(np.unique(rows)) != len(rows):
        raise ContractError(f"selection: {len(rows)} items of {len(fine)} candidates for k = {query.k}")
    if {c.shape for c in (ranking.scores, ranking.values, ranking.stages, ranking.propensities)} != {rows.shape}:
        raise ContractError("selection: columns of different lengths")
    if not np.isin(rows, fine.candidates.rows).all():
        raise ContractError("selection: an item that was no candidate")
    if len(rows) and not (ranking.propensities.min() > 0 and ranking.propensities.max() <= 1):
        raise ContractError("selection: a propensity outside (0, 1]")
