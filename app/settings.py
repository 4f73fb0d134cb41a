"""Every tunable of the service: unit, range, default, reason. The only reader of the environment.

`WINNOW_<NAME>` sets the field <name>. What belongs to the models, as widths do, is in the
bundle's manifest instead, and what the wire format allows at most is in `Limits`, since the published schema holds it.
"""

import ipaddress
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


class SettingsError(ValueError):
    """An environment variable that can't be used; the message names it and what is allowed."""


class Limits:
    """The most that one request may hold, and when it is large. Constants: they are part of the OpenAPI document."""

    LARGE_BODY = 4_096  # bytes, some hundreds of ids: what is longer takes over a millisecond and goes to a thread
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
    ADDED = 100  # items at once: each worker is held up to parse and check them, on W1 for 2.2 and 4.3 ms (2026-11)
    REMOVED = 10_000


def tunable(default: Any, why: str, *, low: float | None = None, high: float | None = None) -> Any:
    """A field with its reason and its range (inclusive)."""
    return Field(default, description=why, ge=low, le=high)


class Settings(BaseModel):
    """What one process runs with. Seconds inside; milliseconds only where the name says so."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bundle: Path = tunable(Path("bundle"), "directory of the bundle to serve")
    host: str = tunable("127.0.0.1", "address of the ranking port; beyond loopback only with API keys")
    port: int = tunable(8000, "ranking port; 0 lets the system choose", low=0, high=65535)
    admin_host: str = tunable("127.0.0.1", "address of the admin port: metrics, generations")
    admin_port: int = tunable(8001, "admin port; 0 lets the system choose", low=0, high=65535)
    workers: int = tunable(os.cpu_count() or 1, "processes that search and rank, one core each", low=1, high=256)
    spares: int = tunable(1, "warm processes that take over when a worker dies", low=0, high=16)
    sla_ms: float = tunable(100.0, "a request's time unless it names its own", low=1, high=Limits.TIMEOUT_MS)
    reply_reserve_ms: float = tunable(8.0, "kept for the answer, which may wait for the event loop", low=0, high=1e3)
    max_inflight: int = tunable(256, "most requests in the funnel; from 3 tenths on it narrows", low=1, high=10_000)
    receive_s: float = tunable(5.0, "time for a client to send a request; slower ones are cut off", low=0.1, high=600)
    drain_s: float = tunable(10.0, "how long a stop waits for requests in flight", low=0, high=600)
    # So that clients close their idle connections themselves.
    linger_s: float = tunable(0.5, "how long a stop goes on answering 503", low=0, high=60)
    live_room: int = tunable(10_000, "items that can be added while a generation serves", low=0, high=100_000)
    live_journal: Path | None = tunable(None, "directory that keeps additions and removals over a restart")
    # Stands in for an accelerator in load tests.
    paced_row_ms: float = tunable(0.0, "a row takes a worker at least this long, waiting", low=0, high=1e3)
    api_keys_file: Path | None = tunable(None, "SHA-256 digests of API keys with their rights")
    log_level: Literal["debug", "info", "warning", "error"] = tunable("info", "what is said at least")

    @model_validator(mode="after")
    def _is_closed_or_has_keys(self) -> "Settings":
        for name in () if self.api_keys_file else ("host", "admin_host"):
            if not is_loopback(at := getattr(self, name)):
                raise ValueError(f"WINNOW_{name.upper()}={at}: without WINNOW_API_KEYS_FILE only loopback will do")
        return self


def is_loopback(host: str) -> bool:
    """True for addresses that only this machine reaches."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # another name: where it leads is not ours to say
        return False


def from_environment(environ: Mapping[str, str] = os.environ) -> Settings:
    """Settings from WINNOW_* variables. Raises SettingsError that names the variable."""
    known = {f"WINNOW_{name.upper()}": name for name in Settings.model_fields}
    sent = {known.get(name, name): value for name, value in environ.items() if name.startswith("WINNOW_")}
    for name in [name for name, value in environ.items() if name.startswith("WINNOW_") and not value]:
        raise SettingsError(f"{name}='': is empty; leave it out to have the default")
    try:
        return Settings.model_validate_strings(sent)
    except ValidationError as e:
        first = e.errors()[0]
        if first["type"] == "extra_forbidden":
            raise SettingsError(f"{first['loc'][0]}: no such setting; allowed are {', '.join(known)}") from e
        where = "".join(f"WINNOW_{str(part).upper()}={first['input']!r}: " for part in first["loc"])
        raise SettingsError(where + first["msg"].removeprefix("Value error, ")) from e
