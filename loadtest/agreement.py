"""An answer against the full funnel's own answer to the same request: NDCG, loss, and "the same list".

The full funnel's order is the truth here, not what people liked: with k items in its answer, the item at rank r
(from 0) gains (k - r) / k and every other item nothing; position p (from 0) is discounted by 1 / log2(2 + p).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Id = int | str
N_BOOTSTRAPS = 2_000


@dataclass(frozen=True, slots=True)
class Reference:
    """The full funnel's unloaded answer to one request, as deep as re-ranking goes: ids best first, scores f32[n]."""

    ids: tuple[Id, ...]
    scores: NDArray[np.float32]

    def score_of(self) -> dict[Id, float]:
        return dict(zip(self.ids, self.scores.tolist(), strict=True))


def ndcg(ids: Sequence[Id], full: Sequence[Id]) -> float:
    """sum of gain / log2(2 + position) over the answer, over the same of the full list; 1 if that is empty."""
    k = len(full)
    if not k:
        return 1.0
    gain = {item: (k - r) / k for r, item in enumerate(full)}
    discount = 1 / np.log2(2 + np.arange(k))
    got = sum(gain.get(item, 0.0) * d for item, d in zip(ids, discount, strict=False))
    return float(got / (discount * (k - np.arange(k)) / k).sum())


def loss(ids: Sequence[Id], full: Sequence[Id]) -> float:
    """1 - NDCG: 0 for the full list itself, 1 when none of it was shown."""
    return 1.0 - ndcg(ids, full)


def differs(ids: Sequence[Id], scores: NDArray[np.float32], full: Reference, tolerance: float) -> str:
    """Why a full answer isn't the head of `full`, or "" if it is.

    Each score must be that of the full list to `tolerance`; at each place may stand only an item whose score is that
    close to the one which belongs there.
    """
    known = full.score_of()
    if len(ids) > len(full.ids) or len(set(ids)) != len(ids):
        return f"{len(ids)} items, {len(set(ids))} different, of {len(full.ids)}"
    for place, (item, score) in enumerate(zip(ids, scores.tolist(), strict=True)):
        if item not in known:
            return f"item {item} isn't in the full list"
        if abs(score - known[item]) > tolerance:
            return f"item {item} has score {score}, not {known[item]}"
        if abs(known[item] - float(full.scores[place])) > tolerance:
            return f"item {item} stands at place {place}, where {full.ids[place]} belongs"
    return ""


def differs_where_fresh(
    ids: Sequence[Id], scores: NDArray[np.float32], is_fresh: NDArray[np.bool_], full: Reference, tolerance: float
) -> str:
    """Why the re-ranked items of a degraded answer don't have the full list's scores, or "" if they do."""
    known = full.score_of()
    for item, score, fresh in zip(ids, scores.tolist(), is_fresh.tolist(), strict=True):
        if fresh and abs(score - known.get(item, np.inf)) > tolerance:
            return f"item {item} has score {score}, not {known.get(item)}"
    return ""


def by_request(body: NDArray[np.int64], values: Floats, n: int) -> Floats:
    """f64[n]: the mean of the values of each of n requests; NaN for one that has none."""
    counts = np.bincount(body, minlength=n)
    sums = np.bincount(body, values, n)
    means: Floats = np.divide(sums, counts, out=np.full(n, np.nan), where=counts > 0)
    return means


def paired_step(before: Floats, after: Floats, seed: int = 0) -> tuple[float, float, float]:
    """The mean of after - before over requests that have both, and its 95 % bootstrap interval over requests."""
    gaps = (after - before)[np.isfinite(after - before)]
    rng = np.random.default_rng(seed)
    means = np.array([gaps[rng.integers(0, len(gaps), len(gaps))].mean() for _ in range(N_BOOTSTRAPS)])
    low, high = np.quantile(means, [0.025, 0.975])
    return float(gaps.mean()), float(low), float(high)
