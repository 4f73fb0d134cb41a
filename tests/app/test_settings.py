"""Settings from the environment: parsed, in range, and refused by name."""

from pathlib import Path

import pytest

from app.settings import Settings, SettingsError, from_environment, is_loopback


def test_an_empty_environment_gives_the_defaults():
    assert from_environment({}) == Settings()
    assert from_environment({"PATH": "/bin"}) == Settings()


def test_each_kind_of_variable_is_parsed():
    settings = from_environment(
        {
            "WINNOW_BUNDLE": "/data/b",
            "WINNOW_PORT": "9000",
            "WINNOW_SLA_MS": "50.5",
            "WINNOW_LOG_LEVEL": "debug",
            "WINNOW_API_KEYS_FILE": "/etc/keys",
        }
    )
    assert settings.bundle == Path("/data/b")
    assert settings.port == 9000
    assert settings.sla_ms == 50.5
    assert settings.log_level == "debug"
    assert settings.api_keys_file == Path("/etc/keys")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WINNOW_PORT", "http"),
        ("WINNOW_WORKERS", "2.5"),
        ("WINNOW_SLA_MS", "fast"),
        ("WINNOW_PORT", ""),
        ("WINNOW_LIVE_JOURNAL", ""),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(name, value):
    with pytest.raises(SettingsError, match=f"{name}='{value}'"):
        from_environment({name: value})


RANGES = {f"WINNOW_{n.upper()}": (f.annotation, *f.metadata) for n, f in Settings.model_fields.items() if f.metadata}


@pytest.mark.parametrize("name", RANGES)
def test_both_ends_of_a_range_are_allowed_and_what_is_beyond_is_not(name):
    kind, low, high = RANGES[name]
    for value in (low.ge, high.le):
        from_environment({name: str(kind(value))})
    for value, end in ((low.ge - 1, "greater than or equal"), (high.le + 1, "less than or equal")):
        with pytest.raises(SettingsError, match=f"{name}=.*: .* {end} to"):
            from_environment({name: str(kind(value))})


def test_every_number_has_a_range():
    numbers = [name for name, f in Settings.model_fields.items() if f.annotation in (int, float)]
    assert list(RANGES) == [f"WINNOW_{name.upper()}" for name in numbers]


def test_not_a_number_is_in_no_range():
    with pytest.raises(SettingsError, match="WINNOW_SLA_MS"):
        from_environment({"WINNOW_SLA_MS": "nan"})


def test_every_tunable_has_a_reason():
    assert all(f.description for f in Settings.model_fields.values())


def test_an_unknown_variable_is_refused():
    with pytest.raises(SettingsError, match=r"WINNOW_WORKER: no such setting; allowed are .*WINNOW_WORKERS"):
        from_environment({"WINNOW_WORKER": "2"})


def test_an_unknown_log_level_is_refused():
    with pytest.raises(SettingsError, match=r"WINNOW_LOG_LEVEL='loud': .*'debug', 'info', 'warning' or 'error'"):
        from_environment({"WINNOW_LOG_LEVEL": "loud"})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "127.evil.example", "example.org"])  # noqa: S104
def test_beyond_loopback_only_with_keys(host):
    with pytest.raises(SettingsError, match="WINNOW_API_KEYS_FILE"):
        from_environment({"WINNOW_HOST": host})
    assert from_environment({"WINNOW_HOST": host, "WINNOW_API_KEYS_FILE": "keys"}).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.10", "::1", "localhost"])
def test_loopback_needs_no_keys(host):
    assert is_loopback(host)
    assert from_environment({"WINNOW_HOST": host}).host == host
