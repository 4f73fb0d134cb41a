"""The worker's loop, run in a thread of this process with its two sockets at the other end."""

import socket
import threading
import time

import numpy as np
import orjson
import pytest

from app import wire
from app.control.costs import Cost
from app.errors import BundleError, ContractError, InvalidRequest, StageFailed
from app.flow import Sent, Stage
from app.warmup import offline_query, rank_offline
from app.workers import scoring, worker
from app.workers.messages import HEADER, Asked, Kind, frame, generation_number, read_frames
from app.workers.scoring import Shard
from tests import world

LONG_S = 600.0
JOB = 5


def receive(connection: socket.socket):
    """The next frame, and what it says; nothing of what follows it is taken."""
    head = connection.recv(HEADER.size, socket.MSG_WAITALL)
    _, _, _, length, _, _ = HEADER.unpack(head)
    ((header, said),) = read_frames(bytearray(head + (connection.recv(length, socket.MSG_WAITALL) if length else b"")))
    return header, said


class Child:
    """A worker's main loop in a thread, and the parent's ends of its sockets."""

    def __init__(self, generation, paced_row_s: float = 0.0) -> None:
        self.own = generation_number(generation.digest)
        self.connection, self.theirs = socket.socketpair()
        self.control, self.their_control = socket.socketpair()
        self.connection.settimeout(60)
        given = worker.Given(paced_row_s)
        self.worker = worker.Worker((self.theirs, self.their_control), generation.path, generation.digest, given)
        self.thread = threading.Thread(target=self.worker.serve)

    def start(self) -> "Child":
        self.thread.start()
        assert self.receive()[0].kind is Kind.READY
        return self

    def receive(self):
        """The next frame, and what it says."""
        return receive(self.connection)

    def ask(self, kind: Kind, said: object, own: int | None = None) -> None:
        self.connection.sendall(frame(kind, self.own if own is None else own, JOB, said))

    def tell(self, kind: Kind, job: int = JOB) -> None:
        self.control.sendall(frame(kind, self.own, job))

    def end(self) -> None:
        for parents in (self.connection, self.control):
            parents.close()
        self.thread.join(60)
        assert not self.thread.is_alive()
        for childs in (self.theirs, self.their_control):
            childs.close()


@pytest.fixture
def child(generation):
    child = Child(generation).start()
    yield child
    child.end()


def send_shard(child, generation, funnel, *, remaining_s=LONG_S, own=None) -> Shard:
    query = offline_query({"user": {"id": "cho"}}, generation)
    shard = Shard(query.person, funnel.retrieval.search(query, 20), {}, until=0.0)
    child.ask(Kind.SHARD, (shard, remaining_s), own)
    return shard


def send_request(child, request, timeout_s=LONG_S, quality=1.0) -> None:
    child.ask(Kind.RANK, Asked(Sent("r-1", orjson.dumps(request), None), timeout_s, timeout_s, quality))


# --------------------------------------------------------------------------------------------- shards


def test_a_child_answers_with_the_jobs_scores(child, generation, funnel):
    shard, scores = send_shard(child, generation, funnel), []
    while len(scores) < len(shard.candidates):  # in one slice, or more where the warm-up was slow
        header, scored = child.receive()
        assert (header.kind, header.job) == (Kind.SCORES, JOB)
        scores += scored.scores.tolist()
    expected = world.rerank_scores((20,), age=40, occupation=1)[shard.candidates.rows]
    np.testing.assert_allclose(scores, expected, rtol=1e-5)


def test_a_child_does_not_start_an_expired_shard(child, generation, funnel):
    send_shard(child, generation, funnel, remaining_s=-0.001)
    header, payload = child.receive()
    assert (header.kind, type(payload), str(payload)) == (Kind.FAILED, StageFailed, "expired before it was done")


def test_a_child_refuses_a_job_of_another_generation(child, generation, funnel):
    send_shard(child, generation, funnel, own=1)
    header, payload = child.receive()
    assert header.kind is Kind.FAILED
    assert "another generation" in str(payload)


def test_a_single_row_is_scored_in_a_batch_of_two(generation, funnel, monkeypatch):
    """onnxruntime adds up a batch of one in another order, which in eight bits may be a whole step."""
    batches, run = [], scoring.run_model

    def spied(session, feeds, options):
        batches.append({len(feeds[i.name]) for i in model.inputs if i.per == "item"})
        return run(session, feeds, options)

    monkeypatch.setattr(scoring, "run_model", spied)
    query = offline_query({"user": {"id": "cho"}}, generation)
    found = funnel.retrieval.search(query, 5)
    shard = Shard(query.person, found, {"candidate.bid": np.arange(5, dtype=np.float32)[:, None]}, until=0.0)
    model, options = scoring.ShardModel(generation), scoring.Run().options
    request = model.request_inputs(query.person, shard.candidates.user_embedding, options)
    whole = model.score(shard, request, options)
    alone = [model.score(shard.part(row, row + 1), request, options) for row in range(5)]
    assert batches == [{5}, *5 * [{2}]]
    np.testing.assert_allclose(np.concatenate(alone), whole, rtol=1e-5)


def test_slices_come_best_first_and_make_up_the_shard(child, generation, funnel, monkeypatch):
    monkeypatch.setattr(scoring, "slice_rows", lambda _, n_left, __: min(8, n_left))
    shard = send_shard(child, generation, funnel)
    slices = [child.receive()[1] for _ in range(3)]
    assert [(s.start, len(s.scores), s.is_last) for s in slices] == [(0, 8, False), (8, 8, False), (16, 4, True)]
    expected = world.rerank_scores((20,), age=40, occupation=1)[shard.candidates.rows]
    np.testing.assert_allclose(np.concatenate([s.scores for s in slices]), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("row_s", "n_left", "left_s", "n"),
    [
        (2e-5, 300, 0.03, 150),  # 3 ms, whatever is left: 150 rows
        (2e-5, 301, 0.03, 101),
        (2e-5, 301, 0.003, 43),  # no more than a third of what is left: 50 rows
        (1e-4, 300, -1.0, 8),
        (1e-4, 300, 0.1, 100),  # a tenth of 100 ms: 100 rows
        (1e-3, 300, 0.01, 8),
        (5e-6, 2_000, 1.0, 1_000),  # 100 ms would be 20,000 rows
        (0.0, 256, 0.1, 256),
    ],
)
def test_slices_are_equal_and_take_a_tenth_of_the_time_within_8_and_1024_rows(row_s, n_left, left_s, n):
    assert scoring.slice_rows(row_s, n_left, left_s) == n


# ------------------------------------------------------------------------------------------- requests

REQUESTS = [
    {"user": {"id": "ann"}, "k": 32},
    {"user": {"history": [world.item_id(r) for r in (3, 13)]}, "filters": [{"field": "genres", "eq": "horror"}]},
    {"candidates": [{"id": world.item_id(r), "features": {"bid": r}} for r in range(9)] + ["nobody"], "strict": True},
    {"exclude": [world.item_id(r) for r in range(50)]},
]


@pytest.mark.parametrize("request_", REQUESTS, ids=str)
async def test_a_request_is_ranked_as_in_the_parent(child, generation, funnel, request_):
    query = offline_query(request_, generation)
    expected = await rank_offline(funnel, query)
    send_request(child, request_)
    header, payload = child.receive()
    assert (header.kind, header.job) == (Kind.RANKED, JOB)
    told, answer = payload, orjson.loads(wire.finished(payload, {}))
    alone = orjson.loads(wire.finished(wire.told(query, expected, generation), {}))
    for one in (answer, alone):
        one["scores"] = pytest.approx([item.pop("score") for item in one["items"]], rel=1e-5)
    answer["scores"] = answer["scores"].expected
    assert answer == alone | {"request_id": "r-1"}
    assert [item["id"] for item in answer["items"]] == [world.item_id(row) for row in expected.rows]
    assert told.degradations == ()
    assert told.is_searched == (query.candidates is None)
    assert told.logged == {
        "generation": expected.generation,
        "epoch": 0,
        "is_known": query.person.is_known,
        "history": len(query.person.history),
        "k": query.k,
        "n": len(expected),
        "wanted": told.reports[Stage.RERANKING].wanted,
        "reranked": told.reports[Stage.RERANKING].done,
        "degraded": [],
    }
    for ours, theirs in zip(told.reports, expected.reports, strict=True):
        assert (ours.stage, ours.wanted, ours.done, ours.n_out) == (
            theirs.stage,
            theirs.wanted,
            theirs.done,
            theirs.n_out,
        )
        assert (ours.outcome, ours.shards, ours.shards_ok) == (theirs.outcome, theirs.shards, theirs.shards_ok)


def test_a_request_that_is_wrong_is_refused_with_its_fields(child):
    send_request(child, {"filters": [{"field": "nothing", "eq": 1}]})
    header, payload = child.receive()
    assert (header.kind, type(payload)) == (Kind.FAILED, InvalidRequest)
    (error,) = payload.errors
    assert (error.field, error.value) == ("filters.0.field", "nothing")
    assert error.allowed.startswith("no such table; allowed: ")


def test_a_request_runs_at_the_quality_that_it_is_given(child):
    send_request(child, {"user": {"id": "ann"}}, quality=0.5)
    told = child.receive()[1]
    report = told.reports[Stage.RERANKING]
    assert report.done == report.wanted / 4
    assert told.degradations[-1].reason == "narrowed_by_load"
    assert 0 < told.extra_s < np.inf


def test_what_a_child_has_no_time_for_is_carried(generation):
    child = Child(generation, paced_row_s=0.01).start()  # 32 rows, of which 8 are the least that is tried
    send_request(child, {"user": {"id": "ann"}, "k": 32}, timeout_s=0.25)
    told = child.receive()[1]
    assert 0 < told.reports[Stage.RERANKING].done < world.RERANK
    assert told.logged["n"] == world.RERANK
    assert told.extra_s == np.inf
    child.end()


def test_a_request_that_is_told_to_stop_answers_with_what_there_is(generation):
    child = Child(generation).start()
    child.worker.scorer.paced_row_s = 0.05  # the machine became slow after the warm-up: 1.6 s for 32 rows
    child.worker.scorer.row_s = 0.05
    begun, score = threading.Event(), child.worker.scorer.model.score
    child.worker.scorer.model.score = lambda *given: (score(*given), begun.set())[0]  # the first slice waits its time
    send_request(child, {"user": {"id": "ann"}, "k": 32}, timeout_s=10.0)
    assert begun.wait(60)
    child.tell(Kind.STOP)
    header, told = child.receive()
    assert header.kind is Kind.RANKED
    assert 0 < told.reports[Stage.RERANKING].done < world.RERANK
    assert [(d.stage, d.reason) for d in told.degradations] == [(Stage.RERANKING, "partial")]
    child.end()


async def test_what_a_row_costs_is_learnt_from_runs_that_were_cut_short(generation, funnel):
    query = offline_query({"user": {"id": "cho"}}, generation)
    scorer = scoring.InProcess(funnel.reranking.scorer.model, paced_row_s=0.005)
    scorer.cost, scorer.row_s = Cost(1e-4, 1e-5), 0.005
    shard = Shard(query.person, funnel.retrieval.search(query, 20), {}, until=time.monotonic() + 0.03)
    answer = scorer.submit(shard, lambda *_: None)
    assert isinstance(answer.exception(), StageFailed)
    assert scorer.cost.log_scale > 0


# ------------------------------------------------------------------------------------------ stop, ping


def test_a_ping_is_answered_while_a_shard_is_being_scored(generation, funnel):
    child = Child(generation, paced_row_s=60.0).start()
    send_shard(child, generation, funnel)  # 20 rows: twenty minutes
    child.tell(Kind.PING)
    assert child.receive()[0].kind is Kind.PONG
    child.end()


def test_a_run_that_is_stopped_ends_at_once(generation, funnel, monkeypatch):
    begun = threading.Event()
    monkeypatch.setattr(scoring, "slice_rows", lambda _, n_left, __: (begun.set(), min(8, n_left))[1])
    child = Child(generation, paced_row_s=60.0).start()
    begun.clear()  # after what it was warmed by
    send_shard(child, generation, funnel)
    assert begun.wait(60)
    child.tell(Kind.STOP, JOB - 1)  # another run: nothing happens
    child.tell(Kind.STOP)
    answers = [child.receive()]
    while answers[-1][0].kind is Kind.SCORES:  # the slice that was under way may still come
        answers.append(child.receive())
    assert len(answers) <= 2
    assert (answers[-1][0].kind, type(answers[-1][1])) == (Kind.FAILED, StageFailed)
    child.end()


# ------------------------------------------------------------------------------------------ life, faults


def test_a_child_refuses_another_bundle_than_its_parents(generation):
    pair = socket.socketpair()
    with pytest.raises(BundleError, match=r"manifest\.json: its SHA-256"):
        worker.Worker(pair, generation.path, "0" * 64, worker.Given())
    for one in pair:
        one.close()


def test_a_child_ends_when_its_parent_closes_the_socket(generation):
    Child(generation).start().end()


def test_a_child_ends_without_a_trace_when_its_parent_is_gone(generation):
    child = Child(generation)
    child.connection.close()
    child.thread.start()  # READY finds nobody
    child.end()


def test_a_child_that_can_not_start_says_why(generation):
    ours, theirs = socket.socketpair()
    _, control = pair = socket.socketpair()
    with pytest.raises(BundleError):
        worker.prepare((theirs, control), generation.path, "0" * 64, worker.Given())
    header, why = receive(ours)
    assert header.kind is Kind.FAILED
    assert str(why).startswith("manifest.json: its SHA-256")
    for one in (ours, *pair):
        one.close()


@pytest.mark.parametrize("kind", [Kind.SHARD, Kind.RANK])
def test_a_defect_in_a_child_is_told_apart_from_a_fault_and_does_not_end_it(
    child, generation, funnel, monkeypatch, kind
):
    def score(*_: object) -> None:
        raise TypeError("planted")

    def send() -> None:
        send_shard(child, generation, funnel) if kind is Kind.SHARD else send_request(child, {"user": {"id": "cho"}})

    with monkeypatch.context() as planted:
        planted.setattr(scoring.ShardModel, "score", score)
        send()
        header, payload = child.receive()
    assert (header.kind, type(payload)) == (Kind.FAILED, ContractError)
    assert "TypeError: planted" in str(payload)
    send()
    assert child.receive()[0].kind in (Kind.SCORES, Kind.RANKED)


def test_a_fault_of_a_stage_in_a_child_costs_quality_not_the_answer(child, monkeypatch):
    def score(*_: object) -> None:
        raise StageFailed("planted")

    monkeypatch.setattr(scoring.ShardModel, "score", score)
    send_request(child, {"user": {"id": "cho"}})
    told = child.receive()[1]
    assert [(d.stage, d.reason) for d in told.degradations] == [(Stage.RERANKING, "failed")]
    assert told.logged["n"] == world.K
