"""Bundles that were changed on purpose: the manifest made to fit again, so that only the check under test can
catch the change."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def reseal(bundle: Path, change: Callable[[dict[str, Any]], Any] = lambda _: None) -> None:
    """Hash every file again and write the manifest, after `change` in place."""
    file = bundle / "manifest.json"
    manifest = json.loads(file.read_text())
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
