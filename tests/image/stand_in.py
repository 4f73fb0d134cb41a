"""A stand-in for python:3.11-slim-bookworm where no registry of images is to be reached: Debian 12 made by debootstrap.

It is laid out as the official image is: python3 and pip under /usr/local, no compiler. It is kept as a tar file in
build/, which git ignores, so that it is made once. Mirrors and indexes are those of the machine, read when they are
needed: apt's sources, pip's configuration.
"""

import ast
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

KEPT = Path(__file__).parent.parent.parent / "build/image"
SUITE = "bookworm"
PACKAGES = "ca-certificates,python3,python3-venv"
# A venv at /usr/local is what puts a Python with pip where the official image has its own.
LAY_OUT = ("python3", "-m", "venv", "--copies", "/usr/local")
TOOLS = {  # command → its Debian package
    "buildah": "buildah",
    "podman": "podman",
    "runc": "runc",
    "debootstrap": "debootstrap",
}
KEYRING = "debian-archive-keyring"


def install_tools() -> None:
    """Install what is missing by apt. Raises RuntimeError where that can't be."""
    missing = [package for command, package in TOOLS.items() if not shutil.which(command)]
    if missing and (os.geteuid() or not shutil.which("apt-get")):
        raise RuntimeError(f"{', '.join(missing)} aren't installed, and can be only by root with apt-get")
    if missing:
        quiet = ["--quiet", "--quiet", "--yes", "--no-install-recommends"]
        environ = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "update", "--quiet", "--quiet"], check=True)
        subprocess.run(["apt-get", "install", *quiet, KEYRING, *missing], check=True, env=environ)


def base() -> Path:
    """The tar file of the stand-in's root; made where it isn't there."""
    recipe = hashlib.sha256(repr((SUITE, PACKAGES, LAY_OUT)).encode()).hexdigest()[:12]
    kept = KEPT / f"base-{recipe}.tar"
    if not kept.exists():
        KEPT.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=KEPT) as folder:
            root, made = Path(folder) / "root", Path(folder) / "base.tar"
            with (KEPT / "debootstrap.log").open("w") as log:
                options = ["--variant=minbase", f"--include={PACKAGES}"]
                command = ["debootstrap", *options, SUITE, str(root), *mirror()]
                subprocess.run(command, check=True, stdout=log, stderr=log)
            subprocess.run(["chroot", str(root), *LAY_OUT], check=True)
            without = [
                f"--exclude=./{path}/*" for path in ("var/cache/apt/archives", "var/lib/apt/lists", "dev", "proc")
            ]
            subprocess.run(["tar", "--one-file-system", *without, "-C", str(root), "-cf", str(made), "."], check=True)
            made.rename(kept)
    return kept


def mirror() -> list[str]:
    """Where apt gets this suite from on this machine; empty where it doesn't, which leaves debootstrap its own."""
    if not shutil.which("apt-get"):
        return []
    asked = ["apt-get", "indextargets", "--format", "$(CODENAME) $(COMPONENT) $(REPO_URI)", "Created-By: Packages"]
    lines = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.splitlines()
    return [line.split()[2] for line in lines if line.startswith(f"{SUITE} main ")][:1]


def pip_configuration(file: Path) -> list[Path]:
    """Write how pip reaches its index here, as a pip.conf; returns the files and folders that it names."""
    asked = [sys.executable, "-m", "pip", "config", "list"]
    said = subprocess.run(asked, check=True, capture_output=True, text=True).stdout
    lines, named = ["[global]"], []
    for line in said.splitlines():
        key, _, quoted = line.partition("=")
        value = str(ast.literal_eval(quoted))
        lines.append(f"{key.rpartition('.')[2]} = {' '.join(value.split())}")
        for word in value.split():
            path = Path(word.removeprefix("file://"))
            if path.is_absolute() and path.exists():  # the pages of an index on disk lead to files beside it
                named.append(path.parent if word.startswith("file://") else path)
    file.write_text("\n".join(dict.fromkeys(lines)) + "\n")
    return list(dict.fromkeys(named))
