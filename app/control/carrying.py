"""Carried scores brought to the scale of this very request: a pure rule, a line through what was re-ranked.

The bundle's calibration is one for all requests, but the deep model's level and spread differ from one to the next.
Where some rows of a request were scored, they say how; the fewer, the more the calibration is believed.
"""

import numpy as np

from app.flow import Mask, Scores

PRIOR_ROWS = 2  # that the calibration counts for; 1 to 4 lose the same of NDCG on the example's bundle
LEAST_SLOPE = 0.05  # of the line: keeps the order among the carried
TINY = 1e-30  # no division by zero where all carried are equal


def to_request_scale(carried: Scores, fresh: Scores, is_fresh: Mask) -> Scores:
    """carried + shift + slope · (carried - its mean over the fresh), f32[..., n]; `carried` if nothing is fresh.

    Least squares of fresh - carried, shrunk to 0 as if the calibration had been right on PRIOR_ROWS more rows.

    Args:
        carried, fresh: f32[..., n]; what isn't finite doesn't count. is_fresh: bool[..., n], where `fresh` is read.
    """
    with np.errstate(invalid="ignore"):
        is_finite = np.isfinite(carried - fresh)
    # About the middle, so that squares of large scores lose no digits.
    middle = np.mean(carried, axis=-1, keepdims=True, where=is_finite) if is_finite.any() else np.float32(0)
    x, off = (np.where(is_finite, v, 0).astype(np.float64) for v in (carried - middle, fresh - carried))
    sums = is_fresh[..., None, :] @ np.stack([is_finite, x, off, x * x, x * off], axis=-1)
    n, of_x, of_off, of_xx, of_x_off = np.moveaxis(sums, -1, 0)
    mean = of_x / np.maximum(n, 1)
    prior = PRIOR_ROWS * (x * x).sum(axis=-1, keepdims=True) / max(x.shape[-1], 1) + TINY
    slope = np.maximum((of_x_off - mean * of_off) / (of_xx - n * mean**2 + prior), LEAST_SLOPE - 1)
    shift = of_off / (n + PRIOR_ROWS) - slope * (middle + mean)
    return np.asarray(carried * (1 + slope).astype(np.float32) + shift.astype(np.float32))
