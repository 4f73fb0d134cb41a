"""HTTP: the routes.

Bodies are read as raw bytes, parsed by the schema and answered as bytes; the OpenAPI document still shows the
schemas, with an example that any bundle answers. What an error becomes is problems.py's.
"""

import asyncio
import logging
import time
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response, Security
from fastapi.responses import PlainTextResponse
from fastapi.security import HTTPBearer
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from app import errors, wire
from app.gate import Phase
from app.keys import require_key
from app.problems import PROBLEM, WHY_NOT, Problem, problem, request_id_of
from app.service import Service, Serving
from app.settings import Limits

log = logging.getLogger("winnow.request")


def routes(service: Service) -> APIRouter:
    """The ranking port."""
    router = APIRouter()
    responses: dict[int | str, Any] = {code: {"description": why, "model": Problem} for code, why in WHY_NOT.items()}
    responses[200] = {"description": "ranked", "headers": {"X-Request-Id": {"schema": {"type": "string"}}}}
    keys = [] if service.keys is None else [Security(HTTPBearer(scheme_name="key", auto_error=False))]

    @router.post("/v1/rank", responses=responses, dependencies=keys)
    async def rank(request: wire.RankRequest) -> wire.RankResponse:
        """Rank the catalogue, or the caller's candidates, for one person."""
        raise NotImplementedError  # for the document: `ranking_first` lets none of these through

    @router.get("/livez", response_class=PlainTextResponse)
    async def livez() -> Response:
        """The loop is alive."""
        return PlainTextResponse("alive\n")

    @router.get("/readyz", response_class=PlainTextResponse, responses={503: {"model": str}})
    async def readyz() -> Response:
        """Warm, at least one worker alive, not draining."""
        if service.gate.phase is Phase.SERVING and service.serving and service.serving.pool.n_workers:
            return PlainTextResponse("ready\n")
        why = "no worker is alive" if service.gate.phase is Phase.SERVING else service.gate.phase
        return PlainTextResponse(f"not ready: {why}\n", HTTPStatus.SERVICE_UNAVAILABLE)

    return router


def admin_routes(service: Service) -> APIRouter:
    """The admin port: for loopback or an internal network only."""
    router = APIRouter()

    @router.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        body, media_type = service.metrics.render()
        return Response(body, headers={"content-type": media_type})

    @router.get("/admin/generations")
    async def generations() -> dict[str, Any]:
        held = [{"role": role, **_of_serving(one)} for role, one in service.held.items()]
        return {"generations": held, "loading": service.loading or None}

    @router.post("/admin/generations", status_code=HTTPStatus.ACCEPTED)
    async def offer(request: Request) -> dict[str, Any]:
        asked = wire.parse(await _body(request), wire.OfferRequest)
        service.offer(Path(asked.path), activate=asked.activate)
        return {"loading": service.loading}

    @router.post("/admin/items")
    async def change_items(request: Request) -> dict[str, Any]:
        sent = await _body(request)
        return await service.change_items(await asyncio.to_thread(wire.parse, sent, wire.ItemsRequest))

    @router.post("/admin/rollback", status_code=HTTPStatus.ACCEPTED)
    async def roll_back() -> dict[str, Any]:
        service.switch_to("previous")
        return {"serving": service.held["serving"].generation.name}

    return router


def _of_serving(held: Serving) -> dict[str, Any]:
    manifest = held.generation.manifest
    lives = {"digest": held.generation.digest, "age_s": round(time.monotonic() - held.loaded_at, 1)}
    works = {"inflight": held.inflight, "workers": held.pool.pids(), "epoch": held.generation.live.epoch}
    holds = {"items": manifest.retrievers[0].n, "retriever": manifest.retrievers[0], "path": str(held.generation.path)}
    shown = {"name", "version", "created", "funnel", "offline_metrics"}
    return lives | works | holds | manifest.model_dump(include=shown)


# ----------------------------------------------------------------------------------------- POST /v1/rank


def ranking_first(service: Service, others: ASGIApp) -> ASGIApp:
    """Ranking goes past FastAPI's ten layers, which it has no use for; everything else goes through them."""

    async def called(scope: Scope, receive: Receive, send: Send) -> None:
        if (scope["type"], scope.get("method"), scope["path"]) == ("http", "POST", "/v1/rank"):
            await (await answer(Request(scope, receive), service))(scope, receive, send)
        else:
            await others(scope, receive, send)

    return called


def refusal(service: Service, scope: Scope, body: bytes) -> Response | None:
    """The answer to a ranking request that could get no permit, whatever else it says; None where it may get one.

    Without a look at the schema: a refusal must cost next to nothing. Who names a priority, or has no key, is read.
    """
    if (scope["method"], scope["path"]) != ("POST", "/v1/rank"):
        return None
    request = Request(scope)
    try:
        require_key(service.keys, request.headers.get("authorization"), "rank")
    except errors.ClientError:
        return None
    if service.gate.has_room() or b'"priority"' in body:
        scope["winnow.coming"] = 1
        service.gate.coming += 1
        return None
    return _counted(service, request, *problem(service.gate.refusal(), request_id_of(request.headers)), {})


async def answer(request: Request, service: Service) -> Response:
    """The ranking, or the problem, of one request."""
    received_at = request.scope.setdefault("winnow.received_at", time.monotonic())
    service.gate.coming -= request.scope.get("winnow.coming", 0)
    request_id, logged = request_id_of(request.headers), dict[str, Any]()
    try:
        require_key(service.keys, request.headers.get("authorization"), "rank")
        sent, schema = await _body(request), wire.RankRequest
        is_large = len(sent) > Limits.LARGE_BODY
        asked = await asyncio.to_thread(wire.parse, sent, schema) if is_large else wire.parse(sent, schema)
        request_id = asked.request_id or request_id
        complete_at = request.scope.get("winnow.complete_at", received_at)
        told, took_s = await service.rank(asked, sent, request_id, (received_at, complete_at))
        took_ms = {part: _ms(seconds) for part, seconds in took_s.items()}
        logged = told.logged | {"stage_ms": took_ms}
        if asked.strict and told.degradations:
            lost = ", ".join(f"{d.stage.label} {d.reason}" for d in told.degradations)
            raise errors.DeadlineMissed(f"the full funnel did not fit: {lost}")
        body = wire.finished(told, took_ms | {"total": _ms(time.monotonic() - received_at)})
        response = Response(body, headers={"x-request-id": request_id}, media_type="application/json")
        outcome = "degraded" if told.degradations else "ok" if told.logged["n"] else "empty"
    except Exception as e:
        response, outcome = problem(e, request_id)
    if service.gate.phase is Phase.DRAINING:
        response.headers["connection"] = "close"  # or the client would come back on a socket that is about to go
    return _counted(service, request, response, outcome, logged)


def _counted(service: Service, request: Request, response: Response, outcome: str, logged: dict[str, Any]) -> Response:
    """The response, counted, and logged in one line with what there is to say of its ranking.

    Of a refusal only for who debugs: its line would cost a third of what it takes, when there is nothing to spare
    (36 µs of the loop's CPU with it, 25 without, hot; AVX-512, 2026-11).
    """
    seconds = time.monotonic() - request.scope["winnow.received_at"]
    service.metrics.request(outcome, seconds)
    if log.isEnabledFor(level := logging.DEBUG if outcome == "refused" else logging.INFO):
        sent = {"request_id": response.headers["x-request-id"], "traceparent": request.headers.get("traceparent")}
        said = {"outcome": outcome, "status": response.status_code, "ms": _ms(seconds)}
        log.log(level, "rank", extra={"fields": sent | said | logged})
    return response


async def _body(request: Request) -> bytes:
    """The body, no longer than the limit. Raises UnsupportedMedia, BodyTooLarge, MalformedBody."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise errors.UnsupportedMedia(f"content-type {media_type or 'is missing'}: send application/json")
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > Limits.BODY_BYTES:
                raise errors.BodyTooLarge(f"the body is over {Limits.BODY_BYTES} bytes")
    except ClientDisconnect as e:  # nobody reads the answer, but the log should not call it a defect
        raise errors.MalformedBody("the client left before the end of the body") from e
    return bytes(body)


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)


# --------------------------------------------------------------------------------------------- OpenAPI


def name_problems(document: dict[str, Any]) -> None:
    """Gives the problems in the document their own media type, which FastAPI can't be told."""
    responses = document["paths"]["/v1/rank"]["post"]["responses"]
    for content in (responses[str(code)]["content"] for code in WHY_NOT):
        content[PROBLEM] = content.pop("application/json")
