"""Scoring one shard: the seam between re-ranking and whatever runs the model.

A shard and the time left go in, scores come out. Two engines stand behind it: worker processes (pool.py) and
the process itself (`InProcess`: packing, evaluation, golden requests). Another could take their place.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from app.bundle import run_model
from app.errors import StageFailed
from app.features import Inputs, ModelInput, Tables, re_ranker_inputs
from app.flow import Candidates, Person, Scores


@dataclass(frozen=True, slots=True)
class Shard:
    """A part of one request's candidates. until: the instant after which nobody wants its scores."""

    person: Person
    candidates: Candidates
    candidate_fields: Mapping[str, NDArray[Any]]
    until: float


class ShardScorer(Protocol):
    """An engine that scores shards."""

    @property
    def n_workers(self) -> int:
        """How many shards it can score at once."""

    def submit(self, shard: Shard) -> "asyncio.Future[Scores]":
        """The shard's scores, f32[n], to come, or StageFailed. Cancel what isn't wanted any more."""


def score(session: ort.InferenceSession, inputs: tuple[ModelInput, ...], tables: Tables, shard: Shard) -> Scores:
    """The re-ranker's scores of these candidates, f32[n], in their order. Raises StageFailed."""
    given = Inputs(tables, shard.person, shard.candidates, shard.candidate_fields)
    scores = np.asarray(run_model(session, re_ranker_inputs(inputs, given)), np.float32)
    if scores.size != len(shard.candidates):
        raise StageFailed(f"re_ranker.onnx gave {scores.size} scores for {len(shard.candidates)} rows")
    return scores.reshape(-1)


class InProcess:
    """Scores in the calling process, at once."""

    n_workers = 1

    def __init__(self, session: ort.InferenceSession, inputs: tuple[ModelInput, ...], tables: Tables) -> None:
        self.session, self.inputs, self.tables = session, inputs, tables

    def submit(self, shard: Shard) -> "asyncio.Future[Scores]":
        answer: asyncio.Future[Scores] = asyncio.get_running_loop().create_future()
        try:
            answer.set_result(score(self.session, self.inputs, self.tables, shard))
        except StageFailed as e:
            answer.set_exception(e)
        return answer
