"""The tiny world as a bundle, as a generation, as a funnel, and as a running service."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.bundle import Generation, load
from app.control.deadline import Deadline
from app.funnel import Funnel, offline_funnel
from models.pack import pack
from tests import world
from tests.running import KEYS_FILE, Running, running


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny world; not to be changed."""
    return _packed(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def text_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with strings as item ids and integers as user ids."""
    return _packed(tmp_path_factory.mktemp("text"), are_ids_text=True)


def _packed(folder: Path, *, are_ids_text: bool = False) -> Path:
    config = world.write_source(folder / "source", are_ids_text=are_ids_text)
    pack(config, folder / "bundle", may_hoist=False, say=lambda _: None)
    return folder / "bundle"


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    """A bundle to spoil."""
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


@pytest.fixture(scope="session")
def generation(bundle: Path) -> Generation:
    return load(bundle)


@pytest.fixture(scope="session")
def text_generation(text_bundle: Path) -> Generation:
    return load(text_bundle)


@pytest.fixture
def funnel(generation: Generation) -> Funnel:
    """The whole funnel with the deep model in this process; a new one for each test, to be patched at will."""
    return offline_funnel(generation)


@pytest.fixture
def unhurried() -> Deadline:
    return Deadline(time.monotonic(), 600.0)


@pytest.fixture(scope="session")
def service(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A real process on real ports, with keys."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(KEYS_FILE)
    with running(bundle, WINNOW_API_KEYS_FILE=str(keys)) as process:
        process.wait_until_ready()
        yield process
