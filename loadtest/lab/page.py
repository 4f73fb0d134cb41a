"""The report of a run, and of two together: one HTML file that needs nothing else, in the reader's light or dark.

First what came of it, in words and numbers that can be read from across the room; then the pictures; then what ran.
Pictures are plots.py's. Everything that came over the wire is escaped.
"""

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

from loadtest.drawing import STYLE, legend, shown
from loadtest.lab import plots
from loadtest.lab.difference import Difference
from loadtest.lab.run import LEAST_ANSWERED, Run

LOAD = ("arrivals", "machine")
NOTHING = 1e-9  # differences under it are those of rounding
PAGE_STYLE = """
*{box-sizing:border-box}body{margin:0;background:var(--ground);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1280px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:24px;line-height:1.25;margin:6px 0 8px;font-weight:650}
h2{font-size:16px;margin:0;font-weight:650}p{margin:0}.soft{color:var(--soft)}
.badge{display:inline-block;padding:3px 12px;border-radius:99px;color:var(--card);font-weight:650;font-size:13px}
.badge.good{background:var(--good)}.badge.bad{background:var(--bad)}.badge.warn{background:var(--warn)}
.tiles{display:flex;flex-wrap:wrap;gap:1px;margin:20px 0 22px;
background:var(--edge);border:1px solid var(--edge);border-radius:10px;overflow:hidden}
.tile{background:var(--card);padding:12px 16px;flex:1 1 210px}
.tile b{display:block;font-size:24px;line-height:1.25;font-weight:650;font-variant-numeric:tabular-nums;
white-space:nowrap}.tile b small{font-size:14px;font-weight:500}
.tile.bad b{color:var(--bad)}.tile span{font-size:13px;color:var(--soft)}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,500px),1fr));gap:18px;align-items:start}
section{background:var(--card);border:1px solid var(--edge);border-radius:10px;padding:16px 18px 12px;min-width:0}
section>p.soft{font-size:13px;margin:2px 0 10px}.wide{margin-top:18px}
.legend{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:13px;color:var(--soft);margin-top:8px}
.key{display:inline-block;width:12px;height:12px;border-radius:3px;margin-right:6px;vertical-align:-1px}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:14px;margin-top:6px}
th,td{text-align:left;padding:5px 14px 5px 0;border-top:1px solid var(--grid);vertical-align:top;overflow-wrap:anywhere}
th{font-weight:500;color:var(--soft);white-space:nowrap}thead th{border-top:0}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
tr.differs td{background:var(--wash)}.none{padding:26px 0;color:var(--soft);text-align:center}
.why{border-left:3px solid var(--bad);padding:4px 0 4px 12px;margin-top:12px}
"""


# -------------------------------------------------------------------------------------------------- one run


def report(run: Run) -> str:
    """The whole document."""
    badge, colour = verdict(run)
    f = run.figures
    head = (
        f'<span class="badge {colour}">{badge}</span><h1>{_safe(headline(run))}</h1>'
        f'<p class="soft">{_safe(" · ".join(_said(run, "generation", "service", "date")))}</p>'
    )
    why = "".join(
        f'<p class="why">{_safe(reason)}: these figures say nothing about the service.</p>' for reason in run.invalid
    )
    body = head + why + tiles(run) + '<div class="plots">' + "".join(_sections([run])) + "</div>"
    body += _wide("What ran", "", _setup([run]))
    return _document(f"{shown(f.rate_due)}/s, p99 {shown(f.p99_ms)} ms", body)


def verdict(run: Run) -> tuple[str, str]:
    """What the badge says, and its colour."""
    f = run.figures
    if run.invalid:
        return "Invalid run", "bad"
    if not f.p99_ms <= run.sla_ms:
        return "Over the SLA", "bad"
    if f.answered < LEAST_ANSWERED * f.requests:
        return "Requests failed", "bad"
    return ("Within the SLA, degraded", "warn") if f.degraded > 0.01 else ("Within the SLA", "good")


def headline(run: Run) -> str:
    f = run.figures
    if not f.answered:
        return f"None of {f.requests:,} requests was answered"
    return (
        f"At {shown(f.rate_due)} requests a second, half were answered within {shown(f.p50_ms)}\u00a0ms "
        f"and 99\u00a0% within {shown(f.p99_ms)}\u00a0ms"
    )


def tiles(run: Run) -> str:
    f, g = run.figures, run.generator
    slow = not f.p99_ms <= run.sla_ms
    late = any("late" in why for why in run.invalid)
    busy = any("busy" in why for why in run.invalid)
    stolen = f"; a hypervisor took {_percent(g.stolen)} % of the cores" if math.isfinite(g.stolen) else ""
    server = f", service {shown(f.server_cpu_ms)} ms a request" if math.isfinite(f.server_cpu_ms) else ""
    made = (
        (f"{shown(f.rate_due)}", "/s", f"due; {shown(f.rate_answered)}/s answered", False),
        (shown(f.p50_ms), "ms", "p50", False),
        (shown(f.p99_ms), "ms", f"p99; SLA {shown(run.sla_ms)} ms", slow),
        (shown(f.p999_ms), "ms", f"p99.9; slowest {shown(f.max_ms)} ms", False),
        (_percent(f.within_sla), "%", "answered within the SLA", False),
        (f"{f.requests - f.answered:,}", "", f"failed of {f.requests:,}", f.answered < LEAST_ANSWERED * f.requests),
        (_fixed(f.coverage), "", f"mean coverage; {_percent(f.degraded)} % degraded", False),
        (shown(g.late_p99_ms), "ms", f"the generator's own p99 lateness; longest {shown(g.late_max_ms)}", late),
        (f"{g.cpu:.2f}", "cores", f"the generator's CPU{server}{stolen}", busy),
    )
    return '<div class="tiles">' + "".join(_tile(*one) for one in made) + "</div>"


def _tile(value: str, unit: str, what: str, is_bad: bool) -> str:
    small = f" <small>{unit}</small>" if unit else ""
    return f'<div class="tile{" bad" if is_bad else ""}"><b>{value}{small}</b><span>{_safe(what)}</span></div>'


# ------------------------------------------------------------------------------------------------- two runs


def comparison(a: Run, b: Run, names: tuple[str, str], differences: Sequence[Difference]) -> str:
    """The whole document: b against a."""
    runs = (a, b)
    p99 = next(d for d in differences if d.name == "p99 ms")
    said = ("B is faster" if p99.gap < 0 else "B is slower") if p99.is_clear else "no clear difference"
    if a.invalid or b.invalid:
        said = "an invalid run says nothing"
    elif others := unlike(a, b):
        said += f", but they differ in {', '.join(others)}"
    head = f"<h1>p99 {shown(a.figures.p99_ms)} ms against {shown(b.figures.p99_ms)} ms: {said}</h1>" + legend(
        (("a", f"A: {names[0]}"), ("b", f"B: {names[1]}"))
    )
    for name, run in zip("AB", runs, strict=True):
        head += "".join(f'<p class="why">{name} is invalid: {_safe(why)}</p>' for why in run.invalid)
    if a.sla_ms != b.sla_ms:
        head += f'<p class="why">A was judged by {shown(a.sla_ms)} ms, B by {shown(b.sla_ms)} ms; the line is A\'s.</p>'
    note = "Intervals are 95 %, by bootstrap over the bins of time of each run; shaded where 0 is outside."
    body = head + _wide("Differences", note, _differences(differences))
    body += '<div class="plots wide">' + "".join(_sections(runs)) + "</div>"
    body += _wide("What ran", "Shaded where they differ.", _setup(runs))
    return _document(f"{names[0]} and {names[1]}", body)


def unlike(a: Run, b: Run) -> list[str]:
    """What must be the same for a difference to be the service's, and isn't."""
    return [name for name in LOAD if a.setup.get(name) != b.setup.get(name)]


def _differences(differences: Sequence[Difference]) -> str:
    rows = []
    for d in differences:
        interval = f"{_signed(d.low)} to {_signed(d.high)}" if d.has_interval else ""
        cells = (shown(d.a), shown(d.b), _signed(d.gap), _of(d.gap, d.a), interval)
        rows.append(
            f"<tr{' class=differs' if d.is_clear else ''}><td>{_safe(d.name)}</td>"
            + "".join(f'<td class="n">{c}</td>' for c in cells)
            + "</tr>"
        )
    heads = "".join(f'<th class="n">{h}</th>' for h in ("A", "B", "B − A", "of A", "95 % interval of B − A"))
    return f'<div class="scroll"><table><thead><tr><th></th>{heads}</tr></thead>{"".join(rows)}</table></div>'


# --------------------------------------------------------------------------------------------------- common


def _sections(runs: Sequence[Run]) -> Iterable[str]:
    bins = ", ".join(dict.fromkeys(f"{run.bin_s:g} s" for run in runs))
    yield _section(
        "Latency by percentile",
        "From the instant a request was due. Each nine has the same room.",
        plots.percentiles(runs),
    )
    yield _section("Latency over time", f"By when requests were due, in bins of {bins}.", plots.latency(runs))
    yield _section("Rate sent and answered", "What was due, what left, what came back.", plots.rates(runs))
    stages = plots.waterfall(runs) if any(run.stages for run in runs) else _none("The answers name no stages.")
    yield _section("Stage waterfall", "Bars are means, whiskers go from each stage's p50 to its p99.", stages)
    yield _section(
        "Degradations and coverage over time",
        "Coverage is the share of the wanted width that the deep model scored. An answer may have several causes.",
        _coverage(runs),
    )
    has_errors = any(run.series.errors for run in runs)
    yield _section(
        "Errors by cause",
        "Requests without a 200, by when they ended.",
        plots.errors(runs) + _by_cause(runs, "errors", "requests")
        if has_errors
        else _none("Every request was answered."),
    )


def _coverage(runs: Sequence[Run]) -> str:
    if not any(run.figures.answered for run in runs):
        return _none("Nothing was answered.")
    if not any(run.series.degraded for run in runs):
        return plots.coverage(runs) + _none("No answer was degraded.")
    return plots.coverage(runs) + plots.degradations(runs) + _by_cause(runs, "degraded", "answers")


def _by_cause(runs: Sequence[Run], which: str, what: str) -> str:
    """Counts by cause, of whole runs."""
    counts = [{cause: sum(n) for cause, n in getattr(run.series, which).items()} for run in runs]
    heads = [what] if len(runs) == 1 else [f"{what}, {name}" for name in "AB"]
    said = {cause: text for run in runs for cause, text in run.problems.items()} if which == "errors" else {}
    rows = []
    for cause in dict.fromkeys(cause for of_run in counts for cause in of_run):
        text = f'<br><span class="soft">first: {_safe(said[cause])}</span>' if cause in said else ""
        cells = "".join(f'<td class="n">{of_run.get(cause, 0):,}</td>' for of_run in counts)
        rows.append(f"<tr><td>{_safe(cause)}{text}</td>{cells}</tr>")
    head = "".join(f'<th class="n">{h}</th>' for h in heads)
    return f"<table><thead><tr><th>cause</th>{head}</tr></thead>{''.join(rows)}</table>"


def _setup(runs: Sequence[Run]) -> str:
    rows = []
    for name in dict.fromkeys(name for run in runs for name in run.setup):
        if all(run.setup.get(name) in (None, "", [], {}) for run in runs):
            continue
        values = [_value(run.setup.get(name)) for run in runs]
        differs = ' class="differs"' if len(set(values)) > 1 else ""
        rows.append(f"<tr{differs}><th>{_safe(name)}</th>" + "".join(f"<td>{_safe(v)}</td>" for v in values) + "</tr>")
    head = "<thead><tr><th></th><th>A</th><th>B</th></tr></thead>" if len(runs) > 1 else ""
    return f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>'


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value)) or "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    return "unknown" if value in (None, "") else str(value)


def _said(run: Run, *names: str) -> list[str]:
    return [_value(run.setup[name]) for name in names if run.setup.get(name)]


def _section(title: str, what: str, inside: str) -> str:
    return f'<section><h2>{title}</h2><p class="soft">{_safe(what)}</p>{inside}</section>'


def _wide(title: str, what: str, inside: str) -> str:
    return f'<section class="wide"><h2>{title}</h2><p class="soft">{_safe(what)}</p>{inside}</section>'


def _none(text: str) -> str:
    return f'<p class="none">{text}</p>'


def _document(title: str, body: str) -> str:
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Winnow: {_safe(title)}</title><style>{STYLE}{PAGE_STYLE}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def _percent(share: float) -> str:
    """Not rounded up to 100."""
    return "–" if not math.isfinite(share) else f"{math.floor(share * 1e4) / 100:.4g}"


def _fixed(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "–"


def _of(gap: float, whole: float) -> str:
    return f"{_signed(gap / whole * 100)} %" if whole and math.isfinite(gap / whole) else ""


def _signed(value: float) -> str:
    value = 0.0 if abs(value) < NOTHING else value
    return f"{'+' if value > 0 else ''}{shown(value)}"


def _safe(text: str) -> str:
    return html.escape(text)
