"""Measures of a ranking and of a probability, and how sure they are.

A rank counts from 0 and is n (or more) when the target isn't in the list. Intervals are by bootstrap over
people, because one person's queries are alike: people are drawn with replacement, each with all of theirs.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
N_BOOTSTRAPS = 1_000
MISSED = np.iinfo(np.int64).max  # the rank of a target that isn't in the list


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


def rank_of(ranked: NDArray[np.int64], target: int) -> int:
    """The place of the target in a list of rows, from 0; MISSED when it isn't there."""
    found = np.flatnonzero(ranked == target)
    return int(found[0]) if len(found) else MISSED


def rank_in(scores: NDArray[np.float32], target: int) -> int:
    """The place of the target when all items are ordered by falling score, ties by row."""
    mine = scores[target]
    return int((scores > mine).sum() + (scores[:target] == mine).sum())


def hit(ranks: NDArray[np.int64], k: int = 10) -> Floats:
    """f64[Q]: 1 where the target is among the first k. With one target this is recall@k too."""
    return (ranks < k).astype(np.float64)


def ndcg(ranks: NDArray[np.int64], k: int = 10) -> Floats:
    """f64[Q]: 1 / log2(rank + 2) among the first k, else 0; the ideal of one target is 1."""
    return np.where(ranks < k, 1.0 / np.log2(np.minimum(ranks, k) + 2.0), 0.0)


def place_gains(k: int) -> Floats:
    """f64[k]: what the items of an ideal answer are worth, (k - r) / k for the one at rank r."""
    return (k - np.arange(k)) / k


def dcg(gains: Floats) -> Floats:
    """f64[...]: sum over places p from 0 of gain / log2(2 + p); gains f64[..., places]."""
    return np.asarray(gains @ (1.0 / np.log2(2.0 + np.arange(gains.shape[-1]))))


def ndcg_loss(shown: Floats, ideal: Floats) -> Floats:
    """f64[...]: 1 - DCG(shown) / DCG(ideal), for gains by place f64[..., places]; 0 where nothing can be gained."""
    best = dcg(ideal)
    return np.where(best > 0, 1.0 - dcg(shown) / np.maximum(best, 1e-300), 0.0)


def over_people(person: NDArray[np.int64], values: Floats, seed: int = 0) -> Estimate:
    """The mean over queries, with the bootstrap interval over people. A paired one: give differences."""
    _, number = np.unique(person, return_inverse=True)
    sums, counts = np.bincount(number, values), np.bincount(number).astype(float)
    draws = _draws(len(sums), seed)
    means = (draws @ sums) / (draws @ counts)
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(values.mean()), float(low), float(high))


def calibration_error(p: Floats, label: Floats, bins: int = 15) -> float:
    """ECE = sum over bins of (share of the rows) * |mean p - mean label|, bins of equal mass by p."""
    order = np.argsort(p, kind="stable")
    gaps = [abs(p[part].sum() - label[part].sum()) for part in np.array_split(order, bins)]
    return float(sum(gaps) / len(p))


def calibration_over_people(
    person: NDArray[np.int64], p: Floats, label: Floats, bins: int = 15, seed: int = 0
) -> Estimate:
    """ECE with its bootstrap interval over people; the bins are cut once, on all rows.

    The bootstrap of an absolute gap is biased upwards: the value may lie near the lower end.
    """
    _, number = np.unique(person, return_inverse=True)
    order = np.argsort(p, kind="stable")
    which = np.empty(len(p), np.int64)
    for b, part in enumerate(np.array_split(order, bins)):
        which[part] = b
    n_people = int(number.max()) + 1
    gaps = np.bincount(number * bins + which, p - label, n_people * bins).reshape(n_people, bins)
    counts = np.bincount(number, minlength=n_people).astype(float)
    draws = _draws(n_people, seed)
    errors = np.abs(draws @ gaps).sum(axis=1) / (draws @ counts)
    low, high = np.quantile(errors, [0.025, 0.975])
    return Estimate(calibration_error(p, label, bins), float(low), float(high))


def _draws(n_people: int, seed: int) -> Floats:
    """f64[N_BOOTSTRAPS, n_people]: how often each person is drawn."""
    each = np.full(n_people, 1.0 / n_people)
    return np.random.default_rng(seed).multinomial(n_people, each, N_BOOTSTRAPS).astype(np.float64)
