"""Packing the tiny world: the bundle gives the answers that are known, and every wrong thing is one sentence."""

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from app.bundle import Generation, load
from app.warmup import prove
from models import evaluate
from models.__main__ import main
from models.pack import pack
from models.pack_config import PackError
from tests import world


def silent(_: str) -> None:
    """Says nothing."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The tiny world's pack.toml, beside its files; to be spoiled."""
    return world.write_source(tmp_path / "source")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Generation:
    folder = tmp_path_factory.mktemp("packed")
    return load(pack(world.write_source(folder / "source"), folder / "bundle", say=silent))


# ---------------------------------------------------------------------------------------- what is made


def test_the_packed_bundle_proves_itself_and_holds_what_was_measured(packed: Generation) -> None:
    asyncio.run(prove(packed))
    retriever = packed.manifest.retrievers[0]
    assert (retriever.kind, retriever.recall.target, retriever.recall.reached) == ("flat", 0.95, 1.0)
    assert retriever.recall.at == world.RETRIEVE
    assert packed.manifest.calibration.n_requests == 200
    assert len(packed.manifest.golden) == 8


def test_golden_scores_are_those_of_the_formula(packed: Generation) -> None:
    row_of = {world.item_id(row): row for row in world.ROW.tolist()}
    for golden in packed.manifest.golden:
        user = golden.request["user"]
        history = tuple(row_of[i] for i in user["history"])
        scores = world.rerank_scores(history, age=user["features"]["age"])
        assert golden.scores == pytest.approx([scores[row_of[i]] for i in golden.items], abs=1e-5)


def test_carried_scores_land_on_the_re_rankers_scale(packed: Generation) -> None:
    queries = evaluate.resolve(packed, [world.sample(n, world.ITEM_IDS.tolist()) for n in range(60)])
    scored = list(evaluate.score_through(packed, queries))
    fine = np.concatenate([s.reranking for s in scored])
    carried = packed.manifest.calibration.preranking(np.concatenate([s.preranking for s in scored]))
    assert np.mean(carried - fine) == pytest.approx(0, abs=0.05)
    assert np.corrcoef(carried, fine)[0, 1] > 0.8


def test_typical_retrieval_score_is_the_median_of_what_is_found(packed: Generation) -> None:
    queries = evaluate.resolve(packed, [world.sample(n, world.ITEM_IDS.tolist()) for n in range(200)])
    found = [s.candidates.retrieval_scores for s in evaluate.score_through(packed, queries)]
    assert packed.manifest.calibration.typical_retrieval_score == pytest.approx(np.median(np.concatenate(found)))


def test_the_same_inputs_make_the_same_files(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    first, second = (pack(source, tmp_path / name, say=silent) for name in ("first", "second"))
    assert (first / "manifest.json").read_bytes() == (second / "manifest.json").read_bytes()
    assert json.loads((first / "manifest.json").read_text())["created"] == "1970-01-02T00:00:00Z"


def test_text_ids_and_half_precision_embeddings_are_packed_as_given(tmp_path: Path) -> None:
    config = world.write_source(tmp_path / "source", are_ids_text=True)
    np.save(config.with_name("item_embeddings.npy"), world.EMBEDDING.astype(np.float16))
    generation = load(pack(config, tmp_path / "bundle", say=silent))
    assert generation.ids.is_text
    assert generation.tables["embedding"].dtype == np.float16


def test_the_manifest_says_whether_a_search_is_sampled(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.index.sampled_by", lambda _, kind, *rest: 16 * (kind == "ivf_sq8"))
    said: list[str] = []
    generation = load(pack(source, tmp_path / "bundle", recall=0.05, kind="ivf_sq8", say=said.append))
    assert generation.manifest.retrievers[0].sampled == 16
    assert any("a sample of 1 in 16" in line for line in said)


def test_another_kind_of_index_can_be_asked_for(source: Path, tmp_path: Path) -> None:
    generation = load(pack(source, tmp_path / "bundle", kind="hnsw", say=silent))
    assert generation.manifest.retrievers[0].kind == "hnsw"
    assert generation.manifest.retrievers[0].recall.reached >= 0.95


def test_scores_in_a_column_and_request_inputs_row_by_row_make_the_same_bundle(
    source: Path, tmp_path: Path, packed: Generation
) -> None:
    model = onnx.load(source.with_name("re_ranker.onnx"))
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[0].dim_param = "n"
    model.graph.node.append(helper.make_node("Unsqueeze", ["score", "one"], ["column"]))
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("column", TensorProto.FLOAT, ["n", 1]))
    onnx.save(model, source.with_name("re_ranker.onnx"))
    said: list[str] = []
    generation = load(pack(source, tmp_path / "bundle", say=said.append))
    assert any("expanded to the rows: user, history, freshness, age, occupation" in line for line in said)
    for mine, other in zip(generation.manifest.golden, packed.manifest.golden, strict=True):
        assert mine.items == other.items
        assert mine.scores == pytest.approx(other.scores, abs=1e-6)


def test_what_the_funnel_loses_against_its_own_re_ranker_is_printed(
    packed: Generation, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = source.with_name("samples.jsonl")
    assert main(["evaluate", str(packed.path), "--requests", str(samples), "--most", "20"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"own best 10 over all items, [01]\.\d{3} reach it", said)
    assert "on 100 requests held out" in said
    assert re.search(r"re-ranking shards lost( +\d\.\d\d: \d\.\d{3}/\d\.\d{3}){5}", said)


# ---------------------------------------------------------------------------------------- the target


def test_a_target_that_is_there_is_refused_and_replaced_only_by_force(source: Path, tmp_path: Path) -> None:
    out = pack(source, tmp_path / "bundle", say=silent)
    with pytest.raises(PackError, match="is there already; --force replaces it"):
        pack(source, out, say=silent)
    (out / "stray").touch()
    pack(source, out, force=True, say=silent)
    assert load(out).n_items == world.N


def test_force_replaces_nothing_but_bundles(source: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    with pytest.raises(PackError, match="is no bundle; --force replaces bundles only"):
        pack(source, tmp_path / "precious", force=True, say=silent)


def test_a_refusal_leaves_nothing_behind_and_what_was_there_stays(source: Path, tmp_path: Path) -> None:
    out = pack(source, tmp_path / "out" / "bundle", say=silent)
    before = (out / "manifest.json").read_bytes()
    np.save(source.with_name("year.npy"), np.zeros(3, np.float32))
    with pytest.raises(PackError):
        pack(source, out, force=True, say=silent)
    assert (out / "manifest.json").read_bytes() == before
    assert [p.name for p in out.parent.iterdir()] == ["bundle"]


# ----------------------------------------------------------------------------------------- wrong things

Spoil = Callable[[Path], Any]


def array(name: str, change: Callable[[Any], Any]) -> Spoil:
    """Change one array of the source."""
    return lambda folder: np.save(folder / f"{name}.npy", change(np.load(folder / f"{name}.npy")))


def toml(old: str, new: str) -> Spoil:
    """Change the configuration."""

    def spoil(folder: Path) -> None:
        text = (folder / "pack.toml").read_text()
        assert old in text
        (folder / "pack.toml").write_text(text.replace(old, new, 1))

    return spoil


def put(row: Any, value: Any) -> Callable[[Any], Any]:
    def change(values: Any) -> Any:
        values[row] = value
        return values

    return change


def samples(change: Callable[[list[str]], list[str]]) -> Spoil:
    def spoil(folder: Path) -> None:
        file = folder / "samples.jsonl"
        file.write_text("\n".join(change(file.read_text().splitlines())))

    return spoil


def pre_ranker(**changes: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        with np.load(folder / "pre_ranker.npz") as held:
            arrays = dict(held)
        np.savez(folder / "pre_ranker.npz", **(arrays | changes))

    return spoil


def graph(change: Callable[[onnx.ModelProto], Any], name: str = "re_ranker") -> Spoil:
    def spoil(folder: Path) -> None:
        model = onnx.load(folder / f"{name}.onnx")
        change(model)
        onnx.save(model, folder / f"{name}.onnx")

    return spoil


def batch_norm(model: onnx.ModelProto) -> None:
    """The scores less their mean over the batch: batch norm in training mode."""
    model.graph.node[-1].output[0] = "raw"
    model.graph.node.append(helper.make_node("ReduceMean", ["raw"], ["mean"], axes=[0]))
    model.graph.node.append(helper.make_node("Sub", ["raw", "mean"], ["score"]))


def sum_of_all(model: onnx.ModelProto) -> None:
    """One score for the whole batch."""
    model.graph.node[-1].output[0] = "raw"
    model.graph.node.append(helper.make_node("ReduceSum", ["raw"], ["score"], keepdims=1))


def fixed_axis(model: onnx.ModelProto) -> None:
    model.graph.input[1].type.tensor_type.shape.dim[0].dim_value = 64


def wide_history(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 99


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (toml('name = "tiny"', "name = "), "not TOML"),
        (toml("[items]", "[items]\nembedings = 1"), "items.embedings: no such key; allowed are ids, embeddings"),
        (toml('version = "1"\n', ""), "version: is missing"),
        (toml('"year.npy"', '"years.npy"'), "items.tables.year: there is no file"),
        (toml("year = ", "row = "), "'row' can't name a table"),
        (toml('source = "user_embedding"', 'source = "user"'), "re_ranker.inputs.0.source: Input should be"),
        (toml("retrieve = 40", "retrieve = 0"), "funnel.retrieve: Input should be greater"),
        (toml("retrieve = 40", "retrieve = 31"), "funnel: .*rerank is 32; allowed is up to what is retrieved, 31"),
        (toml('table = "year"', 'table = "yeer"'), "input year reads the item table yeer, which there isn't"),
        (toml('table = "year"', 'table = "title"'), "input year reads the item table title, which there isn't"),
        (toml("length = 5}", "length = 6}"), r"input history is .* \[1, 5, 8\], its source gives float32 \[n, 6, 8\]"),
        (toml('{name = "year"', '{name = "yr"'), "has no input yr; its inputs are user, item, history"),
        (toml('{name = "user", source = "user_embedding"},', ""), "input user is bound to no source"),
        (toml('field = "occupation", dtype = "int64"', 'field = "occupation"'), "input occupation is tensor"),
        (toml('[items.vocab]\ngenres = "', '[items.vocab]\ngenre = "'), "items.vocab.genre: names no item table"),
        (array("item_ids", put(1, 1000)), "items.ids: 1000 is there more than once"),
        (array("item_ids", lambda a: a.astype(np.float32)), r"items.ids: is float32 \[50\]"),
        (array("item_ids", lambda a: a[:0]), r"items.ids: is int64 \[0\]; allowed is one axis, not empty"),
        (array("item_embeddings", lambda a: a[:40]), r"items.embeddings: is \[40, 8\]; .* each of the 50 ids"),
        (array("item_embeddings", put((7, 3), np.nan)), "items.embeddings: row 7 is NaN or infinite"),
        (array("item_embeddings", lambda a: a.astype(np.float64)), "items.embeddings: is float64"),
        (
            array("item_embeddings", lambda a: a[:, :5]),
            r"user_tower.onnx: input history is .* \[1, 5, 8\], its source gives float32 \[n, 5, 5\]",
        ),
        (array("year", put(9, np.inf)), "items.tables.year: row 9 is NaN or infinite"),
        (array("title", lambda a: a.astype("S")), r"items.tables.title: is \|S7; allowed are"),
        (array("user_ids", put(1, "ann")), "users.ids: 'ann' is there more than once"),
        (array("user_history", put((0, 0), 50)), "users.history: holds -1 to 50; allowed are item rows, -1 to 49"),
        (array("user_history", lambda a: a[:, ::-1]), "users.history: has a row after a -1"),
        (array("age", lambda a: np.stack([a, a], axis=1)), "users/age.npy: is"),
        (array("popular", put(0, 50)), "popular: holds 0 to 50; allowed are item rows, 0 to 49"),
        (array("popular", put(0, 3)), "popular: has a row twice"),
        (lambda f: (f / "genres.json").write_text("[1]"), "items.vocab.genres: genres.json must be an object"),
        (lambda f: (f / "genres.json").write_text('{"a": 0.5}'), "must be an object of category → whole number"),
        (
            lambda f: (f / "genres.json").write_text('{"drama": 77}'),
            "items.vocab.genres: genres.json names none of the numbers that the table holds, such as",
        ),
        (lambda f: (f / "year.npy").write_bytes(b"1950"), "items.tables.year: year.npy is no .npy array"),
        (samples(lambda s: s[:199]), "samples.jsonl has 199 requests; allowed is 200 or more"),
        (samples(lambda s: [*s, "{"]), "samples.jsonl: line 201 is not JSON"),
        (samples(lambda s: [*s, "[]"]), "line 201 is no object"),
        (samples(lambda s: ['{"k": 0}', *s]), "sample request 1 is not one that this bundle could answer: k:"),
        (samples(lambda s: ['{"context": {"hour": 3}}', *s]), "context.hour: no such feature"),
        (pre_ranker(names=np.array(["retrieval_score", "item.yeer", "candidate.bid"])), "item.yeer can't be made"),
        (
            pre_ranker(names=np.array(["retrieval_score", "luck", "candidate.bid"])),
            "luck can't be made.*no feature named luck",
        ),
        (pre_ranker(names=np.array(["item.genres.7", "item.genres.0", "item.year"])), "item.genres.7 can't be made"),
        (pre_ranker(weights=np.ones(2)), r"names \[3\], weights \[2\]"),
        (pre_ranker(weights=np.array([1, np.nan, 1])), "a weight or the bias is not finite"),
        (graph(batch_norm), "re_ranker.onnx: a row's score changes with the batch's size"),
        (graph(sum_of_all), r"re_ranker.onnx: gives \[1\] for 48 rows; allowed is one score a row"),
        (graph(fixed_axis), "re_ranker.onnx: the first axis of input item is fixed at 64"),
        (graph(wide_history, "user_tower"), "user_tower.onnx"),
        (lambda f: (f / "re_ranker.onnx").write_bytes(b"\xff" * 9), "re_ranker.onnx: not an ONNX model"),
    ],
)
def test_a_wrong_thing_is_refused_with_exit_code_2_and_one_sentence(
    spoil: Spoil, sentence: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(source.parent)
    assert main(["pack", "--config", str(source), "--out", str(tmp_path / "bundle")]) == 2
    said = capsys.readouterr().err
    assert re.search(sentence, said), said
    assert said.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_python_objects_are_refused_with_the_way_to_store_strings(source: Path, tmp_path: Path) -> None:
    np.save(source.with_name("title.npy"), np.array(["a"] * world.N, object), allow_pickle=True)
    with pytest.raises(PackError, match=r"items\.tables\.title: .* np\.array\(list_of_str\)"):
        pack(source, tmp_path / "bundle", say=silent)


@pytest.mark.parametrize("recall", [0.0, 1.1, float("nan")])
def test_a_recall_that_is_no_share_is_refused(recall: float, source: Path, tmp_path: Path) -> None:
    with pytest.raises(PackError, match="--recall"):
        pack(source, tmp_path / "bundle", recall=recall, say=silent)


def test_packing_needs_no_torch(source: Path, tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys; sys.modules['torch'] = sys.modules['scipy'] = None; from models.__main__ import main; "
        f"sys.exit(main(['pack', '--config', {str(source)!r}, '--out', {str(tmp_path / 'bundle')!r}]))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
