"""Which cut of a re-ranker pays on this machine, and the files that it makes.

    graph ─▶ every way of hoist.py ─▶ same scores? ─▶ timed in turns on sample requests ─▶ the fastest, or none
          ─▶ re_ranker.onnx, re_ranker_once.onnx, items/hoisted_<n>.npy, and a schema that binds them

A way is taken when it saves more than a measurement errs by. Why the others aren't is said, in one line each.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from app.bundle import HOISTED, ITEMS, ONCE, Generation, open_session
from app.features import Inputs, ModelInput, Source, item_inputs
from app.flow import Candidates, Person
from models import hoist

Array = NDArray[Any]
Feeds = Mapping[str, Array]
Say = Callable[[str], None]

RE_RANKER = "re_ranker.onnx"
SAME = 1e-4  # of the largest score, or of 1 where all are smaller
PAYS, PAYS_S = 0.97, 1e-4  # of the whole graph's time at most, and so many seconds less
ROUNDS = 15  # of timing: each way on each trial in turn
BLOCK = 8_192  # items whose tables are made at a time
FEW = (1, 7)  # rows on which scores are compared as well
WAYS = ((False, False), (True, False), (False, True), (True, True))  # is_folded, has_tables


@dataclass(frozen=True, slots=True)
class Trial:
    """A sample request: its rows in the catalogue, and the inputs of the whole graph for them."""

    rows: NDArray[np.int64]
    feeds: Feeds


class _Way:
    """One cut, ready to be run: `once`, then `rest`; what the item decides is known."""

    def __init__(self, parts: hoist.Parts, what: str) -> None:
        self.parts, self.what = parts, what
        self.rest = _Session(parts.rest)
        self.once = _Session(parts.once) if parts.once else None
        self.item = _Session(parts.item) if parts.item else None

    def known(self, feeds: Feeds) -> Feeds:
        """The inputs, with the rows of the tables."""
        return {**feeds, **self.item(feeds)} if self.item else feeds

    def __call__(self, known: Feeds) -> Array:
        once = self.once(known) if self.once else {}
        return next(iter(self.rest({**known, **once}).values())).reshape(-1)


class _Session:
    """A graph that takes what it wants of what it is given."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.session = open_session(model.SerializeToString(deterministic=True), RE_RANKER)
        self.reads = [i.name for i in self.session.get_inputs()]
        self.makes = [o.name for o in self.session.get_outputs()]

    def __call__(self, feeds: Feeds) -> dict[str, Array]:
        outputs = self.session.run(None, {name: feeds[name] for name in self.reads})
        return dict(zip(self.makes, outputs, strict=True))


def cut_where_it_pays(
    generation: Generation, model: onnx.ModelProto, trials: Sequence[Trial], say: Say
) -> tuple[Generation, dict[str, onnx.ModelProto]]:
    """The generation with the re-ranker in parts, its tables written, and the graphs by file; or all as it was."""
    whole = _Way(hoist.Parts(model, None, None, ()), "whole")
    ways, refused = [whole], dict[str, str]()
    for is_folded, has_tables in WAYS:
        what = "cut" + ", first layer folded" * is_folded + ", with a table of items" * has_tables
        try:
            given = model, reads(generation), trials[0].feeds
            way = _tried(hoist.cut(*given, is_folded=is_folded, has_tables=has_tables), what)
            _compare(whole, way, generation, trials)
        except hoist.Whole as e:
            refused[str(e)] = what
        else:
            ways.append(way)
    if len(ways) == 1:
        say(f"re-ranker: served whole: {'; '.join(refused)}")
        return generation, {RE_RANKER: model}
    for why, what in refused.items():
        if not why.startswith("no "):  # who has nothing to cut there isn't refused anything
            say(f"re-ranker: not {what}: {why}")
    took = _timed(ways, trials, generation)
    best = min(ways, key=lambda way: took[way.what])
    said = ", ".join(f"{seconds * 1e3:.2f} ms {what}" for what, seconds in took.items())
    n = len(trials[0].rows)
    if took[best.what] > min(PAYS * took[whole.what], took[whole.what] - PAYS_S):
        say(f"re-ranker: served whole; {n} rows take {said}")
        return generation, {RE_RANKER: model}
    say(f"re-ranker: served {best.what}; {n} rows take {said}")
    return _with(generation, best, say)


def reads(generation: Generation) -> hoist.Reads:
    """Which inputs of the re-ranker belong to the request, and which to rows of the catalogue."""
    request, item, others = list[str](), list[str](), list[str]()
    for i in generation.manifest.features.re_ranker:
        is_item = i.source in (Source.ITEM_TABLE, Source.ITEM_EMBEDDING)
        to = request if i.per == "request" else item if is_item else others
        to += [i.name, i.mask] if i.mask else [i.name]
    return hoist.Reads(tuple(request), tuple(item), tuple(others))


def _tried(parts: hoist.Parts, what: str) -> _Way:
    """Raises Whole where the runtime doesn't take the parts."""
    try:
        return _Way(parts, what)
    except Exception as e:  # onnxruntime's exceptions have no root of their own
        raise hoist.Whole(f"its parts don't open ({_first_line(e)})") from e


def _compare(whole: _Way, way: _Way, generation: Generation, trials: Sequence[Trial]) -> None:
    """Raises Whole where scores differ, or where the schema can't bind what is read."""
    _schema(generation, way)
    per_row = {*reads(generation).item, *reads(generation).others}
    for trial in trials:
        for n in (*FEW, len(trial.rows)):
            feeds = {name: array[:n] if name in per_row else array for name, array in trial.feeds.items()}
            expected = whole(feeds)
            try:
                scores = way(way.known(feeds))
            except Exception as e:
                raise hoist.Whole(f"its parts don't run ({_first_line(e)})") from e
            allowed = SAME * max(1.0, float(np.abs(expected).max()))
            difference = float(np.abs(scores - expected).max()) if scores.shape == expected.shape else np.inf
            if not difference <= allowed:
                raise hoist.Whole(f"its scores would differ by {difference:.2g}; allowed is {allowed:.2g}")


def _timed(ways: Sequence[_Way], trials: Sequence[Trial], generation: Generation) -> dict[str, float]:
    """Median seconds of a request by way: each in turn. A table's rows are gathered as the embedding's are."""
    embedding = generation.tables["embedding"]
    known = [[way.known(trial.feeds) for trial in trials] for way in ways]
    took: dict[str, list[float]] = {way.what: [] for way in ways}
    for _ in range(ROUNDS):
        for at, trial in enumerate(trials):
            for way, given in zip(ways, known, strict=True):
                started = time.perf_counter()
                for _ in way.parts.tables:
                    np.asarray(embedding.take(trial.rows, axis=0), np.float32)
                way(given[at])
                took[way.what].append(time.perf_counter() - started)
    return {what: float(np.median(seconds)) for what, seconds in took.items()}


# ------------------------------------------------------------------------------------------ the winner


def _with(generation: Generation, way: _Way, say: Say) -> tuple[Generation, dict[str, onnx.ModelProto]]:
    schema = _schema(generation, way)
    tables = dict(generation.tables)
    for number, name in enumerate(way.parts.tables):
        file = generation.path / ITEMS / f"{_table(number)}.npy"
        tables[_table(number)] = _write(file, generation, way, name)
        say(f"re-ranker: items/{file.name}, {tables[_table(number)].nbytes / 1e6:,.0f} MB")
    features = generation.manifest.features.model_copy(update={"re_ranker": schema})
    features.__dict__.pop("fields", None)  # cached for the schema as it was
    features.__dict__.pop("of_request", None)
    models = {RE_RANKER: way.parts.rest} | ({ONCE: way.parts.once} if way.parts.once else {})
    changed = replace(
        generation,
        manifest=generation.manifest.model_copy(update={"features": features}),
        tables=tables,
        re_ranker=way.rest.session,
        once=way.once.session if way.once else None,
    )
    return changed, models


def _schema(generation: Generation, way: _Way) -> tuple[ModelInput, ...]:
    """What the parts read. Raises Whole where a mask would be read without its history, or the other way round."""
    wanted = {name for part in (way.once, way.rest) if part for name in part.reads}
    inputs = []
    for i in generation.manifest.features.re_ranker:
        is_read = [name in wanted for name in (i.name, i.mask) if name]
        if len(set(is_read)) > 1:
            raise hoist.Whole(f"{i.name} and {i.mask} would be in different parts")
        if is_read[0]:
            inputs.append(i)
    of_tables = {name: _table(number) for number, name in enumerate(way.parts.tables)}
    return (*inputs, *(ModelInput(name=n, source=Source.ITEM_TABLE, table=t) for n, t in of_tables.items()))


def _table(number: int) -> str:
    return f"{HOISTED}{number}"


def _write(file: Path, generation: Generation, way: _Way, name: str) -> Array:
    """One table, f32[N, ...], in blocks. Returns it as a memory map."""
    assert way.item is not None
    inputs, n = generation.manifest.features.re_ranker, generation.n_items
    inputs = tuple(i for i in inputs if i.name in way.item.reads)
    written: Array | None = None
    for start in range(0, n, BLOCK):
        rows = np.arange(start, min(start + BLOCK, n))
        nothing = np.zeros(len(rows), np.float32)
        items = Candidates(rows, nothing, nothing.astype(np.uint32), np.zeros(generation.d, np.float32))
        nobody = Person(np.empty(0, np.int64), {})
        values = way.item(item_inputs(inputs, Inputs(generation.tables, nobody, items, {})))[name]
        if written is None:
            written = open_memmap(file, "w+", np.float32, (n, *values.shape[1:]))
        written[start : start + len(rows)] = values
    assert written is not None
    written.flush()
    return np.asarray(np.load(file, mmap_mode="r"))


def _first_line(e: Exception) -> str:
    return f"{str(e).strip().splitlines()[0]:.300}"
