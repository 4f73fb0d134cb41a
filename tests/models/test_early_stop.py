"""What stopping early would save: by numbers, and on a bundle."""

import json
from pathlib import Path

import numpy as np
import pytest

from models import bench_early_stop
from models.bench_early_stop import Kept, stopped


def kept(expected: list[float], scores: list[float]) -> Kept:
    return Kept(np.array(expected, float), np.array(scores, float))


def test_who_can_not_reach_the_best_any_more_is_not_scored() -> None:
    one = kept([5, 4, 3, 2, 1, 0, -1, -2], [5, 4, 3, 2, 1, 0, -1, -2])
    assert stopped(one, 0.5, k=2, step=2) == (1 - 2 / 8, 0)  # the second best is 4, the third can be 3.5
    assert stopped(one, 2.5, k=2, step=2) == (1 - 4 / 8, 0)  # 3 and 2 could be 5.5 and 4.5
    assert stopped(one, 1.5, k=2, step=2) == (1 - 3 / 8, 0)  # a slice ends where hope does
    assert stopped(one, 99, k=2, step=2) == (0, 0)


def test_a_margin_too_small_loses_what_is_better_than_it_looked() -> None:
    one = kept([5, 4, 3, 2], [1, 0, 9, 8])
    saved, lost = stopped(one, 0.0, k=1, step=1)
    assert (saved, lost) == (0.25, 0)  # 5 promised more than it held: 3 is tried, and then 2 is hopeless
    saved, lost = stopped(one, -3.0, k=1, step=1)
    assert (saved, lost) == (0.5, 1)


def test_what_it_saves_on_a_bundle_is_told(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    requests = tmp_path / "requests.jsonl"
    requests.write_text("".join(json.dumps({"user": {"history": [1000 + i]}}) + "\n" for i in range(20)))
    assert bench_early_stop.main([str(bundle), "--requests", str(requests)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["requests"], found["k"]) == (10, 5)
    assert 0 <= found["saved"] <= 1
    assert 0 <= found["lost"] <= 1
