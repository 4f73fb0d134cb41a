"""The worker's loop, run in a thread of this process with a socket at its other end."""

import socket
import threading

import numpy as np
import pytest

from app.bundle import load_re_ranker
from app.errors import BundleError
from app.warmup import offline_query
from app.workers import worker
from app.workers.messages import HEADER, Kind, ShardRecord, frame, generation_number, read_header, read_scores
from app.workers.scoring import Shard
from tests import world

LONG_S = 600.0


@pytest.fixture
def child(generation):
    """One end of a socket; a worker's loop is at the other."""
    ours, theirs = socket.socketpair()
    parts = load_re_ranker(generation.path, generation.digest)
    thread = threading.Thread(target=worker.serve, args=(theirs, parts))
    thread.start()
    ours.settimeout(60)
    assert receive(ours)[0].kind is Kind.READY
    yield ours
    ours.close()
    thread.join()
    theirs.close()


def receive(connection: socket.socket):
    header = read_header(worker.read_exactly(connection, HEADER.size))
    return header, worker.read_exactly(connection, header.length)


def send_shard(connection, generation, funnel, *, remaining_s=LONG_S, own=None) -> Shard:
    query = offline_query({"user": {"id": "cho"}}, generation)
    shard = Shard(query.person, funnel.retrieval.search(query, 20), {}, until=0.0)
    payload = ShardRecord(generation.manifest.features).write(shard, remaining_s)
    number = generation_number(generation.digest) if own is None else own
    connection.sendall(frame(Kind.SHARD, number, 5, payload))
    return shard


def test_a_child_answers_with_the_jobs_scores(child, generation, funnel):
    shard = send_shard(child, generation, funnel)
    header, payload = receive(child)
    assert (header.kind, header.job) == (Kind.SCORES, 5)
    expected = world.rerank_scores((20,), age=40, occupation=1)[shard.candidates.rows]
    np.testing.assert_allclose(read_scores(payload)[1], expected, rtol=1e-5)


def test_a_child_does_not_start_an_expired_shard(child, generation, funnel):
    send_shard(child, generation, funnel, remaining_s=-0.001)
    header, payload = receive(child)
    assert (header.kind, payload) == (Kind.FAILED, b"expired before it was started")


def test_a_child_refuses_a_shard_of_another_generation(child, generation, funnel):
    send_shard(child, generation, funnel, own=1)
    header, payload = receive(child)
    assert header.kind is Kind.FAILED
    assert b"another generation" in payload


def test_a_child_refuses_another_bundle_than_its_parents(generation):
    with pytest.raises(BundleError, match=r"manifest\.json: its SHA-256"):
        load_re_ranker(generation.path, "0" * 64)


def test_a_child_ends_when_its_parent_closes_the_socket(generation):
    ours, theirs = socket.socketpair()
    parts = load_re_ranker(generation.path, generation.digest)
    thread = threading.Thread(target=worker.serve, args=(theirs, parts))
    thread.start()
    receive(ours)
    ours.close()
    thread.join(60)
    assert not thread.is_alive()
    theirs.close()


def test_a_child_ends_without_a_trace_when_its_parent_is_gone(bundle, generation):
    ours, theirs = socket.socketpair()
    ours.close()
    worker.main(str(theirs.detach()), str(bundle), generation.digest)  # READY finds nobody


def test_a_defect_in_a_child_is_told_apart_from_a_fault_and_does_not_end_it(child, generation, funnel, monkeypatch):
    def score(*_: object) -> None:
        raise TypeError("planted")

    with monkeypatch.context() as planted:
        planted.setattr(worker, "score", score)
        send_shard(child, generation, funnel)
        header, payload = receive(child)
    assert header.kind is Kind.BROKEN
    assert b"TypeError: planted" in payload
    send_shard(child, generation, funnel)
    assert receive(child)[0].kind is Kind.SCORES
