"""Losses are read from the bundle's table as the service reads them; the floor is kept as cheaply as can be."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.control import loss
from app.manifest import Manifest
from loadtest.plan import widths


@pytest.fixture
def manifest(bundle: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((bundle / "manifest.json").read_text())
    return found


def cost(retrieve: int, rerank: int) -> float:
    return 1.0 + retrieve / 100 + rerank / 10


@pytest.mark.parametrize(("retrieve", "rerank"), [(40, 32), (40, 16), (20, 16), (10, 5), (33, 7)])
def test_the_loss_of_widths_is_the_service_s_own(manifest: dict[str, Any], retrieve: int, rerank: int) -> None:
    table = Manifest.model_validate_json(json.dumps(manifest)).loss
    assert table
    missing = loss.missing_shares(table.edges, np.arange(manifest["funnel"]["rerank"]) >= rerank)
    expected = loss.loss_of_shares(table, retrieve / manifest["funnel"]["retrieve"], 1.0, missing.tolist())
    assert widths.expected_loss(manifest, retrieve, rerank) == pytest.approx(expected)


def test_the_full_widths_lose_what_the_table_s_end_says(manifest: dict[str, Any]) -> None:
    funnel = manifest["funnel"]
    assert widths.expected_loss(manifest, funnel["retrieve"], funnel["rerank"]) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("floor", [0.5, 0.8, 0.95])
def test_the_cheapest_widths_keep_the_floor_and_nothing_tried_is_cheaper(
    manifest: dict[str, Any], floor: float
) -> None:
    chosen = widths.cheapest(manifest, floor, cost)
    assert 1 - chosen.loss >= floor
    cheaper = [c for c in widths.choices(manifest, cost) if c.cpu_s < chosen.cpu_s]
    assert all(1 - c.loss < floor for c in cheaper)


def test_a_lower_floor_is_never_dearer(manifest: dict[str, Any]) -> None:
    costs = [widths.cheapest(manifest, floor, cost).cpu_s for floor in (0.999, 0.9, 0.7, 0.3)]
    assert costs == sorted(costs, reverse=True)


def test_a_bundle_without_a_table_of_losses_says_so(manifest: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no table of losses"):
        widths.expected_loss(manifest | {"loss": None}, 20, 10)
