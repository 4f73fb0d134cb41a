"""Bundles: what is loaded, and that its parts fit each other.

A bundle is a directory with everything that one version of the funnel needs; docs/bundle.md goes through its
files. Loading believes nothing: files are verified first (manifest.py), models are made from the very bytes that were
hashed, and shapes are checked against the models (binding.py). Each refusal is one sentence that names the file
(`BundleError`).

A `Generation` is what is loaded and verified; warmup.py proves it on its golden requests before it serves.
This module is long because the checks belong beside the loading that they guard.
"""

import hashlib
import math
import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated

import faiss
import numpy as np
import onnxruntime as ort
from pydantic import Field, TypeAdapter

from app.binding import check_graph, check_names, sample
from app.errors import StageFailed, require
from app.features import FeatureSchema, Tables
from app.flow import F32, Array, Arrays, Live, Mask, Rows, sealed
from app.manifest import INDEX_CLASSES, MANIFEST, UNFORESEEN, UNREADABLE, Manifest, opening, read_manifest, verify_files

ITEMS, USERS, VOCAB = "items", "users", "vocab"
ONCE, HOISTED = "re_ranker_once.onnx", "hoisted_"  # what `pack` took out of the re-ranker; its tables
Id = int | str  # external, as in ids.npy
NO_ROW = -1  # pads lists of rows
# vocab/<name>.json: numbers that a field of either type holds
VOCABULARY = TypeAdapter(dict[str, Annotated[int, Field(ge=-(2**53), le=2**53)]])

faiss.omp_set_num_threads(1)  # one request, one core: parallelism is over requests and shards


class Ids:
    """External ids by row, and rows by external id (binary search in a stored order).

    `order` has the rows that were loaded. added: rows of the ids that were added since, which come first.
    """

    def __init__(self, ids: Array, order: Array) -> None:
        self.ids, self.order = ids, order
        self.loaded, self.added = ids[: len(order)], dict[Id, int]()
        self.is_text = ids.dtype.kind == "U"
        limits = None if self.is_text else np.iinfo(ids.dtype)
        self.low, self.high = (int(limits.min), int(limits.max)) if limits else (0, 0)

    def __len__(self) -> int:
        return len(self.loaded)

    def fits(self, wanted: Sequence[Id]) -> Mask:
        """bool[len(wanted)]: whether the table's type can hold them; ten thousand take a millisecond."""
        if self.is_text:  # numpy drops trailing NULs from text
            width = self.ids.dtype.itemsize // 4
            return np.array([isinstance(w, str) and len(w) <= width and "\0" not in w for w in wanted], np.bool_)
        # A bool is an int, and no id.
        return np.array([type(w) is int and self.low <= w <= self.high for w in wanted], np.bool_)

    def rows(self, wanted: Sequence[Id]) -> Rows:
        """i64[len(wanted)]; -1 for an id that isn't here (another type, too large, unknown)."""
        if not wanted:
            return np.empty(0, np.int64)
        fits = self.fits(wanted)
        blank: Id = "" if self.is_text else 0
        known = wanted if fits.all() else [w if fit else blank for w, fit in zip(wanted, fits, strict=True)]
        keys = np.array(known, self.ids.dtype)  # in the table's own type: for another, all ids would be converted
        at = np.minimum(np.searchsorted(self.loaded, keys, sorter=self.order), len(self.loaded) - 1)
        rows = np.asarray(self.order[at], np.int64)
        found = np.where((self.loaded[rows] == keys) & fits, rows, NO_ROW)
        for i, one in enumerate(wanted) if self.added else ():
            found[i] = self.added.get(one, found[i]) if fits[i] else NO_ROW
        return found

    def external(self, rows: Rows) -> list[Id]:
        """The external ids of these rows."""
        return self.ids[rows].tolist()  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class Users:
    """The bundle's user table: ids, tables by field name [U, ...], histories i32[U, h] padded with -1."""

    ids: Ids
    tables: Tables
    history: Array | None


@dataclass(frozen=True, slots=True)
class PreRanker:
    """score = logistic(bias + features · weights); f32[F] weights by feature name."""

    names: tuple[str, ...]
    weights: F32
    bias: np.float32


@dataclass(slots=True)
class Room:
    """What can be written behind each item table, [room, ...], and what came of the catalogue so far."""

    tables: Mapping[str, Array] = field(default_factory=dict)
    live: Live = field(default_factory=Live)


@dataclass(frozen=True)
class Generation:
    """A verified bundle in memory. digest: SHA-256 of manifest.json, which holds that of every file."""

    path: Path
    digest: str
    manifest: Manifest
    ids: Ids
    tables: Tables
    vocab: Mapping[str, Mapping[str, int]]
    users: Users | None
    popular: Array
    index: faiss.Index
    user_tower: ort.InferenceSession
    re_ranker: ort.InferenceSession
    pre_ranker: PreRanker
    once: ort.InferenceSession | None = None  # makes some inputs of the re-ranker, once a request
    room: Room = field(default_factory=Room)

    @property
    def live(self) -> Live:
        """The catalogue's present epoch. Whoever needs it twice keeps it."""
        return self.room.live

    @property
    def name(self) -> str:
        """What answers call this generation: name, version and twelve digits of its digest."""
        return f"{self.manifest.name}@{self.manifest.version}#{self.digest[:12]}"

    @property
    def n_items(self) -> int:
        return len(self.ids) + self.live.n_added

    @property
    def d(self) -> int:
        return int(self.tables["embedding"].shape[1])

    @cached_property
    def filterable(self) -> tuple[str, ...]:
        """Item tables that a filter may name: a number a row, or one or a few categories."""
        kinds = {1: "iuf", 2: "iu"}  # by axes
        numbers = {n for n, t in self.tables.items() if t.dtype.kind in kinds.get(t.ndim, "")}
        return tuple(n for n in self.tables if n in numbers and not n.startswith(HOISTED))


def run_model(session: ort.InferenceSession, feeds: Arrays, options: ort.RunOptions | None = None) -> Array:
    """The first output of the graph. Raises StageFailed for whatever the runtime raises."""
    return next(iter(run_graph(session, feeds, options).values()))


def run_graph(session: ort.InferenceSession, feeds: Arrays, options: ort.RunOptions | None = None) -> dict[str, Array]:
    """The graph's outputs by name, in order; it takes what it reads. Raises StageFailed for whatever is raised."""
    try:
        reads = {i.name: feeds[i.name] for i in session.get_inputs()}
        return {o.name: a for o, a in zip(session.get_outputs(), session.run(None, reads, options), strict=True)}
    except Exception as e:  # onnxruntime's exceptions have no root of their own
        raise StageFailed(f"model: {e}") from e


def open_session(model: bytes, name: str) -> ort.InferenceSession:
    """A session on one thread: parallelism is over shards. Raises BundleError if it isn't a usable graph.

    A graph made from bytes may still ask for weights in other files: onnxruntime 1.32 then reads them, unhashed,
    below the working directory. It is told to look in what is no directory, where there are none.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
    options.log_severity_level = 3
    with opening(name, "not a graph that onnxruntime opens"):
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


# ------------------------------------------------------------------------------------------ loading


@opening(MANIFEST, "what it lists can't be loaded", UNFORESEEN)
def load(path: Path, digest: str | None = None, *, is_verified: bool = False) -> Generation:
    """Verify the bundle and open it; tables and indexes stay on disk as memory maps where they can.

    Args:
        digest: the manifest's SHA-256, when it is known from outside.
        is_verified: another process has just loaded the same files; only the models are hashed again.
    Raises: BundleError, one sentence that names the file.
    """
    manifest, found = read_manifest(path, digest)
    path = path.resolve()  # workers find it again, though a link that led here is switched
    if not is_verified:
        verify_files(path, manifest)
    generation = Generation(
        path=path,
        digest=found,
        manifest=manifest,
        ids=_ids(path / ITEMS, is_verified=is_verified),
        tables=_tables(path / ITEMS),
        vocab=_vocab(path / VOCAB),
        users=_users(path / USERS, is_verified=is_verified),
        popular=mapped(path / "popular.npy"),
        index=_index(path, manifest),
        user_tower=_session(path, manifest, manifest.retrievers[0].tower),
        re_ranker=_session(path, manifest, "re_ranker.onnx"),
        pre_ranker=_pre_ranker(path / "pre_ranker.npz"),
        once=_session(path, manifest, ONCE) if ONCE in manifest.files else None,
    )
    if not is_verified:
        check_shapes(generation)
    return generation


def mapped(file: Path) -> Array:
    """An array that stays on disk, read-only. Raises BundleError that names the file."""
    with opening(file.name, "not an array that numpy opens without pickle"):
        # A plain view of the map: gathering rows through numpy's memmap class takes several times as long.
        array = np.lib.format.open_memmap(file, mode="r")  # np.load would open an archive, too
        array._mmap.madvise(advice(array))  # type: ignore[attr-defined]
        return np.asarray(array)


def advice(table: Array) -> int:
    """For madvise(2): of wide rows that aren't in memory, each row's page is read, and not the megabytes around it.

    Those of under 16 bytes are read from end to end as well: by filters, and to prove ids unique.
    """
    return mmap.MADV_RANDOM if table.itemsize * math.prod(table.shape[1:]) >= 16 else mmap.MADV_NORMAL


def _tables(folder: Path) -> dict[str, Array]:
    return {f.stem: mapped(f) for f in sorted(folder.glob("*.npy")) if f.stem not in ("ids", "id_order")}


def _ids(folder: Path, *, is_verified: bool) -> Ids:
    ids, order, name = mapped(folder / "ids.npy"), mapped(folder / "id_order.npy"), f"{folder.name}/ids.npy"
    if is_verified:
        return Ids(ids, order)
    are_ids = ids.ndim == 1 and ids.dtype.kind in "iU" and len(ids) > 0
    require(are_ids, f"{name}: ids must be one axis of integers or fixed-width strings, not empty")
    are_rows = order.shape == ids.shape and order.dtype.kind == "i" and _are_rows(order, len(ids))
    require(are_rows, f"{folder.name}/id_order.npy: must hold each row of ids.npy once")
    ordered = ids[order]
    require(not np.any(ordered[1:] <= ordered[:-1]), f"{name}: ids are not unique, or id_order.npy is not their order")
    return Ids(ids, order)


def _vocab(folder: Path) -> dict[str, dict[str, int]]:
    vocab: dict[str, dict[str, int]] = {}
    for file in sorted(folder.glob("*.json")):
        with opening(f"vocab/{file.name}", "must be an object of category → number"):
            vocab[file.stem] = VOCABULARY.validate_json(file.read_bytes())
    return vocab


def _users(folder: Path, *, is_verified: bool) -> Users | None:
    if not folder.is_dir():
        return None
    tables = _tables(folder)
    return Users(_ids(folder, is_verified=is_verified), tables, tables.pop("history", None))


def _listed(path: Path, manifest: Manifest, name: str) -> Path:
    require(name in manifest.files, f"{name}: named by the manifest but not listed in its files")
    return path / name


def _index(path: Path, manifest: Manifest) -> faiss.Index:
    name, kind = manifest.retrievers[0].index, manifest.retrievers[0].kind
    file = _listed(path, manifest, name)
    with opening(name, "not an index that FAISS opens"):
        # Mapped: 5 ms where a copy of 70 MB takes 30 to 70 (2026-11). Inverted lists on disk name their file,
        # any, which FAISS would map to be written; with the second flag it refuses them.
        index = faiss.read_index(str(file), faiss.IO_FLAG_MMAP_IFC | faiss.IO_FLAG_ONDISK_SAME_DIR)
    found = type(index).__name__
    require(found.startswith(INDEX_CLASSES[kind.rstrip("48")]), f"{name}: is a FAISS {found}, the manifest says {kind}")
    return index


def _session(path: Path, manifest: Manifest, name: str) -> ort.InferenceSession:
    with opening(name, *UNREADABLE):
        model = _listed(path, manifest, name).read_bytes()
    is_whole = hashlib.sha256(model).hexdigest() == manifest.files[name].sha256
    require(is_whole, f"{name}: its SHA-256 is not the manifest's; it was changed")
    return open_session(model, name)


def _pre_ranker(file: Path) -> PreRanker:
    with opening(file.name, "must hold names, weights and bias"), np.load(file, allow_pickle=False) as data:
        names = tuple(str(n) for n in data["names"])
        weights, bias = np.asarray(data["weights"], np.float32), np.float32(data["bias"].item())
    fits = weights.shape == (len(names),) and np.isfinite([*weights, bias]).all()
    require(bool(fits), f"{file.name}: needs one finite weight a feature name and a finite bias")
    return PreRanker(names, sealed(weights), bias)


# ------------------------------------------------------------------------------------------- shapes


def check_shapes(g: Generation) -> None:
    """Tables, index and models fit each other and the manifest. Raises BundleError."""
    n, retriever = g.n_items, g.manifest.retrievers[0]
    embedding = g.tables.get("embedding")
    are_floats = embedding is not None and embedding.ndim == 2 and embedding.dtype.kind == "f"
    require(are_floats, "items/embedding.npy: must be there, floats of shape [items, d]")
    _check_tables(ITEMS, g.tables, n, "fiuU")
    is_whole = (g.index.ntotal, g.index.d, retriever.n) == (n, g.d, n)
    held = f"holds {g.index.ntotal} × {g.index.d}, items are {n} × {g.d}"
    require(is_whole, f"{retriever.index}: {held}, the manifest says {retriever.n} items")
    require(g.index.metric_type == faiss.METRIC_INNER_PRODUCT, f"{retriever.index}: its metric must be inner product")
    are_rows = g.popular.ndim == 1 and len(np.unique(g.popular)) == len(g.popular) and _are_rows(g.popular, n)
    require(are_rows, f"popular.npy: must be different rows from 0 to {n - 1}")
    if g.users:
        _check_users(g.users, n, g.manifest.features)
    is_same = g.pre_ranker.names == g.manifest.features.pre_ranker
    require(is_same, "pre_ranker.npz: its feature names are not those of the manifest's schema")
    given = sample(g.manifest.features, g.tables)
    graphs = [g.once, g.re_ranker] if g.once else [g.re_ranker]
    check_names(g.manifest.features.pre_ranker, given)
    check_graph(retriever.tower, g.manifest.features.user_tower, given, g.user_tower)
    check_graph("re_ranker.onnx", g.manifest.features.re_ranker, given, *graphs)


def _check_tables(folder: str, tables: Tables, n: int, kinds: str) -> None:
    for name, table in tables.items():
        fits = table.shape[:1] == (n,) and table.dtype.kind in kinds
        require(fits, f"{folder}/{name}.npy: is {table.dtype} {table.shape}, ids.npy has {n} rows")


def _are_rows(rows: Array, n: int, lowest: int = 0) -> bool:
    return bool(rows.dtype.kind in "iu" and (not rows.size or (rows.min() >= lowest and rows.max() < n)))


def _check_users(users: Users, n: int, features: FeatureSchema) -> None:
    history, n_users = users.history, len(users.ids)
    _check_tables(USERS, users.tables, n_users, "fiu")
    for name, table in users.tables.items():
        if spec := features.fields.get(f"user.{name}"):
            fits = math.prod(table.shape[1:]) == math.prod(spec.shape)
            require(fits, f"users/{name}.npy: is {table.shape}, the schema reads {spec.shape} a user")
    if history is not None:
        are_rows = history.ndim == 2 and len(history) == n_users and _are_rows(history, n, NO_ROW)
        require(are_rows, f"users/history.npy: must hold item rows (-1 pads) for {n_users} users")
