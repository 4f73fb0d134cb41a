"""The keys file and what a key may do."""

import hashlib

import pytest

from app.errors import NotAllowed, NotAuthenticated
from app.keys import read_keys, require_key
from app.settings import SettingsError

RANKER, BOTH = "ranker", "both"


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


@pytest.fixture
def keys(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"# a comment\n\n{digest(RANKER)}  rank  search team\n  {digest(BOTH).upper()}\trank,events\n")
    return read_keys(file)


def test_a_known_key_with_the_right_passes(keys):
    require_key(keys, f"Bearer {RANKER}", "rank")
    require_key(keys, f"bearer  {BOTH}", "events")


def test_a_key_beyond_ascii_is_the_bytes_that_were_sent(tmp_path):
    (tmp_path / "keys").write_text(f"{hashlib.sha256('schlüssel là'.encode()).hexdigest()} rank")
    sent = f"Bearer {'schlüssel là'}".encode().decode("latin-1")  # as Starlette reads a header
    require_key(read_keys(tmp_path / "keys"), sent, "rank")


@pytest.mark.parametrize("sent", [None, "", "Bearer", "Bearer ", f"Basic {RANKER}", RANKER, "Bearer no", "Bearer é"])
def test_no_key_or_an_unknown_one_is_not_authenticated(keys, sent):
    with pytest.raises(NotAuthenticated):
        require_key(keys, sent, "rank")


def test_the_digest_itself_opens_nothing(keys):
    with pytest.raises(NotAuthenticated):
        require_key(keys, f"Bearer {digest(RANKER)}", "rank")


def test_a_key_without_the_right_is_not_allowed(keys):
    with pytest.raises(NotAllowed, match="events"):
        require_key(keys, f"Bearer {RANKER}", "events")


def test_without_a_file_everybody_may_do_everything():
    keys = read_keys(None)
    assert keys is None
    require_key(keys, None, "rank")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "holds no key"),
        ("# only a comment\n", "holds no key"),
        ("secret rank", "line 1: starts with no SHA-256 digest"),
        (f"\n{'g' * 64} rank", "line 2: starts with no SHA-256 digest"),
        (f"{'a' * 64}", "line 1: rights must be of rank, events"),
        (f"{'a' * 64} rank,admin", "line 1: rights must be of rank, events"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused_by_line(tmp_path, text, why):
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(SettingsError, match=why):
        read_keys(file)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(SettingsError, match=r"WINNOW_API_KEYS_FILE=.*No such file"):
        read_keys(tmp_path / "keys")


def test_a_file_that_is_not_text_is_refused(tmp_path):
    file = tmp_path / "keys"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingsError, match="WINNOW_API_KEYS_FILE"):
        read_keys(file)
