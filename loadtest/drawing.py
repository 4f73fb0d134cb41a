"""Pictures as inline SVG: axes, lines, bands, stacked bars, densities, and what is told when the pointer rests on them.

Text in, text out: no script, nothing from elsewhere. A colour is a class of the page's STYLE, which follows the
reader's light or dark. What is drawn, and why, is the caller's.

    plot = Plot(Axis(0, 60, "seconds"), Axis.log(1, 200, "ms"))
    plot.line(at_s, p99_ms, "a")
    plot.svg("Latency over time")
"""

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 300, 66, 16, 12, 44
COLOURS = ("a", "b", "c", "d", "e", "f")  # of runs and of causes, in this order
DENSITIES = 8  # steps of a density's shade
STYLE = """
:root{color-scheme:light dark;--ground:#f6f5f1;--card:#fff;--ink:#1c2026;--soft:#646b76;--grid:#e8e6e0;--edge:#dddad2;
--a:#1f66a5;--b:#d36a1f;--c:#2f8a63;--d:#8454a3;--e:#b3882a;--f:#5c7382;--bad:#c1352f;--good:#23794b;--warn:#a36a00;--wash:#1f66a512}
@media(prefers-color-scheme:dark){:root{--ground:#14171b;--card:#1c2026;--ink:#e9eaec;--soft:#9aa3af;--grid:#2b3038;
--edge:#313741;--a:#6cb0ee;--b:#f0a05e;--c:#63c79b;--d:#c19be0;--e:#dcbb62;--f:#9fb4c2;--bad:#f2756d;--good:#66c48f;
--warn:#e0b050;--wash:#6cb0ee1a}}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{font:12px system-ui,sans-serif;fill:var(--soft)}
svg .strong{fill:var(--ink);font-weight:600}
.grid{stroke:var(--grid);stroke-width:1}.axis{stroke:var(--soft);stroke-width:1}
.rule{stroke:var(--bad);stroke-width:1.3;stroke-dasharray:6 4}svg text.bad{fill:var(--bad)}
.span{fill:var(--soft);opacity:.1}.hit{fill:transparent}.hit:hover{fill:var(--soft);fill-opacity:.14}
.line{fill:none;stroke-width:1.8;stroke-linejoin:round}.thin{stroke-width:1.3}.dashed{stroke-dasharray:4 3}
.band{opacity:.18}
""" + "".join(
    f".line.{c}{{stroke:var(--{c})}}.fill.{c}{{fill:var(--{c})}}.key.{c}{{background:var(--{c})}}"
    for c in (*COLOURS, "soft", "bad", "good", "ink")
)


@dataclass(frozen=True, slots=True)
class Axis:
    """Values from `low` to `high`, what they are, and where their marks stand."""

    low: float
    high: float
    name: str
    marks: Sequence[tuple[float, str]] = field(default=())
    is_log: bool = False

    @classmethod
    def linear(cls, low: float, high: float, name: str, n_marks: int = 6) -> "Axis":
        """With round marks."""
        return cls(low, high, name, [(v, shown(v)) for v in ticks(low, high, n_marks)])

    @classmethod
    def log(cls, low: float, high: float, name: str) -> "Axis":
        """In ratio; marks at 1, 2 and 5 of each decade, or at its 1 where there are many."""
        low, high = max(low, 1e-9), max(high, low * 1.2, 1e-9)
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        steps = (1, 2, 5) if math.log10(high / low) < 3 else (1,)
        values = [s * 10.0**d for d in decades for s in steps]
        return cls(low, high, name, [(v, shown(v)) for v in values if low <= v <= high * 1.0001], True)

    def share(self, value: float) -> float:
        """Where it stands, from 0 to 1; what is outside stands at the edge."""
        low, high, at = (math.log(max(v, 1e-12)) if self.is_log else v for v in (self.low, self.high, value))
        return min(1.0, max(0.0, (at - low) / (high - low))) if high > low else 0.5


class Plot:
    """One picture. What is drawn later lies above; what the pointer meets is above all."""

    def __init__(self, x: Axis, y: Axis, *, height: int = HEIGHT, left: int = LEFT, right: int = RIGHT) -> None:
        self.x, self.y, self.height, self.left, self.right = x, y, height, left, right
        self._parts: list[str] = []
        self._hits: list[str] = []

    def across(self, value: float) -> float:
        return self.left + (WIDTH - self.left - self.right) * self.x.share(value)

    def up(self, value: float) -> float:
        return self.height - BOTTOM - (self.height - TOP - BOTTOM) * self.y.share(value)

    # ------------------------------------------------------------------------------------------- marks

    def line(self, x: Iterable[float], y: Iterable[float], colour: str, style: str = "") -> None:
        """NaN leaves a gap."""
        run: list[str] = []
        for a, b in [*zip(x, y, strict=True), (math.nan, math.nan)]:
            if math.isfinite(a) and math.isfinite(b):
                run.append(f"{self.across(a):.1f},{self.up(b):.1f}")
            elif run:
                points = " ".join(run if len(run) > 1 else run * 2)
                self._parts.append(f'<polyline class="line {colour} {style}" points="{points}"/>')
                run = []

    def band(self, x: Sequence[float], low: Sequence[float], high: Sequence[float], colour: str) -> None:
        """Between the two, where both are numbers."""
        known = [p for p in zip(x, low, high, strict=True) if all(map(math.isfinite, p))]
        edge = [(a, h) for a, _, h in known] + [(a, b) for a, b, _ in reversed(known)]
        points = " ".join(f"{self.across(a):.1f},{self.up(b):.1f}" for a, b in edge)
        self._parts.append(f'<polygon class="fill band {colour}" points="{points}"/>' if known else "")

    def bars(self, x: Sequence[float], width: float, low: Sequence[float], high: Sequence[float], colour: str) -> None:
        """One from low to high over each [x, x + width]."""
        path = []
        for a, bottom, top in zip(x, low, high, strict=True):
            if top > bottom:
                left, right = self.across(a), self.across(a + width)
                gap = 0.5 if right - left > 3 else 0.0
                path.append(_box(left + gap, self.up(top), right - left - 2 * gap, self.up(bottom) - self.up(top)))
        self._parts.append(f'<path class="fill {colour}" d="{"".join(path)}"/>' if path else "")

    def density(self, x: Sequence[float], y: Sequence[float], counts: np.ndarray, colour: str) -> None:
        """Cells between the edges x[n + 1] and y[m + 1], darker for more; counts [n, m]."""
        most = float(counts.max(initial=0))
        if not most:
            return
        shades = np.ceil(np.sqrt(counts / most) * DENSITIES).astype(int)  # sqrt: a few late ones are to be seen
        paths: list[list[str]] = [[] for _ in range(DENSITIES + 1)]
        for i, j in np.argwhere(counts > 0).tolist():
            left, right, bottom, top = self.across(x[i]), self.across(x[i + 1]), self.up(y[j]), self.up(y[j + 1])
            paths[shades[i, j]].append(_box(left, top, right - left, bottom - top))
        for shade, path in enumerate(paths):
            if path:
                opacity = 0.1 + 0.75 * shade / DENSITIES
                self._parts.append(f'<path class="fill {colour}" opacity="{opacity:.2f}" d="{"".join(path)}"/>')

    def rule(self, value: float, text: str) -> None:
        """A level to compare with (an SLA)."""
        if self.y.low <= value <= self.y.high:
            y, right = self.up(value), WIDTH - self.right
            self._parts.append(f'<line class="rule" x1="{self.left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            self._parts.append(
                f'<text class="bad" x="{right - 4}" y="{y - 5:.1f}" text-anchor="end">{_safe(text)}</text>'
            )

    def span(self, low: float, high: float, text: str) -> None:
        """A shaded stretch of x (a warm-up)."""
        if high > low:
            left, right = self.across(low), self.across(high)
            self._parts.append(f'<path class="span" d="{_box(left, TOP, right - left, self.height - TOP - BOTTOM)}"/>')
            self._parts.append(f'<text x="{left:.1f}" y="{TOP - 2}">{_safe(text)}</text>')

    def dot(self, x: float, y: float, colour: str, text: str, *, below: bool = False) -> None:
        """A point with its value beside it."""
        a, b = self.across(x), self.up(y)
        end = "end" if a > self.left + 40 else "start"
        self._parts.append(f'<circle class="fill {colour}" cx="{a:.1f}" cy="{b:.1f}" r="3.5"/>')
        where = f'x="{a + (-6 if end == "end" else 6):.1f}" y="{b + (16 if below else -8):.1f}" text-anchor="{end}"'
        self._parts.append(f'<text class="strong" {where}>{_safe(text)}</text>')

    def hit(self, low: float, high: float, text: str) -> None:
        """What is told of this stretch of x."""
        left, right = self.across(low), self.across(high)
        box = _box(left, TOP, max(1.0, right - left), self.height - TOP - BOTTOM)
        self._hits.append(f'<path class="hit" d="{box}"><title>{_safe(text)}</title></path>')

    # --------------------------------------------------------------------------------------------- whole

    def svg(self, title: str) -> str:
        bottom, right = self.height - BOTTOM, WIDTH - self.right
        frame = []
        for value, text in self.y.marks:
            y = self.up(value)
            frame.append(f'<line class="grid" x1="{self.left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            frame.append(f'<text x="{self.left - 8}" y="{y + 4:.1f}" text-anchor="end">{_safe(text)}</text>')
        for value, text in self.x.marks:
            x = self.across(value)
            frame.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
            frame.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{_safe(text)}</text>')
        frame.append(f'<line class="axis" x1="{self.left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
        middle = (TOP + bottom) / 2
        turned = f'transform="rotate(-90 14 {middle:.0f})"'
        frame.append(f'<text x="{right}" y="{self.height - 6}" text-anchor="end">{_safe(self.x.name)}</text>')
        frame.append(f'<text x="14" y="{middle:.0f}" text-anchor="middle" {turned}>{_safe(self.y.name)}</text>')
        opened = f'<svg viewBox="0 0 {WIDTH} {self.height}" role="img" aria-label="{_safe(title)}">'
        return "".join([opened, *frame, *self._parts, *self._hits, "</svg>"])


def legend(names: Iterable[tuple[str, str]]) -> str:
    """What each colour is: (colour, name)."""
    keys = "".join(f'<span><i class="key {colour}"></i>{_safe(name)}</span>' for colour, name in names)
    return f'<p class="legend">{keys}</p>'


def ticks(low: float, high: float, n: int = 6) -> list[float]:
    """Some n round numbers in [low, high]."""
    if not high > low:
        return [low]
    rough = (high - low) / n
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * s for s in (1, 2, 5, 10) if power * s >= rough * 0.999)
    return [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def shown(value: float) -> str:
    """A number as short as it stays right to three digits."""
    if not math.isfinite(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _box(x: float, y: float, width: float, height: float) -> str:
    return f"M{x:.1f} {y:.1f}h{width:.1f}v{height:.1f}h{-width:.1f}z"


def _safe(text: str) -> str:
    return html.escape(text)
