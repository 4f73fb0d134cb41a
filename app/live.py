"""Live items: what a catalogue becomes while its generation serves, without a rebuild.

    POST /admin/items ─▶ checked ─▶ journal ─▶ this process's catalogue ─▶ every worker's, before its next job

An added item gets the next row: it is written into the room that is kept behind the item tables, and searched exactly
beside the index. A removed one keeps its row, so that histories stay what they were, and is found no more. To change an
item is to add it again: its old row goes. All processes do the same changes in the same order, so rows are the same.
The epoch counts additions and removals. Changes belong to one generation: a new bundle begins at epoch 0.
"""

import ctypes
import mmap
import os
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from app.bundle import HOISTED, ITEMS, NO_ROW, Generation, Ids, Live
from app.errors import BundleError, ClientError, Conflict, FieldError, InvalidRequest, ServerError, require, shown
from app.features import ROW
from app.flow import Array, Rows, sealed
from app.wire import ItemsRequest, NewItem, parse

# Of mmap(2), and not in Python's: at this address and no other; without room in the swap; the answer to a refusal.
FIXED, NO_RESERVE, FAILED = 0x10, 0x4000, ctypes.c_void_p(-1).value
PRIVATE, NOWHERE = mmap.MAP_PRIVATE | NO_RESERVE, -1  # to this process alone; where there is no file
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype, libc.munmap.argtypes = ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_size_t)
libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *3 * (ctypes.c_int,), ctypes.c_long)


def changeable(generation: Generation, room: int) -> Generation:
    """The same generation, with room for so many more rows. Untouched room takes address space, and no memory."""
    n, folder = generation.n_items, generation.path / ITEMS
    known = {**generation.tables, "ids": generation.ids.ids} if room else {}
    wide = {name: _with_room(folder / f"{name}.npy", table, room) for name, table in known.items()}
    rooms = {name: table[n:] for name, table in wide.items()}
    tables = {name: sealed(table[:]) for name, table in wide.items()}
    if not room:
        return generation
    ids = Ids(tables.pop("ids"), generation.ids.order)
    return replace(
        generation, tables=tables, ids=ids, live=Live(n, n, rooms, np.full((n + room + 7) // 8, 255, np.uint8))
    )


def _with_room(file: Path, table: Array, room: int) -> Array:
    """A table that is mapped from this file, and untouched memory behind its last row: [N + room, ...], writable.

    What is written goes to this process's own pages, never to the file.
    """
    offset = np.lib.format.open_memmap(file, mode="r").offset
    end, shape = offset + table.nbytes, (len(table) + room, *table.shape[1:])
    size = offset + table.itemsize * int(np.prod(shape))
    may = mmap.PROT_READ | mmap.PROT_WRITE
    at = libc.mmap(None, size, may, PRIVATE | mmap.MAP_ANONYMOUS, NOWHERE, 0)
    with file.open("rb") as f:
        is_mapped = at != FAILED and libc.mmap(at, end, may, PRIVATE | FIXED, f.fileno(), 0) == at
    require(is_mapped, f"{ITEMS}/{file.name}: can't be mapped ({os.strerror(ctypes.get_errno())})")
    memory = (ctypes.c_char * size).from_address(at)
    weakref.finalize(memory, libc.munmap, at, size)
    return np.ndarray(shape, table.dtype, memoryview(memory), offset)


class Change(NamedTuple):
    """A change that was checked: table rows by name, and "ids", [n, ...]; the ids that come and go; the rows that
    these ids have now, of the removed first.
    """

    columns: Mapping[str, Array]
    added: Sequence[int | str]
    removed: Sequence[int | str]
    gone: Rows


def checked(generation: Generation, asked: ItemsRequest) -> Change:
    """What this asks, in the types of the tables. Raises InvalidRequest that names the field; Conflict."""
    items, live = asked.add, generation.live
    schema = generation.manifest.features
    reads_rows = any(i.table == ROW for i in (*schema.user_tower, *schema.re_ranker))
    is_open = not reads_rows and not any(name.startswith(HOISTED) for name in generation.tables)
    why = "a model reads row numbers, or values that were computed when it was packed"
    require(is_open or not items, f"this bundle can lose items but get none: {why}", Conflict)
    left = len(live.rooms["ids"]) - (live.n - live.n_loaded) if live.rooms else 0
    require(len(items) <= left, f"there is room for {left} more items; a new bundle makes room", Conflict)
    columns = {"ids": _ids(generation, items)} if items else {}
    for name, table in generation.tables.items() if items else ():
        columns[name] = _column(generation, name, table, items)
    for i, item in enumerate(items):
        if others := item.tables.keys() - generation.tables.keys():
            where = f"add.{i}.tables.{min(others)}"
            raise InvalidRequest(FieldError(where, None, f"no such table; allowed: {', '.join(generation.tables)}"))
    added = [item.id for item in items]
    return Change(columns, added, asked.remove, generation.ids.rows([*asked.remove, *added]))


def _ids(generation: Generation, items: Sequence[NewItem]) -> Array:
    ids = [item.id for item in items]
    for i in np.flatnonzero(~generation.ids.fits(ids))[:1]:
        raise InvalidRequest(FieldError(f"add.{i}.id", shown(ids[i]), f"an id of type {generation.ids.ids.dtype}"))
    return np.array(ids, generation.ids.ids.dtype)


def _column(generation: Generation, name: str, table: Array, items: Sequence[NewItem]) -> Array:
    """[n, ...] in the table's own type, converted at once; where that fails, one by one, to name the first."""
    is_embedding, vocab = name == "embedding", generation.vocab.get(name, {})
    values = [item.embedding if is_embedding else item.tables.get(name) for item in items]
    try:
        return _cast(values, table, vocab)
    except (ValueError, TypeError):
        for i, value in enumerate(values):
            try:
                _cast([value], table, vocab)
            except (ValueError, TypeError) as e:
                where, size = "embedding" if is_embedding else f"tables.{name}", int(np.prod(table.shape[1:]))
                names = f", or one of {', '.join(list(vocab)[:5])}, …" if vocab else ""
                form = f"{size} of type {table.dtype}{names}"
                raise InvalidRequest(FieldError(f"add.{i}.{where}", shown(value), form)) from e
        raise


def _cast(values: Sequence[Any], table: Array, vocab: Mapping[str, int]) -> Array:
    """Raises ValueError or TypeError for what the table can't hold exactly, or what is no number."""
    shape = (len(values), *table.shape[1:])
    if table.dtype.kind == "U":
        cast = np.array([v if isinstance(v, str) else None for v in values], object).astype(table.dtype)
        is_held = cast.tolist() == list(values)
    else:
        listed = [v if isinstance(v, list) else [v] for v in values]
        numbers = [[vocab.get(v) if isinstance(v, str) else v for v in row] for row in listed]  # None is NaN
        wide = np.array(numbers, np.float64).reshape(shape)
        with np.errstate(over="ignore", invalid="ignore"):
            cast = wide.astype(table.dtype)
        is_held = bool((np.isfinite(cast) if table.dtype.kind == "f" else cast == wide).all())
    if not is_held:
        raise ValueError
    return cast.reshape(shape)


def apply(generation: Generation, change: Change) -> dict[str, int]:
    """Make the change, at once for who searches meanwhile: what is counted of it."""
    live, ids = generation.live, generation.ids
    first, last = live.n, live.n + len(change.added)
    for name, column in change.columns.items():
        live.rooms[name][first - live.n_loaded : last - live.n_loaded] = column
    ids.moved |= dict.fromkeys(change.removed, NO_ROW) | dict(zip(change.added, range(first, last), strict=True))
    gone = change.gone[change.gone != NO_ROW]
    np.bitwise_and.at(live.bits, gone >> 3, ~(np.uint8(1) << (gone & 7).astype(np.uint8)))
    live.has_lost |= bool((gone < live.n_loaded).any())
    live.n = ids.n = last
    added, removed = len(change.added), int(np.sum(change.gone[: len(change.removed)] != NO_ROW))
    live.epoch += added + removed
    return {"epoch": live.epoch, "added": added, "removed": removed, "unknown": len(change.removed) - removed}


# ------------------------------------------------------------------------------------------- journal


class Journal:
    """The changes of one generation, a JSON line each, on disk before they are acknowledged. file: None keeps none."""

    def __init__(self, file: Path | None) -> None:
        self.file = file

    def read(self) -> list[bytes]:
        """All changes so far; a last line that was never whole, and so never acknowledged, is cut off.

        Raises ServerError where none could be kept.
        """
        if not self.file:
            return []
        try:
            with self.file.open("a+b") as f:
                f.seek(0)
                *lines, torn = f.read().split(b"\n")
                f.truncate(f.tell() - len(torn))
            return lines
        except OSError as e:
            raise ServerError(f"WINNOW_LIVE_JOURNAL={self.file.parent}: {e.strerror}; a directory to write to") from e

    def add(self, line: bytes) -> None:
        """Returns when it is on disk. Raises OSError, and then nothing of it is there."""
        if not self.file:
            return
        with self.file.open("ab", buffering=0) as f:
            end = f.tell()
            try:
                require(f.write(line + b"\n") > len(line), "written in part", OSError)
                os.fsync(f.fileno())
            except OSError:
                f.truncate(end)
                raise


def replay(generation: Generation, lines: Iterable[bytes]) -> None:
    """Make changes that were checked once. Raises BundleError for what doesn't fit this generation any more."""
    for number, line in enumerate(lines):
        try:
            apply(generation, checked(generation, parse(line, ItemsRequest)))
        except ClientError as e:
            raise BundleError(f"change {number} of its items: {e}") from e
