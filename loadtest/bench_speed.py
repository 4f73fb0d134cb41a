"""`make bench-speed`: the speed figures against their bars; of the service each is the median of three measurements.

    W1          CPU a request of the whole service at half of its highest rate, over the raw kernels'
                p50 at 20 requests a second, over the raw kernels' at the same rate
                p99 over p50 at half of the highest rate
                the highest rate, over what the raw kernels alone would allow on these cores
    W1, int8    the same CPU and the same rate over the same kernels, its re-ranker cut and then in eight bits
                (python -m models hoist, quantise)
    W2          CPU of re-ranking, cut over whole and over cut by hand (python -m models.bench_hoisting)

What each means and how it is taken is loadtest/limits/'s. Exit codes: 0, 1 when a bar is missed, 2 for what can't be
used.
"""

import argparse
import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from loadtest.launch import ROOT
from loadtest.limits.command import BUNDLE, as_json, machine, progress, read_requests
from loadtest.limits.measure import QUICK, TOLERANCE, Lengths, Limits, measure_limits
from loadtest.table import Figure, verdict

RUNS = 3
INT8 = Path("models/bundles/w1-int8")
IN_EIGHT_BITS = 0.1  # tolerance of scores, which are other ones then
PATIENCE_S = 600.0  # for the offline half to score W2 whole some times


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.bench_speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    parser.add_argument("--int8", type=Path, default=INT8, help="made from it by `models hoist` and `models quantise`")
    parser.add_argument("--requests", type=Path, help="JSON, one a line; BUNDLE.requests.jsonl, or made up, if absent")
    parser.add_argument("--quick", action="store_true", help="one short run, to see that it works: no measurement")
    parsed = parser.parse_args(arguments)
    bodies, began = read_requests(parser, parsed.bundle, parsed.requests), time.monotonic()
    say, found = progress(began), dict[str, list[Limits]]()
    for name, bundle in (("W1", parsed.bundle), ("W1, int8", parsed.int8)):
        found[name] = measured(name, bundle, parsed.bundle, bodies, say, is_quick=parsed.quick)
    w2 = of_w2(say)
    groups = [("W1", figures(found["W1"])), ("W1, int8", int8_figures(found["W1, int8"])), ("W2", w2_figures(w2))]
    facts = {"is_quick": parsed.quick, "seconds": round(time.monotonic() - began), "w2": w2}
    facts["runs"] = {name: [as_json(run) for run in runs] for name, runs in found.items()}
    return 0 if verdict("speed", groups, sys.stdout, machine() | facts, heading="world") else 1


def measured(
    name: str, bundle: Path, whole: Path, bodies: Sequence[bytes], say: Callable[[str], None], *, is_quick: bool
) -> list[Limits]:
    """Three measurements; none without a bundle, or where one fails, since two are no median: every bar is missed."""
    runs = []
    if not (bundle / "manifest.json").is_file():
        say(f"{name}: not measured, there is no {bundle}")
        return []
    for number in range(1 if is_quick else RUNS):
        say(f"{name}: measurement {number + 1}")
        try:
            lengths = QUICK if is_quick else Lengths()
            tolerance = IN_EIGHT_BITS if bundle != whole else TOLERANCE
            runs.append(measure_limits(bundle, bodies, say, lengths=lengths, kernels_of=whole, tolerance=tolerance))
        except RuntimeError as e:
            say(f"not measured: {e}")
            return []
    return runs


def of_w2(say: Callable[[str], None]) -> dict[str, Any]:
    """What the offline half says in its line of JSON; {} where it failed."""
    say("W2: python -m models.bench_hoisting")
    command = [sys.executable, "-m", "models.bench_hoisting"]
    try:  # exit code 1: it measured scores that differ
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except subprocess.TimeoutExpired:
        say(f"not measured: no end after {PATIENCE_S:g} s")
    except (IndexError, ValueError):
        say(f"not measured: {(done.stderr or done.stdout).strip()[-500:]}")
    return {}


def figures(runs: Sequence[Limits]) -> tuple[Figure, ...]:
    """The medians with their bars; not a number where nothing was measured."""
    return (
        Figure("CPU of the service / of the kernels", middle([r.cpu_ratio.value for r in runs]), most=1.12),
        Figure("unloaded p50 of the service / of the kernels", middle([r.p50_ratio.value for r in runs]), most=1.2),
        Figure("p99 / p50 at half of the highest rate", middle([r.p99_over_p50.value for r in runs]), most=4),
        Figure("highest rate / what the kernels allow", share(runs), least=0.70),
    )


def int8_figures(runs: Sequence[Limits]) -> tuple[Figure, ...]:
    """Of the same funnel with its re-ranker cut and in eight bits, over the kernels of the whole one in float32."""
    return (
        Figure("CPU of the service / of the kernels", middle([r.cpu_ratio.value for r in runs]), most=0.75),
        Figure("highest rate / what the kernels allow", share(runs), least=1.0),
    )


def w2_figures(w2: dict[str, Any]) -> tuple[Figure, ...]:
    nothing = float("nan")
    return (
        Figure("CPU of 500 rows, cut / whole", w2.get("over_whole", nothing), most=0.33),
        Figure("CPU of 500 rows, cut / cut by hand", w2.get("over_by_hand", nothing), most=1.05),
        Figure("largest difference of a score", w2.get("difference", nothing), most=1e-4),
    )


def share(runs: Sequence[Limits]) -> float:
    return middle([r.share_of_kernel_bound for r in runs if r.share_of_kernel_bound is not None])


def middle(values: Sequence[float]) -> float:
    return statistics.median(values) if values else float("nan")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers and generators are ended too
    sys.exit(main())
