"""THE RECIPE: one request's way through the funnel, on one screen.

    query ─▶ retrieval ─▶ pre-ranking ─▶ top keep ─▶ re-ranking ─▶ selection ─▶ ranking

It owns the order of the stages, their time, what happens when one is late or fails, and the contracts between
them. It does not own what a stage does (stages/), what replaces what (control/degradation.py) or the time
rules (control/deadline.py). A fault costs quality, never the answer; a broken contract is our bug and raises.
It is over 250 lines because what holds for every stage, time, substitutes, reports, contracts, is said here once.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np

from app.bundle import Generation
from app.control.costs import Estimate
from app.control.deadline import Deadline
from app.control.degradation import BY_TIME, REASONS, USER_LATE, degradation, narrowed
from app.control.loss import expected_loss
from app.control.quality import POWERS
from app.errors import ContractError, Deadly, StageFailed, require
from app.flow import Candidates, Outcome, Query, Ranking, RequestScope, Scored, Sent, Stage, StageReport, Told
from app.settings import Limits
from app.stages import preranking, reranking, retrieval, selection
from app.workers.scoring import InProcess, ShardModel, ShardScorer

log = logging.getLogger(__name__)

# Of the time left, for what comes after retrieval or pre-ranking. No more: of the full funnel's NDCG@20 an answer on W1
# loses .09 with a quarter re-ranked, .45 with a quarter retrieved, .44 with none pre-ranked, all with popular items.
LATER_SHARE = {Stage.RETRIEVAL: 0.25, Stage.PRERANKING: 0.25, Stage.RERANKING: 0.0}
# Of the time left, for what takes the place of a search that hangs; and of that, to look up who asks. Where this is
# less than so many seconds it isn't begun: a look-up that is given up goes on in its thread, and delays what comes
# after it.
LATE_SHARE, LATE_S = 0.3, 1e-3
# A search is begun where it is expected to be over in time; or where so much of the timeout is left, however dear it is
# thought to be: nobody would learn that it isn't. What is left besides is not all for waiting: answers have a way back.
TRIED_SHARE, WAIT_SHARE = 1 / 3, 0.9
MOST_POPULAR = 10_000  # that the loop ranks itself: 0.6 ms with a small request (W1, AVX-512, 2026-11)

Given = TypeVar("Given", contravariant=True)
Output = TypeVar("Output", Candidates, Scored, covariant=True)
Resolve = Callable[..., Query]
# A request half-way: the query as resolved, and what pre-ranking left of the catalogue, best first.
Narrowed = tuple[Query, RequestScope, Scored]


class FunnelStage(Protocol[Given, Output]):
    """What `run` asks of a stage."""

    stage: Stage

    def wanted(self, scope: RequestScope, query: Query, given: Given) -> int:
        """The width at which nothing is given up, in candidates."""

    @property
    def cost(self) -> Estimate:
        """What widths of it are expected to take."""

    async def run(self, scope: RequestScope, query: Query, given: Given, until: float) -> Output:
        """The output, `scope.width` wide; TimeoutError at `until`, if it can stop; StageFailed for a fault."""

    def substitute(self, scope: RequestScope, query: Query, given: Given) -> Output:
        """What takes its place; quick, and never fails."""


class Runner(Protocol):
    """Processes that take a request its whole way."""

    async def rank(self, sent: Sent, deadline: Deadline, quality: float, until: float) -> Told:
        """The answer. Raises what resolving the request raises; StageFailed, after which others may do the work.

        It fails where nobody has begun by the instant `until`, and where several workers had better share the work.
        """


class Funnel:
    """The funnel over one generation; `scorer` runs the deep model.

    runner: runs requests that come as they were sent, if it can. Stages guess their costs until somebody measures them.
    """

    def __init__(
        self, generation: Generation, scorer: ShardScorer, reserve_s: float = 0.0, runner: Runner | None = None
    ) -> None:
        self.generation, self.reserve_s, self.runner = generation, reserve_s, runner
        self.retrieval = retrieval.Retrieval(generation)
        self.preranking = preranking.Preranking(generation)
        self.reranking = reranking.Reranking(generation, scorer)

    async def rank(
        self, resolve: Resolve, deadline: Deadline, quality: float = 1.0, sent: Sent | None = None
    ) -> tuple[Query, Ranking] | Told:
        """The best min(k, candidates) items, in time; told where the runner found them.

        resolve(is_late=…) says who asks for what, in rows of the generation; late, without looking the person up.
        sent: the same, not yet resolved, for the runner.
        Raises: what `resolve` raises; ContractError, which is always our bug.
        """
        is_deadly = False
        if self.runner and sent:
            left_s = deadline.limit(now := time.monotonic(), self.reserve_s)
            try:
                async with asyncio.timeout(left_s):
                    until = now + WAIT_SHARE * (left_s - self.narrow_s(quality, deadline.timeout_s))
                    return await self.runner.rank(sent, deadline, quality, until)
            except (StageFailed, TimeoutError) as e:
                is_deadly = isinstance(e, Deadly)
        is_small = len(self.generation.popular) <= MOST_POPULAR and len(sent.body if sent else b"") <= Limits.LARGE_BODY
        narrowed = await self._narrowed(resolve, deadline, quality, is_small=is_small, is_deadly=is_deadly)
        narrowed[1].is_late = is_deadly  # nor re-ranked
        return await self.finish(*narrowed)

    async def narrow(
        self, resolve: Resolve, deadline: Deadline, quality: float = 1.0, *, is_late: bool = False
    ) -> Narrowed:
        """The first half, which never waits. is_late: there is no time for it, substitutes take the places."""
        scope = self.open_scope(query := resolve(is_late=False), deadline, quality)
        scope.is_late = is_late
        found = await self.run(self.retrieval, scope, query, None)
        coarse = await self.run(self.preranking, scope, query, found)
        scope.is_late = False
        if query.candidates is None:
            self.retrieval.cost.learn(scope.reports[Stage.RETRIEVAL])
        self.preranking.cost.learn(scope.reports[Stage.PRERANKING])
        return query, scope, coarse.top(scope.keep)

    async def finish(self, query: Query, scope: RequestScope, coarse: Scored) -> tuple[Query, Ranking]:
        """The second half: the query as resolved, and the answer."""
        return query, self.select(scope, query, await self.run(self.reranking, scope, query, coarse))

    async def _narrowed(
        self, resolve: Resolve, deadline: Deadline, quality: float, *, is_small: bool, is_deadly: bool
    ) -> Narrowed:
        """The first half by a thread; where its time is over without a search, and then without the person.

        is_small: the last takes less than to wait for a thread beside busy workers; else up to 10 ms.
        is_deadly: without a search in any case.
        """
        narrow = partial(self.narrow, resolve, deadline, quality)
        search_s = (1 - LATE_SHARE) * deadline.limit(time.monotonic(), self.reserve_s)
        if not is_deadly and search_s > self.narrow_s(quality, deadline.timeout_s):
            with suppress(TimeoutError):  # a search can't be stopped: it goes on in its thread, unheard
                async with asyncio.timeout(search_s):
                    return await asyncio.to_thread(outcome_of, narrow)
        if (late_s := LATE_SHARE * deadline.limit(time.monotonic(), self.reserve_s)) >= LATE_S:
            with suppress(TimeoutError):  # who asks may still be found out
                async with asyncio.timeout(late_s):
                    return await asyncio.to_thread(outcome_of, partial(narrow, is_late=True))
        nameless = partial(self.narrow, lambda is_late: resolve(is_late=True), deadline, quality, is_late=True)
        return outcome_of(nameless) if is_small else await asyncio.to_thread(outcome_of, nameless)

    def seconds(self, quality: float) -> float:
        """What a request is expected to take at this quality where all workers are busy."""
        n = int(quality ** POWERS[Stage.RERANKING] * self.generation.manifest.funnel.rerank)
        return self.narrow_s(quality) / max(self.reranking.scorer.n_workers, 1) + self.reranking.cost.seconds(n)

    def narrow_s(self, quality: float, timeout_s: float = math.inf) -> float:
        """What the first half is expected to take, or what it is tried in."""
        widths = self.generation.manifest.funnel
        n = max(int(quality * widths.retrieve), widths.rerank)
        return min(self.retrieval.cost.seconds(n) + self.preranking.cost.seconds(n), TRIED_SHARE * timeout_s)

    def open_scope(self, query: Query, deadline: Deadline, quality: float = 1.0) -> RequestScope:
        """Pin the generation and the widths. `keep` is never under k, so that an answer is never short."""
        widths = self.generation.manifest.funnel
        rerank_width = query.rerank_count or widths.rerank
        keep = max(rerank_width, query.k)
        scope = RequestScope(self.generation.name, deadline, max(widths.retrieve, keep), rerank_width, keep, quality)
        if query.person.is_late:
            scope.degradations.append(USER_LATE)
        return scope

    async def run(self, stage: FunnelStage[Given, Output], scope: RequestScope, query: Query, given: Given) -> Output:
        """One stage at the width that fits its budget: its output, or what takes its place; checked and reported."""
        started, fault, wanted = time.monotonic(), None, stage.wanted(scope, query, given)
        budget_s = scope.deadline.limit(started, self.reserve_s) * (1 - LATER_SHARE[stage.stage])
        share, fits, until = scope.quality ** POWERS[stage.stage], stage.cost.fits(budget_s), started + budget_s
        # Retrieval finds no fewer than go on; the caller's own are all kept.
        least = 0 if stage is not self.retrieval else scope.keep if query.candidates is None else wanted
        scope.width, narrowing = narrowed(wanted, share, fits, least)
        try:
            if scope.is_late or (wanted and not scope.width):
                raise TimeoutError
            output = await stage.run(scope, query, given, until)
        except TimeoutError:
            output, fault = stage.substitute(scope, query, given), Outcome.LATE if wanted else None
        except StageFailed as e:
            log.warning("%s failed: %s", stage.stage.label, e)
            output, fault = stage.substitute(scope, query, given), Outcome.FAILED
        _check_output(given, output, self.generation.n_items)
        done = 0 if fault else len(output) if isinstance(output, Candidates) else int(output.is_fresh.sum())
        now = time.monotonic()
        is_late = now >= until or fault is Outcome.LATE
        outcome = fault or _outcome(stage.stage, wanted, done, narrowing, is_late=is_late)
        shards = scope.shards, scope.shards_ok  # of re-ranking; before it there are none
        scope.reports.append(StageReport(stage.stage, wanted, done, len(output), now - started, outcome, *shards))
        if outcome in REASONS:
            why = narrowing if not fault and (done >= scope.width or stage is self.retrieval) else None
            scope.degradations.append(degradation(stage.stage, outcome, why))
        saved_s = stage.cost.seconds(wanted) - stage.cost.seconds(min(done, wanted))
        is_short_of_time = narrowing == BY_TIME or (is_late and done < scope.width)
        scope.extra_s += math.inf if is_short_of_time else saved_s
        return output

    def select(self, scope: RequestScope, query: Query, fine: Scored) -> Ranking:
        """The answer; selection is arithmetic on k items and has no fallback."""
        started = time.monotonic()
        ranking = selection.select(scope, query, fine)
        _check_ranking(query, fine, ranking)
        took, outcome = time.monotonic() - started, Outcome.OK if len(fine) else Outcome.SKIPPED
        scope.reports.append(StageReport(Stage.SELECTION, len(fine), len(fine), len(ranking), took, outcome))
        reports, extra_s, table = tuple(scope.reports), max(0.0, scope.extra_s), self.generation.manifest.loss
        loss = (expected_loss(table, scope, fine) if table else None) if scope.degradations else 0.0
        return replace(ranking, reports=reports, expected_ndcg_loss=loss, extra_s=extra_s)


def offline_funnel(generation: Generation) -> Funnel:
    """The same funnel with the deep model in this process: packing, evaluation, golden requests."""
    return Funnel(generation, InProcess(ShardModel(generation)))


def outcome_of(work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """The outcome of a coroutine that never waits, without an event loop."""
    try:
        work().send(None)
    except StopIteration as finished:
        return finished.value
    raise RuntimeError("it waited")


def _outcome(stage: Stage, wanted: int, done: int, narrowing: str | None, *, is_late: bool) -> Outcome:
    # A catalogue may have fewer items than are wanted of retrieval.
    if done >= wanted or (stage is Stage.RETRIEVAL and not narrowing):
        return Outcome.OK if wanted else Outcome.SKIPPED
    return Outcome.PARTIAL if done else Outcome.LATE if is_late else Outcome.FAILED


# ------------------------------------------------------------------------------------------ contracts


def _check_output(given: object, output: Candidates | Scored, n_items: int) -> None:
    """Only retrieval adds candidates; a scorer keeps length and order."""
    if isinstance(output, Candidates):
        n, rows = len(output), output.rows
        fits = rows.dtype == np.int64 and output.retrieval_scores.shape == output.origins.shape == (n,)
        require(fits, "retrieval: columns of one length, rows of type int64", ContractError)
        ranked = np.sort(rows)
        is_known = not n or (ranked[0] >= 0 and ranked[-1] < n_items and (ranked[1:] != ranked[:-1]).all())
        require(bool(is_known), "retrieval: rows of the catalogue, each once", ContractError)
    else:
        label, candidates = output.stage.label, given.candidates if isinstance(given, Scored) else given
        require(output.candidates is candidates, f"{label}: a scorer keeps its candidates", ContractError)
        is_whole = output.scores.shape == output.scored_by.shape == (len(output.candidates),)
        is_whole &= output.scores.dtype == np.float32
        require(is_whole, f"{label}: a float32 score for each candidate", ContractError)


def _check_ranking(query: Query, fine: Scored, ranking: Ranking) -> None:
    rows, p = ranking.rows, ranking.propensities
    n, shown = min(query.k, len(fine)), set(rows.tolist())
    require(len(rows) == len(shown) == n, f"selection: min(k, candidates) = {n} items, each once", ContractError)
    columns = {c.shape for c in (ranking.scores, ranking.values, ranking.stages, p)}
    require(columns == {rows.shape}, "selection: columns of one length", ContractError)
    require(shown.issubset(fine.candidates.rows.tolist()), "selection: only candidates", ContractError)
    require(bool(((p > 0) & (p <= 1)).all()), "selection: propensities in (0, 1]", ContractError)
