"""Which cut of a re-ranker pays on this machine, and the files that it makes.

    graph ─▶ every way of graph_parts.py ─▶ same scores? ─▶ timed in turns on sample requests ─▶ the fastest, or none
          ─▶ re_ranker.onnx, re_ranker_once.onnx, items/hoisted_<n>.npy, and a schema that binds them

A way is taken when it saves more than a measurement errs by. What was refused, and why, is said.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import numpy as np
import onnx
from numpy.lib.format import write_array_header_1_0
from numpy.typing import NDArray

from app.bundle import HOISTED, ITEMS, ONCE, Generation, mapped, open_session
from app.features import Inputs, ModelInput, Source, item_inputs, read_rows
from app.flow import Candidates, Person, Rows
from models import graph_parts
from models.graph import TOLERANCE
from models.pack_config import PackError
from models.pack_files import AT_ONCE

Array = NDArray[Any]
Feeds = Mapping[str, Array]
Say = Callable[[str], None]

RE_RANKER = "re_ranker.onnx"
# Of the whole graph's time at most, and so many seconds less: what may be noise, or is too little to be worth a second
# graph, isn't taken.
PAYS, PAYS_S = 0.97, 1e-4
ROUNDS, LONGEST_S = 15, 10.0  # of timing, each way on each trial in turn; or fewer, when they take longer
FEW = (2, 7)  # rows on which scores are compared as well; a trial has more
MOST_BYTES = 2  # tables may take so many times what the embeddings take
BLOCK = 8_192  # items whose tables are made at a time
WAYS = ((False, False), (True, False), (False, True), (True, True))  # is_folded, has_tables


@dataclass(frozen=True, slots=True)
class Trial:
    """A sample request: its rows in the catalogue, and the inputs of the whole graph for them."""

    rows: Rows
    feeds: Feeds


class _Session:
    """A graph that takes what it wants of what it is given."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.session = open_session(model.SerializeToString(deterministic=True), RE_RANKER)
        self.reads = [i.name for i in self.session.get_inputs()]
        self.makes = [o.name for o in self.session.get_outputs()]

    def __call__(self, feeds: Feeds) -> dict[str, Array]:
        outputs = self.session.run(None, {name: feeds[name] for name in self.reads})
        return dict(zip(self.makes, outputs, strict=True))


class Way:
    """One cut, ready to be run: `once`, then `rest`; what the item decides is known."""

    def __init__(self, parts: graph_parts.Parts, what: str) -> None:
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


def cut_where_it_pays(
    generation: Generation, model: onnx.ModelProto, trials: Sequence[Trial], say: Say
) -> tuple[Generation, dict[str, onnx.ModelProto]]:
    """The generation with the re-ranker in parts, its tables written, and the graphs by file; or all as it was."""
    whole = Way(graph_parts.Parts(model, None, None, ()), "whole")
    ways, nothing = [whole], dict[str, None]()
    for is_folded, has_tables in WAYS:
        what = name_of(is_folded=is_folded, has_tables=has_tables)
        try:
            ways.append(_made(generation, model, trials, is_folded=is_folded, has_tables=has_tables))
            _compare(whole, ways[-1], generation, trials)
        except graph_parts.NothingToCut as e:
            nothing[str(e)] = None
        except graph_parts.Whole as e:
            ways = [way for way in ways if way.what != what]
            say(f"re-ranker: not {what}: {e}")
    if len(ways) == 1:
        say("re-ranker: served whole" + "".join(f"; {why}" for why in nothing))
        return generation, {RE_RANKER: model}
    took = timed(ways, trials, generation)
    best = min(ways, key=lambda way: took[way.what])
    if took[best.what] > min(PAYS * took["whole"], took["whole"] - PAYS_S):
        best = whole
    said = ", ".join(f"{seconds * 1e3:.2f} ms {what}" for what, seconds in took.items())
    say(f"re-ranker: served {best.what}; {len(trials[0].rows)} rows take {said}")
    return _with(generation, best, trials, say) if best is not whole else (generation, {RE_RANKER: model})


def name_of(*, is_folded: bool, has_tables: bool) -> str:
    """What a way is called."""
    return "cut" + (", first layer folded" if is_folded else "") + (", with a table of items" if has_tables else "")


def reads(generation: Generation) -> graph_parts.Reads:
    """Which inputs of the re-ranker belong to the request, and which to rows of the catalogue."""
    request, item, others = list[str](), list[str](), list[str]()
    for i in generation.manifest.features.re_ranker:
        is_item = i.source in (Source.ITEM_TABLE, Source.ITEM_EMBEDDING)
        to = request if i.per == "request" else item if is_item else others
        to += [i.name, i.mask] if i.mask else [i.name]
    return graph_parts.Reads(tuple(request), tuple(item), tuple(others))


def _made(
    generation: Generation, model: onnx.ModelProto, trials: Sequence[Trial], *, is_folded: bool, has_tables: bool
) -> Way:
    """One way. Raises Whole, also where the runtime doesn't take the parts or the schema can't bind them."""
    try:
        parts = graph_parts.cut(model, reads(generation), trials[0].feeds, is_folded=is_folded, has_tables=has_tables)
        way = Way(parts, name_of(is_folded=is_folded, has_tables=has_tables))
    except graph_parts.Whole:
        raise
    except Exception as e:  # neither onnx's nor onnxruntime's exceptions have a root
        raise graph_parts.Whole(f"its parts can't be made ({_first_line(e)})") from e
    _schema(generation, way)
    per_item = [4 * int(np.prod([d.dim_value for d in o.type.tensor_type.shape.dim[1:]])) for o in _tables_of(way)]
    allowed = MOST_BYTES * generation.tables["embedding"].nbytes
    if sum(per_item) * generation.n_items > allowed:
        takes = f"{sum(per_item) * generation.n_items / 1e6:,.0f} MB; allowed are {allowed / 1e6:,.0f}"
        raise graph_parts.Whole(f"its tables would take {takes}")
    return way


def _tables_of(way: Way) -> Sequence[onnx.ValueInfoProto]:
    return [i for i in way.parts.rest.graph.input if i.name in way.parts.tables]


def _compare(whole: Way, way: Way, generation: Generation, trials: Sequence[Trial]) -> None:
    """Raises Whole where scores differ by more than they may with the batch they are in."""
    per_row = {*reads(generation).item, *reads(generation).others}
    for trial in trials:
        for n in (*FEW, len(trial.rows)):
            feeds = {name: array[:n] if name in per_row else array for name, array in trial.feeds.items()}
            expected = whole(feeds)
            try:
                scores = way(way.known(feeds))
            except Exception as e:  # onnxruntime's exceptions have no root of their own
                raise graph_parts.Whole(f"its parts don't run ({_first_line(e)})") from e
            allowed = TOLERANCE * float(np.abs(expected).max())
            difference = float(np.abs(scores - expected).max()) if scores.shape == expected.shape else np.inf
            if not difference <= allowed:
                raise graph_parts.Whole(f"its scores would differ by {difference:.2g}; allowed is {allowed:.2g}")


def timed(ways: Sequence[Way], trials: Sequence[Trial], generation: Generation) -> dict[str, float]:
    """Median seconds of a request by way, in turns, with the rows gathered that each reads.

    Tables that aren't there yet are gathered as the embedding's rows are.
    """
    known = [[way.known(trial.feeds) for trial in trials] for way in ways]
    gathered = [_gathered(way, generation) for way in ways]
    took: dict[str, list[float]] = {way.what: [] for way in ways}
    began = time.perf_counter()
    for _ in range(ROUNDS):
        for at, trial in enumerate(trials):
            for way, tables, given in zip(ways, gathered, known, strict=True):
                started = time.perf_counter()
                for table in tables:
                    read_rows(generation.tables, table, trial.rows)
                way(given[at])
                took[way.what].append(time.perf_counter() - started)
        if time.perf_counter() - began > LONGEST_S:
            break
    return {what: float(np.median(seconds)) for what, seconds in took.items()}


def _gathered(way: Way, generation: Generation) -> list[str]:
    inputs = generation.manifest.features.re_ranker
    of_items = [i.table or "embedding" for i in inputs if i.per == "item" and i.name in way.rest.reads]
    return [table for table in of_items if table in generation.tables] + ["embedding"] * len(way.parts.tables)


# ------------------------------------------------------------------------------------------ the winner


def _with(
    generation: Generation, way: Way, trials: Sequence[Trial], say: Say
) -> tuple[Generation, dict[str, onnx.ModelProto]]:
    features = generation.manifest.features.model_copy(update={"re_ranker": _schema(generation, way)})
    for cached in ("fields", "of_request"):  # for the schema as it was
        features.__dict__.pop(cached, None)
    tables = _write(generation, way) if way.item else {}
    for name, table in tables.items():
        say(f"re-ranker: items/{name}.npy, {table.nbytes / 1e6:,.0f} MB")
    for trial in trials if way.item else ():
        made = way.item(trial.feeds) if way.item else {}
        for name, table in zip(way.parts.tables, tables.values(), strict=True):
            if not np.allclose(made[name], table[trial.rows], rtol=1e-4, atol=1e-5):
                raise PackError(
                    f"re_ranker.onnx: {name}, made for the whole catalogue, isn't what it is for some items"
                )
    changed = replace(
        generation,
        manifest=generation.manifest.model_copy(update={"features": features}),
        tables=generation.tables | tables,
        re_ranker=way.rest.session,
        once=way.once.session if way.once else None,
    )
    return changed, {RE_RANKER: way.parts.rest} | ({ONCE: way.parts.once} if way.parts.once else {})


def _schema(generation: Generation, way: Way) -> tuple[ModelInput, ...]:
    """What the parts read. Raises Whole where that can't be said, or where a request's field would be forgotten."""
    wanted = {name for part in (way.once, way.rest) if part for name in part.reads}
    inputs = []
    for i in generation.manifest.features.re_ranker:
        is_read = [name in wanted for name in (i.name, i.mask) if name]
        if len(set(is_read)) > 1 or (i.field and not is_read[0]):
            raise graph_parts.Whole(f"{i.name} would be read no more, or without its mask")
        if is_read[0]:
            inputs.append(i)
    of_tables = {name: f"{HOISTED}{number}" for number, name in enumerate(way.parts.tables)}
    return (*inputs, *(ModelInput(name=n, source=Source.ITEM_TABLE, table=t) for n, t in of_tables.items()))


def _write(generation: Generation, way: Way) -> dict[str, Array]:
    """The tables, each f32[N, ...], made in blocks of items. Returns memory maps by name."""
    inputs = tuple(i for i in generation.manifest.features.re_ranker if way.item and i.name in way.item.reads)
    nobody, n, written = Person(np.empty(0, np.int64), {}), generation.n_items, dict[str, BinaryIO]()
    with ExitStack() as opened:
        for start in range(0, n, BLOCK):
            rows = np.arange(start, min(start + BLOCK, n))
            nothing = np.zeros(len(rows), np.float32)
            items = Candidates(rows, nothing, nothing.astype(np.uint32), np.zeros(generation.d, np.float32))
            made = way.item(item_inputs(inputs, Inputs(generation.tables, nobody, items, {}))) if way.item else {}
            for number, name in enumerate(way.parts.tables):
                table, block = f"{HOISTED}{number}", np.ascontiguousarray(made[name], "<f4")
                if table not in written:
                    file = (generation.path / ITEMS / f"{table}.npy").open("wb", buffering=AT_ONCE)
                    written[table] = opened.enter_context(file)
                    form = {"descr": "<f4", "fortran_order": False, "shape": (n, *block.shape[1:])}
                    write_array_header_1_0(file, form)
                written[table].write(block.data)
    return {table: mapped(generation.path / ITEMS / f"{table}.npy") for table in written}


def _first_line(e: Exception) -> str:
    return f"{(str(e).strip() or type(e).__name__).splitlines()[0]:.300}"
