"""create_app(): settings → service → routes; and `serve`, the process's main: two ports on one event loop.

The ports open at once and answer 503 until the generation is warm. A stop signal fails readiness, lets what is in
flight end, then ends the workers. Servers and signals are here; what is served is service.py's.
"""

import asyncio
import contextlib
import gc
import logging
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any

import uvicorn
import uvloop
from fastapi import APIRouter, FastAPI, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app import api, log, problems
from app.errors import ServerError, WinnowError
from app.service import Service
from app.settings import Limits, Settings, SettingsError

logger = logging.getLogger(__name__)

LAST_S = 0.1  # for whoever had just connected when the port closed: it has not sent its request yet, and gets its 503
SWITCH_S = 5e-4  # how long a thread may keep the interpreter from the event loop; Python's own 5 ms is half a timeout


def create_app(service: Service) -> ASGIApp:
    """The ranking port's application."""
    app = _app("Winnow", api.routes(service))
    api.name_problems(app.openapi())  # which keeps what it has made
    return api.ranking_first(service, app)


def create_admin_app(service: Service) -> FastAPI:
    """The admin port's application."""
    return _app("Winnow admin", api.admin_routes(service))


def _app(title: str, router: APIRouter) -> FastAPI:
    app = FastAPI(title=title, version=version("winnow"), description="Funnel ranking inside an SLA.", redoc_url=None)
    for error in (HTTPException, WinnowError):
        app.add_exception_handler(error, problems.refuse)
    app.include_router(router)
    return app


Refuse = Callable[[Any, bytes], Response | None]  # scope and body → what is answered at once, or None


class RankingProtocol(HttpToolsProtocol):
    """Notes when a request's head began and its body ended, and refuses what has no chance before it is a task.

    The deadline counts from the first byte. At three times what can be answered two of three are refused, which must
    cost little: whoever can be is refused as soon as the body is here, which also is when the others start. A client
    that leaves before its small body is whole has sent no request.

    waits_since: the instant since which the client owes us the rest of a request; 0 when it owes nothing.
    held: a small request whose body isn't here yet.
    """

    waits_since = 0.0
    held: tuple[Any, Any] | None = None

    def __init__(self, refuse: Refuse, **given: Any) -> None:
        super().__init__(**given)
        self.refuse = refuse

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.waits_since = time.monotonic()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.waits_since = time.monotonic()
        self.scope["winnow.received_at"] = self.waits_since  # type: ignore[typeddict-unknown-key]

    def on_message_complete(self) -> None:
        self.waits_since = 0.0
        self.scope["winnow.complete_at"] = time.monotonic()  # type: ignore[typeddict-unknown-key]
        super().on_message_complete()
        self._start_held(may_refuse=not self.flow.write_paused)

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        if self.held and len(self.held[0].body) > Limits.LARGE_BODY:
            self._start_held()

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self.held = cycle, app
        if not cycle.more_body or cycle.waiting_for_100_continue:
            self._start_held()

    def _start_held(self, *, may_refuse: bool = False) -> None:
        if not self.held:
            return
        (cycle, app), self.held = self.held, None
        response = None
        try:
            response = self.refuse(cycle.scope, cycle.body) if may_refuse else None
        except Exception:  # a defect here must not look like a malformed request
            logger.exception("refusing failed")
        if response is None:
            super()._start_asgi_task(cycle, app)
        else:
            with contextlib.suppress(StopIteration):  # it ends at once: the socket takes it
                response(cycle.scope, cycle.receive, cycle.send).send(None)


async def cut_off_slow_senders(server: uvicorn.Server, receive_s: float) -> None:
    """Close connections whose client takes longer than that to send a request; runs until it is cancelled."""
    while True:
        await asyncio.sleep(receive_s / 5)
        now = time.monotonic()
        for one in [one for one in server.server_state.connections if isinstance(one, RankingProtocol)]:
            # Who isn't read, since a request before it still runs, has its time from when it is.
            one.waits_since = one.waits_since and (now if one.flow.read_paused else one.waits_since)
            if 0 < one.waits_since < now - receive_s:
                one.transport.abort()


class Server(uvicorn.Server):
    """A server that leaves signals to `serve`: there are two in one process."""

    capture_signals = contextlib.nullcontext  # type: ignore[assignment]


def _server(app: ASGIApp, refuse: Refuse) -> Server:
    protocol: Any = partial(RankingProtocol, refuse)
    config = uvicorn.Config(app, http=protocol, lifespan="off", log_config=None, access_log=False)
    config.server_header = config.proxy_headers = False
    config.timeout_graceful_shutdown = 2
    config.timeout_keep_alive = 60  # longer than clients keep theirs: it is they who close
    return Server(config)


def _listener(settings: Settings, prefix: str) -> socket.socket:
    """Listens on the ranking or the admin port. Raises SettingsError that names the setting."""
    host, port = getattr(settings, f"{prefix}host"), getattr(settings, f"{prefix}port")
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as e:
        name, why = f"WINNOW_{prefix.upper()}", str(e.strerror).partition(" (")[0].lower()
        allowed = "allowed are an address of this machine and a free port"
        raise SettingsError(f"{name}HOST={host}, {name}PORT={port}: {why}; {allowed}") from e


async def serve(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT. Returns the exit code: 0, or 2 if the bundle must not be served.

    Raises: SettingsError for a port that can't be listened on.
    """
    listeners = [_listener(settings, prefix) for prefix in ("", "admin_")]
    service = Service(settings)
    refuse = partial(api.refusal, service)
    servers = [_server(create_app(service), refuse), _server(create_admin_app(service), lambda *_: None)]
    living = asyncio.create_task(_live(service))
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, living.cancel)
    running = [asyncio.create_task(s.serve(sockets=[at])) for s, at in zip(servers, listeners, strict=True)]
    cutting = asyncio.create_task(cut_off_slow_senders(servers[0], settings.receive_s))
    ports = " and ".join(str(at.getsockname()[1]) for at in listeners)
    logger.info("loading %s; ports %s answer 503", settings.bundle, ports)
    if service.keys is None:
        logger.warning("no WINNOW_API_KEYS_FILE: listening on loopback only (%s), no keys asked", settings.host)
    await asyncio.wait([living, *running], return_when=asyncio.FIRST_COMPLETED)
    living.cancel()
    (fault,) = await asyncio.gather(living, return_exceptions=True)
    if isinstance(fault, Exception):
        logger.error("%s", fault, exc_info=None if isinstance(fault, ServerError) else fault)
    await service.stop()
    for listening in [at for server in servers for at in getattr(server, "servers", ())]:
        listening.close()
    await asyncio.sleep(LAST_S)
    cutting.cancel()
    for server in servers:
        server.should_exit = True
    ended = await asyncio.gather(*running, return_exceptions=True)
    return 2 if isinstance(fault, ServerError) else int(any(isinstance(e, Exception) for e in (fault, *ended)))


async def _live(service: Service) -> None:
    """Start the service, then stand by; cancelled by a stop signal, which ends the start too."""
    await service.start()
    await asyncio.Event().wait()


def run(settings: Settings) -> int:
    """The process: logging, event loop, servers."""
    gc.freeze()  # modules stay: a full collection that walks them holds up the event loop for tens of milliseconds
    listener = log.start(settings.log_level)
    sys.setswitchinterval(SWITCH_S)
    # The hard limit for both: a connection is one, and 1,024 are soon used up.
    resource.setrlimit(resource.RLIMIT_NOFILE, 2 * resource.getrlimit(resource.RLIMIT_NOFILE)[1:])
    try:
        return uvloop.run(serve(settings))
    finally:
        listener.stop()
