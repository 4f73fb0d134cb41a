"""Lines over one parameter, as an HTML file that needs nothing else: inline SVG, no script. Text in, text out."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 300, 70, 130, 34, 46
COLOURS = ("#1f6f8b", "#c8553d", "#5b7553", "#7d5ba6")
DASHED = 'stroke-dasharray="5 4"'
STYLE = "body{font:15px/1.5 system-ui,sans-serif;max-width:46rem;margin:2rem auto;padding:0 1rem;color:#222}" + (
    "svg{width:100%;height:auto}svg text{font:12px system-ui,sans-serif;fill:#333}"
    "pre{background:#f5f5f2;padding:1rem;overflow:auto;font-size:13px}"
)


@dataclass(frozen=True, slots=True)
class Curve:
    """y over the x of its chart, a place a point; NaN leaves a gap. low, high: a band around it, or nothing."""

    name: str
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


def chart(title: str, x_name: str, x: Sequence[float], curves: Sequence[Curve], level: float | None = None) -> str:
    """One SVG. level: a horizontal line to compare with (an SLA). x is drawn in ratio when it spans over a decade."""
    is_log = min(x) > 0 and max(x) / min(x) > 10
    shown = [v for c in curves for v in (*c.y, *c.high) if math.isfinite(v)] or [1.0]
    typical = max([v for c in curves for v in c.y if math.isfinite(v)] or [1.0])
    top = max(min(max(shown), 3 * typical), (level or 0) * 1.1) * 1.05 or 1.0  # a band may leave the picture

    def across(value: float) -> float:
        low, high, at = (math.log(v) if is_log else v for v in (min(x), max(x), value))
        return LEFT + (WIDTH - LEFT - RIGHT) * ((at - low) / (high - low) if high > low else 0.5)

    def up(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * min(value, top) / top

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">']
    parts.append(f'<text x="{LEFT}" y="18" style="font-weight:600">{html.escape(title)}</text>')
    for value in ticks(top):
        y = up(value)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:,.6g}</text>')
    last = -math.inf
    for value in x:
        if across(value) - last >= 48:  # room for its number
            last = across(value)
            parts.append(f'<text x="{last:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{value:,.4g}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{html.escape(x_name)}</text>')
    if level is not None:
        y = up(level)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#777" {DASHED}/>')
        parts.append(f'<text x="{WIDTH - RIGHT - 4}" y="{y - 5:.1f}" text-anchor="end">SLA</text>')
    names: list[float] = []
    for curve, colour in zip(curves, COLOURS, strict=False):
        points = [(across(a), up(b)) for a, b in zip(x, curve.y, strict=True) if math.isfinite(b)]
        if curve.low:
            edge = [(across(a), up(b)) for a, b in zip(x, curve.high, strict=True) if math.isfinite(b)]
            edge += [(across(a), up(b)) for a, b in zip(x, curve.low, strict=True) if math.isfinite(b)][::-1]
            parts.append(f'<polygon points="{_points(edge)}" fill="{colour}" opacity="0.14"/>')
        if not points:
            continue
        parts.append(f'<polyline points="{_points(points)}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in points]
        y = points[-1][1] + 4
        while any(abs(y - taken) < 14 for taken in names):
            y -= 14
        names.append(y)
        name = html.escape(curve.name)
        parts.append(f'<text x="{points[-1][0] + 8:.1f}" y="{y:.1f}" style="fill:{colour}">{name}</text>')
    return "".join([*parts, "</svg>"])


def page(title: str, said: str, charts: Sequence[str], table: str) -> str:
    """The whole document."""
    drawn = "\n".join(charts)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1><p>{html.escape(said)}</p>\n{drawn}\n<pre>{html.escape(table)}</pre></html>\n"
    )


def ticks(top: float) -> list[float]:
    """Round numbers from 0 up to `top`, four to eight of them."""
    step = 10.0 ** math.floor(math.log10(top))
    step = next(s for s in (step, step / 2, step / 4, step / 5) if top / s >= 4)
    return [step * i for i in range(int(top / step) + 1)]


def _points(pairs: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in pairs)
