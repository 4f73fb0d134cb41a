"""The service's life: load → prove → start workers → serve → drain → stop; and one request's way through it.

It owns what lives as long as the process: the generation, the funnel, the workers, the threads, the gate. It knows
no HTTP (api.py) and no order of stages (funnel.py).
"""

import asyncio
import logging
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from app import users, wire
from app.bundle import Generation, load
from app.errors import CapacityError
from app.flow import Query, Ranking
from app.funnel import Funnel
from app.gate import Gate, Phase
from app.keys import Keys, read_keys
from app.metrics import Metrics
from app.settings import Settings
from app.warmup import prove
from app.workers.pool import WorkerPool

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Serving:
    """A generation with everything that runs it."""

    generation: Generation
    funnel: Funnel
    pool: WorkerPool
    loaded_at: float


@dataclass(frozen=True, slots=True)
class Answered:
    """A request's outcome in the terms of the generation that served it. users_s: finding out who asks."""

    query: Query
    ranking: Ranking
    ids: list[int | str]
    users_s: float


class Service:
    """One process's worth of Winnow. Lifecycle: `await start()`, `rank(…)`, `await stop()`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.keys: Keys = read_keys(settings.api_keys_file)
        self.metrics = Metrics(settings.sla_ms / 1e3)
        self.metrics.watch(self.worker_pids, self.generations)
        self.gate = Gate(settings.max_inflight, self.metrics)
        self.threads = ThreadPoolExecutor(settings.threads, "stage")
        # Its own thread: behind four slow searches a look-up of microseconds would be late.
        self.lookups = ThreadPoolExecutor(1, "users")
        self.serving: Serving | None = None

    # ----------------------------------------------------------------------------------------- life

    async def start(self) -> None:
        """Everything until the first request may run. Raises BundleError, ServerError."""
        started = time.monotonic()
        generation = await asyncio.to_thread(load, self.settings.bundle)
        await asyncio.to_thread(asyncio.run, prove(generation))  # on a loop of its own: ours answers 503
        pool = WorkerPool(
            generation, self.settings.workers, observe=self.metrics.shard, on_restart=self.metrics.restarts.inc
        )
        await pool.start()
        reserve_s = self.settings.reply_reserve_ms / 1e3
        funnel = Funnel(generation, pool, self.threads, reserve_s)
        self.serving = Serving(generation, funnel, pool, time.monotonic())
        self.gate.phase = Phase.SERVING
        took = time.monotonic() - started
        log.info("serving %s, %d items, %d workers", generation.name, generation.n_items, pool.n_workers)
        log.info("ready after %.1f s", took)

    async def stop(self) -> None:
        """Finish what is in flight, then end the workers."""
        if not await self.gate.drain(self.settings.drain_s):
            log.warning("%d requests were still in flight at the stop", self.gate.inflight)
        if self.serving:
            await self.serving.pool.close()
        self.threads.shutdown(wait=False, cancel_futures=True)
        self.lookups.shutdown(wait=False, cancel_futures=True)

    @property
    def is_ready(self) -> bool:
        """Warm, at least one worker alive, not draining."""
        return self.gate.phase is Phase.SERVING and bool(self.serving and self.serving.pool.n_alive)

    # -------------------------------------------------------------------------------------- requests

    async def rank(
        self, request: wire.RankRequest, request_id: str, received_at: float, *, is_large: bool = False
    ) -> Answered:
        """One request, from its schema to the ranked ids. Raises any of errors.py.

        is_large: its ids and features take over a millisecond to look up, so that a thread does it.
        """
        with self.gate.permit(request.priority):
            serving = self.serving  # pinned: the whole request sees one generation
            if serving is None:
                raise CapacityError("no generation is loaded")
            deadline = wire.deadline(request, received_at, self.settings.sla_ms / 1e3)
            started = time.monotonic()
            limit_s = min(self.settings.user_limit_ms / 1e3, deadline.remaining(started))
            found = await users.resolve(request.user.id, serving.generation, self.lookups, limit_s)
            users_s = time.monotonic() - started
            resolve = partial(wire.to_query, request, request_id, serving.generation, found)
            query = await asyncio.to_thread(resolve) if is_large else resolve()
            ranking = await serving.funnel.rank(query, deadline)
            self.metrics.ranking(ranking)
            return Answered(query, ranking, serving.generation.ids.external(ranking.rows), users_s)

    # ----------------------------------------------------------------------------------- what is held

    def worker_pids(self) -> dict[int, int]:
        return self.serving.pool.pids() if self.serving else {}

    def generations(self) -> Iterable[tuple[str, str, float]]:
        """(role, digest, loaded at) of each generation held."""
        if self.serving:
            yield "serving", self.serving.generation.digest, self.serving.loaded_at
