"""`python -m loadtest capacity`: what the planner predicts against what the service does.

    calibrate in one configuration ─▶ others: search the highest rate, run at 50, 70 and 85 % of it ─▶ compare

No number of the other configurations enters a prediction. The machine drifts in the time that it takes: each prediction
is for the machine as it is by now, which again.py tells. The load generator takes CPU here too: in this bench, and only
here, it is a station of the simulation. Beyond .85 of the SLA the service narrows, which isn't simulated: a p99 is
predicted to be held there. It is over 250 lines because a figure is predicted where it is measured.
"""

import argparse
import contextlib
import math
import os
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from loadtest import launch, search
from loadtest.lab.bodies import for_bundle
from loadtest.observed import Floats
from loadtest.plan import bundles, calibration, measure
from loadtest.plan.again import Again, Briefly
from loadtest.plan.calibration import Calibration, CalibrationError, Configuration, check_is_of
from loadtest.plan.planning import highest_rate
from loadtest.plan.recipe import Model, model
from loadtest.plan.report import of_load
from loadtest.table import Figure, verdict

BUNDLE, SLA_S = Path("models/bundles/w1"), 0.1
KEPT = Path("reports/capacity-calibration.json")
BASE = (500, 125, 2)  # widths and workers of the calibration
OTHERS = ((250, 50, 1), (250, 50, 2), (500, 60, 2), (500, 125, 1), (500, 250, 2), (1_000, 125, 2))
SHARES = (0.5, 0.7, 0.85)  # of the highest rate
MOST_RATE_ERROR, MOST_P99_ERROR = 0.15, 0.25
LEAST_ANSWERED, LEAST_COVERAGE = 0.999, 0.99
REQUESTS, PART_S, STEP_S = 10_000, 6.0, 8.0  # at a share, in all its runs; of their parts; of a step of the search
# Of the highest rate, and at each share of it; medians count: single searches are a fifth off, single runs met a stall.
SEARCHES = RUNS = 3
SIMULATED = 3  # times what was sent, for the simulation's own noise
LATE_MS = 5.0  # 99th percentile of the generator's own lateness that a table has to tell
RECOVERY_S = 30.0


@dataclass
class Row:
    """One configuration: what was measured, what was predicted for the machine met."""

    configuration: Configuration
    rate: float = math.nan
    predicted_rate: float = math.nan
    slower: float = math.nan
    p99_s: dict[float, tuple[float, float]] = field(default_factory=dict)  # share → measured, predicted
    notes: list[str] = field(default_factory=list)

    def figures(self) -> list[Figure]:
        """Errors as ratios, predicted over measured less one."""
        errors = [_error("highest rate", self.predicted_rate, self.rate, MOST_RATE_ERROR)]
        for share in SHARES:
            measured, predicted = self.p99_s.get(share, (math.nan, math.nan))
            errors.append(_error(f"p99 at {share:.0%}", predicted, measured, MOST_P99_ERROR))
        return errors


def _error(name: str, predicted: float, measured: float, most: float) -> Figure:
    return Figure(f"{name}, error", predicted / measured - 1 if measured else math.nan, least=-most, most=most)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    parser.add_argument("--requests", type=Path, help="JSON, one a line; BUNDLE.requests.jsonl, or made up")
    parser.add_argument("--calibration", type=Path, help="one of this bundle at these widths, instead of measuring it")
    parser.add_argument("--only", type=numbers, metavar="N[,N]", help="these configurations only, by number from 1")
    parser.add_argument("--quick", action="store_true", help="short runs, to see that it works: no measurement")


def run(parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> int:
    """Returns the exit code."""
    try:
        bodies = for_bundle(parsed.bundle, measure.POOL, parsed.requests)
    except (ValueError, OSError) as e:
        parser.error(f"--bundle, --requests: {e}")
    allowed = range(1, len(OTHERS) + 1)
    chosen = parsed.only or list(allowed)[: 2 if parsed.quick else None]
    if not set(chosen) <= set(allowed):
        parser.error(f"--only: there are 1 to {len(OTHERS)}")
    began = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - began:7.1f} s  {line}", file=sys.stderr, flush=True)

    rows = []
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(bundles.folder_beside(parsed.bundle))
        try:
            calibrated = _calibrated(parsed, folder, bodies, say)
            if not calibrated.loaded:
                raise CalibrationError("no run of the calibration under load could be used")
            if not calibrated.briefly:
                raise CalibrationError(
                    f"{parsed.calibration}: made by `plan`; this takes what it kept itself, in {KEPT}"
                )
            base = calibrated.base
            narrow = bundles.at_widths(parsed.bundle, folder, base.retrieve, base.rerank)
            known = stack.enter_context(measure.serve(narrow, base))
            measure.single(measure.aim(known, bodies), base.rerank, 100)
            say(f"asked for seconds, the calibrated configuration takes {calibrated.briefly:.2f} x the CPU")
        except (CalibrationError, RuntimeError, OSError) as e:
            print(f"refused: {e}", file=sys.stderr)
            return 2
        for number in chosen:
            retrieve, rerank, workers = OTHERS[number - 1]
            row = Row(Configuration(retrieve, rerank, workers, SLA_S))
            rows.append(row)
            say(f"{number}: {row.configuration} …")
            try:
                bundle = bundles.at_widths(parsed.bundle, folder, retrieve, rerank)
                _measure(row, bundle, Again(known, bodies, calibrated), is_quick=parsed.quick, say=say)
            except (RuntimeError, OSError) as e:  # the others are still worth having; this one misses its bars
                say(f"  could not be measured: {e}")
                row.notes.append(f"not measured: {type(e).__name__}")
    print(table(rows, calibrated))
    facts: dict[str, object] = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "bundle": parsed.bundle.name,
        "calibrated": str(calibrated.base),
        "briefly": calibrated.briefly,
        "is_quick": parsed.quick,
        "seconds": round(time.monotonic() - began),
    }
    groups = [(str(row.configuration), row.figures()) for row in rows]
    return 0 if verdict("capacity", groups, sys.stdout, facts, heading="configuration") else 1


def numbers(text: str) -> list[int]:
    return [int(one) for one in text.split(",")]


def _calibrated(
    parsed: argparse.Namespace, folder: Path, bodies: Sequence[bytes], say: Callable[[str], None]
) -> Calibration:
    """As it was kept, or measured now. Raises CalibrationError for one that isn't of this bench's own configuration."""
    if parsed.calibration:
        found = calibration.read(parsed.calibration)
        if (found.base.retrieve, found.base.rerank, found.base.workers) in OTHERS:
            raise CalibrationError(f"{parsed.calibration}: {found.base} is one of those to be predicted")
        check_is_of(found, parsed.bundle)
        return found
    narrow = bundles.at_widths(parsed.bundle, folder, *BASE[:2])
    with measure.serve(narrow, Configuration(*BASE, measure.UNHURRIED_S)) as another:
        other, seconds = measure.aim(another, bodies), 0.5 if parsed.quick else PART_S
        briefly = Briefly(others=lambda rate: measure.metered(other, rate, seconds))
        made = measure.calibrate(
            narrow,
            bodies,
            BASE[2],
            say,
            source=parsed.bundle,
            narrower=bundles.at_half(narrow, folder),
            is_quick=parsed.quick,
            after=briefly,
        )
    if made.loaded:
        made = replace(made, briefly=briefly.over(made))
    calibration.write(made, KEPT)
    say(f"kept in {KEPT}, for --calibration")
    return made


# --------------------------------------------------------------------------------------- one configuration


def _measure(row: Row, bundle: Path, again: Again, *, is_quick: bool, say: Callable[[str], None]) -> None:
    """Fill the row. Raises RuntimeError when the service can't be measured."""

    def predicts(slower: float) -> Model:
        return model(again.calibrated, row.configuration, scale=slower, has_client=True)

    with measure.serve(bundle, row.configuration) as server:
        target = measure.aim(server, again.bodies)
        measure.single(target, row.configuration.rerank, 100)
        steps = 0
        step_s = 2.0 if is_quick else STEP_S

        def holds(rate: float) -> bool:
            nonlocal steps
            settle(server)
            seen, one = measure.metered(target, rate, step_s, seed=steps, between=again)
            steps += 1
            say(f"  {rate:.0f}/s: p99 {one.p99_s * 1e3:.1f} ms, coverage {one.coverage:.3f}")
            is_answered = bool(seen.is_ok.mean() >= LEAST_ANSWERED)
            return is_answered and one.coverage >= LEAST_COVERAGE and one.p99_s <= SLA_S

        found = [predicts(1.0).bound / 2]  # where to begin
        for _ in range(1 if is_quick else SEARCHES):
            found.append(search.highest_rate(holds, found[-1], within=0.2 if is_quick else 0.04))
            if not found[-1]:
                raise RuntimeError("no rate keeps the SLA")
            say(f"  highest rate {found[-1]:.0f}/s")
        row.rate, row.slower = float(np.median(found[1:])), again.slower()
        predicted = predicts(row.slower)
        row.predicted_rate = highest_rate(predicted, REQUESTS, step_s, search.TRIES)
        met = f"for a machine that is {row.slower:.2f} x as slow"
        say(f"  highest rate {row.rate:.0f}/s, predicted {row.predicted_rate:.0f} {met}")
        met = defaultdict[float, list[tuple[float, float]]](list)
        for number in range(1 if is_quick else RUNS):
            for share in SHARES:
                settle(server)
                n = 200 if is_quick else math.ceil(REQUESTS / RUNS)
                seed = 100 * number + int(share * 100)
                met[share].append(_at(row, share, target, again, predicts=predicts, requests=n, seed=seed, say=say))
                row.p99_s[share] = medians(met[share])  # what was measured counts, whatever becomes of the rest


def medians(p99s: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Of the measured, of the predicted."""
    measured, predicted = np.median(p99s, axis=0).tolist()
    return measured, predicted


def _at(
    row: Row,
    share: float,
    target: measure.Target,
    again: Again,
    *,
    predicts: Callable[[float], Model],
    requests: int,
    seed: int,
    say: Callable[[str], None],
) -> tuple[float, float]:
    """p99 at a share of the highest rate, as measured in a run and as predicted for the machine met in it, seconds."""
    rate = share * row.rate
    seconds = requests * 1.05 / rate  # a Poisson process of so long has at least so many
    parts = math.ceil(seconds / PART_S)
    seen, one = measure.metered(target, rate, seconds, parts=parts, seed=seed, between=again.ask)
    slower = again.slower()
    predicted = predicts(slower)
    met = simulated_s(predicted, seen.due_s, rate)
    p99_s = one.p99_s, predicted.held_p99_s(met)
    late_ms = float(np.quantile(seen.sent_late_s, 0.99)) * 1e3
    p50 = f"p50 {one.p50_s * 1e3:.1f}, predicted {np.percentile(met, 50) * 1e3:.1f}"
    p99 = "p99 {:.1f}, predicted {:.1f} ms".format(*(1e3 * s for s in p99_s))
    cpu = f"CPU {one.cpu_s * 1e3:.2f}, predicted {predicted.cpu_s(rate) * 1e3:.2f} ms"
    late = f"sent late by {late_ms:.2f} ms, a hypervisor took {one.stolen:.1%}"
    machine = f"{slower:.2f} x as slow"
    say(f"  {share:.0%}, {rate:.0f}/s, {len(seen):,} requests: {p50}; {p99}; {cpu}; {late}; {machine}")
    if p99_s[1] >= predicted.narrows_at_s:
        row.notes.append(f"p99 at {share:.0%} predicted to be held by narrowing")
    if one.coverage < LEAST_COVERAGE:
        row.notes.append(f"coverage {one.coverage:.3f} at {share:.0%}")
    if late_ms > LATE_MS:
        row.notes.append(f"sent late by {late_ms:.0f} ms at {share:.0%}")
    if one.stolen > measure.CALM:
        row.notes.append(f"a hypervisor took {one.stolen:.1%} of the cores at {share:.0%}")
    return p99_s


def simulated_s(model: Model, due_s: Floats, rate: float) -> Floats:
    """Latencies of a run's own arrivals, several times over: chance in who comes when isn't the machine's.

    due_s: f64[n]; where it falls a part of the run begins, on a service with nothing to do.
    """
    parts = np.split(due_s, np.flatnonzero(np.diff(due_s) < 0) + 1)
    seeds = range(SIMULATED)
    return np.concatenate([model.of(part, rate, seed).latency_s for part in parts for seed in seeds])


def settle(server: launch.Server) -> None:
    """Wait until the service runs at full quality."""
    launch.wait_for(lambda: server.metric("winnow_quality") >= 1, RECOVERY_S, "full quality")


def table(rows: Sequence[Row], calibrated: Calibration) -> str:
    """What was measured and what was predicted, in Markdown."""
    shares = " | ".join(f"p99 at {share:.0%}, ms" for share in SHARES)
    lines = [
        f"Calibrated {calibrated.date} with {calibrated.base}: {of_load(calibrated)}. "
        "Each cell: measured / predicted for the speed met, medians.",
        "",
        f"| configuration | machine's speed met | highest rate, a second | {shares} | notes |",
        f"|---|---|---|{'---|' * len(SHARES)}---|",
    ]
    for row in rows:
        cells = []
        for share in SHARES:
            measured, predicted = row.p99_s.get(share, (math.nan, math.nan))
            cells.append(f"{_shown(measured * 1e3, 1)} / {_shown(predicted * 1e3, 1)}")
        speed, rate = f"{_shown(1 / row.slower, 2)} x", f"{_shown(row.rate)} / {_shown(row.predicted_rate)}"
        lines.append(f"| {row.configuration} | {speed} | {rate} | {' | '.join(cells)} | {'; '.join(row.notes)} |")
    return "\n".join([*lines, ""])


def _shown(value: float, digits: int = 0) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "none"
