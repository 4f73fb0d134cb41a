"""Calibration: a rising map from earlier scores to the re-ranker's, so that fresh and carried scores compare.

Candidates are put in bins by the earlier score, finer towards the top, where it matters who is above whom; each
bin has its mean re-rank score; pool-adjacent-violators makes the means rise. Pure arithmetic: which
candidates are looked at is evaluate.py's business, and the piecewise-linear function itself is `Knots`
in app/manifest.py.
"""

import numpy as np
from numpy.typing import NDArray

from app.manifest import Knots

Array = NDArray[np.float64]

MOST_BINS = 32
PER_BIN = 100  # candidates a bin on average, at least; fewer make knots of noise
LEAST_RISE = 1e-3  # of the spread of the scores: what a map rises that knows nothing


def fit(earlier: Array, later: Array) -> Knots:
    """The strictly rising piecewise-linear map with later ≈ map(earlier), least squares over the bins.

    Pairs with a value that isn't finite are left out. Where the later score doesn't rise with the earlier one,
    the map is almost flat around the mean: it keeps the order and claims no difference.

    Args:
        earlier, later: f64[n], scores of the same candidates. Raises ValueError if no pair is finite.
    """
    is_finite = np.isfinite(earlier) & np.isfinite(later)
    if not is_finite.any():
        raise ValueError("no candidate has two finite scores")
    x, y, mass = _bins(np.asarray(earlier[is_finite], float), np.asarray(later[is_finite], float))
    x, y = _pool_adjacent_violators(x, y, mass)
    if len(x) == 1:
        half_x = max(float(np.ptp(earlier[is_finite])), 1e-6 * max(1.0, abs(x[0]))) / 2
        half_y = max(LEAST_RISE * float(np.std(later[is_finite])), 1e-6 * max(1.0, abs(y[0])))
        x, y = x[0] + np.array([-half_x, half_x]), y[0] + np.array([-half_y, half_y])
    return Knots(x=tuple(x.tolist()), y=tuple(y.tolist()))


def _bins(x: Array, y: Array) -> tuple[Array, Array, Array]:
    """Mean x, mean y and count of each bin, by rising x; candidates of one score share a bin."""
    order = np.argsort(x, kind="stable")
    x, y = x[order], y[order]
    n_bins = int(np.clip(len(x) // PER_BIN, 2, MOST_BINS))
    # 1 - (1 - t)^2 for t from 0 to 1: the top bin of 32 holds a thousandth, the bottom one a sixteenth.
    quantiles = 1 - (1 - np.arange(n_bins) / n_bins) ** 2
    starts = np.unique(np.searchsorted(x, x[(quantiles * len(x)).astype(int)]))
    counts = np.diff(np.append(starts, len(x)))
    return np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts, counts.astype(float)


def _pool_adjacent_violators(x: Array, y: Array, mass: Array) -> tuple[Array, Array]:
    """Means of the pooled blocks: x and y both strictly rising. Source: Ayer et al. 1955; Barlow et al. 1972."""
    blocks: list[tuple[float, float, float]] = []
    for block in zip(x.tolist(), y.tolist(), mass.tolist(), strict=True):
        while blocks and blocks[-1][1] >= block[1]:
            (x0, y0, m0), (x1, y1, m1) = blocks.pop(), block
            m = m0 + m1
            block = ((m0 * x0 + m1 * x1) / m, (m0 * y0 + m1 * y1) / m, m)
        blocks.append(block)
    pooled = np.array(blocks)
    return pooled[:, 0], pooled[:, 1]
