"""What was planted in runs under load is found; runs that say nothing are left out."""

from dataclasses import replace

import pytest

from loadtest.plan import fit as fit_module
from loadtest.plan.calibration import Loaded
from loadtest.plan.fit import fit
from loadtest.plan.recipe import CLIENT, model
from tests.loadtest.plan.made import BASE, CALIBRATION, MS, calibration

Warmth = tuple[float, float]


def met(warmth: Warmth, wake_s: float, rate: float, scale: float = 1.0, stretch: float = 1.0) -> Loaded:
    """A run as a machine with these numbers would have shown it; of other arrivals than the fit draws."""
    machine = replace(CALIBRATION, warmth=warmth, wake_s=wake_s, stretch=stretch)
    planted = model(machine, BASE, scale=scale, has_client=True)
    seen = planted.at(rate, 20, seed=9)
    speed_s, client_s = scale * CALIBRATION.speed_s, scale * CALIBRATION.demand.client_s
    p50_s, p99_s = seen.percentile_s(50), seen.percentile_s(99)
    cpu_s = sum(seen.cpu_s[:CLIENT]) / len(seen.latency_s)
    return Loaded(rate, len(seen.latency_s), p50_s, p99_s, 1.0, client_s, cpu_s, (speed_s,), 20.0)


@pytest.mark.parametrize("warmth", [(1.2, -0.4), (0.9, 0.3)], ids=["caches stay warm", "neighbours are in the way"])
def test_planted_numbers_predict_a_rate_that_was_not_fitted(warmth: Warmth) -> None:
    loaded = (met(warmth, 1 * MS, 60), met(warmth, 1 * MS, 150, scale=1.2), met(warmth, 1 * MS, 250))
    found = fit(calibration(loaded=loaded))
    assert found.warmth == pytest.approx(warmth, abs=0.03)
    assert found.error < 0.1
    other = met(warmth, 1 * MS, 200)
    seen = model(found, BASE, has_client=True).at(200, 20)
    assert seen.percentile_s(50) == pytest.approx(other.p50_s, rel=0.1)
    assert seen.percentile_s(99) == pytest.approx(other.p99_s, rel=0.25)


@pytest.mark.parametrize("planted", [1.0, 1.4])
def test_what_latencies_are_over_their_median_is_stretched_as_it_was_met(planted: float) -> None:
    loaded = tuple(met((1.0, 0.0), 1 * MS, rate, stretch=planted) for rate in (60, 100, 150))
    found = fit_module.stretch(calibration(loaded=loaded, wake_s=1 * MS), loaded)
    assert found == pytest.approx(planted, rel=0.12)


def test_a_run_whose_p99_is_its_median_has_a_stretch_within_bounds() -> None:
    flat = replace(met((1.0, 0.0), 1 * MS, 60), p50_s=10 * MS, p99_s=10 * MS)
    assert fit_module.stretch(calibration(loaded=(flat,), wake_s=1 * MS), [flat]) == fit_module.STRETCH[0]


def test_a_stretch_leaves_the_median_and_what_is_under_it() -> None:
    plain, stretched = (
        model(replace(CALIBRATION, stretch=stretch), BASE, has_client=True).at(150, 20) for stretch in (1.0, 1.4)
    )
    p50_s = plain.percentile_s(50)
    assert stretched.percentile_s(50) == p50_s
    assert stretched.percentile_s(10) == plain.percentile_s(10)
    assert stretched.percentile_s(99) - p50_s == pytest.approx(1.4 * (plain.percentile_s(99) - p50_s))


def test_runs_that_are_alike_say_what_the_cpu_is_but_not_how_it_changes() -> None:
    found = fit(calibration(loaded=(met((1.2, -0.4), 0.0, 150), met((1.2, -0.4), 0.0, 155))))
    factor = model(replace(CALIBRATION, warmth=(1.2, -0.4)), BASE, has_client=True).factor(150)
    assert found.warmth == (pytest.approx(factor, rel=0.03), 0.0)


def test_warmth_stays_within_what_a_machine_can_do() -> None:
    steep = tuple(replace(met((1.0, 0.0), 0.0, rate), cpu_s=cpu_s) for rate, cpu_s in ((30, 20 * MS), (280, 4 * MS)))
    cold, more = fit(calibration(loaded=steep)).warmth
    assert cold == fit_module.WARMTH[1]
    assert cold + more == pytest.approx(fit_module.WARMTH[0])


def test_a_run_that_narrowed_the_funnel_or_overflowed_says_nothing() -> None:
    narrow = replace(met((1.0, 0.0), 1 * MS, 80), coverage=0.5)
    endless = replace(met((1.0, 0.0), 1 * MS, 80), p99_s=3.0)
    unfitted = calibration(loaded=(narrow, endless))
    assert fit(unfitted) is unfitted
