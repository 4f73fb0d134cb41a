"""What the image installs is pinned to the byte, and is what pyproject.toml asks for. `make lock` pins anew."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SERVING, BUILDING = "requirements.lock", "requirements-build.lock"
ASKED = {SERVING: PROJECT["project"]["dependencies"], BUILDING: PROJECT["build-system"]["requires"]}
TRAINING = ("torch", "onnx", "scipy", "pandas", "scikit-learn")
HASH = re.compile(r"--hash=sha256:[0-9a-f]{64}")


def locked(name: str) -> dict[str, tuple[str, list[str]]]:
    """Package → the requirement as written, and its hashes; a line with neither comment nor requirement fails."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / name).read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    found = {}
    for line in text.splitlines():
        requirement, *options = line.split()
        assert all(HASH.fullmatch(option) for option in options), line
        found[canonicalize_name(Requirement(requirement).name)] = requirement, options
    return found


@pytest.fixture(params=[SERVING, BUILDING])
def lock(request) -> str:
    return request.param


def test_each_package_is_pinned_to_one_version(lock):
    for requirement, _ in locked(lock).values():
        (pin,) = Requirement(requirement).specifier
        assert pin.operator == "==", requirement
        assert "*" not in pin.version, requirement


def test_each_package_has_the_hashes_of_its_files(lock):
    assert [requirement for requirement, hashes in locked(lock).values() if not hashes] == []


def test_what_the_project_asks_for_is_there_in_a_version_that_it_takes(lock):
    found = locked(lock)
    for asked in map(Requirement, ASKED[lock]):
        requirement, _ = found[canonicalize_name(asked.name)]
        assert asked.specifier.contains(requirement.partition("==")[2]), f"{requirement}: asked is {asked}"


def test_serving_installs_nothing_that_trains():
    assert [name for name in locked(SERVING) if name in TRAINING] == []


def test_nothing_is_installed_from_an_index_or_an_address_of_its_own(lock):
    text = (ROOT / lock).read_text()
    assert not re.search(r"://|--(extra-)?index-url|--find-links| @ ", text)
