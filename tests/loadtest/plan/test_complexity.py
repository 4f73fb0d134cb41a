"""Exponents of stages are fitted each on what it depends on."""

import pytest

from loadtest.plan.complexity import CATALOGUES, HIDDEN, MODELS, WIDTHS, Point, fitted

WEIGHTS = {HIDDEN: 280_000, MODELS[0]: 98_000, MODELS[1]: 890_000}


def test_planted_powers_of_catalogue_width_and_model_are_found() -> None:
    worlds = [(n, WEIGHTS[HIDDEN]) for n in CATALOGUES] + [(CATALOGUES[0], WEIGHTS[m]) for m in MODELS]
    points = [
        Point(
            items=items,
            model=model,
            retrieve=max(2_000, width),
            rerank=width,
            retrieval=1e-6 * items**0.5 * max(2_000, width) ** 0.3,
            preranking=1e-7 * max(2_000, width),
            reranking=1e-11 * width * model**0.9,
        )
        for items, model in worlds
        for width in WIDTHS
    ]
    found = fitted(points)
    assert {size: e.value for size, e in found["retrieval"].items()} == pytest.approx({"items": 0.5, "width": 0.3})
    assert found["preranking"]["width"].value == pytest.approx(1.0)
    assert found["reranking"]["width"].value == pytest.approx(1.0)
    assert found["reranking"]["model"].value == pytest.approx(0.9)
    assert found["reranking"]["items"].value == pytest.approx(0.0, abs=1e-9)
