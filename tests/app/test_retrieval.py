"""Rows that a sample helps to find are those that FAISS finds with its heap."""

import faiss
import numpy as np
import pytest

from app.stages import retrieval

D, N, SAMPLED, FETCHED = 16, 20_000, 16, 700
RNG = np.random.default_rng(3)
EMBEDDING = RNG.standard_normal((N, D)).astype(np.float32)
USERS = RNG.standard_normal((40, D)).astype(np.float32)
TOWARDS = np.argsort(EMBEDDING @ USERS[0])  # rows in the order of what the first of them gets


def lists_of(embedding):
    index = faiss.index_factory(D, "IVF64,SQ8", faiss.METRIC_INNER_PRODUCT)
    index.train(EMBEDDING)
    index.add(embedding)
    return index


@pytest.fixture(scope="module")
def index():
    return lists_of(EMBEDDING)


class Watched:
    """An index, and how often its heap was filled for all that was asked."""

    def __init__(self, index):
        self.index, self.ntotal, self.n_filled = index, index.ntotal, 0

    def search(self, user, n, params):
        self.n_filled += n == FETCHED
        return self.index.search(user, n, params=params)

    def range_search(self, *given, **named):
        return self.index.range_search(*given, **named)


def both(index, user, selector=None, n_lists=16):
    """The rows and scores with a sample, and without; each in the order of the rows."""
    parameters = faiss.SearchParametersIVF(nprobe=n_lists, sel=selector)
    for sampled in (SAMPLED, 0):
        rows, scores = retrieval.best_of_lists(index, user[None], FETCHED, parameters, sampled)
        order = np.argsort(rows)
        yield rows[order], scores[order]


def test_with_a_sample_the_same_rows_are_found_without_a_heap_for_all_of_them(index):
    watched = Watched(index)
    for user in USERS:
        (rows, scores), (expected, of_heap) = both(watched, user)
        assert np.array_equal(rows, expected)
        assert len(rows) == FETCHED
        assert np.array_equal(scores, of_heap)
    assert watched.n_filled - len(USERS) <= 2  # once each without a sample; with one where it misjudged


def test_what_was_removed_is_left_out_of_both(index):
    is_kept = RNG.random(N) < 0.8
    selector = faiss.IDSelectorBitmap(np.packbits(is_kept, bitorder="little"))
    for user in USERS[:10]:
        (rows, _), (expected, _) = both(index, user, selector)
        assert np.array_equal(rows, expected)
        assert is_kept[rows].all()


@pytest.mark.parametrize("order", [TOWARDS, TOWARDS[::-1]], ids=["none of the sample is near", "all of it is"])
def test_a_sample_that_misjudges_costs_time_and_no_row(order):
    index = lists_of(EMBEDDING[order])
    for user in USERS[:5]:
        (rows, _), (expected, _) = both(index, user)
        assert np.array_equal(rows, expected)


def test_of_fewer_rows_than_were_asked_for_all_are_found(index):
    (rows, _), (expected, _) = both(index, USERS[0], n_lists=1)
    assert np.array_equal(rows[rows >= 0], expected[expected >= 0])
    assert 0 < (rows >= 0).sum() < FETCHED
