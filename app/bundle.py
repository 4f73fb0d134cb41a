"""Bundles: the contract between any trainer and the service. Manifest, verification, loading.

A bundle is a directory with everything that one version of the funnel needs; docs/bundle.md goes through its
files. Loading believes nothing: every file is in the manifest with its size and SHA-256, no file is there that
isn't, no link or path leaves the directory, models are made from the very bytes that were hashed, and shapes
are checked against the models. Each refusal is one sentence that names the file (`BundleError`).

A `Generation` is what is loaded and verified; warmup.py proves it on its golden requests before it serves.
This module is long because the checks belong beside the loading that they guard.
"""

import hashlib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import faiss
import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from pydantic import Field, RootModel, ValidationError, model_validator

from app.errors import BundleError, StageFailed
from app.features import HISTORY_FEATURES, ROW, FeatureSchema, ModelInput, Source, Strict, Tables, model_dtype
from app.flow import Rows, Scores, sealed

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
ITEMS, USERS, VOCAB = "items", "users", "vocab"
NO_ROW = -1  # pads lists of rows

faiss.omp_set_num_threads(1)  # one request, one core: parallelism is over requests and shards


# ------------------------------------------------------------------------------------------ manifest


class FileEntry(Strict):
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    size: int = Field(ge=0)


class Recall(Strict):
    """What the index reaches against exact search, measured by `pack` on sample requests."""

    target: float
    reached: float
    at: int
    n_queries: int


# kind → FAISS's name of the class (its beginning), and the parameters of a search
INDEX_KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "flat": ("IndexFlat", ()),
    "hnsw": ("IndexHNSW", ("efSearch",)),
    "ivf_sq8": ("IndexIVFScalarQuantizer", ("nprobe",)),
    "ivf_pq": ("IndexIVFPQ", ("nprobe",)),
}


class Retriever(Strict):
    """An index over the item embeddings and the tower that makes its queries.

    n: catalogue size. search: parameters of the index kind (nprobe, efSearch). overfetch: how many times
    the width is fetched before the exact re-scoring from the embedding table; 1 for exact indexes.
    """

    name: str
    kind: Literal["flat", "hnsw", "ivf_sq8", "ivf_pq"]
    tower: str = "user_tower.onnx"
    index: str = "index.faiss"
    n: int = Field(ge=1)
    search: dict[Literal["nprobe", "efSearch"], int] = Field(default_factory=dict)
    overfetch: float = Field(default=1.0, ge=1.0, allow_inf_nan=False)
    recall: Recall

    @model_validator(mode="after")
    def _has_its_parameters(self) -> "Retriever":
        needed = set(INDEX_KINDS[self.kind][1])
        if set(self.search) != needed or any(value < 1 for value in self.search.values()):
            raise ValueError(f"an index of kind {self.kind} has the parameters {needed or 'none'}, each 1 or more")
        return self


class Budgets(Strict):
    """By which share of the timeout each stage must have answered; see control/deadline.py."""

    retrieval: float = Field(default=0.4, gt=0, le=1)
    preranking: float = Field(default=0.55, gt=0, le=1)
    reranking: float = Field(default=0.98, gt=0, le=1)


class FunnelConfig(Strict):
    """Widths in candidates; k when a request names none."""

    retrieve: int = Field(default=500, ge=1, le=100_000)
    rerank: int = Field(default=100, ge=1, le=10_000)
    k: int = Field(default=10, ge=1, le=1_000)
    exclude_history: bool = False
    budgets: Budgets = Budgets()


class Knots(Strict):
    """A rising piecewise-linear function; beyond its ends it goes on with the slope of the end pieces."""

    x: tuple[float, ...] = Field(min_length=2)
    y: tuple[float, ...] = Field(min_length=2)

    @model_validator(mode="after")
    def _rises(self) -> "Knots":
        rises = len(self.x) == len(self.y) and np.all(np.diff(self.x) > 0) and np.all(np.diff(self.y) > 0)
        if not rises or not np.isfinite(self.x + self.y).all():
            raise ValueError("calibration knots must be as many x as y, finite and strictly rising")
        return self

    def __call__(self, scores: Scores) -> Scores:
        """f32[n] on this scale → f32[n] on the re-ranker's; keeps the order; NaN stays NaN."""
        x, y = np.asarray(self.x), np.asarray(self.y)
        at = np.clip(np.searchsorted(x, scores), 1, len(x) - 1)
        slope = (y[at] - y[at - 1]) / (x[at] - x[at - 1])
        return np.asarray(y[at - 1] + slope * (scores - x[at - 1]), np.float32)


class Calibration(Strict):
    """Earlier scores → the re-ranker's scale, fitted by `pack` on at least 200 sample requests.

    typical_retrieval_score: the median over what retrieval finds; stands in where the tower failed.
    """

    retrieval: Knots
    preranking: Knots
    typical_retrieval_score: float
    n_requests: int = Field(ge=1)


class _Vocab(RootModel[dict[str, int]]):
    """vocab/<name>.json."""


class Golden(Strict):
    """A request in wire form and what it must give, to 1e-4 of score."""

    request: dict[str, Any]
    items: tuple[int | str, ...]
    scores: tuple[float, ...]


class Manifest(Strict):
    """manifest.json. `offline_metrics` is whatever the trainer measured; shown, never interpreted."""

    format_version: Literal[1]
    name: str = Field(min_length=1, max_length=100)
    version: str = Field(min_length=1, max_length=100)
    created: str
    files: dict[str, FileEntry]
    retrievers: tuple[Retriever] = Field(description="format 1 has exactly one")
    funnel: FunnelConfig
    features: FeatureSchema
    calibration: Calibration
    offline_metrics: dict[str, Any] = Field(default_factory=dict)
    golden: tuple[Golden, ...] = ()


# ----------------------------------------------------------------------------------- what is loaded


class Ids:
    """External ids by row, and rows by external id (binary search in a stored order)."""

    def __init__(self, ids: NDArray[Any], order: NDArray[Any]) -> None:
        self.ids, self.order = ids, order
        self.is_text = ids.dtype.kind == "U"

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, wanted: Sequence[int | str]) -> Rows:
        """i64[len(wanted)]; -1 for an id that isn't here (another type, too large, unknown)."""
        fits = self._fits(wanted)
        if not fits.any():
            return np.full(len(wanted), NO_ROW, np.int64)
        blank: int | str = "" if self.is_text else 0
        known = wanted if fits.all() else [w if fit else blank for w, fit in zip(wanted, fits, strict=True)]
        keys = np.array(known, self.ids.dtype)  # in the table's own type: for another, all ids would be converted
        at = np.minimum(np.searchsorted(self.ids, keys, sorter=self.order), len(self.ids) - 1)
        rows = np.asarray(self.order[at], np.int64)
        return np.where((self.ids[rows] == keys) & fits, rows, NO_ROW)

    def _fits(self, wanted: Sequence[int | str]) -> NDArray[np.bool_]:
        """bool[n]: ids that the table's type can hold. Ten thousand take a millisecond."""
        if self.is_text:
            width = self.ids.dtype.itemsize // 4
            # numpy drops trailing NULs from text
            fits = [isinstance(w, str) and len(w) <= width and "\0" not in w for w in wanted]
        else:
            limits = np.iinfo(self.ids.dtype)
            low, high = int(limits.min), int(limits.max)
            fits = [type(w) is int and low <= w <= high for w in wanted]  # a bool is an int, and no id
        return np.array(fits, np.bool_)

    def external(self, rows: Rows) -> list[int | str]:
        """The external ids of these rows."""
        return self.ids[rows].tolist()  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class Users:
    """The bundle's user table: ids, tables by field name [U, ...], histories i32[U, h] padded with -1."""

    ids: Ids
    tables: Tables
    history: NDArray[Any] | None


@dataclass(frozen=True, slots=True)
class PreRanker:
    """score = logistic(bias + features · weights); f32[F] weights by feature name."""

    names: tuple[str, ...]
    weights: NDArray[np.float32]
    bias: np.float32


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
    popular: Rows
    index: faiss.Index
    user_tower: ort.InferenceSession
    re_ranker: ort.InferenceSession
    pre_ranker: PreRanker

    @property
    def name(self) -> str:
        """What answers call this generation: name, version and twelve digits of its digest."""
        return f"{self.manifest.name}@{self.manifest.version}#{self.digest[:12]}"

    @property
    def n_items(self) -> int:
        return len(self.ids)

    @property
    def d(self) -> int:
        return int(self.tables["embedding"].shape[1])

    @cached_property
    def filterable(self) -> tuple[str, ...]:
        """Item tables that a filter may name: numbers or categories, one or a few a row."""
        return tuple(n for n, t in self.tables.items() if n != "embedding" and t.dtype.kind in "iuf" and t.ndim <= 2)


def run_model(session: ort.InferenceSession, feeds: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    """The first output of the graph. Raises StageFailed for whatever the runtime raises."""
    try:
        return session.run(None, dict(feeds))[0]  # type: ignore[no-any-return]
    except Exception as e:  # onnxruntime's exceptions have no root of their own
        raise StageFailed(f"model: {e}") from e


def open_session(model: bytes, name: str) -> ort.InferenceSession:
    """A session on one thread: parallelism is over shards. Raises BundleError if it isn't a usable graph."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as e:  # as above
        raise BundleError(f"{name}: not a graph that onnxruntime opens ({e})") from e


# ------------------------------------------------------------------------------------------ loading


def load(path: Path, digest: str | None = None) -> Generation:
    """Verify the bundle and open it; tables and indexes stay on disk as memory maps where they can.

    Args:
        digest: the manifest's SHA-256, when it is known from outside.
    Raises: BundleError, one sentence that names the file.
    """
    manifest, found = read_manifest(path, digest)
    verify_files(path, manifest)
    tables = _tables(path / ITEMS, "ids", "id_order")
    ids = _ids(path / ITEMS)
    generation = Generation(
        path=path,
        digest=found,
        manifest=manifest,
        ids=ids,
        tables=tables,
        vocab=_vocab(path / VOCAB),
        users=_users(path / USERS),
        popular=_rows(path / "popular.npy"),
        index=_index(path, manifest),
        user_tower=_session(path, manifest, manifest.retrievers[0].tower),
        re_ranker=_session(path, manifest, "re_ranker.onnx"),
        pre_ranker=_pre_ranker(path / "pre_ranker.npz"),
    )
    check_shapes(generation)
    return generation


@dataclass(frozen=True, slots=True)
class RerankerParts:
    """What a worker needs of a bundle that its parent has verified whole."""

    digest: str
    features: FeatureSchema
    tables: Tables
    session: ort.InferenceSession


def load_re_ranker(path: Path, digest: str) -> RerankerParts:
    """The re-ranker and the item tables; the manifest and the model are checked again, tables only mapped."""
    manifest, _ = read_manifest(path, digest)
    tables = _tables(path / ITEMS, "ids", "id_order")
    return RerankerParts(digest, manifest.features, tables, _session(path, manifest, "re_ranker.onnx"))


def read_manifest(path: Path, digest: str | None = None) -> tuple[Manifest, str]:
    """The manifest and its SHA-256. Raises BundleError."""
    file = path / MANIFEST
    if not path.is_dir():
        raise BundleError(f"{path}: no such directory")
    if file.is_symlink() or not file.is_file():
        raise BundleError(f"{MANIFEST}: missing in {path}, or not a plain file")
    raw = file.read_bytes()
    found = hashlib.sha256(raw).hexdigest()
    if digest and found != digest:
        raise BundleError(f"{MANIFEST}: its SHA-256 is {found}, expected {digest}")
    try:
        return Manifest.model_validate_json(raw), found
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(str(p) for p in first["loc"]) or "the document"
        raise BundleError(f"{MANIFEST}: {where}: {first['msg']}") from e


def verify_files(path: Path, manifest: Manifest) -> None:
    """Every file is listed, plain, of the stated size and SHA-256; nothing else is there."""
    for name in manifest.files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
            raise BundleError(f"{MANIFEST}: the file name {name!r} leaves the bundle's directory")
    present = set(_walk(path))
    for name in sorted(set(manifest.files) - present):
        raise BundleError(f"{name}: listed in the manifest but missing")
    for name in sorted(present - set(manifest.files) - {MANIFEST}):
        raise BundleError(f"{name}: not listed in the manifest")
    for name, entry in sorted(manifest.files.items()):
        size = (path / name).stat().st_size
        if size != entry.size:
            raise BundleError(f"{name}: has {size} bytes, the manifest says {entry.size}")
        if sha256(path / name) != entry.sha256:
            raise BundleError(f"{name}: its SHA-256 is not the manifest's; the file was changed")


def _walk(path: Path) -> Iterable[str]:
    for folder, folders, files in os.walk(path):
        for name in folders + files:
            if (Path(folder) / name).is_symlink():
                raise BundleError(f"{(Path(folder) / name).relative_to(path)}: is a link; a bundle has none")
        yield from ((Path(folder) / f).relative_to(path).as_posix() for f in files)


def sha256(file: Path) -> str:
    """Hex digest of a file, read in blocks."""
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _array(file: Path) -> NDArray[Any]:
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)  # type: ignore[no-any-return]
    except Exception as e:  # numpy's have no root
        raise BundleError(f"{file.name}: not an array that numpy opens without pickle ({e})") from e


def _tables(folder: Path, *but: str) -> Tables:
    return {f.stem: _array(f) for f in sorted(folder.glob("*.npy")) if f.stem not in but}


def _ids(folder: Path) -> Ids:
    ids, order = _array(folder / "ids.npy"), _array(folder / "id_order.npy")
    name = f"{folder.name}/ids.npy"
    if ids.ndim != 1 or ids.dtype.kind not in "iU" or not len(ids):
        raise BundleError(f"{name}: ids must be one axis of integers or fixed-width strings, not empty")
    if order.shape != ids.shape or order.dtype.kind != "i" or order.min() < 0 or order.max() >= len(ids):
        raise BundleError(f"{folder.name}/id_order.npy: must hold each row of ids.npy once")
    ordered = ids[order]
    if np.any(ordered[1:] <= ordered[:-1]):
        raise BundleError(f"{name}: ids are not unique, or id_order.npy is not their order")
    return Ids(ids, order)


def _vocab(folder: Path) -> dict[str, dict[str, int]]:
    vocab: dict[str, dict[str, int]] = {}
    for file in sorted(folder.glob("*.json")):
        try:
            vocab[file.stem] = _Vocab.model_validate_json(file.read_bytes()).root
        except ValidationError as e:
            raise BundleError(f"vocab/{file.name}: must be an object of category → number") from e
    return vocab


def _users(folder: Path) -> Users | None:
    if not folder.is_dir():
        return None
    tables = dict(_tables(folder, "ids", "id_order"))
    history = tables.pop("history", None)
    return Users(_ids(folder), tables, history)


def _rows(file: Path) -> Rows:
    array = _array(file)
    if array.dtype.kind not in "iu":
        raise BundleError(f"{file.name}: must hold row numbers, not {array.dtype}")
    return np.asarray(array, np.int64)


def _listed(path: Path, manifest: Manifest, name: str) -> Path:
    if name not in manifest.files:
        raise BundleError(f"{name}: named by the manifest but not listed in its files")
    return path / name


def _index(path: Path, manifest: Manifest) -> faiss.Index:
    name, kind = manifest.retrievers[0].index, manifest.retrievers[0].kind
    try:
        index = faiss.read_index(str(_listed(path, manifest, name)))
    except RuntimeError as e:
        raise BundleError(f"{name}: not an index that FAISS opens") from e
    if not type(index).__name__.startswith(INDEX_KINDS[kind][0]):
        raise BundleError(f"{name}: is a FAISS {type(index).__name__}, the manifest says {kind}")
    return index


def _session(path: Path, manifest: Manifest, name: str) -> ort.InferenceSession:
    model = _listed(path, manifest, name).read_bytes()
    if hashlib.sha256(model).hexdigest() != manifest.files[name].sha256:
        raise BundleError(f"{name}: its SHA-256 is not the manifest's; the file was changed")
    return open_session(model, name)


def _pre_ranker(file: Path) -> PreRanker:
    try:
        with np.load(file, allow_pickle=False) as data:
            names = tuple(str(n) for n in data["names"])
            weights, bias = np.asarray(data["weights"], np.float32), np.float32(data["bias"].item())
    except Exception as e:  # as above
        raise BundleError(f"{file.name}: must hold names, weights and bias ({e})") from e
    if weights.shape != (len(names),) or not np.isfinite(weights).all() or not np.isfinite(bias):
        raise BundleError(f"{file.name}: needs one finite weight a feature name and a finite bias")
    return PreRanker(names, sealed(weights), bias)


# ------------------------------------------------------------------------------------------- shapes


def check_shapes(g: Generation) -> None:
    """Tables, index and models fit each other and the manifest. Raises BundleError."""
    n, retriever = g.n_items, g.manifest.retrievers[0]
    embedding = g.tables.get("embedding")
    if embedding is None or embedding.ndim != 2 or embedding.dtype.kind != "f":
        raise BundleError("items/embedding.npy: must be there, floats of shape [items, d]")
    for name, table in g.tables.items():
        if table.shape[:1] != (n,) or table.dtype.kind not in "fiuU":
            raise BundleError(f"items/{name}.npy: is {table.dtype} {table.shape}, ids.npy has {n} rows")
    if (g.index.ntotal, g.index.d, retriever.n) != (n, g.d, n):
        raise BundleError(f"{retriever.index}: holds {g.index.ntotal} × {g.index.d}, items are {n} × {g.d}")
    if g.index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise BundleError(f"{retriever.index}: its metric must be the inner product")
    if g.popular.ndim != 1 or len(np.unique(g.popular)) != len(g.popular) or not _are_rows(g.popular, n):
        raise BundleError(f"popular.npy: must be different rows from 0 to {n - 1}")
    if g.users:
        _check_users(g.users, n, g.manifest.features)
    if g.pre_ranker.names != g.manifest.features.pre_ranker:
        raise BundleError("pre_ranker.npz: its feature names are not those of the manifest's schema")
    _check_names(g)
    _check_graph(g, g.user_tower, retriever.tower, g.manifest.features.user_tower)
    _check_graph(g, g.re_ranker, "re_ranker.onnx", g.manifest.features.re_ranker)


def _are_rows(rows: NDArray[Any], n: int, lowest: int = 0) -> bool:
    return bool(rows.dtype.kind in "iu" and (not rows.size or (rows.min() >= lowest and rows.max() < n)))


def _check_users(users: Users, n: int, features: FeatureSchema) -> None:
    specs = features.fields
    for name, table in users.tables.items():
        if table.shape[:1] != (len(users.ids),) or table.dtype.kind not in "fiu":
            raise BundleError(f"users/{name}.npy: must hold a row of numbers for each of users/ids.npy")
        spec = specs.get(f"user.{name}")
        if spec and math.prod(table.shape[1:]) != math.prod(spec.shape):
            raise BundleError(f"users/{name}.npy: is {table.shape}, the schema reads {spec.shape} a user")
    history, n_users = users.history, len(users.ids)
    if history is not None and (history.ndim != 2 or len(history) != n_users or not _are_rows(history, n, NO_ROW)):
        raise BundleError(f"users/history.npy: must hold item rows (-1 pads) for {n_users} users")


def _check_names(g: Generation) -> None:
    """The linear pre-ranker's features exist, and what they read has the form that their definition asks."""
    fields = g.manifest.features.fields
    for name in g.pre_ranker.names:
        kind, _, argument = name.partition(".")
        table = g.tables.get(argument.partition(".")[0])
        if kind in ("retrieval_score", "history_log_count"):
            continue
        if name in fields:
            if math.prod(fields[name].shape) != 1:
                raise BundleError(f"pre_ranker.npz: {name} is {fields[name].shape}, a feature is one number")
        elif kind != "item" and kind not in HISTORY_FEATURES:
            raise BundleError(f"pre_ranker.npz: no feature is named {name}")
        elif table is None or not _is_readable(kind, argument.partition(".")[2], table):
            raise BundleError(f"pre_ranker.npz: {name} finds no item table of that name and the right shape")


def _is_readable(kind: str, column: str, table: NDArray[Any]) -> bool:
    """Whether the feature of this kind can be made from this table; see features.named_features."""
    if table.dtype.kind not in "fiu" or table.ndim > 2 or (column and kind != "item"):
        return False
    if kind == "item":
        return (
            int(column) < table.shape[1] if column.isdecimal() and table.ndim == 2 else table.ndim == 1 > len(column)
        )
    if kind == "history_overlap":
        return table.dtype.kind in "iu"
    return table.ndim == (1 if kind == "history_gap" else 2)


def _check_graph(g: Generation, session: ort.InferenceSession, file: str, inputs: tuple[ModelInput, ...]) -> None:
    """Every input of the graph is bound once, and what is bound has the graph's type and shape."""
    graph = {i.name: i for i in session.get_inputs()}
    bound = [i.name for i in inputs] + [i.mask for i in inputs if i.mask]
    for name in sorted({name for name in bound if bound.count(name) > 1}):
        raise BundleError(f"{file}: input {name} is bound more than once")
    for name in sorted(set(graph) ^ set(bound)):
        raise BundleError(f"{file}: input {name} is {'not bound in the schema' if name in graph else 'unknown'}")
    for i in inputs:
        _check_input(graph[i.name], *_bound_shape(g, i, file), file)
        if i.mask:
            _check_input(graph[i.mask], np.float32, (i.length,), file)


def _check_input(node: ort.NodeArg, dtype: type, shape: tuple[int, ...], file: str) -> None:
    """An input of a graph has this type and, after the first axis, this shape; open axes take any size."""
    want = {"tensor(float)": np.float32, "tensor(int64)": np.int64}.get(node.type)
    axes = node.shape[1:]
    fits = len(axes) == len(shape) and all(
        not isinstance(axis, int) or axis == size for axis, size in zip(axes, shape, strict=True)
    )
    if want is not dtype or not fits:
        raise BundleError(
            f"{file}: input {node.name} is {node.type} {node.shape}, "
            f"its source gives {dtype.__name__} [n, {', '.join(map(str, shape))}]"
        )


def _bound_shape(g: Generation, i: ModelInput, file: str) -> tuple[type, tuple[int, ...]]:
    """Type and shape (without the first axis) of what the schema gives this input."""
    if i.source in (Source.HISTORY, Source.ITEM_TABLE):
        lead = (i.length,) if i.source is Source.HISTORY else ()
        if i.table == ROW:
            return np.int64, lead
        if i.table not in g.tables or g.tables[str(i.table)].dtype.kind == "U":
            raise BundleError(f"{file}: input {i.name} reads the item table {i.table}, which there isn't")
        table = g.tables[str(i.table)]
        return model_dtype(table), lead + table.shape[1:]
    if i.source in (Source.USER_EMBEDDING, Source.ITEM_EMBEDDING):
        return np.float32, (g.d,)
    if i.source is Source.RETRIEVAL_SCORE:
        return np.float32, ()
    return np.dtype(i.dtype).type, i.shape
