"""A bundle of the tiny world made by hand, without the packer: what the contract says, byte by byte.

`reseal` writes the manifest anew after a file was changed, so that only the check under test can catch it.
"""

import hashlib
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from tests import world

GOLDEN_HISTORY = (20,)


def write_bundle(out: Path, *, are_ids_text: bool = False) -> Path:
    """The tiny world as a bundle."""
    config_file = world.write_source(out.with_name(out.name + "-source"), are_ids_text=are_ids_text)
    source, config = config_file.parent, tomllib.loads(config_file.read_text())
    for part in ("items", "users", "vocab"):
        (out / part).mkdir(parents=True)
    tables = {
        "items": (
            "item_ids",
            {"embedding": "item_embeddings", "year": "year", "genres": "genres", "title": "title"},
        ),
        "users": ("user_ids", {"history": "user_history", "age": "age", "occupation": "occupation"}),
    }
    for part, (ids_name, files) in tables.items():
        ids = np.load(source / f"{ids_name}.npy")
        np.save(out / part / "ids.npy", ids)
        np.save(out / part / "id_order.npy", np.argsort(ids, kind="stable"))
        for name, file in files.items():
            np.save(out / part / f"{name}.npy", np.load(source / f"{file}.npy"))
    for file in ("popular.npy", "pre_ranker.npz", "user_tower.onnx", "re_ranker.onnx"):
        (out / file).write_bytes((source / file).read_bytes())
    (out / "vocab" / "genres.json").write_bytes((source / "genres.json").read_bytes())
    (out / "vocab" / "user.occupation.json").write_bytes((source / "occupation.json").read_bytes())
    index = faiss.IndexFlatIP(world.D)
    index.add(world.EMBEDDING)
    faiss.write_index(index, str(out / "index.faiss"))
    ids = np.load(source / "item_ids.npy").tolist()
    reseal(out, lambda m: m.update(_manifest(config, ids)))
    return out


def _manifest(config: dict[str, Any], ids: list[Any]) -> dict[str, Any]:
    scores = world.rerank_scores(GOLDEN_HISTORY)
    best = world.best(scores, world.K, but=GOLDEN_HISTORY)
    golden = {
        "request": {"user": {"history": [ids[r] for r in GOLDEN_HISTORY]}, "k": world.K},
        "items": [ids[r] for r in best],
        "scores": [float(scores[r]) for r in best],
    }
    return {
        "format_version": 1,
        "name": "tiny",
        "version": "1",
        "created": "2024-01-01T00:00:00Z",
        "files": {},
        "retrievers": [
            {
                "name": "two_tower",
                "kind": "flat",
                "n": world.N,
                "recall": {"target": 0.95, "reached": 1.0, "at": world.RETRIEVE, "n_queries": 200},
            }
        ],
        "funnel": {k: config["funnel"][k] for k in ("retrieve", "rerank", "k", "exclude_history")},
        "features": {
            "user_tower": config["user_tower"]["inputs"],
            "re_ranker": config["re_ranker"]["inputs"],
            "pre_ranker": list(world.PRE_RANKER[0]),
        },
        "calibration": {
            "retrieval": {"x": [-1.0, 0.0, 2.0], "y": [-2.0, 0.0, 3.0]},
            "preranking": {"x": [0.0, 0.5, 1.0], "y": [-1.0, 0.0, 3.0]},
            "typical_retrieval_score": 0.25,
            "n_requests": 200,
        },
        "golden": [golden],
    }


def reseal(bundle: Path, change: Callable[[dict[str, Any]], Any] = lambda _: None) -> None:
    """Hash every file again and write the manifest, after `change` in place."""
    file = bundle / "manifest.json"
    manifest = json.loads(file.read_text()) if file.exists() else {}
    change(manifest)
    found = sorted(p for p in bundle.rglob("*") if p.is_file() and p != file)
    manifest["files"] = {
        p.relative_to(bundle).as_posix(): {
            "sha256": hashlib.sha256(p.read_bytes()).hexdigest(),
            "size": p.stat().st_size,
        }
        for p in found
    }
    file.write_text(json.dumps(manifest))
