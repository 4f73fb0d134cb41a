"""Arrivals by numbers: rates, spread, bursts, traces and what is wrong with one."""

import json

import numpy as np
import pytest

from loadtest.arrivals import burst, constant, poisson, read_trace, steps


def test_poisson_arrivals_have_the_rate_and_the_spread_of_a_poisson_process():
    due = poisson(200, 50, seed=1)
    gaps, n = np.diff(due), 200 * 50
    assert abs(len(due) - n) < 4 * np.sqrt(n)
    assert due[0] >= 0 and due[-1] < 50 and (gaps >= 0).all()
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)  # exponential: both are 1 / rate


def test_a_seed_names_its_instants():
    assert poisson(10, 5, seed=3).tolist() == poisson(10, 5, seed=3).tolist()
    assert poisson(10, 5, seed=3).tolist() != poisson(10, 5, seed=4).tolist()


def test_constant_arrivals_are_evenly_apart():
    assert constant(4, 1).tolist() == [0, 0.25, 0.5, 0.75]


def test_steps_change_the_rate():
    due = steps((100, 400), 10)
    first, second = (due < 10).sum(), (due >= 10).sum()
    assert (np.diff(due) >= 0).all()
    assert abs(first - 1_000) < 4 * np.sqrt(1_000)
    assert abs(second - 4_000) < 4 * np.sqrt(4_000)


def test_bursts_keep_the_mean_and_stand_where_they_should():
    """100 a second, five times that in the first second of every ten: (1000 - 500) / 9 in between."""
    due = burst(100, 400, factor=5, length_s=1, every_s=10, seed=2)
    is_in = due % 10 < 1
    assert (np.diff(due) >= 0).all() and due[-1] < 400
    assert abs(is_in.sum() - 40 * 500) < 4 * np.sqrt(40 * 500)
    assert abs((~is_in).sum() - 40 * 500) < 4 * np.sqrt(40 * 500)
    assert due.tolist() == burst(100, 400, factor=5, length_s=1, every_s=10, seed=2).tolist()


@pytest.mark.parametrize(("factor", "length_s", "every_s"), [(0.5, 1, 10), (5, 0, 10), (5, 10, 10), (11, 1, 10)])
def test_bursts_that_leave_nothing_between_them_are_refused(factor, length_s, every_s):
    with pytest.raises(ValueError, match="factor x length <= every"):
        burst(100, 10, factor=factor, length_s=length_s, every_s=every_s)


def test_a_trace_starts_at_its_first_instant_and_runs_at_its_speed(tmp_path):
    file = tmp_path / "trace"
    file.write_text("1700000000.5\n\n1700000001\n1700000001\n1700000004.5\n")
    due, bodies = read_trace(file, speed=2)
    assert (due.tolist(), bodies) == ([0, 0.25, 0.25, 2], [])


def test_a_trace_brings_its_bodies(tmp_path):
    file = tmp_path / "trace.jsonl"
    file.write_text('{"at_s": 0, "body": {"k": 3}}\n{"at_s": 0.5, "body": {}}\n')
    due, bodies = read_trace(file)
    assert due.tolist() == [0, 0.5]
    assert [json.loads(b) for b in bodies] == [{"k": 3}, {}]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no arrivals"),
        ("1\nsoon\n", "line 2: 'soon' isn't a number of seconds"),
        ("NaN\n", "line 1"),
        ("true\n", "line 1"),
        ("[1]\n", "line 1"),
        ('{"at_s": 1, "bodies": {}}\n', "line 1"),
        ('{"at_s": 1, "body": 3}\n', "line 1"),
        ("2\n1\n", "line 2: 1 s after 2 s"),
        ('{"at_s": 1, "body": {}}\n2\n', "line 2: a body in every line or in none"),
        ('1\n{"at_s": 1, "body": {}}\n', "line 2: a body in every line or in none"),
    ],
)
def test_what_is_wrong_with_a_trace_is_said_with_its_line(tmp_path, text, why):
    file = tmp_path / "trace"
    file.write_text(text)
    with pytest.raises(ValueError, match=why):
        read_trace(file)


def test_a_trace_is_bounded(tmp_path):
    file = tmp_path / "trace"
    file.write_text("1\n2\n3\n")
    assert len(read_trace(file, most=3)[0]) == 3
    with pytest.raises(ValueError, match="over 2 arrivals"):
        read_trace(file, most=2)
