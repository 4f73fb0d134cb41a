"""Features: what is known of a request and of the items → the arrays that the models read.

The same code runs online, in the workers and in training, so a feature can't mean two things. It owns the
feature schema (which input reads what) and the arithmetic of the named features of the linear pre-ranker.
It does not find out who the person is (users.py) and does not load anything (bundle.py).

Conventions: a history is stored and sent oldest first; a model reads it newest first, so that position 0
means "the last one", cut or zero-padded to the input's length, with a mask of ones and zeros. Inputs have
a first axis of 1 (`per: request`) or n (`per: item`, `per: pair`). f16 tables are read as f32, integers
as i64.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from app.errors import require
from app.flow import F32, Array, Arrays, Candidates, Person, Rows
from app.settings import Limits

Tables = Arrays  # item tables by name, each [N, ...]

HISTORY_FEATURES = ("history_max", "history_mean", "history_last", "history_overlap", "history_gap")  # of a table
HISTORY_READ = 50  # items that history_* features look at; more changes nothing measurable on MovieLens
ROW = "row"  # pseudo-table: the row number itself


class Source(StrEnum):
    """Where a model input comes from."""

    REQUEST = "request"
    CONTEXT = "context"
    USER_TABLE = "user_table"
    HISTORY = "history"
    ITEM_TABLE = "item_table"
    CANDIDATE = "candidate"
    USER_EMBEDDING = "user_embedding"
    ITEM_EMBEDDING = "item_embedding"
    RETRIEVAL_SCORE = "retrieval_score"


# Which part of a request a field is sent in, and so the prefix of its schema key.
FIELD_PREFIX = {"request": "query", "context": "context", "user_table": "user", "candidate": "candidate"}
# Which part of a binding goes with which sources, and with no others.
GOES_WITH = {"table": (Source.HISTORY, Source.ITEM_TABLE), "field": tuple(FIELD_PREFIX), "length": (Source.HISTORY,)}
PER_ITEM = (Source.ITEM_TABLE, Source.CANDIDATE, Source.ITEM_EMBEDDING, Source.RETRIEVAL_SCORE)


# What a field of this type can hold; int64 as exactly as JSON's numbers do.
LARGEST = {"float32": float(np.finfo(np.float32).max), "int64": 2.0**53}


class Strict(BaseModel):
    """Unknown keys, NaN and Infinity are refused; what is read stays as it is."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class FieldSpec(Strict):
    """A value that a request (or the user table) may hold: numbers of a fixed shape, or a category."""

    dtype: Literal["float32", "int64"] = "float32"
    shape: tuple[Annotated[int, Field(ge=1, le=Limits.FEATURE_LENGTH)], ...] = (1,)
    default: float = 0.0

    @model_validator(mode="after")
    def _fits(self) -> "FieldSpec":
        if np.prod(self.shape, dtype=np.float64) > Limits.FEATURE_LENGTH:
            raise ValueError(f"`shape` {self.shape} has more than {Limits.FEATURE_LENGTH} numbers")
        require(self.holds(self.default), f"`default` {self.default:g} is no {self.dtype}", ValueError)
        return self

    def holds(self, values: Any) -> bool:
        """Whether the field's type holds these numbers: whole ones up to 2^53 for int64, what float32 reaches."""
        exact = np.asarray(values, np.float64)
        is_whole = self.dtype == "float32" or np.array_equal(exact, np.floor(exact))
        return bool(is_whole and np.all(np.abs(exact) <= LARGEST[self.dtype]))

    def filled(self, n: int = 1) -> Array:
        """n rows of the default, [n, *shape]."""
        return np.full((n, *self.shape), self.default, self.dtype)


class ModelInput(FieldSpec):
    """Binds one input of a graph, by name, to its source.

    table: for `history` and `item_table`; "row" gives row numbers. field, dtype, shape, default: for what a
    request or a user table holds; `shape` is without the first axis. length, mask: for `history`, how many
    items and the name of the input that gets the mask.
    """

    name: str
    source: Source
    table: str | None = None
    field: str | None = None
    length: int = Field(default=0, ge=0, le=1_000)
    mask: str | None = None

    @model_validator(mode="after")
    def _has_what_its_source_needs(self) -> "ModelInput":
        for part, sources in GOES_WITH.items():
            if (self.source in sources) != bool(getattr(self, part)):
                raise ValueError(f"input {self.name}: `{part}` goes with {', '.join(sources)}, and must say something")
        return self

    @property
    def per(self) -> Literal["request", "item"]:
        """Whether its first axis is 1 or n."""
        return "item" if self.source in PER_ITEM else "request"

    @property
    def key(self) -> str:
        """The schema key of its field, such as "user.age"."""
        return f"{FIELD_PREFIX[self.source]}.{self.field}"


class FeatureSchema(Strict):
    """Everything the models of a bundle read, and from where."""

    user_tower: tuple[ModelInput, ...]
    re_ranker: tuple[ModelInput, ...]
    pre_ranker: tuple[str, ...]

    @cached_property
    def fields(self) -> dict[str, FieldSpec]:
        """Every field by its key; what only the pre-ranker reads is one float32."""
        sent = tuple(f"{prefix}." for prefix in FIELD_PREFIX.values())
        of_pre_ranker = {name: FieldSpec() for name in self.pre_ranker if name.startswith(sent)}
        return of_pre_ranker | {i.key: i for i in self.user_tower + self.re_ranker if i.field}

    @cached_property
    def of_request(self) -> dict[str, FieldSpec]:
        """Those that come once a request."""
        return {key: spec for key, spec in self.fields.items() if not key.startswith("candidate.")}


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the features of one request are made from.

    candidate_fields: by schema key, each [n, *shape], in the order of `candidates`; absent means the default.
    """

    tables: Tables
    person: Person
    candidates: Candidates
    candidate_fields: Arrays


def read_rows(tables: Tables, table: str, rows: Rows) -> Array:
    """These rows of an item table in the type that graphs read: [n, ...]."""
    if table == ROW:
        return rows
    source = tables[table]
    return np.asarray(source.take(rows, axis=0), np.int64 if source.dtype.kind in "iu" else np.float32)


def request_inputs(
    inputs: Sequence[ModelInput], tables: Tables, person: Person, user_embedding: F32 | None = None
) -> dict[str, Array]:
    """The inputs with `per: request`: first axis 1. user_embedding: f32[d], once the user tower has made it."""
    arrays: dict[str, Array] = {}
    for i in inputs:
        if i.source is Source.HISTORY:
            arrays |= _history(i, tables, person.history)
        elif i.source is Source.USER_EMBEDDING and user_embedding is not None:
            arrays[i.name] = user_embedding[None]
        elif i.field and i.per == "request":
            arrays[i.name] = person.fields[i.key]
    return arrays


def _history(i: ModelInput, tables: Tables, history: Rows) -> dict[str, Array]:
    newest = history[::-1][: i.length]
    values = read_rows(tables, str(i.table), newest)
    padded = np.zeros((1, i.length, *values.shape[1:]), values.dtype)
    padded[0, : len(newest)] = values
    arrays = {i.name: padded}
    if i.mask:
        arrays[i.mask] = (np.arange(i.length) < len(newest)).astype(np.float32)[None]
    return arrays


def item_inputs(inputs: Sequence[ModelInput], given: Inputs) -> dict[str, Array]:
    """The inputs whose first axis is n."""
    candidates, n = given.candidates, len(given.candidates)
    arrays: dict[str, Array] = {}
    for i in inputs:
        if i.source in (Source.ITEM_TABLE, Source.ITEM_EMBEDDING):
            arrays[i.name] = read_rows(given.tables, i.table or "embedding", candidates.rows)
        elif i.source is Source.RETRIEVAL_SCORE:
            arrays[i.name] = candidates.retrieval_scores
        elif i.source is Source.CANDIDATE:
            arrays[i.name] = given.candidate_fields.get(i.key, i.filled(n))
    return arrays


# ---------------------------------------------------------------- named features of the linear pre-ranker


def named_features(names: Sequence[str], given: Inputs) -> F32:
    """The features of these names for each candidate: f32[n, len(names)].

    retrieval_score            user_embedding · item_embedding
    item.<table>[.<j>]         the item's value, or column j of it
    user.<f> context.<f> query.<f> candidate.<f>   a field that the request holds
    history_log_count          log(1 + items in the history)
    history_max.<table>, history_mean.<table>, history_last.<table>
                               of the inner products of the candidate's row with those of the last 50 items
    history_overlap.<table>    share of the candidate's values found in a history item, mean over the history
    history_gap.<table>        |value − mean over the history|
    A person without a history has 0 for all of history_*. Raises KeyError for a name or table there isn't.
    """
    matrix = np.empty((len(given.candidates), len(names)), np.float32)
    similarity = dict[str, F32]()
    for column, name in enumerate(names):
        matrix[:, column] = _named(name, given, similarity)
    return matrix


def _named(name: str, given: Inputs, similarity: dict[str, F32]) -> Any:
    kind, _, argument = name.partition(".")
    if kind == "retrieval_score":
        return given.candidates.retrieval_scores
    if kind == "item":
        table, _, column = argument.partition(".")
        values = given.tables[table].take(given.candidates.rows, axis=0)
        return values[:, int(column)] if column else values
    if kind == "candidate":
        sent = given.candidate_fields.get(name)
        return 0.0 if sent is None else sent.reshape(len(given.candidates))
    if kind in FIELD_PREFIX.values():
        return given.person.fields[name].reshape(())
    if kind == "history_log_count":
        return np.log1p(len(given.person.history))
    require(kind in HISTORY_FEATURES and argument in given.tables, f"no feature named {name}", KeyError)
    return _of_history(kind, argument, given, similarity) if len(given.person.history) else 0.0


def _of_history(kind: str, table: str, given: Inputs, similarity: dict[str, F32]) -> Any:
    """similarity: f32[n, h] by table, inner products with the last items of the history, newest first; kept here."""
    values, rows, newest = given.tables[table], given.candidates.rows, given.person.history[::-1][:HISTORY_READ]
    if kind == "history_overlap":
        require(values.dtype.kind != "f", f"{table} holds no categories", KeyError)
        return _overlap(values.reshape(len(values), -1)[rows], values[newest])
    if kind == "history_gap":
        return np.abs(np.asarray(values[rows], np.float32) - np.asarray(values[newest], np.float32).mean())
    if table not in similarity:
        similarity[table] = np.asarray(values[rows], np.float32) @ np.asarray(values[newest], np.float32).T
    if kind == "history_last":
        return similarity[table][:, 0]
    return similarity[table].max(axis=1) if kind == "history_max" else similarity[table].mean(axis=1)


def _overlap(mine: Array, newest: Array) -> Any:
    """mine: [n, m], the candidates' values. newest: [h, ...], those of the history's items. -1 pads, and is none."""
    # How often each value stands in the history's items, counted once an item.
    seen, counts = np.unique(np.concatenate([np.unique(row[row >= 0]) for row in newest]), return_counts=True)
    if not len(seen):
        return 0.0
    at = np.minimum(np.searchsorted(seen, mine), len(seen) - 1)
    share = np.where((seen[at] == mine) & (mine >= 0), counts[at], 0) / len(newest)
    return share.sum(axis=1) / np.maximum((mine >= 0).sum(axis=1), 1)
