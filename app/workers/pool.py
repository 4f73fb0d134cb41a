"""The parent's side of the workers: starts and watches them, hands out jobs, brings back what came of them.

A job is a request that one worker takes its whole way, or a shard of one that several share. Workers pull: each holds
one job at a time and gets the next when it has answered, so a slow one gets less. A job that is late is sent once more
to an idle worker, within a budget (control/hedging.py); the first to end wins, the other is stopped. What a dead
worker held goes back to the head of the queue, a shard from the first row that is missing; where the next one dies of
it as well, to nobody.

There are more processes than work at a time: spares are warm, and take over the moment one dies or becomes slow. A
worker that doesn't answer is killed; one that dies again and again is started again ever later. The pool knows nothing
of what the stages do. It is over 250 lines because both lives, a job's and a worker's, meet here in every line.
"""

import asyncio
import logging
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any

from app import live
from app.bundle import Generation
from app.control.costs import Cost
from app.control.deadline import Deadline
from app.control.hedging import HedgeBudget, late_after
from app.control.quality import POWERS
from app.errors import Deadly, InvalidRequest, ServerError, StageFailed, require
from app.flow import Outcome, Sent, Stage, Told
from app.metrics import Metrics
from app.workers.messages import WAY_BACK_S, Asked, Frame, Kind, frame, generation_number, read_frames
from app.workers.process import FORKS, THREADS, begin
from app.workers.scoring import Deliver, Shard, Slice
from app.workers.worker import Given, work

READY_S = 120.0  # for a worker to map tables and open the model, yielding to everybody meanwhile
GRACE_S = 0.03  # after the death of a worker, before another gets the request that it held
CLOSE_S = 2.0  # for a worker to end by itself when its socket closes
LOOK_S = 0.2  # between two looks at the workers
SILENT = 4  # looks without an answer to a ping, or to a stop, and the worker is taken for hung
SEARCHING = 50  # looks until a request that nobody waits for must be left: a search can't be stopped
ALONE = 0.3  # of the SLA, for one worker to re-rank: to share less costs more than it saves
SAVED_S = 5e-3  # that sharing must save a request which one worker can't take its whole way in time
STEADY_S = 10.0  # a worker that lived so long starts its next life with a clean record
BACKOFF_S = (0.05, 30.0)  # before a worker is started again: the first, doubled for each early death, and the most
RECENT = 0.2  # weight of a slice in what a worker's rows take it
SLOW = 4.0  # times the fastest worker's: a spare is better
FORGIVEN = 0.99  # of it is left after a look: a worker ten times slower is tried again after 20 s
EARLY_S = 1e-3  # that a timer may ring too soon: uvloop rounds its instant to whole milliseconds
ROUND_TRIP_S = 5e-4  # to a worker and back, with the rows of a shard made into inputs

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Job:
    """A shard on its way, or a request.

    n: rows, or how many a request is worth. says: what the worker is told, from the first row that is missing.
    deliver: for slices. answer: of a request, ends with what came of it. done: rows from its head that are delivered.
    sent: what it was handed out as, so far: first, hedge, resend.
    """

    kind: Kind
    n: int
    until: float
    says: Callable[[int], object]
    deliver: Deliver
    answer: "asyncio.Future[Any]"
    done: int = 0
    seconds: float = 0.0
    sent: list[str] = field(default_factory=list)

    @property
    def n_left(self) -> int:
        return self.n - self.done


@dataclass(slots=True, eq=False)
class _Worker:
    """One child: `number` stays when it is replaced. Its task owns process and socket, which a ready worker has.

    run: counts its jobs; by it they are told apart on its sockets. offset: the first row that it was given of its job.
    since: when. late_at: when it should have been done, and `timer` rings. owes: what it must answer within so many
    looks.
    state: alive, starting, or backing_off (waiting to be started again).
    row_s: what a row took it lately; one that isn't used is slowly forgiven. missed: changes of items since its start.
    """

    number: int
    state: str = "starting"
    is_ready: asyncio.Event = field(default_factory=asyncio.Event)
    process: BaseProcess = field(init=False)
    transport: asyncio.WriteTransport = field(init=False)
    control: socket.socket = field(init=False)
    job: _Job | None = None
    timer: asyncio.TimerHandle = field(init=False)
    run: int = 0
    offset: int = 0
    since: float = 0.0
    late_at: float = 0.0
    row_s: float = 0.0
    missed: list[bytes] = field(default_factory=list)
    owes: dict[Kind, int] = field(default_factory=dict)


class WorkerPool:
    """W workers, and spares, for one generation. Lifecycle: `await start()`, `submit(…)`, `await close()`.

    given: what workers are told besides their bundle.
    """

    quality_now: Callable[[], float] = staticmethod(lambda: 1.0)  # the most for a request as it is handed out

    def __init__(
        self, generation: Generation, n_workers: int, metrics: Metrics, spares: int = 0, given: Given | None = None
    ) -> None:
        self.generation, self.metrics, self.given = generation, metrics, given or Given()
        self.own = generation_number(generation.digest)
        self.n_wanted, self.workers = n_workers, [_Worker(i) for i in range(n_workers + spares)]
        self.queue: deque[_Job] = deque()
        self.backlog = 0  # rows that were submitted and are neither scored nor given up
        self.cost, self.hedges = Cost(ROUND_TRIP_S, 1e-5), HedgeBudget()
        self.started: asyncio.Future[None] = asyncio.Future()  # when all were ready, or one couldn't get so
        self.tasks: list[asyncio.Task[None]] = []

    @property
    def ready(self) -> list[_Worker]:
        return [w for w in self.workers if w.is_ready.is_set() and not w.transport.is_closing()]

    @property
    def n_workers(self) -> int:
        return min(self.n_wanted, len(self.ready))

    @property
    def used(self) -> list[_Worker]:
        """Those that get shards: the first that are wanted, but spares before one that has become slow."""
        fastest_s = min((w.row_s for w in self.ready), default=0.0)
        return sorted(self.ready, key=lambda w: w.row_s > SLOW * max(fastest_s, 1e-6))[: self.n_wanted]

    def pids(self) -> dict[int, int]:
        """Process ids of the living workers, by worker number."""
        return {w.number: w.process.pid or 0 for w in self.ready}

    def fits(self, budget_s: float) -> int:
        """After the rows that wait already. With no worker alive everything: re-ranking is to say what is wrong."""
        return max(0, self.cost.fits(budget_s) * self.n_workers - self.backlog) if self.n_workers else 1 << 30

    def seconds(self, n: float) -> float:
        return self.cost.seconds(n / max(self.n_workers, 1))

    async def start(self, *, is_yielding: bool = False) -> None:
        """Start all workers and wait until each is warm. Raises ServerError with the reason if one can't start."""
        self.is_yielding = is_yielding  # another generation serves, and mustn't notice
        self.tasks = [asyncio.create_task(life) for life in (self._watch(), *map(self._keep_alive, self.workers))]
        try:
            await self.started
        except BaseException:
            await self.close()
            raise

    def submit(self, shard: Shard, deliver: Deliver) -> "asyncio.Future[None]":
        """See ShardScorer."""

        def says(done: int) -> object:
            return shard.part(done) if done else shard, shard.until - time.monotonic()

        return self._take(Kind.SHARD, len(shard.candidates), shard.until, says, deliver).answer

    async def rank(self, sent: Sent, deadline: Deadline, quality: float, until: float) -> Told:
        """See Runner."""
        widths, ends_at = self.generation.manifest.funnel, deadline.started_at + deadline.timeout_s
        in_s = deadline.limit(time.monotonic(), self.given.reserve_s) - min(WAY_BACK_S, 0.1 * deadline.timeout_s)
        n = quality ** POWERS[Stage.RERANKING] * (sent.rerank_count or widths.rerank)
        alone_s, saved_s = self.cost.seconds(n), self.cost.seconds(n) - self.seconds(n)
        all_s = alone_s + sum(cost.seconds(quality * widths.retrieve) for cost in self.given.costs)
        is_slow = alone_s > ALONE * self.given.sla_s or (all_s > in_s and saved_s > SAVED_S)
        require(bool(self.ready) and not (is_slow and saved_s), "for several workers, or for none", StageFailed)

        def says(_: int) -> object:
            return Asked(sent, ends_at - time.monotonic(), deadline.timeout_s, min(quality, self.quality_now()))

        job = self._take(Kind.RANK, max(1, self.cost.fits(all_s)), until, says, lambda *_: None)
        loop = asyncio.get_running_loop()
        timers = loop.call_later(in_s, self._stop, job), loop.call_at(until, self._is_overdue, job)
        try:
            told: Told = await job.answer
        finally:
            for timer in timers:
                timer.cancel()
        costs = zip((*self.given.costs, self.cost), told.reports, (0.0, 0.0, ROUND_TRIP_S), strict=False)
        for cost, report, way_s in costs if told.is_searched else ():
            cost.learn(report, way_s)
        return told

    def _take(self, kind: Kind, n: int, until: float, says: Callable[[int], object], deliver: Deliver) -> _Job:
        job = _Job(kind, n, until, says, deliver, asyncio.get_running_loop().create_future())
        self.backlog += n
        job.answer.add_done_callback(lambda _: self._ended(job))
        self.queue.append(job)
        self._hand_out()
        return job

    def _is_overdue(self, job: _Job) -> None:
        if not self._who_has(job):
            self._fail(job, StageFailed("nobody has begun"), "expired")

    def change(self, change: bytes) -> None:
        """Of the items: all jobs that are handed out from now on meet it."""
        ready = self.ready
        for worker in self.workers:
            if worker in ready:
                worker.transport.write(frame(Kind.CHANGE, self.own, 0, change))
            else:
                worker.missed.append(change)

    async def close(self) -> None:
        """End the workers: their sockets close, and who doesn't go is killed."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        while self.queue:
            self._fail(self.queue.popleft(), StageFailed("the pool was closed"))

    # ----------------------------------------------------------------------------- one job's life

    def _hand_out(self) -> None:
        """Give waiting jobs to idle workers, oldest first, then late ones, which are running, a second time."""
        now, used = time.monotonic(), self.used
        idle = [w for w in used if w.job is None]
        for waiting in [] if used else [job for job in self.queue if job.kind is Kind.RANK]:  # these have other ways
            self._fail(waiting, StageFailed("no worker is alive"))
        while self.queue and idle:
            job = self.queue.popleft()
            if job.until <= now:
                self._fail(job, StageFailed("expired before a worker was free"), "expired")
            elif not job.answer.done():
                self._send(idle.pop(0), job, "resend" if job.sent else "first")
        for job in [w.job for w in self.workers if w.job and w.late_at <= now + EARLY_S < w.job.until]:
            if idle and not job.answer.done() and "hedge" not in job.sent and self.hedges.spend(job.n_left):
                self._send(idle.pop(0), job, "hedge")

    def _send(self, worker: _Worker, job: _Job, work: str) -> None:
        worker.job, worker.run, worker.offset, worker.since = job, worker.run + 1, job.done, time.monotonic()
        worker.late_at = worker.since + late_after(self.cost.seconds(job.n_left))
        job.sent.append(work)
        self.metrics.rows.labels(work).inc(job.n_left)
        if work == "first":
            self.hedges.earn(job.n_left)
        worker.timer = asyncio.get_running_loop().call_at(worker.late_at, self._hand_out)
        worker.transport.write(frame(job.kind, self.own, worker.run, job.says(job.done)))

    def _who_has(self, job: _Job) -> list[_Worker]:
        return [worker for worker in self.workers if worker.job is job]

    def _deliver(self, worker: _Worker, job: _Job, got: Slice) -> bool:
        """Deliver what is new in a slice, for another worker may have been faster. Returns whether it is the last."""
        self.cost.observe(len(got.scores), got.seconds + ROUND_TRIP_S)
        worker.row_s += RECENT * (got.seconds / max(len(got.scores), 1) - worker.row_s)
        n_new = worker.offset + got.start + len(got.scores) - job.done
        if n_new > 0 and not job.answer.done():
            job.deliver(job.done, got.scores[-n_new:])
            job.done += n_new
            job.seconds += got.seconds
            self.backlog -= n_new
            if not job.n_left:
                self.metrics.shard("ok", job.seconds)
                job.answer.set_result(None)
        return got.is_last

    def _ranked(self, worker: _Worker, job: _Job, said: Told) -> None:
        worker.row_s += RECENT * ((time.monotonic() - worker.since) / job.n - worker.row_s)
        if not job.answer.done():
            report = said.reports[Stage.RERANKING]
            self.metrics.shard("failed" if report.outcome is Outcome.FAILED else "ok", report.seconds)
            job.answer.set_result(said)

    def _fail(self, job: _Job, why: Exception, outcome: str = "failed") -> None:
        if not job.answer.done():
            self.metrics.shard(outcome, job.seconds)
            job.answer.set_exception(why)

    def _ended(self, job: _Job) -> None:
        """The job is done, failed or given up."""
        self.backlog -= job.n_left
        if job.answer.cancelled():
            self.metrics.shard("late" if job.sent else "expired", job.seconds)
        self._stop(job)

    def _stop(self, job: _Job) -> None:
        """Whoever works on it stops; of a request, sends what there is."""
        for worker in self._who_has(job):
            self._ask(worker, Kind.STOP, SILENT if job.kind is Kind.SHARD else SEARCHING)

    # -------------------------------------------------------------------------- one worker's life

    async def _keep_alive(self, worker: _Worker) -> None:
        """One life after the other, without end."""
        n_early_deaths = 0
        while True:
            born = time.monotonic()
            try:
                await self._live(worker)
            except Exception as e:  # whatever it was, the worker must come back
                why = str(e) or type(e).__name__
                log.warning("worker %d ended: %s", worker.number, why)
                if worker.state == "starting" and not self.started.done():
                    self.started.set_exception(ServerError(f"a worker can't start: {why}"))
            self.metrics.restarts.inc()
            n_early_deaths = 0 if time.monotonic() - born > STEADY_S else n_early_deaths + 1
            worker.state = "backing_off"
            await asyncio.sleep(min(BACKOFF_S[1], BACKOFF_S[0] * 2 ** min(n_early_deaths - 1, 20)))

    async def _live(self, worker: _Worker) -> None:
        """Fork the process, then receive its answers until its socket ends; raises whatever ended it."""
        worker.state = "starting"
        async with AsyncExitStack() as last:  # what is done in the end, in the reverse order
            (ours, theirs), (worker.control, control) = socket.socketpair(), socket.socketpair()
            worker.control.setblocking(False)
            last.callback(ours.close)
            last.callback(worker.control.close)
            with theirs, control:
                is_yielding = (self.is_yielding and not self.started.done()) or bool(self.ready)
                worker.missed = []
                told = replace(self.given, changes=live.so_far(self.generation) if self.generation.live.epoch else None)
                given = ((theirs, control), self.generation.path, self.generation.digest, told, is_yielding)
                worker.process = FORKS.Process(target=work, args=given, daemon=True)
                await begin(worker.process)
            last.push_async_callback(_wait_for_end, worker.process)
            loop = asyncio.get_running_loop()
            stream = partial(_Stream, partial(self._receive, worker))
            worker.transport, answers = await loop.create_unix_connection(stream, sock=ours)
            last.callback(worker.transport.close)
            last.callback(self._give_up, worker)
            worker.owes = {Kind.READY: int(READY_S / LOOK_S)}
            await answers.ended

    def _begin(self, worker: _Worker, answer: Frame, said: Any) -> None:
        """Its first answer: it is ready, or says why not. Raises ServerError."""
        require(answer.kind is Kind.READY, str(said), ServerError)
        worker.state, worker.owes = "alive", {}
        worker.is_ready.set()
        for change in worker.missed:
            worker.transport.write(frame(Kind.CHANGE, self.own, 0, change))
        if not self.started.done():
            self.cost = Cost(ROUND_TRIP_S, said)
            if len(self.ready) == len(self.workers):
                self.started.set_result(None)
        self._hand_out()

    def _receive(self, worker: _Worker, answer: Frame, said: Any) -> None:
        """Raises ValueError for an answer to what wasn't asked."""
        if worker.state == "starting":
            self._begin(worker, answer, said)
        elif answer.kind is Kind.PONG:
            worker.owes.pop(Kind.PING, None)
        else:
            self._progress(worker, answer, said)

    def _progress(self, worker: _Worker, answer: Frame, said: Any) -> None:
        """Of the run that it was given; raises ValueError for another."""
        if worker.job is None or answer.job != worker.run:
            raise ValueError(f"answered run {answer.job}, was given {worker.run}")
        if answer.kind is Kind.SCORES:
            if not self._deliver(worker, worker.job, said):
                return
        elif answer.kind is Kind.RANKED:
            self._ranked(worker, worker.job, said)
        elif not isinstance(said, StageFailed) or self._who_has(worker.job) == [worker]:  # else another works on it
            self._fail(worker.job, said, "ok" if isinstance(said, InvalidRequest) else "failed")
        self._release(worker)

    def _release(self, worker: _Worker) -> None:
        """It works on nothing any more."""
        if worker.job:
            worker.timer.cancel()
        worker.job = None
        worker.owes.pop(Kind.STOP, None)
        self._hand_out()

    def _give_up(self, worker: _Worker) -> None:
        """No more shards for it; what it held goes to another. Before anything is awaited: its socket is closing."""
        worker.is_ready.clear()
        worker.owes.clear()
        job = worker.job
        if job and self._who_has(job) == [worker] and not job.answer.done():
            if "resend" in job.sent:
                self._fail(job, Deadly("workers ended over it"), "lost")
            else:
                self.metrics.shard("lost", 0.0)
                asyncio.get_running_loop().call_later(GRACE_S * (job.kind is Kind.RANK), self._try_again, job)
        self._release(worker)

    def _try_again(self, job: _Job) -> None:
        """Where all are killed at once the next one has ended too by now, and isn't taken for a victim of the job."""
        self.queue.appendleft(job)
        self._hand_out()

    def _ask(self, worker: _Worker, kind: Kind, n_looks: int = SILENT) -> None:
        """A ping, or to stop its run; not again while it owes the answer."""
        if kind not in worker.owes:
            worker.owes[kind] = n_looks
            with suppress(OSError):  # full: it reads nothing, and owes the answer
                worker.control.send(frame(kind, self.own, worker.run))

    async def _watch(self) -> None:
        """Ping the workers; kill those that don't answer, don't stop when told to, or don't get ready.

        Looks are counted and not seconds: while this process itself is held up, silence means nothing.
        """
        while True:
            await asyncio.sleep(LOOK_S)
            for worker in self.workers:
                worker.owes = {kind: n_looks - 1 for kind, n_looks in worker.owes.items()}
                if 0 in worker.owes.values() and (pid := worker.process.pid):
                    log.warning("worker %d does not answer: killed", worker.number)
                    with suppress(ProcessLookupError):  # its own `kill` does nothing once the server of forks is gone
                        os.kill(pid, signal.SIGKILL)
                if worker.is_ready.is_set():
                    self._ask(worker, Kind.PING)
                    worker.row_s *= FORGIVEN


class _Stream(asyncio.Protocol):
    """Our end of a worker's socket: each whole answer goes to `receive`. ended: fails with what ended it."""

    def __init__(self, receive: Callable[[Frame, Any], None]) -> None:
        self.receive, self.held = receive, bytearray()
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        self.held += data
        try:
            for answer, said in read_frames(self.held):
                self.receive(answer, said)
        except Exception as e:
            self._end(e)

    def connection_lost(self, error: Exception | None) -> None:
        self._end(error or EOFError("its socket was closed"))

    def _end(self, why: Exception) -> None:
        if not self.ended.done():
            self.ended.set_exception(why)


async def _wait_for_end(process: BaseProcess) -> None:
    """Returns when the process has ended: by itself, since its socket is closed, or else killed."""
    try:
        await asyncio.get_running_loop().run_in_executor(THREADS, process.join, CLOSE_S)
    finally:
        process.kill()
        process.join(CLOSE_S)
        log.info("process %s of a worker ended with code %s", process.pid, process.exitcode)
