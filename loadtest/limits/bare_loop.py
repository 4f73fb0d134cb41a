"""The bare loop from outside: the process that runs kernels.py, asked over its standard input, one line a question.

A process of its own, with one thread for whatever computes in it, so that nothing else of ours is in its figures. It
starts, asks and ends; what is asked when is measure.py's.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loadtest.agreement import Reference
from loadtest.launch import ONE_THREAD, ROOT, STOP_S


@dataclass(frozen=True, slots=True)
class Timing:
    """What one run of the loop took a request: CPU as the mean, wall as the median; milliseconds, parts by name."""

    n: int
    cpu_ms: float
    p50_ms: float
    cpu_parts_ms: dict[str, float]
    p50_parts_ms: dict[str, float]


@dataclass(frozen=True, slots=True)
class BareLoop:
    """The running process. bodies: the requests that it can time; left_out: why it can't the others, a count each."""

    process: "subprocess.Popen[str]"
    bodies: list[bytes]
    left_out: dict[str, int]

    def hot(self, seconds: float) -> Timing:
        """Back to back."""
        return Timing(**_ask(self.process, ["hot", seconds]))

    def paced(self, rate: float, seconds: float) -> Timing:
        """At `rate` a second, idle in between."""
        return Timing(**_ask(self.process, ["paced", rate, max(1, round(rate * seconds))]))

    def answer(self, number: int) -> tuple[Reference, int]:
        """All that is re-ranked for this one of `bodies`, and the k it asks for."""
        said = _ask(self.process, ["answer", number])
        return Reference(tuple(said["ids"]), np.array(said["scores"], np.float32)), said["k"]


@contextlib.contextmanager
def bare_loop(bundle: Path, bodies: Sequence[bytes]) -> Iterator[BareLoop]:
    """Started, warm, and ended with the block. Raises RuntimeError if none of the requests can be timed."""
    command = [sys.executable, "-m", "loadtest.limits.kernels", str(bundle.resolve())]
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | ONE_THREAD, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        why = _ask(process, [json.loads(body) for body in bodies])
        usable = [body for body, reason in zip(bodies, why, strict=True) if not reason]
        left_out = {reason: why.count(reason) for reason in sorted(set(why)) if reason}
        if not usable:
            raise RuntimeError(f"none of {len(bodies)} requests can be timed: {left_out}")
        yield BareLoop(process, usable, left_out)
    finally:
        _end(process)


def _ask(process: "subprocess.Popen[str]", question: Any) -> Any:
    assert process.stdin and process.stdout  # noqa: S101, pipes were asked for
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps(question), file=process.stdin, flush=True)
    if line := process.stdout.readline():
        return json.loads(line)
    raise RuntimeError(f"the process of the kernels ended with {process.wait()}; what it said stands above")


def _end(process: "subprocess.Popen[str]") -> None:
    try:
        with contextlib.suppress(BrokenPipeError):
            process.communicate(timeout=STOP_S)  # no more questions: it ends
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
