"""The child: takes a request its whole way, or scores a shard; one job after the other until its socket closes.

The main thread reads jobs and does them: a request by the funnel's own recipe (funnel.py) with the deep model in this
process, a shard in slices, best candidates first, each sent as soon as it is there. What has expired is not started.
A second thread reads a second socket: it answers PING, and STOP ends the job that is under way
(`RunOptions.terminate`). The process ends when the parent closes the sockets or dies.
"""

import contextlib
import os
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from app import live, wire
from app.bundle import load
from app.control.costs import Cost
from app.errors import ContractError, InvalidRequest, ServerError, StageFailed, require
from app.flow import Stage, Told
from app.funnel import Funnel, offline_funnel, outcome_of
from app.warmup import UNHURRIED_S, offline_query, rank_offline
from app.workers.messages import Asked, Frame, Kind, frame, generation_number, read_frames
from app.workers.process import yield_to_everybody
from app.workers.scoring import InProcess, Run, ShardModel

BEHIND = 10  # steps of niceness behind the loop: who hands out work comes first, or all wait for it
AT_ONCE = 1 << 18  # bytes that are taken from a socket
FIXED_S = 1e-4  # of scoring in this process, before the first row


@dataclass(frozen=True, slots=True)
class Given:
    """What a worker is told besides its bundle: see settings.py; costs of both searching stages; what became
    of the items.

    sla_s: what is slow whatever a request allows: by it the pool decides who shares.
    """

    paced_row_s: float = 0.0
    reserve_s: float = 0.0
    room: int = 0
    costs: tuple[Cost, Cost] = field(default_factory=lambda: (Cost(1e-3, 1e-7), Cost(1e-3, 1e-7)))
    sla_s: float = float("inf")
    changes: live.Change | None = None


Sockets = tuple[socket.socket, socket.socket]  # for jobs and their answers; for STOP and PING


def work(sockets: Sockets, bundle: Path, digest: str, given: Given, is_yielding: bool) -> None:
    """The process of one worker, to its end.

    is_yielding: while it gets ready others serve, who mustn't notice. Linux keeps a priority for each thread: that of
    the main one, which will score, stays as it was.
    """
    os.setpgid(0, 0)  # Ctrl-C is for the parent; but in its session, since priorities hold inside one
    os.nice(BEHIND)
    with ThreadPoolExecutor(1) as thread:
        if is_yielding:
            thread.submit(yield_to_everybody)
        ready = thread.submit(prepare, sockets, bundle, digest, given)
    if not isinstance(ready.exception(), ServerError):  # of which the parent was told, and logs it
        ready.result().serve()


def prepare(sockets: Sockets, bundle: Path, digest: str, given: Given) -> "Worker":
    """The worker on these sockets, warm. What keeps it from working is told to the parent, then raised."""
    try:
        return Worker(sockets, bundle, digest, given)
    except ServerError as e:
        with sockets[0] as connection:
            connection.sendall(frame(Kind.FAILED, generation_number(digest), 0, e))
        raise


class Worker:
    """Does what comes over a socket, with a bundle that its parent has verified; made warm."""

    def __init__(self, sockets: Sockets, bundle: Path, digest: str, given: Given) -> None:
        self.connection, self.control = sockets
        self.own = generation_number(digest)
        self.generation = live.changeable(load(bundle, digest, is_verified=True), given.room)
        self.scorer = InProcess(ShardModel(self.generation), given.paced_row_s)
        self.funnel = Funnel(self.generation, self.scorer, given.reserve_s)
        self.funnel.retrieval.cost, self.funnel.preranking.cost = given.costs
        # What is being done, or was last; what was to be stopped last; whether the parent is gone.
        self.job, self.stopped, self.is_left = 0, 0, False
        self.sending = threading.Lock()
        self._warm_up()
        if given.changes:  # afterwards: they may leave nothing to be warmed by
            live.apply(self.generation, given.changes)

    def serve(self) -> None:
        """Answer until the other end closes."""
        threading.Thread(target=self._listen, daemon=True).start()
        with contextlib.suppress(ConnectionError):  # a parent that is gone is no fault of ours
            self._send(Kind.READY, 0, max(self.scorer.row_s, self.scorer.paced_row_s))
            for asked, said in received(self.connection):
                if asked.kind is Kind.CHANGE:
                    live.replay(self.generation, [said])
                    continue
                self.job, self.scorer.run = asked.job, Run()  # a stop of the one before may come in between
                if self.is_left or self.stopped == asked.job:  # the other socket was faster
                    self.scorer.run.stop()
                self._answer(asked, said)

    def _warm_up(self) -> None:
        """Run what the bundle was proved on, twice: memory maps, the runtime's plans, what a row takes."""
        funnel, took = offline_funnel(self.generation), []
        for golden in 2 * self.generation.manifest.golden:
            query = offline_query(golden.request, self.generation)
            report = outcome_of(partial(rank_offline, funnel, query)).reports[Stage.RERANKING]
            took.append(report.seconds / report.done if report.done else UNHURRIED_S)
        self.scorer.row_s = min(took)  # in the others this process made way for another
        self.scorer.cost = Cost(FIXED_S, max(self.scorer.row_s, self.scorer.paced_row_s))

    # --------------------------------------------------------------------------------------- one job

    def _answer(self, asked: Frame, said: Any) -> None:
        try:
            require(asked.generation == self.own, "another generation than this worker's", StageFailed)
            if asked.kind is Kind.RANK:
                self._send(Kind.RANKED, asked.job, self._ranked(said))
            else:
                shard, left_s = said
                for scored in self.scorer.slices(replace(shard, until=time.monotonic() + left_s)):
                    self._send(Kind.SCORES, asked.job, scored)
        except (InvalidRequest, StageFailed) as e:  # the second also where it was told to stop
            self._send(Kind.FAILED, asked.job, e)
        except ConnectionError:
            raise
        except Exception:  # a defect must reach the request's log, and must not cost the worker
            self._send(Kind.FAILED, asked.job, ContractError(f"in a worker: {traceback.format_exc()}"))

    def _ranked(self, asked: Asked) -> Told:
        """Raises InvalidRequest."""
        started = time.monotonic()
        parsed = wire.parse(asked.sent.body, wire.RankRequest)
        deadline = asked.deadline(started, parsed.k or self.generation.manifest.funnel.k)
        resolve = partial(wire.to_query, parsed, asked.sent.request_id, self.generation)
        narrowed = outcome_of(partial(self.funnel.narrow, resolve, deadline, asked.quality))
        query, ranking = outcome_of(partial(self.funnel.finish, *narrowed))
        return wire.told(query, ranking, self.generation)._replace(seconds=time.monotonic() - started)

    # ------------------------------------------------------------------------------------- the sockets

    def _listen(self) -> None:
        for asked, _ in received(self.control):
            if asked.kind is Kind.PING:
                with contextlib.suppress(ConnectionError):
                    self._send(Kind.PONG, asked.job)
            else:
                self.stopped = asked.job
                run = self.scorer.run  # before the look: the next job's must go on
                if self.job == asked.job:
                    run.stop()
        self.is_left = True
        self.scorer.run.stop()

    def _send(self, kind: Kind, job: int, said: object = None) -> None:
        with self.sending:
            self.connection.sendall(frame(kind, self.own, job, said))


def received(connection: socket.socket) -> Iterator[tuple[Frame, Any]]:
    """Frames with what they say, until the other end closes or sends what isn't of this format."""
    held = bytearray()
    with contextlib.suppress(OSError, ValueError):
        while data := connection.recv(AT_ONCE):
            held += data
            yield from read_frames(held)
