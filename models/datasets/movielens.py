"""MovieLens-100k: 943 people, 1,682 films, 100,000 ratings, 1997-09-20 to 1998-04-22.

The files come out of the wheel of recbole 1.2.1, which pip downloads and nobody imports or installs: the
wheel is only the parcel. Its sha256 must match, and fetching a second time does nothing. The terms of the
data forbid passing it on: keep `data_dir` out of the repository.

Source: F. M. Harper, J. A. Konstan, The MovieLens Datasets: History and Context, ACM TiiS 5(4), 2015.
"""

import csv
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.errors import Refused

REQUIREMENT = "recbole==1.2.1"
WHEEL_SHA256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
INSIDE = "recbole/dataset_example/ml-100k/"
FILES = ("ml-100k.inter", "ml-100k.item", "ml-100k.user")


class FetchError(Refused):
    """The data can't be had, or isn't what it was."""


@dataclass(frozen=True, slots=True)
class Ratings:
    """Who rated what and when, and the catalogue as it was published, dirt included.

    person_ids i64[P] and item_ids i64[N] are the published numbers, in rising order; person i64[E] and
    item i64[E] are rows of them; time i64[E] in seconds since 1970. titles, years and genres are the
    item file's own text, [N]. Stars are left out: what is predicted is what a person rates next.
    """

    person_ids: NDArray[np.int64]
    item_ids: NDArray[np.int64]
    person: NDArray[np.int64]
    item: NDArray[np.int64]
    time: NDArray[np.int64]
    titles: list[str]
    years: list[str]
    genres: list[str]


def fetch(data_dir: Path) -> Path:
    """The folder with the three files, downloaded if they aren't there yet.

    Raises FetchError when it can't be downloaded, or is not the wheel whose sha256 is known.
    """
    folder = Path(data_dir) / "ml-100k"
    if all((folder / name).is_file() for name in FILES):
        return folder
    with tempfile.TemporaryDirectory() as parcel:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", parcel, REQUIREMENT]
        done = subprocess.run(pip, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            why = (done.stderr.strip().splitlines() or [f"pip ended with {done.returncode}"])[-1]
            raise FetchError(f"{REQUIREMENT}, which has the ratings in it, could not be downloaded: {why}")
        (wheel,) = Path(parcel).glob("*.whl")
        unpack(wheel, folder)
    return folder


def unpack(wheel: Path, folder: Path, sha256: str = WHEEL_SHA256) -> None:
    """Write the three files of this wheel into the folder, once its digest is the expected one."""
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != sha256:
        raise FetchError(f"{wheel.name}: sha256 is {digest}, expected {sha256}")
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        for name in FILES:
            (folder / name).write_bytes(archive.read(INSIDE + name))


def load(data_dir: Path, people: int | None = None) -> Ratings:
    """The ratings of all people, or of the first `people` of them (by id): a slice for quick trials.

    The catalogue is whole in either case.
    """
    folder = Path(data_dir) / "ml-100k"
    events = np.array([[int(x) for x in row[:4]] for row in _rows(folder / FILES[0])], np.int64)
    person_ids = np.unique(events[:, 0])[:people]
    events = events[np.isin(events[:, 0], person_ids)]
    items = sorted(_rows(folder / FILES[1]), key=lambda row: int(row[0]))
    item_ids = np.array([int(row[0]) for row in items], np.int64)
    return Ratings(
        person_ids=person_ids,
        item_ids=item_ids,
        person=np.searchsorted(person_ids, events[:, 0]),
        item=np.searchsorted(item_ids, events[:, 1]),
        time=events[:, 3],
        titles=[row[1] for row in items],
        years=[row[2] for row in items],
        genres=[row[3] for row in items],
    )


def _rows(file: Path) -> list[list[str]]:
    with file.open(encoding="utf-8", newline="") as text:
        return list(csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
