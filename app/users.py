"""What is known of the person a request is for: `resolve`.

The request comes first, then the bundle's user table by external id, then the schema's defaults. It runs in a thread
and has the time that retrieval and pre-ranking have (funnel.py); when it is late the person is who the request says,
and the answer says so. A person nothing is known of is no error: an empty history and defaults.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from app.bundle import NO_ROW, Generation, Users
from app.errors import FieldError, InvalidRequest, shown
from app.features import FieldSpec
from app.flow import Person, sealed

# The part of a request that fields are sent in, by the prefix of their key.
SENT_IN = {"user": "user.features", "context": "context", "query": "query"}


class Found(NamedTuple):
    """The outcome of a look-up: a row of the user table, -1 for nobody's; is_late: there was no time for one."""

    row: int = NO_ROW
    is_late: bool = False


def resolve(user_id: int | str | None, generation: Generation, *, is_late: bool = False) -> Found:
    """Where the user table has this person; is_late: it can't be waited for any more."""
    if generation.users is None or user_id is None:
        return Found()
    return Found(is_late=True) if is_late else Found(look_up(user_id, generation.users))


def look_up(user_id: int | str, users: Users) -> int:
    """The person's row, or NO_ROW."""
    return int(users.ids.rows([user_id])[0])


def person(
    sent: list[int | str] | None, features: Mapping[str, Any], generation: Generation, found: Found
) -> tuple[Person, int]:
    """With the history and the features (by schema key) that were sent; how many of its items the catalogue lacks.

    Raises: InvalidRequest for a feature that the bundle doesn't read, or of the wrong form.
    """
    rows, table = np.empty(0, np.int64), generation.users
    is_known = found.row != NO_ROW
    if sent is not None:
        rows = generation.ids.rows(sent)
    elif table and is_known and table.history is not None:
        rows = np.asarray(table.history[found.row], np.int64)
    history, fields = rows[rows != NO_ROW], _fields(features, generation, found.row)
    n_ignored = 0 if sent is None else len(rows) - len(history)
    return Person(sealed(history), fields, is_known, found.is_late), n_ignored


def _fields(features: Mapping[str, Any], generation: Generation, row: int) -> dict[str, NDArray[Any]]:
    """What was sent, else what the user table has in this row, else the defaults."""
    specs = {key: s for key, s in generation.manifest.features.fields.items() if key.partition(".")[0] in SENT_IN}
    tables = generation.users.tables if generation.users and row != NO_ROW else {}
    stored = {
        f"user.{name}": np.asarray(table[row], spec.dtype).reshape(1, *spec.shape)
        for name, table in tables.items()
        if (spec := specs.get(f"user.{name}"))
    }
    sent = {key: field_value(_where(key), key, value, generation) for key, value in features.items()}
    return {key: spec.filled() for key, spec in specs.items()} | stored | sent


def _where(key: str) -> str:
    part, _, name = key.partition(".")
    return f"{SENT_IN[part]}.{name}"


def field_value(where: str, key: str, value: Any, generation: Generation) -> NDArray[Any]:
    """A value as sent for a schema key → [1, *shape] of its type; an unknown category is the default.

    Raises: InvalidRequest that names the field (`where`) and what is allowed.
    """
    try:
        return field_values(key, [value], generation)
    except ValueError as e:
        raise InvalidRequest(FieldError(where, shown(value), str(e))) from e


def field_values(key: str, values: Sequence[Any], generation: Generation) -> NDArray[Any]:
    """The same for many candidates, in one conversion: [n, *shape].

    A number and a list of it are the same. Raises: ValueError that says what is allowed, if a value isn't.
    """
    specs, vocab = generation.manifest.features.fields, generation.vocab.get(key)
    if key not in specs:
        prefix = key.partition(".")[0] + "."
        names = ", ".join(k.removeprefix(prefix) for k in specs if k.startswith(prefix))
        raise ValueError(f"no such feature; allowed: {names or 'none in this bundle'}")
    spec = specs[key]
    if any(isinstance(v, str) for v in values):
        if vocab is None:
            raise ValueError(f"{_form(spec)}: it has no category names")
        values = [vocab.get(v, spec.default) if isinstance(v, str) else v for v in values]
    listed = [v if isinstance(v, list) else [v] for v in values]
    try:
        exact = np.asarray(listed, np.float64).reshape(len(values), *spec.shape)
    except ValueError as e:
        raise ValueError(_form(spec)) from e
    if not spec.holds(exact):
        raise ValueError(f"{_form(spec)} of type {spec.dtype}")
    return exact.astype(spec.dtype)


def _form(spec: FieldSpec) -> str:
    size = int(np.prod(spec.shape))
    kind = "integer" if spec.dtype == "int64" else "number"
    return f"one {kind}" if size == 1 else f"a list of {size} {kind}s"
