"""HTTP: the routes, and the one table from error to status. Nobody else knows a status code.

Bodies are read as raw bytes, parsed by the schema and answered as bytes; the OpenAPI document still shows the
schemas, with an example that the served bundle answers. Errors are RFC 9457 problems that name the fields.
"""

import asyncio
import logging
import random
import re
import time
import uuid
from dataclasses import asdict
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from app import errors, wire
from app.flow import Stage
from app.funnel import require_full
from app.service import Answered, Service
from app.settings import Limits

log = logging.getLogger("winnow.request")

# error → status, and the outcome that the metrics count
STATUSES: dict[type[Exception], tuple[HTTPStatus, str]] = {
    errors.MalformedBody: (HTTPStatus.BAD_REQUEST, "client_error"),
    errors.InvalidRequest: (HTTPStatus.UNPROCESSABLE_ENTITY, "client_error"),
    errors.BodyTooLarge: (HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "client_error"),
    errors.UnsupportedMedia: (HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "client_error"),
    errors.NotAuthenticated: (HTTPStatus.UNAUTHORIZED, "client_error"),
    errors.NotAllowed: (HTTPStatus.FORBIDDEN, "client_error"),
    errors.CapacityError: (HTTPStatus.SERVICE_UNAVAILABLE, "refused"),
    errors.DeadlineMissed: (HTTPStatus.GATEWAY_TIMEOUT, "deadline"),
}
RETRY_AFTER_S = (1, 3)  # drawn anew for each refusal, so that the refused don't come back together
REQUEST_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")
PROBLEM = "application/problem+json"
WHY_NOT = {
    400: "not JSON",
    401: "no key, or an unknown one",
    403: "a key without this right",
    413: "the body is too large",
    415: "not application/json",
    422: "not the schema: which field, and what is allowed",
    500: "a defect of the service",
    503: "no permit: starting, draining or full",
    504: "`strict`: the full funnel did not fit the deadline",
}


class ErrorPart(wire.Wire):
    field: str
    value: Any
    allowed: str


class Problem(wire.Wire):
    """RFC 9457, with the fields that are wrong and the request's id."""

    type: str
    title: str
    status: int
    detail: str
    errors: list[ErrorPart]
    request_id: str


def routes(service: Service) -> APIRouter:
    """The ranking port."""
    router = APIRouter()
    refs: dict[int | str, dict[str, Any]] = {
        code: {"description": why, "content": _content("Problem", PROBLEM)} for code, why in WHY_NOT.items()
    }
    found = {"description": "ranked", "content": _content("RankResponse"), "headers": _REQUEST_ID_HEADER}

    @router.post(
        "/v1/rank",
        summary="Rank the catalogue, or the caller's candidates, for one person",
        response_class=Response,
        responses={200: found, **refs},
        openapi_extra={"requestBody": {"required": True, "content": _content("RankRequest")}},
    )
    async def rank(request: Request) -> Response:
        return await _answer(request, service)

    @router.get("/livez", summary="The loop is alive", response_class=Response, responses={200: _PLAIN})
    async def livez() -> Response:
        return Response("alive\n", media_type="text/plain")

    @router.get(
        "/readyz",
        summary="Warm, at least one worker alive, not draining",
        response_class=Response,
        responses={200: _PLAIN, 503: _PLAIN},
    )
    async def readyz() -> Response:
        if service.is_ready:
            return Response("ready\n", media_type="text/plain")
        return Response(f"not ready: {service.gate.phase}\n", 503, media_type="text/plain")

    return router


def admin_routes(service: Service) -> APIRouter:
    """The admin port: for loopback or an internal network only."""
    router = APIRouter()

    @router.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        body, media_type = service.metrics.render()
        return Response(body, headers={"content-type": media_type})

    @router.get("/admin/generations", response_class=Response)
    async def generations() -> Response:
        now = time.monotonic()
        held = [
            {"role": role, "digest": digest, "age_s": round(now - loaded_at, 1), **_of_manifest(service)}
            for role, digest, loaded_at in service.generations()
        ]
        return Response(orjson.dumps({"generations": held}), media_type="application/json")

    return router


def _of_manifest(service: Service) -> dict[str, Any]:
    if service.serving is None:
        return {}
    manifest = service.serving.generation.manifest
    return {
        "name": manifest.name,
        "version": manifest.version,
        "created": manifest.created,
        "items": manifest.retrievers[0].n,
        "retriever": manifest.retrievers[0].model_dump(),
        "offline_metrics": manifest.offline_metrics,
    }


# ----------------------------------------------------------------------------------------- POST /v1/rank


async def _answer(request: Request, service: Service) -> Response:
    received_at = request.scope.get("winnow.received_at", time.monotonic())
    request_id, answered = _request_id(request.headers.get("x-request-id")), None
    try:
        service.keys.require(request.headers.get("authorization"), "rank")
        sent = await _body(request)
        is_large = len(sent) > wire.LARGE_BODY
        asked = await asyncio.to_thread(wire.parse, sent) if is_large else wire.parse(sent)
        request_id = asked.request_id or request_id
        answered = await service.rank(asked, request_id, received_at, is_large=is_large)
        if answered.query.is_strict:
            require_full(answered.ranking)
        took_ms = _took_ms(answered, time.monotonic() - received_at)
        body = orjson.dumps(wire.answer(answered.query, answered.ranking, answered.ids, took_ms))
        response = Response(body, media_type="application/json")
        outcome = "degraded" if answered.ranking.degradations else "ok" if len(answered.ranking) else "empty"
    except errors.WinnowError as e:
        response, outcome = problem(e, request_id)
    except Exception as e:
        response, outcome = problem(e, request_id)
    response.headers["x-request-id"] = request_id
    seconds = time.monotonic() - received_at
    service.metrics.request(outcome, seconds)
    _log(request, request_id, outcome, response.status_code, seconds, answered)
    return response


def _request_id(sent: str | None) -> str:
    return sent if sent and REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex


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


def _took_ms(answered: Answered, total_s: float) -> dict[str, float]:
    stages = {r.stage.label: r.seconds for r in answered.ranking.reports}
    seconds = {"users": answered.users_s, **stages, "total": total_s}
    return {name: round(s * 1e3, 3) for name, s in seconds.items()}


def _log(
    request: Request, request_id: str, outcome: str, status: int, seconds: float, answered: Answered | None
) -> None:
    """One line a request."""
    fields: dict[str, Any] = {
        "request_id": request_id,
        "traceparent": request.headers.get("traceparent"),
        "outcome": outcome,
        "status": status,
        "ms": round(seconds * 1e3, 3),
    }
    if answered:
        ranking, reranking = answered.ranking, answered.ranking.report(Stage.RERANKING)
        fields |= {
            "generation": ranking.generation,
            "is_known": answered.query.person.is_known,
            "history": len(answered.query.person.history),
            "k": answered.query.k,
            "n": len(ranking),
            "wanted": reranking.wanted,
            "reranked": reranking.done,
            "degraded": [f"{d.stage.label}: {d.reason}" for d in ranking.degradations],
            "stage_ms": {r.stage.label: round(r.seconds * 1e3, 3) for r in ranking.reports},
        }
    log.info("rank", extra={"fields": fields})


def problem(error: Exception, request_id: str) -> tuple[Response, str]:
    """The answer to an error, and its outcome. What isn't in the table is our bug: a 500 without a trace."""
    status, outcome = STATUSES.get(type(error), (HTTPStatus.INTERNAL_SERVER_ERROR, "error"))
    detail = str(error)
    if outcome == "error":
        log.error("request %s failed", request_id, exc_info=error)
        detail = "a defect of the service; the log has it under the request id"
    fields = error.errors if isinstance(error, errors.InvalidRequest) else ()
    body = _problem_body(status, detail, [asdict(f) for f in fields], request_id)
    response = Response(body, status, media_type=PROBLEM)
    if status is HTTPStatus.UNAUTHORIZED:
        response.headers["www-authenticate"] = "Bearer"
    if status is HTTPStatus.SERVICE_UNAVAILABLE:
        response.headers["retry-after"] = str(random.randint(*RETRY_AFTER_S))  # noqa: S311
    return response, outcome


def _problem_body(status: HTTPStatus, detail: str, fields: list[dict[str, Any]], request_id: str) -> bytes:
    return orjson.dumps(
        {
            "type": "about:blank",
            "title": status.phrase,
            "status": status.value,
            "detail": detail,
            "errors": fields,
            "request_id": request_id,
        }
    )


async def not_found(request: Request, error: Exception) -> Response:
    """404 and 405, which no route of ours sees."""
    assert isinstance(error, HTTPException)  # noqa: S101
    request_id = _request_id(request.headers.get("x-request-id"))
    body = _problem_body(HTTPStatus(error.status_code), str(error.detail), [], request_id)
    headers = {**(error.headers or {}), "x-request-id": request_id}
    return Response(body, error.status_code, headers, PROBLEM)


# --------------------------------------------------------------------------------------------- OpenAPI

_REQUEST_ID_HEADER = {"X-Request-Id": {"schema": {"type": "string"}}}
_PLAIN = {"description": "a word", "content": {"text/plain": {"schema": {"type": "string"}}}}


def _content(schema: str, media_type: str = "application/json") -> dict[str, Any]:
    return {media_type: {"schema": {"$ref": f"#/components/schemas/{schema}"}}}


def openapi(app: FastAPI, service: Service) -> dict[str, Any]:
    """The document, with the wire schemas and an example that the served bundle answers."""
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    _, schemas = models_json_schema(
        [(wire.RankRequest, "validation"), (wire.RankResponse, "serialization"), (Problem, "serialization")],
        ref_template="#/components/schemas/{model}",
    )
    components = document.setdefault("components", {})
    components.setdefault("schemas", {}).update(schemas["$defs"])
    # Golden requests come from somebody's log: not for readers without a key.
    if service.serving and service.serving.generation.manifest.golden and not service.keys.are_required:
        example = service.serving.generation.manifest.golden[0].request
        content = document["paths"]["/v1/rank"]["post"]["requestBody"]["content"]
        content["application/json"]["example"] = example
    if service.keys.are_required:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["paths"]["/v1/rank"]["post"]["security"] = [{"key": []}]
    return document
