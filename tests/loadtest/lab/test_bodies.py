"""What is asked: users by Zipf's law, files and what is wrong with one, options in every body."""

import json
from collections import Counter

import numpy as np
import pytest

from loadtest.lab.bodies import MOST, from_bundle, from_file, with_options, zipf
from tests import world


def test_users_come_by_zipfs_law():
    """With 100 users and exponent 1, the r-th most frequent has 1 / r over the sum of 1 / 1 … 1 / 100."""
    drawn = zipf(100, 200_000, 1.0, seed=3)
    counts = np.sort(np.bincount(drawn, minlength=100))[::-1] / 200_000
    weights = 1 / np.arange(1, 101)
    expected = weights / weights.sum()
    assert counts[:10] == pytest.approx(expected[:10], rel=0.05)
    assert counts.sum() == pytest.approx(1)


def test_exponent_0_makes_all_alike_and_the_seed_names_the_draw():
    counts = np.bincount(zipf(50, 100_000, 0.0, seed=1), minlength=50)
    assert abs(counts - 2_000).max() < 5 * np.sqrt(2_000)
    assert zipf(50, 20, 1.0, 4).tolist() == zipf(50, 20, 1.0, 4).tolist() != zipf(50, 20, 1.0, 5).tolist()


def test_who_is_frequent_is_drawn_too():
    """The most frequent user isn't the first of the table with every seed."""
    best = {Counter(zipf(1_000, 2_000, 1.5, seed).tolist()).most_common(1)[0][0] for seed in range(5)}
    assert len(best) == 5


def test_a_bundle_gives_its_own_users_and_what_its_golden_requests_ask(bundle):
    golden = [g["request"] for g in json.loads((bundle / "manifest.json").read_bytes())["golden"]]
    made = [json.loads(body) for body in from_bundle(bundle, 40, seed=1)]
    assert len(made) == 40
    assert {body["user"]["id"] for body in made} <= set(world.USER_IDS)
    for i, body in enumerate(made):
        asked = golden[i % len(golden)]
        assert body == {"user": body["user"]} | {part: asked[part] for part in ("context", "query") if part in asked}


def test_a_bundle_without_users_says_so(copy):
    (copy / "users" / "ids.npy").unlink()
    with pytest.raises(ValueError, match=r"users/ids\.npy isn't there"):
        from_bundle(copy, 10)


def test_different_bodies_are_bounded(bundle):
    assert len(from_bundle(bundle, MOST + 1)) == MOST


@pytest.mark.parametrize(
    ("text", "why"),
    [("", "no requests"), ('{"k": 1}\n\n[]\n', "line 3: '\\[\\]' isn't a JSON object"), ("{", "line 1")],
)
def test_what_is_wrong_with_a_file_is_said_with_its_line(tmp_path, text, why):
    file = tmp_path / "bodies.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match=why):
        from_file(file)


def test_options_take_the_place_of_a_bodys_own():
    bodies = with_options([b'{"k": 3, "user": {}}', b"{}"], {"k": 5, "timeout_ms": 50.0})
    assert [json.loads(b) for b in bodies] == [{"k": 5, "user": {}, "timeout_ms": 50.0}, {"k": 5, "timeout_ms": 50.0}]
    assert with_options([b'{ "k":3}'], {}) == [b'{ "k":3}']
