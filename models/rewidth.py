"""The same bundle at other funnel widths: nothing is trained or indexed again, and no file is copied.

    bundle ─▶ hard links ─▶ widths ─▶ golden scores ─▶ proved ─▶ in place

Golden requests are run again, since a narrower funnel gives other lists. The index keeps its search parameter, so it
finds at least what it found; its recall stands as it was measured, at the width it says. The loss table was measured
at the old widths and says nothing of these: it is left out, and degraded answers carry no expected loss. Who serves
such a bundle for good packs it again. Its use is `python -m loadtest plan`: to try the widths that it proposes.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pydantic import ValidationError

from app.bundle import load
from app.manifest import MANIFEST
from models.pack import check_target, draft_beside, move, with_golden
from models.pack_config import FunnelPart, PackError

Say = Callable[[str], None]


def rewidth(bundle: Path, out: Path, *, retrieve: int, rerank: int, force: bool = False, say: Say = print) -> Path:
    """Make the bundle `out` from `bundle` with these widths. Returns `out`. Raises PackError, BundleError."""
    check_target(out, force)
    generation = load(bundle)
    widths = generation.manifest.funnel.model_dump() | {"retrieve": retrieve, "rerank": rerank}
    try:
        funnel = FunnelPart.model_validate(widths).config
    except ValidationError as e:
        first = e.errors()[0]
        where = "".join(f"{part}: " for part in first["loc"])
        raise PackError(f"widths: {where}{first['msg'].removeprefix('Value error, ')}") from e
    with draft_beside(out) as draft:
        shutil.copytree(bundle, draft, copy_function=link, ignore=shutil.ignore_patterns(MANIFEST), dirs_exist_ok=True)
        manifest = generation.manifest.model_copy(update={"funnel": funnel, "loss": None, "golden": ()})
        requests = [golden.request for golden in generation.manifest.golden]
        with_golden(replace(generation, manifest=manifest, path=draft), requests, say)
        move(draft, out)
    say(f"{out}: widths {retrieve} -> {rerank} -> {funnel.k}")
    return out


def link(file: str, copy: str) -> None:
    """A second name for the same bytes; on another file system, or one without links, a copy."""
    try:
        os.link(file, copy)
    except OSError:
        shutil.copyfile(file, copy)
