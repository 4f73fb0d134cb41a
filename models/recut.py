"""A bundle with its re-ranker cut where that pays (cuts.py): nothing else is made again, and no file is copied.

Scores stay the same to 1e-4, so calibration and losses hold. `pack` does the same to what it packs.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import onnx

from app.bundle import load
from app.manifest import MANIFEST
from models import cuts, evaluate
from models.pack import Say, check_target, draft_beside, move, trials, with_golden
from models.pack_config import PackError
from models.rewidth import link


def recut(bundle: Path, out: Path, *, force: bool = False, say: Say = print) -> Path:
    """Make the bundle `out` from `bundle`. Returns `out`. Raises PackError where no cut pays; BundleError."""
    check_target(out, force)
    generation = load(bundle)
    if generation.once:
        raise PackError(f"{bundle}: its re-ranker is cut already")
    requests = [golden.request for golden in generation.manifest.golden]
    queries = evaluate.resolve(generation, requests)
    tried = trials(generation, queries, evaluate.embed(generation, queries))
    if not tried:
        raise PackError(f"{bundle}: its golden requests have too few candidates to time anything on")
    model = onnx.load(str(bundle / cuts.RE_RANKER))
    with draft_beside(out) as draft:
        ignored = shutil.ignore_patterns(MANIFEST, cuts.RE_RANKER)
        shutil.copytree(bundle, draft, copy_function=link, ignore=ignored, dirs_exist_ok=True)
        changed, models = cuts.cut_where_it_pays(replace(generation, path=draft), model, tried, say)
        if changed.re_ranker is generation.re_ranker:
            raise PackError(f"{bundle}: no cut of its re-ranker pays")
        for name, part in models.items():
            (draft / name).write_bytes(part.SerializeToString(deterministic=True))
        with_golden(changed, requests, say)
        move(draft, out)
    return out
