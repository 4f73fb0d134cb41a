"""The cheapest widths that keep a quality floor, by the bundle's own table of measured losses. Pure.

A loss is expected NDCG@k lost against the full funnel at the bundle's widths. `pack` measured it by the share of
retrieval's width that was searched, and by what re-ranking missed of the order it received (docs/bundle.md, `loss`);
narrower widths are such shares. A search that the service narrows looks in fewer lists of an inverted file, a bundle
made for the narrower width in all: it loses less than this says, by .009 where .3 of W1's width is retrieved.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

SHARES = (1.0, 0.85, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.07, 0.05)


@dataclass(frozen=True, slots=True)
class Choice:
    """Widths, what they are expected to lose, and what a request costs at them (CPU seconds)."""

    retrieve: int
    rerank: int
    loss: float
    cpu_s: float


def expected_loss(manifest: dict[str, Any], retrieve: int, rerank: int) -> float:
    """Of NDCG@k, at these widths instead of the manifest's. Raises ValueError for a bundle without the table."""
    table, full = manifest.get("loss"), manifest["funnel"]
    if not table:
        raise ValueError("the bundle has no table of losses: pack it again, or name the bundle that was packed")
    edges = np.asarray(table["edges"])
    first, last = edges[:-1], np.minimum(edges[1:], full["rerank"])
    missing = np.clip(last - np.maximum(first, rerank), 0, None) / np.diff(edges)
    family = table["retrieval"]
    losses = [np.interp(np.dot(c["weights"], missing), c["x"], c["y"]) for c in family["curves"]]
    share, shares = min(1.0, retrieve / full["retrieve"]), family["shares"]
    return float(np.interp(np.sqrt(share), np.sqrt(shares), losses))


def choices(manifest: dict[str, Any], cpu_s: Any) -> Iterator[Choice]:
    """All widths that are tried. cpu_s: (retrieve, rerank) → CPU seconds of a request."""
    full = manifest["funnel"]
    for of_retrieve in SHARES:
        for of_rerank in SHARES:
            retrieve, rerank = round(of_retrieve * full["retrieve"]), round(of_rerank * full["rerank"])
            if full["k"] <= rerank <= retrieve:
                yield Choice(retrieve, rerank, expected_loss(manifest, retrieve, rerank), cpu_s(retrieve, rerank))


def cheapest(manifest: dict[str, Any], floor: float, cpu_s: Any) -> Choice:
    """That keeps at least `floor` of NDCG@k. The full widths always do: they lose nothing."""
    kept = [choice for choice in choices(manifest, cpu_s) if 1 - choice.loss >= floor]
    full = manifest["funnel"]
    whole = Choice(full["retrieve"], full["rerank"], 0.0, cpu_s(full["retrieve"], full["rerank"]))
    return min([*kept, whole], key=lambda choice: (choice.cpu_s, choice.loss))
