"""Clients that misbehave beside those that don't: slow readers, silent connections, slow senders, leavers; the stop
signal under load; a full disk under the log.

The well-behaved send at half of the capacity and must notice nothing. The others run in this process's own loop,
for as long.
"""

import asyncio
import contextlib
import random
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import numpy as np

from loadtest.arrivals import poisson
from loadtest.faults.lab import Lab, failed, p99, row, sleep_until
from loadtest.launch import wait_for
from loadtest.observed import UNREACHABLE
from loadtest.table import Figure, Row

SECONDS = 30.0
FULL_DEVICE = Path("/dev/full")
SMALL_BUFFER = 4096  # bytes the kernel takes for a slow reader
GRACE_S = 10.0  # until no permit may be held any more


def slow_readers(lab: Lab) -> Iterator[Row]:
    """200 connections that ask for long answers and take 64 bytes of them each 50 ms."""
    body = lab.bodies_with(k=500)[0]

    async def one(port: int) -> None:
        connection = await _connected(port, SMALL_BUFFER)
        loop = asyncio.get_running_loop()
        with connection:
            await loop.sock_sendall(connection, _head(len(body)) + body)
            while await loop.sock_recv(connection, 64):  # noqa: ASYNC110 (being slow is the point)
                await asyncio.sleep(0.05)

    return _beside(lab, "200 slow readers", 200, one)


def silent(lab: Lab) -> Iterator[Row]:
    """1,000 connections that never send anything."""

    async def one(port: int) -> None:
        with await _connected(port) as connection:
            await asyncio.get_running_loop().sock_recv(connection, 1)

    return _beside(lab, "1,000 silent connections", 1_000, one)


def slow_senders(lab: Lab) -> Iterator[Row]:
    """200 connections that send their request a byte a second."""

    async def one(port: int) -> None:
        loop = asyncio.get_running_loop()
        with await _connected(port) as connection:
            for byte in _head(len(lab.bodies[0])) + lab.bodies[0]:
                await loop.sock_sendall(connection, bytes([byte]))
                await asyncio.sleep(1)

    return _beside(lab, "200 slow senders", 200, one)


def leavers(lab: Lab) -> Iterator[Row]:
    """Clients that break off in the head, in the body, or before the answer: 20 at any time."""

    async def one(port: int) -> None:
        rng, loop, body = random.Random(), asyncio.get_running_loop(), lab.bodies[0]
        whole = _head(len(body)) + body
        while True:
            with await _connected(port) as connection:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # leave by a reset
                await loop.sock_sendall(connection, whole[: rng.choice((40, len(whole) - 20, len(whole)))])
                await asyncio.sleep(rng.random() * 0.01)
            await asyncio.sleep(1)

    return _beside(lab, "leaving clients", 20, one)


def full_disk(lab: Lab) -> Iterator[Row]:
    """The log goes to a device on which there is no room."""
    with lab.service(log=FULL_DEVICE) as server:
        seen = lab.attack(server, poisson(lab.half, lab.seconds(SECONDS)))
    yield row("full disk under the log", seen, failed(seen), p99(seen))


def stop_signal(lab: Lab) -> Iterator[Row]:
    """SIGTERM under load. Each request has a connection of its own: whether one was accepted is then certain.

    Not accepted, and so not failed: what couldn't connect after the signal, and what a draining service refused.
    """
    seconds = lab.seconds(15)
    with lab.service() as server, lab.load(server, poisson(lab.half, seconds), keeps_alive=False) as generator:
        sleep_until(generator, seconds / 2)
        at_s = time.monotonic() - generator.started_at
        server.process.send_signal(signal.SIGTERM)
        code = server.process.wait(GRACE_S * 3)
        took_s = time.monotonic() - generator.started_at - at_s
        seen = generator.result()
    is_after = seen.due_s + seen.sent_late_s >= at_s
    unreachable = np.array([e == UNREACHABLE for e in seen.error])
    turned_away = is_after & (unreachable | (seen.status == 503))
    lost = ~seen.is_ok & ~turned_away
    for error in {seen.error[i] or str(seen.status[i]) for i in np.flatnonzero(lost)}:
        lab.say(f"  lost: {error}")
    figures = (
        Figure("failed among the accepted", float(lost.sum()), most=0),
        Figure("turned away after the signal", float(turned_away.sum())),
        Figure("exit code", float(code), least=0, most=0),
        Figure("ended after", took_s, unit="s"),
    )
    yield row("stop signal", seen, *figures, recovery_s=took_s)


# ------------------------------------------------------------------------------------------- the crowd


def _beside(lab: Lab, fault: str, n: int, one: Callable[[int], Awaitable[None]]) -> Iterator[Row]:
    """n of these clients beside the load; afterwards nothing of them may be left in the service."""
    seconds = lab.seconds(SECONDS)
    with lab.service() as server:
        with lab.load(server, poisson(lab.half, seconds)) as generator:
            asyncio.run(_crowd(n, lambda: one(server.port), seconds))
            seen = generator.result()
        freed_s = wait_for(lambda: server.metric("winnow_inflight") == 0, GRACE_S, "all permits to be given back")
    yield row(fault, seen, failed(seen), p99(seen), Figure("no permit held after", freed_s, unit="s"))


async def _crowd(n: int, one: Callable[[], Awaitable[None]], seconds: float) -> None:
    """n clients that arrive over half of the time and are gone at its end."""

    async def arrive(after_s: float) -> None:
        await asyncio.sleep(after_s)
        with contextlib.suppress(OSError):
            await one()

    clients = [asyncio.create_task(arrive(i * seconds / 2 / n)) for i in range(n)]
    await asyncio.wait(clients, timeout=seconds)
    for client in clients:
        client.cancel()
    await asyncio.gather(*clients, return_exceptions=True)


async def _connected(port: int, buffer: int = 0) -> socket.socket:
    connection = socket.socket()
    try:
        connection.setblocking(False)
        if buffer:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", port))
    except BaseException:
        connection.close()
        raise
    return connection


def _head(length: int) -> bytes:
    head = "POST /v1/rank HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {length}\r\n\r\n".encode()
