"""The one table from error to status, and an error as an answer: nobody else knows the status of one.

They are RFC 9457 problems that name the fields. The errors themselves are errors.py's, the routes api.py's.
"""

import logging
import random
import re
from http import HTTPStatus

from fastapi import Request, Response
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

from app import errors, wire

log = logging.getLogger("winnow.request")

# error → status, and the outcome that the metrics count; what isn't in the table is our bug
STATUSES: dict[type[Exception], tuple[HTTPStatus, str]] = {
    errors.MalformedBody: (HTTPStatus.BAD_REQUEST, "client_error"),
    errors.NotAuthenticated: (HTTPStatus.UNAUTHORIZED, "client_error"),
    errors.NotAllowed: (HTTPStatus.FORBIDDEN, "client_error"),
    errors.BodyTooLarge: (HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "client_error"),
    errors.UnsupportedMedia: (HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "client_error"),
    errors.InvalidRequest: (HTTPStatus.UNPROCESSABLE_ENTITY, "client_error"),
    errors.ContractError: (HTTPStatus.INTERNAL_SERVER_ERROR, "error"),
    errors.CapacityError: (HTTPStatus.SERVICE_UNAVAILABLE, "refused"),
    errors.DeadlineMissed: (HTTPStatus.GATEWAY_TIMEOUT, "deadline"),
    errors.NotThere: (HTTPStatus.NOT_FOUND, "client_error"),
    errors.Conflict: (HTTPStatus.CONFLICT, "client_error"),
}
# What ranking may raise: these two are a switch's.
WHY_NOT = {s.value: e.__doc__ for e, (s, _) in STATUSES.items() if e not in (errors.NotThere, errors.Conflict)}
RETRY_AFTER_S = (1, 3)  # drawn anew for each refusal, so that the refused don't come back together
REQUEST_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")
PROBLEM = "application/problem+json"


class Problem(wire.Wire):
    """RFC 9457, with the fields that are wrong and the request's id."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    errors: tuple[errors.FieldError, ...]
    request_id: str


def problem(error: Exception, request_id: str) -> tuple[Response, str]:
    """The answer to an error, and its outcome; to our bugs a 500 without a trace."""
    status, outcome = STATUSES.get(type(error), STATUSES[errors.ContractError])
    detail, headers = str(error), {"x-request-id": request_id}
    if isinstance(error, HTTPException):  # 404 and 405, which no route of ours sees
        status, detail = HTTPStatus(error.status_code), error.detail
        headers |= error.headers or {}
    elif outcome == "error":
        log.error("request %s failed", request_id, exc_info=error)
        detail = "a defect of the service; the log has it under the request id"
    if status is HTTPStatus.UNAUTHORIZED:
        headers["www-authenticate"] = "Bearer"
    if status is HTTPStatus.SERVICE_UNAVAILABLE:
        headers["retry-after"] = str(random.randint(*RETRY_AFTER_S))  # noqa: S311
    fields = error.errors if isinstance(error, errors.InvalidRequest) else ()
    body = Problem(title=status.phrase, status=status, detail=detail, errors=fields, request_id=request_id)
    return Response(body.model_dump_json(), status, headers, PROBLEM), outcome


async def refuse(request: Request, error: Exception) -> Response:
    """What is raised outside POST /v1/rank, as a problem."""
    return problem(error, request_id_of(request.headers))[0]


def request_id_of(headers: Headers) -> str:
    """The id that the client sent, or a new one."""
    sent = headers.get("x-request-id")
    return sent if sent and REQUEST_ID.fullmatch(sent) else f"{random.getrandbits(128):032x}"
