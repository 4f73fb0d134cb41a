"""Small servers to aim at, on free loopback ports, in the test's own loop."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

EMPTY = b"{}"


def ok(body: bytes = EMPTY) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)


@asynccontextmanager
async def serving(answer: Callable[[], Awaitable[bytes]]) -> AsyncIterator[int]:
    """Answers each POST with these bytes, hangs up when there are none, and any GET with 200. Yields the port."""

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                lengths = [int(x.split(b":")[1]) for x in head.split(b"\r\n") if x.startswith(b"content-length")]
                await reader.readexactly(sum(lengths))
                said = await answer() if head.startswith(b"post") else ok()
                if not said:
                    break
                writer.write(said)
        except (asyncio.IncompleteReadError, ConnectionResetError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(one, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]
