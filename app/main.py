"""create_app(): settings → service → routes; and `serve`, the process's main: two ports on one event loop.

The ports open at once and answer 503 until the generation is warm. A stop signal fails readiness, lets what is in
flight end, then ends the workers. Servers and signals are here; what is served is service.py's.
"""

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import time
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app import api, log
from app.errors import ServerError
from app.service import Service
from app.settings import Settings, SettingsError

logger = logging.getLogger(__name__)


def create_app(service: Service) -> FastAPI:
    """The ranking port's application."""
    app = FastAPI(
        title="Winnow", version=version("winnow"), description="Funnel ranking inside a latency SLA.", redoc_url=None
    )
    app.include_router(api.routes(service))
    app.add_exception_handler(HTTPException, api.not_found)
    app.openapi = lambda: api.openapi(app, service)  # type: ignore[method-assign]
    return app


def create_admin_app(service: Service) -> FastAPI:
    """The admin port's application."""
    app = FastAPI(title="Winnow admin", version=version("winnow"), redoc_url=None)
    app.include_router(api.admin_routes(service))
    app.add_exception_handler(HTTPException, api.not_found)
    return app


class TimedProtocol(HttpToolsProtocol):
    """Notes when the first byte of a request's head was read: its deadline counts from there."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["winnow.received_at"] = time.monotonic()  # type: ignore[typeddict-unknown-key]


class Server(uvicorn.Server):
    """A server that leaves signals to `serve`: there are two in one process."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _server(app: FastAPI, **options: Any) -> Server:
    return Server(
        uvicorn.Config(
            app,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=2,
            **options,
        )
    )


def _listener(settings: Settings, prefix: str) -> socket.socket:
    """Listens on the ranking or the admin port. Raises SettingsError that names the setting."""
    host, port = getattr(settings, f"{prefix}host"), getattr(settings, f"{prefix}port")
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as e:
        why = str(e.strerror).partition(" (")[0].lower()
        raise SettingsError(f"WINNOW_{prefix.upper()}PORT={port}: {why} on {host}; choose another port") from e


async def serve(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT. Returns the exit code: 0, or 2 if the bundle must not be served.

    Raises: SettingsError for a port that can't be listened on.
    """
    listeners = [_listener(settings, prefix) for prefix in ("", "admin_")]
    service = Service(settings)
    servers = [_server(create_app(service), http=TimedProtocol), _server(create_admin_app(service))]
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    running = [asyncio.create_task(s.serve(sockets=[at])) for s, at in zip(servers, listeners, strict=True)]
    ports = " and ".join(str(at.getsockname()[1]) for at in listeners)
    logger.info("loading %s; ports %s answer 503", settings.bundle, ports)
    code = 0
    try:
        await _start(service, settings, stop)
        await asyncio.wait([asyncio.create_task(stop.wait()), *running], return_when=asyncio.FIRST_COMPLETED)
    except ServerError as e:
        logger.error("%s", e)
        code = 2
    await service.stop()
    for server in servers:
        server.should_exit = True
    ended = await asyncio.gather(*running, return_exceptions=True)
    return code or int(any(isinstance(e, BaseException) for e in ended))


async def _start(service: Service, settings: Settings, stop: asyncio.Event) -> None:
    """Start the service; a stop signal meanwhile ends the start."""
    if not service.keys.are_required:
        logger.warning("no WINNOW_API_KEYS_FILE: listening on loopback only (%s), no keys asked", settings.host)
    starting, stopping = asyncio.create_task(service.start()), asyncio.create_task(stop.wait())
    await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if starting.done():
        starting.result()  # raises what went wrong
    else:
        starting.cancel()
        await asyncio.wait([starting])


def run(settings: Settings) -> int:
    """The process: logging, event loop, servers."""
    gc.freeze()  # modules stay: a full collection that walks them holds up the event loop for tens of milliseconds
    listener = log.start(settings.log_level)
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(serve(settings))
    finally:
        listener.stop()


def _loop_factory() -> Any:
    import uvloop  # only the serving process needs it

    return uvloop.new_event_loop
