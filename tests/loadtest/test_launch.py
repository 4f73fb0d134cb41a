"""A service and the server that does nothing as processes; what is asked of the admin port."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from subprocess import Popen

import numpy as np
import pytest

from loadtest import launch
from loadtest.arrivals import constant
from loadtest.open_loop import Attack, attack


def test_a_service_is_started_asked_loaded_and_stopped(bundle):
    with launch.service(bundle, 1, SLA_MS="1000") as server:
        assert server.rank(b'{"user": {"id": "cho"}, "timeout_ms": 10000}')["coverage"]["reranked"] > 0
        assert server.metric("winnow_requests_total", outcome="ok") == 1
        assert server.serving()["name"] == "tiny"
        seen = attack(Attack(server.port, [b'{"user": {"id": "cho"}}', b'{"user": {"id": "eve"}}'], constant(40, 0.5)))
        process = server.process
    assert seen.is_ok.sum() == 20
    assert len(set(seen.generation)) == 1
    assert process.returncode == 0


def test_a_service_that_does_not_start_says_what_its_log_said(tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)ended with 2; .*manifest\.json: missing"), launch.service(tmp_path, 1):
        pass


def test_the_control_answers_as_many_bytes_as_it_is_told():
    with launch.noop(777) as server:
        status, body = server.call("POST", "/v1/rank", b'{"k": 3}')
    assert (status, len(body)) == (200, 777)
    assert json.loads(body)["items"] == []


@contextmanager
def admin(*answers: tuple[int, object]) -> Iterator[launch.Server]:
    """An admin port that gives these answers in turn, then the last again and again."""
    left = list(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, said = left.pop(0) if len(left) > 1 else left[0]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(said).encode())

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.do_GET()

        def log_message(self, *_: object) -> None:
            """Tests are quiet."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield launch.Server(Popen(["true"]), 0, server.server_address[1])
        finally:
            server.shutdown()
            thread.join()


LOADING = (200, {"loading": {"path": "/b", "state": "loading", "error": None}})


@pytest.mark.parametrize(
    ("ends", "why"),
    [
        (
            (200, {"loading": {"path": "/b", "state": "failed", "error": "popular.npy: missing"}}),
            "popular.npy: missing",
        ),
        ((200, {"loading": {"path": "/b", "state": "ready", "error": None}}), ""),
        ((200, {"loading": None}), ""),
    ],
    ids=["failed", "ready", "done"],
)
def test_an_offer_waits_for_the_end_of_loading(ends, why):
    with admin((202, {}), LOADING, ends) as server:
        assert server.offer(Path("/b")) == why
        server.process.wait()


def test_an_offer_that_is_turned_down_at_once_says_so():
    with admin((404, {"detail": "/b: no such bundle"})) as server:
        assert server.offer(Path("/b")).startswith('status 404: {"detail": "/b: no such')
        server.process.wait()


def test_workers_are_those_of_the_serving_generation_that_are_alive():
    generations = [{"role": "previous", "workers": {"0": 1}}, {"role": "serving", "workers": {"0": 7, "1": None}}]
    with admin((200, {"generations": generations, "loading": None})) as server:
        assert server.workers() == {"0": 7}
        server.process.wait()


def test_waiting_ends_when_it_is_so_and_fails_when_it_takes_too_long():
    answers = iter([False, True])
    assert launch.wait_for(lambda: next(answers), 5, "an answer", every_s=0) < 5
    with pytest.raises(RuntimeError, match="waited 0 s for nothing"):
        launch.wait_for(lambda: False, 0, "nothing", every_s=0)
    assert np.isfinite(launch.wait_for(lambda: True, 0, "something"))
