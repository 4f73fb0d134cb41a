"""A team's arrays and vocabularies → the files of a bundle, each checked before it is written.

It owns what an array may be (length, type, no NaN) and where it lies in the bundle; docs/bundle.md says the same in
prose. Arrays are opened as memory maps and checked in blocks, so that a catalogue need not fit in memory.
Each refusal names the key of pack.toml.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.bundle import ITEMS, NO_ROW, USERS, VOCAB
from models.pack_config import PackConfig, PackError

Array = NDArray[Any]
NUMBERS = "float16, float32 or integers of up to 64 bits"
BLOCK = 1_000_000  # rows looked at at once
POPULAR_MOST = 100_000  # rows of the fallback list when none is given
AT_ONCE = 1 << 24  # bytes to write of what is made piece by piece, so that the system may keep them in huge pages


def write_items(config: PackConfig, draft: Path) -> int:
    """items/: ids, their order, the embeddings, the tables. Returns N. Raises PackError."""
    items = config.items
    (draft / ITEMS).mkdir()
    n = _write_ids(items.ids, "items.ids", draft / ITEMS)
    embeddings = read_array(items.embeddings, "items.embeddings")
    if embeddings.ndim != 2 or embeddings.dtype.kind != "f" or embeddings.shape[1] == 0:
        raise PackError(
            f"items.embeddings: is {embeddings.dtype} {list(embeddings.shape)}; allowed is float16 or float32, [{n}, d]"
        )
    _write(embeddings, "items.embeddings", n, draft / ITEMS / "embedding.npy")
    for name, file in items.tables.items():
        key = f"items.tables.{name}"
        _write(read_array(file, key), key, n, draft / ITEMS / f"{name}.npy", is_text_allowed=True)
    popular = np.arange(min(n, POPULAR_MOST)) if config.popular is None else read_array(config.popular, "popular")
    if popular.ndim != 1 or popular.dtype.kind not in "iu":
        raise PackError(f"popular: is {popular.dtype} {list(popular.shape)}; allowed is one axis of item rows")
    _check_rows(popular, "popular", n, lowest=0)
    if len(np.unique(popular)) != len(popular):
        raise PackError("popular: has a row twice; allowed is once")
    np.save(draft / "popular.npy", popular.astype(np.int64))
    return n


def write_users(config: PackConfig, draft: Path, n_items: int) -> None:
    """users/: ids, their order, histories, tables; nothing when there is no user table. Raises PackError."""
    users = config.users
    if users is None or users.ids is None:
        if users and (users.tables or users.history):
            raise PackError("users.ids: is missing; tables and histories need it")
        return
    (draft / USERS).mkdir()
    n = _write_ids(users.ids, "users.ids", draft / USERS)
    for name, file in users.tables.items():
        if name == "history":
            raise PackError("users.tables.history: histories go in users.history")
        key = f"users.tables.{name}"
        _write(read_array(file, key), key, n, draft / USERS / f"{name}.npy")
    if users.history is not None:
        history = read_array(users.history, "users.history")
        if history.ndim != 2 or history.dtype.kind != "i" or len(history) != n:
            raise PackError(
                f"users.history: is {history.dtype} {list(history.shape)}; allowed are integers [{n}, h], item rows"
            )
        _check_rows(history, "users.history", n_items, lowest=NO_ROW)
        for start in range(0, n, BLOCK):
            block = history[start : start + BLOCK]
            if np.any((block[:, :-1] == NO_ROW) & (block[:, 1:] != NO_ROW)):
                raise PackError("users.history: has a row after a -1; -1 may only pad the end")
        _save(history, draft / USERS / "history.npy")


def write_vocabularies(config: PackConfig, draft: Path) -> None:
    """vocab/<item table>.json and vocab/<part>.<field>.json. Raises PackError."""
    files = {name: (f"items.vocab.{name}", file) for name, file in config.items.vocab.items()}
    for name, (key, _) in files.items():
        if name not in config.items.tables:
            raise PackError(f"{key}: names no item table; allowed are {', '.join(config.items.tables) or 'none'}")
    for prefix, part in {
        "user": config.users,
        "query": config.query,
        "context": config.context,
        "candidate": config.candidate,
    }.items():
        section = "users" if prefix == "user" else prefix
        for name, file in part.vocab.items() if part else ():
            files[f"{prefix}.{name}"] = (f"{section}.vocab.{name}", file)
    if files:
        (draft / VOCAB).mkdir()
    for name, (key, file) in files.items():
        vocab = read_json(file, key)
        if not isinstance(vocab, dict) or any(type(number) is not int for number in vocab.values()):
            raise PackError(f"{key}: {file.name} must be an object of category → whole number")
        table = np.load(draft / ITEMS / f"{name}.npy", mmap_mode="r") if name in config.items.tables else None
        if table is not None and not _is_any(table, list(vocab.values())):
            raise PackError(
                f"{key}: {file.name} names none of the numbers that the table holds, such as {table.flat[0]}"
            )
        (draft / VOCAB / f"{name}.json").write_text(json.dumps(vocab, ensure_ascii=False, indent=1))


def _is_any(table: NDArray[Any], numbers: list[int]) -> bool:
    """Whether one of these stands anywhere in the table."""
    return any(np.isin(table[start : start + BLOCK], numbers).any() for start in range(0, len(table), BLOCK))


def write_pre_ranker(config: PackConfig, draft: Path) -> tuple[str, ...]:
    """pre_ranker.npz. Returns the names of its features. Raises PackError."""
    file = config.pre_ranker.weights
    try:
        with np.load(file, allow_pickle=False) as arrays:
            names, weights, bias = (arrays[name] for name in ("names", "weights", "bias"))
    except (OSError, ValueError, KeyError, EOFError) as e:
        raise PackError(f"pre_ranker.weights: {file.name} must hold names, weights and bias ({e})") from e
    if names.dtype.kind != "U" or names.ndim != 1 or weights.shape != names.shape or bias.size != 1:
        raise PackError(
            f"pre_ranker.weights: names {list(names.shape)}, weights {list(weights.shape)}, bias {list(bias.shape)}; "
            "allowed are strings [F], numbers [F] and one number"
        )
    weights, bias = weights.astype(np.float32), np.float32(bias.reshape(()))
    if not np.isfinite(weights).all() or not np.isfinite(bias):
        raise PackError("pre_ranker.weights: a weight or the bias is not finite")
    np.savez(draft / "pre_ranker.npz", names=names, weights=weights, bias=bias)
    return tuple(names.tolist())


def read_array(file: Path, key: str) -> Array:
    """A memory map. Raises PackError; an array of Python objects is one that can't be opened."""
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        hint = "; strings are stored by np.array(list_of_str)" if "object" in str(e).lower() else ""
        raise PackError(f"{key}: {file.name} is no .npy array without pickle ({e}){hint}") from e
    if not isinstance(array, np.ndarray):
        raise PackError(f"{key}: {file.name} holds several arrays; allowed is one .npy")
    return array


def read_json(file: Path, key: str) -> Any:
    """The document. Raises PackError, for NaN and Infinity too."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(file.read_text(encoding="utf-8"), parse_constant=refuse)
    except ValueError as e:
        raise PackError(f"{key}: {file.name} is not JSON ({e})") from e


def _write_ids(file: Path, key: str, folder: Path) -> int:
    ids = read_array(file, key)
    if ids.ndim != 1 or ids.dtype.kind not in "iuU" or not len(ids):
        raise PackError(
            f"{key}: is {ids.dtype} {list(ids.shape)}; allowed is one axis, not empty, of integers or "
            "fixed-width strings"
        )
    if ids.dtype.kind == "u" and ids.max() > np.iinfo(np.int64).max:
        raise PackError(f"{key}: {ids.max()} is too large; allowed are signed 64-bit integers")
    if ids.dtype.kind != "U":
        ids = ids.astype(np.int64)  # searched as they lie, without a conversion a request
    order = np.argsort(ids, kind="stable")
    ordered = ids[order]
    twice = np.flatnonzero(ordered[1:] == ordered[:-1])
    if len(twice):
        raise PackError(f"{key}: {ordered[twice[0]].item()!r} is there more than once; ids must be unique")
    _save(ids, folder / "ids.npy")
    _save(order.astype(np.int64), folder / "id_order.npy")
    return len(ids)


def _write(table: Array, key: str, n: int, to: Path, *, is_text_allowed: bool = False) -> None:
    kinds = {"f": (2, 4), "i": (1, 2, 4, 8), "u": (1, 2, 4)}
    is_text = is_text_allowed and table.dtype.kind == "U"
    if not is_text and table.dtype.itemsize not in kinds.get(table.dtype.kind, ()):
        text = " or fixed-width strings" if is_text_allowed else ""
        raise PackError(f"{key}: is {table.dtype}; allowed are {NUMBERS}{text}")
    if table.ndim == 0 or len(table) != n:
        raise PackError(f"{key}: is {list(table.shape)}; allowed is one row for each of the {n} ids")
    if table.dtype.kind == "f":
        for start in range(0, n, BLOCK):
            wrong = ~np.isfinite(table[start : start + BLOCK]).reshape(len(table[start : start + BLOCK]), -1)
            if wrong.any():
                row = start + int(np.argmax(wrong.any(axis=1)))
                raise PackError(f"{key}: row {row} is NaN or infinite; allowed are finite numbers")
    _save(table, to)


def _check_rows(rows: Array, key: str, n: int, lowest: int) -> None:
    if rows.size and (rows.min() < lowest or rows.max() >= n):
        raise PackError(f"{key}: holds {rows.min()} to {rows.max()}; allowed are item rows, {lowest} to {n - 1}")


def _save(array: Array, to: Path) -> None:
    """In C order and little-endian, so that the same numbers make the same file."""
    np.save(to, np.ascontiguousarray(array, array.dtype.newbyteorder("<")))
