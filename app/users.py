"""What is known of the person a request is for: `resolve`.

The request comes first, then the bundle's user table by external id, then the schema's defaults. It runs where the
search runs, and has the time that retrieval and pre-ranking have (funnel.py); when it is late the person is who the
request says, and the answer says so. A person nothing is known of is no error: an empty history and defaults.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from app.bundle import NO_ROW, Generation, Id
from app.errors import FieldError, InvalidRequest, shown
from app.features import FieldSpec
from app.flow import Array, Person, sealed


def resolve(
    user_id: Id | None, sent: list[Id] | None, features: Mapping[str, Any], generation: Generation, *, is_late: bool
) -> tuple[Person, int]:
    """With the history and the features (by schema key) that were sent; how many of its items the catalogue lacks.

    is_late: the user table can't be waited for any more.
    Raises: InvalidRequest for a feature that the bundle doesn't read, or of the wrong form.
    """
    users = generation.users
    rows, row = np.empty(0, np.int64), NO_ROW
    if users and user_id is not None and not is_late:
        row = int(users.ids.rows([user_id])[0])
    if sent is not None:
        rows = generation.ids.rows(sent)
    elif users and row != NO_ROW and users.history is not None:
        rows = np.asarray(users.history[row], np.int64)
    history, fields = rows[rows != NO_ROW], _fields(features, generation, row)
    n_ignored = 0 if sent is None else len(rows) - len(history)
    return Person(sealed(history), fields, row != NO_ROW, is_late and bool(users) and user_id is not None), n_ignored


def _fields(features: Mapping[str, Any], generation: Generation, row: int) -> dict[str, Array]:
    """What was sent, else what the user table has in this row, else the defaults."""
    specs, fields = generation.manifest.features.of_request, dict[str, Array]()
    for name, table in generation.users.tables.items() if generation.users and row != NO_ROW else ():
        if spec := specs.get(f"user.{name}"):
            fields[f"user.{name}"] = np.asarray(table[row], spec.dtype).reshape(1, *spec.shape)
    for key, value in features.items():
        fields[key] = field_value(re.sub(r"^user\.", "user.features.", key), key, value, generation)
    return fields | {key: spec.filled() for key, spec in specs.items() if key not in fields}


def field_value(where: str, key: str, value: Any, generation: Generation) -> Array:
    """A value as sent for a schema key → [1, *shape] of its type; an unknown category is the default.

    Raises: InvalidRequest that names the field (`where`) and what is allowed.
    """
    try:
        return field_values(key, [value], generation)
    except ValueError as e:
        raise InvalidRequest(FieldError(where, shown(value), str(e))) from e


def field_values(key: str, values: Sequence[Any], generation: Generation) -> Array:
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
