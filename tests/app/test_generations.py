"""Generations: offered, refused, switched, rolled back, and closed, while requests run."""

import asyncio
import os
import shutil

import pytest
import pytest_asyncio

from app.errors import Conflict
from app.main import create_admin_app, create_app
from app.service import Service
from app.settings import Limits, Settings
from tests import world
from tests.asgi import call, rank
from tests.seal import reseal

pytestmark = pytest.mark.asyncio(loop_scope="module")

PATIENT = {"timeout_ms": Limits.TIMEOUT_MS, "user": {"id": "cho"}}
NEXT_TO_20 = [world.item_id(r) for r in (21, 22, 23, 24, 25)]


@pytest.fixture(scope="module")
def other(bundle, tmp_path_factory):
    """The tiny world as version 2."""
    folder = shutil.copytree(bundle, tmp_path_factory.mktemp("other") / "bundle")
    reseal(folder, lambda m: m.update(version="2"))
    return folder


@pytest_asyncio.fixture(loop_scope="module")
async def service(bundle):
    service = Service(Settings(bundle=bundle, workers=1, spares=0, sla_ms=5000.0, linger_s=0.0))
    await service.start()
    yield service
    await service.stop()


@pytest.fixture
def admin(service):
    return create_admin_app(service)


async def offer(admin, path, **more):
    body = f'{{"path": "{path}"'.encode() + b"".join(f', "{k}": {v}'.encode() for k, v in more.items()) + b"}"
    return await call(admin, "POST", "/admin/generations", body)


async def loaded(service) -> None:
    """Wait until loading has ended."""
    await asyncio.gather(*(t for t in service.tasks if t.get_name() == "load"))


def versions(service) -> dict[str, str]:
    return {role: held.generation.manifest.version for role, held in service.held.items()}


async def test_an_offered_bundle_is_proved_aside_and_then_serves(service, admin, other):
    assert (await offer(admin, other)).status == 202
    assert service.loading["state"] == "loading"
    assert (await rank(create_app(service), PATIENT)).json()["generation"].startswith("tiny@1#")
    await loaded(service)
    answer = (await rank(create_app(service), PATIENT)).json()
    assert answer["generation"].startswith("tiny@2#")
    assert [i["id"] for i in answer["items"]] == NEXT_TO_20
    assert versions(service) == {"serving": "2", "previous": "1"}
    listed = (await call(admin, "GET", "/admin/generations")).json()
    assert listed["loading"] == {"path": str(other), "state": "ready", "error": None}
    assert {(g["role"], g["version"]) for g in listed["generations"]} == {("serving", "2"), ("previous", "1")}
    assert all(len(g["workers"]) == 1 for g in listed["generations"])


async def test_a_candidate_waits_until_it_is_activated(service, admin, other):
    await offer(admin, other, activate="false")
    await loaded(service)
    assert versions(service) == {"serving": "1", "candidate": "2"}
    service.switch_to("candidate")
    assert versions(service) == {"serving": "2", "previous": "1"}
    with pytest.raises(Conflict, match="no candidate"):
        service.switch_to("candidate")


async def test_rolling_back_lets_the_previous_one_serve_at_once(service, admin, other):
    assert (await call(admin, "POST", "/admin/rollback")).status == 409
    await offer(admin, other)
    await loaded(service)
    reply = await call(admin, "POST", "/admin/rollback")
    assert (reply.status, reply.json()) == (202, {"serving": service.serving.generation.name})
    assert versions(service) == {"serving": "1", "previous": "2"}
    assert (await rank(create_app(service), PATIENT)).json()["generation"].startswith("tiny@1#")


async def test_the_candidate_offered_again_serves_and_what_serves_is_not_loaded_twice(service, admin, other, bundle):
    await offer(admin, other, activate="false")
    await loaded(service)
    candidate, served = service.held["candidate"], service.serving
    service._open = None  # nothing more is opened
    await offer(admin, bundle)
    await loaded(service)
    assert service.serving is served
    assert versions(service) == {"serving": "1", "candidate": "2"}
    await offer(admin, other)
    await loaded(service)
    assert service.serving is candidate
    assert versions(service) == {"serving": "2", "previous": "1"}


async def test_who_rolls_back_while_a_bundle_loads_means_it(service, admin, other, copy):
    await offer(admin, other)
    await loaded(service)
    reseal(copy, lambda m: m.update(version="3"))
    reply = await offer(admin, copy)
    loading = {"path": str(copy), "state": "loading", "error": None}
    assert (reply.status, reply.json()) == (202, {"loading": loading})
    assert (await call(admin, "POST", "/admin/rollback")).status == 202
    await loaded(service)
    assert service.loading["state"] == "ready"
    assert versions(service) == {"serving": "1", "previous": "2", "candidate": "3"}


async def test_a_bundle_that_must_not_be_served_is_refused_by_name_and_the_old_one_serves_on(service, admin, copy):
    (copy / "popular.npy").write_bytes(b"spoilt")
    await offer(admin, copy)
    await loaded(service)
    assert service.loading["state"] == "failed"
    assert service.loading["error"].startswith("popular.npy: ")
    assert versions(service) == {"serving": "1"}
    assert (await rank(create_app(service), PATIENT)).json()["degraded"] == []


async def test_a_check_that_ends_without_a_word_is_a_refusal_too(service, admin, other, monkeypatch):
    monkeypatch.setattr("app.service.prove_aside", print)
    await offer(admin, other)
    await loaded(service)
    assert service.loading["error"] == f"{other}: the process that checked it ended with code 0"
    assert versions(service) == {"serving": "1"}


@pytest.mark.parametrize(
    ("body", "status"), [(b'{"path": "/no/such/bundle"}', 404), (b"{}", 422), (b'{"path": 7}', 422), (b'{"path"', 400)]
)
async def test_an_offer_that_makes_no_sense_says_so(admin, body, status):
    reply = await call(admin, "POST", "/admin/generations", body)
    assert reply.status == status
    assert reply.json()["status"] == status


async def test_one_bundle_is_loaded_at_a_time(service, admin, other):
    await offer(admin, other)
    assert (await offer(admin, other)).status == 409
    await loaded(service)


async def test_switches_under_traffic_fail_nobody_and_mix_nothing(service, admin, other, bundle):
    app, is_over, seen = create_app(service), asyncio.Event(), set()

    async def ask() -> None:
        while not is_over.is_set():
            reply = await rank(app, PATIENT)
            assert reply.status == 200
            assert [i["id"] for i in reply.json()["items"]] == NEXT_TO_20
            seen.add(reply.json()["generation"][:6])

    asking = [asyncio.create_task(ask()) for _ in range(3)]
    for path in (other, bundle):
        await offer(admin, path)
        await loaded(service)
    is_over.set()
    await asyncio.gather(*asking)
    assert seen == {"tiny@1", "tiny@2"}


async def test_a_generation_that_left_is_closed_when_its_last_request_has_ended(service, admin, other, copy):
    reseal(copy, lambda m: m.update(version="3"))
    first, is_asked, may_answer = service.serving, asyncio.Event(), asyncio.Event()
    (pid,) = first.pool.pids().values()
    whole = first.funnel.rank

    async def held_up(*given):
        is_asked.set()
        await may_answer.wait()
        return await whole(*given)

    first.funnel.rank = held_up
    answer = asyncio.create_task(rank(create_app(service), PATIENT))
    await is_asked.wait()
    for path in (other, copy):  # the first one leaves when the third comes
        await offer(admin, path)
        await loaded(service)
    assert first not in service.held.values()
    assert first.pool.n_workers == 1
    may_answer.set()
    assert (await answer).json()["generation"].startswith("tiny@1#")
    await asyncio.gather(*(t for t in service.tasks if t.get_name() == "close"))
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert versions(service) == {"serving": "3", "previous": "2"}
