"""python -m loadtest.noop PORT BYTES: a server that reads a request and answers a fixed body of this size.

The control of a measurement: under the same load from the same generator it shows what of a latency is the
machine's, the generator's and the framework's own. It ranks nothing and knows nothing of the service.
"""

import sys

import uvicorn
from fastapi import FastAPI, Request, Response

PADDING = b'{"items":[],"padding":""}'


def create_app(size: int) -> FastAPI:
    """Answers 200 with `size` bytes of JSON, at least those of the empty form."""
    app = FastAPI(openapi_url=None)
    body = PADDING[:-2] + b"x" * (size - len(PADDING)) + PADDING[-2:]

    @app.post("/v1/rank")
    async def rank(request: Request) -> Response:
        await request.body()
        return Response(body, media_type="application/json")

    @app.get("/readyz")
    async def readyz() -> Response:
        return Response("ready\n", media_type="text/plain")

    return app


if __name__ == "__main__":
    port, size = map(int, sys.argv[1:])
    uvicorn.run(create_app(size), host="127.0.0.1", port=port, loop="uvloop", http="httptools", log_level="warning")
