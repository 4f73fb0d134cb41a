"""How each stage's cost grows with catalogue, width and model: powers, fitted on made-up worlds of several sizes.

Worlds differ in one thing at a time. Each is served and asked one request at a time at several widths; the stages are
timed by the answers. An index of another size has search parameters of its own, found by its recall, so an exponent is
of the service at equal recall and not of a loop.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from loadtest.lab import bodies
from loadtest.plan import bundles, measure
from loadtest.plan.calibration import Calibration, Configuration
from loadtest.plan.costs import Exponent, power
from loadtest.plan.demand import COLUMNS, Single
from loadtest.plan.speed import Probe, probing

HIDDEN = (512, 256, 128)
CATALOGUES = (50_000, 100_000, 200_000, 400_000)  # all of one kind of index, and made within a minute each
MODELS = ((256, 128, 64), (1024, 512, 256))  # a third and nearly three times the work of HIDDEN
WORKERS, WIDTHS, TIMES, REQUESTS = 2, (125, 250, 500, 4_000), 3, 25


@dataclass(frozen=True, slots=True)
class Point:
    """One world at one width: sizes, and seconds by stage at the reference speed."""

    items: int
    model: int
    retrieve: int
    rerank: int
    retrieval: float
    preranking: float
    reranking: float


def measured(calibration: Calibration, beside: Path, say: Callable[[str], None], *, is_quick: bool) -> Calibration:
    """The calibration with exponents. Raises RuntimeError when a world can't be made or measured."""
    worlds = [(n, HIDDEN) for n in (CATALOGUES[:2] if is_quick else CATALOGUES)]
    worlds += [(CATALOGUES[0], hidden) for hidden in MODELS]
    points = []
    with bundles.folder_beside(beside) as folder, probing() as probe:
        for items, hidden in worlds:
            say(f"a world of {items:,} items, a re-ranker {'-'.join(map(str, hidden))}")
            bundle = bundles.world(folder, items, hidden, calibration.d)
            points += _points(bundle, items, probe, calibration.speed_s, 5 if is_quick else REQUESTS)
    found = fitted(points)
    for stage, sizes in found.items():
        say(f"{stage} grows with " + ", ".join(f"{size} ^ {exponent}" for size, exponent in sizes.items()))
    return replace(calibration, exponents=found)


def fitted(points: Sequence[Point]) -> dict[str, dict[str, Exponent]]:
    """Exponents by stage and size. Pure."""

    def of(stage: str, **sizes: str) -> dict[str, Exponent]:
        columns = {name: [float(getattr(p, field)) for p in points] for name, field in sizes.items()}
        worlds = [(p.items, p.model) for p in points]
        return power(columns, [getattr(p, stage) for p in points], [worlds.index(world) for world in worlds])

    return {
        "retrieval": of("retrieval", items="items", width="retrieve"),
        "preranking": of("preranking", items="items", width="retrieve"),
        "reranking": of("reranking", items="items", width="rerank", model="model"),
    }


def _points(bundle: Path, items: int, probe: Probe, speed_s: float, requests: int) -> list[Point]:
    made = bundles.manifest_of(bundle)["funnel"]["retrieve"]
    configuration = Configuration(made, 0, WORKERS, measure.UNHURRIED_S)
    runs: dict[int, list[Single]] = {}
    with measure.serve(bundle, configuration) as server:
        target = measure.aim(server, bodies.for_bundle(bundle, measure.POOL), probe)
        measure.single(target, WIDTHS[0], requests)
        for _ in range(TIMES):
            for width in WIDTHS:
                before, run = probe(), measure.single(target, width, requests)
                runs.setdefault(width, []).append(run.scaled(speed_s / ((before + probe()) / 2)))
    at = {name: i for i, name in enumerate(COLUMNS)}
    model = (bundle / "re_ranker.onnx").stat().st_size

    def median(width: int, stage: str) -> float:
        return float(np.median([np.median(run.took[:, at[stage]]) for run in runs[width]]))

    return [
        Point(
            items=items,
            model=model,
            retrieve=max(made, width),
            rerank=width,
            retrieval=median(width, "retrieval"),
            preranking=median(width, "preranking"),
            reranking=median(width, "reranking"),
        )
        for width in WIDTHS
    ]
