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
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from pydantic import RootModel, ValidationError

from app.binding import check_graph, check_names
from app.errors import BundleError, StageFailed
from app.features import FeatureSchema, Tables
from app.flow import Rows, sealed
from app.manifest import INDEX_KINDS, Manifest, read_manifest, reading, verify_files

ITEMS, USERS, VOCAB = "items", "users", "vocab"
NO_ROW = -1  # pads lists of rows

faiss.omp_set_num_threads(1)  # one request, one core: parallelism is over requests and shards


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
    """A session on one thread: parallelism is over shards. Raises BundleError if it isn't a usable graph.

    A graph made from bytes may still ask for weights in other files: onnxruntime 1.32 then reads them, unhashed,
    below the working directory. It is told to look in what is no directory, where there are none.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
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
    path = path.resolve()  # workers find it again, though a link that led here is switched
    verify_files(path, manifest)
    generation = Generation(
        path=path,
        digest=found,
        manifest=manifest,
        ids=_ids(path / ITEMS),
        tables=_tables(path / ITEMS, "ids", "id_order"),
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


class _Vocab(RootModel[dict[str, int]]):
    """vocab/<name>.json."""


def _vocab(folder: Path) -> dict[str, dict[str, int]]:
    vocab: dict[str, dict[str, int]] = {}
    for file in sorted(folder.glob("*.json")):
        try:
            vocab[file.stem] = _Vocab.model_validate_json(file.read_bytes()).root
        except (OSError, ValidationError) as e:
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
    with reading(name):
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
    check_names(g.manifest.features, g.tables)
    check_graph(g.user_tower, retriever.tower, g.manifest.features.user_tower, g.tables)
    check_graph(g.re_ranker, "re_ranker.onnx", g.manifest.features.re_ranker, g.tables)


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
