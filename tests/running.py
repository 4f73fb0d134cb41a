"""A service as a process of its own, on free loopback ports, ended by its pid."""

import hashlib
import http.client
import json
import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.asgi import JSON, Reply

RANK_KEY, EVENTS_KEY = "key-that-may-rank", "key-that-may-send-events"
KEYS_FILE = "".join(
    f"{hashlib.sha256(key.encode()).hexdigest()}  {right}\n"
    for key, right in ((RANK_KEY, "rank"), (EVENTS_KEY, "events"))
)
AUTHORIZED = {"authorization": f"Bearer {RANK_KEY}"}
PATIENCE_S = 60.0  # a test that waits longer has failed


@dataclass
class Running:
    """A started process; its standard output is read line by line."""

    process: "subprocess.Popen[str]"
    port: int
    admin_port: int
    lines: "queue.Queue[str | None]" = field(default_factory=queue.Queue)
    seen: list[dict[str, Any]] = field(default_factory=list)

    def call(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] = JSON, *, port: int | None = None
    ) -> Reply:
        """One request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", port or self.port, timeout=PATIENCE_S)
        try:
            connection.request(method, path, body, dict(headers))
            answer = connection.getresponse()
            return Reply(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def rank(self, request: Any) -> Reply:
        return self.call("POST", "/v1/rank", json.dumps(request).encode(), JSON | AUTHORIZED)

    def metrics(self) -> str:
        return self.call("GET", "/metrics", port=self.admin_port).body.decode()

    def counted(self, outcome: str) -> float:
        """How many requests ended so."""
        start = f'winnow_requests_total{{outcome="{outcome}"}} '
        return next(float(x.removeprefix(start)) for x in self.metrics().splitlines() if x.startswith(start))

    def wait_for_line(self, message: str) -> dict[str, Any]:
        """The next log line whose message begins so."""
        while (line := self.lines.get(timeout=PATIENCE_S)) is not None:
            self.seen.append(json.loads(line))
            if self.seen[-1]["message"].startswith(message):
                return self.seen[-1]
        raise AssertionError(f"ended without a line {message!r}; wrote {self.seen}")

    def wait_until_ready(self) -> None:
        self.wait_for_line("ready after")

    def wait_until_listening(self) -> None:
        """Both ports accept connections."""
        for port in (self.port, self.admin_port):
            _wait_for_port(port, self.process)

    def workers(self) -> list[int]:
        """Process ids of the workers of what it serves."""
        held = self.call("GET", "/admin/generations", port=self.admin_port).json()["generations"]
        return [pid for one in held if one["role"] == "serving" for pid in one["workers"].values()]


def _wait_for_port(port: int, process: "subprocess.Popen[str]") -> None:
    """There is no event for a port that opens: try until it is."""
    pause = threading.Event()
    while process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S).close()
            return
        except ConnectionRefusedError:
            pause.wait(0.01)
    raise AssertionError(f"ended with {process.returncode} before port {port} was open")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextmanager
def running(bundle: Path, stdout: Any = subprocess.PIPE, **settings: str) -> Iterator[Running]:
    """`python -m app serve` on this bundle with one worker. stdout: where its log goes; a pipe is read."""
    ports = {"WINNOW_PORT": free_port(), "WINNOW_ADMIN_PORT": free_port()}
    environ = {k: v for k, v in os.environ.items() if not k.startswith("WINNOW_")}
    environ |= {"WINNOW_BUNDLE": str(bundle), "WINNOW_WORKERS": "1"}
    environ |= {name: str(port) for name, port in ports.items()} | settings
    process = subprocess.Popen(
        [sys.executable, "-m", "app", "serve"], env=environ, stdout=stdout, stderr=None, text=True
    )
    started = Running(process, ports["WINNOW_PORT"], ports["WINNOW_ADMIN_PORT"])
    reader = threading.Thread(target=_read, args=(process, started.lines))
    reader.start()
    try:
        yield started
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        reader.join()
        if process.stdout:
            process.stdout.close()


def _read(process: "subprocess.Popen[str]", lines: "queue.Queue[str | None]") -> None:
    for line in process.stdout or ():
        lines.put(line)
    lines.put(None)
