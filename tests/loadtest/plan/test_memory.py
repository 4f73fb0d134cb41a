"""Formulas against FAISS's own bytes, and the rules of the offline half."""

from pathlib import Path

import faiss
import numpy as np
import pytest

from loadtest.plan import memory
from models import index
from tests.loadtest.plan.made import CALIBRATION

N, D = 4_000, 32


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf_sq8", "ivf_sq4", "ivf_pq"])
def test_an_index_has_the_bytes_of_the_formula(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "TRAIN_POINTS", 8)  # enough for bytes, if not for recall
    monkeypatch.setattr(index, "HNSW_BUILD", 8)
    rows = np.random.default_rng(0).standard_normal((N, D)).astype(np.float32)
    built = index._filled(kind, rows)  # type: ignore[arg-type]
    size = len(faiss.serialize_index(built))
    assert memory.index_bytes(kind, N, D) == pytest.approx(size, rel=0.06)


@pytest.mark.parametrize("items", [20_000, 20_001, 1_000_000, 1_000_001, 20_000_000, 20_000_001, 10**8])
@pytest.mark.parametrize("width", [500, 501])
def test_the_kind_is_the_one_that_packing_begins_with(items: int, width: int) -> None:
    assert memory.kind_for(items, width) == index.kind_for(items, width)


def test_a_million_items_of_w1_take_what_is_in_its_files() -> None:
    assert memory.index_bytes("ivf_sq8", 1_000_000, 64) == 72 * 1_000_000 + 4 * 64 * 4_096


def test_tables_come_from_the_manifest_and_grow_by_the_item(bundle: Path) -> None:
    found = memory.tables(bundle)
    items = sum(f.stat().st_size for f in (bundle / "items").iterdir())
    assert found.an_item == pytest.approx(items / 50)
    others = sum(f.stat().st_size for f in bundle.rglob("*") if f.is_file()) - items
    others -= sum((bundle / name).stat().st_size for name in ("manifest.json", "index.faiss"))
    assert found.fixed == others


def test_a_machine_holds_files_once_and_each_process_its_own() -> None:
    of = memory.Tables(an_item=100.0, fixed=1_000.0)
    two, three = (memory.machine_bytes(CALIBRATION, of, 10**6, "ivf_sq8", workers) for workers in (2, 3))
    assert three - two == CALIBRATION.memory.worker_private
    files = memory.index_bytes("ivf_sq8", 10**6, 64) + 100 * 10**6 + 1_000
    assert two == files + CALIBRATION.memory.main_private + 3 * CALIBRATION.memory.worker_private
