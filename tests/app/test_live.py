"""Live items: added ones are ranked as if they had been packed, removed ones are gone, and no change is lost."""

import asyncio
import itertools
import json
import mmap
import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import pytest
import pytest_asyncio

from app import live, wire
from app.bundle import NO_ROW, Ids, Room, load
from app.errors import BundleError, Conflict, InvalidRequest, ServerError
from app.flow import Live
from app.funnel import offline_funnel
from app.main import create_admin_app, create_app
from app.service import Service
from app.settings import Settings
from app.stages.retrieval import Retrieval
from app.workers.process import begin
from tests import world
from tests.app.test_filters import SAMPLED, SEARCH, index_of
from tests.asgi import call, rank
from tests.running import running
from tests.seal import reseal

ROOM = 4
N_RANDOM, RNG = 400, np.random.default_rng(3)
EMBEDDING = RNG.normal(size=(N_RANDOM + 20, world.D)).astype(np.float32)


def item(id_: int, row: int, **tables) -> dict:
    """What is sent for an item that is as the tiny world's `row` is, but for these tables."""
    as_row = {"year": float(world.YEAR[row]), "genres": world.GENRE[row].tolist(), "title": f"Item {row:02d}"}
    return {"id": id_, "embedding": world.EMBEDDING[row].tolist(), "tables": as_row | tables}


def change(generation, **asked) -> dict:
    parsed = wire.parse(json.dumps(asked).encode(), wire.ItemsRequest)
    made = live.checked(generation, parsed)
    live.apply(generation, made)
    return made.counts


@pytest.fixture
def catalogue(generation):
    return live.changeable(generation, ROOM)


def is_read_by_the_row(table) -> bool:
    """Whether the kernel was told so of its map (rr: random read advised); by itself it reads megabytes around each."""
    for before, after in itertools.pairwise(Path("/proc/self/smaps").read_text().split("VmFlags: ")):
        head = next(line for line in before.splitlines() if re.match("[0-9a-f]+-[0-9a-f]+ ", line))
        start, end = (int(at, 16) for at in head.split()[0].split("-"))
        if start <= table.ctypes.data < end:
            return "rr" in after.splitlines()[0].split()
    raise LookupError("in no map")


def test_of_wide_tables_that_are_not_in_memory_only_the_pages_of_the_rows_are_read(generation, catalogue):
    for tables in (generation.tables, catalogue.tables):
        assert tables["embedding"][:1].nbytes >= 16
        assert is_read_by_the_row(tables["embedding"])
        assert not is_read_by_the_row(tables["year"])


async def answer(generation, unhurried, **asked) -> list:
    query = wire.to_query(wire.parse(json.dumps(asked).encode(), wire.RankRequest), "x", generation)
    return generation.ids.external((await world.rank_by(unhurried, offline_funnel(generation), query)).rows)


# ------------------------------------------------------------------------------------ the catalogue


def test_room_changes_nothing_of_what_is_there(generation, catalogue):
    assert catalogue.n_items == world.N
    assert catalogue.live.epoch == 0
    for name, table in generation.tables.items():
        assert np.array_equal(catalogue.tables[name][: world.N], table)
        assert catalogue.tables[name].shape == (world.N + ROOM, *table.shape[1:])
        with pytest.raises(ValueError, match="read-only"):
            catalogue.tables[name][0] = table[1]


def test_tables_begin_where_a_huge_page_may(catalogue):
    offset = np.lib.format.open_memmap(catalogue.path / "items/embedding.npy", mode="r").offset
    assert (catalogue.tables["embedding"].ctypes.data - offset) % live.HUGE == 0


def test_large_tables_do_not(generation, monkeypatch):
    monkeypatch.setattr(live, "LARGE", 0)
    wide = live.changeable(generation, ROOM)
    offset = np.lib.format.open_memmap(wide.path / "items/embedding.npy", mode="r").offset
    assert (wide.tables["embedding"].ctypes.data - offset) % live.HUGE == mmap.PAGESIZE
    assert np.array_equal(wide.tables["embedding"][: world.N], generation.tables["embedding"])


def test_what_is_written_never_reaches_the_file(generation, catalogue):
    before = (generation.path / "items/embedding.npy").read_bytes()
    change(catalogue, add=[item(7, 3)])
    assert (generation.path / "items/embedding.npy").read_bytes() == before
    assert live.changeable(generation, ROOM).tables["embedding"][world.N].tolist() == [0.0] * world.D


async def test_an_added_item_is_ranked_as_one_that_was_packed(catalogue, unhurried):
    """The same embedding and tables as the person's favourite: it ties, and ties break by row."""
    best, *others = await answer(catalogue, unhurried, user={"id": "cho"}, k=5)
    row = world.ITEM_IDS.tolist().index(best)
    counted = change(catalogue, add=[item(7, row)])
    assert counted == {"epoch": 1, "added": 1, "removed": 0, "unknown": 0}
    assert await answer(catalogue, unhurried, user={"id": "cho"}, k=5) == [best, 7, *others[:3]]
    change(catalogue, add=[item(8, row, year=3000.0)])
    fresh = {"freshness": 1}
    assert (await answer(catalogue, unhurried, user={"id": "cho"}, query=fresh, k=1)) == [8]


async def test_many_changes_are_one_where_the_bundle_was_just_loaded(generation, catalogue, unhurried):
    change(catalogue, add=[item(7, 3), item(8, 4)], remove=[world.item_id(5)])
    change(catalogue, add=[item(7, 21)])  # again, elsewhere
    change(catalogue, add=[item(world.item_id(9), 21)])  # one that was packed
    change(catalogue, remove=[8, world.item_id(6)])
    another = live.changeable(generation, ROOM)
    live.apply(another, live.so_far(catalogue))
    ids = [7, 8, *(world.item_id(row) for row in range(world.N))]
    assert another.ids.rows(ids).tolist() == catalogue.ids.rows(ids).tolist()
    assert (another.n_items, another.live.epoch, another.live.n_lost) == (world.N + 4, 7, 3)
    for k in (3, world.N):
        told = [await answer(one, unhurried, user={"id": "cho"}, k=k) for one in (another, catalogue)]
        assert told[0] == told[1]
    for one in (another, catalogue):
        assert change(one, remove=[7, 8])["removed"] == 1


async def test_a_removed_item_is_found_nowhere(catalogue, unhurried):
    first, second, *_ = await answer(catalogue, unhurried, user={"id": "cho"}, k=5)
    assert change(catalogue, remove=[first, 424242]) == {"epoch": 1, "added": 0, "removed": 1, "unknown": 1}
    assert (await answer(catalogue, unhurried, user={"id": "cho"}, k=5))[0] == second
    assert first not in await answer(catalogue, unhurried, k=world.N)
    low = [{"field": "year", "gte": 0}]
    assert first not in await answer(catalogue, unhurried, k=world.N, filters=low)
    assert await answer(catalogue, unhurried, candidates=[first, second]) == [second]
    assert first not in catalogue.ids.external(
        Retrieval(catalogue).substitute(scope_of(40), query(catalogue), None).rows
    )


def scope_of(width):
    class Scope:
        retrieve_width = width

    return Scope


def query(generation, **asked):
    return wire.to_query(wire.parse(json.dumps(asked).encode(), wire.RankRequest), "x", generation)


async def test_an_item_that_is_added_again_takes_the_place_of_the_old(catalogue, unhurried):
    """Without losing who read the old one: its row is still in histories."""
    old = world.item_id(20)
    assert change(catalogue, add=[item(old, 49)]) == {"epoch": 1, "added": 1, "removed": 0, "unknown": 0}
    assert catalogue.ids.rows([old]).tolist() == [world.N]
    assert (await answer(catalogue, unhurried, user={"id": "cho"}, k=5)) == [world.item_id(r) for r in range(21, 26)]
    assert (await answer(catalogue, unhurried, candidates=[old])) == [old]
    change(catalogue, remove=[old])
    assert await answer(catalogue, unhurried, candidates=[old]) == []
    change(catalogue, add=[item(old, 20)])
    assert catalogue.ids.rows([old]).tolist() == [world.N + 1]
    # Whoever has seen it, by its first row, isn't shown it again; and it is as popular as it was.
    assert old not in await answer(catalogue, unhurried, user={"id": "cho"}, k=world.N)
    popular = catalogue.ids.external(Retrieval(catalogue).substitute(scope_of(40), query(catalogue), None).rows)
    assert popular.index(old) == world.POPULAR.tolist().index(20)


async def test_a_history_still_reads_what_was_removed(catalogue, unhurried):
    old = world.item_id(20)
    asked = {"user": {"history": [old]}, "k": 3}
    before = await answer(catalogue, unhurried, **asked)
    change(catalogue, remove=[old])
    assert await answer(catalogue, unhurried, **asked) == before
    assert query(catalogue, **asked, candidates=[old, 1000, 5]).ignored["candidates"] == 2


def test_filters_see_what_was_added(catalogue):
    change(catalogue, add=[item(7, 3, genres=["silent", -1])])
    asked = query(catalogue, filters=[{"field": "genres", "eq": "silent"}, {"field": "year", "lte": 1953}])
    assert 7 in catalogue.ids.external(Retrieval(catalogue).search(asked, 40).rows)


async def test_text_ids_and_their_width(text_generation, unhurried):
    catalogue = live.changeable(text_generation, ROOM)
    change(catalogue, add=[item("new", 21) | {"id": "new"}])
    assert "new" in await answer(catalogue, unhurried, candidates=["new", "item-1000"])
    with pytest.raises(InvalidRequest, match=r"add\.0\.id: text of up to 9 characters"):
        change(catalogue, add=[item("n" * 200, 21)])


@pytest.mark.parametrize("are_text", [False, True])
def test_ids_as_a_dictionary_has_them(are_text):
    """Against a plain dictionary, through many additions."""
    ids = [f"i{n}" for n in range(60)] if are_text else list(range(60))
    held = np.array(ids[:40] + ids[:20])
    table, known = Ids(held, np.argsort(held[:40])), dict(zip(ids[:40], range(40), strict=True))
    for step in range(200):
        one = ids[RNG.integers(0, 60)]
        known[one] = table.added[one] = 40 + step
        assert table.rows(ids).tolist() == [known.get(i, NO_ROW) for i in ids]


# ---------------------------------------------------------------------------------- kinds of index


def pq() -> faiss.Index:
    index = faiss.index_factory(world.D, "IVF4,PQ4x4fs", faiss.METRIC_INNER_PRODUCT)
    index.train(EMBEDDING[:N_RANDOM])
    index.add(EMBEDDING[:N_RANDOM])
    return index


LEAST = {
    "flat": 40,
    "hnsw": 36,
    "ivf_sq8": 20,
    "ivf_sq4": 20,
    "ivf_pq": 30,
}  # of the 40 nearest; the third and fourth probe two lists of four


@pytest.fixture(params=[*SEARCH, "ivf_pq", SAMPLED])
def random(request, generation, monkeypatch):
    """A random catalogue with an index of this kind, twenty rows of room behind it."""
    kind, _, is_sampled = request.param.partition(", ")
    monkeypatch.setattr("tests.app.test_filters.EMBEDDING", EMBEDDING[:N_RANDOM])
    monkeypatch.setattr("app.stages.retrieval.LEAST_SAMPLED", 1)
    retriever = generation.manifest.retrievers[0].model_copy(
        update={"kind": kind, "n": N_RANDOM, "search": SEARCH.get(kind, {"nprobe": 4}), "overfetch": 2.0}
        | {"sampled": 4 if is_sampled else 0}
    )
    bits = np.full((N_RANDOM + 20 + 7) // 8, 255, np.uint8)
    return replace(
        generation,
        ids=Ids(np.arange(N_RANDOM + 20), np.arange(N_RANDOM)),
        tables={"embedding": EMBEDDING},
        index=pq() if kind == "ivf_pq" else index_of(kind),
        popular=np.arange(N_RANDOM),
        manifest=generation.manifest.model_copy(update={"retrievers": (retriever,)}),
        room=Room({"ids": np.arange(20), "embedding": EMBEDDING[N_RANDOM:]}, Live(bits=bits)),
    )


def test_every_kind_of_index_leaves_out_the_removed_and_takes_in_the_added(random):
    retrieval, person = Retrieval(random), query(random)
    before = retrieval.search(person, 40).rows
    user = retrieval.embed(person)
    nearest = np.argsort(-(EMBEDDING[:N_RANDOM] @ user), kind="stable")
    gone = nearest[:150].tolist()  # more than the search would fetch
    change(random, remove=gone)
    change(random, add=[{"id": n, "embedding": EMBEDDING[n].tolist()} for n in range(N_RANDOM, N_RANDOM + 20)])
    assert np.array_equal(retrieval.search(person, 40).rows, before)  # a request is answered from its own epoch
    found = retrieval.search(query(random), 40)
    assert len(found) == 40
    assert not set(found.rows.tolist()) & set(gone)
    exact = np.setdiff1d(np.arange(N_RANDOM + 20), gone)
    best = exact[np.argsort(-(EMBEDDING[exact] @ user), kind="stable")][:40]
    fresh = {row for row in best.tolist() if row >= N_RANDOM}
    assert fresh <= set(found.rows.tolist())
    assert len(set(best.tolist()) & set(found.rows.tolist())) >= LEAST[random.manifest.retrievers[0].kind]
    assert found.retrieval_scores == pytest.approx(EMBEDDING[found.rows] @ user, abs=1e-5)


def test_of_a_catalogue_that_lost_nearly_all_every_item_that_is_left_is_found(random):
    """A graph in which the way to them leads over what was removed finds none."""
    left = [3, 77, 151, 288, 399]
    change(random, remove=[n for n in range(N_RANDOM) if n not in left])
    assert sorted(Retrieval(random).search(query(random), 40).rows.tolist()) == left
    change(random, add=[{"id": N_RANDOM, "embedding": EMBEDDING[N_RANDOM].tolist()}])
    assert sorted(Retrieval(random).search(query(random), 40).rows.tolist()) == [*left, N_RANDOM]


# ------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"add": [{"id": 7, "embedding": [0.0] * 7}]}, "add.0.embedding"),
        ({"add": [item(1, 0), item(7, 3) | {"embedding": [1e39] + [0.0] * 7}]}, "add.1.embedding"),
        ({"add": [item(1, 0), item(7, 3, year="x")]}, "add.1.tables.year"),
        ({"add": [item(7, 3, genres=["nobody's", -1])]}, "add.0.tables.genres"),
        ({"add": [item(7, 3, genres=[1.5, -1])]}, "add.0.tables.genres"),
        ({"add": [item(7, 3, genres=[40_000, -1])]}, "add.0.tables.genres"),
        ({"add": [item(7, 3, title="a title that is longer than the table's")]}, "add.0.tables.title"),
        ({"add": [item(7, 3, title=5)]}, "add.0.tables.title"),
        ({"add": [item(7, 3, price=5)]}, "add.0.tables.price"),
        ({"add": [item(7, 3, ids=8)]}, "add.0.tables.ids"),
        ({"add": [{"id": 7, "embedding": [0.0] * 8, "tables": {"year": 1}}]}, "add.0.tables.genres"),
        ({"add": [item("seven", 3)]}, "add.0.id"),
        ({"add": [item(2**70, 3)]}, "add.0.id"),
        ({"add": [item(7, 3), item(7, 4)]}, "body"),
        ({"add": [item(7, 3)], "remove": [7]}, "body"),
        ({"add": [item(7, 3) | {"embeding": []}]}, "add.0.embeding"),
        ({"drop": [1]}, "drop"),
        ({"remove": [1.5]}, "remove.0"),
        ({}, "body"),
        ({"add": [item(7, 3, genres=[99, -1])]}, "add.0.tables.genres"),
        ({"add": [item(7, 3, embedding=[0.0] * 8)]}, "add.0.tables.embedding"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_field_and_changes_nothing(catalogue, asked, field):
    with pytest.raises(InvalidRequest) as refused:
        change(catalogue, **asked)
    assert refused.value.errors[0].field == field
    assert refused.value.errors[0].allowed
    assert (catalogue.live.epoch, catalogue.n_items) == (0, world.N)
    assert catalogue.ids.added == {}


def test_all_that_is_missing_is_said_at_once(catalogue):
    with pytest.raises(InvalidRequest) as refused:
        change(catalogue, add=[{"id": 7, "embedding": [0.0] * 8, "tables": {"price": 1}}])
    told = {e.field: e.allowed for e in refused.value.errors}
    assert set(told) == {f"add.0.tables.{name}" for name in ("genres", "title", "year", "price")}
    assert told["add.0.tables.genres"].startswith("missing: 2 of type int16, or one of")
    assert told["add.0.tables.price"].startswith("no such table")


def test_room_that_is_used_up_is_a_conflict(catalogue):
    change(catalogue, add=[item(n, n) for n in range(3)])
    with pytest.raises(Conflict, match="WINNOW_LIVE_ROOM leaves 1 more"):
        change(catalogue, add=[item(n, n) for n in range(10, 12)])
    change(catalogue, add=[item(10, 4)])
    assert catalogue.n_items == world.N + 4


def test_without_room_items_can_not_be_added(generation):
    closed = live.changeable(generation, 0)
    with pytest.raises(Conflict, match="WINNOW_LIVE_ROOM leaves 0 more"):
        change(closed, add=[item(7, 3)])
    assert change(closed, remove=[1000, 424242])["removed"] == 1
    assert closed.n_items == world.N
    assert 1000 not in closed.ids.external(Retrieval(closed).search(query(closed), 50).rows)


def test_a_table_in_another_order_is_refused(copy):
    file = copy / "items/embedding.npy"
    np.save(file, np.asfortranarray(np.load(file)))
    with pytest.raises(BundleError, match=r"items/embedding\.npy: must be in C order"):
        live.changeable(load(copy, is_verified=True), ROOM)


def test_a_bundle_whose_model_reads_row_numbers_loses_items_only(catalogue):
    schema = catalogue.manifest.features
    inputs = tuple(i.model_copy(update={"table": "row"}) if i.table == "year" else i for i in schema.re_ranker)
    features = schema.model_copy(update={"re_ranker": inputs})
    by_row = replace(catalogue, manifest=catalogue.manifest.model_copy(update={"features": features}))
    with pytest.raises(Conflict, match="can lose items but get none"):
        change(by_row, add=[item(7, 3)])
    assert change(by_row, remove=[1000])["removed"] == 1


# ------------------------------------------------------------------------------------- the journal


def test_a_journal_gives_back_what_was_added_to_it(tmp_path):
    journal = live.Journal(tmp_path / "x.jsonl")
    assert journal.read() == []
    journal.add(b"one")
    journal.add(b"two")
    assert live.Journal(tmp_path / "x.jsonl").read() == [b"one", b"two"]


def test_a_line_that_was_torn_is_cut_off(tmp_path):
    journal = live.Journal(tmp_path / "x.jsonl")
    journal.add(b"one")
    with journal.file.open("ab") as f:
        f.write(b'{"add": [')
    assert journal.read() == [b"one"]
    journal.add(b"two")
    assert journal.read() == [b"one", b"two"]


def test_a_line_that_a_full_disk_took_in_part_is_taken_back(tmp_path, monkeypatch):
    journal = live.Journal(tmp_path / "x.jsonl")
    journal.add(b"one")

    def fails(fd):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        with pytest.raises(OSError, match="No space"):
            journal.add(b"two")
    journal.add(b"three")
    assert journal.read() == [b"one", b"three"]


def test_a_journal_without_a_directory_is_named_at_the_start(tmp_path):
    with pytest.raises(ServerError, match=r"WINNOW_LIVE_JOURNAL=.*nowhere: No such file"):
        live.Journal(tmp_path / "nowhere" / "x.jsonl").read()


def test_a_journal_that_does_not_fit_its_bundle_is_named(catalogue):
    with pytest.raises(BundleError, match=r"x\.jsonl: change 2: add\.0\.embedding"):
        live.replay(
            catalogue, [b'{"remove": [5]}', json.dumps({"add": [{"id": 1, "embedding": [1]}]}).encode()], "x.jsonl"
        )


# ------------------------------------------------------------------------------- a service with workers


@pytest_asyncio.fixture
async def service(bundle, tmp_path):
    service = Service(
        Settings(bundle=bundle, workers=2, spares=0, sla_ms=5000.0, linger_s=0.0, live_room=ROOM, live_journal=tmp_path)
    )
    await service.start()
    yield service
    await service.stop()


async def post(service, **asked):
    return await call(create_admin_app(service), "POST", "/admin/items", json.dumps(asked).encode())


async def test_a_change_is_met_by_every_request_that_comes_after_it(service):
    app, best = create_app(service), world.item_id(21)
    reply = await post(service, add=[item(7, 21), item(8, 21)], remove=[best])
    said = {k: v for k, v in reply.json().items() if k != "generation"}
    assert (reply.status, said) == (200, {"is_kept": True, "epoch": 3, "added": 2, "removed": 1, "unknown": 0})
    for _ in range(6):  # either worker
        got = (await rank(app, {"user": {"id": "cho"}, "k": 3})).json()
        assert [i["id"] for i in got["items"]] == [7, 8, world.item_id(22)]
        assert (got["epoch"], got["degraded"]) == (3, [])
    (held,) = (await call(create_admin_app(service), "GET", "/admin/generations")).json()["generations"]
    assert held["epoch"] == 3
    assert b'winnow_generation_epoch{role="serving"} 3.0' in service.metrics.render()[0]


async def test_a_worker_that_is_started_again_knows_the_changes(service):
    app = create_app(service)
    await post(service, add=[item(7, 21)])
    for pid in service.serving.pool.pids().values():
        os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while True:
        got = (await rank(app, {"user": {"id": "cho"}, "k": 2})).json()
        if not got["degraded"] or time.monotonic() > deadline:
            break
    assert [i["id"] for i in got["items"]] == [world.item_id(21), 7]
    assert got["degraded"] == []


async def test_a_worker_that_is_being_started_learns_once_what_it_missed(service, monkeypatch):
    app, pool, begun, going_on = create_app(service), service.serving.pool, asyncio.Semaphore(0), asyncio.Event()

    async def held_up(process):
        await begin(process)
        begun.release()
        await going_on.wait()

    monkeypatch.setattr("app.workers.pool.begin", held_up)
    await post(service, add=[item(7, 21)])
    for pid in pool.pids().values():
        os.kill(pid, signal.SIGKILL)
    for _ in pool.workers:
        await asyncio.wait_for(begun.acquire(), 20)
    await post(service, add=[item(8, 21)], remove=[7])
    going_on.set()
    for worker in pool.workers:
        await asyncio.wait_for(worker.is_ready.wait(), 20)
    for _ in range(6):  # either worker
        got = (await rank(app, {"user": {"id": "cho"}, "k": 2})).json()
        assert ([i["id"] for i in got["items"]], got["epoch"], got["degraded"]) == ([world.item_id(21), 8], 3, [])


async def test_what_changes_nothing_is_not_kept(service, tmp_path, monkeypatch):
    monkeypatch.setattr(service.serving.pool, "change", None)
    said = (await post(service, remove=[424242])).json()
    assert (said["removed"], said["unknown"], said["epoch"]) == (0, 1, 0)
    assert (await post(service)).status == 422
    assert all(file.read_bytes() == b"" for file in tmp_path.glob("*.jsonl"))


async def test_the_previous_bundle_offered_again_serves_with_its_changes(service, bundle, copy):
    """It isn't loaded twice: changes belong to a generation, and there is one of a bundle."""
    await post(service, add=[item(7, 21)])
    first = service.serving
    reseal(copy, lambda manifest: manifest.update(version="2"))
    for path in (copy, bundle):
        offer = json.dumps({"path": str(path)}).encode()
        assert (await call(create_admin_app(service), "POST", "/admin/generations", offer)).status == 202
        await asyncio.gather(*(task for task in service.tasks if task.get_name() == "load"))
        assert service.loading["state"] == "ready"
        assert (service.serving is first) == (path is bundle)
    got = (await rank(create_app(service), {"user": {"id": "cho"}, "k": 2})).json()
    assert ([i["id"] for i in got["items"]], got["epoch"]) == ([world.item_id(21), 7], 1)


async def test_a_worker_that_starts_with_nothing_in_the_catalogue_scores_what_comes_later(service):
    await post(service, remove=[world.item_id(row) for row in range(world.N)])
    first = service.serving.pool.pids()
    for pid in first.values():
        os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(60):
        while len(set(service.serving.pool.pids().values()) - set(first.values())) < len(first):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await post(service, add=[item(7, 21)])
    got = (await rank(create_app(service), {"user": {"id": "cho"}, "k": 2})).json()
    assert ([i["id"] for i in got["items"]], got["degraded"]) == ([7], [])


async def test_answers_under_changes_are_each_of_one_epoch(service):
    """Item 7 comes with every odd change of it and goes with every even one: the epoch says whether it is there."""
    app, answers = create_app(service), []

    async def ask() -> None:
        while not is_over.is_set():
            answers.append((await rank(app, {"user": {"id": "cho"}, "k": 2})).json())

    is_over = asyncio.Event()
    asking = [asyncio.create_task(ask()) for _ in range(3)]
    for number in range(2 * ROOM):
        asked = {"remove": [7]} if number % 2 else {"add": [item(7, 21)]}
        assert (await post(service, **asked)).json()["epoch"] == number + 1
    is_over.set()
    await asyncio.gather(*asking)
    for got in answers:
        second = 7 if got["epoch"] % 2 else world.item_id(22)
        assert [i["id"] for i in got["items"]] == [world.item_id(21), second]
        assert got["degraded"] == []
    assert len({got["epoch"] for got in answers}) > 1


async def test_a_refusal_names_the_field_over_http(service):
    reply = await post(service, add=[item(7, 21) | {"embedding": [1]}])
    assert reply.status == 422
    assert reply.json()["errors"][0]["field"] == "add.0.embedding"
    assert (await post(service, add=[item(n, n) for n in range(ROOM + 1)])).status == 409


async def test_a_change_that_can_not_be_kept_is_not_made(service, monkeypatch):
    def full(self, line):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(live.Journal, "add", full)
    reply = await post(service, add=[item(7, 21)])
    assert reply.status == 503
    assert b"No space left" in reply.body
    assert service.serving.generation.live.epoch == 0


def test_what_was_acknowledged_is_there_after_a_restart(bundle, tmp_path):
    for n in (7, 8):
        with running(bundle, WINNOW_LIVE_JOURNAL=str(tmp_path)) as process:
            process.wait_until_ready()
            body = json.dumps({"add": [item(n, 21)]}).encode()
            assert process.call("POST", "/admin/items", body, port=process.admin_port).status == 200
            process.process.kill()
    with running(bundle, WINNOW_LIVE_JOURNAL=str(tmp_path)) as process:
        process.wait_until_ready()
        got = process.rank({"user": {"id": "cho"}, "k": 3}).json()
    assert [i["id"] for i in got["items"]] == [world.item_id(21), 7, 8]
    assert got["epoch"] == 2
