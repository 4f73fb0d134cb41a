"""What all rows share: the bundle, its requests, the capacity, the full funnel's own answers.

The capacity is found once a run: the highest rate at which p99 stays under 50 ms with the whole width. Rows run at
half of it unless they say otherwise. References are taken from a service without load that has ten seconds a request.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from loadtest import capacity, launch
from loadtest.agreement import Reference
from loadtest.launch import Server
from loadtest.observed import Floats, Observed
from loadtest.open_loop import Attack, Generator
from loadtest.table import Figure, Row, summary

SLA_S = 0.1
UNHURRIED_MS = 10_000
POOL = 4_000  # fixed requests, each with its reference: a mean loss to .003


@dataclass
class Lab:
    """One run over one bundle. `other` is a second version over the same catalogue, for swaps."""

    bundle: Path
    other: Path
    requests: Path
    is_quick: bool
    say: Callable[[str], None]
    workers: int = os.cpu_count() or 1
    _references: dict[Path, tuple[str, list[Reference]]] = field(default_factory=dict)

    # ------------------------------------------------------------------------------------------ requests

    @cached_property
    def bodies(self) -> list[bytes]:
        """The pool, one JSON body a request."""
        with self.requests.open("rb") as lines:
            pool = list(islice((line.strip() for line in lines if line.strip()), POOL // 10 if self.is_quick else POOL))
        if not pool:
            raise RuntimeError(f"{self.requests}: no requests in it")
        return pool

    def bodies_with(self, **fields: Any) -> list[bytes]:
        """The pool with these fields in each request."""
        return [json.dumps(json.loads(body) | fields).encode() for body in self.bodies]

    def seconds(self, whole: float) -> float:
        """The length of a run: a fifth of it, but five seconds, in a quick one."""
        return max(min(whole, 5.0), whole / 5) if self.is_quick else whole

    # ----------------------------------------------------------------------------------- servers and load

    @contextlib.contextmanager
    def service(self, bundle: Path | None = None, workers: int | None = None, **settings: Any) -> Iterator[Server]:
        """A ready service on `bundle`, settings by name; `log` is where its output goes."""
        settings = {name: value if name == "log" else str(value) for name, value in settings.items()}
        settings.setdefault("SLA_MS", str(SLA_S * 1e3))
        with launch.service(bundle or self.bundle, workers or self.workers, **settings) as server:
            yield server

    @contextlib.contextmanager
    def load(
        self, server: Server, due_s: Floats, bodies: Sequence[bytes] | None = None, *, keeps_alive: bool = True
    ) -> Iterator[Generator]:
        """A generator at work; ended when the block fails."""
        generator = Generator(Attack(server.port, bodies or self.bodies, due_s, keeps_alive=keeps_alive))
        try:
            yield generator
        except BaseException:
            generator.stop()
            raise

    def attack(self, server: Server, due_s: Floats, bodies: Sequence[bytes] | None = None) -> Observed:
        """Load, to its end."""
        with self.load(server, due_s, bodies) as generator:
            return generator.result()

    # ------------------------------------------------------------------------------------------- capacity

    @cached_property
    def full_rate(self) -> float:
        """Requests a second: the highest rate at the whole width with p99 <= 50 ms."""
        seconds, within = (3.0, 0.2) if self.is_quick else (10.0, 0.05)
        with self.service() as server:
            return capacity.find(server, lambda due_s: self.attack(server, due_s), seconds, self.say, within=within)

    @property
    def half(self) -> float:
        return self.full_rate / 2

    # ----------------------------------------------------------------------------------------- references

    def references(self, bundle: Path) -> tuple[str, list[Reference]]:
        """The name of the bundle's generation, and its full answer to each request of the pool, all it re-ranks."""
        if bundle not in self._references:
            self.say(f"  the full answers of {bundle.name} …")
            with self.service(bundle) as server:
                self._references[bundle] = self.full_answers(server)
        return self._references[bundle]

    def full_answers(self, server: Server) -> tuple[str, list[Reference]]:
        """Raises RuntimeError if one is degraded: then there is no reference."""
        first = server.rank(self.bodies_with(timeout_ms=UNHURRIED_MS)[0])
        wanted = first["coverage"]["wanted"]
        full: list[Reference] = []
        for body in self.bodies_with(timeout_ms=UNHURRIED_MS, k=wanted):
            answer = server.rank(body)
            if answer["degraded"]:
                raise RuntimeError(f"degraded without load: {answer['degraded']}")
            items = answer["items"]
            full.append(Reference(tuple(i["id"] for i in items), np.array([i["score"] for i in items], np.float32)))
        return first["generation"], full


# ------------------------------------------------------------------------------------- what rows are made of


def sleep_until(generator: Generator, at_s: float) -> None:
    """Until this many seconds of the run have passed."""
    time.sleep(max(0.0, generator.started_at + at_s - time.monotonic()))


def failed(seen: Observed) -> Figure:
    """Requests without a 200: none may be."""
    return Figure("failed", float((~seen.is_ok).sum()), most=0)


def p99(seen: Observed) -> Figure:
    return Figure("p99", seen.percentile_s(99) * 1e3, most=SLA_S * 1e3, unit="ms")


def coverage(seen: Observed, least: float, after_s: float = 0.0) -> Figure:
    """The mean over what was due from `after_s` on."""
    name = "mean coverage" + (f" from {after_s:g} s on" if after_s else "")
    part = seen.coverage[(seen.due_s >= after_s) & seen.is_ok]
    return Figure(name, float(part.mean()) if len(part) else float("nan"), least=least)


def row(fault: str, seen: Observed, *figures: Figure, recovery_s: float | None = None) -> Row:
    """A row over one run."""
    return Row(fault, figures, summary(seen, SLA_S), recovery_s)
