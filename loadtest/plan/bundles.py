"""Bundles to measure on: the same at other widths, and made-up worlds of other sizes. The offline half makes them, as
processes of its own (`python -m models rewidth | synthesize`), beside the one they come from.
"""

import contextlib
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loadtest.launch import ROOT

PATIENCE_S = 1_800.0


@contextlib.contextmanager
def folder_beside(bundle: Path) -> Iterator[Path]:
    """A folder on the bundle's file system, so that files can be links; removed at the end."""
    with tempfile.TemporaryDirectory(prefix=f".{bundle.name}.plan.", dir=bundle.parent) as folder:
        yield Path(folder)


def manifest_of(bundle: Path) -> Any:
    return json.loads((bundle / "manifest.json").read_text())


def contents_of(manifest: Any) -> str:
    """SHA-256 over those of the bundle's files: the same at all widths of one bundle, and of no other."""
    sums = sorted((name, file["sha256"]) for name, file in manifest["files"].items())
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()


def at_widths(bundle: Path, folder: Path, retrieve: int, rerank: int) -> Path:
    """The bundle at these widths, in the folder. Raises RuntimeError with what was said."""
    out = folder / f"{bundle.name}-{retrieve}-{rerank}"
    if not out.exists():
        _make("rewidth", bundle, "--retrieve", retrieve, "--rerank", rerank, "--out", out)
    return out


def at_half(bundle: Path, folder: Path) -> Path:
    """The bundle at half of its widths, k at least."""
    funnel = manifest_of(bundle)["funnel"]
    retrieve, rerank = (max(funnel["k"], funnel[width] // 2) for width in ("retrieve", "rerank"))
    return at_widths(bundle, folder, retrieve, rerank)


def world(folder: Path, items: int, hidden: tuple[int, ...], d: int) -> Path:
    """A made-up bundle of so many items, with a re-ranker of these layers; its requests are beside it."""
    out = folder / f"{items}-{hidden[0]}-{d}"
    units = ",".join(map(str, hidden))
    asked = ("--items", items, "--hidden", units, "--dim", d, "--out", out, "--name", out.name)
    _make("synthesize", "--untrained", *asked)  # what weights they are doesn't change what they cost
    return out


def _make(*command: object) -> None:
    asked = [sys.executable, "-m", "models", *map(str, (c.resolve() if isinstance(c, Path) else c for c in command))]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    if done.returncode:
        raise RuntimeError(f"python -m models {command[0]}: {(done.stderr or done.stdout).strip()[-500:]}")
