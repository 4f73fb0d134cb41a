"""Bindings: whether the feature schema fits the item tables and the graphs of its bundle.

Every input of a graph is bound once and gets its type and shape; every named feature of the pre-ranker can be made.
It owns these checks only: the schema and the arithmetic are features.py's, what else is checked is bundle.py's.
Each refusal is one sentence that names the file (`BundleError`).
"""

import numpy as np
import onnxruntime as ort

from app.errors import BundleError, require
from app.features import ROW, FeatureSchema, Inputs, ModelInput, Tables, item_inputs, named_features, request_inputs
from app.flow import Array, Candidates, Person
from app.manifest import opening


def check_graph(
    session: ort.InferenceSession,
    file: str,
    inputs: tuple[ModelInput, ...],
    tables: Tables,
    once: ort.InferenceSession | None = None,
) -> None:
    """Every input of the graph is bound once, and what is bound has the graph's type and shape.

    once: a graph that makes some of them, and reads what is bound as well; golden requests show whether the two fit.
    """
    made = [o.name for o in once.get_outputs()] if once else []
    nodes = [i for graph in (once, session) if graph for i in graph.get_inputs()]
    graph = {i.name for i in nodes} - set(made)
    bound = [i.name for i in inputs] + [i.mask for i in inputs if i.mask]
    for name in sorted({name for name in bound if bound.count(name) > 1}):
        raise BundleError(f"{file}: input {name} is bound more than once")
    for name in sorted(graph ^ set(bound)):
        raise BundleError(f"{file}: input {name} is {'not bound in the schema' if name in graph else 'unknown'}")
    readable = [name for name, table in tables.items() if table.dtype.kind != "U"]
    for i in inputs:
        is_there = i.table in (None, ROW, *readable)
        require(is_there, f"{file}: input {i.name} reads the item table {i.table}, which there isn't")
    arrays = _inputs_of_nothing(inputs, tables)
    for node in (n for n in nodes if n.name in arrays):
        _check_input(node, arrays[node.name], file)


def check_names(features: FeatureSchema, tables: Tables) -> None:
    """The linear pre-ranker's features can be made: tried on a few items, for somebody who has seen them."""
    rows = np.arange(min(3, len(tables["embedding"])))
    person = Person(rows, {key: spec.filled() for key, spec in features.of_request.items()})
    scores = np.zeros(len(rows), np.float32)
    items = Candidates(rows, scores, scores.astype(np.uint32), scores)
    numbers = {name: table for name, table in tables.items() if table.dtype.kind in "fiu"}
    given = Inputs(numbers, person, items, {key: spec.filled(len(rows)) for key, spec in features.fields.items()})
    for name in features.pre_ranker:
        with opening("pre_ranker.npz", f"{name} can't be made of what the bundle holds"):
            named_features((name,), given)


def _inputs_of_nothing(inputs: tuple[ModelInput, ...], tables: Tables) -> dict[str, Array]:
    """What the graph gets for no candidates and nobody: arrays of the type and shape that it always gets."""
    rows, scores = np.empty(0, np.int64), np.empty(0, np.float32)
    nobody = Person(rows, {i.key: i.filled() for i in inputs if i.field})
    nothing = Candidates(rows, scores, rows.astype(np.uint32), np.zeros(tables["embedding"].shape[1], np.float32))
    of_items = item_inputs(inputs, Inputs(tables, nobody, nothing, {}))
    return request_inputs(inputs, tables, nobody, nothing.user_embedding) | of_items


def _check_input(node: ort.NodeArg, array: Array, file: str) -> None:
    """An input of a graph has the array's type and, after the first axis, its shape; open axes take any size."""
    dtype, shape, axes = array.dtype.name, array.shape[1:], node.shape[1:]
    wanted = {"tensor(float)": "float32", "tensor(int64)": "int64"}.get(node.type)
    fits = len(axes) == len(shape) and all(a == s or not isinstance(a, int) for a, s in zip(axes, shape, strict=True))
    gives = f"{dtype} [n, {', '.join(map(str, shape))}]"
    is_same = wanted == dtype and fits
    require(is_same, f"{file}: input {node.name} is {node.type} {node.shape}, its source gives {gives}")
