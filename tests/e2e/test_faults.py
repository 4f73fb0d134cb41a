"""Each fault once, on the real process with real sockets: quality may go, answers may not."""

import json
import os
import shutil
import signal
import socket
import threading
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests import world
from tests.running import PATIENCE_S, running
from tests.seal import reseal

CHO = {"user": {"id": "cho"}}
PAUSE = threading.Event()  # never set: waits where there is no event to wait for


class Callers:
    """Threads that ask one request after the other; what came of them is counted."""

    def __init__(self, process, n: int, request=None) -> None:
        self.process, self.request = process, request or CHO
        self.statuses: Counter[int] = Counter()
        self.degraded: Counter[str] = Counter()
        self.generations: set[str] = set()
        self.is_over, self.is_stopping = threading.Event(), False
        self.threads = [threading.Thread(target=self.run) for _ in range(n)]

    def run(self) -> None:
        while not self.is_over.is_set():
            try:
                reply = self.process.rank(self.request)
            except ConnectionError:
                assert self.is_stopping, "only a service that was told to stop may turn a connection away"
                return
            self.statuses[reply.status] += 1
            if reply.status == 200:
                answer = reply.json()
                assert len(answer["items"]) == world.K
                self.degraded.update(f"{d['stage']}: {d['reason']}" for d in answer["degraded"])
                self.generations.add(answer["generation"].partition("#")[0])

    def wait_for(self, n_more: int) -> None:
        """Until so many more were answered."""
        enough = self.statuses.total() + n_more
        while self.statuses.total() < enough:
            assert any(t.is_alive() for t in self.threads)
            PAUSE.wait(0.005)


@contextmanager
def callers(process, n: int = 2, request=None):
    asking = Callers(process, n, request)
    for thread in asking.threads:
        thread.start()
    try:
        yield asking
    finally:
        asking.is_over.set()
        for thread in asking.threads:
            thread.join(PATIENCE_S)


@pytest.fixture(scope="module")
def service(bundle):
    with running(bundle, WINNOW_WORKERS="2", WINNOW_SLA_MS="2000", WINNOW_RECEIVE_S="0.5") as process:
        process.wait_until_ready()
        yield process


def generations(process) -> dict:
    return process.call("GET", "/admin/generations", port=process.admin_port).json()


def workers(process) -> dict[str, int]:
    return next(g["workers"] for g in generations(process)["generations"] if g["role"] == "serving")


def wait_for_replaced(process, pids) -> None:
    """Until the pool is whole again, without these."""
    while len(alive := workers(process)) < 3 or set(alive.values()) & set(pids):
        PAUSE.wait(0.02)


def offer(process, path):
    body = json.dumps({"path": str(path)}).encode()
    return process.call("POST", "/admin/generations", body, port=process.admin_port)


def wait_for_loaded(process) -> dict:
    while (loading := generations(process)["loading"])["state"] == "loading":
        PAUSE.wait(0.02)
    return loading


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_dies_or_hangs_fails_nobody_and_is_replaced(service, fault):
    first = workers(service)
    with callers(service) as asking:
        asking.wait_for(10)
        os.kill(first["0"], fault)
        wait_for_replaced(service, [first["0"]])
        asking.wait_for(10)
    assert set(asking.statuses) == {200}


def test_when_all_workers_die_at_once_everybody_is_answered_until_they_are_back(service):
    first = workers(service).values()
    with callers(service) as asking:
        asking.wait_for(10)
        for pid in first:
            os.kill(pid, signal.SIGKILL)
        wait_for_replaced(service, first)
        asking.wait_for(10)
    assert set(asking.statuses) == {200}
    assert {d.partition(":")[0] for d in asking.degraded} <= {"reranking"}


def test_switches_under_load_fail_nobody(service, bundle, tmp_path):
    other = shutil.copytree(bundle, tmp_path / "other")
    reseal(other, lambda m: m.update(version="2"))
    with callers(service) as asking:
        for path in (other, bundle):
            assert offer(service, path).status == 202
            assert wait_for_loaded(service)["state"] == "ready"
            asking.wait_for(5)
    assert set(asking.statuses) == {200}
    assert asking.generations == {"tiny@1", "tiny@2"}


def test_a_corrupt_bundle_is_refused_by_name_under_load(service, copy):
    (copy / "index.faiss").write_bytes((copy / "index.faiss").read_bytes()[:-1] + b"x")
    with callers(service) as asking:
        assert offer(service, copy).status == 202
        assert wait_for_loaded(service)["error"].startswith("index.faiss: ")
        asking.wait_for(5)
    assert set(asking.statuses) == {200}


def test_connections_that_send_nothing_or_slowly_are_cut_off_and_harm_nobody(service):
    address = ("127.0.0.1", service.port)
    silent = [socket.create_connection(address, timeout=PATIENCE_S) for _ in range(200)]
    slow = socket.create_connection(address, timeout=PATIENCE_S)
    slow.sendall(b"POST /v1/rank HTTP/1.1\r\nHost: x\r\nContent-")
    with callers(service) as asking:
        asking.wait_for(20)
    for connection in (*silent, slow):
        with suppress(ConnectionResetError):
            assert connection.recv(1) == b""  # the end, and no answer
        connection.close()
    assert set(asking.statuses) == {200}


def test_clients_that_do_not_read_or_leave_harm_nobody(service):
    body = json.dumps(CHO | {"k": 50}).encode()
    head = b"POST /v1/rank HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
    request = head + str(len(body)).encode() + b"\r\n\r\n" + body
    unread = [socket.create_connection(("127.0.0.1", service.port), timeout=PATIENCE_S) for _ in range(20)]
    for number, connection in enumerate(unread):
        connection.sendall(request * 3)
        if number % 2:
            connection.close()
    with callers(service) as asking:
        asking.wait_for(20)
    for connection in unread:
        connection.close()
    assert set(asking.statuses) == {200}


def test_a_stop_under_load_fails_nobody_who_was_accepted(bundle):
    with running(bundle, WINNOW_WORKERS="2", WINNOW_SLA_MS="2000", WINNOW_PACED_ROW_MS="1") as process:
        process.wait_until_ready()
        with callers(process, 4) as asking:
            asking.wait_for(8)
            asking.is_stopping = True  # what waits to be accepted when the port closes was not accepted
            at_work = workers(process).values()
            (forks,) = {int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in at_work}
            for pid in (forks, *at_work, process.process.pid):  # as systemd does
                os.kill(pid, signal.SIGTERM)
            assert process.process.wait(PATIENCE_S) == 0
    assert set(asking.statuses) <= {200, 503}
    assert not asking.degraded
    ends = [line for line in iter(process.lines.get, None) if " of a worker ended with code " in line]
    assert [line.count(" ended with code 0") for line in ends] == [1, 1, 1]


def test_overload_narrows_the_funnel_then_refuses_and_recovers(bundle):
    """32 rows at 10 ms on one worker: 3 a second at full width; 16 callers want more."""
    paced = {"WINNOW_PACED_ROW_MS": "10", "WINNOW_SLA_MS": "1000", "WINNOW_MAX_INFLIGHT": "10"}
    with running(bundle, **paced) as process:
        process.wait_until_ready()
        with callers(process, 16) as asking:
            while not (asking.degraded["reranking: narrowed_by_load"] and asking.statuses[503]):
                asking.wait_for(10)
        assert set(asking.statuses) == {200, 503}
        while process.rank(CHO).json()["degraded"]:  # two seconds, by time alone
            PAUSE.wait(0.05)


def test_a_full_disk_for_the_log_fails_nobody(bundle):
    with Path("/dev/full").open("wb") as full, running(bundle, stdout=full) as process:
        process.wait_until_listening()
        while process.call("GET", "/readyz").status != 200:
            PAUSE.wait(0.02)
        with callers(process) as asking:
            asking.wait_for(20)
        assert set(asking.statuses) == {200}
        process.process.send_signal(signal.SIGTERM)
        assert process.process.wait(PATIENCE_S) == 0
