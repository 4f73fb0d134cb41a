"""What was planted in runs under load is found; runs that say nothing are left out."""

from dataclasses import replace

import numpy as np
import pytest

from loadtest.plan import fit as fit_module
from loadtest.plan.calibration import MOST_STRETCH, Loaded
from loadtest.plan.fit import fit
from loadtest.plan.recipe import CLIENT, model
from tests.loadtest.plan.made import BASE, CALIBRATION, MS, calibration

Warmth = tuple[float, float]


def met(warmth: Warmth, wake_s: float, rate: float, stretch: float = 1.0, beyond_s: float = 0.0) -> Loaded:
    """A run as a machine with these numbers would have shown it; of other arrivals than the fit draws."""
    machine = replace(CALIBRATION, warmth=warmth, wake_s=wake_s, stretch=stretch, beyond_s=beyond_s)
    planted = model(machine, BASE, has_client=True)
    runs = [planted.at(rate, 20, seed) for seed in range(10_000, 10_008)]
    client_s = CALIBRATION.demand.client_s
    p50_s, p99_s = (float(np.mean([run.percentile_s(p) for run in runs])) for p in (50, 99))
    cpu_s = sum(runs[0].cpu_s[:CLIENT]) / len(runs[0].latency_s)
    return Loaded(rate, len(runs[0].latency_s), p50_s, p99_s, 1.0, client_s, cpu_s, 10.0)


@pytest.mark.parametrize("warmth", [(1.2, -0.4), (0.9, 0.3)], ids=["caches stay warm", "neighbours are in the way"])
def test_planted_numbers_predict_a_rate_that_was_not_fitted(warmth: Warmth) -> None:
    loaded = (met(warmth, 1 * MS, 60), met(warmth, 1 * MS, 150), met(warmth, 1 * MS, 250))
    found = fit(calibration(loaded=loaded))
    assert found.warmth == pytest.approx(warmth, abs=0.03)
    assert found.busiest == pytest.approx(loaded[-1].work / CALIBRATION.cores)
    assert found.error < 0.1
    other = met(warmth, 1 * MS, 200)
    seen = model(found, BASE, has_client=True).at(200, 20)
    assert seen.percentile_s(50) == pytest.approx(other.p50_s, rel=0.1)
    assert seen.percentile_s(99) == pytest.approx(other.p99_s, rel=0.25)


@pytest.mark.parametrize(("planted", "beyond_s"), [(0.8, 0.0), (1.4, 1 * MS)])
def test_a_planted_stretch_is_found_beside_waits(planted: float, beyond_s: float) -> None:
    """The wait itself can't be: a core is free soon, and half a millisecond or four move a median by a twentieth."""
    loaded = tuple(met((1.0, 0.0), 1 * MS, rate, planted, beyond_s) for rate in (100, 150, 200, 300))
    found = fit(calibration(loaded=loaded))
    assert found.n_fitted == len(loaded)
    assert found.stretch == pytest.approx(planted, rel=0.07)
    assert found.error < 0.05
    assert found.beyond_s == pytest.approx(beyond_s, abs=0.15 * MS)
    other, seen = met((1.0, 0.0), 1 * MS, 250, planted, beyond_s), model(found, BASE, has_client=True).at(250, 60)
    assert seen.percentile_s(50) == pytest.approx(other.p50_s, rel=0.03)
    assert seen.percentile_s(99) == pytest.approx(other.p99_s, rel=0.1)


def test_a_flat_run_says_nothing_of_the_stretch() -> None:
    good, flat, simulated = (10 * MS, 24 * MS), (10 * MS, 10 * MS), (10 * MS, 20 * MS)
    assert fit_module.stretch([good], [simulated]) == pytest.approx(1.4)
    assert fit_module.stretch([flat, good, flat], [simulated] * 3) == pytest.approx(1.4)
    assert fit_module.stretch([good, good], [simulated, flat]) == pytest.approx(1.4)
    assert fit_module.stretch([flat], [simulated]) == 1.0
    assert fit_module.stretch([(10 * MS, 500 * MS)], [simulated]) == MOST_STRETCH
    assert fit_module.stretch([(10 * MS, 10.5 * MS)], [simulated]) == 1 / MOST_STRETCH
    for beyond in (MOST_STRETCH, 1 / MOST_STRETCH):
        assert "as far over the median" in str(calibration(n_fitted=4, error=0.1, stretch=beyond).doubt)


def test_a_run_of_busy_cores_says_what_the_cpu_is_and_nothing_of_waits() -> None:
    runs = [met((1.0, 0.0), 1 * MS, rate) for rate in (60, 120)]
    busy = replace(met((1.0, 0.0), 1 * MS, 60), rate=fit_module.EASY * 2.1 / runs[0].cpu_s, p50_s=0.09, p99_s=0.19)
    with_busy, without = (fit(calibration(loaded=tuple(loaded))) for loaded in ([*runs, busy], runs))
    assert with_busy.n_fitted == without.n_fitted == 2
    assert (with_busy.wake_s, with_busy.stretch) == (without.wake_s, pytest.approx(without.stretch, rel=0.05))


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


def test_what_one_worker_takes_is_the_median_of_where_it_was_asked() -> None:
    plain = Loaded(100, 1_000, 0.01, 0.02, 1.0, 1 * MS, 5 * MS, 10.0)
    asked = [replace(plain, lone_s=share * plain.cpu_s) for share in (0.9, 0.95, 0.92, 0.0)]  # 0: not asked
    assert fit_module.lone(asked) == pytest.approx(0.92)
    assert fit_module.lone([plain]) == 1.0
    assert fit_module.lone([replace(plain, lone_s=9 * MS)]) == fit_module.LONE[1]


def test_warmth_stays_within_what_a_machine_can_do() -> None:
    steep = tuple(replace(met((1.0, 0.0), 0.0, rate), cpu_s=cpu_s) for rate, cpu_s in ((20, 9 * MS), (300, 2 * MS)))
    found = fit(calibration(loaded=steep))
    cold, more = found.warmth
    assert cold == fit_module.WARMTH[1]
    assert cold + more * found.busiest == pytest.approx(fit_module.WARMTH[0])


def test_a_run_that_narrowed_the_funnel_or_overflowed_says_nothing() -> None:
    narrow = replace(met((1.0, 0.0), 1 * MS, 80), coverage=0.5)
    endless = replace(met((1.0, 0.0), 1 * MS, 80), p99_s=3.0)
    unfitted = calibration(loaded=(narrow, endless))
    assert fit(unfitted) is unfitted
