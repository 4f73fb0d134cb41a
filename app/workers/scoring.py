"""Scoring one shard: the seam between re-ranking and whatever runs the model.

A shard and the time left go in, slices of scores come out, best candidates first. Two engines stand behind it:
worker processes (pool.py) and the process itself (`InProcess`: packing, evaluation, golden requests). Another
could take their place.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnxruntime as ort

from app.bundle import run_model
from app.control.costs import Estimate
from app.errors import StageFailed
from app.features import Inputs, ModelInput, Tables, item_inputs, request_inputs
from app.flow import Array, Arrays, Candidates, Person, Scores

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

    def submit(self, shard: Shard, deliver: Deliver) -> "asyncio.Future[None]":
        """Slices go to `deliver` as they come; the future ends with the shard, or in StageFailed.

        Cancel it when nobody waits any more: what runs is stopped, and nothing is delivered afterwards.
        """


class ShardModel:
    """The re-ranker with what it reads."""

    def __init__(self, session: ort.InferenceSession, inputs: tuple[ModelInput, ...], tables: Tables) -> None:
        self.session, self.inputs, self.tables = session, inputs, tables

    def request_inputs(self, person: Person) -> dict[str, Array]:
        """What the model gets once a request, to be handed to `score` with each of its slices."""
        return request_inputs(self.inputs, self.tables, person)

    def score(self, shard: Shard, request: Arrays | None = None, options: ort.RunOptions | None = None) -> Scores:
        """The scores of these candidates, f32[n], in their order. Raises StageFailed."""
        given = Inputs(self.tables, shard.person, shard.candidates, shard.candidate_fields)
        request = self.request_inputs(shard.person) if request is None else request
        scores = run_model(self.session, {**request, **item_inputs(self.inputs, given)}, options)
        if scores.size != len(shard.candidates):
            raise StageFailed(f"re_ranker.onnx gave {scores.size} scores for {len(shard.candidates)} rows")
        return np.asarray(scores, np.float32).reshape(-1)


class InProcess:
    """Scores in the calling process, at once."""

    n_workers = 1

    def __init__(self, model: ShardModel) -> None:
        self.model = model

    def fits(self, budget_s: float) -> int:
        return 1 << 30  # who asks here has time

    def seconds(self, n: int) -> float:
        return 0.0

    def submit(self, shard: Shard, deliver: Deliver) -> "asyncio.Future[None]":
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        try:
            deliver(0, self.model.score(shard))
            answer.set_result(None)
        except StageFailed as e:
            answer.set_exception(e)
        return answer
