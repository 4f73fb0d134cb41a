"""Cutting a re-ranker: same scores from graphs of many forms, and a reason where a graph stays whole.

A cut graph is run as the service runs it: `once` on one row, then `rest`, with the rows of its tables.
"""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from app.bundle import open_session
from app.features import ModelInput
from models import graph, graph_parts

D, HISTORY, N = 8, 6, 9
READS = graph_parts.Reads(request=("user", "history"), item=("item", "features"), others=("bid",))
SOURCES = {
    "user": ModelInput(name="user", source="user_embedding"),
    "history": ModelInput(name="history", source="history", table="embedding", length=HISTORY),
    "item": ModelInput(name="item", source="item_embedding"),
    "features": ModelInput(name="features", source="item_table", table="features"),
    "bid": ModelInput(name="bid", source="candidate", field="bid"),
}
SHAPES = {"user": [D], "history": [HISTORY, D], "item": [D], "features": [3], "bid": [1]}
WAYS = [(False, False), (True, False), (False, True), (True, True)]
# What has nothing to cut: (graph, is_folded, has_tables)
NOTHING = {
    ("mlp", False, False), ("mlp", False, True), ("mlp", True, True),
    ("with_shapes", True, False), ("with_shapes", False, True), ("with_shapes", True, True),
    ("with_a_bid", True, False), ("with_a_bid", True, True),
    ("all_of_the_request", True, False), ("all_of_the_request", True, True),
}  # fmt: skip


def drawn(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def model(nodes, inputs, weights, output="score"):
    """A graph as users export it: every input n rows, then bound as `pack` does."""
    values = [helper.make_tensor_value_info(i, TensorProto.FLOAT, ["n", *SHAPES[i]]) for i in inputs]
    score = helper.make_tensor_value_info(output, TensorProto.FLOAT, ["n", 1])
    arrays = [numpy_helper.from_array(np.asarray(w), name) for name, w in weights.items()]
    made = helper.make_model(
        helper.make_graph(nodes, "g", values, [score], arrays),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    onnx.checker.check_model(made)
    graph.bind_re_ranker(made, [SOURCES[i] for i in inputs], "re_ranker.onnx")
    return made


def node(kind, reads, makes, **given):
    return helper.make_node(kind, reads, [makes], **given)


def feeds_of(made, n=N):
    per_request = READS.request
    inputs = [i.name for i in made.graph.input]
    return {i: drawn(1 if i in per_request else n, *SHAPES[i], seed=len(i)) for i in inputs}


def run(made, feeds):
    session = open_session(made.SerializeToString(), "re_ranker.onnx")
    outputs = session.run(None, {i.name: feeds[i.name] for i in session.get_inputs()})
    return dict(zip([o.name for o in session.get_outputs()], outputs, strict=True))


def assert_same_scores(made, parts):
    for n in (1, 2, N):
        feeds = feeds_of(made, n)
        known = {**feeds, **(run(parts.item, feeds) if parts.item else {})}
        once = run(parts.once, known) if parts.once else {}
        (scores,) = run(parts.rest, {**known, **once}).values()
        (expected,) = run(made, feeds).values()
        np.testing.assert_allclose(scores, expected, atol=1e-5)


def kinds(part):
    return [one.op_type for one in part.graph.node]


def cut(made, *, is_folded=False, has_tables=False):
    return graph_parts.cut(made, READS, feeds_of(made), is_folded=is_folded, has_tables=has_tables)


# ------------------------------------------------------------------------------------------- graphs


def mlp():
    """W·[user, item, user·item, features], a hidden layer, a score."""
    nodes = [
        node("Mul", ["user", "item"], "cross"),
        node("Concat", ["user", "item", "cross", "features"], "x", axis=1),
        node("Gemm", ["x", "w1", "b1"], "a"),
        node("Relu", ["a"], "h"),
        node("MatMul", ["h", "w2"], "score"),
    ]
    return model(nodes, ["user", "item", "features"], {"w1": drawn(3 * D + 3, 16), "b1": drawn(16), "w2": drawn(16, 1)})


def with_history():
    """Self-attention over the history, a tower for items, and a head over both and their product."""
    nodes = [
        node("MatMul", ["history", "wq"], "q"),
        node("MatMul", ["history", "wk"], "k"),
        node("Transpose", ["k"], "kt", perm=[0, 2, 1]),
        node("MatMul", ["q", "kt"], "logits"),
        node("Softmax", ["logits"], "weights", axis=-1),
        node("MatMul", ["weights", "history"], "attended"),
        node("ReduceMean", ["attended"], "pooled", axes=[1], keepdims=0),
        node("MatMul", ["item", "wi"], "tower"),
        node("Relu", ["tower"], "known"),
        node("Mul", ["pooled", "known"], "cross"),
        node("Concat", ["pooled", "known", "cross"], "x", axis=-1),
        node("MatMul", ["x", "w1"], "a"),
        node("Tanh", ["a"], "h"),
        node("MatMul", ["h", "w2"], "score"),
    ]
    weights = {"wq": drawn(D, D), "wk": drawn(D, D, seed=1), "wi": drawn(D, D, seed=2)}
    return model(nodes, ["history", "item"], weights | {"w1": drawn(3 * D, 16), "w2": drawn(16, 1)})


def with_shapes():
    """Rows on the second axis, a shape read while it runs, heads: as exporters write attention."""
    nodes = [
        node("Transpose", ["history"], "turned", perm=[1, 0, 2]),
        node("Shape", ["turned"], "shape"),
        node("Gather", ["shape", "one"], "rows"),
        node("Unsqueeze", ["rows", "zero"], "rows1"),
        node("Concat", ["length", "rows1", "half"], "split", axis=0),
        node("Reshape", ["turned", "split"], "heads"),
        node("Softmax", ["heads"], "soft", axis=-1),
        node("Shape", ["turned"], "whole"),
        node("Reshape", ["soft", "whole"], "joined"),
        node("Transpose", ["joined"], "back", perm=[1, 0, 2]),
        node("ReduceMean", ["back"], "pooled", axes=[1], keepdims=0),
        node("Shape", ["history"], "sizes"),
        node("Slice", ["sizes", "zero", "one1"], "n"),
        node("Concat", ["n", "d1"], "as_item", axis=0),
        node("Reshape", ["item", "as_item"], "same"),  # its rows are counted on the history
        node("Sub", ["pooled", "same"], "gap"),
        node("MatMul", ["gap", "w"], "score"),
    ]
    integers = {"one": 1, "zero": [0], "one1": [1], "length": [HISTORY], "half": [2, D // 2], "d1": [D]}
    weights = {name: np.array(value, np.int64) for name, value in integers.items()}
    return model(nodes, ["history", "item"], weights | {"w": drawn(D, 1)})


def with_a_bid():
    """A value that comes with the candidate is neither the request's nor the catalogue's."""
    nodes = [
        node("MatMul", ["user", "w"], "of_user"),
        node("MatMul", ["item", "w"], "of_item"),
        node("Mul", ["bid", "of_item"], "worth"),
        node("Add", ["of_user", "worth"], "both"),
        node("MatMul", ["both", "w2"], "score"),
    ]
    return model(nodes, ["user", "item", "bid"], {"w": drawn(D, 4), "w2": drawn(4, 1)})


def all_of_the_request():
    """A user tower inside the re-ranker: its first layer is over a concatenation of the request's parts only."""
    nodes = [
        node("ReduceMean", ["history"], "pooled", axes=[1], keepdims=0),
        node("Concat", ["user", "pooled"], "x", axis=1),
        node("Gemm", ["x", "w1", "b1"], "person"),
        node("MatMul", ["item", "w2"], "known"),
        node("Mul", ["person", "known"], "both"),
        node("ReduceSum", ["both", "one"], "score", keepdims=1),
    ]
    weights = {"w1": drawn(2 * D, 4), "b1": drawn(4), "w2": drawn(D, 4), "one": np.array([1], np.int64)}
    return model(nodes, ["user", "history", "item"], weights)


# -------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize(("is_folded", "has_tables"), WAYS)
@pytest.mark.parametrize("make", [mlp, with_history, with_shapes, with_a_bid, all_of_the_request])
def test_a_cut_graph_gives_the_same_scores_on_any_number_of_rows(make, is_folded, has_tables):
    made = make()
    if (make.__name__, is_folded, has_tables) in NOTHING:
        with pytest.raises(graph_parts.NothingToCut):
            cut(made, is_folded=is_folded, has_tables=has_tables)
    else:
        assert_same_scores(made, cut(made, is_folded=is_folded, has_tables=has_tables))


def test_what_multiplies_the_request_becomes_weights_made_once():
    parts = cut(mlp(), is_folded=True)
    assert kinds(parts.rest) == ["Concat", "Gemm", "Relu", "MatMul"]
    widths = {o.name: [d.dim_value for d in o.type.tensor_type.shape.dim] for o in parts.once.graph.output}
    assert sorted(widths.values()) == [[1, 16], [D + 3, 16]]  # bias and weights: user and cross are gone


def test_the_history_is_encoded_once_and_the_tower_becomes_a_table():
    parts = cut(with_history(), has_tables=True)
    assert "Softmax" in kinds(parts.once) and "Softmax" not in kinds(parts.rest)
    assert kinds(parts.item) == ["MatMul", "Relu"] and parts.tables == ("known",)
    assert {i.name for i in parts.rest.graph.input} == {"pooled", "known"}
    folded = cut(with_history(), is_folded=True, has_tables=True)
    assert kinds(folded.rest) == ["Gemm", "Tanh", "MatMul"]


def test_rows_on_another_axis_are_no_obstacle_inside_a_part():
    parts = cut(with_shapes())
    assert {"Softmax", "Transpose"} <= set(kinds(parts.once))
    assert {"Softmax", "Transpose", "ReduceMean"}.isdisjoint(kinds(parts.rest))


def test_a_candidate_s_own_value_keeps_what_it_meets_in_the_rest():
    parts = cut(with_a_bid(), has_tables=True)
    assert kinds(parts.item) == ["MatMul"]
    assert {"Mul", "Add"} <= set(kinds(parts.rest))


def test_nothing_is_cut_that_only_moves_numbers():
    with pytest.raises(graph_parts.Whole, match="request alone"):
        cut(mlp())
    with pytest.raises(graph_parts.Whole, match="item alone"):
        cut(mlp(), is_folded=True, has_tables=True)


def test_a_graph_with_branches_stays_whole():
    then = helper.make_graph(
        [node("Identity", ["item"], "a")], "then", [], [helper.make_tensor_value_info("a", 1, None)]
    )
    other = helper.make_graph([node("Neg", ["item"], "b")], "other", [], [helper.make_tensor_value_info("b", 1, None)])
    nodes = [
        helper.make_node("If", ["yes"], ["chosen"], then_branch=then, else_branch=other),
        node("MatMul", ["chosen", "w"], "score"),
    ]
    made = model(nodes, ["item"], {"yes": np.array(True), "w": drawn(D, 1)})
    with pytest.raises(graph_parts.Whole, match="inner graphs"):
        cut(made)


def test_a_graph_whose_shapes_depend_on_values_stays_whole():
    """The mean over the history's items that aren't zero: how many that are is baked into no part."""
    nodes = [
        node("ReduceSum", ["history", "two"], "sums", keepdims=0),
        node("NonZero", ["sums"], "places"),
        node("Shape", ["places"], "count"),
        node("Cast", ["count"], "count_f", to=TensorProto.FLOAT),
        node("ReduceSum", ["count_f", "zero"], "total", keepdims=0),
        node("Mul", ["item", "total"], "scaled"),
        node("MatMul", ["scaled", "w"], "score"),
    ]
    weights = {"two": np.array([2], np.int64), "zero": np.array([0], np.int64), "w": drawn(D, 1)}
    with pytest.raises(graph_parts.Whole, match="depends on values"):
        cut(model(nodes, ["history", "item"], weights))


def test_what_can_not_cross_takes_with_it_what_reads_it():
    """Item tokens of over 1,024 numbers are read by the pooling and by the rest: neither becomes a table."""
    nodes = [
        node("MatMul", ["item", "wide"], "tokens"),
        node("ReduceMean", ["tokens"], "pooled", axes=[1], keepdims=1),
        node("MatMul", ["user", "wide"], "asked"),
        node("Mul", ["tokens", "asked"], "both"),
        node("ReduceMean", ["both"], "alike", axes=[1], keepdims=1),
        node("Add", ["alike", "pooled"], "score"),
    ]
    made = model(nodes, ["user", "item"], {"wide": drawn(D, 2_000)})
    with pytest.raises(graph_parts.NothingToCut):
        cut(made, has_tables=True)
    assert_same_scores(made, cut(made))
