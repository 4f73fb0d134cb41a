"""Bytes of a catalogue by kind of index, and of the service's processes. Pure, but for reading a bundle's manifest.

    flat      4 d                              the vectors
    hnsw      4 d + 4 · 2 · 32 + 12            and the links of the lowest layer, offsets, levels
    ivf_sq8   d + 8         + centroids        a byte a dimension, the row's number
    ivf_sq4   d / 2 + 8     + centroids        four bits a dimension, the row's number
    ivf_pq    d / 2 + 8     + centroids        the same, in each process its own

Centroids are 4 d a list; ivf_pq stores its codes in blocks of 32 rows, so half a block a list is empty, and has a
codebook of 64 d. Lists and kinds follow the offline half's rules (models/index.py). The tables of the bundle
come on top, a row each. All processes map the same files; what each holds for itself was measured.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from loadtest.plan.calibration import Calibration

FLAT_MOST, HNSW_MOST, SQ8_MOST, HNSW_WIDEST = 20_000, 1_000_000, 20_000_000, 500
KINDS = ("flat", "hnsw", "ivf_sq8", "ivf_sq4", "ivf_pq")
HNSW_LINKS, MOST_LISTS = 32, 16_384
BLOCK = 32  # rows
SPARES = 1  # warm worker processes beside those that work, the service's default
GIB = 2**30


def kind_for(items: int, width: int) -> str:
    """The kind of index that packing begins with for such a catalogue."""
    if items <= FLAT_MOST:
        return "flat"
    if items <= HNSW_MOST and width <= HNSW_WIDEST:
        return "hnsw"
    return "ivf_sq8" if items <= SQ8_MOST else "ivf_sq4"


def index_bytes(kind: str, items: int, d: int) -> float:
    """Of the whole index; see the table above."""
    lists = min(MOST_LISTS, 2.0 ** round(math.log2(4 * math.sqrt(items))))
    centroids = 4 * d * lists
    return {
        "flat": 4.0 * d * items,
        "hnsw": (4 * d + 4 * 2 * HNSW_LINKS + 12.0) * items,
        "ivf_sq8": (d + 8.0) * items + centroids,
        "ivf_sq4": (d / 2 + 8.0) * items + centroids,
        "ivf_pq": (d / 2 + 8.0) * items + centroids + lists * BLOCK / 2 * d / 2 + 64 * d,
    }[kind]


@dataclass(frozen=True, slots=True)
class Tables:
    """Of a bundle: bytes an item in its tables, and bytes that don't grow with the catalogue."""

    an_item: float
    fixed: float


def tables(bundle: Path) -> Tables:
    """From the sizes in the manifest."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    sizes = {name: entry["size"] for name, entry in manifest["files"].items()}
    an_item = sum(size for name, size in sizes.items() if name.startswith("items/")) / manifest["retrievers"][0]["n"]
    fixed = sum(size for name, size in sizes.items() if not name.startswith(("items/", "index.")))
    return Tables(an_item, fixed)


def machine_bytes(calibration: Calibration, of: Tables, items: int, kind: str, workers: int) -> float:
    """All of one machine: index and tables once, the processes' own for each."""
    held = calibration.memory
    files = index_bytes(kind, items, calibration.d) + of.an_item * items + of.fixed
    return files + held.main_private + (workers + SPARES) * held.worker_private
