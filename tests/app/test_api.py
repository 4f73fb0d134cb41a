"""HTTP in process: every kind of bad input, keys, the service's phases, metrics, the log line."""

import asyncio
import json
import logging
import math
import os
import re
import threading
import time
from dataclasses import replace

import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families

from app import api, metrics, wire
from app.bundle import Ids
from app.control.admission import PRIORITY_SHARE
from app.control.quality import FLOOR, Quality
from app.errors import ContractError, InvalidRequest, StageFailed
from app.gate import Phase
from app.keys import read_keys
from app.log import Line
from app.main import create_admin_app, create_app
from app.problems import PROBLEM, WHY_NOT
from app.service import Service
from app.settings import Limits, Settings
from tests import world
from tests.asgi import call, rank
from tests.running import AUTHORIZED, EVENTS_KEY, KEYS_FILE

pytestmark = pytest.mark.asyncio(loop_scope="module")

NEXT_TO_20 = [world.item_id(r) for r in (21, 22, 23, 24, 25)]
PATIENT = {"timeout_ms": Limits.TIMEOUT_MS}  # these tests are not about time
HURRIED = {"timeout_ms": 500}  # these are


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(bundle):
    service = Service(Settings(bundle=bundle, workers=1, sla_ms=5000.0))
    await service.start()
    yield service
    await service.stop()


@pytest_asyncio.fixture(loop_scope="module")
async def service(running):
    """The running service; after each test it still gives the right answer."""
    yield running
    reply = await rank(create_app(running), {"user": {"id": "cho"}} | PATIENT)
    assert reply.status == 200
    assert [i["id"] for i in reply.json()["items"]] == NEXT_TO_20
    assert reply.json()["degraded"] == []


@pytest.fixture
def app(service):
    return create_app(service)


def problem_of(reply, status: int) -> dict:
    """An RFC 9457 problem, whole, with the request's id."""
    assert reply.status == status, reply.body
    assert reply.headers["content-type"] == PROBLEM
    body = reply.json()
    assert set(body) == {"type", "title", "status", "detail", "errors", "request_id"}
    assert body["status"] == status
    assert body["request_id"] == reply.headers["x-request-id"]
    return body


# --------------------------------------------------------------------------------------- good answers


async def test_an_answer_has_the_schema_that_is_published(app):
    reply = await rank(app, {"user": {"id": "cho"}, "exclude": [world.item_id(22), 5]} | PATIENT)
    assert reply.status == 200
    assert reply.headers["content-type"] == "application/json"
    answer = wire.RankResponse.model_validate_json(reply.body)
    assert [i.id for i in answer.items] == [world.item_id(r) for r in (21, 23, 24, 25, 26)]
    assert {i.stage for i in answer.items} == {"reranking"}
    assert {i.propensity for i in answer.items} == {1.0}
    assert answer.coverage.model_dump() == {"wanted": 32, "reranked": 32, "shards_ok": 1, "shards": 1}
    assert (answer.degraded, answer.expected_ndcg_loss, answer.empty_reason) == ([], 0.0, None)
    assert answer.ignored == {"user": 0, "history": 0, "candidates": 0, "exclude": 1, "filters": 0}
    assert set(answer.took_ms) == {"queue", "users", "retrieval", "preranking", "reranking", "selection", "total"}
    assert answer.generation.startswith("tiny@1#")


async def test_an_empty_object_asks_for_the_best_for_anybody(app):
    reply = await rank(app, {})
    assert [i["id"] for i in reply.json()["items"]] == [world.item_id(r) for r in range(5)]


async def test_unknown_items_are_ignored_and_counted(app):
    known = world.item_id(20)
    request = {
        "user": {"id": "nobody", "history": [known, 9, "x", 10**30, known]},
        "filters": [{"field": "genres", "in": [*world.GENRES, "dramma"]}],
        "exclude": [8, 9, world.item_id(21)],
        "candidates": [world.item_id(22), world.item_id(21), 7, {"id": "y"}, world.item_id(22)],
    }
    answer = (await rank(app, request | PATIENT)).json()
    assert [i["id"] for i in answer["items"]] == [world.item_id(22)]
    assert answer["ignored"] == {"user": 1, "history": 3, "exclude": 2, "candidates": 3, "filters": 1}


async def test_a_user_is_unknown_only_where_there_is_a_table_that_was_looked_at(generation):
    asked = wire.parse(b'{"user": {"id": "nobody"}}', wire.RankRequest)
    nobody = replace(generation, users=None)
    assert wire.to_query(asked, "r", generation).ignored["user"] == 1
    assert wire.to_query(asked, "r", generation, is_late=True).ignored["user"] == 0
    assert wire.to_query(asked, "r", nobody).ignored["user"] == 0


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        ({"candidates": []}, "none of the candidates"),
        ({"candidates": ["nothing"]}, "none of the candidates"),
        ({"filters": [{"field": "year", "lte": 0}]}, "no item satisfies the filters and is not excluded"),
        (
            {"filters": [{"field": "genres", "in": ["dramma", "x"]}]},
            "no item satisfies the filters and is not excluded; 2 of their names are in no vocabulary",
        ),
        ({"exclude": [int(i) for i in world.ITEM_IDS]}, "every item is excluded"),
    ],
)
async def test_nothing_left_to_rank_is_an_empty_answer_that_says_why(app, request_, why):
    reply = await rank(app, request_ | PATIENT)
    assert reply.status == 200
    answer = wire.RankResponse.model_validate_json(reply.body)
    assert answer.items == []
    assert answer.empty_reason.startswith(why)


@pytest.mark.parametrize(
    "request_",
    [
        {"exclude": [int(i) for i in world.ITEM_IDS]},
        {"exclude": [world.item_id(1)], "filters": [{"field": "year", "lte": 0}]},
    ],
)
async def test_an_empty_answer_after_a_fallback_speaks_of_the_fallback(app, service, monkeypatch, request_):
    with monkeypatch.context() as patch:
        breaks(service, patch, StageFailed("broken"), "retrieval")
        answer = (await rank(app, request_ | PATIENT)).json()
    assert answer["items"] == []
    assert answer["degraded"] == [{"stage": "retrieval", "reason": "failed", "substitute": "popular items"}]
    assert answer["empty_reason"].startswith("retrieval fell back on popular items")


async def test_a_score_that_is_no_number_is_null(app):
    sent = [{"id": world.item_id(1), "features": {"bid": -1}}, {"id": world.item_id(2)}]
    answer = (await rank(app, {"candidates": sent} | PATIENT)).json()
    assert [(i["id"], i["score"] is None) for i in answer["items"]] == [
        (world.item_id(2), False),
        (world.item_id(1), True),
    ]


# --------------------------------------------------------------------------------------- large requests

UNKNOWN = [10**6 + i for i in range(3000)]


def large_candidates(**change) -> dict:
    """The 50 items with bids of (row / 10)², after 3,000 that the catalogue doesn't have, whose bids are 1."""
    sent = [{"id": i, "features": {"bid": 1}} for i in UNKNOWN]
    sent += [{"id": world.item_id(row), "features": {"bid": (row / 10) ** 2}} for row in range(world.N)]
    return {"candidates": sent, "rerank_count": world.N, "k": world.N} | PATIENT | change


async def test_features_of_many_candidates_reach_their_own_items(app):
    answer = (await rank(app, large_candidates())).json()
    bids = (world.ROW / 10) ** 2
    expected = world.rerank_scores(bid=bids)
    assert [i["id"] for i in answer["items"]] == [world.item_id(r) for r in world.best(expected, world.N)]
    assert [i["score"] for i in answer["items"]] == pytest.approx(sorted(expected, reverse=True), abs=1e-5)
    assert answer["ignored"]["candidates"] == len(UNKNOWN)


async def test_a_number_and_a_list_of_it_are_the_same_feature(app):
    def sent(bid):
        few = [{"id": world.item_id(1), "features": {"bid": bid}}, {"id": world.item_id(2), "features": {"bid": 9}}]
        return {"candidates": [*few, world.item_id(3), {"id": world.item_id(4)}]} | PATIENT

    answers = [(await rank(app, sent(bid))).json()["items"] for bid in (4, [4], 4.0)]
    assert answers[0] == answers[1] == answers[2]
    # row 2: 0.8·0 + …: only the bids tell the items of nobody apart, and row 3 has none
    assert answers[0][0]["id"] == world.item_id(2)


@pytest.mark.parametrize(
    ("wrong", "field", "allowed"),
    [
        ({5: {"bid": "x"}, 2: {"bid": [1, 2]}}, "candidates.2.features.bid", "one number"),
        ({5: {"bid": 1e300}, 7: {"cost": 1}}, "candidates.5.features.bid", "of type float32"),
        ({5: {"bid": 1e300}, 3: {"cost": 1}}, "candidates.3.features.cost", "allowed: bid"),
        ({2999: {"bid": None}}, "candidates.2999.features.bid", "number"),
        ({2999: 5}, "candidates.2999.features", "object"),
    ],
)
async def test_of_many_candidates_the_first_wrong_one_is_named(app, wrong, field, allowed):
    request = large_candidates()
    for position, features in wrong.items():
        request["candidates"][position]["features"] = features
    error = problem_of(await rank(app, request), 422)["errors"][0]
    assert error["field"] == field
    assert allowed in error["allowed"]


@pytest.mark.parametrize("spoil", [{"candidates": None}, {"candidates": ""}, {"candidates": {}}, {"k": 0}, {}])
async def test_a_large_body_is_read_as_a_small_one_is(spoil):
    body = json.dumps(large_candidates(exclude=UNKNOWN, **spoil)).encode()
    try:
        expected = wire.RankRequest.model_validate_json(body)
    except ValueError:
        with pytest.raises(InvalidRequest):
            wire.parse(body, wire.RankRequest)
    else:
        assert wire.parse(body, wire.RankRequest) == expected


@pytest.mark.parametrize(
    ("request_", "is_aside"), [({}, False), ({"exclude": UNKNOWN}, True), (large_candidates(), True)]
)
@pytest.mark.parametrize("has_runner", [True, False])
async def test_only_a_large_request_is_parsed_off_the_event_loop_and_none_is_resolved_on_it(
    app, service, monkeypatch, request_, is_aside, has_runner
):
    seen = []

    def noted(work):
        def run(*arguments, **named):
            seen.append(threading.current_thread() is not threading.main_thread())
            return work(*arguments, **named)

        return run

    with monkeypatch.context() as patch:
        if not has_runner:
            patch.setattr(service.serving.funnel, "runner", None)
        for name in ("parse", "to_query"):
            patch.setattr(wire, name, noted(getattr(wire, name)))
        assert (await rank(app, request_ | PATIENT)).status == 200
    assert seen == ([is_aside] if has_runner else [is_aside, True])


def looks_up_slowly(patch) -> threading.Event:
    """Let nobody be found in the user table before the event is set."""
    released, rows = threading.Event(), Ids.rows

    def slow(ids, wanted):
        if wanted in (["ann"], ["cho"]):
            released.wait(60)
        return rows(ids, wanted)

    patch.setattr(Ids, "rows", slow)
    return released


async def test_the_ids_of_a_large_request_hold_though_the_person_is_found_too_late(app, service, monkeypatch):
    exclude = [*UNKNOWN, world.item_id(21)]
    with monkeypatch.context() as patch:
        patch.setattr(service.serving.funnel, "runner", None)
        released = looks_up_slowly(patch)
        request = {"user": {"id": "ann", "history": [world.item_id(20)]}, "exclude": exclude}
        answer = (await rank(app, request | HURRIED)).json()
        released.set()
    assert [i["id"] for i in answer["items"]] == [world.item_id(r) for r in (22, 23, 24, 25, 26)]
    assert answer["ignored"]["exclude"] == len(UNKNOWN)
    assert [d["reason"] for d in answer["degraded"]] == ["user_late", "late", "late"]


# --------------------------------------------------------------------------------------- the request's id


@pytest.mark.parametrize(
    ("body_id", "header", "expected"),
    [
        ("from-body", None, "from-body"),
        (None, "from.header:1", "from.header:1"),
        ("from-body", "from-header", "from-body"),
        (None, None, r"[0-9a-f]{32}"),
        (None, "not allowed here", r"[0-9a-f]{32}"),
        (None, "x" * 129, r"[0-9a-f]{32}"),
        (None, "", r"[0-9a-f]{32}"),
    ],
)
async def test_the_request_id_is_the_bodys_or_the_headers_or_made_and_echoed_in_both(app, body_id, header, expected):
    headers = {} if header is None else {"x-request-id": header}
    reply = await rank(app, {"request_id": body_id} | PATIENT, headers)
    assert reply.headers["x-request-id"] == reply.json()["request_id"]
    assert re.fullmatch(expected, reply.json()["request_id"])


async def test_a_problem_has_the_request_id_of_the_header(app):
    body = problem_of(await rank(app, b"{", {"x-request-id": "mine"}), 400)
    assert body["request_id"] == "mine"


async def test_many_at_once_get_each_their_own_answer(app):
    numbers = [n % 5 for n in range(50)]
    replies = await asyncio.gather(
        *(
            rank(app, {"user": {"id": world.USER_IDS[n]}, "request_id": f"r{i}"} | PATIENT)
            for i, n in enumerate(numbers)
        )
    )
    for i, (n, reply) in enumerate(zip(numbers, replies, strict=True)):
        answer = reply.json()
        assert answer["request_id"] == f"r{i}"
        assert answer["items"][0]["id"] == world.item_id(n * 10 + 1 + (n == 4))


# ------------------------------------------------------------------------------------------ bad input

NESTED = b'{"query":{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}}"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"{",
        b"{]",
        b'{"k": 1}}',
        b"{'k': 1}",
        b"\xff\xfe",
        b'{"request_id": "\xc3"}',
        b'{"user": {"id": "\\ud800"}}',
        b'{"k": 01}',
        b"\x00",
        NESTED,
        b"[" * 200_000,
    ],
    ids=lambda b: repr(b[:20]),
)
async def test_what_is_not_json_is_400(app, body):
    body = problem_of(await rank(app, body), 400)
    assert body["detail"]


def many(n: int) -> list[int]:
    return list(range(n))


# request, the field it names, the value it shows, a word of what is allowed
WRONG = [
    (b"[]", "body", "[]", "object"),
    (b"null", "body", None, "object"),
    (b'"text"', "body", "text", "object"),
    (b"7", "body", 7, "object"),
    ({"k": 0}, "k", 0, "greater than or equal to 1"),
    ({"k": -1}, "k", -1, "greater than or equal to 1"),
    ({"k": 10**9}, "k", 10**9, "less than or equal to 1000"),
    ({"k": 10**30}, "k", str(10**30), "1000"),
    ({"k": "5"}, "k", "5", "integer"),
    ({"k": 1.5}, "k", 1.5, "integer"),
    ({"k": True}, "k", True, "integer"),
    ({"k": []}, "k", "[]", "integer"),
    (b'{"k": 1e400}', "k", "Infinity", "integer"),
    (b'{"k": NaN}', "k", "NaN", "integer"),
    (b'{"timeout_ms": NaN}', "timeout_ms", "NaN", "finite"),
    (b'{"timeout_ms": Infinity}', "timeout_ms", "Infinity", "finite"),
    (b'{"timeout_ms": -Infinity}', "timeout_ms", "-Infinity", "finite"),
    (b'{"timeout_ms": 1e400}', "timeout_ms", "Infinity", "finite"),
    ({"timeout_ms": 0}, "timeout_ms", 0, "greater than or equal to 1"),
    ({"timeout_ms": 0.5}, "timeout_ms", 0.5, "greater than or equal to 1"),
    ({"timeout_ms": 1e9}, "timeout_ms", 1e9, "less than or equal to 10000"),
    ({"timeout_ms": "100"}, "timeout_ms", "100", "number"),
    ({"rerank_count": 0}, "rerank_count", 0, "greater than or equal to 1"),
    ({"rerank_count": 10**6}, "rerank_count", 10**6, "less than or equal to 10000"),
    ({"strict": "yes"}, "strict", "yes", "boolean"),
    ({"strict": 1}, "strict", 1, "boolean"),
    ({"priority": "urgent"}, "priority", "urgent", "'low', 'normal' or 'high'"),
    ({"request_id": "a b"}, "request_id", "a b", "pattern"),
    ({"request_id": ""}, "request_id", "", "pattern"),
    ({"request_id": "a\n"}, "request_id", "a\n", "pattern"),
    ({"request_id": 5}, "request_id", 5, "string"),
    ({"surprise": 1}, "surprise", 1, "no such field; allowed: "),
    ({"user": {"surprise": 1}}, "user.surprise", 1, "no such field; allowed: "),
    ({"user": 5}, "user", 5, "object"),
    ({"user": None}, "user", None, "object"),
    ({"user": {"id": 1.5}}, "user.id", 1.5, "integer"),
    ({"user": {"id": True}}, "user.id", True, "integer"),
    ({"user": {"id": {}}}, "user.id", "{}", "integer"),
    ({"user": {"id": "x" * 257}}, "user.id", "x" * 100 + "…", "at most 256"),
    ({"user": {"history": many(1001)}}, "user.history", str(many(1001))[:100] + "…", "at most 1000"),
    ({"user": {"history": "abc"}}, "user.history", "abc", "array"),
    ({"user": {"history": [1, None]}}, "user.history.1", None, "integer"),
    ({"user": {"features": {"height": 1}}}, "user.features.height", 1, "age, occupation"),
    ({"user": {"features": {"age": "old"}}}, "user.features.age", "old", "one number"),
    ({"user": {"features": {"age": [1, 2]}}}, "user.features.age", "[1.0, 2.0]", "one number"),
    ({"user": {"features": {"age": []}}}, "user.features.age", "[]", "one number"),
    ({"user": {"features": {"age": 1e300}}}, "user.features.age", 1e300, "one number"),
    ({"user": {"features": {"occupation": 1.5}}}, "user.features.occupation", 1.5, "one integer"),
    ({"user": {"features": {"age": None}}}, "user.features.age", None, "number"),
    ({"user": {"features": {"age": True}}}, "user.features.age", True, "number"),
    (b'{"user": {"features": {"age": NaN}}}', "user.features.age", "NaN", "finite"),
    (b'{"user": {"features": {"age": [1e999]}}}', "user.features.age.0", "Infinity", "finite"),
    ({"user": {"features": {"strength": None}}}, "user.features.strength", None, "number"),
    ({"user": {"features": {"interest": {}}}}, "user.features.interest", "{}", "number"),
    ({"query": {"length": 1}}, "query.length", 1, "freshness"),
    ({"context": {"hour": 1}}, "context.hour", 1, "none in this bundle"),
    ({"context": []}, "context", "[]", "object"),
    ({"exclude": "1000"}, "exclude", "1000", "array"),
    ({"exclude": many(10_001)}, "exclude", str(many(10_001))[:100] + "…", "at most 10000"),
    ({"exclude": [1.5]}, "exclude.0", 1.5, "integer"),
    ({"candidates": many(10_001)}, "candidates", str(many(10_001))[:100] + "…", "at most 10000"),
    ({"candidates": [{"features": {}}]}, "candidates.0.id", '{"features": {}}', "required"),
    ({"candidates": [{"id": 1, "bid": 2}]}, "candidates.0.bid", 2, "no such field; allowed: "),
    ({"candidates": [{"id": 1000, "features": {"cost": 2}}]}, "candidates.0.features.cost", 2, "bid"),
    ({"candidates": [{"id": 1000, "features": {"bid": "x"}}]}, "candidates.0.features.bid", "x", "one number"),
    ({"filters": [{"field": "colour", "eq": 1}]}, "filters.0.field", "colour", "genres, year"),
    ({"filters": [{"field": "title", "eq": "Item 01"}]}, "filters.0.field", "title", "genres, year"),
    ({"filters": [{"field": "embedding", "gte": 0}]}, "filters.0.field", "embedding", "genres, year"),
    ({"filters": [{"field": "genres", "gte": 1}]}, "filters.0.gte", 1, "eq or in"),
    ({"filters": [{"field": "genres", "eq": "drama", "lte": 1}]}, "filters.0.lte", 1, "eq or in"),
    ({"filters": [{"field": "year", "eq": "new"}]}, "filters.0.eq", "new", "a number"),
    ({"filters": [{"field": "year", "in": [1, "new"]}]}, "filters.0.in", "new", "a number"),
    ({"filters": [{"field": "genres", "eq": 2**53 + 1}]}, "filters.0", 2.0**53, "under 2^53"),
    ({"filters": [{"field": "genres", "in": [1, -(2**60)]}]}, "filters.0", -(2.0**60), "under 2^53"),
    ({"filters": [{"field": "year"}]}, "filters.0", '{"field": "year"}', "one of eq, in, gte, lte is needed"),
    ({"filters": [{"field": "year", "eq": 1, "in": [1]}]}, "filters.0", None, "eq or in, not both"),
    ({"filters": [{"eq": 1}]}, "filters.0.field", '{"eq": 1}', "required"),
    ({"filters": [{"field": "year", "gte": "1990"}]}, "filters.0.gte", "1990", "number"),
    ({"filters": [{"field": "year", "in": many(1001)}]}, "filters.0.in", None, "at most 1000"),
    ({"filters": [{"field": "year", "eq": 1}] * 17}, "filters", None, "at most 16"),
    ({"filters": {"year": 1990}}, "filters", '{"year": 1990}', "array"),
    (b'{"filters": [{"field": "year", "lte": 1e400}]}', "filters.0.lte", "Infinity", "finite"),
]


@pytest.mark.parametrize(("request_", "field", "value", "allowed"), WRONG, ids=[str(w[0])[:60] for w in WRONG])
async def test_what_is_not_the_schema_is_422_and_names_field_value_and_what_is_allowed(
    app, request_, field, value, allowed
):
    body = problem_of(await rank(app, request_), 422)
    assert body["errors"], body
    error = body["errors"][0]
    assert error["field"] == field
    assert allowed in error["allowed"]
    if value is not None:
        assert error["value"] == value
    assert field in body["detail"]


async def test_every_wrong_field_is_named_once(app):
    body = problem_of(await rank(app, {"k": 0, "strict": 1, "timeout_ms": "x", "user": {"id": []}}), 422)
    assert sorted(e["field"] for e in body["errors"]) == ["k", "strict", "timeout_ms", "user.id"]


async def test_a_thousand_wrong_values_are_not_all_told(app):
    body = problem_of(await rank(app, {"exclude": [None] * 1000}), 422)
    assert 1 <= len(body["errors"]) <= 20


async def test_a_million_items_of_history_are_too_large_a_body(app):
    body = json.dumps({"user": {"history": many(10**6)}}).encode()
    assert "bytes" in problem_of(await rank(app, body), 413)["detail"]


async def test_a_20_mb_body_is_413(app):
    problem_of(await call(app, "POST", "/v1/rank", [b" " * 65536] * 320), 413)


async def test_a_client_that_leaves_in_the_middle_is_no_defect_of_ours(app, service):
    before = samples(service)
    await call(app, "POST", "/v1/rank", b'{"k":', is_whole=False)
    after = samples(service)
    for outcome, n in (("client_error", 1), ("error", 0)):
        key = ("winnow_requests_total", ("outcome", outcome))
        assert after[key] - before[key] == n


async def test_a_body_of_the_largest_size_is_read(app):
    body = b"{}" + b" " * (Limits.BODY_BYTES - 2)
    assert (await rank(app, body)).status == 200
    problem_of(await rank(app, body + b" "), 413)


async def test_a_body_in_parts_is_one_body(app):
    parts = [b'{"user": {"id"', b': "cho"}, ', b'"timeout_ms": 10000}']
    reply = await call(app, "POST", "/v1/rank", parts)
    assert [i["id"] for i in reply.json()["items"]] == NEXT_TO_20


@pytest.mark.parametrize(
    "media_type", ["text/plain", "application/x-www-form-urlencoded", "application/jsonx", "", "é"]
)
async def test_another_media_type_is_415(app, media_type):
    body = problem_of(await rank(app, {}, {"content-type": media_type}), 415)
    assert "application/json" in body["detail"]


async def test_no_media_type_is_415(app):
    problem_of(await call(app, "POST", "/v1/rank", b"{}", {}), 415)


@pytest.mark.parametrize("media_type", ["application/json", "Application/JSON; charset=utf-8", "application/json;"])
async def test_json_is_json_however_it_is_written(app, media_type):
    assert (await rank(app, {}, {"content-type": media_type})).status == 200


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"])
async def test_another_method_is_405_and_says_which_is_allowed(app, method):
    reply = await call(app, method, "/v1/rank")
    assert reply.status == 405
    assert reply.headers["allow"] == "POST"
    assert reply.headers["content-type"] == PROBLEM


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/ranks", "/v2/rank", "/metrics", "/admin/generations", "/%00"])
async def test_another_path_is_404_on_the_ranking_port(app, path):
    body = problem_of(await call(app, "GET", path), 404)
    assert body["title"] == "Not Found"


async def test_hard_but_right_requests_are_answered(app):
    for request in [
        {"user": {"id": 10**100}},
        {"user": {"id": ""}},
        {"user": {"history": []}},
        {"user": {"id": None, "history": None}, "candidates": None, "k": None},
        {"user": {"features": {"occupation": "astronaut", "age": -5}}},
        {"filters": [{"field": "year", "gte": 1e308}]},
        {"filters": [{"field": "genres", "in": []}]},
        {"filters": [{"field": "year", "lte": 5, "gte": 10}]},
        {"rerank_count": 10_000, "k": 1000},
        {"exclude": many(10_000)},
        {"timeout_ms": 1},
    ]:
        assert (await rank(app, request)).status == 200, request


# ------------------------------------------------------------------------------------------------ keys


@pytest.fixture
def locked(service, tmp_path, monkeypatch):
    """The same service with keys asked."""
    file = tmp_path / "keys"
    file.write_text(KEYS_FILE)
    monkeypatch.setattr(service, "keys", read_keys(file))
    yield create_app(service)
    monkeypatch.undo()


async def test_with_a_key_that_may_rank_the_answer_comes(locked):
    assert (await rank(locked, {}, AUTHORIZED)).status == 200


@pytest.mark.parametrize("authorization", [None, "Bearer wrong", "Basic x", "Bearer", "é"])
async def test_without_a_known_key_it_is_401_and_says_how(locked, authorization):
    headers = {} if authorization is None else {"authorization": authorization}
    reply = await rank(locked, {}, headers)
    problem_of(reply, 401)
    assert reply.headers["www-authenticate"] == "Bearer"


async def test_a_key_for_something_else_is_403(locked):
    problem_of(await rank(locked, {}, {"authorization": f"Bearer {EVENTS_KEY}"}), 403)


async def test_the_key_is_asked_before_the_body_is_read(locked):
    problem_of(await rank(locked, b"not json", {"content-type": "text/plain"}), 401)


async def test_health_needs_no_key(locked):
    assert (await call(locked, "GET", "/livez")).status == 200
    assert (await call(locked, "GET", "/readyz")).status == 200


# ---------------------------------------------------------------------------------------------- phases


def refused(reply) -> dict:
    body = problem_of(reply, 503)
    assert reply.headers["retry-after"] in ("1", "2", "3")
    return body


@pytest.mark.parametrize("phase", [Phase.STARTING, Phase.DRAINING])
async def test_while_starting_or_draining_requests_are_503_and_it_is_not_ready(app, service, monkeypatch, phase):
    with monkeypatch.context() as patch:
        patch.setattr(service.gate, "phase", phase)
        assert phase.value in refused(await rank(app, {}))["detail"]
        ready = await call(app, "GET", "/readyz")
        assert (ready.status, ready.body) == (503, f"not ready: {phase.value}\n".encode())
        assert (await call(app, "GET", "/livez")).status == 200


async def test_without_a_worker_it_is_not_ready_and_says_so(app, service, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(service.serving.pool, "n_wanted", 0)
        ready = await call(app, "GET", "/readyz")
    assert (ready.status, ready.body) == (503, b"not ready: no worker is alive\n")


async def test_a_service_that_was_never_started_is_alive_but_not_ready(bundle):
    app = create_app(Service(Settings(bundle=bundle, workers=1)))
    assert (await call(app, "GET", "/livez")).status == 200
    assert (await call(app, "GET", "/readyz")).status == 503
    refused(await rank(app, {}))
    assert (await call(app, "GET", "/openapi.json")).status == 200


@pytest.mark.parametrize("priority", PRIORITY_SHARE)
@pytest.mark.parametrize("is_at_floor", [True, False])
async def test_at_the_floor_each_priority_has_its_share_of_the_permits(
    app, service, monkeypatch, priority, is_at_floor
):
    permits = math.ceil(service.gate.admission.most * (PRIORITY_SHARE[priority] if is_at_floor else 1.0))
    with monkeypatch.context() as patch:
        # A refusal narrows the funnel for a while.
        patch.setattr(service.gate, "quality", Quality(FLOOR if is_at_floor else 1.0, at=math.inf))
        patch.setattr(service.gate, "inflight", permits - 1)
        assert (await rank(app, {"priority": priority} | PATIENT)).status == 200
        patch.setattr(service.gate, "inflight", permits)
        assert "no permit" in refused(await rank(app, {"priority": priority}))["detail"]


async def test_a_permit_is_given_back_whatever_happens(app, service):
    await rank(app, {"filters": [{"field": "colour", "eq": 1}]})
    await rank(app, {})
    assert service.gate.inflight == 0


async def test_draining_waits_for_what_is_in_flight(bundle):
    gate = Service(Settings(bundle=bundle, workers=1)).gate
    gate.phase = Phase.SERVING
    async with gate.permit("normal"):
        assert not await gate.drain(0.0)
        waiting = asyncio.create_task(gate.drain(60.0))
    assert await waiting


# ----------------------------------------------------------------------------------- faults and defects


def breaks(service, monkeypatch, error, stage="preranking") -> None:
    """Here, and so in no worker: test_worker.py is about those."""

    async def run(*_):
        raise error

    monkeypatch.setattr(service.serving.funnel, "runner", None)
    monkeypatch.setattr(getattr(service.serving.funnel, stage), "run", run)


async def test_a_stage_that_fails_is_a_degraded_answer(app, service, monkeypatch):
    with monkeypatch.context() as patch:
        breaks(service, patch, StageFailed("broken"))
        answer = (await rank(app, {"user": {"id": "cho"}} | PATIENT)).json()
    assert answer["degraded"] == [{"stage": "preranking", "reason": "failed", "substitute": "retrieval scores"}]
    assert answer["expected_ndcg_loss"] == pytest.approx(0.0)  # both put the items in one order
    assert [i["id"] for i in answer["items"]] == NEXT_TO_20


async def test_strict_turns_a_degraded_answer_into_504(app, service, monkeypatch):
    assert (await rank(app, {"strict": True} | PATIENT)).status == 200
    with monkeypatch.context() as patch:
        breaks(service, patch, StageFailed("broken"))
        body = problem_of(await rank(app, {"strict": True} | PATIENT), 504)
    assert "preranking failed" in body["detail"]


@pytest.mark.parametrize("error", [ContractError("a promise was broken"), TypeError("secret detail"), KeyError("x")])
async def test_a_defect_is_500_with_a_request_id_and_without_a_trace(app, service, monkeypatch, error, caplog):
    with monkeypatch.context() as patch:
        breaks(service, patch, error)
        reply = await rank(app, {"request_id": "look-me-up"} | PATIENT)
    body = problem_of(reply, 500)
    assert body["request_id"] == "look-me-up"
    assert str(error) not in reply.body.decode()
    assert b"Traceback" not in reply.body
    assert any(r.exc_info and "look-me-up" in r.getMessage() for r in caplog.records)


async def test_a_person_who_is_found_too_late_is_said(app, service, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(service.serving.funnel, "runner", None)
        released = looks_up_slowly(patch)
        answer = (await rank(app, {"user": {"id": "cho"}} | HURRIED)).json()
        released.set()
    assert answer["degraded"][0] == {
        "stage": "retrieval",
        "reason": "user_late",
        "substitute": "what the request says of the person",
    }
    assert len(answer["items"]) == world.K


def sent_to(path: str) -> dict:
    at, headers = time.monotonic(), [(b"x-request-id", b"look-me-up"), (b"content-type", b"application/json")]
    return {"type": "http", "method": "POST", "path": path, "headers": headers, "winnow.received_at": at}


async def test_who_can_get_no_permit_is_refused_whatever_else_it_says(service, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(service.gate, "inflight", 1_000_000)
        patch.setattr(service.gate, "quality", Quality())  # a refusal lowers it
        before = samples(service)[("winnow_requests_total", ("outcome", "refused"))]
        refused = api.refusal(service, sent_to("/v1/rank"), b"not even JSON")
        assert samples(service)[("winnow_requests_total", ("outcome", "refused"))] == before + 1
        assert api.refusal(service, sent_to("/v1/rank"), b'{"priority": "high"}') is None
        assert api.refusal(service, sent_to("/livez"), b"") is None
    assert service.gate.coming == 1  # who named a priority
    service.gate.coming = 0
    assert (refused.status_code, refused.headers["x-request-id"]) == (503, "look-me-up")
    assert 1 <= int(refused.headers["retry-after"]) <= 3
    assert json.loads(refused.body)["status"] == 503


async def test_a_refusal_is_logged_for_who_debugs(service, monkeypatch, caplog):
    monkeypatch.setattr(service.gate, "inflight", 1_000_000)
    for level, n_lines in (("INFO", 0), ("DEBUG", 1)):
        monkeypatch.setattr(service.gate, "quality", Quality())
        caplog.clear()
        with caplog.at_level(level, "winnow.request"):
            api.refusal(service, sent_to("/v1/rank"), b"{}")
        assert [line.fields["outcome"] for line in caplog.records if line.name == "winnow.request"] == n_lines * [
            "refused"
        ]


async def test_who_has_no_key_is_read_and_counts_for_nothing(service, monkeypatch, tmp_path):
    file = tmp_path / "keys"
    file.write_text(KEYS_FILE)
    with monkeypatch.context() as patch:
        patch.setattr(service.gate, "inflight", 1_000_000)
        patch.setattr(service, "keys", read_keys(file))
        assert api.refusal(service, sent_to("/v1/rank"), b"{}") is None
    assert (service.gate.coming, service.gate.quality.value) == (0, 1.0)


async def test_who_found_room_counts_until_it_asks_for_its_permit(app, service, monkeypatch):
    scopes = [sent_to("/v1/rank") for _ in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(service.gate, "quality", Quality())
        patch.setattr(service.gate, "inflight", math.ceil(service.gate.admission.most) - 1)  # one permit is left
        assert api.refusal(service, scopes[0], b"{}") is None
        assert api.refusal(service, scopes[1], b"{}").status_code == 503
    assert service.gate.coming == 1
    reply = await call(app, "POST", "/v1/rank", json.dumps(PATIENT).encode(), scope=scopes[0])
    assert (reply.status, service.gate.coming) == (200, 0)


# --------------------------------------------------------------------------------------------- OpenAPI


async def test_the_example_of_the_document_works_when_posted(app):
    document = (await call(app, "GET", "/openapi.json")).json()
    (example,) = document["components"]["schemas"]["RankRequest"]["examples"]
    reply = await rank(app, example)
    assert reply.status == 200
    assert reply.json()["items"]


async def test_the_document_is_made_once(app, monkeypatch):
    monkeypatch.setattr("fastapi.applications.get_openapi", None)
    for _ in range(2):
        assert (await call(app, "GET", "/openapi.json")).status == 200


async def test_the_document_shows_schemas_and_every_status(app):
    document = (await call(app, "GET", "/openapi.json")).json()
    schemas = document["components"]["schemas"]
    assert {"RankRequest", "RankResponse", "Problem", "FilterPart", "ItemPart"} <= set(schemas)
    assert {"eq", "in", "gte", "lte", "field"} == set(schemas["FilterPart"]["properties"])
    statuses = set(document["paths"]["/v1/rank"]["post"]["responses"])
    assert statuses == {"200"} | {str(code) for code in WHY_NOT}
    assert "securitySchemes" not in document["components"]


async def test_the_document_asks_for_a_key_where_one_is_needed(locked):
    document = (await call(locked, "GET", "/openapi.json")).json()
    assert document["paths"]["/v1/rank"]["post"]["security"] == [{"key": []}]
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"


async def test_every_reference_of_the_document_leads_somewhere(app):
    text = (await call(app, "GET", "/openapi.json")).body.decode()
    schemas = json.loads(text)["components"]["schemas"]
    assert set(re.findall(r'"#/components/schemas/(\w+)"', text)) <= set(schemas)


# --------------------------------------------------------------------------------------------- metrics


def samples(service) -> dict[tuple, float]:
    body, _ = service.metrics.render()
    families = text_string_to_metric_families(body.decode())
    return {(s.name, *sorted(s.labels.items())): s.value for f in families for s in f.samples}


def children(found, name: str, *labels: str) -> set[tuple[str, ...]]:
    return {tuple(dict(key[1:])[label] for label in labels) for key in found if key[0] == name}


async def test_every_labelled_child_exists_from_the_start(bundle):
    fresh = samples(Service(Settings(bundle=bundle, workers=1)))
    stages = ["retrieval", "preranking", "reranking", "selection"]
    assert children(fresh, "winnow_requests_total", "outcome") == {(o,) for o in metrics.OUTCOMES}
    assert children(fresh, "winnow_shards_total", "outcome") == {(o,) for o in metrics.SHARD_OUTCOMES}
    assert children(fresh, "winnow_rows_total", "work") == {("first",), ("hedge",), ("resend",)}
    assert children(fresh, "winnow_workers", "state") == {("alive",), ("starting",), ("backing_off",)}
    assert children(fresh, "winnow_stage_seconds_count", "stage") == {(s,) for s in stages}
    assert children(fresh, "winnow_stage_candidates_count", "stage", "edge") == {
        (s, e) for s in stages for e in ("wanted", "done", "out")
    }
    assert children(fresh, "winnow_score_count", "stage", "arm") == {(s, "none") for s in stages[:3]}
    assert children(fresh, "winnow_request_seconds_count", "arm") == {("none",)}
    assert children(fresh, "winnow_degradations_total", "stage", "reason") == {
        (s, r) for s in stages[:3] for r in ("late", "failed", "partial", "narrowed_by_time", "narrowed_by_load")
    } | {("retrieval", "user_late")}
    for name in (
        "winnow_inflight",
        "winnow_admission_limit",
        "winnow_quality",
        "winnow_coverage_ratio_count",
        "winnow_worker_restarts_total",
        "winnow_shard_seconds_count",
    ):
        assert (name,) in fresh
    assert all(
        value == 0 for key, value in fresh.items() if key[0].endswith(("_total", "_count")) and "winnow" in key[0]
    )


async def test_latency_is_counted_at_the_sla_and_at_half_and_twice_of_it(bundle):
    fresh = samples(Service(Settings(bundle=bundle, workers=1, sla_ms=80.0)))
    edges = {float(e) for (e,) in children(fresh, "winnow_request_seconds_bucket", "le")}
    assert {0.04, 0.08, 0.16} <= edges


async def test_traffic_adds_no_child_that_was_not_there(app, service):
    before = set(samples(service))
    for request in ({}, {"candidates": []}, b"{", {"k": 0}, {"timeout_ms": 1}, {"strict": True, "timeout_ms": 1}):
        await rank(app, request)
    assert set(samples(service)) == before


@pytest.mark.parametrize(
    ("request_", "outcome"),
    [({} | PATIENT, "ok"), ({"candidates": []} | PATIENT, "empty"), (b"{", "client_error"), ({"k": 0}, "client_error")],
)
async def test_each_request_is_counted_once_by_its_outcome(app, service, request_, outcome):
    before = samples(service)
    await rank(app, request_)
    after = samples(service)
    changed = {dict(k[1:])["outcome"]: after[k] - before[k] for k in after if k[0] == "winnow_requests_total"}
    assert {o: n for o, n in changed.items() if n} == {outcome: 1}


async def test_a_refusal_and_a_defect_are_counted_as_such(app, service, monkeypatch):
    before = samples(service)
    with monkeypatch.context() as patch:
        patch.setattr(service.gate, "phase", Phase.DRAINING)
        await rank(app, {})
    with monkeypatch.context() as patch:
        breaks(service, patch, TypeError())
        await rank(app, {})
    after = samples(service)
    for outcome in ("refused", "error"):
        key = ("winnow_requests_total", ("outcome", outcome))
        assert after[key] - before[key] == 1


async def test_the_admin_port_shows_metrics_and_generations_and_ranks_nothing(service):
    admin = create_admin_app(service)
    reply = await call(admin, "GET", "/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=")
    assert b"winnow_requests_total" in reply.body
    digest = service.serving.generation.digest
    found = samples(service)
    assert found["winnow_generation_info", ("digest", digest[:12]), ("role", "serving")] == 1
    assert found["winnow_generation_age_seconds", ("role", "serving")] > 0
    assert found["winnow_worker_rss_bytes", ("worker", "0")] > 1_000_000
    held = (await call(admin, "GET", "/admin/generations")).json()["generations"]
    assert [(g["role"], g["digest"], g["name"], g["items"]) for g in held] == [("serving", digest, "tiny", world.N)]
    assert (await rank(admin, {})).status == 404


# ----------------------------------------------------------------------------------------------- log


@pytest.mark.parametrize(
    ("request_", "status", "outcome"),
    [({"request_id": "a"} | PATIENT, 200, "ok"), (b"{", 400, "client_error"), ({"k": 0}, 422, "client_error")],
)
async def test_a_request_is_one_line_of_json(app, caplog, request_, status, outcome):
    with caplog.at_level(logging.INFO, "winnow.request"):
        await rank(app, request_, {"traceparent": "00-1-2-01", "x-request-id": "a"})
    (record,) = [r for r in caplog.records if r.name == "winnow.request"]
    text = Line().format(record)
    assert "\n" not in text
    line = json.loads(text)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
    assert (line["request_id"], line["status"], line["outcome"]) == ("a", status, outcome)
    assert line["traceparent"] == "00-1-2-01"
    assert line["ms"] > 0
    if status == 200:
        assert line["generation"].startswith("tiny@1#")
        assert (line["n"], line["wanted"], line["reranked"], line["degraded"]) == (5, 32, 32, [])
        assert set(line["stage_ms"]) == {"queue", "users", "retrieval", "preranking", "reranking", "selection"}


async def test_a_504_is_logged_with_its_stages_and_its_time_is_counted(app, service, monkeypatch, caplog):
    before = samples(service)
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO, "winnow.request"):
        breaks(service, patch, StageFailed("broken"))
        assert (await rank(app, {"strict": True} | PATIENT)).status == 504
    (record,) = [r for r in caplog.records if r.name == "winnow.request"]
    line = json.loads(Line().format(record))
    assert (line["status"], line["outcome"], line["degraded"]) == (504, "deadline", ["preranking: failed"])
    assert set(line["stage_ms"]) == {"queue", "users", "retrieval", "preranking", "reranking", "selection"}
    after = samples(service)
    key = ("winnow_request_seconds_count", ("arm", "none"))
    assert after[key] - before[key] == 1


async def test_a_line_with_a_trace_or_a_strange_field_is_still_one_line():
    try:
        raise ValueError("two\nlines")
    except ValueError as e:
        record = logging.LogRecord("x", logging.ERROR, "", 0, "no", (), (type(e), e, e.__traceback__))
    record.fields = {"thing": object()}
    text = Line().format(record)
    assert "\n" not in text
    assert "two\nlines" in json.loads(text)["trace"]


async def test_a_body_with_a_hundred_thousand_errors_is_refused_without_naming_them_all():
    body = json.dumps({"context": {f"n{i}": None for i in range(30_000)}}).encode()
    with pytest.raises(InvalidRequest, match="body: what the schema allows"):
        wire.parse(body, wire.RankRequest)


async def test_a_log_line_names_a_file_whose_name_is_no_text():
    message = f"{os.fsdecode(bytes([255]))}.npy: not listed in the manifest"
    record = logging.LogRecord("app", logging.ERROR, "", 0, "%s", (message,), None)
    assert json.loads(Line().format(record))["message"] == "\\udcff.npy: not listed in the manifest"


async def test_each_schema_names_its_own_fields():
    with pytest.raises(InvalidRequest, match="now: no such field; allowed: path, activate"):
        wire.parse(b'{"path": "x", "now": 1}', wire.OfferRequest)


async def test_a_request_that_its_client_sent_slowly_says_nothing_of_the_load(service):
    body = json.dumps({"user": {"id": "cho"}}).encode()
    now, before = time.monotonic(), service.gate.quality.value
    arrived = (now - service.gate.sla_s, now)  # nothing of its time is left
    told, _ = await service.rank(wire.parse(body, wire.RankRequest), body, "r-1", arrived)
    assert told.degradations
    assert service.gate.quality.value >= before
