"""A bundle with its re-ranker cut where that pays (hoisting.py): nothing else is made again, and no file is copied.

Scores stay what they were, so calibration, losses and golden requests hold: these must be reproduced. `pack` does the
same to what it packs.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import onnx

from app.bundle import HOISTED, load
from app.manifest import MANIFEST
from models import evaluate, hoisting
from models.pack import Say, check_target, draft_beside, move, trials, write_manifest
from models.pack_config import PackError
from models.rewidth import link


def hoist(bundle: Path, out: Path, *, force: bool = False, say: Say = print) -> Path:
    """Make the bundle `out` from `bundle`. Returns `out`. Raises PackError where no cut pays; BundleError."""
    check_target(out, force)
    generation = load(bundle)
    if generation.once or any(name.startswith(HOISTED) for name in generation.tables):
        raise PackError(f"{bundle}: its re-ranker is cut already")
    requests = [golden.request for golden in generation.manifest.golden]
    queries = evaluate.resolve(generation, requests)
    tried = trials(generation, queries)
    if not tried:
        raise PackError(f"{bundle}: its golden requests have too few candidates to time anything on")
    model = onnx.load(str(bundle / hoisting.RE_RANKER))
    with draft_beside(out) as draft:
        ignored = shutil.ignore_patterns(MANIFEST, hoisting.RE_RANKER)
        shutil.copytree(bundle, draft, copy_function=link, ignore=ignored, dirs_exist_ok=True)
        changed, models = hoisting.cut_where_it_pays(replace(generation, path=draft), model, tried, say)
        if changed.re_ranker is generation.re_ranker:
            raise PackError(f"{bundle}: no cut of its re-ranker pays")
        for name, part in models.items():
            (draft / name).write_bytes(part.SerializeToString(deterministic=True))
        write_manifest(changed.manifest, draft)
        evaluate.prove_golden(load(draft))
        say(f"golden: {len(requests)} requests reproduced")
        move(draft, out)
    return out
