"""What the funnel is measured against: popularity, item neighbours, EASE and iALS, in plain numpy.

Each `fit_*` takes `has` f32[P, N], 1 where a person has an item, and returns a scorer: rows of a history →
f32[N], one score an item. Nobody is known by id: a person is folded in by their history, like in the
funnel. A person without a history gets popularity.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float32]
Scorer = Callable[[NDArray[np.int64]], Matrix]


def interactions(person: NDArray[np.int64], item: NDArray[np.int64], n_items: int) -> Matrix:
    """f32[P, N]: 1 where the person has the item."""
    matrix = np.zeros((int(person.max()) + 1, n_items), np.float32)
    matrix[person, item] = 1.0
    return matrix


def fit_popularity(has: Matrix) -> Scorer:
    """score(i) = number of people who have i."""
    counts = has.sum(axis=0)
    return lambda _history: counts


def fit_item_knn(has: Matrix, k: int = 200) -> Scorer:
    """score(i) = sum over the history of cosine(i, j), for the k nearest neighbours i of each j."""
    counts = has.sum(axis=0)
    norm = np.sqrt(np.maximum(counts, 1.0))
    cosine = (has.T @ has) / norm[:, None] / norm[None, :]
    np.fill_diagonal(cosine, 0.0)
    k = min(k, len(cosine))
    floor = np.partition(cosine, len(cosine) - k, axis=1)[:, [len(cosine) - k]]
    return _from_history(np.where(cosine >= floor, cosine, 0.0).astype(np.float32), counts)


def fit_ease(has: Matrix, ridge: float = 300.0) -> Scorer:
    """score = x B with B the closed-form ridge regression of X on itself, zero diagonal.

    P = (X'X + ridge I)^-1,  B_ij = -P_ij / P_jj.
    Source: H. Steck, Embarrassingly Shallow Autoencoders for Sparse Data, WWW 2019.
    """
    gram = (has.T @ has).astype(np.float64)
    np.fill_diagonal(gram, gram.diagonal() + ridge)
    P = np.linalg.inv(gram)
    B = -P / P.diagonal()[None, :]
    np.fill_diagonal(B, 0.0)
    return _from_history(B.astype(np.float32), has.sum(axis=0))


def fit_ials(
    has: Matrix, d: int = 64, unobserved: float = 0.3, ridge: float = 0.003, sweeps: int = 12, seed: int = 0
) -> Scorer:
    """score(i) = u · v_i, by alternating least squares of implicit feedback.

    loss = sum over X=1 of (1 - u·v)^2 + unobserved * sum over all (u·v)^2 + ridge with frequency scaling.
    Source: S. Rendle et al., Revisiting the Performance of iALS on Item Recommendation Benchmarks, 2021.
    """
    rng = np.random.default_rng(seed)
    items = rng.normal(0.0, 0.1 / np.sqrt(d), (has.shape[1], d)).astype(np.float32)
    rows = [np.flatnonzero(x) for x in has]
    columns = [np.flatnonzero(x) for x in has.T]
    for _ in range(sweeps):
        people = _half_sweep(rows, items, unobserved, ridge)
        items = _half_sweep(columns, people, unobserved, ridge)
    counts = has.sum(axis=0)

    def scores(history: NDArray[np.int64]) -> Matrix:
        if not len(history):
            return counts
        return items @ _half_sweep([history], items, unobserved, ridge)[0]

    return scores


def _half_sweep(rows: list[NDArray[np.int64]], other: Matrix, unobserved: float, ridge: float) -> Matrix:
    """The best vectors [len(rows), d] when the other side is fixed."""
    n, d = other.shape
    gram = unobserved * (other.T @ other)
    solved = np.zeros((len(rows), d), np.float32)
    for number, row in enumerate(rows):
        if len(row):
            mine = other[row]
            weight = ridge * (len(row) + unobserved * n)
            solved[number] = np.linalg.solve(
                mine.T @ mine + gram + weight * np.eye(d, dtype=np.float32), mine.sum(axis=0)
            )
    return solved


def _from_history(similarity: Matrix, counts: Matrix) -> Scorer:
    """score = sum of the history's rows of an [N, N] matrix."""
    return lambda history: similarity[history].sum(axis=0) if len(history) else counts
