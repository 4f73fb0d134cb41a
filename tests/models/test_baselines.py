"""Baselines against what their definitions give on arrays small enough to work out."""

import numpy as np

from models import baselines

# Items 0 and 1 go together, 2 and 3 go together.
HAS = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]], np.float32)
NOBODY = np.empty(0, np.int64)


def test_interactions_count_an_item_once() -> None:
    matrix = baselines.interactions(np.array([0, 0, 1]), np.array([2, 2, 0]), 3)
    np.testing.assert_array_equal(matrix, [[0, 0, 1], [1, 0, 0]])


def test_popularity_is_the_same_for_all() -> None:
    scorer = baselines.fit_popularity(HAS)
    np.testing.assert_array_equal(scorer(np.array([3])), [3, 2, 2, 2])


def test_neighbours_are_weighed_by_cosine() -> None:
    scores = baselines.fit_item_knn(HAS, k=1)(np.array([0, 2]))
    np.testing.assert_allclose(scores[[1, 3]], [2 / np.sqrt(3 * 2), 2 / np.sqrt(2 * 2)], rtol=1e-6)


def test_ease_solves_its_own_problem() -> None:
    # Column j of B minimises |x_j - X b|^2 + ridge |b|^2 without b_j: compare with ridge regression on the rest.
    ridge, j, rest = 2.0, 1, [0, 2, 3]
    scorer = baselines.fit_ease(HAS, ridge)
    X = HAS[:, rest].astype(float)
    expected = np.linalg.solve(X.T @ X + ridge * np.eye(3), X.T @ HAS[:, j])
    got = [scorer(np.array([i]))[j] for i in rest]
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_ials_puts_what_goes_together_first() -> None:
    scores = baselines.fit_ials(HAS, d=2, seed=1)(np.array([2]))
    assert scores[3] > max(scores[0], scores[1])


def test_nobody_known_gets_what_is_popular() -> None:
    for fit in (baselines.fit_item_knn, baselines.fit_ease, baselines.fit_ials):
        np.testing.assert_array_equal(fit(HAS)(NOBODY), [3, 2, 2, 2])
