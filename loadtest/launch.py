"""A server as a process of its own on free loopback ports: start, log, metrics, workers, stop by its pid.

What is asked of it goes over HTTP; nothing is shared with it. Its log is read by a thread, so that it never waits for
us, and its last lines are kept to say why a measurement failed.
"""

import collections
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PATIENCE_S = 120.0  # for an answer
LOAD_S = 600.0  # to load and warm the largest bundle: 100 million items are 23 GB, read once for their sums
STOP_S = 30.0
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
KEPT_LINES = 200


@dataclass
class Server:
    """A started process that answers on `port`."""

    process: "subprocess.Popen[bytes]"
    port: int
    admin_port: int = 0
    lines: "collections.deque[bytes]" = field(default_factory=lambda: collections.deque(maxlen=KEPT_LINES))

    def call(self, method: str, path: str, body: bytes = b"", *, is_admin: bool = False) -> tuple[int, bytes]:
        """Status and body of one request on a connection of its own."""
        connection = http.client.HTTPConnection(
            "127.0.0.1", self.admin_port if is_admin else self.port, timeout=PATIENCE_S
        )
        try:
            connection.request(method, path, body, {"content-type": "application/json"} if body else {})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def rank(self, body: bytes) -> Any:
        """The answer to one request. Raises RuntimeError when it isn't 200."""
        status, answer = self.call("POST", "/v1/rank", body)
        if status != 200:
            raise RuntimeError(f"status {status}: {answer[:300]!r}")
        return json.loads(answer)

    def wait_until_ready(self) -> None:
        """Raises RuntimeError with the end of the log when it doesn't get ready."""
        wait_for(self._is_ready, LOAD_S, "the server to be ready")

    def _is_ready(self) -> bool:
        if self.process.poll() is not None:
            said = b"".join(self.lines).decode(errors="replace")[-2_000:]
            raise RuntimeError(f"ended with {self.process.returncode}; its log ends: {said}")
        with contextlib.suppress(OSError, http.client.HTTPException):
            return self.call("GET", "/readyz")[0] == 200
        return False

    # ------------------------------------------------------------------------------------ the admin port

    def metric(self, name: str, **labels: str) -> float:
        """The value of a series, 0 if it isn't there; the sum where the labels leave several."""
        _, text = self.call("GET", "/metrics", is_admin=True)
        return read_metric(text.decode(), name, **labels)

    def generations(self) -> Any:
        status, body = self.call("GET", "/admin/generations", is_admin=True)
        if status != 200:
            raise RuntimeError(f"GET /admin/generations: status {status}")
        return json.loads(body)

    def serving(self) -> Any:
        """The generation that serves."""
        return next(g for g in self.generations()["generations"] if g["role"] == "serving")

    def workers(self) -> dict[str, int]:
        """Worker → process id, of the serving generation; one that is being replaced is missing."""
        return {number: pid for number, pid in self.serving()["workers"].items() if pid}

    def offer(self, bundle: Path) -> str:
        """Have this bundle loaded and made to serve; waits for the end of it. Returns why it was refused, or ""."""
        asked = json.dumps({"path": str(bundle.resolve()), "activate": True}).encode()
        status, body = self.call("POST", "/admin/generations", asked, is_admin=True)
        if status != 202:
            return f"status {status}: {body.decode(errors='replace')}"

        def has_ended() -> bool:
            return (self.generations()["loading"] or {}).get("state") != "loading"

        wait_for(has_ended, LOAD_S, f"the end of loading {bundle}")
        return str((self.generations()["loading"] or {}).get("error") or "")


def read_metric(text: str, name: str, **labels: str) -> float:
    """The sum over the series of this name that have these labels."""
    total = 0.0
    for labelled, value in re.findall(rf"^{re.escape(name)}(?:{{(.*)}})? (\S+)$", text, re.MULTILINE):
        found = dict(re.findall(r'(\w+)="([^"]*)"', labelled))
        if labels.items() <= found.items():
            total += float(value)
    return total


def wait_for(is_so: Callable[[], bool], within_s: float, what: str, every_s: float = 0.05) -> float:
    """Ask until it is so; the seconds it took. Raises RuntimeError when it wasn't in time."""
    began = time.monotonic()
    while not is_so():
        if time.monotonic() - began > within_s:
            raise RuntimeError(f"waited {within_s:.0f} s for {what}")
        time.sleep(every_s)
    return time.monotonic() - began


# --------------------------------------------------------------------------------------------- starting


@contextlib.contextmanager
def service(bundle: Path, workers: int, *, log: Path | None = None, **settings: str) -> Iterator[Server]:
    """`python -m app serve` on this bundle, ready. `log`: a file that takes its output, which is then not read."""
    port, admin_port = free_port(), free_port()
    environ = {"BUNDLE": str(bundle.resolve()), "PORT": str(port), "ADMIN_PORT": str(admin_port)}
    environ |= {"WORKERS": str(workers)} | settings
    with _started(["app", "serve"], {f"WINNOW_{k}": v for k, v in environ.items()}, log) as (process, lines):
        server = Server(process, port, admin_port, lines)
        server.wait_until_ready()
        yield server


@contextlib.contextmanager
def noop(size: int) -> Iterator[Server]:
    """The server that does nothing, answering so many bytes."""
    port = free_port()
    with _started(["loadtest.noop", str(port), str(size)], {}, None) as (process, lines):
        server = Server(process, port, 0, lines)
        server.wait_until_ready()
        yield server


@contextlib.contextmanager
def by_hand(bundle: Path, processes: int) -> Iterator[Server]:
    """The server that is glued by hand over this bundle; one thread computes in each process, as in the service's."""
    port = free_port()
    command = ["loadtest.limits.by_hand", str(port), str(bundle.resolve()), str(processes)]
    with _started(command, ONE_THREAD, None) as (process, lines):
        server = Server(process, port, 0, lines)
        server.wait_until_ready()
        yield server


def free_port() -> int:
    """A port that nobody had a moment ago."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextlib.contextmanager
def _started(
    module: list[str], settings: dict[str, str], log: Path | None
) -> Iterator[tuple["subprocess.Popen[bytes]", "collections.deque[bytes]"]]:
    environ = {k: v for k, v in os.environ.items() if not k.startswith("WINNOW_")} | settings
    lines: collections.deque[bytes] = collections.deque(maxlen=KEPT_LINES)
    with contextlib.ExitStack() as stack:
        output: Any = stack.enter_context(log.open("wb")) if log else subprocess.PIPE
        process = subprocess.Popen(
            [sys.executable, "-m", *module], cwd=ROOT, env=environ, stdout=output, stderr=subprocess.STDOUT
        )
        if process.stdout:
            stack.enter_context(process.stdout)
            reader = threading.Thread(target=lines.extend, args=(process.stdout,), daemon=True)
            reader.start()
            stack.callback(reader.join, STOP_S)  # ends with the output, unless a stray child holds that open
        try:
            yield process, lines
        finally:
            stop(process)


def stop(process: "subprocess.Popen[bytes]") -> float:
    """Ask it to end, and end it when it doesn't; the seconds it took."""
    began = time.monotonic()
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return time.monotonic() - began
