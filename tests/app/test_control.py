"""Rules on time and on what replaces what: numbers in, numbers out, no clock."""

import pytest

from app.control.deadline import Deadline
from app.control.degradation import BY_LOAD, BY_TIME, INSTEAD, REASONS, USER_LATE, degradation, narrowed
from app.flow import Degradation, Outcome, Stage


def test_what_is_left_counts_from_the_first_byte():
    assert Deadline(started_at=100.0, timeout_s=1.0).limit(now=100.1, reserve_s=0.0) == pytest.approx(1 - 0.1)


def test_after_the_deadline_nothing_is_left():
    assert Deadline(0.0, 1.0).limit(now=1.5, reserve_s=0.0) == 0.0


def test_the_reserve_is_kept_back():
    assert Deadline(0.0, 1.0).limit(now=0.2, reserve_s=0.1) == pytest.approx(1 - 0.1 - 0.2)


def test_the_reserve_takes_no_more_than_three_tenths_of_a_short_timeout():
    assert Deadline(0.0, 0.01).limit(now=0.0, reserve_s=5.0) == pytest.approx(0.01 - 0.3 * 0.01)


@pytest.mark.parametrize(
    ("stage", "substitute"),
    [(Stage.RETRIEVAL, "popular items"), (Stage.PRERANKING, "retrieval scores"), (Stage.RERANKING, "pre-rank scores")],
)
@pytest.mark.parametrize("outcome", [Outcome.LATE, Outcome.FAILED, Outcome.PARTIAL])
def test_each_departure_says_stage_reason_and_substitute(stage, substitute, outcome):
    if (stage, outcome) == (Stage.RETRIEVAL, Outcome.PARTIAL):
        substitute = "fewer candidates"
    assert degradation(stage, outcome) == Degradation(stage, outcome.value, substitute)


@pytest.mark.parametrize(
    ("wanted", "quality", "fits", "least", "expected"),
    [
        (500, 1.0, 10_000, 0, (500, None)),
        (500, 0.5, 10_000, 0, (500 * 0.5, BY_LOAD)),
        (500, 1.0, 120, 0, (120, BY_TIME)),
        (500, 0.5, 120, 0, (120, BY_TIME)),
        (500, 0.2, 120, 0, (500 * 0.2, BY_LOAD)),
        (2000, 0.2, 120, 500, (500, BY_TIME)),
        (300, 0.2, 0, 500, (300, None)),
        (0, 0.2, 0, 0, (0, None)),
        (3, 0.5, 10, 0, (2, BY_LOAD)),
    ],
)
def test_a_width_is_what_load_and_time_leave_of_the_wanted(wanted, quality, fits, least, expected):
    assert narrowed(wanted, quality, fits, least) == expected


def test_a_narrowed_stage_says_why():
    by_load = degradation(Stage.RERANKING, Outcome.PARTIAL, BY_LOAD)
    assert by_load == Degradation(Stage.RERANKING, "narrowed_by_load", "pre-rank scores")


def test_selection_has_no_fallback():
    assert set(INSTEAD) == {Stage.RETRIEVAL, Stage.PRERANKING, Stage.RERANKING}


def test_a_stage_that_did_its_work_or_was_not_asked_is_no_degradation():
    assert set(REASONS) == {Outcome.LATE, Outcome.FAILED, Outcome.PARTIAL}
    with pytest.raises(KeyError):
        degradation(Stage.RERANKING, Outcome.OK)


def test_a_late_look_up_of_the_person_belongs_to_retrieval():
    assert Degradation(Stage.RETRIEVAL, "user_late", "what the request says of the person") == USER_LATE
