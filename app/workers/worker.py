"""The child: scores one shard after the other until its socket closes.

The main thread scores, in slices, best candidates first; each is sent as soon as it is there, and one that has
expired is not started. A second thread reads the socket meanwhile: it answers PING, and STOP ends the run that is
under way (`RunOptions.terminate`). Its process ends when the parent closes the socket or dies.
"""

import contextlib
import os
import queue
import socket
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from math import ceil
from pathlib import Path

import numpy as np
import onnxruntime as ort

from app.bundle import load_re_ranker
from app.errors import ServerError, StageFailed
from app.flow import Candidates, Person
from app.workers.messages import Frame, Kind, Slice, frame, generation_number, read_frames, read_shard, write_slice
from app.workers.process import yield_to_everybody
from app.workers.scoring import Shard, ShardModel

BEHIND = 10  # steps of niceness behind the loop: who hands out work comes first, or all wait for it
WARM_UP = (1, 16, 256, 256, 256)  # rows: the runtime plans its memory by shape
AT_ONCE = 1 << 16  # bytes that are taken from the socket
SLICE_S = 3e-3  # what a slice should take: a stop or the deadline costs about so much
LEAST_ROWS, MOST_ROWS = 8, 256  # of a slice: 100 and 500 rows at a time cost the same a row, 8 twice as much


class Run:
    """One shard under way; `stop` may be called from another thread."""

    def __init__(self, asked: Frame, payload: bytes) -> None:
        self.asked, self.payload = asked, payload
        self.options, self.is_stopped = ort.RunOptions(), threading.Event()

    def stop(self) -> None:
        self.is_stopped.set()
        self.options.terminate = True


def work(connection: socket.socket, bundle: Path, digest: str, paced_row_s: float, is_yielding: bool) -> None:
    """The process of one worker, to its end.

    is_yielding: while it gets ready others serve, who mustn't notice. Linux keeps a priority for each thread: that of
    the main one, which will score, stays as it was.
    """
    os.setpgid(0, 0)  # Ctrl-C is for the parent; but in its session, since priorities hold inside one
    os.nice(BEHIND)
    with contextlib.suppress(ServerError):  # the parent was told, and logs it
        with ThreadPoolExecutor(1) as thread:
            if is_yielding:
                thread.submit(yield_to_everybody)
            ready = thread.submit(prepare, connection, bundle, digest, paced_row_s)
        ready.result().serve()


def prepare(connection: socket.socket, bundle: Path, digest: str, paced_row_s: float) -> "Worker":
    """The worker on this socket, warm. What keeps it from working is told to the parent, then raised."""
    try:
        worker = Worker(connection, bundle, digest, paced_row_s)
        worker.warm_up()
    except ServerError as e:
        with connection:
            connection.sendall(frame(Kind.FAILED, generation_number(digest), 0, str(e).encode()))
        raise
    return worker


class Worker:
    """Scores what comes over a socket with a bundle's re-ranker.

    paced_row_s: how long a row takes at least (settings.py says what for).
    """

    def __init__(self, connection: socket.socket, bundle: Path, digest: str, paced_row_s: float = 0.0) -> None:
        self.connection, self.own, self.paced_row_s = connection, generation_number(digest), paced_row_s
        session, self.features, tables = load_re_ranker(bundle, digest)
        self.model = ShardModel(session, self.features.re_ranker, tables)
        self.row_s = 0.0  # of the last slices
        self.inbox: queue.SimpleQueue[Run | None] = queue.SimpleQueue()
        self.sending = threading.Lock()

    def serve(self) -> None:
        """Answer shards until the other end closes."""
        threading.Thread(target=self._listen, daemon=True).start()
        with contextlib.suppress(ConnectionError):  # a parent that is gone is no fault of ours
            self._send(Kind.READY, 0, write_slice(Slice(self.row_s, 0, np.empty(0, np.float32), is_last=True)))
            for run in iter(self.inbox.get, None):
                self._answer(run)

    def warm_up(self) -> None:
        """Run the model at a few widths, on the first items and a person nothing is known of."""
        n_items, d = self.model.tables["embedding"].shape
        person = Person(np.empty(0, np.int64), {key: spec.filled() for key, spec in self.features.fields.items()})
        took = []
        for n in WARM_UP:
            rows, started = np.arange(min(n, n_items)), time.monotonic()
            zeros = np.zeros(len(rows), np.float32)
            candidates = Candidates(rows, zeros, zeros.astype(np.uint32), np.zeros(d, np.float32))
            self.model.score(Shard(person, candidates, {}, 0.0))
            took.append((time.monotonic() - started) / len(rows))
        self.row_s = min(took)  # in the others this process made way for another

    # ------------------------------------------------------------------------------------- one shard

    def _answer(self, run: Run) -> None:
        job, started = run.asked.job, time.monotonic()
        try:
            if run.asked.generation != self.own:
                raise StageFailed("another generation than this worker's")
            self._score(run, read_shard(run.payload, started), started)
        except StageFailed as e:
            self._send(Kind.FAILED, job, b"stopped" if run.is_stopped.is_set() else str(e).encode())
        except ConnectionError:
            raise
        except Exception:  # a defect must reach the request's log, and must not cost the worker
            self._send(Kind.BROKEN, job, traceback.format_exc().encode())

    def _score(self, run: Run, shard: Shard, started: float) -> None:
        """Slice after slice. Raises StageFailed where the shard expires, is stopped or fails."""
        request, n, start, now = self.model.request_inputs(shard.person), len(shard.candidates), 0, started
        while start < n:
            stop = start + slice_rows(self.row_s, n - start)
            if shard.until <= now or run.is_stopped.is_set():
                raise StageFailed("expired before it was done")
            part = shard if stop - start == n else shard.part(start, stop)
            scores = self.model.score(part, request, run.options)
            if self.paced_row_s:
                run.is_stopped.wait(max(0.0, started + stop * self.paced_row_s - time.monotonic()))
            sliced_at, now = now, time.monotonic()
            self.row_s = 0.8 * self.row_s + 0.2 * (now - sliced_at) / (stop - start)
            scored = Slice(now - sliced_at, start, scores, stop == n)
            self._send(Kind.SCORES, run.asked.job, write_slice(scored))
            start = stop

    # ------------------------------------------------------------------------------------- the socket

    def _listen(self) -> None:
        run: Run | None = None
        received = bytearray()
        with contextlib.suppress(OSError, ValueError):  # ValueError: not of this format; the process ends
            while data := self.connection.recv(AT_ONCE):
                received += data
                for asked, payload in read_frames(received):
                    if asked.kind is Kind.SHARD:
                        run = Run(asked, payload)
                        self.inbox.put(run)
                    elif asked.kind is Kind.PING:
                        self._send(Kind.PONG, asked.job)
                    elif run and run.asked.job == asked.job:
                        run.stop()
        if run:
            run.stop()
        self.inbox.put(None)

    def _send(self, kind: Kind, job: int, payload: bytes = b"") -> None:
        with self.sending:
            self.connection.sendall(frame(kind, self.own, job, payload))


def slice_rows(row_s: float, n_left: int) -> int:
    """How many of the rows that are left make the next of equal slices, when a row takes so many seconds."""
    most = max(LEAST_ROWS, min(MOST_ROWS, int(SLICE_S / max(row_s, 1e-9))))
    return ceil(n_left / ceil(n_left / most))
