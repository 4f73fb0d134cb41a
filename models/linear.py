"""Pre-ranking: a logistic regression on the named features of app/features.py, in closed Newton steps.

It learns from the re-ranker: the target of a candidate is the re-ranker's probability that the person comes
to it later, not the bare event, so that what the re-ranker would put on top stays in. Two numbers fitted on
the events themselves then bring the scores back to their true level without changing the order.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from app.features import Inputs, Tables, named_features
from app.flow import Candidates, Person

NAMES = (
    "retrieval_score",
    "item.log_popularity",
    "item.recent_popularity",
    "history_mean.deep_item",
    "history_max.deep_item",
    "history_last.deep_item",
    "history_mean.succession",
    "history_max.succession",
    "history_last.succession",
    "history_overlap.genres",
    "history_gap.decade",
    "history_log_count",
)
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class PreRanker:
    """score = logistic(bias + weights · features); names U[F], weights f32[F], bias f32."""

    names: tuple[str, ...]
    weights: NDArray[np.float32]
    bias: np.float32

    def logits(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """f32[n] for features [n, F]."""
        return features @ self.weights + self.bias


def features_of(
    tables: Tables, history: NDArray[np.int64], rows: NDArray[np.int64], found: NDArray[np.float32]
) -> NDArray[np.float32]:
    """f32[n, F]: the features as the service computes them, for these rows and their retrieval scores."""
    origins = np.ones(len(rows), np.uint32)
    candidates = Candidates(rows, found, origins, np.empty(0, np.float32))
    return named_features(NAMES, Inputs(tables, Person(history, {}), candidates, {}))


def fit_linear(features: NDArray[np.float32], taught: Floats, happened: Floats) -> PreRanker:
    """The pre-ranker for rows of features [n, F]; `taught` in [0, 1] from the re-ranker, `happened` 0 or 1."""
    mean, spread = features.mean(axis=0, dtype=float), features.std(axis=0, dtype=float) + 1e-6
    scaled = (features - mean) / spread
    weights, bias = logistic_regression(scaled, taught)
    stretch, shift = logistic_regression((scaled @ weights + bias)[:, None], happened)
    slope = max(float(stretch[0]), 1e-3)  # the order is the re-ranker's, whatever the events say
    weights, bias = slope * weights / spread, slope * bias + shift
    return PreRanker(NAMES, weights.astype(np.float32), np.float32(bias - mean @ weights))


def logistic_regression(x: Floats, y: Floats, ridge: float = 1e-4, steps: int = 20) -> tuple[Floats, float]:
    """Weights [F] and bias that minimise mean log loss + ridge / 2 * |weights|^2; y may be any share."""
    design = np.column_stack([x, np.ones(len(x))])
    penalty = np.append(np.full(x.shape[1], ridge), 0.0)
    best = np.append(np.zeros(x.shape[1]), np.log((y.mean() + 1e-6) / (1 - y.mean() + 1e-6)))
    for _ in range(steps):
        p = 1.0 / (1.0 + np.exp(-np.clip(design @ best, -30.0, 30.0)))
        gradient = design.T @ (p - y) / len(y) + penalty * best
        curvature = (design * (p * (1 - p))[:, None]).T @ design / len(y)
        step = np.linalg.solve(curvature + np.diag(penalty + 1e-9), gradient)
        best = best - step
        if np.abs(step).max() < 1e-8:
            break
    return best[:-1], float(best[-1])
