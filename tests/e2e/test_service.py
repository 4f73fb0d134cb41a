"""The real process on real ports: starts, ranks, survives bad input, stops cleanly, refuses a bad bundle."""

import http.client
import json
import os
import select
import shutil
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial

import pytest

from app.main import _listener
from app.settings import Settings, SettingsError
from tests import world
from tests.asgi import JSON
from tests.running import AUTHORIZED, PATIENCE_S, running
from tests.seal import reseal

NEXT_TO_20 = [world.item_id(r) for r in (21, 22, 23, 24, 25)]
PATIENT = {"timeout_ms": 10_000}


def ranks_well(service) -> bool:
    reply = service.rank({"user": {"id": "cho"}} | PATIENT)
    return reply.status == 200 and [i["id"] for i in reply.json()["items"]] == NEXT_TO_20


def test_it_ranks(service):
    reply = service.rank({"user": {"id": "cho"}, "request_id": "e2e"} | PATIENT)
    assert reply.status == 200
    answer = reply.json()
    assert [i["id"] for i in answer["items"]] == NEXT_TO_20
    assert answer["degraded"] == []
    assert answer["request_id"] == reply.headers["x-request-id"] == "e2e"


def test_health_is_on_the_ranking_port_and_metrics_on_the_admin_port(service):
    assert service.call("GET", "/livez").status == 200
    assert service.call("GET", "/readyz").status == 200
    assert service.call("GET", "/metrics").status == 404
    before = service.counted("ok")
    assert ranks_well(service)
    assert service.counted("ok") == before + 1


def test_keys_are_asked(service):
    assert service.call("POST", "/v1/rank", b"{}").status == 401


def test_a_20_mb_body_is_413_and_the_service_is_unharmed(service):
    reply = service.call("POST", "/v1/rank", b" " * 20_000_000, JSON | AUTHORIZED)
    assert reply.status == 413
    assert ranks_well(service)


def test_a_body_in_two_parts_and_a_request_behind_it_are_both_answered(service):
    body = json.dumps({"user": {"id": "cho"}} | PATIENT).encode()
    head = f"POST /v1/rank HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    head += f"Authorization: {AUTHORIZED['authorization']}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", service.port), timeout=PATIENCE_S) as connection:
        connection.sendall(head.encode() + body[:5])
        assert ranks_well(service)  # by now the first part was read
        connection.sendall(body[5:] + head.encode() + body)
        answers = b""
        while answers.count(b'"took_ms"') < 2:
            answers += (part := connection.recv(65536))
            assert part, answers
    assert answers.count(b"HTTP/1.1 200") == 2


def test_a_request_that_is_not_read_while_one_before_it_runs_is_not_slow(bundle):
    body = json.dumps({"user": {"id": "cho"}} | PATIENT).encode()
    head = f"POST /v1/rank HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with running(bundle, WINNOW_PACED_ROW_MS="30", WINNOW_RECEIVE_S="0.2") as process:
        process.wait_until_ready()
        metrics = partial(process.call, "GET", "/metrics", port=process.admin_port)
        with socket.create_connection(("127.0.0.1", process.port), timeout=PATIENCE_S) as connection:
            connection.sendall(head.encode() + body)
            while b"winnow_inflight 1.0" not in metrics().body:  # for 32 rows of 30 ms
                pass
            connection.sendall(head.encode())
            assert b"winnow_inflight 1.0" in metrics().body  # by now the head was read
            connection.sendall(body)
            answers = b""
            while answers.count(b'"took_ms"') < 2:
                answers += (part := connection.recv(65536))
                assert part, answers


def test_who_finds_no_room_is_refused_unread_and_its_connection_goes_on(bundle):
    headers = {"content-type": "application/json"} | AUTHORIZED
    with running(bundle, WINNOW_MAX_INFLIGHT="1", WINNOW_WORKERS="1", WINNOW_PACED_ROW_MS="30") as process:
        process.wait_until_ready()
        statuses = []
        with closing(http.client.HTTPConnection("127.0.0.1", process.port, timeout=PATIENCE_S)) as connection:

            def ask() -> None:
                connection.request("POST", "/v1/rank", b"not JSON", headers)
                reply = connection.getresponse()
                reply.read()
                statuses.append((reply.status, reply.getheader("retry-after") is not None))

            with ThreadPoolExecutor(1) as thread:
                inside = thread.submit(ranks_well, process)  # for 32 rows of 30 ms
                metrics = partial(process.call, "GET", "/metrics", port=process.admin_port)
                while not inside.done() and b"winnow_inflight 1.0" not in metrics().body:
                    pass
                while not inside.done():
                    ask()
                assert inside.result()
            ask()
    assert statuses[-1] == (400, False)
    assert (503, True) in statuses  # who is read gets a 400


def test_a_body_without_an_announced_length_is_cut_off_too(service):
    with socket.create_connection(("127.0.0.1", service.port), timeout=PATIENCE_S) as connection:
        head = "POST /v1/rank HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        head += f"Authorization: {AUTHORIZED['authorization']}\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head.encode())
        for _ in range(20):
            connection.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 413")
    assert ranks_well(service)


@pytest.mark.parametrize(
    "sent",
    [b"\x00\xff\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"POST /v1/rank HTTP/1.1\r\nContent-Length: -5\r\n\r\n", b""],
    ids=["noise", "version", "negative length", "nothing"],
)
def test_what_is_not_http_does_no_harm(service, sent):
    with socket.create_connection(("127.0.0.1", service.port), timeout=PATIENCE_S) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(65536):
            pass
    assert ranks_well(service)


def test_a_client_that_leaves_in_the_middle_does_no_harm(service):
    head = "POST /v1/rank HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n"
    head += f"Authorization: {AUTHORIZED['authorization']}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", service.port), timeout=PATIENCE_S) as connection:
        connection.sendall(head.encode() + b'{"k":')
    assert ranks_well(service)


def test_it_answers_503_while_starting_then_becomes_ready_and_stops_cleanly(bundle):
    with running(bundle) as process:
        process.wait_until_listening()
        ready = process.call("GET", "/readyz")
        early = process.call("POST", "/v1/rank", b"{}")
        assert (ready.status, early.status) == (503, 503)
        assert early.headers["retry-after"].isdecimal()
        assert process.call("GET", "/livez").status == 200
        process.wait_until_ready()
        assert process.call("GET", "/readyz").status == 200
        assert ranks_well(process)
        workers = process.workers()
        assert workers
        process.process.send_signal(signal.SIGTERM)
        assert process.process.wait(PATIENCE_S) == 0
        for pid in workers:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)


def test_a_stop_while_starting_is_a_clean_stop(bundle):
    with running(bundle) as process:
        process.wait_for_line("loading")
        process.process.send_signal(signal.SIGTERM)
        assert process.process.wait(PATIENCE_S) == 0


def test_workers_end_when_the_service_is_killed(bundle):
    with running(bundle, WINNOW_SPARES="0") as process:
        process.wait_until_ready()
        (worker,) = process.workers()
        handle = os.pidfd_open(worker)
        process.process.kill()
        process.process.wait()
        ended, _, _ = select.select([handle], [], [], PATIENCE_S)
        os.close(handle)
        assert ended


def test_a_killed_worker_fails_no_request(bundle):
    with running(bundle, WINNOW_WORKERS="2") as process:
        process.wait_until_ready()
        os.kill(process.workers()[0], signal.SIGKILL)
        for _ in range(20):
            reply = process.rank({"user": {"id": "cho"}})
            assert reply.status == 200
            assert len(reply.json()["items"]) == world.K
        process.wait_for_line("worker ")
        assert process.call("GET", "/readyz").status == 200


def test_without_keys_it_says_that_it_listens_on_loopback_only(bundle):
    with running(bundle) as process:
        assert process.wait_for_line("no WINNOW_API_KEYS_FILE")["level"] == "warning"


@pytest.mark.parametrize("spoil", ["missing", "golden"])
def test_a_bundle_that_must_not_be_served_ends_the_process_with_2(bundle, tmp_path, spoil):
    copy = shutil.copytree(bundle, tmp_path / "copy")
    if spoil == "missing":
        (copy / "popular.npy").unlink()
    else:
        reseal(copy, lambda m: m["golden"][0].update(scores=[9.0] * world.K))
    with running(copy) as process:
        assert process.process.wait(PATIENCE_S) == 2
        said = process.wait_for_line("popular.npy: " if spoil == "missing" else "manifest.json: golden")
        assert said["level"] == "error"


@pytest.mark.parametrize("name", ["WINNOW_PORT", "WINNOW_ADMIN_PORT"])
def test_a_port_in_use_ends_the_process_with_2_and_one_sentence(bundle, capfd, name):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with running(bundle, **{name: port}) as process:
            assert process.process.wait(PATIENCE_S) == 2
    (said,) = capfd.readouterr().err.splitlines()
    assert said.startswith(f"refused: {name.replace('PORT', 'HOST')}=127.0.0.1, {name}={port}: address already in use;")


def test_a_host_that_is_none_is_named(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text(f"{'0' * 64} rank\n")
    with pytest.raises(
        SettingsError, match=r"^WINNOW_HOST=no\.host\.invalid, .*: .* an address of this machine and a free port$"
    ):
        _listener(Settings(host="no.host.invalid", api_keys_file=keys), "")


def test_settings_that_can_not_be_used_end_the_process_with_2(bundle):
    with running(bundle, WINNOW_WORKERS="none") as process:
        assert process.process.wait(PATIENCE_S) == 2
