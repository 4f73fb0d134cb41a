"""The expected loss by numbers: bands, curves, and what a request's reports make of them."""

import numpy as np
import pytest
from pydantic import ValidationError

from app.control.deadline import Deadline
from app.control.degradation import USER_LATE
from app.control.loss import at_share, expected_loss, loss_of_shares, missing_shares
from app.flow import Candidates, Outcome, RequestScope, Scored, Stage, StageReport
from app.manifest import LossCurve, LossCurves, LossTable

EDGES = (0, 2, 6)  # two bands: of 2 positions and of 4


def curve(base: float, all_missing: float) -> LossCurve:
    """From `base` to `all_missing`; the first band weighs three times as much as the second."""
    return LossCurve(weights=(0.75, 0.25), x=(0.0, 1.0), y=(base, all_missing))


TABLE = LossTable(
    k=3,
    n_requests=200,
    edges=EDGES,
    retrieval=LossCurves(shares=(0.2, 1.0), curves=(curve(0.6, 0.8), curve(0.0, 0.4))),
    preranking=LossCurves(shares=(0.0, 1.0), curves=(curve(0.1, 0.5), curve(0.0, 0.4))),
    popular=LossCurves(shares=(0.0, 1.0), curves=(curve(0.8, 1.0), curve(0.7, 0.9))),
    nameless=0.2,
)
NOTHING, EVERYTHING = np.zeros(2), np.ones(2)


def test_a_bands_share_counts_the_wanted_positions_that_are_missing():
    is_missing = np.array([True, False, True, True, False])  # five wanted; the sixth position never was
    np.testing.assert_allclose(missing_shares(EDGES, is_missing), [1 / 2, 2 / 4])
    np.testing.assert_allclose(missing_shares(EDGES, np.ones((2, 9), bool)), [[1, 1], [1, 1]])
    np.testing.assert_allclose(missing_shares(EDGES, np.zeros(0, bool)), [0, 0])


def test_the_curve_is_read_at_the_weighted_sum_of_what_is_missing():
    assert loss_of_shares(TABLE, 1.0, 1.0, NOTHING) == 0.0
    assert loss_of_shares(TABLE, 1.0, 1.0, np.array([1.0, 0.0])) == pytest.approx(0.75 * 0.4)
    assert loss_of_shares(TABLE, 1.0, 1.0, np.array([0.5, 1.0])) == pytest.approx((0.5 * 0.75 + 0.25) * 0.4)


def test_between_two_shares_the_loss_is_between_their_curves_and_constant_beyond():
    assert at_share(TABLE.retrieval, 0.6, NOTHING) == pytest.approx((0.6 + 0.0) / 2)
    assert at_share(TABLE.retrieval, 0.6, EVERYTHING) == pytest.approx((0.8 + 0.4) / 2)
    assert at_share(TABLE.retrieval, 0.01, NOTHING) == pytest.approx(0.6)


def test_the_loss_of_retrieving_less_is_linear_in_the_root_of_the_share():
    between = (0.6**0.5 - 0.2**0.5) / (1 - 0.2**0.5)
    assert loss_of_shares(TABLE, 0.6, 1.0, NOTHING) == pytest.approx(0.6 * (1 - between))
    assert loss_of_shares(TABLE, 0.6, 1.0, EVERYTHING) == pytest.approx(0.8 - 0.4 * between)
    assert loss_of_shares(TABLE, 0.01, 1.0, NOTHING) == pytest.approx(0.6)


def test_where_one_share_is_whole_the_others_curves_are_met():
    assert loss_of_shares(TABLE, 0.2, 1.0, EVERYTHING) == pytest.approx(0.8)
    assert loss_of_shares(TABLE, 1.0, 0.0, EVERYTHING) == pytest.approx(0.5)


def test_with_both_shares_partial_the_worse_counts():
    absent, unscored = 0.6 * (1 - (0.5**0.5 - 0.2**0.5) / (1 - 0.2**0.5)), 0.75 * 0.1
    assert loss_of_shares(TABLE, 0.5, 0.5, NOTHING) == pytest.approx(absent)
    assert loss_of_shares(TABLE, 0.9, 0.5, EVERYTHING) == pytest.approx(0.55 * 0.5 + 0.45 * 0.4)
    assert absent > unscored


def test_more_missing_never_gives_less_loss():
    rng = np.random.default_rng(0)
    for _ in range(200):
        retrieved, preranked = rng.random(2)
        less = rng.random(2)
        more = less + rng.random(2) * (1 - less)
        assert loss_of_shares(TABLE, retrieved, preranked, less) <= loss_of_shares(TABLE, retrieved, preranked, more)


def scope(*reports: tuple[Stage, int, int, Outcome]) -> RequestScope:
    made = [StageReport(stage, wanted, done, 6, 0.01, outcome) for stage, wanted, done, outcome in reports]
    return RequestScope("tiny", Deadline(0.0, 1.0), 10, 6, 6, reports=made)


def fine(*is_fresh: int) -> Scored:
    n = len(is_fresh)
    candidates = Candidates(np.arange(n), np.zeros(n, np.float32), np.ones(n, np.uint32), np.zeros(2, np.float32))
    by = np.where(np.array(is_fresh, bool), Stage.RERANKING, Stage.PRERANKING).astype(np.uint8)
    return Scored(candidates, np.zeros(n, np.float32), Stage.RERANKING, by)


WHOLE = (Stage.RETRIEVAL, 10, 10, Outcome.OK), (Stage.PRERANKING, 10, 10, Outcome.OK)


def test_an_answer_loses_by_the_positions_that_were_not_re_ranked():
    partial = scope(*WHOLE, (Stage.RERANKING, 6, 4, Outcome.PARTIAL))
    assert expected_loss(TABLE, partial, fine(1, 0, 1, 0, 1, 1)) == pytest.approx(0.4 * (0.75 / 2 + 0.25 / 4))


def test_positions_beyond_the_wanted_ones_do_not_count():
    narrow = scope(*WHOLE, (Stage.RERANKING, 2, 2, Outcome.OK))
    assert expected_loss(TABLE, narrow, fine(1, 1, 0, 0, 0, 0)) == 0.0


@pytest.mark.parametrize(
    ("retrieval", "preranking", "expected"),
    [
        ((10, 10, Outcome.OK), (10, 0, Outcome.FAILED), 0.1),
        ((10, 10, Outcome.OK), (10, 5, Outcome.PARTIAL), 0.05),
        ((10, 2, Outcome.PARTIAL), (2, 2, Outcome.OK), 0.6),
        ((10, 6, Outcome.OK), (6, 6, Outcome.OK), 0.0),  # the catalogue has no more
        ((10, 0, Outcome.LATE), (10, 10, Outcome.OK), 0.7),
        ((10, 0, Outcome.FAILED), (10, 0, Outcome.LATE), 0.8),
    ],
)
def test_each_fallback_has_its_own_loss(retrieval, preranking, expected):
    reports = (Stage.RETRIEVAL, *retrieval), (Stage.PRERANKING, *preranking), (Stage.RERANKING, 6, 6, Outcome.OK)
    assert expected_loss(TABLE, scope(*reports), fine(1, 1, 1, 1, 1, 1)) == pytest.approx(expected)


def test_not_knowing_who_asks_leaves_its_share_of_the_rest_or_nothing_that_was_measured():
    late = scope(*WHOLE, (Stage.RERANKING, 6, 0, Outcome.LATE))
    late.degradations.append(USER_LATE)
    given = fine(0, 0, 0, 0, 0, 0)
    assert expected_loss(TABLE, late, given) == pytest.approx(1 - (1 - 0.4) * (1 - 0.2))
    assert expected_loss(TABLE.model_copy(update={"nameless": None}), late, given) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"edges": (0, 2, 2)},
        {"edges": (1, 2, 6)},
        {"edges": (0, 6)},
        {"popular": LossCurves(shares=(1.0, 0.0), curves=(curve(0.1, 0.2), curve(0.1, 0.2)))},
        {"popular": LossCurves(shares=(0.0, 0.5, 1.0), curves=(curve(0.1, 0.2), curve(0.1, 0.2)))},
    ],
)
def test_a_table_that_does_not_hold_together_is_refused(wrong):
    with pytest.raises(ValidationError, match="loss"):
        LossTable.model_validate(TABLE.model_dump() | wrong)


def test_a_curve_that_falls_is_refused():
    with pytest.raises(ValidationError, match="never falling"):
        curve(0.2, 0.1)
