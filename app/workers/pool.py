"""The parent's side of the workers: spawns them, hands out shards, brings back scores.

Workers pull: each holds one shard at a time and gets the next when it has answered, so a slow one gets less. A
worker that dies is replaced and the shard it held fails; the funnel then carries that shard's candidates. The
pool knows nothing of requests, stages or metrics: `observe` and `on_restart` tell whoever wants to know.
"""

import asyncio
import logging
import os
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from app.bundle import Generation
from app.errors import ContractError, ServerError, StageFailed
from app.flow import Scores
from app.workers.messages import HEADER, Frame, Kind, ShardRecord, frame, generation_number, read_header, read_scores
from app.workers.scoring import Shard

READY_S = 60.0  # to import, map tables and open the model; a 100 MB graph takes 2 s
RESTART_PAUSE_S = 0.5  # between the death of a worker and its successor's start
CLOSE_S = 2.0  # for a worker to end by itself when its socket closes

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Job:
    number: int
    shard: Shard
    answer: "asyncio.Future[Scores]"


@dataclass(slots=True, eq=False)
class _Worker:
    """One child: `number` stays when it is replaced. Its task owns process and socket."""

    number: int
    task: "asyncio.Task[None] | None" = None
    process: "asyncio.subprocess.Process | None" = None
    writer: asyncio.StreamWriter | None = None
    job: _Job | None = None
    is_ready: asyncio.Event = field(default_factory=asyncio.Event)


def _ignore(outcome: str, seconds: float) -> None:
    pass


class WorkerPool:
    """W worker processes for one generation. Lifecycle: `await start()`, `submit(…)`, `await close()`."""

    def __init__(
        self,
        generation: Generation,
        n_workers: int,
        observe: Callable[[str, float], None] = _ignore,
        on_restart: Callable[[], None] = lambda: None,
    ) -> None:
        self.generation = generation
        self.own = generation_number(generation.digest)
        self.record = ShardRecord(generation.manifest.features)
        self.observe, self.on_restart = observe, on_restart
        self.workers = [_Worker(i) for i in range(n_workers)]
        self.queue: deque[_Job] = deque()
        self.n_jobs = 0

    @property
    def n_workers(self) -> int:
        return len(self.workers)

    @property
    def n_alive(self) -> int:
        return sum(w.is_ready.is_set() for w in self.workers)

    def pids(self) -> dict[int, int]:
        """Process ids of the living workers, by worker number."""
        return {w.number: w.process.pid for w in self.workers if w.process and w.is_ready.is_set()}

    async def start(self) -> None:
        """Spawn all workers and wait until each is warm. Raises ServerError if one can't start."""
        for worker in self.workers:
            worker.task = asyncio.create_task(self._keep_alive(worker), name=f"worker {worker.number}")
        ready = asyncio.gather(*(w.is_ready.wait() for w in self.workers))
        try:
            await asyncio.wait_for(ready, READY_S)
        except TimeoutError as e:
            await self.close()
            raise ServerError(f"workers were not ready within {READY_S:g} s") from e
        except asyncio.CancelledError:
            await self.close()
            raise

    def submit(self, shard: Shard) -> "asyncio.Future[Scores]":
        """The shard's scores, f32[n], to come. Cancel the future when nobody waits any more."""
        self.n_jobs += 1
        job = _Job(self.n_jobs, shard, asyncio.get_running_loop().create_future())
        self.queue.append(job)
        self._hand_out()
        return job.answer

    async def close(self) -> None:
        """End the workers: their sockets close, and who doesn't go is killed."""
        tasks = [w.task for w in self.workers if w.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        while self.queue:
            self._fail(self.queue.popleft(), StageFailed("shard: the pool was closed"), "failed")

    # ----------------------------------------------------------------------------------- hand out

    def _hand_out(self) -> None:
        """Give waiting shards to idle workers, oldest first; what nobody waits for is dropped."""
        now = time.monotonic()
        idle = [w for w in self.workers if w.is_ready.is_set() and w.job is None]
        while self.queue and (idle or self.queue[0].answer.done()):  # who gave up leaves the queue
            job = self.queue.popleft()
            if job.answer.done():
                self.observe("expired", 0.0)
            elif job.shard.until <= now:
                self._fail(job, StageFailed("shard: expired before a worker was free"), "expired")
            else:
                self._send(idle.pop(), job, job.shard.until - now)

    def _send(self, worker: _Worker, job: _Job, remaining_s: float) -> None:
        assert worker.writer is not None  # it is ready  # noqa: S101
        payload = self.record.write(job.shard, remaining_s)
        worker.job = job
        worker.writer.write(frame(Kind.SHARD, self.own, job.number, payload))

    def _fail(self, job: _Job, why: Exception, outcome: str) -> None:
        self.observe(outcome, 0.0)
        if not job.answer.done():
            job.answer.set_exception(why)

    # -------------------------------------------------------------------------------- one worker's life

    async def _keep_alive(self, worker: _Worker) -> None:
        while True:
            try:
                await self._live(worker)
            except Exception as e:  # whatever it was, the worker must come back
                log.warning("worker %d ended: %s", worker.number, e or type(e).__name__)
            self.on_restart()
            await asyncio.sleep(RESTART_PAUSE_S)

    def _give_up(self, worker: _Worker) -> None:
        """No more shards for it; what it held fails. Before anything is awaited: its socket is closing."""
        worker.is_ready.clear()
        if worker.job:
            self._fail(worker.job, StageFailed("shard: its worker died"), "lost")
            worker.job = None

    async def _live(self, worker: _Worker) -> None:
        """Spawn the process, then read its answers until the stream ends."""
        ours, theirs = socket.socketpair()
        try:
            worker.process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "app.workers.worker"),
                *(str(theirs.fileno()), str(self.generation.path), self.generation.digest),
                pass_fds=[theirs.fileno()],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C is for the parent
            )
        finally:
            theirs.close()
        reader, worker.writer = await asyncio.open_unix_connection(sock=ours)
        try:
            while True:
                answer = read_header(await reader.readexactly(HEADER.size))
                self._receive(worker, answer, await reader.readexactly(answer.length))
        finally:
            self._give_up(worker)
            await self._end(worker)

    def _receive(self, worker: _Worker, answer: Frame, payload: bytes) -> None:
        if answer.kind is Kind.READY:
            worker.is_ready.set()
        job, worker.job = worker.job, None
        if job and answer.job != job.number:
            raise ValueError(f"answered job {answer.job}, was given {job.number}")
        if job and answer.kind is Kind.SCORES:
            seconds, scores = read_scores(payload)
            self.observe("late" if job.answer.done() else "ok", seconds)
            if not job.answer.done():
                job.answer.set_result(scores)
        elif job and answer.kind is Kind.BROKEN:
            self._fail(job, ContractError(f"in a worker: {payload.decode(errors='replace')}"), "failed")
        elif job:
            self._fail(job, StageFailed(f"shard: {payload.decode(errors='replace')}"), "failed")
        self._hand_out()

    async def _end(self, worker: _Worker) -> None:
        if worker.writer:
            worker.writer.close()
        if not worker.process:
            return
        try:
            await asyncio.wait_for(worker.process.wait(), CLOSE_S)
        except TimeoutError:
            worker.process.kill()
            await worker.process.wait()
