"""`python -m models.bench_hoisting`: what cutting saves on W2, which encodes a history; and whether a hand does better.

W2 is one float32 graph in which every input has n rows, as users often export it: self-attention over a history of
50 × 64, a tower 64-256-64 for the item, a head 192-256-1 over both and their product. Three ways score 500 rows, in
turns, in this one thread: whole; cut by graph_parts.py, each way that there is, of which the fastest counts; and cut by
hand, the history once a request and the rest as it was. CPU of the process; a gathered table's rows count.

Ends with one line of JSON. Exit code 1 when scores differ by more than 1e-4.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy is there

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from app.bundle import open_session
from app.features import ModelInput, Source
from models import graph, graph_parts
from models.hoisting import WAYS, Array, Feeds, name_of

ROWS, HISTORY, D, ITEMS = 500, 50, 64, 200_000
ROUNDS, FEW = 40, 10  # of the cut ways; of the whole graph, which is slow
SAME = 1e-4
READS = graph_parts.Reads(request=("history",), item=("item",), others=())
Score = Callable[[], Array]


def main() -> int:
    """Returns the exit code."""
    rng = np.random.default_rng(0)
    weights = drawn(rng)
    whole = model([*encoder(), *tower(), *head("pooled")], {"history": [HISTORY, D], "item": [D]}, weights)
    inputs = (
        ModelInput(name="history", source=Source.HISTORY, table="embedding", length=HISTORY),
        ModelInput(name="item", source=Source.ITEM_EMBEDDING),
    )
    graph.bind_re_ranker(whole, inputs, "w2.onnx")
    table = rng.standard_normal((ITEMS, D), np.float32)
    rows = rng.choice(ITEMS, ROWS, replace=False)
    feeds = {"history": rng.standard_normal((1, HISTORY, D), np.float32), "item": table.take(rows, axis=0)}

    ways: dict[str, Score] = {"whole": scorer(feeds, lambda: {"item": table.take(rows, axis=0)}, whole)}
    once = model(encoder(), {"history": [HISTORY, D]}, weights, "pooled", [D])
    spread = [helper.make_node("Shape", ["item"], ["shape"]), helper.make_node("Expand", ["pooled", "shape"], ["wide"])]
    rest = model([*tower(), *spread, *head("wide")], {"pooled": [D], "item": [D]}, weights)
    ways["by hand"] = scorer(feeds, lambda: {"item": table.take(rows, axis=0)}, rest, once)
    for is_folded, has_tables in WAYS:
        parts = graph_parts.cut(whole, READS, feeds, is_folded=is_folded, has_tables=has_tables)
        ways[name_of(is_folded=is_folded, has_tables=has_tables)] = cut_scorer(feeds, table, rows, parts)

    expected, took = ways["whole"](), {name: list[float]() for name in ways}
    differences = {name: float(np.abs(score() - expected).max()) for name, score in ways.items()}
    for number in range(ROUNDS):
        for name, score in ways.items():
            if name != "whole" or number < FEW:
                started = time.process_time()
                score()
                took[name].append(time.process_time() - started)
    cpu_ms = {name: statistics.median(seconds) * 1e3 for name, seconds in took.items()}
    best = min((name for name in cpu_ms if name.startswith("cut")), key=cpu_ms.__getitem__)
    for name, ms in cpu_ms.items():
        print(f"{name:<50}{ms:8.3f} ms of CPU for {ROWS} rows; scores differ by {differences[name]:.1e}")
    said = {"over_whole": cpu_ms[best] / cpu_ms["whole"], "over_by_hand": cpu_ms[best] / cpu_ms["by hand"]}
    worst = max(differences.values())
    print(json.dumps({"bench": "hoist", "best": best} | said | {"difference": worst, "cpu_ms": cpu_ms}))
    return 0 if worst <= SAME else 1


def scorer(
    feeds: Feeds, gathered: Callable[[], Feeds], rest: onnx.ModelProto, once: onnx.ModelProto | None = None
) -> Score:
    """Gather what is read of items, run `once` on the request, then `rest`."""
    sessions = [open_session(part.SerializeToString(), "w2.onnx") for part in (once, rest) if part]

    def score() -> Array:
        known = {**feeds, **gathered()}
        for session in sessions:
            outputs = session.run(None, {i.name: known[i.name] for i in session.get_inputs()})
            known |= dict(zip([o.name for o in session.get_outputs()], outputs, strict=True))
        return np.asarray(outputs[0]).reshape(-1)

    return score


def cut_scorer(feeds: Feeds, table: Array, rows: Array, parts: graph_parts.Parts) -> Score:
    tables = {}
    if parts.item:
        session = open_session(parts.item.SerializeToString(), "w2.onnx")
        tables = dict(zip([o.name for o in session.get_outputs()], session.run(None, {"item": table}), strict=True))
    if any(i.name == "item" for i in parts.rest.graph.input):
        tables["item"] = table
    return scorer(feeds, lambda: {name: t.take(rows, axis=0) for name, t in tables.items()}, parts.rest, parts.once)


# ------------------------------------------------------------------------------------------ the graph


def drawn(rng: np.random.Generator) -> dict[str, Array]:
    """Weights of every layer, scaled so that numbers keep their size."""
    shapes = {
        "wq": (D, D),
        "wk": (D, D),
        "wv": (D, D),
        "wt1": (D, 256),
        "wt2": (256, D),
        "wh1": (3 * D, 256),
        "wh2": (256, 1),
    }
    weights: dict[str, Array] = {
        name: (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32) for name, shape in shapes.items()
    }
    biases = {"bt1": 256, "bt2": D, "bh1": 256, "bh2": 1}
    weights |= {name: rng.standard_normal(n).astype(np.float32) for name, n in biases.items()}
    return weights | {"scale": np.array(D**0.5, np.float32)}


def encoder() -> list[onnx.NodeProto]:
    """history [n, 50, 64] → pooled [n, 64]: one layer of self-attention, the mean of its outputs."""
    nodes = [helper.make_node("MatMul", ["history", f"w{x}"], [x]) for x in "qkv"]
    return [
        *nodes,
        helper.make_node("Transpose", ["k"], ["kt"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "kt"], ["alike"]),
        helper.make_node("Div", ["alike", "scale"], ["scaled"]),
        helper.make_node("Softmax", ["scaled"], ["attention"], axis=-1),
        helper.make_node("MatMul", ["attention", "v"], ["attended"]),
        helper.make_node("ReduceMean", ["attended"], ["pooled"], axes=[1], keepdims=0),
    ]


def tower() -> list[onnx.NodeProto]:
    """item [n, 64] → known [n, 64]"""
    return [
        helper.make_node("Gemm", ["item", "wt1", "bt1"], ["t1"]),
        helper.make_node("Relu", ["t1"], ["t2"]),
        helper.make_node("Gemm", ["t2", "wt2", "bt2"], ["known"]),
    ]


def head(person: str) -> list[onnx.NodeProto]:
    """person [n, 64] and known [n, 64] → score [n, 1]"""
    return [
        helper.make_node("Mul", [person, "known"], ["cross"]),
        helper.make_node("Concat", [person, "known", "cross"], ["all"], axis=1),
        helper.make_node("Gemm", ["all", "wh1", "bh1"], ["h1"]),
        helper.make_node("Relu", ["h1"], ["h2"]),
        helper.make_node("Gemm", ["h2", "wh2", "bh2"], ["score"]),
    ]


def model(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, list[int]],
    weights: dict[str, Array],
    output: str = "score",
    shape: list[int] | None = None,
) -> onnx.ModelProto:
    read = {name for node in nodes for name in node.input}
    arrays = [numpy_helper.from_array(array, name) for name, array in weights.items() if name in read]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", *axes]) for name, axes in inputs.items()]
    made = helper.make_tensor_value_info(output, TensorProto.FLOAT, ["n", *(shape or [1])])
    opset = [helper.make_opsetid("", 17)]
    return helper.make_model(helper.make_graph(nodes, "w2", values, [made], arrays), opset_imports=opset, ir_version=8)


if __name__ == "__main__":
    sys.exit(main())
