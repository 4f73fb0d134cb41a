"""The wire: what POST /v1/rank takes and answers, and how a request becomes a Query.

Schemas end at the door: behind `to_query` there are rows and arrays only. A wrong request is refused with the first
fields that are wrong, their values and what is allowed (a long list ends at its first wrong value, and a body with
over a thousand errors is refused as a whole); an item that the catalogue doesn't have is no error, it is left out
and counted (`ignored`). Statuses are api.py's; what is known of the person is users.py's. It is over 250 lines
because both directions of one schema stand here.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from app import users
from app.bundle import NO_ROW, Generation
from app.errors import FieldError, InvalidRequest, MalformedBody, require, shown
from app.features import LARGEST
from app.flow import LABELS, Array, Arrays, Filter, Query, Ranking, Rows, Stage, Told, sealed
from app.settings import Limits

SHOWN_ERRORS = 20
MANY_ERRORS = 1_000  # beyond them none is named
SCORES_TOLD = 3  # of an answer, to be counted: its head is what moves when a model goes wrong

Text = Annotated[str, Field(max_length=Limits.ID_LENGTH)]
Id = int | Text
# Long lists end at their first wrong value (`fail_fast`): to describe ten thousand would take 0.1 s.
FeatureValue = float | Text | Annotated[list[float], Field(max_length=Limits.FEATURE_LENGTH, fail_fast=True)]
Features = Annotated[dict[Text, FeatureValue], Field(max_length=Limits.FEATURES)]


class Wire(BaseModel):
    """Unknown fields are refused, and so are numbers in strings, NaN and Infinity."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class UserPart(Wire):
    """Who asks. What is sent here comes before what the bundle's user table knows."""

    id: Id | None = Field(None, description="External id, as in the bundle's user table.")
    features: Features = Field(default_factory=dict, description="By name, as in the bundle's schema.")
    history: list[Id] | None = Field(None, max_length=Limits.HISTORY, fail_fast=True, description="Ids, oldest first.")


class FilterPart(Wire):
    """A condition on an item table. Of an item with several values, any may satisfy it."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 2})

    field: Text
    eq: float | Text | None = None
    one_of: list[float | Text] | None = Field(None, alias="in", max_length=Limits.FILTER_VALUES, fail_fast=True)
    gte: float | None = None
    lte: float | None = None

    @model_validator(mode="after")
    def _says_something(self) -> "FilterPart":
        says = any(part is not None for part in (self.eq, self.one_of, self.gte, self.lte))
        require(says, "one of eq, in, gte, lte is needed", ValueError)
        require(self.eq is None or self.one_of is None, "eq or in, not both", ValueError)
        return self


class CandidatePart(Wire):
    """A candidate with features that only the caller knows (a bid, a distance)."""

    id: Id
    features: Features = Field(default_factory=dict)


class RankRequest(Wire):
    """One ranking request. Everything is optional: an empty object asks for the best for anybody."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"user": {"history": []}, "k": 3, "timeout_ms": 100}]})

    request_id: str | None = Field(None, pattern=r"^[A-Za-z0-9._:\-]{1,128}$")
    user: UserPart = UserPart()
    query: Features = Field(default_factory=dict, description="Features of what was asked for.")
    context: Features = Field(default_factory=dict, description="Features of the moment.")
    k: int | None = Field(None, ge=1, le=Limits.K, description="Items wanted; the bundle's k if absent.")
    timeout_ms: float | None = Field(None, ge=1, le=Limits.TIMEOUT_MS)
    rerank_count: int | None = Field(None, ge=1, le=Limits.CANDIDATES, description="Width of re-ranking.")
    filters: list[FilterPart] = Field(default_factory=list, max_length=Limits.FILTERS)
    exclude: list[Id] = Field(default_factory=list, max_length=Limits.EXCLUDE, fail_fast=True)
    candidates: list[Id | CandidatePart] | None = Field(
        None, max_length=Limits.CANDIDATES, fail_fast=True, description="Rank these instead of retrieving."
    )
    strict: bool = Field(False, description="504 rather than a degraded answer.")
    priority: Literal["low", "normal", "high"] = Field("normal", description="Low is refused first, high last.")


class OfferRequest(Wire):
    """A bundle to load beside the one that serves: POST /admin/generations."""

    path: str = Field(min_length=1, max_length=4_096, description="Directory of the bundle.")
    activate: bool = Field(True, description="Let it serve as soon as it is warm.")


class NewItem(Wire):
    """An item with a value for each table that the bundle has."""

    id: Id
    embedding: list[float] = Field(max_length=Limits.FEATURE_LENGTH, fail_fast=True)
    tables: dict[Text, FeatureValue | list[float | Text]] = Field(default_factory=dict, description="By name.")


class ItemsRequest(Wire):
    """Items to add to the catalogue that serves, or to put in the place of those with their ids; and ids to remove."""

    add: list[NewItem] = Field(default_factory=list, max_length=Limits.ADDED)
    remove: list[Id] = Field(default_factory=list, max_length=Limits.REMOVED, fail_fast=True)

    @model_validator(mode="after")
    def _each_once(self) -> "ItemsRequest":
        ids = [*self.remove, *(item.id for item in self.add)]
        require(0 < len(ids) == len(set(ids)), "something to add or to remove, each id once", ValueError)
        return self


Asks = TypeVar("Asks", RankRequest, OfferRequest, ItemsRequest)

# ------------------------------------------------------------------------------------------- answers


class ItemPart(Wire):
    id: Id
    score: float | None = Field(description="On the re-ranker's scale; null: the model gave no number.")
    stage: Literal["retrieval", "preranking", "reranking"] = Field(description="Which stage scored it.")
    propensity: float = Field(gt=0, le=1, description="Probability that it was shown in this place.")


class CoveragePart(Wire):
    wanted: int = Field(description="Re-ranking's configured width, or all candidates when they are fewer.")
    reranked: int
    shards_ok: int
    shards: int


class DegradedPart(Wire):
    stage: Literal["retrieval", "preranking", "reranking"]
    reason: str
    substitute: str


class RankResponse(Wire):
    """The answer, and what was given up for it.

    `ignored` counts ids that are in no table, or that were sent twice, and names in filters that are in no vocabulary.
    A user whose look-up was late counts as known.
    """

    request_id: str
    generation: str
    epoch: int = Field(description="Items added to and removed from the generation since it was loaded.")
    items: list[ItemPart]
    empty_reason: str | None = Field(description="Why there is no item; null when there is one.")
    coverage: CoveragePart
    degraded: list[DegradedPart]
    expected_ndcg_loss: float | None = Field(description="Of NDCG@k; 0: no stage gave anything up; null: not measured.")
    ignored: dict[Literal["user", "history", "candidates", "exclude", "filters"], int]
    took_ms: dict[str, float] = Field(description="By stage and in total; `queue`: for the one worker, there and back.")


def told(query: Query, ranking: Ranking, generation: Generation) -> Told:
    """The answer, written but for what it took: only the process that has the connection knows that."""
    fine, lost = ranking.reports[Stage.RERANKING], ranking.degradations
    scores, stages = [s if math.isfinite(s) else None for s in ranking.scores.tolist()], ranking.stages.tolist()
    columns = zip(generation.ids.external(ranking.rows), scores, stages, ranking.propensities.tolist(), strict=True)
    body = {
        "request_id": query.request_id,
        "generation": ranking.generation,
        "epoch": query.live.epoch,
        "items": [{"id": i, "score": score, "stage": LABELS[stage], "propensity": p} for i, score, stage, p in columns],
        "empty_reason": ranking.empty_reason,
        "coverage": {"wanted": fine.wanted, "reranked": fine.done, "shards_ok": fine.shards_ok, "shards": fine.shards},
        "degraded": [{"stage": d.stage.label, "reason": d.reason, "substitute": d.substitute} for d in lost],
        "expected_ndcg_loss": ranking.expected_ndcg_loss,
        "ignored": dict(query.ignored),
    }
    head = tuple((stage, s) for stage, s in zip(stages[:SCORES_TOLD], scores, strict=False) if s is not None)
    logged = {"generation": ranking.generation, "epoch": query.live.epoch, "is_known": query.person.is_known}
    logged |= {"k": query.k, "n": len(ranking), "history": len(query.person.history)}
    logged |= {"wanted": fine.wanted, "reranked": fine.done, "degraded": [f"{d.stage.label}: {d.reason}" for d in lost]}
    return Told(orjson.dumps(body)[:-1], ranking.reports, lost, head, ranking.extra_s, query.candidates is None, logged)


def finished(answer: Told, took_ms: dict[str, float]) -> bytes:
    """The body of a 200, in the form of RankResponse."""
    return answer.body + b',"took_ms":' + orjson.dumps(took_ms) + b"}"


# ------------------------------------------------------------------------------------ wire → Query


def parse(body: bytes, schema: type[Asks]) -> Asks:
    """A request of this schema. Raises MalformedBody if it isn't JSON, InvalidRequest if it isn't the schema."""
    try:
        return schema.model_validate_json(body)
    except ValidationError as e:
        if e.error_count() > MANY_ERRORS:  # to describe a hundred thousand would take a second
            raise InvalidRequest(FieldError("body", f"{e.error_count()} errors", "what the schema allows")) from e
        errors = e.errors(include_url=False, include_context=False)
        if errors[0]["type"] == "json_invalid":
            raise MalformedBody(errors[0]["msg"]) from e
        raise InvalidRequest(*_field_errors(errors, from_json(body), schema)[:SHOWN_ERRORS]) from e


def _field_errors(errors: Sequence[Any], sent: Any, schema: type[Wire]) -> list[FieldError]:
    """One a field: where a value could have been of several types, what each allows is joined.

    Where an error is deeper inside the same value, the value had the form of that branch: only it is told.
    """
    by_path: dict[tuple[int | str, ...], list[Any]] = {}
    for error in errors:
        by_path.setdefault(_path(error, sent), []).append(error)
    outer = {path[:n] for path in by_path for n in range(len(path))}

    def told(path: tuple[int | str, ...], found: list[Any]) -> FieldError:
        allowed = ", or ".join(dict.fromkeys(_allowed(path, e, schema) for e in found))
        return FieldError(".".join(map(str, path)) or "body", shown(found[0]["input"]), allowed)

    return [told(path, found) for path, found in by_path.items() if path not in outer]


def _allowed(path: tuple[int | str, ...], error: Any, schema: type[Wire]) -> str:
    if error["type"] != "extra_forbidden":
        return str(error["msg"]).removeprefix("Value error, ")
    of: dict[str, type[Wire]] = {"user": UserPart, "filters": FilterPart, "candidates": CandidatePart, "add": NewItem}
    fields = (of.get(str(path[0]), schema) if len(path) > 1 else schema).model_fields
    return f"no such field; allowed: {', '.join(field.alias or name for name, field in fields.items())}"


def _path(error: Any, value: Any) -> tuple[int | str, ...]:
    """Where in what was sent, without the branches of unions that pydantic tried on its way."""
    path: list[int | str] = []
    for part in error["loc"]:
        if (isinstance(value, dict) and part in value) or (isinstance(value, list) and isinstance(part, int)):
            value = value[part]
        elif error["type"] != "missing" or part is not error["loc"][-1]:
            continue
        path.append(part)
    return tuple(path)


def to_query(request: RankRequest, request_id: str, generation: Generation, *, is_late: bool = False) -> Query:
    """Everything external becomes rows of this generation; is_late: without a look at the user table.

    Microseconds for a small body, up to 10 ms for the largest.
    Raises: InvalidRequest, for filters and features that this bundle doesn't have.
    """
    user = request.user
    sent = {"user": user.features, "context": request.context, "query": request.query}
    features = {f"{part}.{name}": value for part, values in sent.items() for name, value in values.items()}
    person, n_ignored = users.resolve(user.id, user.history, features, generation, is_late=is_late)
    exclude = generation.ids.rows(request.exclude)
    candidates, fields, n_left_out = _candidates(request.candidates, generation)
    filters = tuple(_filter(i, f, generation) for i, f in enumerate(request.filters))
    unknown = {"user": int(not (user.id is None or person.is_known or person.is_late or not generation.users))}
    unknown["filters"] = sum(int(np.isnan(f.values).sum()) for f in filters if f.values is not None)
    live = generation.live  # after the look-ups: it knows where an item is that was added again meanwhile
    return Query(
        request_id=request_id,
        person=person,
        k=request.k or generation.manifest.funnel.k,
        filters=filters,
        exclude=sealed(np.sort(live.present(exclude[exclude != NO_ROW]))),
        candidates=candidates,
        candidate_fields=fields,
        rerank_count=request.rerank_count,
        ignored=unknown | {"history": n_ignored, "exclude": int(np.sum(exclude == NO_ROW)), "candidates": n_left_out},
        live=live,
    )


def _candidates(sent: Sequence[Id | CandidatePart] | None, generation: Generation) -> tuple[Rows | None, Arrays, int]:
    """Rows, each once, in the order sent; their features by schema key; how many were left out."""
    if sent is None:
        return None, {}, 0
    found, live = generation.ids.rows([c.id if isinstance(c, CandidatePart) else c for c in sent]), generation.live
    found = live.present(found)  # of the ids: added again since the look-up
    found[(found != NO_ROW) & ~live.keeps(found)] = NO_ROW  # removed
    _, first = np.unique(found, return_index=True)
    kept = np.sort(first[found[first] != NO_ROW])
    sent_with = {i: c.features for i, c in enumerate(sent) if isinstance(c, CandidatePart) and c.features}
    columns = _columns(sent_with, generation, len(sent))
    return sealed(found[kept]), {key: sealed(c[kept]) for key, c in columns.items()}, len(sent) - len(kept)


def _columns(features: Mapping[int, Mapping[str, Any]], generation: Generation, n: int) -> dict[str, Array]:
    """Features by position in the request → [n, *shape] by schema key, a conversion a key.

    Raises: InvalidRequest that names the first position whose feature is wrong or not in the bundle.
    """
    columns = {}
    try:
        for name in set().union(*features.values()):
            key = f"candidate.{name}"
            sent = {position: values[name] for position, values in features.items() if name in values}
            exact = users.field_values(key, list(sent.values()), generation)
            columns[key] = generation.manifest.features.fields[key].filled(n)
            columns[key][list(sent)] = exact
    except ValueError:  # of all at once it isn't known which: one by one names it
        for position, values in features.items():
            for name, value in values.items():
                users.field_value(f"candidates.{position}.features.{name}", f"candidate.{name}", value, generation)
        raise
    return columns


def _filter(position: int, part: FilterPart, generation: Generation) -> Filter:
    where = f"filters.{position}"
    if part.field not in generation.filterable:
        allowed = ", ".join(generation.filterable) or "none in this bundle"
        raise InvalidRequest(FieldError(f"{where}.field", shown(part.field), f"no such table; allowed: {allowed}"))
    vocab = generation.vocab.get(part.field)
    for way, bound in (("gte", part.gte), ("lte", part.lte)) if vocab is not None else ():
        if bound is not None:
            raise InvalidRequest(FieldError(f"{where}.{way}", shown(bound), "eq or in: category names have no order"))
    key, wanted = ("in", part.one_of) if part.eq is None else ("eq", [part.eq])
    largest = max((v for v in (*(wanted or ()), part.gte, part.lte) if isinstance(v, float)), key=abs, default=0.0)
    # As a float a larger one can't be told from the next whole number.
    if generation.tables[part.field].dtype.kind in "iu" and abs(largest) >= LARGEST["int64"]:
        raise InvalidRequest(FieldError(where, shown(largest), "numbers under 2^53: the table holds integers"))
    values = None if wanted is None else np.array([_number(f"{where}.{key}", v, vocab) for v in wanted], np.float64)
    return Filter(part.field, values, part.gte, part.lte)


def _number(where: str, value: float | str, vocab: Mapping[str, int] | None) -> float:
    """A category nobody has matches nothing; a name for a table without names is an error."""
    if not isinstance(value, str):
        return value
    if vocab is None:
        raise InvalidRequest(FieldError(where, shown(value), "a number: this table has no category names"))
    return vocab.get(value, np.nan)
