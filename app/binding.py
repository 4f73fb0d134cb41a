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


def sample(features: FeatureSchema, tables: Tables) -> Inputs:
    """What bindings are tried on: a few items, for somebody who has seen them; each field holds its default."""
    numbers = {name: table for name, table in tables.items() if table.dtype.kind in "fiu"}
    rows, d = np.arange(min(3, len(tables["embedding"]))), tables["embedding"].shape[1]
    person = Person(rows, {key: spec.filled() for key, spec in features.of_request.items()})
    scores = np.zeros(len(rows), np.float32)
    items = Candidates(rows, scores, scores.astype(np.uint32), np.zeros(d, np.float32))
    return Inputs(numbers, person, items, {key: spec.filled(len(rows)) for key, spec in features.fields.items()})


def check_names(names: tuple[str, ...], given: Inputs) -> None:
    """The linear pre-ranker's features can be made of the sample."""
    for name in names:
        with opening("pre_ranker.npz", f"{name} can't be made of what the bundle holds"):
            named_features((name,), given)


def check_graph(file: str, inputs: tuple[ModelInput, ...], given: Inputs, *graphs: ort.InferenceSession) -> None:
    """Every input of the graph is bound once, and what is bound has the graph's type and shape.

    given: the sample. graphs: those before the last make some inputs of it, and read what is bound as well; golden
    requests show whether the two fit.
    """
    made = {o.name for graph in graphs[:-1] for o in graph.get_outputs()}
    nodes = [i for graph in graphs for i in graph.get_inputs()]
    read = {i.name for i in nodes} - made
    bound = [i.name for i in inputs] + [i.mask for i in inputs if i.mask]
    for name in sorted({name for name in bound if bound.count(name) > 1}):
        raise BundleError(f"{file}: input {name} is bound more than once")
    for name in sorted(read ^ set(bound)):
        raise BundleError(f"{file}: input {name} is {'not bound in the schema' if name in read else 'unknown'}")
    for i in inputs:
        is_there = i.table in (None, ROW, *given.tables)
        require(is_there, f"{file}: input {i.name} reads the item table {i.table}, which there isn't")
    person, user = given.person, given.candidates.user_embedding
    arrays = request_inputs(inputs, given.tables, person, user) | item_inputs(inputs, given)
    for node in (n for n in nodes if n.name in arrays):
        _check_input(node, arrays[node.name], file)


def _check_input(node: ort.NodeArg, array: Array, file: str) -> None:
    """An input of a graph has the array's type and, after the first axis, its shape; open axes take any size."""
    dtype, shape, axes = array.dtype.name, array.shape[1:], node.shape[1:]
    wanted = {"tensor(float)": "float32", "tensor(int64)": "int64"}.get(node.type)
    fits = len(axes) == len(shape) and all(a == s or not isinstance(a, int) for a, s in zip(axes, shape, strict=True))
    gives = f"gives {dtype} [n, {', '.join(map(str, shape))}]"
    require(wanted == dtype and fits, f"{file}: input {node.name} is {node.type} {node.shape}, its source {gives}")
