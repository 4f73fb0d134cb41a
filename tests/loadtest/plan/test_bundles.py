"""Bundles to measure on are made by the offline half, beside the one they come from, and leave nothing."""

import json
import shutil
from pathlib import Path

import pytest

from loadtest.plan import bundles


def test_a_bundle_at_other_widths_is_made_once_and_removed_at_the_end(bundle: Path, tmp_path: Path) -> None:
    tiny = Path(shutil.copytree(bundle, tmp_path / "tiny"))
    with bundles.folder_beside(tiny) as folder:
        made = bundles.at_widths(tiny, folder, 20, 10)
        funnel = json.loads((made / "manifest.json").read_text())["funnel"]
        assert (funnel["retrieve"], funnel["rerank"]) == (20, 10)
        assert bundles.at_widths(tiny, folder, 20, 10) == made
        with pytest.raises(RuntimeError, match="widths: rerank is 20; allowed is up to what is retrieved, 10"):
            bundles.at_widths(tiny, folder, 10, 20)
    assert [f.name for f in tmp_path.iterdir()] == ["tiny"]
