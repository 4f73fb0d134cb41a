"""The open loop in Locust: one user spawns a greenlet at each scheduled arrival and reports the time since it was due.

    locust --headless -t 60s -H http://127.0.0.1:8000 --rate 100 --bundle models/bundles/movielens-100k

Locust's own users send, wait and send again, and a stall keeps them from sending what would have met it; here nothing
waits for an answer. `-u` has no say: the rate does. A run whose sending was late ends with exit code 1. The arrivals
and the bodies are those of `python -m loadtest attack`, which also says what the answers gave up.
"""

import itertools
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gevent
import numpy as np
from gevent.pool import Group
from geventhttpclient import HTTPClient
from locust import User, events, task

from loadtest.arrivals import poisson
from loadtest.lab.bodies import MOST, from_bundle, from_file

PATH = "/v1/rank"
MOST_RATE = 10_000  # a second: what one process could never send
MOST_OPEN = 1_024  # connections
PATIENCE_S = 15.0  # until a request without an answer is an error
STRETCH_S = 10.0  # arrivals are drawn for so long at a time
MOST_LATE_S = 0.005  # 99th percentile of our own lateness in a valid run

log = logging.getLogger(__name__)
bodies: list[bytes] = []
lateness_s: list[float] = []


@events.init_command_line_parser.add_listener
def add_options(parser: Any) -> None:
    parser.add_argument("--rate", type=float, default=10.0, help="requests a second, Poisson")
    parser.add_argument("--bodies", default="", help="JSON objects, one a line")
    parser.add_argument("--bundle", default="", help="whose users ask, by Zipf's law, unless --bodies is given")
    parser.add_argument("--seed", type=int, default=0, help="of arrivals and users")


@events.init.add_listener
def read_options(environment: Any, **_: Any) -> None:
    """The bodies, once; ends the program with 2 for what can't be used."""
    chosen, host = environment.parsed_options, urlsplit(environment.host or "http://given.later")
    try:
        if not 0 < chosen.rate < MOST_RATE or host.scheme != "http" or not host.hostname:
            raise ValueError(f"--rate {chosen.rate:g}, -H {environment.host}: allowed are over 0 and http://HOST:PORT")
        if not chosen.bodies and not chosen.bundle:
            raise ValueError("--bodies or --bundle: one is needed to know what to ask")
        made = (
            from_file(Path(chosen.bodies))
            if chosen.bodies
            else from_bundle(Path(chosen.bundle), MOST, seed=chosen.seed)
        )
    except (ValueError, OSError) as e:
        log.error("%s", e)
        sys.exit(2)
    bodies.extend(made)


class People(User):
    """All of them: the one user that Locust runs."""

    fixed_count = 1

    def on_start(self) -> None:
        where = urlsplit(self.host)
        key = os.environ.get("WINNOW_API_KEY")
        self.headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
        patience = {"connection_timeout": PATIENCE_S, "network_timeout": PATIENCE_S}
        self.client = HTTPClient(where.hostname, where.port or 80, concurrency=MOST_OPEN, **patience)
        self.open = Group()

    @task
    def arrive(self) -> None:
        """Until the test ends."""
        chosen = self.environment.parsed_options
        start = time.monotonic()
        for number, due_s in enumerate(instants(chosen.rate, chosen.seed)):
            gevent.sleep(max(0.0, start + due_s - time.monotonic()))
            self.open.spawn(self.send, bodies[number % len(bodies)], start + due_s)

    def send(self, body: bytes, due: float) -> None:
        lateness_s.append(time.monotonic() - due)
        said, why = b"", None
        try:
            answer = self.client.post(PATH, body, self.headers)
            said = bytes(answer.read())
            why = None if answer.status_code == 200 else RuntimeError(f"status {answer.status_code}")
        except Exception as e:  # whatever the client raises, it is the answer
            why = e
        self.environment.events.request.fire(
            request_type="POST",
            name=PATH,
            response_time=(time.monotonic() - due) * 1e3,
            response_length=len(said),
            exception=why,
            context={},
        )

    def on_stop(self) -> None:
        self.open.join(PATIENCE_S)
        self.client.close()


def instants(rate: float, seed: int) -> Iterator[float]:
    """Poisson arrivals without an end."""
    for stretch in itertools.count():
        yield from (poisson(rate, STRETCH_S, seed + stretch) + stretch * STRETCH_S).tolist()


@events.quitting.add_listener
def judge(environment: Any, **_: Any) -> None:
    """Say how late we were; a run that was is no measurement."""
    late_s = float(np.quantile(lateness_s, 0.99)) if lateness_s else 0.0
    log.info("sent %d, late by %.1f ms at the 99th percentile", len(lateness_s), late_s * 1e3)
    if late_s > MOST_LATE_S:
        log.error("INVALID: this run says nothing about the service, allowed are %g ms", MOST_LATE_S * 1e3)
        environment.process_exit_code = 1
