"""What is known of the person a request is for: `resolve`.

The request comes first, then the bundle's user table by external id, then the schema's defaults. The look-up has a
time limit; when it is late the person is who the request says, and the answer says so. A person nothing is
known of is no error: an empty history and defaults.
"""

import asyncio
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.bundle import NO_ROW, Generation, Users
from app.errors import FieldError, InvalidRequest, shown
from app.features import FieldSpec
from app.flow import Person, sealed

# The part of a request that fields are sent in, by the prefix of their key.
SENT_IN = {"user": "user.features", "context": "context", "query": "query"}


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request says of its person; `features` by schema key ("user.age"), as sent."""

    user_id: int | str | None
    history: list[int | str] | None
    features: Mapping[str, Any]


async def resolve(asked: Asked, generation: Generation, threads: Executor, limit_s: float) -> tuple[Person, int]:
    """The person, and how many items of the sent history the catalogue doesn't have.

    Raises: InvalidRequest for a feature that the bundle doesn't read, or of the wrong form.
    """
    row, is_late = NO_ROW, False
    if generation.users and asked.user_id is not None:
        look_up = asyncio.get_running_loop().run_in_executor(threads, _row, generation.users, asked.user_id)
        try:
            row = await asyncio.wait_for(look_up, limit_s)
        except TimeoutError:
            is_late = True
    return person(asked, generation, row, is_late)


def person(asked: Asked, generation: Generation, row: int = NO_ROW, is_late: bool = False) -> tuple[Person, int]:
    """The same for a row of the user table that was found already; -1 for nobody's."""
    fields = _fields(asked, generation, row)
    history, n_ignored = np.empty(0, np.int64), 0
    if asked.history is not None:
        rows = generation.ids.rows(asked.history)
        history = rows[rows != NO_ROW]
        n_ignored = len(rows) - len(history)
    elif generation.users and row != NO_ROW and generation.users.history is not None:
        stored = np.asarray(generation.users.history[row], np.int64)
        history = stored[stored != NO_ROW]
    return Person(sealed(history), fields, is_known=row != NO_ROW, is_late=is_late), n_ignored


def _row(users: Users, user_id: int | str) -> int:
    return int(users.ids.rows([user_id])[0])


def _fields(asked: Asked, generation: Generation, row: int) -> dict[str, NDArray[Any]]:
    specs = {k: s for k, s in generation.manifest.features.fields.items() if not k.startswith("candidate.")}
    for key, value in asked.features.items():
        if key not in specs:
            part, _, name = key.partition(".")
            allowed = ", ".join(k.partition(".")[2] for k in specs if k.startswith(f"{part}."))
            raise InvalidRequest(
                FieldError(
                    f"{SENT_IN[part]}.{name}",
                    shown(value),
                    f"no such feature; allowed: {allowed or 'none in this bundle'}",
                )
            )
    tables = generation.users.tables if generation.users and row != NO_ROW else {}
    fields = {}
    for key, spec in specs.items():
        part, _, name = key.partition(".")
        if key in asked.features:
            where = f"{SENT_IN[part]}.{name}"
            fields[key] = field_value(where, asked.features[key], spec, generation.vocab.get(key))
        elif part == "user" and name in tables:
            fields[key] = np.asarray(tables[name][row], spec.dtype).reshape(1, *spec.shape)
        else:
            fields[key] = spec.filled()
    return fields


def field_value(where: str, value: Any, spec: FieldSpec, vocab: Mapping[str, int] | None) -> NDArray[Any]:
    """A value as sent → [1, *shape] of the schema's type; an unknown category is the default.

    Raises: InvalidRequest that names the field (`where`) and what is allowed.
    """
    if isinstance(value, str):
        if vocab is None:
            raise InvalidRequest(FieldError(where, shown(value), f"{_form(spec)}: it has no category names"))
        value = vocab.get(value, spec.default)
    try:
        exact = np.asarray(value, np.float64).reshape(1, *spec.shape)
    except ValueError as e:
        raise InvalidRequest(FieldError(where, shown(value), _form(spec))) from e
    if not spec.holds(exact):
        raise InvalidRequest(FieldError(where, shown(value), f"{_form(spec)} of type {spec.dtype}"))
    return exact.astype(spec.dtype)


def _form(spec: FieldSpec) -> str:
    size = int(np.prod(spec.shape))
    kind = "integer" if spec.dtype == "int64" else "number"
    return f"one {kind}" if size == 1 else f"a list of {size} {kind}s"
