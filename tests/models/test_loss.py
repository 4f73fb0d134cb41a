"""The measured loss: planted worlds whose loss is arithmetic, the fit of a curve, the table of a packed bundle."""

from dataclasses import replace

import numpy as np
import pytest

from app.bundle import Generation
from app.control.loss import at_share, loss_of_shares
from app.flow import Candidates, Query
from app.manifest import LossTable
from app.stages.retrieval import Retrieval
from models import loss, metrics
from models.loss import Found, Sample, Situation, Widths
from models.loss_curve import fit_curve, non_negative_least_squares

WIDTHS = Widths(rerank=64, keep=64, k=1)
NOTHING, EVERYTHING = (f(len(WIDTHS.edges) - 1) for f in (np.zeros, np.ones))


def planted(coarse, fine, widths: Widths = WIDTHS) -> Sample:
    """A request with these scores of both stages; retrieval knows nothing, and no popular item is among the best."""
    order = np.argsort(-coarse)[: widths.keep]
    best = order[np.argsort(-fine[order])[: widths.k]]
    gains, nothing = np.zeros(len(fine)), np.zeros(len(fine))
    gains[best] = metrics.place_gains(widths.k)
    found = np.linspace(1e-3, 0, len(fine))
    f32 = [np.asarray(scores, np.float32) for scores in (found, coarse, fine)]
    return Sample(Found(*f32, gains), Found(*f32, nothing), None, metrics.place_gains(widths.k))


def worlds(n: int, is_noise: bool) -> list[Sample]:
    rng = np.random.default_rng(4)
    samples = []
    for _ in range(n):
        fine = rng.normal(size=128)
        samples.append(planted(1e-3 * rng.normal(size=128) if is_noise else fine, fine))
    return samples


@pytest.fixture(scope="module")
def noise() -> list[Sample]:
    """Whose carried scores say nothing: all are about the mean."""
    return worlds(600, is_noise=True)


@pytest.fixture(scope="module")
def noise_table(noise: list[Sample]) -> LossTable:
    return loss.fit_table(WIDTHS, noise)


# -------------------------------------------------------------------------------------- planted truths


def test_behind_a_perfect_pre_ranker_nothing_is_lost_whatever_is_missing() -> None:
    table = loss.fit_table(WIDTHS, worlds(20, is_noise=False))
    rng = np.random.default_rng(0)
    for missing in (NOTHING, EVERYTHING, *rng.random((20, len(NOTHING)))):
        assert loss_of_shares(table, 1.0, 1.0, missing) == pytest.approx(0, abs=1e-6)


def test_behind_noise_losing_half_loses_the_best_item_half_of_the_time(
    noise: list[Sample], noise_table: LossTable
) -> None:
    half = (np.arange(WIDTHS.rerank) % 2 == 0)[None]
    lost, missing = loss.simulate(noise, Situation(half), WIDTHS)
    assert lost.mean() == pytest.approx(1 / 2, abs=0.06)  # three standard errors: 3 · √(¼ / 600)
    assert loss_of_shares(noise_table, 1.0, 1.0, missing[0, 0]) == pytest.approx(1 / 2, abs=0.06)
    assert loss_of_shares(noise_table, 1.0, 1.0, EVERYTHING) == pytest.approx(1 - 1 / WIDTHS.rerank, abs=0.03)


def test_retrieving_half_keeps_the_best_if_it_is_there_and_beats_the_newcomers(noise_table: LossTable) -> None:
    # 64 of 128 go on, the best of them is in the first half of what was found with 1/2; if only that half is found,
    # all its 64 go on, 32 of which are new, and it must be the best of 64 + 32.
    assert loss_of_shares(noise_table, 1 / 2, 1.0, NOTHING) == pytest.approx(1 - 1 / 2 * 64 / (64 + 32), abs=0.06)


def test_popular_items_that_are_none_of_the_best_lose_everything(noise_table: LossTable) -> None:
    assert at_share(noise_table.popular, 1.0, NOTHING) == 1.0
    assert noise_table.nameless is None  # no request names anybody


def test_a_whole_answer_loses_nothing(noise_table: LossTable) -> None:
    assert loss_of_shares(noise_table, 1.0, 1.0, NOTHING) == 0.0


def test_an_answers_loss_by_hand() -> None:
    # Pre-ranked 5, 4, 3, 2; re-ranked 1, 9, 8, 0: the full answer is items 1, 2.
    widths = Widths(rerank=4, keep=4, k=2)
    sample = planted(np.array([5.0, 4.0, 3.0, 2.0]), np.array([1.0, 9.0, 8.0, 0.0]), widths)
    assert sample.whole.gains.tolist() == [0, 1, 1 / 2, 0]
    all_but_one = np.array([[True, False, True, True]])
    lost, missing = loss.simulate([sample], Situation(all_but_one), widths)
    # The line through (5, 1), (3, 8), (2, 0) falls: item 1 lies near their mean, below item 2.
    best = 1 + (1 / 2) / np.log2(3)
    assert lost[0, 0] == pytest.approx(1 - (1 / 2 + 1 / np.log2(3)) / best)
    assert (widths.edges, missing.tolist()) == ((0, 4), [[[1 / 4]]])


def test_no_candidate_left_is_a_whole_loss_and_no_candidate_at_all_is_none() -> None:
    empty = Found(*(np.empty(0, np.float32),) * 3, np.empty(0))
    whole = planted(np.arange(9.0), np.arange(9.0))
    done = Situation(np.ones((1, WIDTHS.rerank), bool), way="popular")
    lost, _ = loss.simulate([Sample(whole.whole, empty, None, whole.ideal)], done, WIDTHS)
    assert lost.tolist() == [[1.0]]
    lost, _ = loss.simulate([Sample(empty, empty, None, np.zeros(WIDTHS.k))], done, WIDTHS)
    assert lost.tolist() == [[0.0]]


# --------------------------------------------------------------------------------------------- the fit


def test_a_planted_index_and_link_are_found_again() -> None:
    rng = np.random.default_rng(1)
    missing = np.vstack([np.zeros(3), np.ones(3), rng.random((400, 3)) * rng.integers(0, 2, (400, 3))])
    truth = (missing @ np.array([0.6, 0.3, 0.1])) ** 2 * 0.8
    curve = fit_curve(missing, truth)
    fitted = np.interp(missing @ np.array(curve.weights), curve.x, curve.y)
    assert np.abs(fitted - truth).max() < 0.01
    assert np.array(curve.weights) / sum(curve.weights) == pytest.approx([0.6, 0.3, 0.1], abs=0.02)


def test_a_loss_that_falls_with_what_is_missing_is_fitted_as_flat() -> None:
    missing = np.vstack([np.zeros(2), np.ones(2), np.random.default_rng(2).random((50, 2))])
    curve = fit_curve(missing, 0.5 - 0.1 * missing.sum(axis=1))
    assert set(curve.y) == {0.5}


def test_least_squares_with_signs_meets_its_optimality_conditions() -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        a, b = rng.normal(size=(30, 6)), rng.normal(size=30)
        a[:, 5] = a[:, 4]
        x = non_negative_least_squares(a, b)
        pull = a.T @ (b - a @ x)
        assert x.min() >= 0
        assert pull.max() < 1e-8
        assert pull[x > 0] == pytest.approx(0, abs=1e-8)


def test_masks_are_what_their_cause_leaves() -> None:
    masks = loss.random_masks(64, 50, np.random.default_rng(0))
    assert (np.diff(masks["narrowed"].astype(int), axis=1) <= 0).all()
    for mask in masks["shards lost"]:
        assert any(np.array_equal(mask[n:], mask[:-n]) for n in range(2, loss.MOST_SHARDS + 1))
    assert all(mask.shape == (50, 64) for mask in masks.values())


# ------------------------------------------------------------------------------------------- a bundle


def test_what_seldom_happens_is_measured_on_some_of_the_requests(
    generation: Generation, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = [{"user": {"id": at % 2}} if at % 3 else {} for at in range(20)]
    _, samples = loss.score_samples(generation, named)
    assert [one.popular is not None for one in samples] == [True] * 20
    assert [one.nameless is not None for one in samples] == [bool(at % 3) for at in range(20)]
    monkeypatch.setattr(loss, "MOST_OTHERWISE", 6)
    _, fewer = loss.score_samples(generation, named)
    assert sum(one.popular is not None for one in fewer) == 6
    assert [one.nameless is not None for one in fewer] == [
        other.popular is not None and bool(at % 3) for at, other in enumerate(fewer)
    ]
    for half in (fewer[::2], fewer[1::2]):  # by which `check` splits them
        assert any(one.popular for one in half)
        assert any(one.nameless for one in half)
    for one, other in zip(samples, fewer, strict=True):
        assert np.array_equal(one.whole.fine, other.whole.fine)
        assert other.popular is None or np.array_equal(one.popular.fine, other.popular.fine)  # type: ignore[union-attr]


def test_a_narrower_search_is_measured_as_it_is_made(generation: Generation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Items that only a wide one finds are lost to it; where the caller names the candidates none are."""
    retriever = generation.manifest.retrievers[0].model_copy(update={"kind": "ivf_sq8"})
    manifest = generation.manifest.model_copy(update={"retrievers": (retriever,)})
    monkeypatch.setattr(Retrieval, "_parameters", lambda *_: None)  # whose index is another kind
    generation = replace(generation, manifest=manifest)
    width = generation.manifest.funnel.retrieve
    search = Retrieval.search

    def without_the_first(self: Retrieval, query: Query, wanted: int) -> Candidates:
        found = search(self, query, wanted)
        return found if wanted == width else found.take(np.arange(1, len(found)))

    monkeypatch.setattr(Retrieval, "search", without_the_first)
    widths, (one, named) = loss.score_samples(
        generation, [{"user": {"id": 1}}, {"candidates": [{"id": 1001}, {"id": 1002}]}], (0.5, 1.0)
    )
    assert list(one.whole.narrower) == [0.5]
    assert one.whole.narrower[0.5].tolist() == list(range(1, width // 2))
    everything = np.ones((1, widths.rerank), np.bool_)
    assert len(loss._received(named.whole, Situation(everything, retrieved=0.5), widths).found) == 2
    received = loss._received(one.whole, Situation(everything, retrieved=0.5), widths)
    assert sorted(received.found) == sorted(one.whole.found[1 : width // 2][: widths.keep])
    assert loss._received(one.whole, Situation(everything), widths).found.max() == one.whole.found[0]


def test_a_packed_bundle_has_its_table(generation: Generation) -> None:
    table = generation.manifest.loss
    assert table is not None
    assert (table.k, table.n_requests, table.edges[-1]) == (5, 200, 32)
    n_bands = len(table.edges) - 1
    assert loss_of_shares(table, 1.0, 1.0, np.zeros(n_bands)) == 0.0
    assert loss_of_shares(table, 1.0, 1.0, np.ones(n_bands)) > 0.0
    # In each request pre-ranking puts the items in retrieval's order.
    assert loss_of_shares(table, 1.0, 0.0, np.zeros(n_bands)) == pytest.approx(0.0)
