"""What crosses between the service and its workers: frames over Unix sockets.

    to a worker     RANK (a request: Asked), SHARD (a Shard and the seconds left);
                    on a socket of their own STOP (a job), PING
    from a worker   READY (seconds a row), RANKED (Told), SCORES (a Slice), FAILED (the exception that ended it), PONG

A frame is a header, little-endian with the format version first, and what is said, pickled: both ends are forked from
one process, and no one else has the sockets. What has a time carries the *remaining* seconds, never an instant: clocks
of two processes aren't compared. Each frame names the bundle's generation.
"""

import pickle
import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import Any, NamedTuple

from app.control.deadline import Deadline
from app.flow import Sent

FORMAT = 6
# Seconds that an answer is on its way, and that an item of it takes to be written: 0.9 µs hot (2026-11), colder twice.
WAY_BACK_S, ITEM_S = 2e-3, 2e-6
# format version, kind, unused, payload bytes, generation, job
HEADER = struct.Struct("<BBHIQQ")


class Kind(IntEnum):
    READY = 1
    SHARD = 2
    SCORES = 3
    FAILED = 4  # a fault, or told to stop: the rest is carried; a wrong request; a defect of ours: the request is a 500
    STOP = 5
    PING = 6
    PONG = 7
    RANK = 8
    RANKED = 9
    CHANGE = 10  # of the items: not answered


class Frame(NamedTuple):
    """A header that was read: what is said, by or to which generation, and about which job."""

    kind: Kind
    generation: int
    job: int


class Asked(NamedTuple):
    """A request on its way to a worker. left_s: of its timeout."""

    sent: Sent
    left_s: float
    timeout_s: float
    quality: float

    def deadline(self, now: float, k: int) -> Deadline:
        """On this process's clock, earlier by what it takes to write an answer of k items, and by its way back."""
        back_s = min(WAY_BACK_S + ITEM_S * k, 0.1 * self.timeout_s)
        return Deadline(now + self.left_s - self.timeout_s, self.timeout_s - back_s)


def generation_number(digest: str) -> int:
    """The first 64 bits of a generation's digest, as frames carry it."""
    return int(digest[:16], 16)


def frame(kind: Kind, generation: int, job: int, said: object = None) -> bytes:
    """A whole frame, ready to be sent."""
    payload = b"" if said is None else pickle.dumps(said)
    return HEADER.pack(FORMAT, kind, 0, len(payload), generation, job) + payload


def read_frames(held: bytearray) -> Iterator[tuple[Frame, Any]]:
    """The whole frames at the head of what was received so far, with what they say; they are taken out of it.

    Raises ValueError for another format version or an unknown kind.
    """
    while len(held) >= HEADER.size:
        version, kind, _, length, generation, job = HEADER.unpack_from(held)
        if version != FORMAT:
            raise ValueError(f"message format {version}, expected {FORMAT}")
        head, end = Frame(Kind(kind), generation, job), HEADER.size + length
        if len(held) < end:
            break
        payload = bytes(held[HEADER.size : end])
        del held[:end]
        yield head, pickle.loads(payload) if payload else None  # noqa: S301  (from our own fork)
