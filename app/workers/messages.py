"""What crosses between the service and its workers: fixed binary records over a Unix socket.

    to a worker     SHARD, STOP (a job), PING
    from a worker   READY (an empty slice; its seconds are a row's), SCORES (a slice), FAILED, BROKEN, PONG

A frame is a header and a payload; everything is little-endian and starts with the format version. A shard carries
row numbers, retrieval scores, the request-level inputs and the *remaining* microseconds, never an instant:
clocks of two processes aren't compared. Its arrays go by name, each with its type and shape, so that nothing about
a bundle's fields is written here; each frame names the bundle's generation.
"""

import math
import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import orjson

from app.flow import Array, Arrays, Candidates, Person, Scores
from app.workers.scoring import Shard

FORMAT = 3
# format version, kind, unused, payload bytes, generation, job
HEADER = struct.Struct("<BBHIQQ")
SHARD_HEADER = struct.Struct("<q")  # remaining µs
ARRAYS_HEADER = struct.Struct("<I")  # bytes of the JSON that says [name, type, shape] of each array
SCORES_HEADER = struct.Struct("<dII?")  # seconds in the model, first row, rows, whether it is the last slice


class Kind(IntEnum):
    READY = 1
    SHARD = 2
    SCORES = 3
    FAILED = 4  # a fault, or told to stop: the rest of the shard is carried
    BROKEN = 5  # a defect of ours: the request is a 500
    STOP = 6
    PING = 7
    PONG = 8


class Frame(NamedTuple):
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


def read_header(header: bytes | bytearray) -> Frame:
    """Raises ValueError for another format version or an unknown kind."""
    version, kind, _, length, generation, job = HEADER.unpack(header)
    if version != FORMAT:
        raise ValueError(f"message format {version}, expected {FORMAT}")
    return Frame(Kind(kind), length, generation, job)


def read_frames(held: bytearray) -> Iterator[tuple[Frame, bytes]]:
    """The whole frames at the head of what was received so far, with their payloads; they are taken out of it."""
    while len(held) >= HEADER.size:
        head = read_header(held[: HEADER.size])
        end = HEADER.size + head.length
        if len(held) < end:
            break
        payload = bytes(held[HEADER.size : end])
        del held[:end]
        yield head, payload


class Slice(NamedTuple):
    """Consecutive rows of a shard, scored. start: the first of them, in the shard. scores: f32[n]."""

    seconds: float
    start: int
    scores: Scores
    is_last: bool


def read_slice(payload: bytes) -> Slice:
    seconds, start, n, is_last = SCORES_HEADER.unpack_from(payload)
    return Slice(seconds, start, np.frombuffer(payload, "<f4", n, SCORES_HEADER.size), is_last)


def write_slice(scored: Slice) -> bytes:
    head = SCORES_HEADER.pack(scored.seconds, scored.start, len(scored.scores), scored.is_last)
    return head + scored.scores.astype("<f4").tobytes()


def write_shard(shard: Shard, remaining_s: float, n_history: int) -> bytes:
    """The shard with the last items of the history, of which the re-ranker reads so many."""
    candidates, history = shard.candidates, shard.person.history
    arrays: dict[str, Array] = {"rows": candidates.rows, "scores": candidates.retrieval_scores}
    arrays |= {"user": candidates.user_embedding, "history": history[max(0, len(history) - n_history) :]}
    arrays |= {**shard.person.fields, **shard.candidate_fields}
    return SHARD_HEADER.pack(int(remaining_s * 1e6)) + write_arrays(arrays)


def read_shard(payload: bytes, now: float) -> Shard:
    """The shard, with its time counted from `now` on this process's clock."""
    (remaining_us,) = SHARD_HEADER.unpack_from(payload)
    arrays = read_arrays(payload, SHARD_HEADER.size)
    rows, scores, user, history = (arrays.pop(name) for name in ("rows", "scores", "user", "history"))
    sent = {key: arrays.pop(key) for key in list(arrays) if key.startswith("candidate.")}
    # A worker doesn't care where a candidate came from.
    candidates = Candidates(rows, scores, np.zeros(len(rows), np.uint32), user)
    return Shard(Person(history, arrays), candidates, sent, now + remaining_us / 1e6)


def write_arrays(arrays: Arrays) -> bytes:
    """Named arrays: the length of the JSON that describes them, the JSON, then their little-endian bytes in turn."""
    wire = {name: array.astype(array.dtype.newbyteorder("<"), copy=False) for name, array in arrays.items()}
    described = orjson.dumps([(name, array.dtype.str, array.shape) for name, array in wire.items()])
    return b"".join([ARRAYS_HEADER.pack(len(described)), described, *(array.tobytes() for array in wire.values())])


def read_arrays(payload: bytes, offset: int = 0) -> dict[str, Array]:
    """The arrays that were written, read-only, in the place where they lie in the payload."""
    start = offset + ARRAYS_HEADER.size
    at = start + ARRAYS_HEADER.unpack_from(payload, offset)[0]
    arrays: dict[str, Array] = {}
    for name, dtype, shape in orjson.loads(payload[start:at]):
        arrays[name] = np.frombuffer(payload, dtype, math.prod(shape), at).reshape(shape)
        at += arrays[name].nbytes
    return arrays
