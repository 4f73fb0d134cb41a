"""What the tests of compose and of the Kubernetes manifests read alike."""

import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

from app.settings import Settings
from app.workers.pool import CLOSE_S

ROOT = Path(__file__).parent.parent.parent
VERSION: str = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
BIN = Path(sys.executable).parent  # of the venv: the linters' commands are there
SETTINGS = {f"WINNOW_{name.upper()}": field for name, field in Settings.model_fields.items()}
ENDS_S = 2.0 + CLOSE_S  # of a stop, besides draining and lingering: connections end (app/main.py), workers end


def unknown(names: Iterable[str]) -> list[str]:
    """Settings among these that the service would refuse."""
    return [name for name in names if name.startswith("WINNOW_") and name not in SETTINGS]


def stop_s() -> float:
    """What a stop takes at most, with the settings' defaults."""
    return float(SETTINGS["WINNOW_DRAIN_S"].default + SETTINGS["WINNOW_LINGER_S"].default) + ENDS_S
