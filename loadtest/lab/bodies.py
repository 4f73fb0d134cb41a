"""What is asked: bodies from a file, or made up from a bundle's own users, some of whom come far more often.

It reads the bundle's files itself (docs/bundle.md) and speaks the wire's form; it knows nothing of the service. A seed
names its bodies.
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST = 20_000  # different bodies; a longer run begins again with the first
USERS = Path("users/ids.npy")
ASKED = ("context", "query")  # what a made-up request takes over from the bundle's golden ones


def for_bundle(bundle: Path, n: int, file: Path | None = None) -> list[bytes]:
    """At most n: the file's; or those of BUNDLE.requests.jsonl; or made up from the bundle's users; or its golden ones.

    Raises: ValueError, OSError.
    """
    if not (bundle / "manifest.json").is_file():
        made_by = "`python -m models synthesize` makes models/bundles/w1 in five minutes"
        raise ValueError(f"{bundle / 'manifest.json'} isn't there; {made_by}")
    beside = bundle.with_name(f"{bundle.name}.requests.jsonl")
    if file or beside.is_file():
        return from_file(file or beside)[:n]
    if (bundle / USERS).is_file():
        return from_bundle(bundle, n)
    golden = json.loads((bundle / "manifest.json").read_bytes()).get("golden", ())
    if not golden:
        raise ValueError(f"no {beside}, and neither users nor golden requests in the bundle")
    return [json.dumps(g["request"]).encode() for g in golden][:n]


def from_file(file: Path) -> list[bytes]:
    """One JSON object a line, at most MOST of them. Raises ValueError that names the line, OSError."""
    bodies = []
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not (text := line.strip()):
                continue
            try:
                is_object = isinstance(json.loads(text), dict)
            except ValueError:
                is_object = False
            if not is_object:
                raise ValueError(f"{file}, line {number}: {text[:80].decode(errors='replace')!r} isn't a JSON object")
            bodies.append(text)
            if len(bodies) == MOST:
                break
    if not bodies:
        raise ValueError(f"{file}: no requests in it")
    return bodies


def from_bundle(bundle: Path, n: int, *, exponent: float = 1.0, seed: int = 0) -> list[bytes]:
    """n requests, at most MOST, by users of the bundle: the r-th most frequent comes ∝ r^-exponent.

    `context` and `query` are those of the bundle's golden requests in turn. Raises: ValueError, OSError.
    """
    manifest = json.loads((bundle / "manifest.json").read_bytes())
    ids_file = bundle / USERS
    if not ids_file.is_file():
        raise ValueError(f"{ids_file} isn't there: a bundle without users needs a file of bodies")
    ids = np.load(ids_file, mmap_mode="r", allow_pickle=False)
    golden = [g["request"] for g in manifest.get("golden", ())] or [{}]
    asked = [{part: request[part] for part in ASKED if part in request} for request in golden]
    users = ids[zipf(len(ids), min(n, MOST), exponent, seed)].tolist()
    return [json.dumps({"user": {"id": u}, **a}).encode() for u, a in zip(users, itertools.cycle(asked), strict=False)]


def zipf(n_users: int, n: int, exponent: float, seed: int) -> NDArray[np.int64]:
    """i64[n] of users in [0, n_users): which user has which rank is drawn first, then each request's rank.

    P(rank r) = r^-exponent / sum over 1 … n_users; exponent 0: all are alike.
    """
    rng = np.random.default_rng(seed)
    by_rank = rng.permutation(n_users)
    until = np.cumsum(np.arange(1, n_users + 1, dtype=np.float64) ** -exponent)
    ranks = np.searchsorted(until, rng.random(n) * until[-1], side="right")
    return by_rank[np.minimum(ranks, n_users - 1)]


def with_options(bodies: Sequence[bytes], options: dict[str, Any]) -> list[bytes]:
    """Each body with these fields in it, in place of its own."""
    return [json.dumps(json.loads(body) | options).encode() for body in bodies] if options else list(bodies)
