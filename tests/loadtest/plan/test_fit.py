"""What was planted in runs under load is found; runs that say nothing are left out."""

from dataclasses import replace

import pytest

from loadtest.plan import fit as fit_module
from loadtest.plan.calibration import Loaded
from loadtest.plan.fit import fit
from loadtest.plan.recipe import CLIENT, model
from tests.loadtest.plan.made import BASE, CALIBRATION, MS, calibration


def met(contention: float, wake_s: float, rate: float, scale: float = 1.0) -> Loaded:
    """A run as a machine with these numbers would have shown it; of other arrivals than the fit draws."""
    planted = replace(CALIBRATION, contention=contention, wake_s=wake_s)
    seen = model(planted, BASE, scale=scale, has_client=True).at(rate, 20, seed=9)
    speed_s, client_s = scale * CALIBRATION.speed_s, scale * CALIBRATION.demand.client_s
    p50_s, p99_s = seen.percentile_s(50), seen.percentile_s(99)
    cpu_s = sum(seen.cpu_s[:CLIENT]) / len(seen.latency_s)
    return Loaded(rate, len(seen.latency_s), p50_s, p99_s, 1.0, client_s, cpu_s, (speed_s,), 20.0)


def test_planted_numbers_predict_a_rate_that_was_not_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_module, "GRID", 4)
    monkeypatch.setattr(fit_module, "ROUNDS", 2)
    monkeypatch.setattr(fit_module, "MOST_SECONDS", 8.0)
    loaded = (met(0.3, 1 * MS, 110, scale=1.2), met(0.3, 1 * MS, 150))
    found = fit(calibration(loaded=loaded))
    assert found.contention == pytest.approx(0.3, abs=0.1)
    assert found.error < 0.15
    other = met(0.3, 1 * MS, 130)
    seen = model(found, BASE, has_client=True).at(130, 20)
    assert seen.percentile_s(50) == pytest.approx(other.p50_s, rel=0.1)
    assert seen.percentile_s(99) == pytest.approx(other.p99_s, rel=0.25)


def test_warm_caches_are_a_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cores that are faster by a fifth when all work: a request takes less CPU than it took alone."""
    monkeypatch.setattr(fit_module, "MOST_SECONDS", 8.0)
    found = fit(calibration(loaded=(met(-0.2, 0.0, 150),)))
    assert found.contention == pytest.approx(-0.2, abs=0.1)


def test_a_run_that_narrowed_the_funnel_or_overflowed_says_nothing() -> None:
    narrow = replace(met(0.3, 1 * MS, 80), coverage=0.5)
    endless = replace(met(0.3, 1 * MS, 80), p99_s=3.0)
    unfitted = calibration(loaded=(narrow, endless))
    assert fit(unfitted) is unfitted
