"""What a figure is to be read with: the machine, the versions, the commit."""

import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from loadtest.launch import ROOT

PACKAGES = ("winnow", "aiohttp", "uvloop", "hdrhistogram", "numpy", "onnxruntime", "faiss-cpu")


def surroundings() -> dict[str, Any]:
    """Of this process; the service's own where it runs here."""
    parts = (
        f"{os.cpu_count()} cores",
        cpu_model(),
        f"{memory_gib():.0f} GiB",
        f"{platform.system()} {platform.release()}",
    )
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "machine": ", ".join(parts),
        "commit": commit(),
        "versions": {"python": platform.python_version()} | {p: v for p in PACKAGES if (v := _version(p))},
    }


def cpu_model() -> str:
    """As the system names it, else the architecture."""
    file = Path("/proc/cpuinfo")
    for line in file.read_text().splitlines() if file.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def commit() -> str:
    """Of this tree, and whether files were changed since; "unknown" outside of a repository."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + (", changed" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(*what: str) -> str:
    asked = ["git", "-C", str(ROOT), *what]
    return subprocess.run(asked, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
