"""The demo command itself, on a small slice of the real data: fetch, train, pack, serve, ask, print."""

import re
import socket
import subprocess
import sys
from pathlib import Path

PEOPLE = 80


def free_ports() -> list[str]:
    """Two ports that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    ports = [str(s.getsockname()[1]) for s in sockets]
    for s in sockets:
        s.close()
    return ports


def run_demo(folder: Path) -> str:
    port, admin_port = free_ports()
    command = [sys.executable, "-m", "models", "demo", "--once", "--people", str(PEOPLE), "--epochs", "1"]
    command += ["--port", port, "--admin-port", admin_port, "--workers", "2"]
    command += ["--data", str(folder / "data"), "--artefacts", str(folder / "artefacts")]
    command += ["--bundle", str(folder / "bundle")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


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
