"""The child: scores one shard after the other until its socket closes.

    python -m app.workers.worker SOCKET_FD BUNDLE DIGEST

One thread, one core. It maps the item tables, opens the re-ranker, warms it, says READY and then answers each
SHARD with SCORES, FAILED or BROKEN. A shard that has expired is not scored. It exits when the parent closes the
socket or dies.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy, faiss and onnxruntime are imported

import contextlib
import socket
import sys
import time
import traceback
from pathlib import Path

import numpy as np

from app.bundle import RerankerParts, load_re_ranker
from app.errors import StageFailed
from app.flow import Candidates, Person
from app.workers.messages import HEADER, Kind, ShardRecord, frame, generation_number, read_header, write_scores
from app.workers.scoring import Shard, score

WARM_UP = (1, 16, 64)  # rows: the runtime plans its memory by shape


def serve(connection: socket.socket, parts: RerankerParts) -> None:
    """Answer shards until the other end closes."""
    record, own = ShardRecord(parts.features), generation_number(parts.digest)
    warm_up(parts)
    connection.sendall(frame(Kind.READY, own, 0))
    while header := read_exactly(connection, HEADER.size):
        asked = read_header(header)
        payload = read_exactly(connection, asked.length)
        if asked.generation != own:
            answer = frame(Kind.FAILED, own, asked.job, b"another generation than this worker's")
        else:
            answer = _answer(parts, record, asked.job, payload)
        connection.sendall(answer)


def _answer(parts: RerankerParts, record: ShardRecord, job: int, payload: bytes) -> bytes:
    own, started = generation_number(parts.digest), time.monotonic()
    try:
        shard = record.read(payload, started)
        if shard.until <= started:
            return frame(Kind.FAILED, own, job, b"expired before it was started")
        scores = score(parts.session, parts.features.re_ranker, parts.tables, shard)
    except StageFailed as e:
        return frame(Kind.FAILED, own, job, str(e).encode())
    except Exception:  # a defect must reach the request's log, and must not cost the worker
        return frame(Kind.BROKEN, own, job, traceback.format_exc().encode())
    return frame(Kind.SCORES, own, job, write_scores(time.monotonic() - started, scores))


def warm_up(parts: RerankerParts) -> None:
    """Run the model at a few widths, on the first items and a person nothing is known of."""
    n_items, d = parts.tables["embedding"].shape
    specs = parts.features.fields.items()
    person = Person(np.empty(0, np.int64), {key: spec.filled() for key, spec in specs})
    for n in WARM_UP:
        rows = np.arange(min(n, n_items))
        zeros = np.zeros(len(rows), np.float32)
        candidates = Candidates(rows, zeros, zeros.astype(np.uint32), np.zeros(d, np.float32))
        score(parts.session, parts.features.re_ranker, parts.tables, Shard(person, candidates, {}, 0.0))


def read_exactly(connection: socket.socket, n: int) -> bytes:
    """n bytes, or none at the end of the stream."""
    received = bytearray()
    while len(received) < n:
        part = connection.recv(n - len(received))
        if not part:
            return b""
        received += part
    return bytes(received)


def main(fd: str, bundle: str, digest: str) -> None:
    # A parent that is gone is no fault of ours.
    with socket.socket(fileno=int(fd)) as connection, contextlib.suppress(ConnectionError):
        serve(connection, load_re_ranker(Path(bundle), digest))


if __name__ == "__main__":
    main(*sys.argv[1:])
