"""`plan --what-if PARAM=A..B`: one parameter varied, as a table and as a picture. What is asked is command.py's."""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from loadtest.plan import draw

POINTS, FEW = 9, 12  # of a what-if; so many whole numbers are all tried
# What --what-if may vary → whether it is a whole number
VARIED = {
    "qps": False, "p99": False, "items": True, "cores": True, "workers": True, "retrieve": True, "rerank": True,
    "shards": True, "documents": True, "doc-ms": False,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Varied:
    name: str
    values: tuple[float, ...]


def varied(text: str) -> Varied:
    """PARAM=A..B as up to nine values, evenly spread in ratio, or up to FEW whole ones. Raises ArgumentTypeError."""
    name, _, span = text.partition("=")
    low, _, high = span.partition("..")
    if name not in VARIED:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(VARIED)}")
    try:
        first, last = float(low.removesuffix("ms")), float(high.removesuffix("ms"))
    except ValueError as e:
        raise argparse.ArgumentTypeError(f"{span!r} is no range A..B") from e
    if not 0 < first < last:
        raise argparse.ArgumentTypeError(f"{span!r}: allowed is 0 < A < B")
    if VARIED[name] and (first != int(first) or last != int(last)):
        raise argparse.ArgumentTypeError(f"{span!r}: {name} is a whole number")
    if VARIED[name] and last - first < FEW:
        return Varied(name, tuple(range(int(first), int(last) + 1)))
    values = np.geomspace(first, last, POINTS)
    return Varied(name, tuple(sorted({round(v) for v in values}) if VARIED[name] else values.tolist()))


def what_if(
    parsed: argparse.Namespace,
    vary: Callable[[str, float], Any],
    columns: Callable[[Any], dict[str, float]],
    drawn: list[tuple[str, tuple[tuple[str, str, str], ...], float | None]],
    fixed: str,
) -> int:
    """Print the table and draw it. Returns the exit code.

    vary: what is asked, with the parameter at a value. columns: what is told of it. drawn: title, curves, level.
    fixed: what else is asked, in words.
    """
    name, x = parsed.what_if.name, parsed.what_if.values
    rows = [columns(vary(name, value)) for value in x]
    heads = list({name: None} | dict.fromkeys(rows[0]))
    cells = [{name: at} | row for at, row in zip(x, rows, strict=True)]
    table = [heads, *([_told(row[head]) for head in heads] for row in cells)]
    spaces = [max(len(line[i]) for line in table) for i in range(len(heads))]
    text = "\n".join("  ".join(cell.rjust(space) for cell, space in zip(line, spaces, strict=True)) for line in table)
    print(f"{fixed}; {name} varies\n\n{text}")

    def column(which: str) -> list[float]:
        return [row[which] for row in rows] if which else []

    charts = []
    for title, curves, level in drawn:
        made = [draw.Curve(c, column(c), column(low), column(high)) for c, low, high in curves]
        own = level if name != "p99" else None  # a level that is varied is no level
        charts.append(draw.chart(title, name, x, made, own))
    parsed.out.parent.mkdir(parents=True, exist_ok=True)
    asked = f"python -m loadtest plan --what-if {name}={x[0]:g}..{x[-1]:g}"
    said = f"{fixed}: {asked}, by simulation; docs/capacity.md says how."
    parsed.out.write_text(draw.page(f"What if: {name}", said, charts, text))
    print(f"\ndrawn in {parsed.out}")
    return 0


def _told(value: float) -> str:
    return f"{value:,.4g}" if math.isfinite(value) else "none" if math.isnan(value) else "endless"
