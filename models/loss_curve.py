"""A loss curve from masks and their mean losses: pure arithmetic, a single-index model by least squares.

    loss ≈ link(weights · missing),   weights >= 0, link rising and piecewise linear

so that more missing is never less loss. Which masks are tried and what they lose is loss.py's business.
"""

import numpy as np
from numpy.typing import NDArray

from app.manifest import LossCurve

Floats = NDArray[np.float64]

N_KNOTS = 10
END_WEIGHT = 10.0  # of nothing and of everything missing, the commonest, against one random mask
ROUNDS = 8
LEAST_SLOPE = 0.1  # of a link's whole rise: where it is flat, weights still learn


def fit_curve(missing: Floats, loss: Floats) -> LossCurve:
    """The single-index model  loss = link(weights · missing)  of least squares, by alternating between the two.

    The weights come from the link's linearisation (Gauss-Newton), the link from its rises between knots at quantiles
    of the index; both are non-negative, so that more missing is never less loss. The best of ROUNDS rounds.

    Args:
        missing: f64[m, bands]; loss: f64[m]. The first has nothing missing and is met exactly, the second everything.
    """
    root = np.sqrt(np.where(np.arange(len(loss)) < 2, END_WEIGHT, 1.0))
    gain, best = loss - loss[0], None
    weights = non_negative_least_squares(missing * root[:, None], gain * root)
    for _ in range(ROUNDS):
        index = missing @ weights
        if not index.max() > 0:
            break
        weights, index = weights / index.max(), index / index.max()
        even = np.linspace(0, 1, N_KNOTS + 1)[1:]  # half-way between even steps and quantiles
        x = np.unique(np.concatenate([[0.0], (even + np.quantile(index[index > 0], even)) / 2]))
        rises = non_negative_least_squares(_ramps(index, x) * root[:, None], gain * root)
        y = np.concatenate([[0.0], np.cumsum(rises)])
        rest = float(np.linalg.norm((np.interp(index, x, y) - gain) * root))
        if best is None or rest < best[0]:
            best = rest, weights, x, y
        piece = np.clip(np.searchsorted(x, index) - 1, 0, len(rises) - 1)
        slope = np.maximum((rises / np.diff(x))[piece], LEAST_SLOPE * y[-1])
        target = slope * index + gain - np.interp(index, x, y)
        weights = non_negative_least_squares(missing * (slope * root)[:, None], target * root)
    if best is None:  # nothing that is missing costs anything
        best = 0.0, np.zeros(missing.shape[1]), np.array([0.0, 1.0]), np.zeros(2)
    _, weights, x, y = best
    return LossCurve(weights=tuple(weights.tolist()), x=tuple(x.tolist()), y=tuple(np.clip(loss[0] + y, 0, 1).tolist()))


def _ramps(index: Floats, x: Floats) -> Floats:
    """f64[m, pieces]: how much of each piece between the knots x lies below the index, 0 to 1."""
    return np.clip((index[:, None] - x[:-1]) / np.diff(x), 0, 1)


def non_negative_least_squares(a: Floats, b: Floats) -> Floats:
    """The x >= 0 of least |a x - b|, f64[n]; a f64[m, n], m and n small.

    Source: Lawson and Hanson 1974, chapter 23: unknowns are freed one by one while that helps.
    """
    x, free = np.zeros(a.shape[1]), np.zeros(a.shape[1], np.bool_)
    least = 1e-10 * float(np.abs(a.T @ b).max())
    for _ in range(3 * len(x)):
        pull = np.where(free, 0.0, a.T @ (b - a @ x))
        if pull.max() <= least:
            break
        free[pull.argmax()] = True
        while True:
            target = np.zeros(len(x))
            target[free] = np.linalg.lstsq(a[:, free], b, rcond=None)[0]
            falling = free & (target <= 0)
            if not falling.any():
                x = target
                break
            # As far towards the target as all stay >= 0; what gets to 0 is bound again.
            steps = x[falling] / (x[falling] - target[falling])
            x = x + steps.min() * (target - x)
            free[np.flatnonzero(falling)[steps <= steps.min()]] = False
            x[~free] = 0.0
    return x
