"""The demo: real movies through the whole funnel, from nothing to a ranked list.

    fetch ─▶ train ─▶ pack ─▶ serve ─▶ one request, printed as a person would want to read it

What is there already is used again. The service it starts is the ordinary one (`python -m app serve`), asked over
HTTP like any other; it stays up until Ctrl-C, and is ended by its process when the demo ends.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from app.bundle import NO_ROW, Generation, load

OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy can not reach our loopback
READY_S = 60.0
SHOWN_HISTORY = 8
OTHER_PORTS = "choose others with make demo PORT=… ADMIN_PORT=… (--port, --admin-port)"
WANTED_HISTORY = (15, 60)  # items: enough to say something of a person, few enough to read


class DemoError(Exception):
    """The service can't be started or asked. The message is one sentence."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where the demo keeps what it makes."""

    data: Path
    artefacts: Path
    bundle: Path


def demo(
    places: Places,
    ports: tuple[int, int],
    workers: int,
    *,
    people: int | None = None,
    epochs: int | None = None,
    once: bool = False,
) -> None:
    """Make what is missing, serve it, ask once and print.

    Args:
        ports: ranking port, admin port. people, epochs: a small slice, for tests. once: end after the answer.
    Raises: DemoError, and what training and packing raise.
    """
    check_ports(ports)  # before minutes of training
    make_bundle(places, people, epochs)
    generation = load(places.bundle)
    with service(places.bundle, ports, workers) as process:
        url = f"http://127.0.0.1:{ports[0]}"
        wait_until_ready(url, process)
        request = {"user": {"id": choose_person(generation)}, "k": 10}
        answer = ask(url, request)
        if answer["generation"] != generation.name:
            raise DemoError(f"{url} serves {answer['generation']}, not {generation.name}: {OTHER_PORTS}")
        print_answer(generation, request, answer, url)
        if not once:
            print(f"\nserving on {url} (docs: {url}/docs, metrics: http://127.0.0.1:{ports[1]}/metrics)")
            print(f"its log, a line a request: {places.bundle.with_suffix('.log')}")
            print("Ctrl-C to stop", flush=True)
            process.wait()
            raise DemoError(f"the service ended by itself with code {process.returncode}")


def check_ports(ports: tuple[int, int]) -> None:
    """Returns when both are free on loopback. Raises DemoError that names the one that isn't."""
    with ExitStack() as held:
        for name, port in zip(("PORT", "ADMIN_PORT"), ports, strict=True):
            try:
                held.enter_context(socket.create_server(("127.0.0.1", port)))
            except (OSError, OverflowError) as e:
                raise DemoError(f"{name} {port} is in use or not allowed: {OTHER_PORTS}") from e


def make_bundle(places: Places, people: int | None, epochs: int | None) -> None:
    """Train and pack, unless the bundle is there."""
    if (places.bundle / "manifest.json").is_file():
        print(f"using {places.bundle}")
        return
    from models.pack import pack  # onnx and torch take seconds to import, and the second run needs neither
    from models.train import train

    started = time.monotonic()
    train(places.data, places.artefacts, people=people, epochs=epochs)
    pack(places.artefacts / "pack.toml", places.bundle)
    print(f"made {places.bundle} in {time.monotonic() - started:.0f} s\n", flush=True)


@contextmanager
def service(bundle: Path, ports: tuple[int, int], workers: int) -> Iterator[subprocess.Popen[bytes]]:
    """The service on this bundle, logging to a file beside it; ended at the end of the block.

    Raises: DemoError if a port is in use: whoever is there would be asked in its place.
    """
    check_ports(ports)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, or the service would outlive us
    environ = {k: v for k, v in os.environ.items() if not k.startswith("WINNOW_")}  # of another service
    environ |= {
        "WINNOW_BUNDLE": str(bundle),
        "WINNOW_PORT": str(ports[0]),
        "WINNOW_ADMIN_PORT": str(ports[1]),
        "WINNOW_WORKERS": str(workers),
    }
    log_file = bundle.with_suffix(".log")
    with log_file.open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "app", "serve"], env=environ, stdout=log, stderr=log)
        try:
            yield process
        except KeyboardInterrupt:
            print("\nstopping")
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


def wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    """Returns when /readyz says so. Raises DemoError if the service ended or took too long."""
    until = time.monotonic() + READY_S
    while time.monotonic() < until:
        if process.poll() is not None:
            raise DemoError(f"the service ended with code {process.returncode}; the log beside the bundle says why")
        try:
            with OPENER.open(f"{url}/readyz", timeout=1):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.05)  # another process: there is no event to wait for
    raise DemoError(f"the service was not ready within {READY_S:g} s")


def ask(url: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """The answer of POST /v1/rank. Raises DemoError if there is none."""
    posted = urllib.request.Request(
        f"{url}/v1/rank", json.dumps(request).encode(), {"content-type": "application/json"}
    )
    try:
        with OPENER.open(posted, timeout=10) as reply:
            return json.load(reply)  # type: ignore[no-any-return]
    except OSError as e:  # an HTTPError is one
        raise DemoError(f"the service did not rank ({e})") from e


def choose_person(generation: Generation) -> int | str:
    """The first person whose history is long enough to say something and short enough to read."""
    assert generation.users is not None
    assert generation.users.history is not None
    lengths = (generation.users.history != NO_ROW).sum(axis=1)
    low, high = WANTED_HISTORY
    row = int(np.argmax((lengths >= low) & (lengths <= high)))
    return generation.users.ids.external(np.array([row]))[0]


def print_answer(generation: Generation, request: Mapping[str, Any], answer: Mapping[str, Any], url: str) -> None:
    """History and ranking by title, the funnel's counts and times, and the line that repeats it."""
    titles, users = generation.tables["title"], generation.users
    assert users is not None
    assert users.history is not None
    row = int(users.ids.rows([request["user"]["id"]])[0])
    history = users.history[row][users.history[row] != NO_ROW]
    print(f"\nPerson {request['user']['id']} has rated {len(history)} films, last these:")
    for item in history[-SHOWN_HISTORY:]:
        print(f"    {titles[item]}")
    print("\nThe funnel recommends, of what they have not rated:")
    print("         score  scored by    title")
    rows = generation.ids.rows([item["id"] for item in answer["items"]])
    for place, (item, item_row) in enumerate(zip(answer["items"], rows, strict=True), 1):
        print(f"    {place:2d}  {item['score']:6.3f}  {item['stage']:<11}  {titles[item_row]}")
    _print_funnel(generation, answer)
    print("\nAsk again:")
    print(f"    curl -s {url}/v1/rank -H 'content-type: application/json' -d '{json.dumps(request)}'")
    sys.stdout.flush()


def _print_funnel(generation: Generation, answer: Mapping[str, Any]) -> None:
    widths, coverage = generation.manifest.funnel, answer["coverage"]
    counts = {
        "retrieval": f"{generation.n_items:,} films -> {min(widths.retrieve, generation.n_items)}",
        "preranking": f"-> {coverage['wanted']}",
        "reranking": f"{coverage['reranked']} of {coverage['wanted']} by the deep model, "
        f"{coverage['shards_ok']} of {coverage['shards']} shards",
        "selection": f"-> {len(answer['items'])}",
    }
    print(f"\nIn {answer['took_ms']['total']:.1f} ms:")
    for stage, text in counts.items():
        print(f"    {stage:<11} {answer['took_ms'][stage]:6.2f} ms   {text}")
    for lost in answer["degraded"]:
        print(f"    given up: {lost['stage']} was {lost['reason']}, {lost['substitute']} instead")
