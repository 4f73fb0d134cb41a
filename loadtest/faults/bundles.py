"""Bundles that change or lie while the service serves: swaps under load, and corrupt ones offered to it.

An answer mixes generations when it isn't the one that its own generation gives unloaded: whole answers item by item
and score by score, degraded ones in the scores that the re-ranker made. Where retrieval was degraded, the re-ranker
was asked about another person (unknown, or without an embedding), and the answer can't be compared: it is counted.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from loadtest.agreement import Reference, differs, differs_where_fresh
from loadtest.arrivals import poisson
from loadtest.faults.lab import Lab, failed, row, sleep_until
from loadtest.launch import Server
from loadtest.observed import Observed
from loadtest.table import Figure, Row

SWAP_EVERY_S, SWAPPING_S = 10.0, 120.0
TOLERANCE = 1e-4
MOST_SLOWER = 1.5
RETRIEVAL = "retrieval"


def swaps(lab: Lab) -> Iterator[Row]:
    """Between two bundles and back, every 10 s for 2 minutes."""
    references = dict(map(lab.references, (lab.bundle, lab.other)))
    seconds = lab.seconds(SWAPPING_S)
    n_swaps = int(seconds / SWAP_EVERY_S) or 1
    refusals, took_s = [], [0.0]
    with lab.service() as server:
        calm = lab.attack(server, poisson(lab.half, seconds / 2, seed=1))
        with lab.load(server, poisson(lab.half, seconds)) as generator:
            for turn in range(n_swaps):
                sleep_until(generator, (turn + 0.2) * SWAP_EVERY_S)
                began = time.monotonic()
                refusals += [why for why in [server.offer((lab.other, lab.bundle)[turn % 2])] if why]
                took_s.append(time.monotonic() - began)
            seen = generator.result()
    for why in refusals:
        lab.say(f"  refused: {why}")
    mixed = mixtures(seen, references)
    for why in mixed[:5]:
        lab.say(f"  mixed: {why}")
    yield row(
        "swaps",
        seen,
        failed(seen),
        Figure("answers that mix generations", float(len(mixed)), most=0),
        Figure("answers that can't be compared", float(sum(c.startswith(RETRIEVAL) for c in seen.cause))),
        Figure("generations that answered", float(len(set(seen.generation) - {""})), least=2, most=2),
        Figure("swaps done", float(n_swaps - len(refusals)), least=n_swaps),
        Figure("slowest swap", max(took_s), most=SWAP_EVERY_S, unit="s"),
        Figure("p99 without swaps", calm.percentile_s(99) * 1e3, unit="ms"),
        Figure("p99 over that without", seen.percentile_s(99) / calm.percentile_s(99), most=MOST_SLOWER),
        recovery_s=max(took_s),
    )


def mixtures(seen: Observed, references: dict[str, list[Reference]]) -> list[str]:
    """What is wrong with each answer that isn't its own generation's."""
    found = []
    for i in seen.is_ok.nonzero()[0].tolist():
        if seen.cause[i].startswith(RETRIEVAL):
            continue
        full, why = references.get(seen.generation[i]), f"unknown generation {seen.generation[i]}"
        if full and seen.cause[i]:
            why = differs_where_fresh(seen.ids[i], seen.scores[i], seen.is_fresh[i], full[seen.body[i]], TOLERANCE)
        elif full:
            why = differs(seen.ids[i], seen.scores[i], full[seen.body[i]], TOLERANCE)
        found += [f"request {i}: {why}"] if why else []
    return found


# --------------------------------------------------------------------------------------- corrupt offers

# what was done → the file that the refusal must name, and the deed
WAYS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "a byte of a graph flipped": ("re_ranker.onnx", lambda f: _flip(f)),
    "a byte of the index flipped": ("index.faiss", lambda f: _flip(f)),
    "a byte of a table flipped": ("items/embedding.npy", lambda f: _flip(f)),
    "a byte of the weights flipped": ("pre_ranker.npz", lambda f: _flip(f)),
    "a file missing": ("popular.npy", lambda f: f.unlink()),
    "a file too many": ("items/extra.npy", lambda f: _write(f, b"extra")),
    "a link": ("user_tower.onnx", lambda f: _link(f)),
    "a file cut short": ("items/ids.npy", lambda f: _write(f, f.read_bytes()[:-8])),
    "a digest that isn't the file's": ("items/id_order.npy", lambda f: _forge(f, "0" * 64)),
    "a sealed graph that is none": ("re_ranker.onnx", lambda f: _seal(f, b"no graph")),
    "golden answers that don't come out": ("manifest.json", lambda f: _change(f, _spoil_golden)),
    "a manifest cut short": ("manifest.json", lambda f: _write(f, f.read_bytes()[:-8])),
}


def corrupt(lab: Lab) -> Iterator[Row]:
    """Each way of spoiling a copy of the other bundle, offered under load."""
    refused = 0
    with lab.service() as server, tempfile.TemporaryDirectory(dir=lab.bundle.parent) as folder:
        digest = server.serving()["digest"]
        seconds = lab.seconds(60)
        with lab.load(server, poisson(lab.half, seconds)) as generator:
            for number, (way, (name, spoil)) in enumerate(WAYS.items()):
                copy = linked_copy(lab.other, Path(folder) / str(number))
                spoil(copy / name)
                why = server.offer(copy)
                is_named = name in why.replace(str(copy), "")
                refused += is_named
                lab.say(f"  {way}: {why or 'ACCEPTED'}{'' if is_named else f' (should name {name})'}")
            seen = generator.result()
        serves_on = _serves(server, digest)
    names = set(seen.generation) - {""}
    yield row(
        "corrupt bundles",
        seen,
        Figure("refused, naming the file", float(refused), least=len(WAYS)),
        Figure("the old generation serves on", float(serves_on and len(names) == 1), least=1),
        failed(seen),
    )


def _serves(server: Server, digest: str) -> bool:
    return bool(server.serving()["digest"] == digest)


def linked_copy(bundle: Path, to: Path) -> Path:
    """A copy that shares the files' contents: a spoiler must put a new file in place of the one it changes."""
    return Path(shutil.copytree(bundle, to, copy_function=os.link))


def _write(file: Path, content: bytes) -> None:
    """A new file in its place; what was there stays as it was for the others that hold it."""
    file.unlink(missing_ok=True)
    file.write_bytes(content)


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    _write(file, bytes(content))


def _link(file: Path) -> None:
    file.symlink_to(file.rename(file.parent.with_suffix(".elsewhere")))  # beside the bundle, whole


def _change(manifest: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(manifest.read_bytes())
    change(content)
    _write(manifest, json.dumps(content).encode())


def _spoil_golden(manifest: dict[str, Any]) -> None:
    golden = manifest["golden"][0]
    golden["scores"] = [score + 1 for score in golden["scores"]]


def _bundle_of(file: Path) -> Path:
    return next(parent for parent in file.parents if (parent / "manifest.json").exists())


def _forge(file: Path, sha256: str) -> None:
    bundle = _bundle_of(file)
    name = file.relative_to(bundle).as_posix()
    _change(bundle / "manifest.json", lambda m: m["files"][name].update(sha256=sha256))


def _seal(file: Path, content: bytes) -> None:
    """New content, and the manifest made to fit it."""
    _write(file, content)
    bundle = _bundle_of(file)
    entry = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    _change(bundle / "manifest.json", lambda m: m["files"].update({file.relative_to(bundle).as_posix(): entry}))
