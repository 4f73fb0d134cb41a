"""ONNX graphs of strangers → graphs that keep the bundle's contract, or a refusal in one sentence.

A re-ranker's inputs have a first axis of n rows, or of 1 for what belongs to the whole request. Where a graph
leaves the first axis of a request-level input open, it wants that input row by row: an `Expand` is put in
front of it, so that the service still sends it once. Scores leave as f32[n].

The rule that must hold: a row's score depends on that row and the request alone. `check_rows_alone` proves it
on real rows, because nothing in a graph's text shows it (batch norm in training mode, softmax over the batch,
dynamic quantisation). app/binding.py checks shapes again when it loads.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from numpy.typing import NDArray
from onnx import helper

from app.features import ModelInput
from models.pack_config import PackError

Feeds = Mapping[str, NDArray[Any]]
Scores = NDArray[np.float32]

# What onnxruntime brings itself; anything else would need a library to be loaded, and a bundle holds no code.
KNOWN_DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")
OLDEST_OPSET = 8  # Expand came with it
TOLERANCE = 1e-5  # of the largest score in the batch: the contract of DESIGN's "what flows"


# ------------------------------------------------------------------------------------------- reading


def read_graph(file: Path) -> onnx.ModelProto:
    """The model, self-contained and made of known operators. Raises PackError."""
    try:
        model = onnx.load_model_from_string(file.read_bytes())
    except DecodeError as e:
        raise PackError(f"{file.name}: not an ONNX model ({e})") from e
    for tensor in _tensors(model):
        if onnx.external_data_helper.uses_external_data(tensor):
            raise PackError(
                f"{file.name}: the weights {tensor.name!r} are in another file; save the model with its data inside"
            )
    own = {function.domain for function in model.functions}
    for node in _nodes(model):
        if node.domain not in KNOWN_DOMAINS and node.domain not in own:
            raise PackError(
                f"{file.name}: operator {node.op_type} is from {node.domain!r}; allowed are the standard "
                "ones and those of onnxruntime itself"
            )
    opset = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)
    if opset < OLDEST_OPSET:
        raise PackError(f"{file.name}: is of opset {opset}; allowed is {OLDEST_OPSET} or newer")
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as e:
        raise PackError(f"{file.name}: not a valid ONNX model ({str(e).strip().splitlines()[0]})") from e
    return model


def _nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    yield from _nested(model.graph.node)
    for function in model.functions:
        yield from _nested(function.node)


def _nested(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """These nodes and those of the graphs in their attributes (If, Loop, Scan)."""
    for node in nodes:
        yield node
        for graph in _graphs(node):
            yield from _nested(graph.node)


def _graphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor that the model holds: weights, constants, those of inner graphs."""
    graphs = [model.graph, *(g for node in _nodes(model) for g in _graphs(node))]
    for graph in graphs:
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield sparse.values
            yield sparse.indices
    for node in _nodes(model):
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield attribute.t
            yield from attribute.tensors


# -------------------------------------------------------------------------------------------- binding


def check_bound(model: onnx.ModelProto, inputs: Sequence[ModelInput], file: str) -> None:
    """Each input of the graph is bound once, and nothing else is. Raises PackError."""
    wanted = [i.name for i in _true_inputs(model)]
    bound = [name for i in inputs for name in _names(i)]
    for name in bound:
        if bound.count(name) > 1:
            raise PackError(f"{file}: input {name} is bound twice; allowed is once")
        if name not in wanted:
            raise PackError(f"{file}: has no input {name}; its inputs are {', '.join(wanted)}")
    for name in wanted:
        if name not in bound:
            raise PackError(f"{file}: input {name} is bound to no source; list it under `inputs`")
    if len(model.graph.output) != 1:
        outputs = ", ".join(o.name for o in model.graph.output)
        raise PackError(f"{file}: has the outputs {outputs}; allowed is one")


def _names(i: ModelInput) -> list[str]:
    return [i.name, i.mask] if i.mask else [i.name]


def _true_inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """Inputs that are not weights with a default (old exporters list those as inputs too)."""
    weights = {w.name for w in model.graph.initializer}
    return [i for i in model.graph.input if i.name not in weights]


def _first_axis(value: onnx.ValueInfoProto, file: str) -> int | None:
    """Its fixed size, or None if it is open. Raises PackError for a scalar or an unknown rank."""
    tensor = value.type.tensor_type
    if not tensor.HasField("shape") or not tensor.shape.dim:
        raise PackError(f"{file}: input {value.name} has no axes; it needs a first axis for the rows")
    axis = tensor.shape.dim[0]
    return int(axis.dim_value) if axis.HasField("dim_value") else None


def bind_user_tower(model: onnx.ModelProto, inputs: Sequence[ModelInput], file: str) -> None:
    """Check that the tower can be asked about one person: every first axis open or 1. Raises PackError."""
    check_bound(model, inputs, file)
    for i in inputs:
        if i.per == "item" or i.source == "user_embedding":
            raise PackError(
                f"{file}: input {i.name} reads {i.source}, which is not known before retrieval; allowed are "
                "request, context, user_table and history"
            )
    for value in _true_inputs(model):
        if _first_axis(value, file) not in (None, 1):
            raise PackError(f"{file}: the first axis of input {value.name} is fixed; allowed is open or 1")


def bind_re_ranker(model: onnx.ModelProto, inputs: Sequence[ModelInput], file: str) -> list[str]:
    """Make request-level inputs [1, ...] and expand them to the rows where the graph wants that, in place.

    Returns: the names of the expanded inputs. Raises PackError.
    """
    check_bound(model, inputs, file)
    per_item = {i.name for i in inputs if i.per == "item"}
    values = _true_inputs(model)
    for value in values:
        size = _first_axis(value, file)
        if value.name in per_item and size is not None:
            raise PackError(
                f"{file}: the first axis of input {value.name} is fixed at {size}; export it open, any number "
                "of rows comes"
            )
        if size not in (None, 1):
            raise PackError(
                f"{file}: input {value.name} is one a request but its first axis is {size}; allowed is open or 1"
            )
    rows = next((v for v in values if v.name in per_item), None)
    if rows is None:
        raise PackError(f"{file}: no input reads anything of an item, so every row would score the same")
    opened = [v for v in values if v.name not in per_item and _first_axis(v, file) is None]
    if opened:
        _expand(model.graph, opened, rows)
    return [v.name for v in opened]


def _expand(graph: onnx.GraphProto, opened: Sequence[onnx.ValueInfoProto], rows: onnx.ValueInfoProto) -> None:
    """Put Expand([1, ...] → [n, ...]) behind each opened input; n is read off the item input `rows`."""
    zero = helper.make_tensor("winnow.zero", onnx.TensorProto.INT64, [1], [0])
    graph.initializer.append(zero)
    first = [
        helper.make_node("Shape", [rows.name], ["winnow.shape"]),
        helper.make_node("Gather", ["winnow.shape", "winnow.zero"], ["winnow.n"]),
    ]
    for value in opened:
        axes = value.type.tensor_type.shape.dim
        axes[0].Clear()
        axes[0].dim_value = 1
        to, ones = f"winnow.shape.{value.name}", f"winnow.ones.{value.name}"
        wide = f"winnow.rows.{value.name}"
        _rename(graph, value.name, wide)
        one_each = [1] * (len(axes) - 1)
        graph.initializer.append(helper.make_tensor(ones, onnx.TensorProto.INT64, [len(one_each)], one_each))
        first.append(helper.make_node("Concat", ["winnow.n", ones], [to], axis=0))
        first.append(helper.make_node("Expand", [value.name, to], [wide]))
    nodes = [*first, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]  # shapes inferred before the change; onnxruntime infers them anew


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    """Let everything that reads `old`, inner graphs too, read `new`."""
    for node in _nested(graph.node):
        for at, name in enumerate(node.input):
            if name == old:
                node.input[at] = new
        for inner in _graphs(node):
            for output in inner.output:
                output.name = new if output.name == old else output.name


def flatten_output(model: onnx.ModelProto) -> None:
    """Let a graph whose output is [n, 1] give [n], in place."""
    graph, output = model.graph, model.graph.output[0]
    flat = helper.make_tensor_value_info("winnow.scores", onnx.TensorProto.FLOAT, [None])
    graph.initializer.append(helper.make_tensor("winnow.flat", onnx.TensorProto.INT64, [1], [-1]))
    graph.node.append(helper.make_node("Reshape", [output.name, "winnow.flat"], [flat.name]))
    del graph.output[:]
    graph.output.append(flat)


# ------------------------------------------------------------------------------------------- behaviour


def check_output(output: NDArray[Any], n: int, file: str) -> bool:
    """Whether the output is [n, 1] and must be flattened. Raises PackError if it isn't [n] either."""
    if output.dtype != np.float32:
        raise PackError(f"{file}: its output is {output.dtype}; allowed is float32")
    if output.shape not in ((n,), (n, 1)):
        raise PackError(f"{file}: gives {list(output.shape)} for {n} rows; allowed is one score a row, [n] or [n, 1]")
    if not np.isfinite(output).all():
        raise PackError(f"{file}: {np.count_nonzero(~np.isfinite(output))} of {n} scores are not finite")
    return output.ndim == 2


def check_rows_alone(run: Callable[[Feeds], Scores], feeds: Feeds, per_item: Sequence[str], file: str) -> None:
    """Score a batch whole, again, in pieces, permuted and each row beside itself; raise PackError where scores differ.

    No batch of one row reaches the model in the service (app/workers/scoring.py), and none does here.

    Args:
        run: the graph: inputs by name → f32[n].
        feeds: a batch of n >= 2 rows.
        per_item: the names of the inputs with n rows.
    """
    n = len(feeds[per_item[0]])
    whole = run(feeds)
    allowed = TOLERANCE * float(np.abs(whole).max())
    order = np.random.default_rng(0).permutation(n)
    ways = {
        "from one run to the next": [np.arange(n)],
        "with the batch's size": np.array_split(np.arange(n), max(1, min(3, n // 2))),
        "with the order of the rows": [order],
        "with the other rows of the batch": [np.array([row, row]) for row in range(n)],
    }
    for how, pieces in ways.items():
        scores = np.empty(n, np.float32)
        for at in pieces:
            if len(at):
                scores[at] = run({k: v[at] if k in per_item else v for k, v in feeds.items()})
        worst = float(np.abs(scores - whole).max())
        if not worst <= allowed:
            raise PackError(
                f"{file}: a row's score changes {how} by up to {worst:.2g}; allowed is {allowed:.2g}, since rows "
                "are scored in shards (look for batch norm in training mode, dropout, dynamic quantisation, softmax "
                "over the rows)"
            )
