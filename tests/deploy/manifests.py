"""What the tests of compose and of the Kubernetes manifests read alike."""

import sys
import tomllib
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

from app.settings import Settings

ROOT = Path(__file__).parent.parent.parent
VERSION: str = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
BIN = Path(sys.executable).parent  # of the venv: the linters' commands are there
SETTINGS = {f"WINNOW_{f.name.upper()}": f for f in fields(Settings)}
# What a stop takes besides draining and lingering, seconds: connections end (app/main.py), workers (workers/pool.py).
ENDS_S = 2.0 + 2.0


def unknown(names: Iterable[str]) -> list[str]:
    """Settings among these that the service would refuse."""
    return [name for name in names if name.startswith("WINNOW_") and name not in SETTINGS]


def stop_s() -> float:
    """What a stop takes at most, with the settings' defaults."""
    return float(SETTINGS["WINNOW_DRAIN_S"].default + SETTINGS["WINNOW_LINGER_S"].default) + ENDS_S
