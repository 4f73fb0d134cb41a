"""The options that every command of the lab has, and how they become a target and bodies.

What is wrong with one ends the program with 2 and a line that names the option and what is allowed.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from loadtest.arrivals import MOST_ARRIVALS
from loadtest.lab import bodies
from loadtest.lab.target import Target, host_and_port, read_key, started
from loadtest.observed import Floats

MOST_REQUESTS = MOST_ARRIVALS  # of a run, whatever is asked: some 500 bytes of memory each


def number(
    least: float, most: float = math.inf, *, is_whole: bool = False, is_open: bool = False
) -> Callable[[str], Any]:
    """A type of argparse: a number in [least, most], or over `least` where `is_open`."""
    bound = f"over {least:,g}" if is_open else f"{least:,g} or more"
    bound += f", at most {most:,g}" if math.isfinite(most) else ""
    allowed = f"allowed is a {'whole ' if is_whole else ''}number, {bound}"

    def parse(text: str) -> float:
        try:
            value = int(text) if is_whole else float(text)
        except ValueError:
            value = math.nan
        if not (least < value if is_open else least <= value) or not value <= most or math.isinf(value):
            raise argparse.ArgumentTypeError(f"{text}: {allowed}")
        return value

    return parse


def add_target(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is attacked")
    what.add_argument("--url", help="a running service, http://HOST:PORT; without it one is started on --bundle")
    what.add_argument("--bundle", type=Path, help="what is served, and whose users ask unless --bodies names others")
    what.add_argument(
        "--workers",
        type=number(1, 1_024, is_whole=True),
        default=os.cpu_count() or 1,
        help="of a service that is started",
    )
    what.add_argument(
        "--setting",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of a service that is started, as in app/settings.py without WINNOW_",
    )
    what.add_argument("--key-file", type=Path, help="holds the API key; else the environment's WINNOW_API_KEY")
    what.add_argument("--admin", metavar="URL", help="the running service's admin port, for its quality")
    what.add_argument(
        "--pid", type=number(1, is_whole=True), help="the running service's process on this machine, for its CPU"
    )


def add_bodies(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is asked")
    what.add_argument(
        "--bodies", type=Path, metavar="FILE", help=f"JSON objects, one a line, the first {bodies.MOST:,}, in turn"
    )
    what.add_argument(
        "--zipf",
        type=number(0, 10),
        default=1.0,
        metavar="EXPONENT",
        help="of users made up from --bundle: the r-th most frequent comes ∝ r^-EXPONENT; 0: all alike (default 1)",
    )
    what.add_argument("--k", type=number(1, 1_000, is_whole=True), help="in every body")
    what.add_argument("--timeout-ms", type=number(1, 10_000), help="in every body")
    what.add_argument("--priority", choices=("low", "normal", "high"), help="in every body")
    what.add_argument("--filters", metavar="JSON", help='in every body: [{"field": …, "in": […]}, …]')
    what.add_argument("--seed", type=number(0, 2**32 - 1, is_whole=True), default=0, help="of arrivals and users")


# ------------------------------------------------------------------------------------------------ reading


def check(parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> None:
    """What can be said before anything is started."""
    if not parsed.url and not parsed.bundle:
        parser.error("--url or --bundle: one is needed, a running service or what to serve")
    if parsed.bundle and not (parsed.bundle / "manifest.json").is_file():
        parser.error(f"--bundle {parsed.bundle}: there is no manifest.json in it")
    for option, is_given in (("--admin", parsed.admin), ("--pid", parsed.pid), ("--key-file", parsed.key_file)):
        if is_given and not parsed.url:
            parser.error(f"{option}: only with --url, a service that is started here needs none")
    for setting in parsed.setting:
        if "=" not in setting or parsed.url:
            parser.error(f"--setting {setting}: allowed is NAME=VALUE, and only without --url")


@contextlib.contextmanager
def target(parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> Iterator[Target]:
    """The running service, or one that is started and ended with the block. Raises RuntimeError if it doesn't start."""
    if not parsed.url:
        settings = {"SLA_MS": f"{parsed.sla_ms:g}"} | dict(_setting(s) for s in parsed.setting)
        with started(parsed.bundle, parsed.workers, **settings) as service:
            yield service
        return
    with _named(parser, "--url"):
        host, port, path = host_and_port(parsed.url)
    with _named(parser, "--admin"):
        admin = host_and_port(parsed.admin)[:2] if parsed.admin else None
    with _named(parser, "--key-file"):
        key = read_key(parsed.key_file)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    yield Target(host, port, path or "/v1/rank", headers, admin, parsed.pid)


def asked(
    parser: argparse.ArgumentParser, parsed: argparse.Namespace, n: int, traced: list[bytes] | None = None
) -> list[bytes]:
    """n bodies or as many as there are: those of a trace, of --bodies, or made up from --bundle."""
    options = {name: value for name in ("k", "timeout_ms", "priority") if (value := getattr(parsed, name)) is not None}
    if parsed.filters:
        with _named(parser, "--filters"):
            options["filters"] = _list(parsed.filters)
    if traced:
        found = traced
    elif parsed.bodies:
        with _named(parser, "--bodies"):
            found = bodies.from_file(parsed.bodies)[:n]
    elif parsed.bundle:
        with _named(parser, "--bundle"):
            found = bodies.from_bundle(parsed.bundle, n, exponent=parsed.zipf, seed=parsed.seed)
    else:
        parser.error("--bodies or --bundle: one is needed to know what to ask")
    return bodies.with_options(found, options)


def bounded(parser: argparse.ArgumentParser, due_s: Floats, most: int) -> Floats:
    """The instants, of which there must be some and at most so many."""
    if not len(due_s):
        parser.error("--rate, --seconds: nothing is due in that time; allowed is what gives one request or more")
    if len(due_s) > most:
        parser.error(f"--most {most:,}: {len(due_s):,} requests would be sent; --most may be up to {MOST_REQUESTS:,}")
    return due_s


def described(parsed: argparse.Namespace) -> dict[str, Any]:
    """What was asked of whom, to be shown."""
    made = f"made up from {parsed.bundle}, Zipf exponent {parsed.zipf:g}"
    served = f"{parsed.bundle.name}, manifest {digest(parsed.bundle)[:12]}" if parsed.bundle else ""
    return {
        "command": shlex.join(["python", "-m", "loadtest", *sys.argv[1:]]),
        "seed": parsed.seed,
        "bundle": served,
        "service": parsed.url or f"started here, {parsed.workers} workers" + "".join(f", {s}" for s in parsed.setting),
        "bodies": str(parsed.bodies or made),
    }


def digest(bundle: Path) -> str:
    """The bundle's: SHA-256 of its manifest."""
    return hashlib.sha256((bundle / "manifest.json").read_bytes()).hexdigest()


def _list(text: str) -> list[Any]:
    said = json.loads(text)
    if not isinstance(said, list):
        raise ValueError(f"{text}: allowed is a JSON list")
    return said


@contextlib.contextmanager
def _named(parser: argparse.ArgumentParser, option: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError) as e:
        parser.error(f"{option}: {e}")


def _setting(text: str) -> tuple[str, str]:
    """NAME=VALUE; the name in any case, with or without WINNOW_."""
    name, _, value = text.partition("=")
    return name.upper().removeprefix("WINNOW_"), value
