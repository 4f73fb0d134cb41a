"""Every tunable of the service: unit, range, default, reason. The only reader of the environment.

`WINNOW_<NAME>` sets the field <name>. What belongs to the models (widths, budgets) is in the bundle's
manifest instead, and what the wire format allows at most is in `Limits`, since the published schema holds it.
"""

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any


class SettingsError(ValueError):
    """An environment variable that can't be used; the message names it and what is allowed."""


class Limits:
    """The most that one request may hold. Constants: they are part of the OpenAPI document."""

    BODY_BYTES = 1 << 20  # 10,000 candidates with features are 600 kB
    K = 1_000
    HISTORY = 1_000  # more than any model here reads
    CANDIDATES = 10_000
    EXCLUDE = 10_000
    FILTERS = 16
    FILTER_VALUES = 1_000
    FEATURES = 256
    FEATURE_LENGTH = 4_096  # numbers in one list-valued feature
    ID_LENGTH = 256
    TIMEOUT_MS = 10_000


LOG_LEVELS = ("debug", "info", "warning", "error")


def tunable(default: Any, why: str, *, low: float | None = None, high: float | None = None) -> Any:
    """A field with its reason and its range (inclusive)."""
    return field(default=default, metadata={"why": why, "low": low, "high": high})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What one process runs with. Seconds inside; milliseconds only where the name says so."""

    bundle: Path = tunable(Path("bundle"), "directory of the bundle to serve")
    host: str = tunable("127.0.0.1", "address of the ranking port; beyond loopback only with API keys")
    port: int = tunable(8000, "ranking port; 0 lets the system choose", low=0, high=65535)
    admin_host: str = tunable("127.0.0.1", "address of the admin port: metrics, generations")
    admin_port: int = tunable(8001, "admin port; 0 lets the system choose", low=0, high=65535)
    workers: int = tunable(os.cpu_count() or 1, "processes that search and rank, one core each", low=1, high=256)
    spares: int = tunable(1, "warm processes that take over when a worker dies", low=0, high=16)
    sla_ms: float = tunable(100.0, "a request's time unless it names its own", low=1, high=Limits.TIMEOUT_MS)
    reply_reserve_ms: float = tunable(8.0, "kept for the answer, which may wait for the event loop", low=0, high=1e3)
    max_inflight: int = tunable(256, "most requests in the funnel; admission finds the fewer", low=1, high=10_000)
    receive_s: float = tunable(5.0, "time for a client to send a request; slower ones are cut off", low=0.1, high=600)
    drain_s: float = tunable(10.0, "how long a stop waits for requests in flight", low=0, high=600)
    # So that clients close their idle connections themselves.
    linger_s: float = tunable(0.5, "how long a stop goes on answering 503", low=0, high=60)
    # Stands in for an accelerator in load tests.
    paced_row_ms: float = tunable(0.0, "a row takes a worker at least this long, waiting", low=0, high=1e3)
    api_keys_file: Path | None = tunable(None, "SHA-256 digests of API keys with their rights")
    log_level: str = tunable("info", "what is said at least: " + ", ".join(LOG_LEVELS))

    def __post_init__(self) -> None:
        for f in fields(self):
            value, low, high = getattr(self, f.name), f.metadata["low"], f.metadata["high"]
            if low is not None and not low <= value <= high:
                raise SettingsError(f"WINNOW_{f.name.upper()}={value}: allowed is {low:g} to {high:g}")
        if self.log_level not in LOG_LEVELS:
            raise SettingsError(f"WINNOW_LOG_LEVEL={self.log_level}: allowed is {', '.join(LOG_LEVELS)}")
        for name in () if self.api_keys_file else ("host", "admin_host"):
            if not is_loopback(at := getattr(self, name)):
                raise SettingsError(f"WINNOW_{name.upper()}={at}: without WINNOW_API_KEYS_FILE only loopback will do")


def is_loopback(host: str) -> bool:
    """True for addresses that only this machine reaches."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # another name: where it leads is not ours to say
        return False


def from_environment(environ: Mapping[str, str] | None = None) -> Settings:
    """Settings from WINNOW_* variables. Raises SettingsError that names the variable."""
    environ = os.environ if environ is None else environ
    known = {f"WINNOW_{f.name.upper()}": f for f in fields(Settings)}
    chosen: dict[str, Any] = {}
    for name in sorted(n for n in environ if n.startswith("WINNOW_")):
        if name not in known:
            raise SettingsError(f"{name}: no such setting; allowed are {', '.join(known)}")
        kind = known[name].type
        parse = kind if kind in (int, float, str) else Path
        try:
            chosen[known[name].name] = parse(environ[name])
        except ValueError as e:
            raise SettingsError(f"{name}={environ[name]!r}: allowed is {parse.__name__}") from e
    return Settings(**chosen)
