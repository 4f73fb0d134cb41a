"""The bench's bars: errors are ratios, and what was not measured meets none of them."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadtest.__main__ import main
from loadtest.plan import again as again_module
from loadtest.plan import bench, bundles
from loadtest.plan.bench import BASE, OTHERS, SHARES, Row, table
from loadtest.plan.calibration import CalibrationError, Configuration, Loaded, write
from loadtest.plan.recipe import model
from loadtest.table import verdict
from tests.loadtest.plan.made import CALIBRATION, MS, calibration

CONFIGURATION = Configuration(250, 50, 1, 0.1)


def row(rate: float, predicted: float, p99: float) -> Row:
    return Row(CONFIGURATION, rate, predicted, 1.25, dict.fromkeys(SHARES, (0.05, p99)))


def test_at_least_six_configurations_are_predicted_that_were_not_calibrated() -> None:
    assert len(set(OTHERS) - {BASE}) >= 6


@pytest.mark.parametrize(
    ("predicted", "p99", "missed"),
    [(114, 0.062, 0), (86, 0.038, 0), (116, 0.050, 1), (84, 0.050, 1), (100, 0.063, 3), (100, 0.037, 3)],
)
def test_errors_are_met_up_to_their_bars(predicted: float, p99: float, missed: int) -> None:
    assert sum(not figure.is_met for figure in row(100, predicted, p99).figures()) == missed


def test_what_was_not_measured_misses_every_bar() -> None:
    out = io.StringIO()
    assert not verdict("capacity", [("a", Row(CONFIGURATION).figures())], out)
    last = json.loads(out.getvalue().splitlines()[-1])
    assert len(last["missed"]) == 1 + len(SHARES)


def test_the_table_says_measured_predicted_and_the_speed_met() -> None:
    one = row(100, 110, 0.040)
    one.notes.append("coverage 0.950 at 85%")
    text = table([one, Row(CONFIGURATION)], CALIBRATION)
    assert "| 250 -> 50, 1 worker | 0.80 x | 100 / 110 | 50.0 / 40.0 |" in text
    assert "coverage 0.950" in text
    assert "nan" not in text


def _asked(metered: Any) -> Any:
    """What stands for measure.metered: the second before, to get warm, says nothing."""

    def in_turn(target: object, rate: float, seconds: float, *, seed: int) -> Any:
        return metered(target, rate, seconds, seed=seed) if seconds == again_module.ASKED_S[1] else None

    return in_turn


def test_a_machine_is_as_slow_as_what_the_calibrated_configuration_takes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone it takes 1 + .2 + 1.3 + .2 + 1.58 ms; at 100 a second, with .4 ms of the client's, two cores are warm."""
    plain = Loaded(100, 100, 0.01, 0.02, 1.0, 0.4 * MS, 4.28 * MS, 14.0)
    known, asked = calibration(loaded=[replace(plain, rate=rate) for rate in (50, 100, 150)], warmth=(1.2, -0.4)), []
    slower = iter((1.3, 1.1, 0.9, 2.0))

    def metered(target: object, rate: float, seconds: float, *, seed: int) -> tuple[None, Loaded]:
        asked.append((rate, seed))
        scale, cpu_s = next(slower), 0.0
        for _ in range(50):  # what is slower keeps the cores busier, and so warmer
            cpu_s = scale * 4.28 * MS * (1.2 - 0.4 * 100 * (cpu_s + 0.4 * MS) / 2)
        return None, replace(plain, cpu_s=cpu_s)

    monkeypatch.setattr(again_module.measure, "metered", _asked(metered))
    monkeypatch.setattr(again_module.measure, "aim", lambda *given: None)
    again = again_module.Again(None, [], known)  # type: ignore[arg-type]
    for _ in range(2 * again_module.AFTER + 1):
        again()
    assert asked == [(100, 1), (100, 2), (100, 3)]
    assert again.slower() == pytest.approx(1.1)
    again()
    assert again.slower() == pytest.approx(2.0)
    with pytest.raises(RuntimeError, match="could not be asked again"):
        again.slower()


def test_a_run_s_own_arrivals_are_simulated_and_each_part_begins_with_nothing_to_do() -> None:
    """Two workers, two at once: nobody waits for a worker. Four in a row at once: half of them do, but not in parts."""
    known = model(CALIBRATION, CALIBRATION.base)
    apart, at_once = np.array([0.0, 0.0, 0.0, 0.0]), np.array([0.5, 0.5, 0.0, 0.0])
    together = bench.simulated_s(known, apart, 1.0)
    parts = bench.simulated_s(known, at_once, 1.0)
    assert len(together) == len(parts) == 4 * bench.SIMULATED
    assert parts.max() < 0.7 * together.max()


def test_how_slow_a_machine_is_is_told_over_what_is_usual_for_short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    known = calibration(loaded=[Loaded(100, 100, 0.01, 0.02, 1.0, 0.4 * MS, 4.28 * MS, 14.0)])
    cpu_s, others, rates = iter(np.array([1.3, 1.1, 1.2, 1.8]) * 4.28 * MS), [], []

    def metered(target: object, rate: float, *given: object, **named: object) -> tuple[None, Loaded]:
        rates.append(rate)
        return None, replace(known.loaded[0], cpu_s=next(cpu_s))

    monkeypatch.setattr(again_module.measure, "metered", _asked(metered))
    monkeypatch.setattr(again_module.measure, "aim", lambda *given: None)
    briefly = again_module.Briefly(others=others.append)
    for rate in (50, 100, 150):
        briefly(None, rate)  # type: ignore[arg-type]
    usual = briefly.over(known)
    assert (usual, others, rates) == (pytest.approx(1.2), [50, 100, 150], [50, 100, 150])
    with pytest.raises(CalibrationError, match="could not be asked"):
        again_module.Briefly(others=others.append).over(known)
    again = again_module.Again(None, [], replace(known, briefly=usual))  # type: ignore[arg-type]
    again.ask()
    assert again.slower() == pytest.approx(1.5)


def test_the_median_of_runs_counts_of_the_measured_and_of_the_predicted() -> None:
    assert bench.medians([(9.0, 1.0), (2.0, 3.0), (1.0, 2.0)]) == (2.0, 2.0)


def test_a_calibration_without_load_or_one_that_nobody_asked_for_seconds_is_refused(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = Path(shutil.copytree(bundle, tmp_path / "tiny"))
    (tmp_path / "tiny.requests.jsonl").write_text('{"k": 3}')
    contents = bundles.contents_of(bundles.manifest_of(tiny))
    write(calibration(contents=contents), tmp_path / "c.json")
    assert main(["capacity", "--bundle", str(tiny), "--calibration", str(tmp_path / "c.json")]) == 2
    assert "no run of the calibration under load" in capsys.readouterr().err
    loaded = [Loaded(100, 100, 0.01, 0.02, 1.0, 0.4 * MS, 4 * MS, 8.5)]
    write(calibration(contents=contents, loaded=loaded), tmp_path / "c.json")
    assert main(["capacity", "--bundle", str(tiny), "--calibration", str(tmp_path / "c.json")]) == 2
    assert "made by `plan`" in capsys.readouterr().err


def test_a_calibration_of_what_is_to_be_predicted_is_refused(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = Path(shutil.copytree(bundle, tmp_path / "tiny"))
    (tmp_path / "tiny.requests.jsonl").write_text('{"k": 3}')
    write(calibration(base=Configuration(*OTHERS[0], sla_s=10.0)), tmp_path / "c.json")
    asked = ["capacity", "--bundle", str(tiny), "--calibration", str(tmp_path / "c.json")]
    assert main(asked) == 2
    assert "250 -> 50, 1 worker is one of those" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*asked, "--only", "7"])
