"""A calibration made up of round numbers: every right answer is arithmetic."""

from dataclasses import replace
from typing import Any

from loadtest.plan.calibration import Calibration, Configuration, Demand, Memory
from loadtest.plan.costs import Line

MS = 1e-3
BASE = Configuration(retrieve=500, rerank=128, workers=2, sla_s=10.0)
DEMAND = Demand(
    loop_s=1 * MS,
    users_s=0.2 * MS,
    retrieval=Line(0.8 * MS, 1e-6),
    preranking=Line(0.1 * MS, 2e-7),
    shard=Line(0.3 * MS, 10e-6),
    trip_s=0.3 * MS,
    client_s=0.4 * MS,
    worker_weight=0.1,
    shapes=((1.0, 1.0, 1.0),),
)
CALIBRATION = Calibration(
    date="2026-11-26 12:00",
    machine="a made-up one",
    versions={"python": "3"},
    cores=2,
    bundle="w1",
    path="models/bundles/w1",
    contents="c",
    items=1_000_000,
    d=64,
    kind="ivf_sq8",
    model_bytes=1_000_000,
    base=BASE,
    speeds=(1.0, 1.0),
    demand=DEMAND,
    loaded=(),
    memory=Memory(pss=600 << 20, main_private=60 << 20, worker_private=14 << 20, files=500 << 20, processes=4),
)


def calibration(**changes: Any) -> Calibration:
    return replace(CALIBRATION, **changes)


def demand(**changes: Any) -> Demand:
    return replace(DEMAND, **changes)
