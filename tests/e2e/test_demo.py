"""The demo command itself, on a slice of the real data: fetch, train, pack, serve, ask, print; and its refusals."""

import re
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from models import demo

PEOPLE = 80


def free_ports() -> list[str]:
    """Two ports that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    ports = [str(s.getsockname()[1]) for s in sockets]
    for s in sockets:
        s.close()
    return ports


def command(folder: Path, port: str, admin_port: str) -> list[str]:
    words = [sys.executable, "-m", "models", "demo", "--people", str(PEOPLE), "--epochs", "1", "--workers", "2"]
    words += ["--port", port, "--admin-port", admin_port, "--data", str(folder / "data")]
    return [*words, "--artefacts", str(folder / "artefacts"), "--bundle", str(folder / "bundle")]


def start_demo(folder: Path, port: str, admin_port: str) -> "subprocess.CompletedProcess[str]":
    words = [*command(folder, port, admin_port), "--once"]
    return subprocess.run(words, capture_output=True, text=True, timeout=240)


def run_demo(folder: Path) -> str:
    done = start_demo(folder, *free_ports())
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(("place", "name"), [(0, "PORT"), (1, "ADMIN_PORT")])
def test_a_port_in_use_is_said_in_one_line_before_anything_is_made(tmp_path: Path, place: int, name: str) -> None:
    ports = free_ports()
    with socket.create_server(("127.0.0.1", int(ports[place]))):
        done = start_demo(tmp_path, *ports)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{name} {ports[place]} is in use")
    assert "make demo PORT=" in line
    assert not list(tmp_path.iterdir())


def test_a_bundle_that_must_not_be_served_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "manifest.json").write_text("{")
    done = start_demo(tmp_path, *free_ports())
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("refused: manifest.json: ")


def test_the_answer_of_another_service_is_not_shown(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "service", lambda *_: nullcontext())
    monkeypatch.setattr(demo, "wait_until_ready", lambda *_: None)
    monkeypatch.setattr(demo, "ask", lambda *_: {"generation": "other@1#0"})
    port, admin_port = (int(p) for p in free_ports())
    with pytest.raises(demo.DemoError, match="serves other@1#0, not tiny@1#"):
        demo.demo(demo.Places(bundle, bundle, bundle), (port, admin_port), 1)


def test_neither_a_proxy_nor_settings_of_the_shell_reach_the_service(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # nobody listens there
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("WINNOW_HOST", "nowhere")
    copied = Path(shutil.copytree(bundle, tmp_path / "bundle"))  # the log goes beside it
    port, admin_port = (int(p) for p in free_ports())
    with demo.service(copied, (port, admin_port), 1) as process:
        demo.wait_until_ready(f"http://127.0.0.1:{port}", process)
        assert len(demo.ask(f"http://127.0.0.1:{port}", {"k": 2})["items"]) == 2


def test_a_service_that_ended_is_not_waited_for() -> None:
    ended = subprocess.Popen([sys.executable, "-c", "raise SystemExit(2)"])
    ended.wait()
    with pytest.raises(demo.DemoError, match="ended with code 2"):
        demo.wait_until_ready("http://127.0.0.1:1", ended)


def test_the_demo_trains_serves_and_prints_a_ranking_and_the_second_run_reuses_it(tmp_path: Path) -> None:
    first = run_demo(tmp_path)
    ranked = re.findall(r"^ +\d+ +[\d.]+ +reranking +(.+)$", first, re.MULTILINE)
    history = re.findall(r"^    (\S.+ \(\d{4}\))$", first, re.MULTILINE)
    assert len(ranked) == 10
    assert len(set(ranked)) == 10
    assert history
    assert not set(ranked) & set(history)
    assert "curl -s http://127.0.0.1:" in first
    assert re.search(r"reranking +[\d.]+ ms", first)

    second = run_demo(tmp_path)
    assert f"using {tmp_path / 'bundle'}" in second
    assert re.findall(r"^ +\d+ +[\d.]+ +reranking +(.+)$", second, re.MULTILINE) == ranked

    stopped_by_a_signal_it_leaves_no_service_behind(tmp_path)


def stopped_by_a_signal_it_leaves_no_service_behind(folder: Path) -> None:
    """On the bundle that was made above: making another would take a minute."""
    for number in (signal.SIGTERM, signal.SIGINT):
        port, admin_port = free_ports()
        running = subprocess.Popen(command(folder, port, admin_port), stdout=subprocess.PIPE, text=True)
        assert running.stdout
        while "Ctrl-C to stop" not in running.stdout.readline():
            assert running.poll() is None
        running.send_signal(number)
        assert running.wait(60) == 0
        running.stdout.close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", int(port)))
