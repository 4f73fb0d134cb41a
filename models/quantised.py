"""A bundle with its re-ranker in eight bits where that pays (quantising.py); what hangs on its scores is made again.

Arrays and index are links. `pack --int8` does the same to what it packs.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx

from app.bundle import load
from app.manifest import MANIFEST
from models import evaluate, hoisting
from models.pack import Say, check_samples, check_target, draft_beside, measured, move
from models.pack_config import PackError
from models.quantising import quantise_where_it_pays
from models.rewidth import link

MOST_SAMPLES = 400  # requests of the file, evenly spread


def quantise(bundle: Path, samples: Path, out: Path, *, force: bool = False, say: Say = print) -> Path:
    """Make the bundle `out` from `bundle`. Returns `out`. Raises PackError where eight bits don't pay; BundleError.

    samples: requests like those that will come, 200 or more.
    """
    check_target(out, force)
    generation, asked = load(bundle), check_samples(samples)
    requests = [asked[at] for at in np.unique(np.linspace(0, len(asked) - 1, MOST_SAMPLES).astype(int))]
    model = onnx.load(str(bundle / hoisting.RE_RANKER))
    with draft_beside(out) as draft:
        ignored = shutil.ignore_patterns(MANIFEST, hoisting.RE_RANKER)
        shutil.copytree(bundle, draft, copy_function=link, ignore=ignored, dirs_exist_ok=True)
        queries = evaluate.resolve(generation, requests)
        changed, model_then = quantise_where_it_pays(replace(generation, path=draft), model, queries, say)
        if model_then is model:
            raise PackError(f"{bundle}: its re-ranker in eight bits doesn't pay")
        (draft / hoisting.RE_RANKER).write_bytes(model_then.SerializeToString(deterministic=True))
        measured(changed, queries, requests, say)
        move(draft, out)
    return out
