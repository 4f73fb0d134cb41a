"""Scoring one shard: the seam between re-ranking and whatever runs the model.

A shard and the time left go in, slices of scores come out, best candidates first. Two engines stand behind it:
worker processes (pool.py), and the process itself (`InProcess`: a worker that takes a request its whole way; packing,
evaluation, golden requests). Another could take their place.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple, Protocol

import numpy as np
import onnxruntime as ort

from app.bundle import Generation, run_graph, run_model
from app.control.costs import Cost, Estimate
from app.errors import StageFailed, require
from app.features import Inputs, item_inputs, request_inputs
from app.flow import F32, Array, Arrays, Candidates, Person, Scores

# What a slice should take: a tenth of the time left, or 3 ms, but no more than a third of what is left: one that isn't
# over in time is lost whole.
SLICE_SHARE, SLICE_S, MOST_SHARE = 0.1, 3e-3, 1 / 3
LEAST_ROWS, MOST_ROWS = 8, 1024  # of a slice: 100 and 500 rows at a time cost the same a row, 8 twice as much

Answer = asyncio.Future[None] | Future[None]  # the second where it is there at once
Deliver = Callable[[int, Scores], None]  # the first row of a slice in its shard, and the slice's scores


@dataclass(frozen=True, slots=True)
class Shard:
    """A part of one request's candidates, best first. until: the instant after which nobody wants its scores."""

    person: Person
    candidates: Candidates
    candidate_fields: Arrays
    until: float

    def part(self, start: int, stop: int | None = None) -> "Shard":
        """The rows from `start` up to `stop`."""
        rows = np.arange(len(self.candidates))[start:stop]
        fields = {name: values[start:stop] for name, values in self.candidate_fields.items()}
        return Shard(self.person, self.candidates.take(rows), fields, self.until)


class ShardScorer(Estimate, Protocol):
    """An engine that scores shards, and its estimate of what rows cost over all workers."""

    @property
    def n_workers(self) -> int:
        """How many shards it can score at once, now; may be 0."""

    def submit(self, shard: Shard, deliver: Deliver) -> Answer:
        """Slices go to `deliver` as they come; the future ends with the shard, or in StageFailed.

        No batch of one row reaches the model (see ShardModel.score).

        Cancel it when nobody waits any more: what runs is stopped, and nothing is delivered afterwards.
        """


class ShardModel:
    """The re-ranker with what it reads. What needs no candidate is run once a request, in a graph of its own."""

    def __init__(self, generation: Generation) -> None:
        self.session, self.once, self.tables = generation.re_ranker, generation.once, generation.tables
        self.inputs = generation.manifest.features.re_ranker

    def request_inputs(self, person: Person, user: F32, options: ort.RunOptions | None = None) -> dict[str, Array]:
        """What the model gets once a request, to be handed to `score` with each of its slices. Raises StageFailed."""
        given = request_inputs(self.inputs, self.tables, person, user)
        return given | run_graph(self.once, given, options) if self.once else given

    def score(self, shard: Shard, request: Arrays, options: ort.RunOptions) -> Scores:
        """The scores of these candidates, f32[n], in their order. Raises StageFailed.

        A single one is scored twice: onnxruntime has a way of its own for one row, whose last digits are others, and in
        eight bits a last digit may be a whole step.
        """
        n, given = len(shard.candidates), Inputs(self.tables, shard.person, shard.candidates, shard.candidate_fields)
        items, n_run = item_inputs(self.inputs, given), max(n, 2)
        items = {name: np.repeat(values, 2, axis=0) for name, values in items.items()} if n == 1 else items
        scores = run_model(self.session, {**request, **items}, options)
        require(scores.size == n_run, f"re_ranker.onnx gave {scores.size} scores for {n_run} rows", StageFailed)
        return np.asarray(scores, np.float32).reshape(-1)[:n]


class Run:
    """Work under way; `stop` may be called from another thread."""

    def __init__(self) -> None:
        self.options, self.is_stopped = ort.RunOptions(), threading.Event()

    def stop(self) -> None:
        self.is_stopped.set()
        self.options.terminate = True


class Slice(NamedTuple):
    """Consecutive rows of a shard, scored. start: the first of them, in the shard. scores: f32[n]."""

    seconds: float
    start: int
    scores: Scores
    is_last: bool


class InProcess:
    """Scores in the calling process, at once, in slices.

    paced_row_s: how long a row takes at least (settings.py says what for). run: by which it is stopped.
    row_s: what a row took lately. cost: as measured; without it whoever asks has time.
    """

    n_workers = 1

    def __init__(self, model: ShardModel, paced_row_s: float = 0.0) -> None:
        self.model, self.paced_row_s, self.run, self.row_s = model, paced_row_s, Run(), 0.0
        self.cost: Cost | None = None

    def fits(self, budget_s: float) -> int:
        return self.cost.fits(budget_s) if self.cost else 1 << 30

    def seconds(self, n: int) -> float:
        return self.cost.seconds(n) if self.cost else 0.0

    def slices(self, shard: Shard) -> Iterator[Slice]:
        """Best candidates first. Raises StageFailed where the shard expires, is stopped or fails."""
        embedding, request, n, start = shard.candidates.user_embedding, None, len(shard.candidates), 0
        started = now = time.monotonic()
        try:
            while start < n:
                stop = start + slice_rows(self.row_s, n - start, shard.until - now)
                if shard.until <= now or self.run.is_stopped.is_set():
                    raise StageFailed("expired before it was done")
                request = request or self.model.request_inputs(shard.person, embedding, self.run.options)
                if self.paced_row_s:  # half before the model runs, which an accelerator's users wouldn't notice
                    self.run.is_stopped.wait(max(0.0, started + (start + stop) / 2 * self.paced_row_s - now))
                part = shard if stop - start == n else shard.part(start, stop)
                scores = self.model.score(part, request, self.run.options)
                if self.paced_row_s:
                    self.run.is_stopped.wait(max(0.0, started + stop * self.paced_row_s - time.monotonic()))
                sliced_at, now = now, time.monotonic()
                self.row_s = 0.8 * self.row_s + 0.2 * (now - sliced_at) / (stop - start)
                yield Slice(now - sliced_at, start, scores, stop == n)
                start = stop
        finally:
            if self.cost and start:  # of what was cut short as well: it is the slow ones that are
                self.cost.observe(start, now - started)

    def submit(self, shard: Shard, deliver: Deliver) -> Answer:
        answer: Answer = Future()
        try:
            for scored in self.slices(shard):
                deliver(scored.start, scored.scores)
            answer.set_result(None)
        except StageFailed as e:
            answer.set_exception(e)
        return answer


def slice_rows(row_s: float, n_left: int, left_s: float) -> int:
    """How many of the rows that are left make the next of equal slices, when a row takes row_s."""
    most = min(max(SLICE_S, SLICE_SHARE * left_s), MOST_SHARE * max(left_s, 0.0)) / max(row_s, 1e-9)
    return ceil(n_left / ceil(n_left / max(LEAST_ROWS, min(MOST_ROWS, int(most)))))
