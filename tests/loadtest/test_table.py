"""Figures and bars, what is printed, and the exit code."""

import io
import json
import math

import numpy as np
import pytest

from loadtest import __main__
from loadtest.faults import ROWS, measure
from loadtest.launch import read_metric
from loadtest.observed import Observed
from loadtest.table import Figure, Row, report, summary


@pytest.mark.parametrize(
    ("figure", "bar", "is_met"),
    [
        (Figure("x", 99.0, most=100, unit="ms"), "<= 100 ms", True),
        (Figure("x", 101.0, most=100), "<= 100", False),
        (Figure("x", 0.95, least=0.95), ">= 0.95", True),
        (Figure("x", 1.0, least=0, most=0), "0", False),
        (Figure("x", 500.0, least=475, most=575), "475 to 575", True),
        (Figure("x", math.nan, most=1), "<= 1", False),
        (Figure("x", math.nan), "", True),
    ],
)
def test_a_bar_is_a_closed_range_that_nan_never_meets(figure, bar, is_met):
    assert (figure.bar, figure.is_met) == (bar, is_met)


def observed(latencies, status, reranked) -> Observed:
    n = len(latencies)
    return Observed(
        due_s=np.arange(n) / 10,
        sent_late_s=np.full(n, 0.001),
        latency_s=np.array(latencies),
        status=np.array(status, np.int16),
        retry_after=np.full(n, -1, np.int32),
        body=np.zeros(n, np.int64),
        error=[""] * n,
        cpu_s=1.0,
        wall_s=4.0,
        wanted=np.full(n, 10.0),
        reranked=np.array(reranked, float),
        cause=["reranking late" if r < 10 and s == 200 else "" for r, s in zip(reranked, status, strict=True)],
    )


def test_a_summary_counts_failures_apart_from_answers():
    s = summary(observed([0.01, 0.02, 0.2, 0.5], [200, 200, 200, 503], [10, 5, 0, 0]), 0.1)
    assert (s.requests, s.failed, s.late, s.degraded) == (4, 1, 1, 2)
    assert s.coverage == pytest.approx((1 + 0.5 + 0) / 3)
    assert s.p50_ms == pytest.approx(20, rel=1e-3)
    assert s.p99_ms == pytest.approx(200, rel=1e-3)
    assert (s.cpu, s.sent_late_ms) == (0.25, pytest.approx(1))


def test_the_report_ends_with_one_line_of_json_and_says_what_is_missed():
    seen = summary(observed([0.01], [200], [10]), 0.1)
    rows = [Row("kill", (Figure("failed", 3.0, most=0), Figure("p99", 10.0, most=100, unit="ms")), seen, 1.5)]
    out = io.StringIO()
    assert not report(rows, out, {"bundle": "w1"})
    lines = out.getvalue().splitlines()
    assert "| kill | 1 | 0 | 0 | 0 | 1.000 | 10.0 / 10.0 | 1.50 | 0.25, 1.00 |" in lines
    assert "| kill | failed | <= 0 | 3 | NO |" in lines
    assert "| kill | p99 | <= 100 ms | 10 ms | yes |" in lines
    assert json.loads(lines[-1]) == {
        "bench": "reliability",
        "bundle": "w1",
        "figures": {"kill: failed": 3.0, "kill: p99": 10.0},
        "missed": ["kill: failed"],
    }


def test_every_bar_met_is_true():
    assert report([Row("x", (Figure("failed", 0.0, most=0), Figure("informs", math.nan)))], io.StringIO())


def test_a_row_that_can_not_be_measured_is_a_missed_bar_and_the_others_go_on(monkeypatch):
    def fails(lab):
        yield Row("half of it", ())
        raise RuntimeError("no service")

    monkeypatch.setitem(ROWS, "kill", fails)
    monkeypatch.setitem(ROWS, "stop", lambda lab: iter([Row("stop", ())]))
    said = []

    class Lab:
        say = said.append

    rows = measure(Lab, ["kill", "stop"])
    assert [r.fault for r in rows] == ["half of it", "kill", "stop"]
    assert not rows[1].figures[0].is_met
    assert "  kill could not be measured: RuntimeError: no service" in said


@pytest.mark.parametrize(("value", "code"), [(0.0, 0), (1.0, 1)])
def test_the_exit_code_says_whether_every_bar_was_met(monkeypatch, tmp_path, capsys, value, code):
    monkeypatch.setitem(ROWS, "kill", lambda lab: iter([Row("kill", (Figure("failed", value, most=0),))]))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "manifest.json").touch()
    (tmp_path / "b.requests.jsonl").touch()
    assert __main__.main(["faults", "--bundle", str(tmp_path / "b"), "--only", "kill"]) == code
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["missed"] == ["kill: failed"] * code


@pytest.mark.parametrize("arguments", [["--only", "nonsense"], ["--bundle", "nowhere"]])
def test_what_can_not_be_used_is_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        __main__.main(["faults", *arguments])
    assert ended.value.code == 2


def test_series_are_summed_over_the_labels_that_are_not_asked():
    text = 'a_total{work="first",x="1"} 3\na_total{work="first",x="2"} 4\na_total{work="hedge"} 5\na_totals 9\na 0.5\n'
    assert read_metric(text, "a_total", work="first") == 3 + 4
    assert read_metric(text, "a_total") == 3 + 4 + 5
    assert read_metric(text, "a") == 0.5
    assert read_metric(text, "b") == 0
