"""Calls an ASGI application in this process: no sockets, no client library."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

JSON = {"content-type": "application/json"}


@dataclass(frozen=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


async def call(
    app: Any,
    method: str,
    path: str,
    body: bytes | Iterable[bytes] = b"",
    headers: Mapping[str, str] = JSON,
    *,
    is_whole: bool = True,
    scope: Mapping[str, Any] = MappingProxyType({}),
) -> Reply:
    """One request; a body in parts is sent in parts. A client whose body is not whole leaves. scope: its own keys."""
    parts = [body] if isinstance(body, bytes) else list(body)
    path, _, query = path.partition("?")
    asked = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(k.lower().encode("latin-1"), v.encode("latin-1")) for k, v in headers.items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    } | dict(scope)
    left = iter(range(len(parts)))
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        at = next(left, None)
        if at is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": parts[at], "more_body": not is_whole or at < len(parts) - 1}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(asked, receive, send)
    start = sent[0]
    reply_headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in start["headers"]}
    return Reply(start["status"], reply_headers, b"".join(m.get("body", b"") for m in sent[1:]))


async def rank(app: Any, request: Any, headers: Mapping[str, str] | None = None) -> Reply:
    """POST /v1/rank of this object, or of these bytes."""
    body = request if isinstance(request, bytes) else json.dumps(request).encode()
    return await call(app, "POST", "/v1/rank", body, JSON | dict(headers or {}))
