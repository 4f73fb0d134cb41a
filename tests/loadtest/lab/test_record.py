"""From requests to figures and series by arithmetic; when a run is invalid; JSON there and back."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest

from loadtest.lab import run as runs
from loadtest.lab.record import bin_width, buckets, why_invalid
from loadtest.lab.run import OUTSIDE, REST, Generator, bucket_ms
from loadtest.observed import SILENT
from tests.loadtest.lab.made import made, observed


def test_figures_are_of_what_was_due_after_the_warm_up():
    """400 requests in 20 s, the first 100 slow: they are in the warm-up of 5 s. Of the 300, 30 wait 200 ms."""
    latency_s = np.full(400, 0.010)
    latency_s[:100] = 1.0
    latency_s[-30:] = 0.200
    run = made(observed(latency_s=latency_s), warm_up_s=5.0)
    f = run.figures
    assert (f.requests, f.answered) == (300, 300)
    assert f.rate_due == f.rate_answered == 300 / 15
    assert (f.p50_ms, f.p99_ms) == (pytest.approx(10, rel=1e-3), pytest.approx(200, rel=1e-3))
    assert f.within_sla == 270 / 300
    assert run.latency.get_total_count() == 300
    assert sum(run.series.due) == 400
    assert run.in_figures().tolist() == [False] * 5 + [True] * 15


@pytest.mark.parametrize(("n", "is_said"), [(999, False), (1_000, True)])
def test_p999_of_fewer_than_a_thousand_answers_is_not_said(n, is_said):
    figures = made(observed(n, rate=n / 20)).figures
    assert figures.answered == n
    assert math.isfinite(figures.p999_ms) == is_said
    assert math.isfinite(figures.p99_ms)


def test_failures_are_no_latency_but_miss_the_sla():
    status = np.full(400, 200, np.int16)
    status[:40], status[40:60] = 503, 0
    error = ["" if s else SILENT for s in status.tolist()]
    problem = ["no permit" if s == 503 else "" for s in status.tolist()]
    run = made(observed(status=status, error=error, problem=problem))
    assert (run.figures.answered, run.figures.within_sla) == (340, 340 / 400)
    assert {cause: sum(counts) for cause, counts in run.series.errors.items()} == {
        "503 Service Unavailable": 40,
        SILENT: 20,
    }
    assert run.series.errors["503 Service Unavailable"][:3] == [20, 20, 0]  # 20 a second
    assert run.problems == {"503 Service Unavailable": "no permit"}
    assert math.isnan(run.series.coverage[0]) and run.series.coverage[3] == 1


def test_what_ends_later_is_answered_later():
    """20 requests a second; those of second 3 are answered 2.5 s after they were due."""
    latency_s = np.full(400, 0.010)
    latency_s[60:80] = 2.5
    series = made(observed(latency_s=latency_s)).series
    assert series.due == [20] * 20
    assert series.answered[3] == 0 and series.answered[5] + series.answered[6] == 40 + 20
    assert series.within_sla[3] == 0 and sum(series.within_sla) == 380


def test_an_answer_that_is_degraded_twice_is_in_two_causes():
    causes = [("reranking partial", "users user_late")] * 10 + [("reranking partial",)] * 10 + [()] * 380
    run = made(observed(causes=causes, cause=[c[0] if c else "" for c in causes]))
    assert run.figures.degraded == 20 / 400
    assert {c: n[0] for c, n in run.series.degraded.items()} == {"reranking partial": 20, "users user_late": 10}


def test_stages_add_up_to_the_latency():
    """Six stages of 1 ms, 7 in all, 10 from the outside."""
    stages = made().stages
    assert list(stages)[-2:] == [REST, OUTSIDE]
    assert stages["retrieval"].mean_ms == pytest.approx(1)
    assert stages[REST].p50_ms == pytest.approx(7 - 6)
    assert stages[OUTSIDE].p99_ms == pytest.approx(10 - 7)
    assert sum(s.mean_ms for s in stages.values()) == pytest.approx(10)


def test_buckets_are_a_hundredth_wide_and_know_their_middle():
    latencies = np.geomspace(2e-5, 100, 500)
    assert bucket_ms(buckets(latencies)) == pytest.approx(latencies * 1e3, rel=0.006)
    assert buckets(np.array([0.0, 1e6])).tolist() == [0, runs.N_BUCKETS - 1]


def test_bins_are_seconds_but_in_short_and_in_very_long_runs():
    assert [bin_width(s) for s in (1, 4, 10, 20, 600, 601, 3_600)] == [0.1, 0.1, 0.2, 1, 1, 2, 6]


# ------------------------------------------------------------------------------------------- validity


@pytest.mark.parametrize(
    ("generator", "requests", "why"),
    [
        (Generator(0.1, 5.0, 80, 0.9, 4_095), 1, []),
        (Generator(0.1, 5.1, 80, 0.5, 10), 1, ["sent late: 5.1 ms at its p99, allowed 5 ms"]),
        (Generator(0.1, 1.0, 80, 0.91, 10), 1, ["busy: 0.91 cores, allowed 0.9"]),
        (Generator(0.1, 1.0, 80, 0.5, 4_096), 1, ["4,096 requests were open at once"]),
        (Generator(0.0, 0.0, 0, 0.5, 10), 0, ["nothing was due after the warm-up"]),
        (Generator(9.0, 9.0, 80, 0.95, 10), 1, ["sent late", "busy"]),
    ],
)
def test_a_run_is_invalid_for_every_reason_that_holds(generator, requests, why):
    found = why_invalid(generator, requests, most_connections=4_096)
    assert len(found) == len(why)
    assert all(part in reason for part, reason in zip(why, found, strict=True))


def test_lateness_is_of_what_counts_and_early_is_not_late():
    """2 % of the 300 that count are 50 ms late; in the warm-up all are."""
    late_s = np.full(400, -1e-5)
    late_s[:100] = late_s[-6:] = 0.050
    run = made(observed(sent_late_s=late_s), warm_up_s=5.0)
    assert run.generator.late_p50_ms == 0
    assert run.generator.late_p99_ms == pytest.approx(50)
    assert len(run.invalid) == 1
    assert made(observed(sent_late_s=late_s), warm_up_s=5.0, most_late_ms=60.0).invalid == []


# ------------------------------------------------------------------------------------------------- JSON


def test_a_run_comes_back_from_its_json(tmp_path):
    status = np.full(400, 200, np.int16)
    status[:20] = 503
    run = made(observed(status=status))
    runs.write(run, tmp_path / "run.json")
    back = runs.read(tmp_path / "run.json")
    assert math.isnan(back.figures.server_cpu_ms) and math.isnan(back.series.coverage[0])
    assert back.latency.get_value_at_percentile(50) == run.latency.get_value_at_percentile(50)
    np.testing.assert_equal(asdict(back), asdict(run))
    said = json.loads((tmp_path / "run.json").read_text())
    assert (said["schema"], said["schema_version"], said["setup"]["seed"]) == ("winnow-attack", 1, 7)
    assert len((tmp_path / "run.json").read_bytes()) < 10_000  # and not every request


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda said: said.update(schema_version=2), "allowed is winnow-attack 1"),
        (lambda said: said.pop("figures"), "KeyError"),
        (lambda said: said.update(histogram="???"), "not the JSON of a run"),
        (lambda said: said["series"]["spread"][3].append(9_999), "not the JSON of a run"),
        (lambda said: said.clear(), "not the JSON of a run"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path, change, why):
    file = tmp_path / "run.json"
    runs.write(made(), file)
    said = json.loads(file.read_text())
    change(said)
    file.write_text(json.dumps(said))
    with pytest.raises(ValueError, match=why):
        runs.read(file)


@pytest.mark.parametrize("text", ["", "[]", "3", "\x00"])
def test_what_is_not_even_json_is_refused(tmp_path, text):
    (tmp_path / "x").write_text(text)
    with pytest.raises(ValueError, match="not the JSON of a run"):
        runs.read(tmp_path / "x")
