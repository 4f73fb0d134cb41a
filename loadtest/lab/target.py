"""What is attacked: a running Winnow named by its URL, or one that is started on a bundle and ended with the run.

It speaks HTTP without TLS and knows the key; the rate and the bodies are its caller's.
"""

import contextlib
import http.client
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from loadtest import launch
from loadtest.limits import cpu
from loadtest.observed import Floats
from loadtest.open_loop import JSON, Attack

PATIENCE_S = 30.0  # for the first answer and for metrics
REFUSALS = range(400, 500)  # of the first request: then the others needn't be sent


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go. admin: host and port of the admin port; pid: of the service, on this machine."""

    host: str
    port: int
    path: str = "/v1/rank"
    headers: Mapping[str, str] = field(default_factory=dict)
    admin: tuple[str, int] | None = None
    pid: int | None = None

    @property
    def url(self) -> str:
        return f"http://{self._name}:{self.port}{self.path}"

    @property
    def _name(self) -> str:
        return f"[{self.host}]" if ":" in self.host else self.host

    def attack(self, bodies: Sequence[bytes], due_s: Floats, **how: Any) -> Attack:
        """These requests at these instants, for a generator."""
        return Attack(self.port, bodies, due_s, path=self.path, host=self._name, headers=self.headers, **how)

    def metric(self, name: str, **labels: str) -> float:
        """The value of a series on the admin port, which there must be. Raises RuntimeError."""
        assert self.admin  # noqa: S101, whoever asks knows
        try:
            status, text = _call(self.admin, "GET", "/metrics")
        except (OSError, http.client.HTTPException) as e:
            raise RuntimeError(f"the admin port {self.admin[0]}:{self.admin[1]} doesn't answer: {e}") from e
        if status != 200:
            raise RuntimeError(f"GET /metrics on the admin port: status {status}")
        return launch.read_metric(text.decode(), name, **labels)

    def cpu_used(self) -> cpu.Used | None:
        """CPU so far of the service's processes; None where they aren't known."""
        return None if self.pid is None else cpu.used(self.pid)

    def first_answer(self, body: bytes) -> str:
        """Sends one request; the generation that answered, "" if none is named. Raises RuntimeError: it is refused."""
        try:
            status, said = _call((self.host, self.port), "POST", self.path, body, JSON | dict(self.headers))
        except (OSError, http.client.HTTPException) as e:
            raise RuntimeError(f"{self.url} doesn't answer: {e or type(e).__name__}") from e
        if status in REFUSALS:
            why = said[:500].decode(errors="replace")
            raise RuntimeError(f"{self.url} refuses the first request with {status}: {why}")
        with contextlib.suppress(ValueError, AttributeError):
            return str(json.loads(said).get("generation", ""))
        return ""


@contextlib.contextmanager
def started(bundle: Path, workers: int, **settings: str) -> Iterator[Target]:
    """A service of its own on this bundle, ready."""
    with launch.service(bundle, workers, **settings) as server:
        yield Target("127.0.0.1", server.port, admin=("127.0.0.1", server.admin_port), pid=server.process.pid)


def host_and_port(url: str) -> tuple[str, int, str]:
    """Host, port and path of "http://host:port/path" or "host:port". Raises ValueError that says what is allowed."""
    allowed = "allowed is http://HOST:PORT, without TLS"
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        host, port = parts.hostname, parts.port or 80
    except ValueError as e:
        raise ValueError(f"{url}: {e}; {allowed}") from e
    if parts.scheme != "http" or not host or parts.query or parts.fragment or parts.username is not None:
        raise ValueError(f"{url}: {allowed}")
    return host, port, parts.path.rstrip("/")


def read_key(file: Path | None) -> str:
    """The API key: what stands in the file, else in WINNOW_API_KEY; "" for none. Raises ValueError, OSError."""
    key = file.read_text().strip() if file else os.environ.get("WINNOW_API_KEY", "")
    if (file and not key) or not key.isascii() or any(c.isspace() for c in key):
        raise ValueError(f"{file or 'WINNOW_API_KEY'}: allowed is one key, in ASCII and without spaces")
    return key


def _call(
    where: tuple[str, int], method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(*where, timeout=PATIENCE_S)
    try:
        connection.request(method, path, body, dict(headers or {}))
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()
