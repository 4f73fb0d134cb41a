"""python -m loadtest.limits.by_hand PORT BUNDLE PROCESSES: the kernels behind FastAPI, as an engineer would glue them.

What the service is compared with where there is none: kernels.py in a thread beside each process's event loop, a
pydantic model for the body, orjson for the answer, uvicorn's own processes on one port. It has no deadline, no queue
limit, no contracts, no metrics and no log; whoever writes one by hand begins with this. It answers in the form that the
generator reads. Processes share a socket, so a client's connections stay with whoever took them, and one process may
have a queue while another idles: its highest rate depends on that luck, as such a server's does.
"""

import asyncio
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import orjson
import uvicorn
from fastapi import FastAPI, Request, Response
from pydantic import BaseModel

from loadtest.limits.kernels import WARM_UP, Asked, look_up, opened

BUNDLE = "BY_HAND_BUNDLE"  # environment variable: uvicorn starts its processes anew


class User(BaseModel):
    id: str | int | None = None
    history: list[str | int] | None = None
    features: dict[str, Any] = {}


class Body(BaseModel):
    """What of a request this server reads."""

    user: User = User()
    context: dict[str, Any] = {}
    query: dict[str, Any] = {}
    exclude: list[str | int] = []
    k: int | None = None
    rerank_count: int | None = None


def create_app() -> FastAPI:
    """One process: its bundle, its thread."""
    app, kernels = FastAPI(openapi_url=None), opened(Path(os.environ[BUNDLE]))
    thread, g = ThreadPoolExecutor(1), kernels.generation

    def answer(sent: bytes) -> bytes:
        asked = look_up(g, Body.model_validate_json(sent).model_dump(exclude_none=True))
        if not isinstance(asked, Asked):
            raise ValueError(asked)
        rows, scores = kernels.answer(asked)
        items = [
            {"id": i, "score": s, "stage": "reranking"}
            for i, s in zip(g.ids.external(rows), scores.tolist(), strict=True)
        ]
        width = {"wanted": asked.width, "reranked": asked.width}
        return orjson.dumps({"items": items, "coverage": width, "degraded": [], "generation": g.name})

    proved = [look_up(g, golden.request) for golden in g.manifest.golden]
    usable = [asked for asked in proved if isinstance(asked, Asked)]
    for number in range(WARM_UP if usable else 0):  # each process, before it is ready
        kernels.answer(usable[number % len(usable)])

    @app.post("/v1/rank")
    async def rank(request: Request) -> Response:
        body = await asyncio.get_running_loop().run_in_executor(thread, answer, await request.body())
        return Response(body, media_type="application/json")

    @app.get("/readyz")
    async def readyz() -> Response:
        return Response("ready\n", media_type="text/plain")

    return app


def main(port: str, bundle: str, processes: str) -> None:
    os.environ[BUNDLE] = bundle
    uvicorn.run(
        "loadtest.limits.by_hand:create_app",
        factory=True,
        host="127.0.0.1",
        port=int(port),
        workers=int(processes),
        loop="uvloop",
        http="httptools",
        access_log=False,
        log_level="warning",
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
