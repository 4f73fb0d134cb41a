"""The commands from end to end: a stall that a closed loop doesn't see, a real service, what can't be used."""

import asyncio
import contextlib
import json
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from loadtest import __main__
from loadtest.lab import run as runs
from loadtest.lab import search
from tests.loadtest.lab.made import made, observed
from tests.loadtest.servers import ok, serving
from tests.running import free_port

ROOT = Path(__file__).parents[3]
STALL_S = 1.0
AT = 150  # the request at which it begins, of 100 a second
PERIOD_S = 0.01


class Stalling:
    """Answers at once, but for one second from its AT-th request on, in which nobody is answered."""

    def __init__(self) -> None:
        self.count = 0
        self.begun, self.flows = asyncio.Event(), asyncio.Event()
        self.flows.set()

    async def counted(self) -> bytes:
        self.count += 1
        if self.count == 2:  # the first only asks whether somebody is there
            self.begun.set()
        if self.count == AT:
            self.flows.clear()
            asyncio.get_running_loop().call_later(STALL_S, self.flows.set)
        return await self.other()

    async def other(self) -> bytes:
        await self.flows.wait()
        return ok()


async def closed_loop(port: int, seconds: float) -> np.ndarray:
    """Latencies of a client that keeps to 100 a second as long as it is answered, and counts from when it sent."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    latencies, began = [], time.monotonic()
    while time.monotonic() - began < seconds:
        sent = time.monotonic()
        writer.write(b"POST / HTTP/1.1\r\ncontent-length: 2\r\n\r\n{}")
        await reader.readuntil(b"\r\n\r\n{}")
        latencies.append(time.monotonic() - sent)
        await asyncio.sleep(max(0.0, sent + PERIOD_S - time.monotonic()))
    writer.close()
    return np.array(latencies)


@pytest.fixture
def bodies(tmp_path) -> str:
    file = tmp_path / "bodies.jsonl"
    file.write_text('{"k": 3}\n{"k": 4}\n')
    return str(file)


async def test_a_stall_of_a_second_is_seen_by_attack_and_not_by_a_closed_loop(tmp_path, bodies, capsys):
    """100 a second for 4 s: those due in the stall, a quarter of all, wait evenly between 1 s and 0; longer than
    w wait (1 - w) / 4 of all, which is a tenth for w = 0.6 s. Of the closed loop's requests one met it."""
    stalling, arguments = Stalling(), ["--arrivals", "constant", "--rate", "100", "--seconds", "4"]
    async with serving(stalling.counted) as port, serving(stalling.other) as other_port:
        target = ["--url", f"http://127.0.0.1:{port}", "--bodies", bodies, "--out", str(tmp_path / "out")]
        attack = asyncio.create_task(asyncio.to_thread(__main__.main, ["attack", *target, *arguments]))
        await stalling.begun.wait()
        closed_s = await closed_loop(other_port, 4.0)
        code = await attack
    run = runs.read(tmp_path / "out" / "run.json")
    assert run.figures.answered == 400
    # A busy machine adds to the stall and takes nothing from it.
    assert run.figures.p90_ms >= 590 and run.figures.p50_ms < 590
    assert np.quantile(closed_s, 0.9) < 0.3
    assert (closed_s > 0.7).sum() >= 1
    assert code == 1
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "run: p99" in last["missed"]
    assert run.setup["bodies"] == bodies and run.setup["seed"] == 0


async def test_locust_sees_the_stall_too(bodies):
    """Poisson arrivals at 100 a second, about 4 s of them, which Locust ends."""
    stalling = Stalling()
    async with serving(stalling.counted) as port:
        command = [str(Path(sys.executable).with_name("locust")), "--headless", "-t", "5s", "--json", "--only-summary"]
        command += ["-H", f"http://127.0.0.1:{port}", "--rate", "100", "--bodies", bodies]
        process = await asyncio.create_subprocess_exec(
            *command, cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        out, said = await process.communicate()
    assert process.returncode in (0, 1), said.decode()  # 1: a busy machine made it late, and it said so
    (seen,) = json.loads(out)
    assert (seen["name"], seen["method"], seen["num_failures"]) == ("/v1/rank", "POST", 0)
    assert seen["num_requests"] == stalling.count > AT
    waited_ms = np.repeat(*zip(*((float(ms), n) for ms, n in seen["response_times"].items()), strict=True))
    # Those who were due in its first half second waited longer than the second half: about 50, but for chance.
    assert (waited_ms > 500).sum() >= 50 - 4 * np.sqrt(50)
    assert re.search(rb"sent \d+, late by [\d.]+ ms at the 99th percentile", said)


def test_attack_starts_a_service_on_a_bundle_and_keeps_what_came_of_it(bundle, tmp_path, capsys):
    arguments = ["--rate", "40", "--seconds", "1.5", "--warm-up", "0.5", "--workers", "1", "--sla-ms", "5000"]
    arguments += ["--k", "3", "--timeout-ms", "5000", "--seed", "5", "--most-late-ms", "1000"]
    code = __main__.main(["attack", "--bundle", str(bundle), *arguments, "--out", str(tmp_path)])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    run = runs.read(tmp_path / "run.json")
    assert code == 0, last
    assert last["is_valid"] and last["missed"] == []
    assert run.figures.coverage == 1 and run.figures.answered == run.figures.requests > 30
    assert {"queue", "users", "retrieval", "preranking", "reranking", "selection", "rest", "outside"} == set(run.stages)
    assert run.figures.server_cpu_ms > 0
    assert run.setup["quality before and after"] == [1.0, 1.0]
    (generation,) = run.setup["generation"]
    assert generation.startswith("tiny@1#")
    assert run.setup["bundle"] == f"bundle, manifest {generation.split('#')[1]}"
    assert "Stage waterfall" in (tmp_path / "report.html").read_text()
    with pytest.raises(SystemExit):
        __main__.main(["attack", "--bundle", str(bundle), *arguments, "--out", str(tmp_path)])
    assert f"--out {tmp_path}: holds a run; allowed is another directory, or --force" in capsys.readouterr().err
    assert runs.read(tmp_path / "run.json").setup == run.setup


async def test_a_trace_brings_its_own_bodies_and_pace(tmp_path):
    asked = []

    async def answer() -> bytes:
        asked.append(time.monotonic())
        return ok()

    trace = tmp_path / "trace"
    trace.write_text("".join(f'{{"at_s": {1e9 + i / 10}, "body": {{"k": {i + 1}}}}}\n' for i in range(10)))
    async with serving(answer) as port:
        arguments = ["--url", f"127.0.0.1:{port}", "--arrivals", "trace", "--trace", str(trace), "--speed", "3"]
        await asyncio.to_thread(__main__.main, ["attack", *arguments, "--out", str(tmp_path / "out")])
    run = runs.read(tmp_path / "out" / "run.json")
    assert run.figures.requests == 10 == len(asked) - 1
    assert asked[-1] - asked[1] > 0.2  # 0.3 s of them, and the first may have been late


async def test_every_request_has_the_key_and_the_path(bodies, tmp_path, monkeypatch):
    heads = []

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionResetError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                await reader.readexactly(int(re.search(rb"content-length: (\d+)|$", head)[1] or 0))
                heads.append(head)
                writer.write(ok())
        writer.close()

    (tmp_path / "key").write_text("s3cret\n")
    monkeypatch.setenv("WINNOW_API_KEY", "another")
    async with await asyncio.start_server(one, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/behind/v1/rank"
        arguments = ["--url", url, "--bodies", bodies, *WHEN, "--out", str(tmp_path)]
        await asyncio.to_thread(__main__.main, ["attack", *arguments, "--key-file", str(tmp_path / "key")])
    posts = [head for head in heads if head.startswith(b"post")]
    assert len(posts) >= 2
    assert all(head.startswith(b"post /behind/v1/rank ") for head in posts)
    assert all(b"authorization: bearer s3cret\r\n" in head for head in posts)
    assert "s3cret" not in (tmp_path / "run.json").read_text() + (tmp_path / "report.html").read_text()


# ----------------------------------------------------------------------------------------- kept runs


def test_compare_and_report_draw_kept_runs(tmp_path, capsys):
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    runs.write(made(), a)
    runs.write(made(observed(latency_s=np.full(400, 0.02))), b)
    assert __main__.main(["compare", str(a), str(b)]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    p99 = next(d for d in last["differences"] if d["name"] == "p99 ms")
    assert p99["is_clear"] and p99["b"] - p99["a"] == pytest.approx(10, rel=0.01)
    assert "B is slower" in (tmp_path / "compare.html").read_text()
    assert __main__.main(["report", str(a), "--out", str(tmp_path / "again.html")]) == 0
    assert "Latency by percentile" in (tmp_path / "again.html").read_text()


def test_comparing_with_an_invalid_run_is_no_success(tmp_path, capsys):
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    runs.write(made(observed(sent_late_s=np.full(400, 0.02))), a)
    runs.write(made(), b)
    assert __main__.main(["compare", str(a), str(b)]) == 1
    assert "A is INVALID: the generator sent late" in capsys.readouterr().err
    assert "an invalid run says nothing" in (tmp_path / "compare.html").read_text()


def test_runs_under_other_loads_are_compared_with_a_warning(tmp_path, capsys):
    a, b, slower = tmp_path / "a.json", tmp_path / "b.json", made(observed(latency_s=np.full(400, 0.02)))
    runs.write(made(), a)
    runs.write(replace(slower, setup=slower.setup | {"arrivals": "burst, 50/s"}), b)
    assert __main__.main(["compare", str(a), str(b)]) == 0
    assert "B is slower, but they differ in arrivals" in (tmp_path / "compare.html").read_text()
    assert "arrivals: A had" in (said := capsys.readouterr()).err
    assert "nan" not in said.out.partition("{")[0]


# ---------------------------------------------------------------------------------------------- search


async def test_search_finds_the_highest_rate_and_how_much_it_varies(bodies, tmp_path, capsys, monkeypatch):
    """A server that refuses the 36th request and all after it, until nobody has come for 0.3 s: of half a second of
    arrivals at 60 a second it answers all, and at 90 it doesn't."""
    monkeypatch.setattr(search, "QUIET_S", 0.0)  # a generator takes longer than that to start
    monkeypatch.setattr("loadtest.search.NEARBY", 1.5)  # the second search goes the way of the first
    loop = asyncio.get_running_loop()
    last, count = loop.time(), 0

    async def answer() -> bytes:
        nonlocal last, count
        count = count + 1 if loop.time() - last < 0.3 else 1
        last = loop.time()
        return ok() if count < 36 else b"HTTP/1.1 503 X\r\ncontent-length: 0\r\n\r\n"

    out = tmp_path / "search.json"
    async with serving(answer) as port:
        arguments = ["--url", f"127.0.0.1:{port}", "--bodies", bodies, "--seconds", "0.5", "--start", "60"]
        arguments += ["--within", "0.6", "--repeat", "2", "--sla-ms", "5000", "--most-late-ms", "250"]
        arguments += ["--out", str(out)]
        code = await asyncio.to_thread(__main__.main, ["search", *arguments])
    found = json.loads(out.read_text())
    assert code == 0
    assert [s["rate"] for s in found["searches"]] == [60, 60]
    for one in found["searches"]:
        first, *others = one["attempts"]
        assert first["is_held"] and first["answered"] == 1
        assert [a["is_held"] for a in others] == [False, False] and all(a["answered"] < 0.999 for a in others)
    values = json.loads(capsys.readouterr().out.splitlines()[-1])["figures"]
    assert values["search: highest rate held, mean"] == 60
    assert values["search: rate, coefficient of variation"] == 0
    assert values["search: rate x kernel CPU, coefficient of variation"] is None


def test_search_on_a_bundle_says_what_the_rate_was_bought_with(bundle, capsys, monkeypatch):
    """The way through the rates is one run, at 40 a second."""
    monkeypatch.setattr(search, "HOT_S", 0.1)
    monkeypatch.setattr("loadtest.search.highest_rate", lambda holds, start, within, growth: 40.0 * holds(40.0))
    arguments = [
        "--workers",
        "1",
        "--seconds",
        "1",
        "--sla-ms",
        "5000",
        "--timeout-ms",
        "5000",
        "--most-late-ms",
        "1000",
    ]
    assert __main__.main(["search", "--bundle", str(bundle), *arguments]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    (one,) = last["searches"]
    assert one["rate"] == 40 and one["server_cpu_ms"] > one["kernel_cpu_ms"] > 0
    assert one["rate x kernel CPU"] == pytest.approx(40 * one["kernel_cpu_ms"] / 1e3)


def test_variation_is_the_standard_deviation_over_the_mean():
    assert search.variation([90, 100, 110]) == pytest.approx(10 / 100)
    assert np.isnan(search.variation([100]))


# ------------------------------------------------------------------------------- what can't be used

URL = ["--url", "http://127.0.0.1:9"]
WHEN = ["--rate", "10", "--seconds", "1"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([*WHEN], "--url or --bundle: one is needed"),
        ([*URL, *WHEN], "--bodies or --bundle: one is needed"),
        ([*URL, "--bodies", "BODIES"], "--rate and --seconds: both are needed for poisson arrivals"),
        ([*URL, "--bodies", "BODIES", "--rate", "0", "--seconds", "1"], "--rate: 0: allowed is a number, over 0"),
        ([*URL, "--bodies", "BODIES", "--rate", "nan", "--seconds", "1"], "--rate: nan: allowed is"),
        ([*URL, "--bodies", "BODIES", "--rate", "1e9", "--seconds", "1"], "--rate: 1e9: allowed is"),
        ([*URL, "--bodies", "BODIES", "--rate", "9e4", "--seconds", "9e3"], "--rate x --seconds: 810,000,000 requests"),
        ([*URL, "--bodies", "BODIES", "--rate", "0.01", "--seconds", "0.01"], "nothing is due in that time"),
        ([*URL, "--bodies", "BODIES", *WHEN, "--most", "2"], "--most 2:"),
        ([*URL, "--bodies", "nowhere", *WHEN], "--bodies: "),
        ([*URL, "--bundle", "nowhere", *WHEN], "--bundle nowhere: there is no manifest.json"),
        (["--url", "https://h:1", "--bodies", "BODIES", *WHEN], "--url: https://h:1: allowed is http://HOST:PORT"),
        (["--url", "http://h:x", "--bodies", "BODIES", *WHEN], "allowed is http://HOST:PORT"),
        (
            [*URL, "--bodies", "BODIES", *WHEN, "--k", "0"],
            "--k: 0: allowed is a whole number, 1 or more, at most 1,000",
        ),
        ([*URL, "--bodies", "BODIES", *WHEN, "--priority", "now"], "--priority: invalid choice"),
        ([*URL, "--bodies", "BODIES", *WHEN, "--filters", "{}"], "--filters: {}: allowed is a JSON list"),
        ([*URL, "--bodies", "BODIES", *WHEN, "--filters", "["], "--filters: "),
        ([*URL, "--bodies", "BODIES", *WHEN, "--arrivals", "trace"], "--arrivals trace and --trace FILE"),
        ([*URL, "--bodies", "BODIES", "--arrivals", "trace", "--trace", "BODIES"], "--trace: BODIES, line 1"),
        (
            [*URL, "--bodies", "BODIES", *WHEN, "--arrivals", "burst", "--burst-factor", "20"],
            "factor x length <= every",
        ),
        ([*URL, "--bodies", "BODIES", *WHEN, "--key-file", "BODIES"], "--key-file: "),
        ([*URL, "--bodies", "BODIES", *WHEN, "--setting", "A=1"], "--setting A=1: "),
        (["--bundle", "BUNDLE", *WHEN, "--admin", "h:1"], "--admin: only with --url"),
        ([*URL, "--bodies", "BODIES", *WHEN, "--out", "BODIES"], "--out BODIES: "),
    ],
)
def test_what_cannot_be_used_is_named_with_what_is_allowed(arguments, said, bodies, bundle, capsys):
    files = {"BODIES": bodies, "BUNDLE": str(bundle)}
    with pytest.raises(SystemExit) as end:
        __main__.main(["attack", *(files.get(a, a) for a in arguments)])
    assert end.value.code == 2
    assert said.replace("BODIES", bodies) in capsys.readouterr().err


@pytest.mark.parametrize("command", ["attack", "search"])
def test_nobody_there_cannot_be_used(command, bodies, tmp_path, capsys):
    when = [*WHEN, "--out", str(tmp_path / "out")] if command == "attack" else []
    assert __main__.main([command, "--url", f"http://127.0.0.1:{free_port()}", "--bodies", bodies, *when]) == 2
    assert "doesn't answer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()  # nothing was measured, and nothing is kept


@pytest.mark.parametrize("command", ["attack", "search"])
async def test_an_admin_port_that_does_not_answer_is_named(command, bodies, tmp_path, capsys):
    async def answer() -> bytes:
        return b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"

    async with serving(answer) as port:
        admin = f"127.0.0.1:{free_port()}"
        arguments = ["--url", f"127.0.0.1:{port}", "--bodies", bodies, "--admin", admin]
        arguments += [*WHEN, "--out", str(tmp_path / "out")] if command == "attack" else []
        assert await asyncio.to_thread(__main__.main, [command, *arguments]) == 2
    assert f"the admin port {admin} doesn't answer" in capsys.readouterr().err


async def test_a_service_that_refuses_the_key_cannot_be_used(bodies, tmp_path, capsys):
    async def refuse() -> bytes:
        return b'HTTP/1.1 401 X\r\ncontent-length: 22\r\n\r\n{"detail": "no key..."}'

    async with serving(refuse) as port:
        arguments = ["--url", f"127.0.0.1:{port}", "--bodies", bodies, *WHEN, "--out", str(tmp_path)]
        assert await asyncio.to_thread(__main__.main, ["attack", *arguments]) == 2
    assert "refuses the first request with 401" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["report"], ["compare"]], ids=["report", "compare"])
def test_what_is_no_run_cannot_be_drawn(command, bodies, tmp_path, capsys):
    for file in (bodies, str(tmp_path / "nowhere"), str(tmp_path)):
        with pytest.raises(SystemExit) as end:
            __main__.main([*command, file] if command == ["report"] else [*command, file, file])
        assert end.value.code == 2
        assert file in capsys.readouterr().err
