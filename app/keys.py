"""API keys: a file of SHA-256 digests with rights, so that the file itself opens nothing.

    # one key a line: digest, rights separated by commas, then a comment if wanted
    9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08  rank,events  search team

A digest is made by `printf %s "$KEY" | sha256sum`. Keys are long random strings, so plain SHA-256 is enough.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from app.errors import NotAllowed, NotAuthenticated, require
from app.settings import SettingsError

RIGHTS = ("rank", "events")


Keys = Mapping[str, frozenset[str]]  # digest → rights


def require_key(keys: Keys | None, authorization: str | None, right: str) -> None:
    """Without a file of keys everybody on loopback may do everything.

    Raises: NotAuthenticated without a known key, NotAllowed for a key without this right.
    """
    if keys is None:
        return
    scheme, _, key = (authorization or "").partition(" ")
    require(scheme.lower() == "bearer" and key != "", "send a key: Authorization: Bearer KEY", NotAuthenticated)
    # Comparing digests of what was sent leaks nothing about the keys by its timing.
    digest = hashlib.sha256(key.strip(" \t").encode("latin-1")).hexdigest()  # the bytes as they came
    require(digest in keys, "the key is not known", NotAuthenticated)
    require(right in keys[digest], f"the key lacks the right {right!r}", NotAllowed)


def read_keys(file: Path | None) -> Keys | None:
    """The rights of each key; None without a file. Raises SettingsError that names the line."""
    if file is None:
        return None
    rights: dict[str, frozenset[str]] = {}
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise SettingsError(f"WINNOW_API_KEYS_FILE={file}: {getattr(e, 'strerror', 'is not text')}") from e
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        where = f"{file}, line {number}"
        if len(words[0]) != 64 or set(words[0].lower()) - set("0123456789abcdef"):
            raise SettingsError(f"{where}: starts with no SHA-256 digest of 64 hexadecimal digits")
        held = frozenset(words[1].split(",")) if len(words) > 1 else frozenset[str]()
        if not held or held - set(RIGHTS):
            raise SettingsError(f"{where}: rights must be of {', '.join(RIGHTS)}, separated by commas")
        rights[words[0].lower()] = held
    require(bool(rights), f"{file}: holds no key", SettingsError)
    return rights
