"""Bindings: whether the feature schema fits the item tables and the graphs of its bundle.

Every input of a graph is bound once and gets its type and shape; every named feature of the pre-ranker can be made.
It owns these checks only: the schema and the arithmetic are features.py's, what else is checked is bundle.py's.
Each refusal is one sentence that names the file (`BundleError`).
"""

import math
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from app.errors import BundleError
from app.features import HISTORY_FEATURES, ROW, FeatureSchema, ModelInput, Source, Tables, model_dtype


def check_graph(session: ort.InferenceSession, file: str, inputs: tuple[ModelInput, ...], tables: Tables) -> None:
    """Every input of the graph is bound once, and what is bound has the graph's type and shape."""
    graph = {i.name: i for i in session.get_inputs()}
    bound = [i.name for i in inputs] + [i.mask for i in inputs if i.mask]
    for name in sorted({name for name in bound if bound.count(name) > 1}):
        raise BundleError(f"{file}: input {name} is bound more than once")
    for name in sorted(set(graph) ^ set(bound)):
        raise BundleError(f"{file}: input {name} is {'not bound in the schema' if name in graph else 'unknown'}")
    for i in inputs:
        _check_input(graph[i.name], *_bound_shape(tables, i, file), file)
        if i.mask:
            _check_input(graph[i.mask], np.float32, (i.length,), file)


def check_names(features: FeatureSchema, tables: Tables) -> None:
    """The linear pre-ranker's features exist, and what they read has the form that their definition asks."""
    fields = features.fields
    for name in features.pre_ranker:
        kind, _, argument = name.partition(".")
        table = tables.get(argument.partition(".")[0])
        if kind in ("retrieval_score", "history_log_count"):
            continue
        if name in fields:
            if math.prod(fields[name].shape) != 1:
                raise BundleError(f"pre_ranker.npz: {name} is {fields[name].shape}, a feature is one number")
        elif kind != "item" and kind not in HISTORY_FEATURES:
            raise BundleError(f"pre_ranker.npz: no feature is named {name}")
        elif table is None or not _is_readable(kind, argument.partition(".")[2], table):
            raise BundleError(f"pre_ranker.npz: {name} finds no item table of that name and the right shape")


def _check_input(node: ort.NodeArg, dtype: type, shape: tuple[int, ...], file: str) -> None:
    """An input of a graph has this type and, after the first axis, this shape; open axes take any size."""
    want = {"tensor(float)": np.float32, "tensor(int64)": np.int64}.get(node.type)
    axes = node.shape[1:]
    fits = len(axes) == len(shape) and all(a == s or not isinstance(a, int) for a, s in zip(axes, shape, strict=True))
    if want is not dtype or not fits:
        gives = f"{dtype.__name__} [n, {', '.join(map(str, shape))}]"
        raise BundleError(f"{file}: input {node.name} is {node.type} {node.shape}, its source gives {gives}")


def _bound_shape(tables: Tables, i: ModelInput, file: str) -> tuple[type, tuple[int, ...]]:
    """Type and shape (without the first axis) of what the schema gives this input."""
    if i.source in (Source.HISTORY, Source.ITEM_TABLE):
        lead = (i.length,) if i.source is Source.HISTORY else ()
        if i.table == ROW:
            return np.int64, lead
        if i.table not in tables or tables[str(i.table)].dtype.kind == "U":
            raise BundleError(f"{file}: input {i.name} reads the item table {i.table}, which there isn't")
        table = tables[str(i.table)]
        return model_dtype(table), lead + table.shape[1:]
    if i.source in (Source.USER_EMBEDDING, Source.ITEM_EMBEDDING):
        return np.float32, tables["embedding"].shape[1:]
    if i.source is Source.RETRIEVAL_SCORE:
        return np.float32, ()
    return np.dtype(i.dtype).type, i.shape


def _is_readable(kind: str, column: str, table: NDArray[Any]) -> bool:
    """Whether the feature of this kind can be made from this table; see features.named_features."""
    if table.dtype.kind not in "fiu" or (column and kind != "item"):
        return False
    if column:
        return table.ndim == 2 and column.isdecimal() and int(column) < table.shape[1]
    if kind == "history_overlap":
        return table.dtype.kind in "iu" and table.ndim <= 2
    return table.ndim == (1 if kind in ("item", "history_gap") else 2)
