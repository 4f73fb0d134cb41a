"""How each stage's cost grows with catalogue, width, dimension, model and workers: powers, fitted on made-up worlds.

Worlds differ in one thing at a time. Each is served and asked one request at a time at several widths; the stages are
timed by the answers. An index of another size has search parameters of its own, found by its recall, so an exponent is
of the service at equal recall and not of a loop. Workers that share a request's re-ranking are timed with a paced
model, which waits and uses no CPU: there may be more of them than cores.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from loadtest import launch
from loadtest.lab import bodies
from loadtest.plan import bundles, draw, measure
from loadtest.plan.calibration import Calibration, Configuration
from loadtest.plan.costs import Exponent, power
from loadtest.plan.demand import COLUMNS, Single

HIDDEN = (512, 256, 128)
CATALOGUES = (50_000, 100_000, 200_000, 400_000)  # all of one kind of index, and made within a minute each
MODELS = ((256, 128, 64), (1024, 512, 256))  # a third and nearly three times the work of HIDDEN
DIMENSIONS = (0.5, 2.0)  # of embeddings, times the calibrated bundle's
WORKERS, WIDTHS, TIMES, REQUESTS = 2, (125, 250, 500, 4_000), 3, 25
PLAIN_WIDTH = 500  # at which the other sizes are drawn
SHARED_BY, PACED_ROW_MS, PACED_SLA_MS, PACED_REQUESTS = (1, 2, 4, 8), 1.0, 1_000, 8
PACED = "reranking, paced"  # workers share what would take one of them more than 0.3 of the SLA: 500 ms of a second


# What each stage's cost is fitted on: size → the field of a point that holds it.
SIZES_OF = {
    "retrieval": {"items": "items", "width": "retrieve", "dimension": "dimension"},
    "preranking": {"items": "items", "width": "retrieve", "dimension": "dimension"},
    "reranking": {"items": "items", "width": "rerank", "model": "model"},
}


@dataclass(frozen=True, slots=True)
class Point:
    """One world at one width, and seconds by stage. model: bytes; units: of its first layer."""

    items: int
    dimension: int
    units: int
    model: int
    retrieve: int
    rerank: int
    retrieval: float
    preranking: float
    reranking: float


def measured(
    calibration: Calibration, beside: Path, picture: Path, say: Callable[[str], None], *, is_quick: bool
) -> Calibration:
    """The calibration with exponents, which are drawn as well. Raises RuntimeError where a world can't be measured."""
    d, least = calibration.d, CATALOGUES[0]
    worlds = [(n, HIDDEN, d) for n in (CATALOGUES[:2] if is_quick else CATALOGUES)]
    worlds += [(least, hidden, d) for hidden in MODELS]
    worlds += [(least, HIDDEN, max(1, int(d * times))) for times in DIMENSIONS]
    points, shared = list[Point](), dict[int, float]()
    with bundles.folder_beside(beside) as folder:
        for items, hidden, dimension in worlds:
            say(f"a world of {items:,} items × {dimension}, a re-ranker {'-'.join(map(str, hidden))}")
            bundle = bundles.world(folder, items, hidden, dimension)
            sizes = items, dimension, hidden[0]
            points += _points(bundle, sizes, 5 if is_quick else REQUESTS)
        for workers in SHARED_BY[:3] if is_quick else SHARED_BY:
            say(f"{PLAIN_WIDTH} documents at {PACED_ROW_MS:g} ms each, workers: {workers}")
            shared[workers] = _shared(bundle, workers)
    found = fitted(points, shared)
    for stage, grown in found.items():
        say(f"{stage} grows with " + ", ".join(f"{size} ^ {exponent}" for size, exponent in grown.items()))
    picture.parent.mkdir(parents=True, exist_ok=True)
    said = f"{calibration.machine}, {calibration.date}; lines are the fitted powers, dashed the ends of their 90 %."
    table = "\n".join(
        f"{stage}: {', '.join(f'{size} {e}' for size, e in grown.items())}" for stage, grown in found.items()
    )
    picture.write_text(draw.page("How cost grows", said, _charts(points, shared, found), table))
    say(f"drawn in {picture}")
    return replace(calibration, exponents=found)


def fitted(points: Sequence[Point], shared: Mapping[int, float]) -> dict[str, dict[str, Exponent]]:
    """Exponents by stage and size. shared: seconds of the paced re-ranking by workers. Pure."""
    worlds = [(p.items, p.dimension, p.units) for p in points]

    def of(stage: str) -> dict[str, Exponent]:
        columns = {name: [float(getattr(p, field)) for p in points] for name, field in SIZES_OF[stage].items()}
        return power(columns, [getattr(p, stage) for p in points], [worlds.index(world) for world in worlds])

    paced = power({"workers": list(map(float, shared))}, list(shared.values()))
    return {stage: of(stage) for stage in SIZES_OF} | {PACED: paced}


def _charts(
    points: Sequence[Point], shared: Mapping[int, float], found: Mapping[str, Mapping[str, Exponent]]
) -> list[str]:
    """One a stage and size, of the points that differ from the first world in nothing else."""
    first, charts = points[0], []
    for stage, sizes in SIZES_OF.items():
        for size, field in sizes.items():
            alike = {"items": "items", "dimension": "dimension", "model": "units"}
            same = [name for of, name in alike.items() if of != size]
            near = [p for p in points if all(getattr(p, name) == getattr(first, name) for name in same)]
            near = [p for p in near if size == "width" or p.rerank == PLAIN_WIDTH]
            x, y = [float(getattr(p, field)) for p in near], [getattr(p, stage) for p in near]
            charts.append(draw.power_law(f"{stage} by {size}", size, x, y, found[stage][size]))
    x, y = list(map(float, shared)), list(shared.values())
    return [*charts, draw.power_law(f"{PACED}, by workers", "workers", x, y, found[PACED]["workers"])]


def _shared(bundle: Path, workers: int) -> float:
    """Median seconds of re-ranking, one request at a time, where each document takes its worker a millisecond."""
    paced = {"PACED_ROW_MS": f"{PACED_ROW_MS:g}", "SLA_MS": f"{PACED_SLA_MS:g}"}
    with launch.service(bundle, workers, log=measure.NO_LOG, **paced) as server:
        target = measure.aim(server, bodies.for_bundle(bundle, measure.POOL))
        took = measure.single(target, PLAIN_WIDTH, PACED_REQUESTS).took
    return float(np.median(took[:, COLUMNS.index("reranking")]))


def _points(bundle: Path, sizes: tuple[int, int, int], requests: int) -> list[Point]:
    made = bundles.manifest_of(bundle)["funnel"]["retrieve"]
    configuration = Configuration(made, 0, WORKERS, measure.UNHURRIED_S)
    runs: dict[int, list[Single]] = {}
    with measure.serve(bundle, configuration) as server:
        target = measure.aim(server, bodies.for_bundle(bundle, measure.POOL))
        measure.single(target, WIDTHS[0], requests)
        for _ in range(TIMES):
            for width in WIDTHS:
                runs.setdefault(width, []).append(measure.single(target, width, requests))
    at = {name: i for i, name in enumerate(COLUMNS)}
    model = (bundle / "re_ranker.onnx").stat().st_size

    def median(width: int, stage: str) -> float:
        return float(np.median([np.median(run.took[:, at[stage]]) for run in runs[width]]))

    items, dimension, units = sizes
    return [
        Point(
            items=items,
            dimension=dimension,
            units=units,
            model=model,
            retrieve=max(made, width),
            rerank=width,
            retrieval=median(width, "retrieval"),
            preranking=median(width, "preranking"),
            reranking=median(width, "reranking"),
        )
        for width in WIDTHS
    ]
