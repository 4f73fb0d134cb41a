"""A bundle whose re-ranker is cut: the same answers as before, by the same service; taken only where it pays."""

import asyncio
import io
import json
import shutil
import time
from pathlib import Path

import numpy as np
import onnx
import pytest

from app import wire
from app.bundle import ONCE, load
from app.control.deadline import Deadline
from app.errors import BundleError
from app.flow import Sent, Told
from app.funnel import Funnel, offline_funnel
from app.manifest import sha256
from app.metrics import Metrics
from app.warmup import offline_query, prove, rank_offline
from app.workers.pool import WorkerPool
from loadtest.limits import kernels
from models import graph_parts, hoisting
from models.__main__ import main
from tests import world

REQUESTS = (
    {"user": {"id": "ann"}, "k": 32},
    {"user": {"history": [1021, 1041], "features": {"age": 9.5}}, "query": {"freshness": 20}},
    {"candidates": [{"id": 1000 + row, "features": {"bid": row}} for row in (0, 7, 14)]},
)


@pytest.fixture
def cut_bundle(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Whatever the clock says: with a table of items, and what the request decides in a graph of its own."""

    def timed(ways, *_):
        return {way.what: 1.0 - 0.5 * bool(way.parts.tables) for way in ways}

    monkeypatch.setattr(hoisting, "timed", timed)
    monkeypatch.setattr(hoisting, "BLOCK", 7)  # items: several blocks, the last not whole
    assert main(["hoist", str(bundle), "--out", str(tmp_path / "cut")]) == 0
    return tmp_path / "cut"


def test_a_cut_bundle_answers_as_the_whole_one(bundle: Path, cut_bundle: Path) -> None:
    whole, parts = load(bundle), load(cut_bundle)
    asyncio.run(prove(parts))
    assert parts.once is not None
    assert parts.tables["hoisted_0"].shape[0] == whole.n_items
    for request in REQUESTS:
        rankings = [asyncio.run(rank_offline(offline_funnel(g), offline_query(request, g))) for g in (whole, parts)]
        np.testing.assert_array_equal(rankings[0].rows, rankings[1].rows)
        np.testing.assert_allclose(rankings[0].scores, rankings[1].scores, atol=1e-5)


def test_what_was_made_beforehand_is_no_feature_to_ask_for(cut_bundle: Path) -> None:
    assert not any(name.startswith("hoisted") for name in load(cut_bundle).filterable)


def test_a_graph_that_does_not_pay_stays_whole(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        hoisting, "timed", lambda ways, *_: {way.what: 1.0 - 5e-5 * way.what.count(",") for way in ways}
    )
    assert main(["hoist", str(bundle), "--out", str(tmp_path / "cut")]) == 2  # a tenth of a millisecond is the least
    assert "no cut of its re-ranker pays" in capsys.readouterr().err
    assert not (tmp_path / "cut").exists()


def test_a_cut_that_would_change_scores_is_refused(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A part that gives a thousandth more than it should."""

    def cut(*given, **kinds):
        parts = graph_parts_cut(*given, **kinds)
        score = parts.rest.graph.output[0].name
        more = onnx.numpy_helper.from_array(np.float32(1e-3), "more")
        parts.rest.graph.initializer.append(more)
        parts.rest.graph.node.append(onnx.helper.make_node("Add", [score, "more"], ["changed"]))
        parts.rest.graph.output[0].name = "changed"
        return parts

    graph_parts_cut = graph_parts.cut
    monkeypatch.setattr(graph_parts, "cut", cut)
    assert main(["hoist", str(bundle), "--out", str(tmp_path / "cut")]) == 2
    assert "its scores would differ by 0.001" in capsys.readouterr().out


async def test_workers_rank_with_a_cut_bundle(bundle: Path, cut_bundle: Path) -> None:
    whole, parts = load(bundle), load(cut_bundle)
    pool = WorkerPool(parts, 1, Metrics(0.1, {}))
    await pool.start()
    try:
        funnel = Funnel(parts, pool, runner=pool)
        for request in REQUESTS:
            query, expected = (
                offline_query(request, parts),
                await rank_offline(offline_funnel(whole), offline_query(request, whole)),
            )
            sent = Sent("x", json.dumps(request).encode(), None)
            found = await funnel.rank(lambda is_late, q=query: q, Deadline(time.monotonic(), 60.0), sent=sent)
            assert isinstance(found, Told) and not found.degradations
            scores = [item["score"] for item in json.loads(wire.finished(found, {}))["items"]]
            np.testing.assert_allclose(scores, expected.scores, atol=1e-5)
    finally:
        await pool.close()


def test_pack_cuts_where_it_pays_and_not_where_it_is_told_not_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = world.write_source(tmp_path / "source")
    monkeypatch.setattr(hoisting, "timed", lambda ways, *_: {way.what: 1 / (1 + len(way.what)) for way in ways})
    for name, options, is_cut in (("cut", [], True), ("whole", ["--no-hoist"], False)):
        assert main(["pack", "--config", str(source), "--out", str(tmp_path / name), *options]) == 0
        assert (load(tmp_path / name).once is not None) is is_cut


def test_the_raw_kernels_are_those_of_the_whole_graph(cut_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels.main([str(cut_bundle)], io.StringIO(), io.StringIO()) == 2
    assert "its re-ranker is cut; --kernels-of" in capsys.readouterr().err


def test_what_is_cut_is_not_cut_again(cut_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hoist", str(cut_bundle), "--out", str(tmp_path / "again")]) == 2
    assert "is cut already" in capsys.readouterr().err


def test_a_part_that_does_not_fit_the_rest_is_refused(cut_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(cut_bundle, wrong := tmp_path / "wrong")
    graph = onnx.load(str(wrong / ONCE))
    name = graph.graph.output[0].name
    graph.graph.node.append(onnx.helper.make_node("Concat", [name, name], ["twice"], axis=-1))
    graph.graph.output[0].name = "twice"
    graph.graph.node.append(onnx.helper.make_node("Identity", [name], ["kept"]))
    (wrong / ONCE).write_bytes(graph.SerializeToString())
    manifest = json.loads((wrong / "manifest.json").read_text())
    manifest["files"][ONCE] = {"sha256": sha256(wrong / ONCE), "size": (wrong / ONCE).stat().st_size}
    (wrong / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"re_ranker.onnx: input \w+ is not bound"):
        load(wrong)
