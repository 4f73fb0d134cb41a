"""Live items: what a catalogue becomes while its generation serves, without a rebuild.

    POST /admin/items ─▶ checked ─▶ journal ─▶ this process's catalogue ─▶ every worker's, before its next job

An added item gets the next row: it is written into the room that is kept behind the item tables, and searched exactly
beside the index. A removed one keeps its row, so that histories stay what they were, and is found no more. To change an
item is to add it again: its old row goes. All processes do the same changes in the same order, or begin with what came
of them, so rows are the same. The epoch counts additions and removals. Changes belong to one generation: a new bundle
begins at epoch 0.
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

from app.bundle import HOISTED, ITEMS, NO_ROW, Generation, Ids, Room, advice
from app.errors import BundleError, ClientError, Conflict, FieldError, InvalidRequest, ServerError, require, shown
from app.features import LARGEST, ROW
from app.flow import Array, Live, sealed
from app.wire import SHOWN_ERRORS, ItemsRequest, NewItem, parse

# Of mmap(2), and not in Python's: at this address and no other; without room in the swap; the answer to a refusal.
FIXED, NO_RESERVE, FAILED = 0x10, 0x4000, ctypes.c_void_p(-1).value
PRIVATE, NOWHERE = mmap.MAP_PRIVATE | NO_RESERVE, -1  # to this process alone; where there is no file
MAY, HUGE, LARGE = mmap.PROT_READ | mmap.PROT_WRITE, 1 << 21, 1 << 31  # bytes: of a huge page, of a large table
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype, libc.munmap.argtypes = ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_size_t)
libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *3 * (ctypes.c_int,), ctypes.c_long)


def changeable(generation: Generation, room: int) -> Generation:
    """The same generation, with room for so many more rows. Untouched room takes address space, and no memory."""
    n, folder = len(generation.ids), generation.path / ITEMS
    known = {**generation.tables, "ids": generation.ids.ids}
    wide = {name: _with_room(folder / f"{name}.npy", table, room) for name, table in known.items()}
    tables = {name: sealed(table[:]) for name, table in wide.items()}
    ids = Ids(tables.pop("ids"), generation.ids.order)
    bits = np.full((n + room + 7) // 8, 255, np.uint8)
    behind = Room({name: table[n:] for name, table in wide.items()}, Live(bits=bits))
    return replace(generation, tables=tables, ids=ids, room=behind)


def _with_room(file: Path, table: Array, room: int) -> Array:
    """A table that is mapped from this file, and untouched memory behind its last row: [N + room, ...], writable.

    What is written goes to this process's own pages, never to the file. It begins where a huge page may, as other maps
    of files do: where the system keeps a file in such pages, rows are found sooner (on W1, a core that idles between
    two requests takes 2.9 ms for the kernels of one instead of 3.5, 2026-11). A large one begins elsewhere: of rows
    here and there in it two megabytes each would count as this process's.
    """
    require(table.flags.c_contiguous, f"{ITEMS}/{file.name}: must be in C order")
    offset = np.lib.format.open_memmap(file, mode="r").offset
    end, shape = offset + table.nbytes, (len(table) + room, *table.shape[1:])
    size = offset + table.itemsize * int(np.prod(shape))
    start = libc.mmap(None, size + HUGE, MAY, PRIVATE | mmap.MAP_ANONYMOUS, NOWHERE, 0)
    at = start + -start % HUGE + (mmap.PAGESIZE if end > LARGE else 0)
    with file.open("rb") as f:
        is_mapped = start != FAILED and libc.mmap(at, end, MAY, PRIVATE | FIXED, f.fileno(), 0) == at
    require(is_mapped, f"{ITEMS}/{file.name}: can't be mapped ({os.strerror(ctypes.get_errno())})")
    memory = (ctypes.c_char * size).from_address(at)
    weakref.finalize(memory, libc.munmap, start, size + HUGE)
    libc.madvise(ctypes.c_void_p(at), ctypes.c_size_t(end), advice(table))
    return np.ndarray(shape, table.dtype, memoryview(memory), offset)


class Change(NamedTuple):
    """A change that was checked: table rows by name, and "ids", [n, ...]; what is added; the epoch that it makes.

    line: the change as it is kept and sent to workers; counts: what is said of it.
    """

    columns: Mapping[str, Array]
    added: Sequence[int | str]
    after: Live
    line: bytes
    counts: dict[str, int]


def checked(generation: Generation, asked: ItemsRequest) -> Change:
    """What this asks, in the types of the tables. Raises InvalidRequest that names the field; Conflict."""
    items, schema = asked.add, generation.manifest.features
    reads_rows = any(i.table == ROW for i in (*schema.user_tower, *schema.re_ranker))
    is_open = not reads_rows and not any(name.startswith(HOISTED) for name in generation.tables)
    why = "a model reads row numbers, or values that were computed when it was packed"
    require(is_open or not items, f"this bundle can lose items but get none: {why}", Conflict)
    left = len(generation.room.tables["ids"]) - generation.live.n_added
    require(len(items) <= left, f"WINNOW_LIVE_ROOM leaves {left} more items; a new bundle makes room", Conflict)
    columns: dict[str, Any] = {n: _column(generation, n, t, items) for n, t in generation.tables.items() if items}
    wrong = [column for column in columns.values() if isinstance(column, FieldError)]
    allowed = ", ".join(names := sorted(columns.keys() - {"embedding"}))  # which has a field of its own
    fields = (f"add.{i}.tables.{name}" for i, item in enumerate(items) for name in item.tables if name not in names)
    wrong += [FieldError(field, None, f"no such table; allowed: {allowed}") for field in fields]
    if wrong:
        raise InvalidRequest(*wrong[:SHOWN_ERRORS])
    columns |= {"ids": _ids(generation, items)} if items else {}
    after, removed = _next(generation, asked)
    counts = {"epoch": after.epoch, "added": len(items), "removed": removed, "unknown": len(asked.remove) - removed}
    return Change(columns, [item.id for item in items], after, asked.model_dump_json().encode(), counts)


def _next(generation: Generation, asked: ItemsRequest) -> tuple[Live, int]:
    """The epoch that the change makes, and how many of the items to remove were there."""
    live, n = generation.live, generation.n_items
    replaced = generation.ids.rows([item.id for item in asked.add])
    known = generation.ids.rows(asked.remove)
    removed = known[(known != NO_ROW) & live.keeps(known)]
    gone, bits = np.append(removed, replaced[(replaced != NO_ROW) & live.keeps(replaced)]), live.bits.copy()
    np.bitwise_and.at(bits, gone >> 3, ~(np.uint8(1) << (gone & 7).astype(np.uint8)))
    new = {old: n + i for i, old in enumerate(replaced.tolist()) if old != NO_ROW}
    moved = {old: new.get(row, row) for old, row in live.moved.items()} | new
    n_lost = live.n_lost + int((gone < len(generation.ids)).sum())
    epoch = live.epoch + len(asked.add) + len(removed)
    return Live(epoch, live.n_added + len(asked.add), sealed(bits), n_lost, moved), len(removed)


def _ids(generation: Generation, items: Sequence[NewItem]) -> Array:
    ids: list[int | str] = [item.id for item in items]
    for i in np.flatnonzero(~generation.ids.fits(ids))[:1]:
        width = f"text of up to {generation.ids.ids.itemsize // 4} characters, none of them NUL"
        allowed = width if generation.ids.is_text else f"a whole number of type {generation.ids.ids.dtype}"
        raise InvalidRequest(FieldError(f"add.{i}.id", shown(ids[i]), allowed))
    return np.array(ids, generation.ids.ids.dtype)


def _column(generation: Generation, name: str, table: Array, items: Sequence[NewItem]) -> Array | FieldError:
    """[n, ...] in the table's own type, converted at once; where that fails, the first that is wrong, one by one."""
    is_embedding, vocab = name == "embedding", generation.vocab.get(name, {})
    values = [item.embedding if is_embedding else item.tables.get(name) for item in items]
    try:
        return _cast(values, table, vocab)
    except (ValueError, TypeError):
        for i, value in enumerate(values):
            try:
                _cast([value], table, vocab)
            except (ValueError, TypeError):
                where, size = "embedding" if is_embedding else f"tables.{name}", int(np.prod(table.shape[1:]))
                names = f", or one of {', '.join(list(vocab)[:5])}, …" if vocab else ""
                form = f"{'missing: ' if value is None else ''}{size} of type {table.dtype}{names}"
                return FieldError(f"add.{i}.{where}", shown(value), form)
        raise


def _cast(values: Sequence[Any], table: Array, vocab: Mapping[str, int]) -> Array:
    """Raises ValueError or TypeError for what the table can't hold exactly, or what is no number."""
    shape = (len(values), *table.shape[1:])
    listed = [v if isinstance(v, list) else [v] for v in values]
    if table.dtype.kind == "U":
        cast = np.array(listed, object).astype(table.dtype)
        is_held = cast.tolist() == listed  # a number became text, a long text was cut
    else:
        numbers = [[vocab.get(v) if isinstance(v, str) else v for v in row] for row in listed]  # None is NaN
        wide = np.array(numbers, np.float64).reshape(shape)
        with np.errstate(over="ignore", invalid="ignore"):
            cast = wide.astype(table.dtype)
        is_exact = (cast == wide) & (np.abs(wide) <= LARGEST["int64"])
        is_held = bool((np.isfinite(cast) if table.dtype.kind == "f" else is_exact).all())
        is_held &= not vocab or bool(np.isin(wide, [*vocab.values(), NO_ROW]).all())
    if not is_held:
        raise ValueError
    return cast.reshape(shape)


def apply(generation: Generation, change: Change) -> None:
    """Make the change: the rows first, which nobody looks at, then one reference."""
    room, first = generation.room, generation.live.n_added
    for name, column in change.columns.items():
        room.tables[name][first : first + len(column)] = column
    added = {item: generation.n_items + i for i, item in enumerate(change.added)}
    room.live = change.after  # before the ids: who finds one finds its row
    generation.ids.added |= added


def so_far(generation: Generation) -> Change:
    """All that was added and removed, as one change, to `apply` to the same generation just loaded; it has no line."""
    n = generation.live.n_added
    columns = {name: table[:n] for name, table in generation.room.tables.items()}
    return Change(columns, columns["ids"].tolist(), generation.live, b"", {})


# ------------------------------------------------------------------------------------------- journal


class Journal(NamedTuple):
    """The changes of one generation, a JSON line each, on disk before they are acknowledged. file: None keeps none."""

    file: Path | None

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
                if torn:
                    f.truncate(f.tell() - len(torn))
            folder = os.open(self.file.parent, os.O_RDONLY)
            os.fsync(folder)  # or a file that is new may be gone after a power cut
            os.close(folder)
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


def replay(generation: Generation, lines: Iterable[bytes], where: str = "a worker's items") -> None:
    """Make changes that were checked once. Raises BundleError for what doesn't fit this generation any more."""
    for number, line in enumerate(lines, 1):
        try:
            apply(generation, checked(generation, parse(line, ItemsRequest)))
        except ClientError as e:
            raise BundleError(f"{where}: change {number}: {e}") from e
