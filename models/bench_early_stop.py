"""python -m models.bench_early_stop BUNDLE --requests FILE: what stopping early would save, and what it would lose.

Re-ranking takes candidates best first by their pre-rank score, in slices. After each slice the k-th best score so far
is known; who can't reach it any more needn't be scored:

    f(pre-rank score) + margin < k-th best so far        f: the bundle's calibration; both in logits

Candidates come in falling order, so this is a place where to stop. The margin is chosen on every other request, as the
smallest whose loss of NDCG@k is within MOST_LOST, and judged on the rest; an item is worth its place in the full order,
as in the bundle's table of losses. The service doesn't stop early: docs/performance.md has the figures, and why.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from app.bundle import Generation, load
from app.flow import best_first
from models import evaluate
from models.metrics import ndcg_loss, place_gains

Floats = NDArray[np.float64]

MOST_LOST = 0.001
SLICES = 4  # of the width: each more costs a run of the graph
MARGINS = np.linspace(-4, 8, 97)
REQUESTS = 400
EDGE = 1e-6  # of a probability, before its logit


@dataclass(frozen=True, slots=True)
class Kept:
    """What reached re-ranking for one request, best first: f of the pre-rank score, and the score; logits f64[n]."""

    expected: Floats
    scores: Floats


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code, 0."""
    parser = argparse.ArgumentParser(prog="python -m models.bench_early_stop", description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--requests", type=Path, required=True, help="a request of POST /v1/rank a line")
    parsed = parser.parse_args(arguments)
    generation = load(parsed.bundle)
    kept = list(read(generation, evaluate.read_requests(parsed.requests)[:REQUESTS]))
    k, step = generation.manifest.funnel.k, max(1, generation.manifest.funnel.rerank // SLICES)
    fitted, judged = kept[::2], kept[1::2]
    margin = next((m for m in MARGINS if mean(fitted, m, k, step)[1] <= MOST_LOST), MARGINS[-1])
    print("| margin | share not scored | loss of NDCG@k |\n|---|---|---|")
    for one in sorted({*MARGINS[::16].tolist(), float(margin)}):
        saved, lost = mean(judged, one, k, step)
        print(f"| {one:.2f}{' (chosen)' if one == margin else ''} | {saved:.3f} | {lost:.5f} |")
    saved, lost = mean(judged, margin, k, step)
    said = {"bench": "early_stop", "bundle": parsed.bundle.name, "margin": float(margin), "saved": saved, "lost": lost}
    print(json.dumps(said | {"requests": len(judged), "k": k, "slices": SLICES}))
    return 0


def read(generation: Generation, requests: Sequence[evaluate.Request]) -> list[Kept]:
    """Requests of which more than k candidates reach re-ranking."""
    found, queries = [], evaluate.resolve(generation, requests)
    for query, coarse in evaluate.prerank(generation, queries):
        top = coarse.top(generation.manifest.funnel.rerank)
        if len(top) > generation.manifest.funnel.k:
            expected = generation.manifest.calibration.preranking(top.scores)
            scores = evaluate.re_rank(generation, query, top.candidates)
            found.append(Kept(logits(expected), logits(scores)))
    return found


def logits(p: NDArray[np.float32]) -> Floats:
    clipped = np.clip(p.astype(np.float64), EDGE, 1 - EDGE)
    return np.asarray(np.log(clipped / (1 - clipped)))


def mean(kept: Sequence[Kept], margin: float, k: int, step: int) -> tuple[float, float]:
    """Share of the candidates that isn't scored, and the loss of NDCG@k; over these requests."""
    of_all = [stopped(one, margin, k, step) for one in kept]
    return float(np.mean([saved for saved, _ in of_all])), float(np.mean([lost for _, lost in of_all]))


def stopped(one: Kept, margin: float, k: int, step: int) -> tuple[float, float]:
    """Of one request."""
    n, done, end = len(one.scores), 0, len(one.scores)
    while done < end:
        done = min(end, done + step)
        if done >= k:
            least = np.partition(one.scores[:done], -k)[-k]
            hopeless = np.flatnonzero(one.expected[done:end] + margin < least)
            end = done + int(hopeless[0]) if len(hopeless) else end
    rows = np.arange(n)
    full = best_first(one.scores.astype(np.float32), rows, k)[:k]
    gain = np.zeros(n)
    gain[full] = place_gains(len(full))
    shown = best_first(one.scores[:done].astype(np.float32), rows[:done], k)[:k]
    return 1 - done / n, float(ndcg_loss(gain[shown], place_gains(len(full))))


if __name__ == "__main__":
    sys.exit(main())
