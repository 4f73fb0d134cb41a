"""Runs whose figures are arithmetic, made without sending anything."""

from typing import Any

import numpy as np

from loadtest.lab.record import record
from loadtest.lab.run import Run
from loadtest.observed import STAGES, Observed

SETUP = {"command": "python -m loadtest attack", "seed": 7, "generation": ["tiny@1#abc"], "commit": "0123456789ab"}


def observed(n: int = 400, rate: float = 20.0, **columns: Any) -> Observed:
    """n requests 1 / rate apart, all answered after 10 ms with all of the width: 1 ms in each stage, 7 in all."""
    seen = Observed(
        due_s=np.arange(n) / rate,
        sent_late_s=np.full(n, 1e-4),
        latency_s=np.full(n, 0.010),
        status=np.full(n, 200, np.int16),
        retry_after=np.full(n, -1, np.int32),
        body=np.zeros(n, np.int64),
        error=[""] * n,
        cpu_s=1.0,
        wall_s=10.0,
        most_open=3,
        wanted=np.full(n, 100.0),
        reranked=np.full(n, 100.0),
        expected_loss=np.zeros(n),
        took_s=np.tile([0.001] * (len(STAGES) - 1) + [0.007], (n, 1)),
        cause=[""] * n,
        causes=[()] * n,
        generation=["tiny@1#abc"] * n,
        problem=[""] * n,
    )
    for name, values in columns.items():
        setattr(seen, name, values)
    return seen


def made(seen: Observed | None = None, *, warm_up_s: float = 0.0, **how: Any) -> Run:
    """The run over 20 s, or what is left of them after the warm-up."""
    how = {"sla_s": 0.1, "seconds": 20.0 - warm_up_s, "most_connections": 4_096} | how
    return record(observed() if seen is None else seen, SETUP, warm_up_s=warm_up_s, **how)
