"""`make bench-speed`: the four speed figures of W1 against their bars, each the median of three measurements.

    CPU a request of the whole service at half of its highest rate, over the raw kernels'
    p50 at 20 requests a second, over the raw kernels' at the same rate
    p99 over p50 at half of the highest rate
    the highest rate, over what the raw kernels alone would allow on these cores

What each means and how it is taken is loadtest/limits/'s. Exit codes: 0, 1 when a bar is missed, 2 for what can't be
used.
"""

import argparse
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from loadtest.limits.command import BUNDLE, as_json, machine, progress, read_requests
from loadtest.limits.measure import QUICK, Lengths, Limits, measure_limits
from loadtest.table import Figure, verdict

RUNS = 3


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.bench_speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    parser.add_argument("--requests", type=Path, help="JSON, one a line; BUNDLE.requests.jsonl, else the golden ones")
    parser.add_argument("--quick", action="store_true", help="one short run, to see that it works: no measurement")
    parsed = parser.parse_args(arguments)
    bodies, began = read_requests(parser, parsed.bundle, parsed.requests), time.monotonic()
    say, runs = progress(began), list[Limits]()
    for number in range(1 if parsed.quick else RUNS):
        say(f"measurement {number + 1}")
        try:
            runs.append(measure_limits(parsed.bundle, bodies, say, lengths=QUICK if parsed.quick else Lengths()))
        except RuntimeError as e:
            say(f"not measured: {e}")
            runs = []  # two of three are no median of three: every bar is missed
            break
    facts = {"is_quick": parsed.quick, "seconds": round(time.monotonic() - began), "runs": [as_json(r) for r in runs]}
    is_met = verdict("speed", [(parsed.bundle.name, figures(runs))], sys.stdout, machine() | facts, heading="bundle")
    return 0 if is_met else 1


def figures(runs: Sequence[Limits]) -> tuple[Figure, ...]:
    """The medians with their bars; not a number where nothing was measured."""

    def middle(values: list[float]) -> float:
        return statistics.median(values) if values else float("nan")

    return (
        Figure("CPU of the service / of the kernels", middle([r.cpu_ratio.value for r in runs]), most=1.12),
        Figure("unloaded p50 of the service / of the kernels", middle([r.p50_ratio.value for r in runs]), most=1.2),
        Figure("p99 / p50 at half of the highest rate", middle([r.p99_over_p50.value for r in runs]), most=4),
        Figure(
            "highest rate / what the kernels allow",
            middle([r.share_of_kernel_bound for r in runs if r.share_of_kernel_bound is not None]),
            least=0.70,
        ),
    )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers and generators are ended too
    sys.exit(main())
