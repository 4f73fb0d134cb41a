"""The split: nobody sees the second of what they are asked, and no event of the future is fitted on."""

import numpy as np
import pytest

from models import split
from models.split import Timeline

# Person 0: items 0 1 at second 1, 2 at second 5, 3 4 at second 9. Person 1: item 4 at 2, item 0 at 8.
PERSON = np.array([0, 0, 0, 0, 0, 1, 1])
ITEM = np.array([0, 1, 2, 3, 4, 4, 0])
TIME = np.array([1, 1, 5, 9, 9, 2, 8])


@pytest.fixture
def line() -> Timeline:
    return split.timeline(PERSON, ITEM, TIME, n_items=5, seed=0)


def test_history_ends_before_the_second_of_the_target(line: Timeline) -> None:
    queries = split.rolling(line, 0, 10, seed=0)
    seen = [(int(queries.target[q]), set(queries.history(q).tolist())) for q in range(len(queries))]
    assert (0, set()) in seen  # of person 0: item 1 has the same second
    assert (2, {0, 1}) in seen
    assert (3, {0, 1, 2}) in seen
    assert (4, {0, 1, 2}) in seen
    assert (0, {4}) in seen  # of person 1


def test_later_items_are_those_of_the_interval(line: Timeline) -> None:
    queries = split.rolling(line, 5, 9, seed=0)
    later = {int(queries.target[q]): set(queries.later(q).tolist()) for q in range(len(queries))}
    assert later == {2: {2}, 0: {0}}
    queries = split.rolling(line, 5, 10, seed=0)
    later = {int(queries.target[q]): set(queries.later(q).tolist()) for q in range(len(queries))}
    assert later == {2: {2, 3, 4}, 3: {3, 4}, 4: {3, 4}, 0: {0}}


def test_ties_fall_both_ways_over_seeds() -> None:
    lasts = set()
    for seed in range(20):
        _, queries = split.leave_one_out(split.timeline(PERSON, ITEM, TIME, 5, seed))
        lasts.add(int(queries.target[0]))
    assert lasts == {3, 4}


def test_leave_one_out_fits_on_what_is_before_the_target(line: Timeline) -> None:
    fit, queries = split.leave_one_out(line)
    assert len(fit) == len(line) - 2
    assert not set(queries.events.tolist()) & set(fit.tolist())
    last, tied = int(queries.target[0]), 7 - int(queries.target[0])
    assert set(queries.seen(0).tolist()) == {0, 1, 2, tied}  # the tied event is fitted on and not ranked …
    assert queries.history(0).tolist()[2:] == [2]  # … but it is no part of the history
    assert queries.later(0).tolist()[-1] == last


def test_the_second_last_is_tuned_on_without_the_last(line: Timeline) -> None:
    fit, queries = split.leave_one_out(line, back=2)
    last = split.leave_one_out(line)[1]
    assert not set(last.events.tolist()) & set(fit.tolist())
    for q in range(2):
        assert int(last.target[q]) not in queries.later(q).tolist()


def test_cuts_leave_sixty_and_eighty_percent_before_them() -> None:
    time = np.random.default_rng(0).permutation(1_000)
    first, second = split.cuts(time)
    assert (time < first).sum() == 600
    assert (time < second).sum() == 800


def test_at_most_so_many_queries_a_person_and_the_same_for_a_seed() -> None:
    rng = np.random.default_rng(0)
    line = split.timeline(rng.integers(0, 5, 500), np.arange(500), rng.integers(0, 900, 500), 500, 0)
    queries = split.rolling(line, 0, 900, seed=3, per_person=20)
    assert np.bincount(queries.person).tolist() == [20] * 5
    again = split.rolling(line, 0, 900, seed=3, per_person=20)
    np.testing.assert_array_equal(queries.events, again.events)
    assert not np.array_equal(queries.events, split.rolling(line, 0, 900, seed=4).events)


def test_model_histories_are_newest_first_and_padded(line: Timeline) -> None:
    queries = split.rolling(line, 9, 10, seed=0)
    rows = split.recent(line, queries.events, 4)
    assert rows[0, 0] == 2
    assert set(rows[0, 1:3].tolist()) == {0, 1}
    assert rows[0, 3] == -1
    np.testing.assert_array_equal(split.seen_matrix(line, queries.events), [[1, 1, 1, 0, 0]] * 2)
