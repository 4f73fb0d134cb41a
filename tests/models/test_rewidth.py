"""The same bundle at other widths: served as any other, files shared, refusals in one sentence."""

import json
from pathlib import Path

import pytest

from app.bundle import load
from models.__main__ import main
from tests import world


def rewidth(bundle: Path, out: Path, retrieve: int, rerank: int) -> int:
    widths = ["--retrieve", str(retrieve), "--rerank", str(rerank)]
    return main(["rewidth", str(bundle), "--out", str(out), *widths])


def test_a_bundle_at_other_widths_passes_the_check_and_shares_its_files(bundle: Path, tmp_path: Path) -> None:
    assert rewidth(bundle, tmp_path / "narrow", 20, 10) == 0
    narrow = load(tmp_path / "narrow")
    assert (narrow.manifest.funnel.retrieve, narrow.manifest.funnel.rerank) == (20, 10)
    assert narrow.manifest.funnel.k == world.K
    assert narrow.manifest.loss is None
    assert len(narrow.manifest.golden) == len(load(bundle).manifest.golden)
    assert (tmp_path / "narrow/index.faiss").read_bytes() == (bundle / "index.faiss").read_bytes()


def test_the_bundle_it_came_from_is_as_it_was(bundle: Path, tmp_path: Path) -> None:
    before = (bundle / "manifest.json").read_bytes()
    assert rewidth(bundle, tmp_path / "narrow", 20, 10) == 0
    assert (bundle / "manifest.json").read_bytes() == before
    assert json.loads((tmp_path / "narrow/manifest.json").read_text())["funnel"]["retrieve"] == 20


@pytest.mark.parametrize("widths", [(10, 20), (20, 0)])
def test_widths_that_no_funnel_has_are_refused(
    bundle: Path, tmp_path: Path, widths: tuple[int, int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert rewidth(bundle, tmp_path / "wrong", *widths) == 2
    assert capsys.readouterr().err.startswith("refused: widths")
    assert not (tmp_path / "wrong").exists()
