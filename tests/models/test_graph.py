"""Strangers' graphs: bound, expanded and flattened without changing a score, or refused in one sentence."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from app.features import ModelInput, Source
from models import graph
from models.pack_config import PackError

D = 4
USER = ModelInput(name="user", source=Source.USER_EMBEDDING)
ITEM = ModelInput(name="item", source=Source.ITEM_EMBEDDING)
SCORE = ModelInput(name="found", source=Source.RETRIEVAL_SCORE)
INPUTS = (USER, ITEM)


def model(
    nodes: list[onnx.NodeProto],
    *,
    user: Any = 1,
    item: Any = "n",
    output: str = "score",
    opset: int = 17,
    domains: tuple[str, ...] = (),
    inputs: dict[str, list[Any]] | None = None,
    shape: tuple[Any, ...] = ("n",),
    **constants: Any,
) -> onnx.ModelProto:
    """A graph of user f32[user, 4] and item f32[item, 4]."""
    shapes = inputs if inputs is not None else {"user": [user, D], "item": [item, D]}
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)],
        [onnx.numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()],
    )
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    return helper.make_model(made, opset_imports=opsets, ir_version=10)


def dot(*, keepdims: int = 0, **options: Any) -> onnx.ModelProto:
    """score[n] = user · item, or [n, 1]"""
    options |= {"shape": ("n", 1)} if keepdims else {}
    nodes = [
        helper.make_node("Mul", ["user", "item"], ["product"]),
        helper.make_node("ReduceSum", ["product", "one"], ["score"], keepdims=keepdims),
    ]
    return model(nodes, one=np.array([1]), **options)


def concat_dot(user: Any) -> onnx.ModelProto:
    """score[n, 1] = [user, item] · w: a graph that wants the user row by row."""
    nodes = [
        helper.make_node("Concat", ["user", "item"], ["both"], axis=1),
        helper.make_node("MatMul", ["both", "w"], ["score"]),
    ]
    return model(nodes, user=user, shape=("n", 1), w=np.arange(2 * D, dtype=np.float32)[:, None])


def saved(tmp_path: Path, proto: onnx.ModelProto) -> Path:
    file = tmp_path / "g.onnx"
    file.write_bytes(proto.SerializeToString())
    return file


def run(proto: onnx.ModelProto, feeds: graph.Feeds) -> NDArray[Any]:
    return ort.InferenceSession(proto.SerializeToString()).run(None, dict(feeds))[0]


def feeds(n: int) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(n)
    return {
        "user": rng.standard_normal((1, D)).astype(np.float32),
        "item": rng.standard_normal((n, D)).astype(np.float32),
    }


# -------------------------------------------------------------------------------------------- binding


@pytest.mark.parametrize("user", ["n", None, "batch"])
def test_a_request_input_that_the_graph_wants_row_by_row_is_sent_once_and_expanded(user: str | None) -> None:
    proto, given = concat_dot(user), feeds(7)
    rows = {"user": np.repeat(given["user"], 7, axis=0), "item": given["item"]}
    expected = run(proto, rows)
    assert graph.bind_re_ranker(proto, INPUTS, "g.onnx") == ["user"]
    onnx.checker.check_model(proto, full_check=True)
    assert run(proto, given) == pytest.approx(expected)
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1


def test_an_expanded_input_reaches_inner_graphs() -> None:
    branch = helper.make_graph(
        [helper.make_node("Mul", ["user", "item"], ["inner"])],
        "branch",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)],
    )
    passed_on = helper.make_graph(
        [helper.make_node("Identity", ["user"], ["kept"])],
        "passed_on",
        [],
        [helper.make_tensor_value_info("kept", TensorProto.FLOAT, None)],
    )
    nodes = [
        helper.make_node("If", ["yes"], ["product"], then_branch=branch, else_branch=passed_on),
        helper.make_node("ReduceSum", ["product", "one"], ["score"], keepdims=0),
    ]
    proto, given = model(nodes, user="n", yes=np.array(True), one=np.array([1])), feeds(3)
    graph.bind_re_ranker(proto, INPUTS, "g.onnx")
    assert run(proto, given) == pytest.approx((given["user"] * given["item"]).sum(axis=1), abs=1e-6)


def test_a_request_input_declared_once_is_left_alone() -> None:
    proto = dot()
    before = proto.SerializeToString()
    assert graph.bind_re_ranker(proto, INPUTS, "g.onnx") == []
    assert proto.SerializeToString() == before


def test_one_score_in_a_row_of_its_own_is_flattened() -> None:
    proto, given = dot(keepdims=1), feeds(5)
    expected = run(proto, given)
    assert graph.check_output(expected, 5, "g.onnx")
    graph.flatten_output(proto)
    onnx.checker.check_model(proto, full_check=True)
    assert np.array_equal(run(proto, given), expected[:, 0])


@pytest.mark.parametrize(
    ("proto", "inputs", "sentence"),
    [
        (lambda: dot(item=32), INPUTS, "first axis of input item is fixed at 32"),
        (lambda: dot(item=1), INPUTS, "first axis of input item is fixed at 1"),
        (lambda: dot(user=8), INPUTS, "input user is one a request but its first axis is 8"),
        (dot, (USER,), "input item is bound to no source"),
        (dot, (*INPUTS, SCORE), "has no input found; its inputs are user, item"),
        (dot, (*INPUTS, ITEM), "input item is bound twice"),
        (dot, (USER, ModelInput(name="item", source=Source.CONTEXT, field="x")), "no input reads anything of an item"),
    ],
)
def test_a_graph_that_does_not_fit_its_schema_is_refused(
    proto: Callable[[], onnx.ModelProto], inputs: tuple[ModelInput, ...], sentence: str
) -> None:
    with pytest.raises(PackError, match=sentence):
        graph.bind_re_ranker(proto(), inputs, "g.onnx")


def test_two_outputs_are_refused() -> None:
    proto = dot()
    proto.graph.output.append(helper.make_tensor_value_info("product", TensorProto.FLOAT, None))
    with pytest.raises(PackError, match="has the outputs score, product; allowed is one"):
        graph.bind_re_ranker(proto, INPUTS, "g.onnx")


def test_an_input_without_axes_is_refused() -> None:
    proto = dot(inputs={"user": [], "item": ["n", D]})
    with pytest.raises(PackError, match="input user has no axes"):
        graph.bind_re_ranker(proto, INPUTS, "g.onnx")


def test_a_user_tower_that_reads_an_item_is_refused() -> None:
    with pytest.raises(PackError, match="not known before retrieval"):
        graph.bind_user_tower(dot(), INPUTS, "tower.onnx")


def test_a_user_tower_of_a_fixed_batch_is_refused() -> None:
    history = ModelInput(name="user", source=Source.HISTORY, table="embedding", length=D)
    proto = model([helper.make_node("Identity", ["user"], ["score"])], inputs={"user": [16, D]})
    with pytest.raises(PackError, match="first axis of input user is fixed"):
        graph.bind_user_tower(proto, (history,), "tower.onnx")


# -------------------------------------------------------------------------------------------- reading


def test_a_good_graph_is_read(tmp_path: Path) -> None:
    assert graph.read_graph(saved(tmp_path, dot())).graph.name == "g"


def test_what_is_no_graph_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "g.onnx"
    file.write_bytes(b"weights")
    with pytest.raises(PackError, match="not an ONNX model"):
        graph.read_graph(file)


def test_weights_in_another_file_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "g.onnx"
    onnx.save(concat_dot("n"), file, save_as_external_data=True, location="g.data", size_threshold=0)
    with pytest.raises(PackError, match="the weights 'w' are in another file"):
        graph.read_graph(file)


def test_an_operator_of_another_domain_is_refused(tmp_path: Path) -> None:
    node = helper.make_node("Mine", ["item"], ["score"], domain="my.ops")
    with pytest.raises(PackError, match=r"operator Mine is from 'my\.ops'"):
        graph.read_graph(saved(tmp_path, model([node], domains=("my.ops",))))


def test_an_old_opset_is_refused(tmp_path: Path) -> None:
    node = helper.make_node("Relu", ["item"], ["score"])
    with pytest.raises(PackError, match="is of opset 7; allowed is 8 or newer"):
        graph.read_graph(saved(tmp_path, model([node], opset=7)))


# ----------------------------------------------------------------------------------------- behaviour


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        (np.zeros((3, 2), np.float32), r"gives \[3, 2\] for 3 rows"),
        (np.zeros(1, np.float32), r"gives \[1\] for 3 rows"),
        (np.zeros(3, np.float64), "output is float64"),
        (np.array([0, np.nan, 1], np.float32), "1 of 3 scores are not finite"),
    ],
)
def test_anything_but_one_finite_score_a_row_is_refused(output: NDArray[Any], sentence: str) -> None:
    with pytest.raises(PackError, match=sentence):
        graph.check_output(output, 3, "g.onnx")


def check(proto: onnx.ModelProto) -> None:
    session = ort.InferenceSession(proto.SerializeToString())
    graph.check_rows_alone(lambda given: session.run(None, dict(given))[0], feeds(24), ["item"], "g.onnx")


def tail(*nodes: onnx.NodeProto, **constants: Any) -> onnx.ModelProto:
    """dot's raw score in "raw", then these nodes."""
    proto = dot(keepdims=1)
    proto.graph.node[1].output[0] = "raw"
    proto.graph.node.extend(nodes)
    for name, value in constants.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), name))
    flat = helper.make_node("Reshape", ["out", "minus"], ["score"])
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([-1]), "minus"))
    proto.graph.node.append(flat)
    return proto


def test_rows_that_are_scored_alone_pass() -> None:
    check(tail(helper.make_node("Sigmoid", ["raw"], ["out"])))


@pytest.mark.parametrize(
    "proto",
    [
        tail(helper.make_node("Softmax", ["raw"], ["out"], axis=0)),
        tail(  # batch norm in training mode
            helper.make_node("ReduceMean", ["raw"], ["mean"], axes=[0]),
            helper.make_node("Sub", ["raw", "mean"], ["out"]),
        ),
        tail(  # dynamic quantisation
            helper.make_node("DynamicQuantizeLinear", ["raw"], ["q", "scale", "zero"]),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["out"]),
        ),
        tail(  # a list-wise model: a running total over the rows
            helper.make_node("CumSum", ["raw", "axis"], ["out"]), axis=np.array(0)
        ),
    ],
    ids=["softmax over rows", "batch mean", "dynamic quantisation", "running total"],
)
def test_a_graph_whose_row_scores_depend_on_the_batch_is_refused(proto: onnx.ModelProto) -> None:
    with pytest.raises(PackError, match="a row's score changes with the"):
        check(proto)


def test_a_graph_that_draws_lots_is_refused() -> None:
    noise = helper.make_node("RandomNormalLike", ["raw"], ["noise"])
    with pytest.raises(PackError, match="changes from one run to the next"):
        check(tail(noise, helper.make_node("Add", ["raw", "noise"], ["out"])))
