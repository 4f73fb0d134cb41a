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


class Watched:
    """An index: how often its heap was filled for all that was asked, and how many rows passed each score."""

    def __init__(self, index):
        self.index, self.ntotal, self.n_filled, self.n_passed = index, index.ntotal, 0, []

    def search(self, user, n, params):
        self.n_filled += n == FETCHED
        return self.index.search(user, n, params=params)

    def range_search(self, *given, **named):
        limits, scores, rows = self.index.range_search(*given, **named)
        self.n_passed.append(len(rows))
        return limits, scores, rows


@pytest.fixture(scope="module")
def index():
    return lists_of(EMBEDDING)


@pytest.fixture
def watched(index):
    return Watched(index)


def sampled(watched, user, selector=None, n_lists=16):
    """What a sample helps to find, in the order of the rows; it is what the heap finds."""
    parameters = faiss.SearchParametersIVF(nprobe=n_lists, sel=selector)
    rows, scores = retrieval.nearest(watched, user[None], FETCHED, parameters, SAMPLED)
    (of_heap,), (expected,) = watched.index.search(user[None], FETCHED, params=parameters)
    order, expected_order = np.argsort(rows), np.argsort(expected)
    assert np.array_equal(rows[order], expected[expected_order])
    assert np.array_equal(scores[order], of_heap[expected_order])
    return rows[order]


def test_with_a_sample_the_same_rows_are_found_without_a_heap_for_all_of_them(watched):
    for user in USERS:
        assert len(sampled(watched, user)) == FETCHED
    assert watched.n_filled <= 1
    assert len(watched.n_passed) == len(USERS)
    assert 1.2 * FETCHED < np.mean(watched.n_passed) < 1.8 * FETCHED  # 3 / sqrt(700 / 16) more are expected: 1.45
    assert max(watched.n_passed) < 2.2 * FETCHED


def test_what_was_removed_is_left_out_and_enough_pass_without_it(watched):
    is_kept = np.random.default_rng(5).random(N) < 1 - retrieval.MOST_LOST
    selector = faiss.IDSelectorBitmap(np.packbits(is_kept, bitorder="little"))
    for user in USERS:
        assert is_kept[sampled(watched, user, selector)].all()
    assert watched.n_filled <= 2


def test_a_sample_in_which_nothing_is_near_makes_too_many_pass_and_costs_no_row():
    watched = Watched(lists_of(EMBEDDING[TOWARDS]))
    sampled(watched, USERS[0], n_lists=64)
    assert watched.n_passed[0] > 10 * FETCHED
    assert watched.n_filled == 0


def test_a_sample_in_which_everything_is_near_makes_too_few_pass_and_the_heap_is_filled():
    watched = Watched(lists_of(EMBEDDING[TOWARDS[::-1]]))
    sampled(watched, USERS[0], n_lists=64)
    assert watched.n_passed[0] < FETCHED
    assert watched.n_filled == 1


def test_where_the_lists_hold_too_few_of_the_sample_nothing_is_collected(watched):
    rows = sampled(watched, USERS[0], n_lists=1)
    assert 0 < (rows >= 0).sum() < FETCHED
    assert (watched.n_passed, watched.n_filled) == ([0], 1)


def test_for_few_no_sample_is_looked_at(watched, monkeypatch):
    monkeypatch.setattr(retrieval, "LEAST_SAMPLED", FETCHED + 1)
    sampled(watched, USERS[0])
    assert (watched.n_passed, watched.n_filled) == ([], 1)
