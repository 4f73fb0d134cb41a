"""docs/bring-your-own.md is run as it stands: files saved, commands pasted, the service asked, answers compared.

A `python` or `toml` block whose first line is `# <name>` is saved under that name, an `sh` block is run, a `json`
block is the answer to the request before it, and a `text` block after a command is what it must print
(numbers of the machine aside).
"""

import json
import os
import re
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.running import free_port

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "bring-your-own.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PATIENCE_S = 60.0


def test_the_document_does_what_it_says(tmp_path: Path) -> None:
    (tmp_path / ".venv").symlink_to(sys.prefix)  # the commands stand as a reader pastes them
    ports = {"8000": str(free_port()), "8001": str(free_port())}
    said, requests, n_compared = "", 0, 0
    blocks = BLOCK.findall(DOCUMENT.read_text(encoding="utf-8"))
    with services() as start:
        for kind, text in blocks:
            text = re.sub(r"\b800[01]\b", lambda port: ports[port[0]], text)
            if saved := re.match(r"# ([\w/]+\.\w+)\n", text):
                file = tmp_path / saved[1]
                file.parent.mkdir(exist_ok=True)
                file.write_text(text)
            elif kind == "sh" and "app serve" in text:
                start(text, tmp_path)
                wait_until_ready(f"http://127.0.0.1:{ports['8000']}/readyz")
            elif kind == "sh" and text != "make install\n":
                said = run(text, tmp_path)
                requests += "curl" in text
            elif kind == "json":
                compare(json.loads(text), json.loads(said))
                n_compared += 1
            elif kind == "text" and not text.startswith("["):
                assert without_figures(text) in without_figures(said)
    assert n_compared == requests == 3
    assert "own best 10 over all items" in said


def run(commands: str, folder: Path) -> str:
    """What a shell prints; it must not fail."""
    done = subprocess.run(
        ["bash", "-e", "-c", commands],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, f"{commands}\n{done.stdout}"
    return done.stdout


def environment() -> dict[str, str]:
    """The reader's: nothing set of Winnow, its modules found wherever one stands."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WINNOW_")}
    return clean | {"PYTHONPATH": str(ROOT)}


def compare(shown: dict[str, object], answered: dict[str, object]) -> None:
    """What the document shows of the answer: the same items in the same order, scores to the digits shown."""
    for key, value in shown.items():
        if key == "items":
            found = answered["items"]
            assert [i["id"] for i in found] == [i["id"] for i in value]
            assert [i["stage"] for i in found] == [i["stage"] for i in value]
            assert [i["score"] for i in found] == pytest.approx([i["score"] for i in value], abs=1e-3)
        else:
            assert answered[key] == value


def without_figures(text: str) -> str:
    """Times and rounding differ from machine to machine."""
    return re.sub(r"[\d.]+(e-\d+)?( ms)?", "#", text.strip())


@contextmanager
def services() -> Iterator[object]:
    """A function that starts a command in the background; what it started is ended with the block."""
    started: list[subprocess.Popen[bytes]] = []

    def start(command: str, folder: Path) -> None:
        # exec: the process is the service itself, not a shell around it
        line = re.sub(r"^((?:\w+=\S+ )*)", r"exec env \1", command.strip())
        log = (folder / "serve.log").open("wb")
        started.append(subprocess.Popen(["bash", "-c", line], cwd=folder, env=environment(), stdout=log, stderr=log))
        log.close()

    try:
        yield start
    finally:
        for process in started:
            process.terminate()
            process.wait(PATIENCE_S)


def wait_until_ready(url: str) -> None:
    """Another process's port gives no event to wait for: try until it answers."""
    pause = threading.Event()
    for _ in range(int(PATIENCE_S / 0.05)):
        try:
            urllib.request.urlopen(url, timeout=PATIENCE_S).close()
            return
        except (urllib.error.URLError, ConnectionError):
            pause.wait(0.05)
    raise AssertionError(f"{url} was not ready within {PATIENCE_S:g} s")
