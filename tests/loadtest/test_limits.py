"""`limits` end to end on the tiny bundle; CPU by process and thread; ratios of neighbours; what can't be measured."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest

from loadtest import __main__, bench_speed, capacity
from loadtest.agreement import Reference
from loadtest.arrivals import constant
from loadtest.limits import command, cpu, measure
from loadtest.limits.bare_loop import Timing, bare_loop
from loadtest.limits.kernels import PARTS
from loadtest.limits.measure import TOLERANCE, Limits, Load, in_turn, over_neighbours


def test_limits_measures_a_real_service_and_ends_with_a_line_of_json(bundle, capsys, monkeypatch):
    """The golden requests of the bundle; the search is one run, at 40 a second."""

    def find(server, attack, seconds, say, *, within, before):
        before()
        assert attack(constant(40, 0.5)).is_ok.all()
        return 40.0

    monkeypatch.setattr(capacity, "find", find)
    arguments = ["--bundle", str(bundle), "--quick", "--rounds", "1", "--workers", "1", "--sla-ms", "5000", "--json"]
    assert __main__.main(["limits", *arguments]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert (found["bench"], found["highest_rate"], found["rate"], found["unloaded_rate"]) == ("limits", 40, 20, 20)
    assert found["left_out"] == {}
    for run in found["kernels"].values():
        assert tuple(run["cpu_parts_ms"]) == tuple(run["p50_parts_ms"]) == PARTS
        assert 0 < sum(run["cpu_parts_ms"].values()) <= run["cpu_ms"] * 1.01
    for run in found["service"].values():
        assert sum(run["cpu_parts_ms"].values()) == pytest.approx(run["cpu_ms"])
        assert run["cpu_ms"] > 0 and run["sent_late_ms"] >= 0
        assert set(run["stage_ms"]) == {"retrieval", "preranking", "reranking", "selection"}
        assert min(run["stage_ms"].values()) > 0
    # Of one round, the medians are its own figures.
    assert found["p99_over_p50"] == found["service"]["loaded"]["p99_ms"] / found["service"]["loaded"]["p50_ms"] >= 1
    assert found["cpu_ratio"] > 1 and found["p50_ratio"] > 1  # HTTP alone costs more than 50 items
    assert 0 < found["share_of_kernel_bound"] < 1
    assert any(line.startswith("| service: event loop |") for line in table)
    assert sum(line.startswith("| highest rate, 40/s") for line in table) == 1


@pytest.mark.parametrize("processes", [1, 2])
def test_the_kernels_glued_by_hand_are_measured_at_the_rates_of_the_service(bundle, capsys, processes):
    arguments = ["--bundle", str(bundle), "--quick", "--rounds", "1", "--workers", str(processes), "--sla-ms", "5000"]
    assert __main__.main(["limits", *arguments, "--rate", "25", "--json", "--by-hand"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    by_hand = json.loads(last)["by_hand"]
    assert (by_hand["rate"], by_hand["unloaded_rate"], by_hand["highest_rate"]) == (25, 20, None)
    for run in by_hand["service"].values():
        assert sum(run["cpu_parts_ms"].values()) == pytest.approx(run["cpu_ms"]) and run["cpu_ms"] > 0
    assert by_hand["cpu_ratio"] > 1 and by_hand["p50_ratio"] > 1
    assert sum(line.startswith("| whole request |") for line in table) == 2


# -------------------------------------------------------------------------------------- who used the CPU

CHILD = """
import subprocess, sys, threading, time

def burn():
    end = time.thread_time() + 0.2
    while time.thread_time() < end:
        pass

depth = int(sys.argv[1])
below = subprocess.Popen([sys.executable, "-c", sys.argv[2], str(depth - 1), sys.argv[2]],
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE) if depth else None
print("up", flush=True) if not below else print(below.stdout.readline().decode().strip(), flush=True)
for line in sys.stdin.buffer:
    if below:
        below.stdin.write(line)
        below.stdin.flush()
        below.stdout.readline()
    thread = threading.Thread(target=burn)
    thread.start()
    burn()
    thread.join()
    print("done", flush=True)
if below:
    below.communicate()
"""


@contextmanager
def family():
    """A process with a child; each burns 0.4 s of CPU in two threads, one of which ends, for each line it gets."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, "1", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    )

    def ask() -> None:
        process.stdin.write(b"\n")
        assert process.stdout.readline() == b"done\n"

    try:
        assert process.stdout.readline() == b"up\n"
        yield process, ask
    finally:
        process.communicate()


def test_the_cpu_of_a_tree_is_that_of_all_its_processes_and_of_threads_that_ended():
    with family() as (process, ask):
        before = cpu.used(process.pid)
        assert len(cpu.tree(process.pid)) == len(before.processes) == 2
        ask()
        spent = cpu.spent(before, cpu.used(process.pid))
    assert len(spent.processes) == 2
    assert min(spent.processes.values()) >= 2 * 0.2 - 2 * cpu.TICK_S
    assert spent.total_s == pytest.approx(sum(spent.processes.values()))
    of_main = [s for (pid, tid, _), s in spent.threads.items() if pid == tid == process.pid]
    assert len(of_main) == 1 and 0.2 - 2 * cpu.TICK_S <= of_main[0] < spent.processes[process.pid]


def test_a_process_that_is_gone_took_its_cpu_with_it_and_that_is_said():
    with family() as (process, _):
        both = cpu.used(process.pid)
        alone = cpu.used(next(pid for pid in cpu.tree(process.pid) if pid != process.pid))
    with pytest.raises(RuntimeError, match=f"ended while they were measured: \\[{process.pid}\\]"):
        cpu.spent(both, alone)
    with pytest.raises(RuntimeError, match="no process"):
        cpu.used(process.pid)


def test_a_process_that_is_new_counts_from_its_start():
    before = cpu.Used({(7, 1): 1.0}, {(7, 1, 7): ("main", 1.0)})
    # 8 has the number of nobody, 7 is the same; a number used again has another start.
    after = cpu.Used({(7, 1): 1.5, (8, 9): 0.25}, {(7, 1, 7): ("main", 1.25), (8, 9, 8): ("new", 0.25)})
    spent = cpu.spent(before, after)
    assert spent.processes == {7: 0.5, 8: 0.25}
    assert spent.threads == {(7, 7, "main"): 0.25, (8, 8, "new"): 0.25}


def test_every_second_of_cpu_has_one_owner():
    spent = cpu.Spent(
        processes={1: 10.0, 2: 4.0, 3: 5.0, 9: 0.5},
        threads={
            (1, 1, "python"): 3.0,
            (1, 11, "python"): 2.0,
            (1, 12, "stage_0"): 1.0,
            (1, 13, "stage_1"): 1.5,
            (2, 2, "python"): 4.0,
            (3, 3, "python"): 1.0,
        },
    )
    found = measure.parts(spent, 1, {2, 3})
    assert found == {
        "event loop": 3.0,
        "other threads": 10.0 - 3.0 - 1.0 - 1.5,
        "workers": 4.0 + 5.0,
        "other processes": 0.5,
        "threads stage": 1.0 + 1.5,
    }
    assert sum(found.values()) == spent.total_s


# --------------------------------------------------------------------------------------------- ratios


def timing(ms: float) -> Timing:
    return Timing(10, ms, ms, dict.fromkeys(PARTS, ms / 5), dict.fromkeys(PARTS, ms / 5))


def load(cpu_ms: float, p50_ms: float = 10.0, p99_ms: float = 20.0) -> Load:
    return Load(100, cpu_ms, {"event loop": cpu_ms}, p50_ms, p99_ms, {"retrieval": 1.0}, 0.1)


def limits(**changed) -> Limits:
    """A machine that becomes twice as slow meanwhile."""
    given = {
        "rate": 50.0,
        "unloaded_rate": 20.0,
        "highest_rate": 100.0,
        "hot": [timing(2.0), timing(4.0), timing(4.0)],
        "loaded": [load(6.0), load(8.0, p50_ms=5)],
        "paced": [timing(3.0), timing(3.0), timing(6.0)],
        "unloaded": [load(1, p50_ms=6.0), load(1, p50_ms=13.5)],
        "left_out": {},
        "search_cpu_ms": [4.0, 2.0, 5.0],
        "cores": 2,
    }
    return Limits(**given | changed)


def test_the_service_is_divided_by_its_neighbours():
    assert over_neighbours([6.0, 8.0], [2.0, 4.0, 4.0]) == [6 / 3, 8 / 4]
    found = limits()
    assert (found.cpu_ratio.value, found.cpu_ratio.low, found.cpu_ratio.high) == (2, 2, 2)
    assert (found.p50_ratio.value, found.p50_ratio.low, found.p50_ratio.high) == (2.5, 6 / 3, 13.5 / 4.5)
    assert found.p99_over_p50.value == (20 / 10 + 20 / 5) / 2
    assert found.share_of_kernel_bound == 100 * 4e-3 / 2
    assert limits(highest_rate=None).share_of_kernel_bound is None


def test_a_run_in_which_the_service_gave_something_up_is_taken_again_and_so_is_its_neighbour():
    kernels, service = iter([1.0, 2.0, 3.0, 4.0]), iter([load(1), None, load(2)])
    bare, loads = in_turn(lambda: timing(next(kernels)), lambda: next(service), 2)
    assert [t.cpu_ms for t in bare] == [1, 3, 4]
    assert [x.cpu_ms for x in loads] == [1, 2]


def test_a_service_that_gives_something_up_again_and_again_is_not_measured():
    with pytest.raises(RuntimeError, match="gives up quality"):
        in_turn(lambda: timing(1.0), lambda: None, 1)


# ------------------------------------------------------------------------------- what isn't measured


class Answering:
    """A service and the kernels' process, as far as they are compared: both know one request."""

    bodies = (b'{"k": 2}',)
    full = Reference((1, 2, 3), np.array([0.9, 0.5, 0.1], np.float32))

    def __init__(self, ids, scores, degraded=()) -> None:
        self.items = [{"id": i, "score": s} for i, s in zip(ids, scores, strict=True)]
        self.degraded, self.asked = list(degraded), []  # the first answers are

    def rank(self, body):
        self.asked.append(json.loads(body))
        return {"items": self.items, "degraded": [self.degraded.pop()] if self.degraded else []}

    def metric(self, name):
        return {"winnow_quality": 1.0}[name]

    def answer(self, number):
        return self.full, 2


@pytest.mark.parametrize(
    ("ids", "scores", "degraded", "why"),
    [
        ((1, 3), (0.9, 0.1), (), "item 3 stands at place 1"),
        ((1, 2), (0.9, 0.6), (), "item 2 has score 0.6"),
        ((1,), (0.9,), (), "1 items, not 2"),
        ((1, 2), (0.9, 0.5), ({"stage": "reranking"},) * 3, "degraded without load"),
    ],
    ids=["order", "score", "length", "degraded"],
)
def test_kernels_that_do_other_work_than_the_service_are_not_timed(ids, scores, degraded, why):
    both = Answering(ids, scores, degraded)
    with pytest.raises(RuntimeError, match=f"request 0: .*{why}"):
        measure.compare(both, both, 10)


def test_kernels_that_give_the_services_answer_are_and_one_that_was_degraded_is_asked_again():
    both = Answering((1, 2), (0.9, 0.5), [{"stage": "reranking"}])
    measure.compare(both, both, 10)
    assert both.asked == [{"k": 2, "timeout_ms": 10_000}] * 2


def test_requests_that_the_kernels_can_not_time_are_left_out_and_counted(bundle):
    bodies = [b"{}", b'{"k": 99}', b'{"candidates": [1000]}', b'{"k": 98}', b'{"k": 1}']
    with bare_loop(bundle, bodies) as kernels:
        assert kernels.bodies == [b"{}", b'{"k": 1}']
        assert kernels.left_out == {"asks for more items than are re-ranked": 2, "has candidates": 1}
        assert [kernels.answer(n)[1] for n in range(2)] == [5, 1]
        process = kernels.process
    assert process.returncode == 0


def test_a_bundle_that_does_not_load_and_requests_of_which_none_can_be_timed_are_errors(bundle, tmp_path):
    with pytest.raises(RuntimeError, match="ended with 1"), bare_loop(tmp_path, [b"{}"]):
        pass
    with pytest.raises(RuntimeError, match="none of 1 requests"), bare_loop(bundle, [b'{"k": 99}']):
        pass


@pytest.mark.parametrize(
    "arguments",
    [
        ["--bundle", "nowhere"],
        ["--requests", "nowhere"],
        ["--requests", os.devnull],
        ["--rate", "0"],
        ["--rate", "nan"],
        ["--unloaded-rate", "-1"],
        ["--rounds", "0"],
        ["--workers", "0"],
        ["--sla-ms", "inf"],
    ],
    ids=" ".join,
)
def test_what_can_not_be_used_is_exit_code_2(bundle, arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        __main__.main(["limits", "--bundle", str(bundle), *arguments])
    assert ended.value.code == 2


def test_what_can_not_be_measured_is_exit_code_1(bundle, capsys, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no rate holds")

    monkeypatch.setattr(command, "measure_limits", fails)
    assert __main__.main(["limits", "--bundle", str(bundle), "--json"]) == 1
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "not measured: no rate holds\n")


# ------------------------------------------------------------------------------------------ the bench


@pytest.mark.parametrize(
    ("cpu_ratios", "missed"), [((1.3, 1.0, 1.1), 0), ((1.3, 1.2, 1.1), 1)], ids=["met by the median", "missed"]
)
def test_the_bench_holds_the_medians_of_three_measurements_to_their_bars(
    bundle, tmp_path, capsys, monkeypatch, cpu_ratios, missed
):
    ratios, of_searches = iter((*cpu_ratios, 0.7, 0.6, 0.8)), iter([14.0] * 3 + [21.0] * 3)

    asked = []

    def measured(measured_bundle, *_, kernels_of, tolerance, **__):
        asked.append((measured_bundle, kernels_of, tolerance))
        of_search = next(of_searches)
        good = {"paced": [timing(1.0)] * 2, "unloaded": [load(1, p50_ms=1.2)], "search_cpu_ms": [of_search]}
        return limits(hot=[timing(1.0)] * 2, loaded=[load(next(ratios), 5.0, 20.0)], **good)

    monkeypatch.setattr(bench_speed, "measure_limits", measured)
    w2 = {"over_whole": 0.2, "over_by_hand": 1.0, "difference": 1e-6}
    monkeypatch.setattr(bench_speed, "of_w2", lambda say: w2)
    int8 = tmp_path / "int8"
    int8.mkdir()
    (int8 / "manifest.json").touch()
    assert bench_speed.main(["--bundle", str(bundle), "--int8", str(int8)]) == missed
    assert asked == [(bundle, bundle, TOLERANCE)] * 3 + [(int8, bundle, bench_speed.IN_EIGHT_BITS)] * 3
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["bench"] == "speed" and [len(runs) for runs in found["runs"].values()] == [3, 3]
    of_w1 = [sorted(cpu_ratios)[1], 1.2, 4, pytest.approx(0.7)]
    assert list(found["figures"].values()) == [*of_w1, 0.7, pytest.approx(1.05), *w2.values()]
    assert [name.partition(": ")[2] for name in found["missed"]] == ["CPU of the service / of the kernels"] * missed


def test_a_measurement_that_fails_misses_every_bar(bundle, capsys, monkeypatch):
    results = iter([SimpleNamespace()])

    def fails_second(*_, **__):
        if next(results, None):
            return limits()
        raise RuntimeError("no rate holds")

    monkeypatch.setattr(bench_speed, "measure_limits", fails_second)
    monkeypatch.setattr(bench_speed, "of_w2", lambda say: {})
    assert bench_speed.main(["--bundle", str(bundle), "--int8", "nowhere"]) == 1
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(found["figures"].values()) == {None}
    assert len(found["missed"]) == 9


def test_a_cut_graph_is_measured_against_a_whole_one_and_one_cut_by_hand():
    """As a process of its own. How much it saves is the bench's to say."""
    found = bench_speed.of_w2(print)
    assert found["difference"] < 1e-4
    assert set(found["cpu_ms"]) >= {"whole", "by hand", found["best"]}
