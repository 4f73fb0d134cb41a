"""The worker's loop, run in a thread of this process with a socket at its other end."""

import socket
import threading

import numpy as np
import pytest

from app.bundle import load_re_ranker
from app.errors import BundleError
from app.warmup import offline_query
from app.workers import worker
from app.workers.messages import HEADER, Kind, frame, generation_number, read_header, read_slice, write_shard
from app.workers.scoring import Shard
from tests import world

LONG_S = 600.0


@pytest.fixture
def child(generation):
    """One end of a socket; a worker's loop is at the other."""
    ours, theirs = socket.socketpair()
    thread = start(theirs, generation)
    ours.settimeout(60)
    assert receive(ours)[0].kind is Kind.READY
    yield ours
    ours.close()
    thread.join()
    theirs.close()


def start(connection: socket.socket, generation, paced_row_s: float = 0.0) -> threading.Thread:
    """A worker's main loop on this socket."""
    child = worker.Worker(connection, generation.path, generation.digest, paced_row_s)
    child.warm_up()
    thread = threading.Thread(target=child.serve)
    thread.start()
    return thread


def receive(connection: socket.socket):
    header = read_header(connection.recv(HEADER.size))
    return header, connection.recv(header.length)  # whole: it was sent at once


def send_shard(connection, generation, funnel, *, remaining_s=LONG_S, own=None) -> Shard:
    query = offline_query({"user": {"id": "cho"}}, generation)
    shard = Shard(query.person, funnel.retrieval.search(query, 20), {}, until=0.0)
    payload = write_shard(shard, remaining_s, n_history=50)
    number = generation_number(generation.digest) if own is None else own
    connection.sendall(frame(Kind.SHARD, number, 5, payload))
    return shard


def test_a_child_answers_with_the_jobs_scores(child, generation, funnel):
    shard, scores = send_shard(child, generation, funnel), []
    while len(scores) < len(shard.candidates):  # in one slice, or more where the warm-up was slow
        header, payload = receive(child)
        assert (header.kind, header.job) == (Kind.SCORES, 5)
        scores += read_slice(payload).scores.tolist()
    expected = world.rerank_scores((20,), age=40, occupation=1)[shard.candidates.rows]
    np.testing.assert_allclose(scores, expected, rtol=1e-5)


def test_a_child_does_not_start_an_expired_shard(child, generation, funnel):
    send_shard(child, generation, funnel, remaining_s=-0.001)
    header, payload = receive(child)
    assert (header.kind, payload) == (Kind.FAILED, b"expired before it was done")


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
    thread = start(theirs, generation)
    receive(ours)
    ours.close()
    thread.join(60)
    assert not thread.is_alive()
    theirs.close()


def test_a_child_ends_without_a_trace_when_its_parent_is_gone(generation):
    ours, theirs = socket.socketpair()
    ours.close()
    start(theirs, generation).join(60)  # READY finds nobody
    theirs.close()


def test_a_child_that_can_not_start_says_why(generation):
    ours, theirs = socket.socketpair()
    with pytest.raises(BundleError):
        worker.prepare(theirs, generation.path, "0" * 64, 0.0)
    header, payload = receive(ours)
    assert header.kind is Kind.FAILED
    assert payload.startswith(b"manifest.json: its SHA-256")
    ours.close()


@pytest.mark.parametrize(
    ("row_s", "n_left", "n"),
    [(5e-6, 500, 250), (2e-5, 300, 150), (2e-5, 301, 101), (1e-4, 300, 30), (1e-3, 300, 8), (0.0, 256, 256)],
)
def test_slices_are_equal_and_take_three_milliseconds_at_most_within_8_and_256_rows(row_s, n_left, n):
    assert worker.slice_rows(row_s, n_left) == n


def test_a_shard_comes_in_slices_best_first_and_the_last_says_so(child, generation, funnel, monkeypatch):
    monkeypatch.setattr(worker, "slice_rows", lambda _, n_left: min(8, n_left))
    shard = send_shard(child, generation, funnel)
    slices = [read_slice(receive(child)[1]) for _ in range(3)]
    assert [(s.start, len(s.scores), s.is_last) for s in slices] == [(0, 8, False), (8, 8, False), (16, 4, True)]
    expected = world.rerank_scores((20,), age=40, occupation=1)[shard.candidates.rows]
    np.testing.assert_allclose(np.concatenate([s.scores for s in slices]), expected, rtol=1e-5)


def test_a_ping_is_answered_while_a_shard_is_being_scored(generation, funnel):
    ours, theirs = socket.socketpair()
    thread = start(theirs, generation, paced_row_s=60.0)
    receive(ours)
    send_shard(ours, generation, funnel)  # 20 rows: twenty minutes
    ours.sendall(frame(Kind.PING, generation_number(generation.digest), 0))
    assert receive(ours)[0].kind is Kind.PONG
    ours.close()
    thread.join(60)
    assert not thread.is_alive()
    theirs.close()


def test_a_run_that_is_stopped_ends_at_once(generation, funnel, monkeypatch):
    monkeypatch.setattr(worker, "slice_rows", lambda _, n_left: min(8, n_left))
    ours, theirs = socket.socketpair()
    thread = start(theirs, generation, paced_row_s=60.0)
    receive(ours)
    send_shard(ours, generation, funnel)
    ours.sendall(frame(Kind.STOP, generation_number(generation.digest), 4))  # another run: nothing happens
    ours.sendall(frame(Kind.STOP, generation_number(generation.digest), 5))
    answers = [receive(ours)]
    while answers[-1][0].kind is Kind.SCORES:  # the slice that was under way may still come
        answers.append(receive(ours))
    assert len(answers) <= 2
    assert (answers[-1][0].kind, answers[-1][1]) == (Kind.FAILED, b"stopped")
    ours.close()
    thread.join(60)
    theirs.close()


def test_a_defect_in_a_child_is_told_apart_from_a_fault_and_does_not_end_it(child, generation, funnel, monkeypatch):
    def score(*_: object) -> None:
        raise TypeError("planted")

    with monkeypatch.context() as planted:
        planted.setattr(worker.ShardModel, "score", score)
        send_shard(child, generation, funnel)
        header, payload = receive(child)
    assert header.kind is Kind.BROKEN
    assert b"TypeError: planted" in payload
    send_shard(child, generation, funnel)
    assert receive(child)[0].kind is Kind.SCORES
