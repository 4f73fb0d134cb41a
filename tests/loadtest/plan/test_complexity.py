"""Exponents of stages are fitted each on what it depends on; and drawn."""

import pytest

from loadtest.plan import complexity
from loadtest.plan.complexity import CATALOGUES, HIDDEN, MODELS, PACED, SHARED_BY, WIDTHS, Point, fitted

# First layer's units and dimension → bytes of the model.
MODEL = {(HIDDEN[0], 64): 280_000, (MODELS[0][0], 64): 98_000, (MODELS[1][0], 64): 890_000}
MODEL |= {(HIDDEN[0], 32): 230_000, (HIDDEN[0], 128): 380_000}


def planted() -> tuple[list[Point], dict[int, float]]:
    worlds = [(n, HIDDEN[0], 64) for n in CATALOGUES] + [(CATALOGUES[0], *world) for world in list(MODEL)[1:]]
    points = [
        Point(
            items=items,
            dimension=dimension,
            units=units,
            model=MODEL[units, dimension],
            retrieve=max(2_000, width),
            rerank=width,
            retrieval=1e-6 * items**0.5 * max(2_000, width) ** 0.3 * dimension**0.8,
            preranking=1e-7 * max(2_000, width),
            reranking=1e-11 * width * MODEL[units, dimension] ** 0.9,
        )
        for items, units, dimension in worlds
        for width in WIDTHS
    ]
    return points, {workers: 0.5 / workers for workers in SHARED_BY}


def test_planted_powers_of_every_size_are_found() -> None:
    found = fitted(*planted())
    expected = {"items": 0.5, "width": 0.3, "dimension": 0.8}
    assert {size: e.value for size, e in found["retrieval"].items()} == pytest.approx(expected)
    assert found["preranking"]["width"].value == pytest.approx(1.0)
    assert found["preranking"]["dimension"].value == pytest.approx(0.0, abs=1e-9)
    assert found["reranking"]["width"].value == pytest.approx(1.0)
    assert found["reranking"]["model"].value == pytest.approx(0.9)
    assert found["reranking"]["items"].value == pytest.approx(0.0, abs=1e-9)
    assert found[PACED]["workers"].value == pytest.approx(-1.0)


def test_each_power_is_drawn_over_the_points_that_differ_in_nothing_else() -> None:
    points, shared = planted()
    charts = dict(zip(range(10), complexity._charts(points, shared, fitted(points, shared)), strict=True))
    n_dots = [chart.count("<circle") for chart in charts.values()]
    of_searching = [len(CATALOGUES), len(WIDTHS), 3]  # by items, by width, by dimension
    assert n_dots == [*of_searching, *of_searching, len(CATALOGUES), len(WIDTHS), 3, len(SHARED_BY)]
    assert "reranking by model: to the power 0.90" in charts[8]
