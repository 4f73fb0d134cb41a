"""What crosses between the service and its workers: fixed binary records over a Unix socket.

A frame is a header and a payload; everything is little-endian and starts with the format version. A shard carries
row numbers, retrieval scores, the request-level inputs and the *remaining* microseconds, never an instant:
clocks of two processes aren't compared. Array lengths follow from the header of the record and from the
feature schema, which both sides read from the same bundle; each frame names the bundle's generation.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.features import FeatureSchema, FieldSpec
from app.flow import Candidates, Person, Rows, Scores
from app.workers.scoring import Shard

FORMAT = 1
# format version, kind, unused, payload bytes, generation, job
HEADER = struct.Struct("<BBHIQQ")
# remaining µs, rows, history items, user embedding length, candidate fields sent (a bit for each)
SHARD_HEADER = struct.Struct("<qIIIQ")
SCORES_HEADER = struct.Struct("<dI")  # seconds in the model, rows


class Kind(IntEnum):
    READY = 1
    SHARD = 2
    SCORES = 3
    FAILED = 4  # a fault: the shard is carried
    BROKEN = 5  # a defect of ours: the request is a 500


@dataclass(frozen=True, slots=True)
class Frame:
    """A header that was read: what follows it and which job it is about."""

    kind: Kind
    length: int
    generation: int
    job: int


def generation_number(digest: str) -> int:
    """The first 64 bits of a generation's digest, as frames carry it."""
    return int(digest[:16], 16)


def frame(kind: Kind, generation: int, job: int, payload: bytes = b"") -> bytes:
    """A whole frame, ready to be sent."""
    return HEADER.pack(FORMAT, kind, 0, len(payload), generation, job) + payload


def read_header(header: bytes) -> Frame:
    """Raises ValueError for another format version or an unknown kind."""
    version, kind, _, length, generation, job = HEADER.unpack(header)
    if version != FORMAT:
        raise ValueError(f"message format {version}, expected {FORMAT}")
    return Frame(Kind(kind), length, generation, job)


def read_scores(payload: bytes) -> tuple[float, Scores]:
    """Seconds in the model, and f32[n]."""
    seconds, n = SCORES_HEADER.unpack_from(payload)
    return seconds, np.frombuffer(payload, "<f4", n, SCORES_HEADER.size)


def write_scores(seconds: float, scores: Scores) -> bytes:
    return SCORES_HEADER.pack(seconds, len(scores)) + scores.astype("<f4").tobytes()


class ShardRecord:
    """Writes and reads shards of one bundle; the schema fixes which fields there are, and their sizes."""

    def __init__(self, features: FeatureSchema) -> None:
        fields = sorted(features.fields.items())
        self.person = [(key, spec) for key, spec in fields if not key.startswith("candidate.")]
        self.candidate = [(key, spec) for key, spec in fields if key.startswith("candidate.")]
        self.history = max((i.length for i in features.re_ranker), default=0)

    def write(self, shard: Shard, remaining_s: float) -> bytes:
        """Only as much of the history goes along as the re-ranker reads."""
        candidates = shard.candidates
        history = shard.person.history[len(shard.person.history) - self.history :]
        if len(shard.person.history) < self.history:
            history = shard.person.history
        sent = sum(1 << bit for bit, (key, _) in enumerate(self.candidate) if key in shard.candidate_fields)
        parts = [
            SHARD_HEADER.pack(
                int(remaining_s * 1e6), len(candidates), len(history), len(candidates.user_embedding), sent
            ),
            candidates.rows.astype("<i8").tobytes(),
            candidates.retrieval_scores.astype("<f4").tobytes(),
            candidates.user_embedding.astype("<f4").tobytes(),
            history.astype("<i8").tobytes(),
        ]
        parts += [_raw(spec, shard.person.fields[key]) for key, spec in self.person]
        parts += [
            _raw(spec, shard.candidate_fields[key]) for key, spec in self.candidate if key in shard.candidate_fields
        ]
        return b"".join(parts)

    def read(self, payload: bytes, now: float) -> Shard:
        """The shard, with its time counted from `now` on this process's clock."""
        remaining_us, n, n_history, d, sent = SHARD_HEADER.unpack_from(payload)
        take = _Cursor(payload, SHARD_HEADER.size)
        rows: Rows = take("<i8", n)
        scores: Scores = take("<f4", n)
        user: NDArray[np.float32] = take("<f4", d)
        history: Rows = take("<i8", n_history)
        fields = {key: take.field(spec, 1) for key, spec in self.person}
        candidate_fields: Mapping[str, NDArray[Any]] = {
            key: take.field(spec, n) for bit, (key, spec) in enumerate(self.candidate) if sent >> bit & 1
        }
        # A worker doesn't care where a candidate came from.
        candidates = Candidates(rows, scores, np.zeros(n, np.uint32), user)
        return Shard(Person(history, fields), candidates, candidate_fields, now + remaining_us / 1e6)


class _Cursor:
    """Takes arrays off a payload, one after the other."""

    def __init__(self, payload: bytes, offset: int) -> None:
        self.payload, self.offset = payload, offset

    def __call__(self, dtype: str, n: int) -> NDArray[Any]:
        array = np.frombuffer(self.payload, dtype, n, self.offset)
        self.offset += array.nbytes
        return array

    def field(self, spec: FieldSpec, n: int) -> NDArray[Any]:
        size = n * int(np.prod(spec.shape))
        return self(_wire_dtype(spec), size).reshape(n, *spec.shape)


def _wire_dtype(spec: FieldSpec) -> str:
    return "<i8" if spec.dtype == "int64" else "<f4"


def _raw(spec: FieldSpec, values: NDArray[Any]) -> bytes:
    return values.astype(_wire_dtype(spec)).tobytes()
