"""The real service, and everything happening to it that a panel or an alert shows.

The re-ranker is paced, so that a small bundle is as slow as a large one and a slow machine no slower than a fast one.
"""

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from loadtest.arrivals import poisson
from loadtest.faults.bundles import WAYS, linked_copy
from loadtest.launch import Server, service, wait_for
from loadtest.open_loop import Attack, Generator, attack
from models.pack import pack
from tests import world

PACED_ROW_MS = 1  # 32 rows on 2 workers are 16 ms
MOST_INFLIGHT = 8  # so that an overload is refused, whatever the machine
CALM, CALM_S = 15.0, 8.0  # requests a second; seconds
MIXED = 30.0  # a second, usual and odd ones
OVERLOAD, OVERLOAD_S = 900.0, 4.0  # above what two workers do at the floor of quality, 3 rows of 32 each
DEATHS = 3  # within 15 minutes are one too many
PATIENCE_S = 60.0

USUAL = [{"user": {"id": name}} for name in world.USER_IDS]
# Too short a time, the same strictly, nothing to rank, and three that a client got wrong.
ODD = [{"timeout_ms": 1}, {"timeout_ms": 2}, {"strict": True, "timeout_ms": 1}, {"candidates": []}, {"k": 0}, {"x": 1}]


@dataclass(frozen=True, slots=True)
class Bundles:
    """The tiny world in two versions, and a copy of the second with a flipped byte."""

    first: Path
    second: Path
    corrupt: Path


def packed(folder: Path) -> Bundles:
    config = world.write_source(folder / "source")
    pack(config, folder / "1", say=lambda _: None)
    config.write_text(config.read_text().replace('version = "1"', 'version = "2"'))
    pack(config, folder / "2", say=lambda _: None)
    file, spoil = WAYS["a byte of a graph flipped"]
    corrupt = linked_copy(folder / "2", folder / "corrupt")
    spoil(corrupt / file)
    return Bundles(folder / "1", folder / "2", corrupt)


@contextlib.contextmanager
def started(bundles: Bundles, log: Path) -> Iterator[Server]:
    """The service on the first bundle."""
    settings = {"PACED_ROW_MS": str(PACED_ROW_MS), "MAX_INFLIGHT": str(MOST_INFLIGHT)}
    with service(bundles.first, workers=2, log=log, **settings) as server:
        yield server


def calm(server: Server) -> None:
    """Some usual requests, to their end."""
    attack(Attack(server.port, _bodies(USUAL), poisson(CALM, CALM_S)))


def everything(server: Server, bundles: Bundles) -> None:
    """Odd requests, dying workers, offered bundles, a rollback, an overload. Raises RuntimeError if one did nothing."""
    due_s = poisson(MIXED, 600.0)  # until it is stopped
    generator = Generator(Attack(server.port, _bodies(USUAL + ODD), due_s))
    try:
        _kill_workers(server)
        _change_bundles(server, bundles)
        attack(Attack(server.port, _bodies(USUAL), poisson(OVERLOAD, OVERLOAD_S)))
    finally:
        generator.stop()
    for outcome in ("ok", "degraded", "empty", "client_error", "refused", "deadline"):
        if not server.metric("winnow_requests_total", outcome=outcome):
            raise RuntimeError(f"no request came out as {outcome}")


def _kill_workers(server: Server) -> None:
    for _ in range(DEATHS):
        number, pid = next(iter(server.workers().items()))
        os.kill(pid, signal.SIGKILL)

        def is_back(number: str = number, pid: int = pid) -> bool:
            return server.workers().get(number, pid) != pid

        wait_for(is_back, PATIENCE_S, f"worker {number} to be replaced")


def _change_bundles(server: Server, bundles: Bundles) -> None:
    """A refused offer; a swap and the way back; the offer of a third as a candidate, so that each role is held."""
    if not server.offer(bundles.corrupt):
        raise RuntimeError("the corrupt bundle was not refused")
    if why := server.offer(bundles.second):
        raise RuntimeError(f"the second bundle was refused: {why}")
    if (status := server.call("POST", "/admin/rollback", is_admin=True)[0]) != 202:
        raise RuntimeError(f"rolling back: status {status}")
    candidate = Path(shutil.copytree(bundles.second, bundles.second.parent / "3"))
    manifest = json.loads((candidate / "manifest.json").read_bytes())
    (candidate / "manifest.json").write_text(json.dumps(manifest | {"version": "3"}))
    asked = json.dumps({"path": str(candidate), "activate": False}).encode()
    server.call("POST", "/admin/generations", asked, is_admin=True)
    wait_for(lambda: len(server.generations()["generations"]) == 3, PATIENCE_S, "a candidate to be held")


def _bodies(requests: list[dict[str, object]]) -> list[bytes]:
    return [json.dumps(request).encode() for request in requests]
