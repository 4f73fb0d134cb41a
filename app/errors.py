"""The exceptions of the online path. Which HTTP status each becomes is decided in api.py alone.

WinnowError
├── ClientError              the caller can mend it
│   ├── MalformedBody            not JSON
│   ├── InvalidRequest           JSON, but not what the schema or the bundle allows: names the fields
│   ├── BodyTooLarge             more bytes than we read
│   ├── UnsupportedMedia         not application/json
│   ├── NotAuthenticated         no key, or one that we don't know
│   ├── NotAllowed               a key without this right
│   ├── NotThere                 no such bundle
│   └── Conflict                 another switch is under way, or there is nothing to go back to
├── CapacityError            no permit: starting, draining or full; try again later
├── ServerError              something outside this request broke
│   ├── BundleError              a bundle that must not be served: names the file
│   ├── StageFailed              a model, an index or a worker failed: a fallback takes its place
│   │   └── Deadly                   workers ended over this request: nobody else should try it
│   └── DeadlineMissed           only for `strict`: the full funnel did not fit the deadline
└── ContractError            our bug: loud, never degraded away
"""

import json
from dataclasses import dataclass
from typing import Any

SHOWN_VALUE = 100  # characters


@dataclass(frozen=True, slots=True)
class FieldError:
    """One thing wrong with a request: the field's path, its value, and what is allowed."""

    field: str
    value: Any
    allowed: str


def shown(value: Any) -> Any:
    """A value fit for an error: what any reader of JSON holds as it is; else its JSON; of a long text the head."""
    most = float("inf") if isinstance(value, float) else 2**53
    if value is None or (isinstance(value, int | float) and abs(value) < most):
        return value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN_VALUE else text[:SHOWN_VALUE] + "…"


class WinnowError(Exception):
    """Root of the tree."""


class ClientError(WinnowError):
    """The caller can mend it."""


class MalformedBody(ClientError):
    """The body isn't JSON."""


class InvalidRequest(ClientError):
    """The body is JSON, but not what the schema or the bundle allows."""

    def __init__(self, *errors: FieldError) -> None:
        super().__init__(*errors)
        self.errors = errors

    def __str__(self) -> str:
        return "; ".join(f"{e.field}: {e.allowed}" for e in self.errors)


class BodyTooLarge(ClientError):
    """The body is longer than the limit."""


class UnsupportedMedia(ClientError):
    """The body's media type isn't application/json."""


class NotAuthenticated(ClientError):
    """No key was sent, or none that we know."""


class NotAllowed(ClientError):
    """The key lacks this right."""


class NotThere(ClientError):
    """There is no such bundle."""


class Conflict(ClientError):
    """The switch conflicts with another, or with what is held."""


class CapacityError(WinnowError):
    """No permit now: starting, draining or full."""


class ServerError(WinnowError):
    """Something outside this request broke."""


class BundleError(ServerError):
    """A bundle that must not be served. The message is one sentence that names the file."""


def require(is_so: bool, sentence: str, otherwise: type[Exception] = BundleError) -> None:
    """What must hold. Raises an error with this sentence; by default what a bundle must fulfil to be served."""
    if not is_so:
        raise otherwise(sentence)


class StageFailed(ServerError):
    """A model, an index or a worker failed; the funnel puts a fallback in its place."""


class Deadly(StageFailed):
    """Processes that had this request ended, one after the other; it isn't tried in another."""


class DeadlineMissed(ServerError):
    """The full funnel did not fit the deadline and the caller asked for nothing less."""


class ContractError(WinnowError):
    """A promise between two stages was broken: a defect in Winnow."""
