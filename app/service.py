"""The service's life: load → prove → start workers → serve → switch → drain → stop; and one request's way through it.

It owns what lives as long as the process: the generations that are held, with their funnels and workers, and the gate.
It knows no HTTP (api.py) and no order of stages (funnel.py). A request pins the generation that serves when it gets its
permit; one that leaves is closed when its last request has ended.
"""

import asyncio
import logging
import math
import os
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from app import live, wire
from app.bundle import Generation, load
from app.control.deadline import Deadline
from app.control.quality import FLOOR
from app.errors import BundleError, CapacityError, Conflict, NotThere, ServerError, require
from app.flow import Sent, Told
from app.funnel import Funnel
from app.gate import Gate, Phase
from app.keys import read_keys
from app.metrics import Metrics
from app.settings import Settings
from app.warmup import measured, prove_aside
from app.workers.pool import WorkerPool
from app.workers.process import FORKS, begin
from app.workers.worker import Given

log = logging.getLogger(__name__)

SENT_SHARE = 0.1  # of the SLA: that one had too little time which took its client longer to send is no load's fault


@dataclass(slots=True, eq=False)
class Serving:
    """A generation with everything that runs it. inflight: requests that have it pinned."""

    generation: Generation
    funnel: Funnel
    pool: WorkerPool
    loaded_at: float
    inflight: int = 0


class Service:
    """One process's worth of Winnow. Lifecycle: `await start()`, `rank(…)`, `await stop()`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.keys = read_keys(settings.api_keys_file)
        self.held: dict[str, Serving] = {}  # by role: serving, previous, candidate
        self.metrics = Metrics(settings.sla_ms / 1e3, self.held)
        self.gate = Gate(settings.max_inflight, settings.sla_ms / 1e3, self.metrics)
        # The last bundle that was offered: path, state (loading, ready, failed), error.
        self.loading: dict[str, str | None] = {}
        self.activates = False  # what is being loaded, when it is ready
        self.tasks: set[asyncio.Task[None]] = set()  # loading, and closing what left
        self.changing = asyncio.Lock()  # one change of the items after the other

    @property
    def serving(self) -> Serving | None:
        return self.held.get("serving")

    # ----------------------------------------------------------------------------------------- life

    async def start(self) -> None:
        """Everything until the first request may run. Raises BundleError, ServerError."""
        started = time.monotonic()
        try:
            digest = await _prove_apart(self.settings.bundle, is_yielding=False)
        except OSError as e:
            why = f"workers can't be started: {e.strerror}; a directory for temporary files is needed"
            raise ServerError(why) from e
        generation = await asyncio.to_thread(load, self.settings.bundle, digest, is_verified=True)
        self.held["serving"] = opened = await self._open(generation)
        self.gate.expects(opened.funnel.seconds(FLOOR), opened.pool.n_workers)
        self.gate.phase = Phase.SERVING
        log.info("serving %s, %d items, %d workers", generation.name, generation.n_items, opened.pool.n_workers)
        log.info("ready after %.1f s", time.monotonic() - started)

    async def _open(self, generation: Generation) -> Serving:
        """Workers and funnel for a verified generation, warm. Raises ServerError."""
        s, is_yielding = self.settings, self.serving is not None
        generation = live.changeable(generation, s.live_room)
        costs = await asyncio.to_thread(measured, generation, is_yielding=is_yielding)
        journal = self._journal(generation)
        async with self.changing:  # or a line that is being written would be taken for torn
            changes = await asyncio.to_thread(journal.read)
        await asyncio.to_thread(live.replay, generation, changes, str(journal.file))
        given = Given(s.paced_row_ms / 1e3, s.reply_reserve_ms / 1e3, s.live_room, costs, self.gate.sla_s)
        pool = WorkerPool(generation, s.workers, self.metrics, s.spares, given)
        pool.quality_now = self.gate.quality_now
        funnel = Funnel(generation, pool, given.reserve_s, runner=pool)
        funnel.retrieval.cost, funnel.preranking.cost = costs
        await pool.start(is_yielding=is_yielding)
        return Serving(generation, funnel, pool, time.monotonic())

    async def stop(self) -> None:
        """Finish what is in flight, then end the workers."""
        log.info("stopping; %d requests in flight", self.gate.inflight)
        if not await self.gate.drain(self.settings.drain_s):
            log.warning("%d requests were still in flight at the stop", self.gate.inflight)
        await asyncio.sleep(self.settings.linger_s)
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, *(s.pool.close() for s in self.held.values()), return_exceptions=True)
        log.info("stopped")

    # ----------------------------------------------------------------------------------- generations

    def offer(self, path: Path, *, activate: bool) -> None:
        """Begin to load a bundle aside; `loading` tells how it goes. Raises NotThere, Conflict, CapacityError."""
        require(self.gate.phase is Phase.SERVING, f"the service is {self.gate.phase.value}", CapacityError)
        require(self.loading.get("state") != "loading", f"{self.loading.get('path')} is being loaded", Conflict)
        require(os.path.isdir(path), f"{path}: no such directory", NotThere)  # noqa: PTH112  (of any text)
        self.loading = {"path": str(path), "state": "loading", "error": None}
        self.activates = activate
        self._keep(asyncio.create_task(self._load(path), name="load"))

    async def _load(self, path: Path) -> None:
        try:
            digest = await _prove_apart(path, is_yielding=True)
            held = {one.generation.digest: role for role, one in self.held.items()}  # with what was added and removed
            if (role := held.get(digest, "")) == "":
                opened = await self._open(await asyncio.to_thread(load, path, digest, is_verified=True))
                self._hold(role := "candidate", opened)
            self.loading["state"] = "ready"
            if self.activates and role != "serving":
                self.switch_to(role)
        except Exception as e:  # whatever it was, the old generation serves on
            is_fault = isinstance(e, ServerError)
            log.error("offered bundle refused: %s", e, exc_info=None if is_fault else e)
            self.loading |= {"state": "failed", "error": str(e) if is_fault else f"a defect of the service: {e!r}"}

    def switch_to(self, role: str) -> None:
        """Let the candidate, or the previous generation again, serve: one reference is switched.

        Who served is the previous one from now on. Raises Conflict if there is none of this role.
        """
        require(role in self.held, f"no {role} generation is held", Conflict)
        self.activates = False  # what is being loaded stays a candidate: who switches meanwhile means it
        served, self.held["serving"] = self.held["serving"], self.held.pop(role)
        self._hold("previous", served)
        self.gate.expects(self.held["serving"].funnel.seconds(FLOOR), self.held["serving"].pool.n_workers)
        log.info("serving %s", self.held["serving"].generation.name)

    async def change_items(self, asked: wire.ItemsRequest) -> dict[str, Any]:
        """Add and remove items of the generation that serves: on disk, then for every request that comes after.

        Raises: InvalidRequest, Conflict; CapacityError when it can't be kept.
        """
        require(self.gate.phase is Phase.SERVING, f"the service is {self.gate.phase.value}", CapacityError)
        async with self.changing:
            serving = self.held["serving"]
            generation, journal = serving.generation, self._journal(serving.generation)
            change = await asyncio.to_thread(live.checked, generation, asked)
            if change.counts["epoch"] > generation.live.epoch:
                try:
                    await asyncio.to_thread(journal.add, change.line)
                except OSError as e:
                    raise CapacityError(f"the change can't be kept: {e}") from e
                live.apply(generation, change)
                serving.pool.change(change.line)
        return {"generation": generation.name, "is_kept": journal.file is not None} | change.counts

    def _journal(self, generation: Generation) -> live.Journal:
        return live.Journal((at := self.settings.live_journal) and at / f"{generation.digest}.jsonl")

    def _hold(self, role: str, what: Serving) -> None:
        """Give a role to a generation; who had it leaves."""
        left, self.held[role] = self.held.get(role), what
        if left:
            self._close_if_left(left)

    def _close_if_left(self, one: Serving) -> None:
        if not one.inflight and one not in self.held.values():
            self._keep(asyncio.create_task(one.pool.close(), name="close"))

    def _keep(self, task: "asyncio.Task[None]") -> None:
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    # -------------------------------------------------------------------------------------- requests

    async def rank(
        self, request: wire.RankRequest, body: bytes, request_id: str, arrived: tuple[float, float]
    ) -> tuple[Told, dict[str, float]]:
        """One request, from its schema and its bytes to the answer, and what that took. Raises any of errors.py.

        arrived: when the first byte of its head and the last of its body were read, seconds.
        Seconds are by stage, and: queue, the wait for the worker that took it its whole way, and the ways there and
        back, 0 if none did; users, to find out who asks for what and to write the answer, and whatever else was waited
        for where no worker did it all.
        """
        received_at, complete_at = arrived
        async with self.gate.permit(request.priority):
            serving = self.held["serving"]
            serving.inflight += 1  # pins it to the end of this request, whatever serves meanwhile
            try:
                # Made once, here.
                deadline = Deadline(received_at, (request.timeout_ms or self.settings.sla_ms) / 1e3)
                started, sent = time.monotonic(), Sent(request_id, body, request.rerank_count)
                resolve = partial(wire.to_query, request, request_id, serving.generation)
                said = await serving.funnel.rank(resolve, deadline, self.gate.quality_now(), sent)
                told = said if isinstance(said, Told) else wire.told(*said, serving.generation)
                took_s = time.monotonic() - started
                worked_s = took_s if told.seconds is None else told.seconds
                stages = {r.stage.label: r.seconds for r in told.reports}
                is_ours = told.extra_s < math.inf or complete_at - received_at <= SENT_SHARE * self.gate.sla_s
                if deadline.timeout_s >= self.gate.sla_s and is_ours:
                    self.gate.finished(started, time.monotonic() - complete_at, told.extra_s)
                self.gate.expects(serving.funnel.seconds(FLOOR), serving.pool.n_workers)
                self.metrics.ranked(told)
                return told, {"queue": took_s - worked_s, "users": worked_s - sum(stages.values())} | stages
            finally:
                serving.inflight -= 1
                self._close_if_left(serving)


async def _prove_apart(path: Path, *, is_yielding: bool) -> str:
    """Verify and prove a bundle in another process. Returns its digest. Raises BundleError with its sentence."""
    ours, theirs = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=prove_aside, args=(path, theirs, is_yielding), daemon=True)
    await begin(process)
    theirs.close()
    try:
        digest, why = await asyncio.to_thread(ours.recv)
        require(digest, why, BundleError)
        return str(digest)
    except EOFError as e:
        process.join()
        raise BundleError(f"{path}: the process that checked it ended with code {process.exitcode}") from e
    finally:
        process.kill()  # nothing happens to one that has ended
