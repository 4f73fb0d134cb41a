"""Lines over one parameter, as an HTML file that needs nothing else. How a line is drawn is drawing.py's."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loadtest.drawing import COLOURS, STYLE, Axis, Plot, legend
from loadtest.plan.costs import Exponent

PAGE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:46rem;margin:2rem auto;padding:0 1rem;background:var(--ground);"
    "color:var(--ink)}pre{background:var(--card);padding:1rem;overflow:auto;font-size:13px}"
    ".legend span{margin-right:1rem}.key{display:inline-block;width:.8em;height:.8em;margin-right:.4em}"
)
TALLEST = 3  # times the highest line: a band may leave the picture


@dataclass(frozen=True, slots=True)
class Curve:
    """y over the x of its chart, a place a point; NaN leaves a gap. low, high: a band around it, or nothing."""

    name: str
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


def chart(title: str, x_name: str, x: Sequence[float], curves: Sequence[Curve], level: float | None = None) -> str:
    """One picture. level: to compare with (an SLA). x is drawn in ratio when it spans over a decade."""
    shown = [v for c in curves for v in (*c.y, *c.high) if math.isfinite(v)] or [1.0]
    typical = max([v for c in curves for v in c.y if math.isfinite(v)] or [1.0])
    top = max(min(max(shown), TALLEST * typical), (level or 0) * 1.1) * 1.05 or 1.0
    is_log = min(x) > 0 and max(x) / min(x) > 10
    plot = Plot((Axis.log if is_log else Axis.linear)(min(x), max(x), x_name), Axis.linear(0, top, ""))
    if level is not None:
        plot.rule(level, "SLA")
    for curve, colour in zip(curves, COLOURS, strict=False):
        if curve.low:
            plot.band(x, curve.low, [min(high, top) for high in curve.high], colour)
        plot.line(x, curve.y, colour)
    for i, (value, after) in enumerate(zip(x, [*x[1:], x[-1]], strict=True)):
        told = ", ".join(f"{c.name} {c.y[i]:,.4g}" for c in curves if math.isfinite(c.y[i]))
        plot.hit(value, after, f"{x_name} {value:,.4g}: {told or 'nothing'}")
    names = legend((colour, curve.name) for curve, colour in zip(curves, COLOURS, strict=False))
    return f"<h2>{html.escape(title)}</h2>{plot.svg(title)}{names}"


def power_law(title: str, x_name: str, x: Sequence[float], seconds: Sequence[float], exponent: Exponent) -> str:
    """Points in ratio both ways, and through their middle the lines of this power and of the ends of its interval."""
    ms, ends = np.asarray(seconds) * 1e3, np.array([min(x), max(x)])
    plot = Plot(Axis.log(*ends.tolist(), x_name), Axis.log(ms.min() / 1.5, ms.max() * 1.5, "ms"))
    middle_x, middle_ms = np.exp(np.log(x).mean()), np.exp(np.log(ms).mean())
    for power, style in ((exponent.low, "thin dashed"), (exponent.high, "thin dashed"), (exponent.value, "")):
        plot.line(ends, middle_ms * (ends / middle_x) ** power, COLOURS[0], style)
    for at, value in zip(x, ms.tolist(), strict=True):
        plot.dot(at, value, COLOURS[1], f"{value:.3g}")
    heading = f"{title}: to the power {exponent}"
    return f"<h2>{html.escape(heading)}</h2>{plot.svg(heading)}"


def page(title: str, said: str, charts: Sequence[str], table: str) -> str:
    """The whole document."""
    drawn = "\n".join(charts)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}{PAGE}</style><h1>{html.escape(title)}</h1><p>{html.escape(said)}</p>\n{drawn}\n"
        f"<pre>{html.escape(table)}</pre></html>\n"
    )
