"""The pictures of one run, or of two in the same frame: each takes runs and gives inline SVG and its legend.

    percentiles   latency by percentile, on the scale of 1 / (1 - p): each nine has the same room
    latency       latency over time, by when requests were due: all of them as shades, p50 and p99 as lines
    rates         requests due, sent and answered a second
    waterfall     the stages one after the other
    coverage      how much of the wanted width was re-ranked
    degradations  causes an answer; errors: failures a second, by cause

Of two runs the first is blue and the second orange. Words and tables around them are page.py's.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from loadtest.drawing import COLOURS, WIDTH, Axis, Plot, legend, shown
from loadtest.lab.run import GROWTH, N_BUCKETS, OUTSIDE, REST, SHORTEST_S, Counts, Run, bucket_ms
from loadtest.observed import STAGES, US, Floats

NINES = ((0.5, "50 %"), (0.9, "90 %"), (0.99, "99 %"), (0.999, "99.9 %"), (0.9999, "99.99 %"), (0.99999, "99.999 %"))
MOST_COLUMNS, ROWS = 120, 44  # of the density over time
MOST_POINTS = 300  # of the percentile curve
ROW_HEIGHT, OF_TWO = 34, 44  # of the waterfall
OTHERS = "others"
NAMES = {REST: "rest of the service", OUTSIDE: "outside of it"}


# ------------------------------------------------------------------------------------------ by percentile


def percentiles(runs: Sequence[Run]) -> str:
    curves = [_curve(run) for run in runs]
    right = max([u[-1] for u, _ in curves if len(u)] or [2.0])
    values = [v for _, ms in curves for v in ms] or [1.0]
    sla = runs[0].sla_ms
    marks = [(0.0, "0 %")] + [(-math.log10(1 - p), name) for p, name in NINES if -math.log10(1 - p) <= right + 0.05]
    x = Axis(0, right, "share of the answered requests", marks)
    plot = Plot(x, Axis.log(min(values) * 0.9, max([*values, sla * 1.2]), "latency, ms"))
    plot.rule(sla, f"SLA {shown(sla)} ms")
    for (u, ms), colour in zip(curves, COLOURS, strict=False):
        plot.line(u, ms, colour)
    for run, (u, ms), colour in zip(runs, curves, COLOURS, strict=False):
        for p, _ in NINES[:4]:
            at = -math.log10(1 - p)
            if len(u) and at <= u[-1]:
                value = run.latency.get_value_at_percentile(p * 100) / US * 1e3
                plot.dot(at, value, colour, f"{shown(value)}", below=colour != COLOURS[0])
        for a, b, value in zip(u[:-4:4], u[4::4], ms[4::4], strict=False):
            if len(runs) == 1:
                plot.hit(a, b, f"{100 * (1 - 10**-b):.4g} % within {shown(value)} ms")
    return plot.svg("Latency by percentile") + _names(runs)


def _curve(run: Run) -> tuple[list[float], list[float]]:
    """-log10(1 - p) and the latency in ms there, in steps; up to the slowest request, at log10(n)."""
    u, ms, below, n = [], [], 0, run.latency.get_total_count()
    for step in run.latency.get_recorded_iterator():
        u.append(-math.log10(1 - below / n))
        ms.append(step.value_iterated_to / US * 1e3)
        below += step.count_added_in_this_iter_step
    if len(u) > MOST_POINTS:
        kept = np.unique(np.searchsorted(u, np.linspace(0, u[-1], MOST_POINTS)).clip(0, len(u) - 1)).tolist()
        u, ms = [u[i] for i in kept], [ms[i] for i in kept]
    ends = [*u[1:], math.log10(n)] if n else []
    steps = [point for start, end, v in zip(u, ends, ms, strict=True) for point in ((start, v), (end, v))]
    return [a for a, _ in steps], [v for _, v in steps]


# ------------------------------------------------------------------------------------------------ over time


def latency(runs: Sequence[Run]) -> str:
    x = _time(runs)
    drawn = [_percentiles_over_time(run) for run in runs]
    shown_ms = [v for of_run in drawn for series in of_run.values() for v in series if math.isfinite(v)] or [1.0]
    quick = [run.latency.get_value_at_percentile(1) / US * 1e3 for run in runs if run.latency.get_total_count()]
    low, high = min([*shown_ms, *quick]), max([*shown_ms, runs[0].sla_ms * 1.2])
    plot = Plot(x, Axis.log(low * 0.8, high * 1.1, "latency, ms"))
    _warm_up(plot, runs)
    if len(runs) == 1:
        _density(plot, runs[0])
    plot.rule(runs[0].sla_ms, f"SLA {shown(runs[0].sla_ms)} ms")
    for run, series, colour in zip(runs, drawn, COLOURS, strict=False):
        at_s = _middles(run)
        ink = colour if len(runs) > 1 else "ink"
        plot.line(at_s, series["p50"], ink, "thin dashed")
        plot.line(at_s, series["p99"], ink, "thin")
    if len(runs) == 1:
        told = [
            f"p50 {shown(a)} ms\np99 {shown(b)} ms\nslowest {shown(c)} ms"
            for a, b, c in zip(*drawn[0].values(), strict=True)
        ]
        _tell(plot, runs[0], told)
        keys = legend([("a", "requests, darker for more"), ("ink", "p50 (dashed) and p99 of each bin")])
    else:
        keys = _names(runs, "p50 dashed, p99 whole")
    return plot.svg("Latency over time") + keys


def _percentiles_over_time(run: Run) -> dict[str, list[float]]:
    counts = run.series.buckets()
    until, n = counts.cumsum(axis=1), counts.sum(axis=1)

    def at(p: float) -> list[float]:
        bucket = (until >= np.maximum(1, np.ceil(p * n))[:, None]).argmax(axis=1)
        return np.where(n > 0, bucket_ms(bucket), np.nan).tolist()

    return {"p50": at(0.5), "p99": at(0.99), "slowest": at(1.0)}


def _density(plot: Plot, run: Run) -> None:
    counts = run.series.buckets()
    step = math.ceil(len(counts) / MOST_COLUMNS)
    starts = np.arange(0, len(counts), step)
    columns = np.add.reduceat(counts, starts, axis=0)
    edges = np.geomspace(plot.y.low, plot.y.high, ROWS + 1)
    first = (np.log(edges / 1e3 / SHORTEST_S) / math.log(GROWTH)).round().astype(int).clip(0, N_BUCKETS)
    first[0] = 0  # what is quicker than the picture reaches stands in its lowest row
    until = np.concatenate([np.zeros((len(columns), 1), np.int64), columns.cumsum(axis=1)], axis=1)[:, first]
    plot.density([*(starts * run.bin_s), len(counts) * run.bin_s], edges.tolist(), np.diff(until, axis=1), "a")


def rates(runs: Sequence[Run]) -> str:
    x = _time(runs)
    top = max(max(per_s(run, s)) for run in runs for s in (run.series.due, run.series.sent, run.series.answered))
    plot = Plot(x, Axis.linear(0, top * 1.08, "requests a second"))
    _warm_up(plot, runs)
    if len(runs) == 1:
        run = runs[0]
        s = run.series
        plot.band(_middles(run), [0.0] * len(s.due), per_s(run, s.due), "soft")
        lines = {
            "due": ("soft", s.due),
            "sent": ("a", s.sent),
            "answered": ("good", s.answered),
            "failed": ("bad", s.failed),
        }
        for colour, counts in lines.values():
            plot.line(_middles(run), per_s(run, counts), colour, "thin")
        told = zip(s.due, s.sent, s.answered, s.failed, strict=True)
        _tell(plot, run, [f"due {d}, sent {sent}\nanswered {a}, failed {f}" for d, sent, a, f in told])
        keys = legend([(colour, name) for name, (colour, _) in lines.items()])
    else:
        for run, colour in zip(runs, COLOURS, strict=False):
            plot.line(_middles(run), per_s(run, run.series.due), colour, "thin dashed")
            plot.line(_middles(run), per_s(run, run.series.answered), colour)
        keys = _names(runs, "due dashed, answered whole")
    return plot.svg("Rates") + keys


def coverage(runs: Sequence[Run]) -> str:
    plot = Plot(_time(runs), Axis.linear(0, 1, "coverage"), height=220)
    _warm_up(plot, runs)
    for run, colour in zip(runs, COLOURS, strict=False):
        plot.line(_middles(run), run.series.coverage, colour)
    if len(runs) == 1:
        _tell(
            plot, runs[0], [f"coverage {c:.3f}" if math.isfinite(c) else "no answer" for c in runs[0].series.coverage]
        )
    return plot.svg("Coverage over time") + _names(runs)


def degradations(runs: Sequence[Run]) -> str:
    """Over the answers of a bin: over 1 where answers are degraded by several causes."""
    return _causes(runs, "degradations an answer", lambda run: (run.series.degraded, run.series.buckets().sum(axis=1)))


def errors(runs: Sequence[Run]) -> str:
    return _causes(runs, "failures a second", lambda run: (run.series.errors, np.full(len(run.series.due), run.bin_s)))


def _causes(runs: Sequence[Run], name: str, read: Callable[[Run], tuple[dict[str, list[int]], Floats | Counts]]) -> str:
    """Stacked by cause; of two runs the sums."""
    stacks = []
    for run in runs:
        by_cause, over = read(run)
        ranked = list(by_cause)
        named = dict.fromkeys([*ranked[: len(COLOURS) - 1], *([OTHERS] if len(ranked) >= len(COLOURS) else [])])
        for cause in named:
            several = ranked[len(COLOURS) - 1 :] if cause == OTHERS else [cause]
            counts = np.sum([by_cause[c] for c in several], axis=0)
            named[cause] = np.divide(counts, over, out=np.zeros(len(counts)), where=np.asarray(over) > 0)
        stacks.append(named)
    sums = [
        np.sum([*s.values()], axis=0) if s else np.zeros(len(r.series.due)) for s, r in zip(stacks, runs, strict=True)
    ]
    top = max(float(s.max(initial=0)) for s in sums) or 1.0
    plot = Plot(_time(runs), Axis.linear(0, top * 1.05, name, 4), height=220)
    _warm_up(plot, runs)
    if len(runs) == 1:
        (run,), (stack,), low = runs, stacks, np.zeros_like(sums[0])
        starts = (np.arange(len(low)) * run.bin_s).tolist()
        for (_, values), colour in zip(stack.items(), COLOURS, strict=False):
            plot.bars(starts, run.bin_s, low.tolist(), (low + values).tolist(), colour)
            low = low + values
        _tell(plot, run, ["\n".join(f"{c}: {shown(v[i])}" for c, v in stack.items() if v[i]) for i in range(len(low))])
        return plot.svg(name) + legend([(colour, cause) for cause, colour in zip(stack, COLOURS, strict=False)])
    for run, values, colour in zip(runs, sums, COLOURS, strict=False):
        plot.line(_middles(run), values.tolist(), colour)
    return plot.svg(name) + _names(runs)


# ------------------------------------------------------------------------------------------------ the stages


def waterfall(runs: Sequence[Run]) -> str:
    """A bar a stage from where the means before it end; a whisker to its p99, a tick at its p50."""
    order = [*(s for s in STAGES if s != "total"), REST, OUTSIDE]
    tall = ROW_HEIGHT if len(runs) == 1 else OF_TWO
    names = [s for s in order if any(s in run.stages for run in runs)]
    ends = [sum(stage.mean_ms for stage in run.stages.values()) for run in runs]
    reach = max([_start(run, s) + run.stages[s].p99_ms for run in runs for s in names if s in run.stages] or [1.0])
    top = min(reach, 3 * max(ends)) * 1.03  # a whisker may leave the picture; its number is written
    height = 34 + tall * len(names) + 44
    plot = Plot(
        Axis.linear(0, top, "ms since the request was due, means"),
        Axis(0, len(names), ""),
        height=height,
        left=128,
        right=170,
    )
    parts = []
    for row, name in enumerate(names):
        y = 30 + tall * row
        parts.append(
            f'<text class="strong" x="120" y="{y + tall / 2 + 2:.1f}" text-anchor="end">{NAMES.get(name, name)}</text>'
        )
        thick = (tall - 12) / len(runs)
        for place, (run, colour) in enumerate(zip(runs, COLOURS, strict=False)):
            if stage := run.stages.get(name):
                start, above = _start(run, name), y + 5 + place * thick
                parts.append(_bar(plot, start, stage.mean_ms, above, thick - 1, colour))
                parts.append(_whisker(plot, start + stage.p50_ms, start + stage.p99_ms, above + thick / 2))
                numbers = (stage.mean_ms, stage.p50_ms, stage.p99_ms)
                text = zip((WIDTH - 118, WIDTH - 62, WIDTH - 6), numbers, strict=True)
                at = above + thick / 2 + 4
                parts += [f'<text x="{a}" y="{at:.1f}" text-anchor="end">{shown(v)}</text>' for a, v in text]
    heads = zip((WIDTH - 118, WIDTH - 62, WIDTH - 6), ("mean", "p50", "p99"), strict=True)
    parts += [f'<text class="strong" x="{x}" y="16" text-anchor="end">{text}</text>' for x, text in heads]
    svg = plot.svg("Stages")
    return svg.replace("</svg>", "".join(parts) + "</svg>") + _names(runs)


def _start(run: Run, name: str) -> float:
    total = 0.0
    for stage, took in run.stages.items():
        if stage == name:
            break
        total += took.mean_ms
    return total


def _bar(plot: Plot, start: float, width: float, y: float, height: float, colour: str) -> str:
    left, right = plot.across(start), plot.across(start + width)
    box = f'x="{left:.1f}" y="{y:.1f}" width="{max(1.5, right - left):.1f}" height="{height:.1f}"'
    return f'<rect class="fill {colour}" {box} rx="1.5"/>'


def _whisker(plot: Plot, p50: float, p99: float, y: float) -> str:
    a, b = plot.across(p50), plot.across(p99)
    return f'<path class="axis" fill="none" d="M{a:.1f} {y - 4:.1f}v8m0 -4H{b:.1f}m0 -4v8"/>'


# --------------------------------------------------------------------------------------------------- common


def per_s(run: Run, counts: Sequence[int]) -> list[float]:
    return [n / run.bin_s for n in counts]


def _middles(run: Run) -> list[float]:
    return ((np.arange(len(run.series.due)) + 0.5) * run.bin_s).tolist()


def _time(runs: Sequence[Run]) -> Axis:
    return Axis.linear(0, max(len(run.series.due) * run.bin_s for run in runs), "seconds since the start", 8)


def _warm_up(plot: Plot, runs: Sequence[Run]) -> None:
    plot.span(0, max(run.warm_up_s for run in runs), "warm-up")


def _tell(plot: Plot, run: Run, texts: Sequence[str]) -> None:
    step = math.ceil(len(texts) / MOST_COLUMNS)
    for i in range(0, len(texts), step):
        plot.hit(i * run.bin_s, (i + step) * run.bin_s, f"{shown(i * run.bin_s)} s\n{texts[i]}".strip())


def _names(runs: Sequence[Run], also: str = "") -> str:
    """Which run has which colour; nothing for a single one."""
    if len(runs) == 1:
        return ""
    return legend([*zip(COLOURS, ("A", "B"), strict=False), *([("soft", also)] if also else [])])
