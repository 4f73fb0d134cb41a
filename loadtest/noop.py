"""python -m loadtest.noop PORT BYTES: a server that reads a request and answers a fixed body of this size.

The control of a measurement: under the same load from the same generator it shows what of a latency is the
machine's, the generator's and the HTTP server's own. It is a plain ASGI application on uvicorn, as the service's
ranking route is. It ranks nothing and knows nothing of the service.
"""

import sys

import uvicorn
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

PADDING = b'{"items":[],"padding":""}'


def create_app(size: int) -> ASGIApp:
    """Answers 200 with `size` bytes of JSON, at least those of the empty form; GET is the question if it is ready."""
    body = PADDING[:-2] + b"x" * (size - len(PADDING)) + PADDING[-2:]

    async def called(scope: Scope, receive: Receive, send: Send) -> None:
        is_ranking = scope["method"] == "POST"
        if is_ranking:
            await Request(scope, receive).body()
        answer = Response(body, media_type="application/json") if is_ranking else Response("ready\n")
        await answer(scope, receive, send)

    return called


if __name__ == "__main__":
    port, size = map(int, sys.argv[1:])
    app = create_app(size)
    uvicorn.run(app, host="127.0.0.1", port=port, loop="uvloop", http="httptools", lifespan="off", log_level="warning")
