"""The raw kernels of one request in a bare loop: the least work that gives the funnel's answer, written by hand.

    user tower → index (and exact scores, where the index has none) → linear sum, best m → re-ranker, one batch → best k

One thread, no contracts, no deadlines, no HTTP. Models, tables and search parameters are used as they stand in the
bundle: nothing is computed over the catalogue beforehand, no model is rewritten. What the service saves by doing that
shows as a ratio under one. Who a request is for is looked up before any clock starts.

This module is also the process that runs the loop (`main`, one line of JSON a question; bare_loop.py asks), so that
no other thread of ours shares its interpreter. It is the only one of loadtest/ that imports the service. It doesn't
decide how long to run, nor what the figures mean. It is over 250 lines because one process runs nothing but this file.
"""

import gc
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import faiss
import numpy as np
from numpy.typing import NDArray

from app.bundle import HOISTED, Generation, load
from app.features import HISTORY_FEATURES, Inputs, Source, named_features, read_rows, request_inputs

F32, Rows, Floats, Positions = NDArray[np.float32], NDArray[np.int64], NDArray[np.float64], NDArray[np.intp]
PARTS = ("user_tower", "index", "preranking", "reranking", "top_k")
EXACT_KINDS = ("flat", "hnsw")  # their scores are inner products with the stored rows; the others approximate them
WARM_UP = 20  # requests before anything is timed: the runtime plans its memory by shape


@dataclass(frozen=True, slots=True)
class Asked:
    """One request, looked up. What app.features asks of a person is in it as well.

    history: i64[h], rows, oldest first. fields: by schema key, [1, *shape]. excluded: rows, perhaps twice.
    width: how many are re-ranked.
    """

    history: Rows
    fields: dict[str, NDArray[Any]]
    excluded: Rows
    width: int
    k: int


@dataclass(frozen=True, slots=True)
class Found:
    """Candidates, in any order: rows i64[n], retrieval_scores f32[n].

    read: the embeddings that were read for exact scores, f32[m, d], and where in them these candidates are, [n]; None
    where none were. They are taken from there again while they are in the cache.
    """

    rows: Rows
    retrieval_scores: F32
    read: tuple[F32, Positions] | None

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, at: Positions) -> "Found":
        read = self.read and (self.read[0], self.read[1].take(at))
        return Found(self.rows.take(at), self.retrieval_scores.take(at), read)


class Laps:
    """Two clocks, read after each part: CPU of this thread, and wall, seconds."""

    def __init__(self) -> None:
        self.cpu: list[float] = []
        self.wall: list[float] = []

    def __call__(self) -> None:
        self.cpu.append(time.thread_time())
        self.wall.append(time.perf_counter())

    def parts(self, read: list[float]) -> Floats:
        """f64[requests, parts], seconds."""
        return np.diff(np.array(read).reshape(-1, len(PARTS) + 1), axis=1)


class Kernels:
    """The kernels over one bundle; each step takes what the one before gave."""

    def __init__(self, generation: Generation) -> None:
        g = self.generation = generation
        self.embedding, self.retriever = g.tables["embedding"], g.manifest.retrievers[0]
        self.is_excluded = np.zeros(g.n_items, np.bool_)  # marked and cleared again: half of any search for them
        weight = dict(zip(g.pre_ranker.names, g.pre_ranker.weights, strict=True))
        self.w_score = weight.get("retrieval_score", np.float32(0))
        self.columns = [(_column(g, name), w) for name, w in weight.items() if name.startswith("item.")]
        self.of_history = tuple(name for name in weight if name.partition(".")[0] in HISTORY_FEATURES)
        self.w_history = np.array([weight[name] for name in self.of_history], np.float32)
        # What remains (bias, fields of the request, the length of its history) is the same for every candidate.

    def answer(self, asked: Asked, lap: Callable[[], None] = lambda: None) -> tuple[Rows, F32]:
        """The best k and their scores, best first. `lap` is called before the first part and after each."""
        lap()
        user = self.user_tower(asked)
        lap()
        found = self.index(asked, user)
        lap()
        kept = self.prerank(asked, found)
        lap()
        scores = self.rerank(asked, user, kept)
        lap()
        rows, scores = self.top_k(asked, kept, scores)
        lap()
        return rows, scores

    def user_tower(self, asked: Asked) -> F32:
        """f32[1, d]"""
        g = self.generation
        feeds = request_inputs(g.manifest.features.user_tower, g.tables, asked)  # type: ignore[arg-type]
        return np.asarray(g.user_tower.run(None, feeds)[0], np.float32).reshape(1, -1)

    def index(self, asked: Asked, user: F32) -> Found:
        """The nearest that aren't excluded, with exact scores, in any order."""
        g, width = self.generation, max(self.generation.manifest.funnel.retrieve, asked.width)
        n = min(g.n_items, int((width + len(asked.excluded)) * self.retriever.overfetch))
        (scores,), (rows,) = g.index.search(user, n, params=self._parameters(n))
        if len(rows) and rows[-1] < 0:  # fewer than were asked for
            scores, rows = scores[rows >= 0], rows[rows >= 0]
        if len(asked.excluded):
            self.is_excluded[asked.excluded] = True
            is_left = ~self.is_excluded.take(rows)
            self.is_excluded[asked.excluded] = False
            scores, rows = scores[is_left], rows[is_left]
        if self.retriever.kind in EXACT_KINDS:
            return Found(rows[:width], scores[:width], None)
        embeddings = np.asarray(self.embedding.take(rows, axis=0), np.float32)
        scores = embeddings @ user[0]
        if len(rows) <= width:
            return Found(rows, scores, (embeddings, np.arange(len(rows))))
        at = np.argpartition(-scores, width - 1)[:width]
        return Found(rows.take(at), scores.take(at), (embeddings, at))

    def prerank(self, asked: Asked, found: Found) -> Found:
        """The best by the linear sum, in any order.

        The logistic function wouldn't change which, unless sums are beyond 17: float32 has no probability between
        theirs and 1, and a funnel that goes by row among such items is told apart when answers are compared.
        """
        logits = found.retrieval_scores * self.w_score
        for column, w in self.columns:
            logits += w * column(found.rows)
        if self.of_history:
            given = Inputs(self.generation.tables, asked, found, {})  # type: ignore[arg-type]
            logits += named_features(self.of_history, given) @ self.w_history
        if len(found) <= asked.width:
            return found
        return found.take(np.argpartition(-logits, asked.width - 1)[: asked.width])

    def rerank(self, asked: Asked, user: F32, kept: Found) -> F32:
        """f32[n]: the deep model on all of them in one batch."""
        g, inputs = self.generation, self.generation.manifest.features.re_ranker
        feeds = request_inputs(inputs, g.tables, asked)  # type: ignore[arg-type]
        for i in inputs:
            if i.source in (Source.ITEM_EMBEDDING, Source.ITEM_TABLE):
                feeds[i.name] = self._of_items(i.table or "embedding", kept)
            elif i.source is Source.RETRIEVAL_SCORE:
                feeds[i.name] = kept.retrieval_scores
            elif i.source is Source.USER_EMBEDDING:
                feeds[i.name] = user
            elif i.source is Source.CANDIDATE:
                feeds[i.name] = i.filled(len(kept))
        return np.asarray(g.re_ranker.run(None, feeds)[0], np.float32).reshape(-1)

    def top_k(self, asked: Asked, kept: Found, scores: F32) -> tuple[Rows, F32]:
        """The best k, best first."""
        at = np.argpartition(-scores, asked.k - 1)[: asked.k] if asked.k < len(scores) else np.arange(len(scores))
        at = at[np.argsort(-scores[at])]
        return kept.rows[at], scores[at]

    def _of_items(self, table: str, kept: Found) -> NDArray[Any]:
        if table == "embedding" and kept.read:
            block, at = kept.read
            return block.take(at, axis=0)
        return read_rows(self.generation.tables, table, kept.rows)

    def _parameters(self, n: int) -> Any:
        search = self.retriever.search
        if self.retriever.kind == "flat":
            return None
        if self.retriever.kind == "hnsw":
            return faiss.SearchParametersHNSW(efSearch=max(search["efSearch"], n))
        return faiss.SearchParametersIVF(nprobe=search["nprobe"])


def _column(g: Generation, name: str) -> Callable[[Rows], NDArray[Any]]:
    """How "item.<table>" or "item.<table>.<j>" is read for some rows."""
    _, table, *column = name.split(".")
    values = g.tables[table]
    if column:
        j = int(column[0])
        return lambda rows: values[rows, j]
    return lambda rows: values.take(rows)


# ----------------------------------------------------------------------------------- who a request is for


def look_up(g: Generation, body: dict[str, Any]) -> Asked | str:
    """The request in rows and arrays, or why the kernels for it would be others."""
    for part in ("filters", "candidates"):
        if body.get(part):
            return f"has {part}"
    k, width = body.get("k") or g.manifest.funnel.k, body.get("rerank_count") or g.manifest.funnel.rerank
    if k > width:
        return "asks for more items than are re-ranked"
    user, users = body.get("user", {}), g.users
    row = int(users.ids.rows([user["id"]])[0]) if users and user.get("id") is not None else -1
    history = np.empty(0, np.int64)
    if user.get("history") is not None:
        history = g.ids.rows(user["history"])
    elif users and row >= 0 and users.history is not None:
        history = users.history[row].astype(np.int64)
    history = history[history >= 0]
    excluded = g.ids.rows(body.get("exclude", []))
    excluded = excluded[excluded >= 0]
    if g.manifest.funnel.exclude_history:
        excluded = np.concatenate([excluded, history])
    return Asked(history, _fields(g, body, row), excluded, width, k)


def _fields(g: Generation, body: dict[str, Any], row: int) -> dict[str, NDArray[Any]]:
    """What was sent, else what the user table has, else the default; a category is its number."""
    specs = g.manifest.features.fields
    fields = {key: spec.filled() for key, spec in specs.items()}
    for name, table in g.users.tables.items() if g.users and row >= 0 else ():
        if spec := specs.get(f"user.{name}"):
            fields[f"user.{name}"] = np.asarray(table[row], spec.dtype).reshape(1, *spec.shape)
    parts = {"user": body.get("user", {}).get("features", {}), "context": body.get("context", {})}
    parts["query"] = body.get("query", {})
    for key, value in ((f"{part}.{name}", v) for part, sent in parts.items() for name, v in sent.items()):
        spec = specs[key]
        known = g.vocab[key].get(value, spec.default) if isinstance(value, str) else value
        fields[key] = np.asarray(known, spec.dtype).reshape(1, *spec.shape)
    return fields


# ------------------------------------------------------------------------------------------------ the loop


def hot(kernels: Kernels, requests: Iterator[Asked], seconds: float) -> dict[str, Any]:
    """Requests back to back."""

    def arrivals() -> Iterator[None]:
        end = time.perf_counter() + seconds
        yield  # one at least
        while time.perf_counter() < end:
            yield

    return _timed(kernels, requests, arrivals())


def paced(kernels: Kernels, requests: Iterator[Asked], rate: float, n: int) -> dict[str, Any]:
    """n requests at instants 1 / rate apart, the core idle in between; one that is late begins at once."""

    def arrivals() -> Iterator[None]:
        start = time.perf_counter()
        for i in range(n):
            time.sleep(max(0.0, start + i / rate - time.perf_counter()))
            yield

    return _timed(kernels, requests, arrivals())


def _timed(kernels: Kernels, requests: Iterator[Asked], arrivals: Iterator[None]) -> dict[str, Any]:
    """What requests took: CPU as a mean, as a service's is taken; wall as a median, from waking up to the answer.

    cpu_ms is the whole process's, so that a thread which a library starts would be in it; its parts are this thread's.
    """
    laps, began = Laps(), time.process_time()
    for _ in arrivals:
        kernels.answer(next(requests), laps)
    used_s = time.process_time() - began
    cpu, wall = laps.parts(laps.cpu), laps.parts(laps.wall)
    return {
        "n": len(cpu),
        "cpu_ms": used_s / len(cpu) * 1e3,
        "p50_ms": float(np.median(wall.sum(axis=1))) * 1e3,
        "cpu_parts_ms": dict(zip(PARTS, (cpu.mean(axis=0) * 1e3).tolist(), strict=True)),
        "p50_parts_ms": dict(zip(PARTS, (np.median(wall, axis=0) * 1e3).tolist(), strict=True)),
    }


def full_answer(kernels: Kernels, asked: Asked) -> dict[str, Any]:
    """All that is re-ranked, best first: external ids and scores; and how many of it were asked for."""
    rows, scores = kernels.answer(replace(asked, k=asked.width))
    return {"ids": kernels.generation.ids.external(rows), "scores": scores.tolist(), "k": asked.k}


def opened(bundle: Path) -> Kernels:
    """The kernels over the bundle in this directory, for a process of its own."""
    return Kernels(load(bundle))


def main(arguments: Sequence[str], questions: TextIO, answers: TextIO) -> int:
    """The process: BUNDLE, then a line of requests, then questions until there are none. Returns the exit code."""
    generation = load(Path(arguments[0]))
    if generation.once or any(name.startswith(HOISTED) for name in generation.tables):
        print(f"{arguments[0]}: its re-ranker is cut; --kernels-of names the bundle it was made from", file=sys.stderr)
        return 2
    kernels = Kernels(generation)
    pool = [look_up(kernels.generation, body) for body in json.loads(questions.readline())]
    usable = [asked for asked in pool if isinstance(asked, Asked)]
    requests = itertools.cycle(usable)
    for _ in range(WARM_UP if usable else 0):
        kernels.answer(next(requests))
    gc.collect()
    gc.freeze()
    gc.disable()  # as in the generator: a collection is no kernel

    def say(answer: Any) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    say([asked if isinstance(asked, str) else "" for asked in pool])
    for line in questions:
        what, *given = json.loads(line)
        if what == "hot":
            say(hot(kernels, requests, *given))
        elif what == "paced":
            say(paced(kernels, requests, *given))
        else:
            say(full_answer(kernels, usable[given[0]]))
        gc.collect()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], sys.stdin, sys.stdout))
