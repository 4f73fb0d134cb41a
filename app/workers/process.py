"""Processes beside the service: forked from one that has imported what they need and runs no thread.

An interpreter with all its imports takes most of a second of a core, which those who are served would notice at each
swap and after each death; a fork takes milliseconds. The server of forks is the standard library's; it is started with
the first process and needs a directory for temporary files.
"""

import asyncio
import contextlib
import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.process import BaseProcess

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["app.workers.forked", "app.workers.worker", "app.warmup"])
# To start processes and wait for their ends: where workers are dead all other threads may be searching in their place.
THREADS = ThreadPoolExecutor(8)


def yield_to_everybody() -> None:
    """The thread that calls this runs only where a core is idle; it makes way at once, which niceness doesn't."""
    with contextlib.suppress(PermissionError):  # forbidden here: then it is in the way a little
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


async def begin(process: BaseProcess) -> None:
    """Start it, in a thread: the server of forks may have to be started first, and imports for most of a second.

    Cancelled, it leaves no process behind.
    """
    starting = asyncio.get_running_loop().run_in_executor(THREADS, process.start)
    try:
        await asyncio.shield(starting)
    except asyncio.CancelledError:
        await starting
        process.kill()
        raise
