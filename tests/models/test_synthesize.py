"""The made-up world: seeded, clustered; its models are trained to its truth, or agree as if they were."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from app.bundle import Generation, load
from app.wire import RankRequest
from models import evaluate, made_up, truth
from models.__main__ import main

N, D = 2_000, 16
WIDTH, KEEP = N // 10, N // 40


def start(out: Path, seed: int, threads: int, *more: str) -> subprocess.Popen[bytes]:
    """The command, in a process whose numpy may use so many threads."""
    command = [sys.executable, "-m", "models", "synthesize", "--items", str(N), "--dim", str(D)]
    return subprocess.Popen(
        [*command, "--seed", str(seed), "--out", str(out), *more],
        env=os.environ | {"SOURCE_DATE_EPOCH": "1700000000", "OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.DEVNULL,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seed 0, seed 0 again and, untrained, seed 1, made at the same instant."""
    root = tmp_path_factory.mktemp("worlds")
    worlds = (("first", 0, 1), ("again", 0, 2), ("other", 1, 1, "--untrained", "--recall", "0.8"))
    made = [start(root / name / "w1", *world) for name, *world in worlds]
    assert [process.wait() for process in made] == [0, 0, 0]
    return root


@pytest.fixture(scope="module")
def world(folder: Path) -> Generation:
    return load(folder / "first/w1")


@pytest.fixture(scope="module", params=["first", "other"], ids=["trained", "untrained"])
def scored(request: pytest.FixtureRequest, folder: Path) -> list[evaluate.ScoredThrough]:
    generation = load(folder / request.param / "w1")
    requests = evaluate.read_requests(folder / request.param / "w1.requests.jsonl")[:100]
    return list(evaluate.score_through(generation, evaluate.resolve(generation, requests)))


def test_the_same_seed_makes_the_same_files_on_any_number_of_threads(folder: Path) -> None:
    # The manifest holds a digest of every other file of the bundle.
    for name in ("w1/manifest.json", "w1.requests.jsonl", "w1.truth.npz"):
        assert (folder / "first" / name).read_bytes() == (folder / "again" / name).read_bytes()


def test_another_seed_is_another_world_with_the_same_ids(folder: Path, world: Generation) -> None:
    other = load(folder / "other/w1")
    assert np.array_equal(other.ids.ids, world.ids.ids)
    assert world.users is not None and other.users is not None
    assert np.array_equal(other.users.ids.ids, world.users.ids.ids)
    assert not np.array_equal(other.tables["embedding"], world.tables["embedding"])


def test_nothing_but_the_bundle_and_its_requests_is_left(folder: Path) -> None:
    assert sorted(p.name for p in (folder / "first").iterdir()) == ["w1", "w1.requests.jsonl", "w1.truth.npz"]


def test_a_small_catalogue_has_widths_of_a_tenth_and_a_quarter_of_that(world: Generation) -> None:
    funnel = world.manifest.funnel
    assert (world.n_items, world.d, funnel.retrieve, funnel.rerank) == (N, D, WIDTH, KEEP)
    assert world.tables["features"].shape == (N, 32)


def test_category_price_and_year_can_be_filtered_by(world: Generation) -> None:
    assert {"category", "price", "year"} <= set(world.filterable)
    assert world.vocab["category"]["category-07"] == 7


def test_items_of_one_cluster_are_more_alike_than_others(world: Generation) -> None:
    embedding, cluster = world.tables["embedding"], np.asarray(world.tables["category"])  # N / 100 clusters, < 40
    alike, same = embedding @ embedding.T, cluster[:, None] == cluster
    assert alike[same].mean() > alike[~same].mean() + 0.5


def test_requests_are_wire_requests_of_people_by_zipf_and_one_in_twenty_from_a_newcomer(folder: Path) -> None:
    requests = evaluate.read_requests(folder / "first/w1.requests.jsonl")
    for request in requests:
        RankRequest.model_validate(request)
    people = Counter(request["user"].get("id") for request in requests)
    assert (len(requests), people.pop(None)) == (5_000, 5_000 // 20)
    n_people = N // 10
    assert set(people) <= set(range(1, n_people + 1))
    expected = made_up.zipf(n_people, made_up.PEOPLE_ZIPF)[0] * sum(people.values())
    assert people.most_common(1)[0][1] == pytest.approx(expected, rel=0.2)


def test_zipf_halves_where_the_rank_doubles_at_exponent_one() -> None:
    assert made_up.zipf(4, 1.0) == pytest.approx(np.array([12, 6, 4, 3]) / 25)


def test_a_person_is_an_embedding_of_length_one(scored: list[evaluate.ScoredThrough]) -> None:
    for s in scored:
        assert np.linalg.norm(s.candidates.user_embedding) == pytest.approx(1, abs=1e-5)


def test_the_moment_moves_what_is_found(world: Generation) -> None:
    users = {"id": 1}
    requests = [{"user": users, "context": {"moment": [x] + [0.0] * 7}} for x in (-2.0, 2.0)]
    one, other = evaluate.embed(world, evaluate.resolve(world, requests))
    assert one @ other < 0.999


def test_scores_are_probabilities_that_spread(scored: list[evaluate.ScoredThrough]) -> None:
    scores = np.concatenate([s.reranking for s in scored])
    assert scores.min() > 0 and scores.max() < 1
    assert np.quantile(scores, 0.95) - np.quantile(scores, 0.05) > 0.2


def test_each_stage_is_a_hint_of_the_next_and_none_its_copy(scored: list[evaluate.ScoredThrough]) -> None:
    """Of the re-ranker's best 20, the pre-ranker's best quarter holds most, and retrieval's less."""

    def kept(earlier: np.ndarray, later: np.ndarray) -> float:
        return float(np.isin(np.argsort(-later)[:20], np.argsort(-earlier)[:KEEP]).mean())

    by_retrieval = np.mean([kept(s.candidates.retrieval_scores, s.reranking) for s in scored])
    by_preranking = np.mean([kept(s.preranking, s.reranking) for s in scored])
    assert KEEP / WIDTH + 0.1 < by_retrieval < by_preranking < 1
    assert by_preranking > 0.75


def test_the_answers_are_good_by_the_truth_and_better_at_each_stage(world: Generation, folder: Path) -> None:
    requests = evaluate.read_requests(folder / "first/w1.requests.jsonl")[:300]
    judged = truth.judge(world, requests, folder / "first/w1.truth.npz")
    assert judged.n_requests == 300 - 300 // 20
    by_stage = [judged.retrieval.value, judged.preranking.value, judged.funnel.value]
    assert by_stage == sorted(by_stage)
    assert judged.funnel.value > judged.retrieval.value + 0.05
    assert 0.6 < judged.funnel.value < 1


def test_people_have_chosen_what_the_truth_says_they_like(world: Generation, folder: Path) -> None:
    with np.load(folder / "first/w1.truth.npz") as stored:
        taste, latent = stored["taste"], stored["latent"].astype(np.float32)
    assert world.users is not None and world.users.history is not None
    history = np.asarray(world.users.history)
    theirs = [latent[row[row >= 0]] @ t for row, t in zip(history, taste, strict=True)]
    others = [latent @ t for t in taste]
    assert np.mean([x.mean() for x in theirs]) > np.mean([x.mean() for x in others]) + 0.3
    for row in history:
        assert len(set(row[row >= 0])) == (row >= 0).sum() > 0


def test_a_truth_of_another_world_is_refused(
    world: Generation, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = folder / "first/w1.requests.jsonl"
    command = ["evaluate", str(world.path), "--requests", str(requests), "--most", "5", "--truth"]
    assert main([*command, str(folder / "other/w1.truth.npz")]) == 2  # as many items
    assert "is about another world than the bundle's" in capsys.readouterr().err
    (tmp_path / "none.npz").write_bytes(b"nothing")
    for file in (tmp_path / "none.npz", tmp_path / "not there.npz"):
        assert main([*command, str(file)]) == 2
        assert "no truth of a made-up world" in capsys.readouterr().err
    truth.report(world, requests, folder / "first/w1.truth.npz", 5)
    assert "NDCG@20 against the truth, 3 requests" in capsys.readouterr().out  # two of five are nobody's


def test_a_catalogue_too_small_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which the command sets: here it mustn't outlive the test
    assert main(["synthesize", "--items", "999", "--out", str(tmp_path / "w1")]) == 2
    assert "allowed are 1,000 and 2" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_index_is_asked_for_the_recall_that_was_wanted(folder: Path, world: Generation) -> None:
    targets = [made.manifest.retrievers[0].recall.target for made in (world, load(folder / "other/w1"))]
    assert targets == [0.9, 0.8]


def test_a_recall_that_is_no_share_is_refused_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "bundle"
    assert main(["synthesize", "--items", "1000", "--recall", "80", "--out", str(out)]) == 2
    assert "--recall: is 80" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_bundle_that_is_there_is_refused_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "w1").mkdir()
    assert main(["synthesize", "--items", "1000", "--out", str(tmp_path / "w1")]) == 2
    said = capsys.readouterr()
    assert "is there already" in said.err
    assert not said.out


def test_the_re_ranker_is_as_large_as_asked(tmp_path: Path) -> None:
    small = ["synthesize", "--items", "1000", "--dim", "8", "--hidden", "16,8,4", "--untrained", "--out"]
    small.append(str(tmp_path / "small"))
    assert main(small) == 0
    n_weights = (3 * 8 + 32) * 16 + 16 + 16 * 8 + 8 + 8 * 4 + 4 + 4 + 1
    size = (tmp_path / "small/re_ranker.onnx").stat().st_size
    assert 4 * n_weights < size < 4 * n_weights + 2_000
    assert main([*small[:6], "16,8", *small[7:], "--force"]) == 2


def test_above_twenty_million_items_features_are_kept_in_eight_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: Generation, folder: Path
) -> None:
    monkeypatch.setattr(made_up, "LEAST_TYPES", N)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert main(["synthesize", "--items", str(N), "--dim", str(D), "--out", str(tmp_path / "w1")]) == 0
    kept = load(tmp_path / "w1")
    assert kept.tables["features"].dtype == np.int8
    assert np.abs(0.04 * kept.tables["features"] - world.tables["features"]).max() <= 0.0201
    asked = evaluate.read_requests(folder / "first/w1.requests.jsonl")[:200]
    quality = [
        truth.judge(g, asked, at / "w1.truth.npz").funnel.value
        for g, at in ((world, folder / "first"), (kept, tmp_path))
    ]
    assert quality[1] > quality[0] - 0.02
