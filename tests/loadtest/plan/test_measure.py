"""From seconds and CPU to a demand: planted costs are found; a real service can be asked for them."""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from loadtest.launch import Server
from loadtest.observed import Observed
from loadtest.open_loop import Attack
from loadtest.plan import measure
from loadtest.plan.calibration import CalibrationError, Configuration, Loaded, read, write
from loadtest.plan.costs import Exponent, Line
from loadtest.plan.demand import COLUMNS, Single, demand_of
from loadtest.plan.metering import Spent, niceness, read_memory, spent
from tests.loadtest.lab.made import observed
from tests.loadtest.plan.made import BASE, DEMAND, calibration


def single(rerank: int) -> Single:
    """What the made-up service would show at this width, one request at a time."""
    found = max(BASE.retrieve, rerank)
    stages = DEMAND.retrieval(found), DEMAND.preranking(found), DEMAND.shard(rerank)
    total_s = DEMAND.loop_s + DEMAND.trip_s + DEMAND.users_s + sum(stages)
    took = dict(zip(COLUMNS, (DEMAND.trip_s, DEMAND.users_s, *stages, 0.0, total_s), strict=True))
    spent = Spent(DEMAND.loop_s, DEMAND.users_s + sum(stages))
    return Single(rerank, np.array([[took[name] for name in COLUMNS]] * 20), spent)


def test_planted_costs_are_found() -> None:
    runs = [single(width) for width in measure.widths(BASE)]
    found = demand_of(runs, [single(BASE.rerank)] * 3, BASE, nice=10)
    for name in ("loop_s", "users_s", "trip_s"):
        assert getattr(found, name) == pytest.approx(getattr(DEMAND, name), rel=0.01), name
    for name in ("retrieval", "preranking", "shard"):
        assert getattr(found, name)(300) == pytest.approx(getattr(DEMAND, name)(300), rel=0.01), name
    assert found.worker_weight == pytest.approx(1.25**-10)
    assert np.asarray(found.shapes) == pytest.approx(1.0)


def test_a_stage_that_bends_costs_what_was_met_at_each_width_and_at_less_than_the_base_retrieves() -> None:
    """A narrower service finds half for two thirds of the time: not what a line over the others would say."""
    runs = [single(width) for width in measure.widths(BASE)]
    at = COLUMNS.index("retrieval")
    half = replace(single(BASE.rerank // 2), retrieve=BASE.retrieve // 2)
    half.took[:, at] = DEMAND.retrieval(BASE.retrieve) / 1.5
    found = demand_of([*runs, half], [single(BASE.rerank)], BASE, nice=10)
    assert found.retrieval(BASE.retrieve // 2) == pytest.approx(DEMAND.retrieval(BASE.retrieve) / 1.5)
    assert found.retrieval(BASE.retrieve) == pytest.approx(DEMAND.retrieval(BASE.retrieve))
    assert found.retrieval(2 * BASE.retrieve) == pytest.approx(DEMAND.retrieval(2 * BASE.retrieve))


def test_widths_are_the_base_s_and_those_that_widen_retrieval() -> None:
    assert measure.widths(BASE) == [64, 128, 256, 500, 1_000, 2_000]


def test_a_calibration_is_read_as_it_was_written(tmp_path: Path) -> None:
    exponents = {"retrieval": {"items": Exponent(0.4, 0.3, 0.5, 12)}}
    kept = calibration(exponents=exponents, error=0.1)
    write(kept, tmp_path / "deep/c.json")
    assert read(tmp_path / "deep/c.json") == kept
    bent = replace(kept, demand=replace(kept.demand, retrieval=Line(1e-3, 1e-6, ((250.0, 1e-3), (500.0, 2e-3)))))
    write(bent, tmp_path / "c.json")
    assert read(tmp_path / "c.json") == bent


@pytest.mark.parametrize("text", ["", "{}", '{"format": 0}', '{"format": 2}', "[]"])
def test_what_is_no_calibration_is_refused_by_its_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(CalibrationError, match=r"c\.json"):
        read(tmp_path / "c.json")


# ------------------------------------------------------------------------------------- a real service


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[Server]:
    with measure.serve(bundle, Configuration(40, 32, 2, measure.UNHURRIED_S)) as started:
        yield started


def test_a_service_tells_its_stages_its_cpu_and_its_memory(server: Server, bundle: Path) -> None:
    target = measure.aim(server, [json.dumps({"k": 3}).encode()])
    seen = measure.single(target, 32, 20)
    assert seen.took.shape == (20, len(COLUMNS))
    total = seen.took[:, COLUMNS.index("total")]
    assert np.all(total >= seen.took[:, :-1].sum(axis=1) - 1e-5)
    assert seen.spent.loop > 0
    assert seen.spent.workers > 0
    held = read_memory(server, bundle)
    assert held.processes == 1 + 2 + 1  # the main one, two workers, a spare
    assert held.pss > held.main_private > 0
    assert niceness(server) > 0


def test_a_request_that_is_refused_ends_the_measurement(server: Server) -> None:
    target = measure.aim(server, [b'{"no such": 1}'])
    with pytest.raises(RuntimeError, match="status 422"):
        measure.single(target, 32, 1)


def test_a_run_in_parts_calls_what_is_to_be_done_between_them_and_meters_the_service(server: Server) -> None:
    target, calls = measure.aim(server, [json.dumps({"k": 3}).encode()]), list[int]()
    seen, met = measure.metered(target, 50, 1.0, parts=2, seed=8, between=lambda: calls.append(1))
    assert len(calls) == 2 and len(seen) == met.requests > 20 and seen.is_ok.all()
    assert 0 < met.cpu_s < 0.1


def test_a_part_from_which_a_hypervisor_took_the_cores_is_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second part never gets calm: the calmest counts. CPU is that of the runs that count."""
    shares, cpu_s = iter((0.03, 0.004, 0.05, 0.02, 0.04, 0.03)), iter((0, 8, 8, 10, 10, 19, 19, 23, 23, 32, 32, 41))
    sent = []

    def attack(what: Attack) -> Observed:
        sent.append(what.due_s)
        n = len(what.due_s)
        share = next(shares)
        return observed(n, stolen_s=share * 10.0 * (os.cpu_count() or 1), due_s=what.due_s, latency_s=np.full(n, share))

    monkeypatch.setattr(measure, "attack", attack)
    target = SimpleNamespace(server=SimpleNamespace(port=1), bodies=[b"{}"], spent=lambda: Spent(0.0, next(cpu_s)))
    seen, met = measure.metered(target, 50, 2.0, parts=2, seed=3)  # type: ignore[arg-type]
    assert [float(due[0]) == float(sent[0][0]) for due in sent] == [True, True, False, False, False, False]
    assert len(sent) == 2 + measure.TRIES
    assert sorted(set(seen.latency_s.tolist())) == [0.004, 0.02]
    assert met.stolen == pytest.approx(0.012)
    assert met.cpu_s == pytest.approx((2 + 4) / len(seen))


def test_who_ended_while_he_was_metered_is_named(server: Server) -> None:
    with pytest.raises(RuntimeError, match=f"a worker ended .*/proc/{1 << 22}"):
        spent(server.process.pid, [1 << 22])  # above the largest that Linux gives


def test_parts_are_as_slow_as_what_their_requests_took_over_the_median_part() -> None:
    plain = single(BASE.rerank)
    took = [replace(plain, spent=Spent(plain.spent.loop * by, plain.spent.workers * by)) for by in (1.0, 1.2, 0.9)]
    assert measure._slower([[one] for one in took]) == pytest.approx([1.0, 1.2, 0.9])


def test_what_is_to_be_done_after_a_run_is_done_after_those_that_were_held(monkeypatch: pytest.MonkeyPatch) -> None:
    coverage, called = iter((1.0, 0.5)), []

    def metered(target: object, rate: float, seconds: float, *, seed: int) -> tuple[None, Loaded]:
        return None, Loaded(rate, 100, 0.01, 0.02, next(coverage), 1e-3, 4e-3, seconds)

    monkeypatch.setattr(measure, "metered", metered)
    for rate, n_held in ((50, 1), (65, 0)):
        held = measure._held("it", None, rate, 8.5, 0, print, lambda *given: called.append(given))  # type: ignore[arg-type]
        assert len(held) == n_held
    assert called == [("it", 50)]


def test_one_worker_is_asked_the_same_where_it_can_hold_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def metered(target: object, rate: float, seconds: float, *, seed: int) -> tuple[None, Loaded]:
        asked.append((target, rate))
        return None, Loaded(rate, 100, 0.01, 0.02, 1.0, 1e-3, 4e-3 if target == "base" else 3e-3, seconds)

    monkeypatch.setattr(measure, "metered", metered)
    found = [measure._held("base", "one", rate, 8.5, 0, print, lambda *_: None)[0] for rate in (180, 190)]  # type: ignore[arg-type]
    assert [run.lone_s for run in found] == [3e-3, 0.0]  # 190 a second would keep it busy for .76 of its time
    assert asked == [("base", 180), ("one", 180), ("one", 180), ("base", 190)]
