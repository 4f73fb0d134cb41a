"""The open-loop generator: every request leaves when it is due, whether or not earlier ones were answered.

Latency counts from the *intended* instant. A generator that waits for answers, or that counts from the
instant it got round to sending, hides the stalls it ought to show (coordinated omission). It runs in a process of its
own, so that nobody else's work delays its loop, and reports how late it sent and what CPU it used: a run whose
generator was late or busy says nothing about the server. What it has done so far is in its tally, which costs it a
microsecond a request.

It is bounded in requests (the instants are drawn beforehand), in time (`patience_s` after the last) and in
connections. When requests are due is arrivals.py's; what came back is observed.py's and parsed after the run; what is
injected meanwhile is faults/.
"""

import asyncio
import contextlib
import ctypes
import gc
import multiprocessing
import os
import platform
import resource
import signal
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import aiohttp
import numpy as np
import uvloop
from yarl import URL

from loadtest.observed import BROKEN, SILENT, UNREACHABLE, Floats, Observed, parse
from loadtest.spool import Spool
from loadtest.stolen import stolen_s
from loadtest.tally import Tally

JSON = {"content-type": "application/json"}
# Before an instant that is so far away the generator wakes so much earlier, and waits for it awake: from its sleep it
# sent 0.27 to 0.33 ms late (median at 2 and at 20 a second beside a server that does nothing; 2026-11, AVX-512).
FAR_S, EARLY_S = 0.02, 1e-3
SETTLE_S = 0.2  # between the generator being ready and the first instant


@dataclass(frozen=True, slots=True)
class Attack:
    """What to send: request i is bodies[i % len(bodies)], due at due_s[i] seconds after the start.

    keeps_items: without, answers are kept in a file until they are parsed, and their items aren't kept at all: for
    runs of any length.
    """

    port: int
    bodies: Sequence[bytes]
    due_s: Floats
    path: str = "/v1/rank"
    patience_s: float = 15.0
    most_open: int = 4096
    keeps_alive: bool = True
    host: str = "127.0.0.1"
    headers: Mapping[str, str] = field(default_factory=dict)
    keeps_items: bool = True


# --------------------------------------------------------------------------------- in a process of its own


class Generator:
    """A generator at work in its own process. `started_at` is its instant 0 on time.monotonic().

    tally: what it has done so far.
    """

    def __init__(self, attack: Attack) -> None:
        context = multiprocessing.get_context("spawn")
        self._answers, theirs = context.Pipe(duplex=False)
        self._longest_s = float(attack.due_s[-1]) + attack.patience_s + 60  # parsing, starting
        self.tally = Tally.shared()
        self._process = context.Process(target=_generate, args=(theirs, attack, self.tally.cells), daemon=True)
        self._process.start()
        theirs.close()
        self.started_at: float = self._receive(30)

    def has_ended(self, within_s: float) -> bool:
        """Waits so long for its end."""
        return self._answers.poll(within_s)

    def result(self) -> Observed:
        """Waits for the end. Raises RuntimeError if the generator failed or overran its bound."""
        observed: Observed = self._receive(self._longest_s)
        self._process.join()
        return observed

    def stop(self) -> None:
        """End it, whatever it is doing."""
        self._process.kill()
        self._process.join()

    def _receive(self, within_s: float) -> Any:
        try:
            if self._answers.poll(within_s):
                answer = self._answers.recv()
                if not isinstance(answer, str):
                    return answer
                raise RuntimeError(f"the generator failed: {answer}")
            raise RuntimeError(f"the generator overran {within_s:.0f} s")
        except (RuntimeError, EOFError):
            self.stop()
            raise


def attack(what: Attack) -> Observed:
    """Run one to its end."""
    return Generator(what).result()


def _generate(answers: Connection, what: Attack, cells: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever started us, who ends us
    try:
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        _go_first()
        gc.collect()
        gc.freeze()
        gc.disable()  # a collection would be a stall of ours in the server's latency; the run is bounded
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            observed, raw = runner.run(fly(what, answers.send, Tally(cells)))
        parse(observed, raw, keeps_items=what.keeps_items)
        if isinstance(raw, Spool):
            raw.close()
        answers.send(observed)
    except Exception as e:
        answers.send(f"{type(e).__name__}: {e}")


def _go_first() -> None:
    """Have turns of 0.1 ms: by sched_setattr(2), Linux 6.12 and later let who wakes go before longer ones.

    Where it is forbidden or unknown nothing changes, and the generator's lateness says so. Beside two busy processes of
    niceness 10 a timer's p99 is 0.1 ms late with it, and 3.3 with Linux's own turns (6.18, 2026-11).
    """
    number = {"x86_64": 314, "aarch64": 274}.get(platform.machine())
    if number and os.sched_getscheduler(0) == os.SCHED_OTHER:
        attributes = struct.pack("IIQiIQQQ", 48, os.SCHED_OTHER, 0, os.nice(0), 0, 100_000, 0, 0)
        ctypes.CDLL(None).syscall(number, 0, attributes, 0)


# ------------------------------------------------------------------------------------------- the flight


class _Spec(ctypes.Structure):
    """struct itimerspec: no repetition, an absolute instant."""

    _fields_ = (("again", ctypes.c_long * 2), ("at", ctypes.c_long * 2))


class Alarm:
    """Wakes the loop at exact instants of time.monotonic(): the loops' own timers are a millisecond coarse."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._file = self._libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._file < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")

    def on_ring(self, call: Any) -> None:
        asyncio.get_running_loop().add_reader(self._file, self._ring, call)

    def set(self, at: float) -> None:
        """Ring at this instant; at once if it is past."""
        spec = _Spec(at=(ctypes.c_long * 2)(int(at), int(at % 1 * 1e9)))
        self._libc.timerfd_settime(self._file, 1, ctypes.byref(spec), None)

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._file)
        os.close(self._file)

    def _ring(self, call: Any) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._file, 8)
        call()


async def fly(
    what: Attack, on_start: Any = lambda _: None, tally: Tally | None = None
) -> tuple[Observed, list[bytes] | Spool]:
    """Send everything when it is due; what came back, unparsed. `on_start` gets instant 0."""
    n, tally = len(what.due_s), tally or Tally()
    seen = Observed(
        due_s=what.due_s,
        sent_late_s=np.zeros(n),
        latency_s=np.zeros(n),
        status=np.zeros(n, np.int16),
        retry_after=np.full(n, -1, np.int32),
        body=np.arange(n) % len(what.bodies),
        error=[""] * n,
    )
    raw: list[bytes] | Spool = [b""] * n if what.keeps_items else Spool(n)
    due, url = what.due_s.tolist(), URL(f"http://{what.host}:{what.port}{what.path}")
    connector = aiohttp.TCPConnector(limit=what.most_open, force_close=not what.keeps_alive)
    patience = aiohttp.ClientTimeout(total=what.patience_s)
    client = aiohttp.ClientSession(
        connector=connector,
        timeout=patience,
        headers=JSON | dict(what.headers),
        cookie_jar=aiohttp.DummyCookieJar(),
        skip_auto_headers=("Accept", "Accept-Encoding", "User-Agent"),
    )
    async with client as session:
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with session.get(url) as warm:  # the client's first request is slow, whoever answers
                await warm.read()
        start = time.monotonic() + SETTLE_S

        async def send(i: int) -> None:
            intended = start + due[i]
            while (now := time.monotonic()) < intended:  # awake too early: nothing else is under way
                pass
            seen.sent_late_s[i] = now - intended
            tally.sent()
            try:
                async with session.post(url, data=what.bodies[i % len(what.bodies)]) as answer:
                    raw[i] = await answer.read()
                    seen.status[i] = answer.status
                    after = answer.headers.get("retry-after", "")
                    seen.retry_after[i] = int(after) if after.isdecimal() else -1
            except TimeoutError:
                seen.error[i] = SILENT
            except aiohttp.ClientConnectorError:
                seen.error[i] = UNREACHABLE
            except (aiohttp.ClientError, OSError):
                seen.error[i] = BROKEN
            seen.latency_s[i] = time.monotonic() - intended
            tally.ended(float(seen.latency_s[i]), seen.status[i] == 200)

        on_start(start)
        began, used, stolen = time.monotonic(), time.process_time(), stolen_s()
        await _on_time(send, [start + d for d in due])
        seen.started_at, seen.cpu_s, seen.wall_s = start, time.process_time() - used, time.monotonic() - began
        seen.stolen_s = stolen_s() - stolen
    seen.most_open = tally.most_open
    return seen, raw


async def _on_time(send: Any, instants: list[float]) -> None:
    """Call send(i) as a task at each instant, or up to EARLY_S before it; return when all have ended."""
    alarm, tasks, all_sent = Alarm(), set[asyncio.Task[None]](), asyncio.Event()
    following = 0

    def ring() -> None:
        nonlocal following
        while following < len(instants) and instants[following] - (0.0 if tasks else EARLY_S) <= time.monotonic():
            task = asyncio.create_task(send(following))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            following += 1
        if following < len(instants):
            is_far = instants[following] - time.monotonic() > FAR_S
            alarm.set(instants[following] - (EARLY_S if is_far else 0.0))
        else:
            all_sent.set()

    alarm.on_ring(ring)
    ring()
    await all_sent.wait()
    alarm.close()
    await asyncio.gather(*tasks)
