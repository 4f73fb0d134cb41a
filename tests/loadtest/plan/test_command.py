"""The command line: what is printed, drawn and refused."""

import json
import shutil
import sys
from argparse import ArgumentTypeError
from dataclasses import replace
from pathlib import Path

import pytest

from loadtest.__main__ import main
from loadtest.plan import classic, planning
from loadtest.plan.bundles import contents_of, manifest_of
from loadtest.plan.calibration import Loaded, read, write
from loadtest.plan.command import seconds, whole
from loadtest.plan.what_if import varied
from tests.loadtest.plan.made import calibration


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((planning, "REQUESTS"), (planning, "EXPECTED_REQUESTS"), (classic, "REQUESTS")):
        monkeypatch.setattr(module, name, 300)


@pytest.fixture
def known(tmp_path: Path, bundle: Path) -> list[str]:
    contents = contents_of(manifest_of(bundle))
    run = Loaded(50.0, 500, 0.01, 0.03, 1.0, 1e-3, 5e-3, 10.0)
    made = calibration(
        items=50, bundle="tiny", path=str(bundle), contents=contents, loaded=(run, run), n_fitted=2, error=0.1
    )
    write(made, tmp_path / "c.json")
    return ["--calibration", str(tmp_path / "c.json")]


def test_the_classic_example_is_answered_without_a_calibration(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--qps", "20", "--p99", "100ms", "--items", "100e6", "--doc-ms", "1", "--documents", "500"]
    assert main(["plan", *asked, "--shards", "1,5"]) == 0
    said = capsys.readouterr().out
    assert "500.0 ms" in said and "100.0 ms" in said
    assert "all 100,000,000 documents would take 27.8 h" in said
    assert "nothing here was measured" in said


def test_a_plan_says_what_was_measured_and_what_was_not(
    known: list[str], bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--qps", "2000", "--items", "5000", "--cores", "4", "--price", "0.05"]
    assert main(["plan", *asked, *known, "--bundle", str(bundle)]) == 0
    lines = {line[:20].strip(): line[22:] for line in capsys.readouterr().out.splitlines() if line}
    assert {"machines", "workers a machine", "memory a machine", "highest rate", "headroom"} <= set(lines)
    assert {"measured", "fitted", "simulated", "never measured", "extrapolated", "not measured", "costs"} <= set(lines)
    assert int(lines["machines"].split()[0]) > 1


def test_a_plan_in_which_workers_share_a_request_says_what_it_assumes(
    known: list[str], bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--qps", "10", "--workers", "2", "--items", "5000", "--retrieve", "4000", "--bundle", str(bundle), *known]
    assert main(["plan", "--rerank", "128", *asked]) == 0
    assert "assumed               the event loop" not in capsys.readouterr().out
    assert main(["plan", "--rerank", "4000", *asked]) == 0  # 40 ms for one worker
    said = capsys.readouterr().out
    assert "re-ranked by all workers" in said
    assert "assumed               the event loop takes 1.00 ms a shard" in said


def test_a_quality_floor_chooses_the_widths(known: list[str], bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--qps", "50", "--quality-floor", "0.7", "--workers", "2"]
    assert main(["plan", *asked, *known, "--bundle", str(bundle)]) == 0
    assert "cheapest widths that keep 70.0% of NDCG" in capsys.readouterr().out


@pytest.mark.parametrize("widths", [["--rerank", "41"], ["--rerank", "4"], ["--retrieve", "51"]])
def test_widths_that_no_funnel_has_are_refused(
    known: list[str], bundle: Path, widths: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *widths, *known, "--bundle", str(bundle)]) == 2
    assert "allowed is k = 5 <= rerank <= retrieve <= items" in capsys.readouterr().err


def test_a_plan_from_a_calibration_in_doubt_misses_its_bar(
    known: list[str], bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.json"
    write(replace(read(file), error=1.57), file)
    assert main(["plan", *known, "--bundle", str(bundle)]) == 1
    assert "DO NOT TRUST IT: its simulation is off by 157% on its own 2 runs" in capsys.readouterr().out


def test_a_library_that_isnt_installed_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "hdrh.histogram", None)
    for module in [name for name in sys.modules if name.startswith("loadtest.lab")]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--doc-ms", "1"])
    assert ended.value.code == 2
    assert "isn't installed: `make install`" in capsys.readouterr().err


def test_what_if_prints_a_table_and_draws_it(
    known: list[str], bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "made/plan.html"), "--workers", "2", "--bundle", str(bundle)]
    assert main(["plan", "--what-if", "rerank=31..32", *known, *out]) == 0
    fixed, _, table = capsys.readouterr().out.partition("\n\n")
    assert fixed == "100 requests a second, p99 <= 100 ms, 50 items, widths 40 -> 32; rerank varies"
    assert table.split()[0] == "rerank"
    text = (tmp_path / "made/plan.html").read_text()
    assert text.count("<svg") == 3
    assert "What if: rerank" in text
    assert main(["plan", "--doc-ms", "1", "--qps", "5", "--what-if", "shards=2..10", "--p99", "300", *out[:2]]) == 0
    assert (tmp_path / "made/plan.html").read_text().count("<svg") == 2


def test_without_a_calibration_it_says_how_to_make_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--calibration", str(tmp_path / "none.json")]) == 2
    assert "plan --calibrate" in capsys.readouterr().err


def test_what_is_varied_must_go_with_the_kind_of_plan(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "--what-if", "shards=1..5"])
    with pytest.raises(SystemExit):
        main(["plan", "--doc-ms", "1", "--what-if", "rerank=1..5"])
    assert "--doc-ms" in capsys.readouterr().err


def test_a_plan_is_for_the_bundle_that_was_calibrated(
    known: list[str], bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--qps", "50", "--workers", "2", *known]) == 0  # the calibration says which that is
    capsys.readouterr()
    shutil.copytree(bundle, other := tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["funnel"]["rerank"] -= 1
    (other / "manifest.json").write_text(json.dumps(manifest))
    asked = ["plan", "--qps", "50", "--workers", "2", *known, "--bundle", str(other)]
    assert main(asked) == 0  # other widths of the same files
    manifest["files"]["index.faiss"]["sha256"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    assert main(asked) == 2
    assert f"{other}: the calibration is of {bundle}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "named"), [(["--doc-ms", "1", "--workers", "3"], "--workers"), (["--shards", "5"], "--shards")]
)
def test_an_option_of_the_other_kind_of_plan_is_refused(
    asked: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["plan", *asked])
    assert capsys.readouterr().err.startswith(f"python -m loadtest plan: {named}: allowed only with")


def test_numbers_are_read_as_people_write_them() -> None:
    assert [seconds(text) for text in ("100ms", "0.1s", "100")] == [pytest.approx(0.1)] * 3
    assert [whole(text) for text in ("100e6", "1_000", "5")] == [100_000_000, 1_000, 5]
    assert varied("shards=1..10").values == (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
    assert len(varied("items=1..1e6").values) == 9
    assert varied("p99=50ms..200ms").values[::8] == (pytest.approx(50), pytest.approx(200))


@pytest.mark.parametrize("text", ["widths=1..2", "qps=5..1", "qps=0..9", "qps=a..b", "qps", "workers=1.5..3"])
def test_a_range_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ArgumentTypeError):
        varied(text)
