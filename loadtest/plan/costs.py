"""What work costs by its size: a line for widths, a power for the complexity of a stage; both with intervals. Pure.

    line     seconds(n) = fixed + each · n           weighted by 1 / seconds, so that small widths count as much
    power    seconds = c · Π size_i ^ exponent_i     least squares on logarithms, t intervals of 90 %

A line predicts inside and a little outside of what was measured; a power says how a stage grows, and carries a
measurement to sizes that were not. A prediction far outside has the interval of its exponent, which widens with the
distance.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# 95th percentile of Student's t, by degrees of freedom from 1 on; 1.645 beyond.
T_95 = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812, 1.796, 1.782, 1.771, 1.761, 1.753)
T_95_MANY = 1.645


@dataclass(frozen=True, slots=True)
class Line:
    """seconds(n) = fixed + each · n; neither is negative. Where there are points, it goes through them instead.

    points: (n, seconds), n rising; between them seconds are interpolated, beyond them they go on by `each`.
    """

    fixed: float
    each: float
    points: tuple[tuple[float, float], ...] = ()

    def __call__(self, n: float) -> float:
        if not self.points:
            return self.fixed + self.each * n
        near = min(max(n, self.points[0][0]), self.points[-1][0])
        return max(0.0, float(np.interp(near, *zip(*self.points, strict=True))) + self.each * (n - near))

    def times(self, factor: float) -> "Line":
        points = tuple((n, factor * seconds) for n, seconds in self.points)
        return Line(factor * self.fixed, factor * self.each, points)


def line(points: Sequence[tuple[float, float]]) -> Line:
    """The line through points (size, seconds), relative errors squared; one point is a cost without a fixed part."""
    n, seconds = (np.asarray(column, float) for column in zip(*points, strict=True))
    if len(set(n.tolist())) == 1:
        return Line(0.0, float(seconds.mean() / n[0]))
    weighted = np.column_stack([1 / seconds, n / seconds])
    (fixed, each), *_ = np.linalg.lstsq(weighted, np.ones(len(n)), rcond=None)
    if fixed < 0:
        return Line(0.0, float((n / seconds).sum() / ((n / seconds) ** 2).sum()))
    if each < 0:
        return Line(float((1 / seconds).sum() / (1 / seconds**2).sum()), 0.0)
    return Line(float(fixed), float(each))


@dataclass(frozen=True, slots=True)
class Exponent:
    """How a cost grows: with the power `value`, and its interval of 90 %. n: points it was fitted on, 0: assumed."""

    value: float
    low: float
    high: float
    n: int = 0

    @property
    def is_assumed(self) -> bool:
        return not self.n

    def growth(self, ratio: float) -> tuple[float, float, float]:
        """By which factor a cost grows when its size does by `ratio`: likely, least, most."""
        ends = sorted((ratio**self.low, ratio**self.high))
        return ratio**self.value, ends[0], ends[1]

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f}{', assumed' if self.is_assumed else ''})"


def power(
    sizes: Mapping[str, Sequence[float]], seconds: Sequence[float], worlds: Sequence[int] | None = None
) -> dict[str, Exponent]:
    """The exponent of each size; one that doesn't vary in the points has none. Raises ValueError for too few points.

    worlds: which points share what luck their world had (its index, its search parameter): intervals are from the sums
    of residuals of each world (a cluster-robust variance, times G / (G - k), t on G - k). With six planted
    worlds they missed in less than 10 % of trials; with points taken as independent, in half.
    """
    varied = {name: np.log(values) for name, values in sizes.items() if np.ptp(np.log(values)) > 1e-9}
    y = np.log(seconds)
    x = np.column_stack([*varied.values(), np.ones(len(y))])
    freedom = len(y) - x.shape[1]
    if freedom < 1 or np.linalg.matrix_rank(x) < x.shape[1]:
        raise ValueError(f"{len(y)} points say nothing of {len(varied)} exponents")
    fitted, *_ = np.linalg.lstsq(x, y, rcond=None)
    of = np.arange(len(y)) if worlds is None else np.asarray(worlds)
    each = np.unique(of)
    freedom = max(1, len(each) - x.shape[1])
    sums = np.stack([x[of == world].T @ (y - x @ fitted)[of == world] for world in each])
    inverse = np.linalg.inv(x.T @ x)
    spread = np.sqrt(np.diag(inverse @ (sums.T @ sums) @ inverse) * len(each) / freedom)
    t = T_95[freedom - 1] if freedom <= len(T_95) else T_95_MANY
    return {
        name: Exponent(float(b), float(b - t * s), float(b + t * s), len(y))
        for name, b, s in zip(varied, fitted, spread, strict=False)
    }
