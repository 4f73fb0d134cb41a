"""A re-ranker in eight bits: static, so that rows are scored alone; taken where it pays and loses hardly a thing."""

import asyncio
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from app.bundle import Generation, load
from app.warmup import offline_query, prove, rank_offline
from models import evaluate, hoisting, quantising, synthesize
from models.__main__ import main
from models.hoisting import Way
from models.pack import check_samples
from models.pack_config import PackError
from tests import world

SILENT = lambda _: None  # noqa: E731


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made-up bundle; its requests are beside it."""
    out = tmp_path_factory.mktemp("quantising") / "small"
    hidden = (32, 16, 8)
    synthesize.synthesize(
        out, 1_000, d=8, seed=0, name="small", force=False, recall=0.9, is_trained=False, hidden=hidden, say=SILENT
    )
    return out


@pytest.fixture
def is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the clock says."""
    monkeypatch.setattr(hoisting, "timed", lambda ways, *_: {way.what: 1 / (1 + ("int8" in way.what)) for way in ways})


def quantise(bundle: Path, out: Path) -> int:
    return main(["quantise", str(bundle), "--requests", f"{bundle}.requests.jsonl", "--out", str(out)])


def products(bundle: Path) -> list[str]:
    return [node.op_type for node in onnx.load(bundle / "re_ranker.onnx").graph.node if "Linear" in node.op_type]


def test_a_bundle_in_eight_bits_serves_nearly_the_same_order(made: Path, tmp_path: Path, is_fast: None) -> None:
    assert quantise(made, tmp_path / "int8") == 0
    assert {"QuantizeLinear", "DequantizeLinear"} <= set(products(tmp_path / "int8"))
    whole, eight = load(made), load(tmp_path / "int8")
    asyncio.run(prove(eight))
    requests = evaluate.read_requests(Path(f"{made}.requests.jsonl"))[:50]
    shared = []
    for request in requests:
        one, other = (rank(generation, request) for generation in (whole, eight))
        shared.append(len(set(one) & set(other)) / len(one))
    assert 0.8 < np.mean(shared) < 1  # not the same graph, and not another model


def rank(generation: Generation, request: dict) -> list[int]:
    funnel = evaluate.offline_funnel(generation)
    return asyncio.run(rank_offline(funnel, offline_query(request, generation))).rows.tolist()


def test_what_loses_too_much_is_not_taken(
    made: Path, tmp_path: Path, is_fast: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quantising, "MOST_LOST", -1.0)
    assert quantise(made, tmp_path / "int8") == 2
    said = capsys.readouterr()
    assert "served in float32" in said.out
    assert "doesn't pay" in said.err
    assert not (tmp_path / "int8").exists()


def test_what_is_no_faster_is_not_taken(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hoisting, "timed", lambda ways, *_: dict.fromkeys((way.what for way in ways), 1.0))
    assert quantise(made, tmp_path / "int8") == 2


@pytest.mark.parametrize(("options", "is_quantised"), [(["--int8"], True), ([], False)], ids=["told to", "not told to"])
def test_pack_quantises_what_it_has_cut_where_it_is_told_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], is_quantised: bool
) -> None:
    """The tiny world with a re-ranker of three layers over [user, item], of which the first is folded."""
    source = world.write_source(tmp_path / "source")
    onnx.save(layered(), source.parent / "re_ranker.onnx")
    histories = ([1000 + i % 50, 1000 + i % 37] for i in range(250))
    samples = source.parent / "samples.jsonl"
    samples.write_text("".join(f'{{"user": {{"history": {history}}}}}\n' for history in histories))
    text = source.read_text()
    start, end = text.index("[re_ranker]"), text.index("[pre_ranker]")
    inputs = '{name = "user", source = "user_embedding"}, {name = "item", source = "item_embedding"}'
    source.write_text(f'{text[:start]}[re_ranker]\nfile = "re_ranker.onnx"\ninputs = [{inputs}]\n\n{text[end:]}')
    # Whatever the clock says: what is more cut, or in fewer bits, is faster.
    monkeypatch.setattr(hoisting, "timed", lambda ways, *_: {way.what: 1 / (1 + len(way.what)) for way in ways})
    monkeypatch.setattr(quantising, "MOST_LOST", 1.0)
    assert main(["pack", "--config", str(source), "--out", str(tmp_path / "packed"), *options]) == 0
    generation = load(tmp_path / "packed")
    asyncio.run(prove(generation))
    assert generation.once is not None
    assert bool(products(tmp_path / "packed")) is is_quantised


def layered() -> onnx.ModelProto:
    """score = w3 · relu(relu([user, item] w1) w2)"""
    rng, d = np.random.default_rng(0), world.D
    shapes = {"w1": (2 * d, 16), "w2": (16, 8), "w3": (8, 1)}
    weights = [numpy_helper.from_array(rng.standard_normal(s).astype(np.float32), n) for n, s in shapes.items()]
    nodes = [helper.make_node("Concat", ["user", "item"], ["x"], axis=1)]
    nodes += [helper.make_node("MatMul", ["x", "w1"], ["a1"]), helper.make_node("Relu", ["a1"], ["h1"])]
    nodes += [helper.make_node("MatMul", ["h1", "w2"], ["a2"]), helper.make_node("Relu", ["a2"], ["h2"])]
    nodes += [helper.make_node("MatMul", ["h2", "w3"], ["score"])]
    inputs = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["n", d]) for n in ("user", "item")]
    score = helper.make_tensor_value_info("score", onnx.TensorProto.FLOAT, ["n", 1])
    graph = helper.make_graph(nodes, "layered", inputs, [score], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def test_a_graph_without_products_is_served_as_it_is(bundle: Path, tmp_path: Path, is_fast: None) -> None:
    requests = tmp_path / "requests.jsonl"
    requests.write_text("".join(f'{{"user": {{"history": [{1000 + i % 50}]}}}}\n' for i in range(200)))
    assert main(["quantise", str(bundle), "--requests", str(requests), "--out", str(tmp_path / "int8")]) == 2


def test_too_few_sample_requests_are_refused(made: Path, tmp_path: Path) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(Path(f"{made}.requests.jsonl").read_text().splitlines()[:100]))
    with pytest.raises(PackError, match="has 100 requests; allowed is 200 or more"):
        check_samples(few)


def test_a_bundle_that_is_there_is_refused(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "int8")
    assert quantise(made, tmp_path / "int8") == 2


def chain(*ops: str) -> onnx.ModelProto:
    """x → one product after the other → y, with a bend between."""
    nodes, at = [], "x"
    for number, op in enumerate(ops):
        nodes.append(helper.make_node(op, [at, f"w{number}"], [f"a{number}"]))
        nodes.append(helper.make_node("Relu", [f"a{number}"], [f"h{number}"]))
        at = f"h{number}"
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 4]) for name in ("x", at))
    weights = [numpy_helper.from_array(np.eye(4, dtype=np.float32), f"w{number}") for number in range(len(ops))]
    return helper.make_model(helper.make_graph(nodes, "chain", [x], [y], weights))


def test_all_products_but_the_last_or_but_the_first_as_well() -> None:
    model = chain("MatMul", "Gemm", "MatMul")
    ways = dict(quantising._ways(model))
    names = [node.name for node in model.graph.node if node.op_type != "Relu"]
    assert len(set(names)) == 3
    assert ways == {"in int8": names[:2], "in int8 but for the first layer": names[1:2]}


def test_of_two_layers_there_is_one_way_and_of_one_there_is_none() -> None:
    assert list(dict(quantising._ways(chain("Gemm", "Gemm")))) == ["in int8"]
    assert dict(quantising._ways(chain("Gemm"))) == dict(quantising._ways(chain())) == {}


def test_the_loss_is_what_the_float_model_says_of_what_is_shown_instead() -> None:
    scores = np.array([0.4, 0.3, 0.1, 0.0], np.float32)
    rows = np.arange(4)
    candidates = type("Candidates", (), {"rows": rows})
    sample = quantising._Sample(candidates, {}, scores)  # type: ignore[arg-type]

    def lost(shown: list[float]) -> float:
        way = lambda _: np.array(shown, np.float32)  # noqa: E731
        return quantising._lost(way, [sample], 2)  # type: ignore[arg-type]

    assert lost([9, 8, 1, 0]) == pytest.approx(0)
    discount = 1 / np.log2(3)
    assert lost([8, 9, 1, 0]) == pytest.approx(1 - (0.3 + 0.4 * discount) / (0.4 + 0.3 * discount))
    assert lost([0, 1, 8, 9]) == pytest.approx(1 - (0.0 + 0.1 * discount) / (0.4 + 0.3 * discount), abs=1e-6)
    scores[3] = -np.inf  # what the model rules out is worth nothing, and others what they are above the least
    assert lost([9, 8, 1, -np.inf]) == pytest.approx(0)
    assert lost([8, 9, 1, -np.inf]) == pytest.approx(1 - (0.2 + 0.3 * discount) / (0.3 + 0.2 * discount))


def test_a_way_whose_rows_hang_together_is_refused(
    made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Way, "__call__", lambda way, known: np.arange(len(known["item"]), dtype=np.float32))
    assert quantise(made, tmp_path / "int8") == 2
    assert "a row's score changes" in capsys.readouterr().out
