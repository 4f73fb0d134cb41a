"""The manifest: what a bundle says of itself, and whether its files are those that the manifest lists.

It owns manifest.json's schema, its reading, and the verification of files: each is listed with its size and
SHA-256, no file is there that isn't, no link or path leaves the directory, and only plain files are opened. What is
in the arrays, the index and the graphs is bundle.py's. Each refusal is one sentence that names the file
(`BundleError`).
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError, model_validator

from app.errors import BundleError, require
from app.features import FeatureSchema, Strict
from app.flow import Scores

MANIFEST = "manifest.json"
MANIFEST_BYTES = 64 * 2**20  # at most: room for 400,000 files at ~160 bytes an entry
UNREADABLE = ("can't be read", (OSError,))  # why, and the faults: a file that the system keeps from us
# What content that no check foresaw makes numpy and Python raise.
UNFORESEEN = (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError)


class FileEntry(Strict):
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    size: int = Field(ge=0)


class Recall(Strict):
    """What the index reaches against exact search, measured by `pack` on sample requests."""

    target: float
    reached: float
    at: int
    n_queries: int


# kind, of a scalar quantiser without its bits → FAISS's name of the class (its beginning); kind → parameter of a search
INDEX_CLASSES = {"flat": "IndexFlat", "hnsw": "IndexHNSW", "ivf_sq": "IndexIVFScalarQuantizer", "ivf_pq": "IndexIVFPQ"}
SEARCH = {"flat": set[str](), "hnsw": {"efSearch"}, "ivf_sq8": {"nprobe"}, "ivf_sq4": {"nprobe"}, "ivf_pq": {"nprobe"}}


class Retriever(Strict):
    """An index over the item embeddings and the tower that makes its queries.

    n: catalogue size. search: parameters of the index kind (nprobe, efSearch). overfetch: how many times
    the width is fetched before the exact re-scoring from the embedding table; 1 for exact indexes. sampled: into how
    many parts the rows of an inverted file are cut, whose first tells how near an item must be (stages/retrieval.py);
    0: none does. Each list has its rows in order then.
    """

    name: str
    kind: Literal["flat", "hnsw", "ivf_sq8", "ivf_sq4", "ivf_pq"]
    tower: str = "user_tower.onnx"
    index: str = "index.faiss"
    n: int = Field(ge=1)
    search: dict[Literal["nprobe", "efSearch"], Annotated[int, Field(ge=1, le=65_536)]] = Field(default_factory=dict)
    overfetch: float = Field(default=1.0, ge=1.0, le=1_000.0)
    sampled: int = Field(default=0, ge=0, le=1_000)
    recall: Recall

    @model_validator(mode="after")
    def _has_its_parameters(self) -> "Retriever":
        needed = SEARCH[self.kind]
        fits = set(self.search) == needed and (not self.sampled or self.kind.startswith("ivf_sq"))
        require(fits, f"kind {self.kind} has the parameters {needed or 'none'}; `sampled` is for ivf_sq", ValueError)
        return self


class FunnelConfig(Strict):
    """Widths in candidates; k when a request names none."""

    retrieve: int = Field(default=500, ge=1, le=100_000)
    rerank: int = Field(default=100, ge=1, le=10_000)
    k: int = Field(default=10, ge=1, le=1_000)
    exclude_history: bool = False


def rises(values: tuple[float, ...]) -> bool:
    """Whether each of them is more than the one before."""
    return bool(np.all(np.diff(values) > 0))


class Knots(Strict):
    """A rising piecewise-linear function; beyond its ends it goes on with the slope of the end pieces."""

    x: tuple[float, ...] = Field(min_length=2)
    y: tuple[float, ...] = Field(min_length=2)

    @model_validator(mode="after")
    def _rises(self) -> "Knots":
        is_rising = len(self.x) == len(self.y) and rises(self.x) and rises(self.y)
        require(is_rising, "calibration knots must be as many x as y, strictly rising", ValueError)
        return self

    @cached_property
    def inverse(self) -> "Knots":
        """The function that leads back."""
        return Knots(x=self.y, y=self.x)

    @cached_property
    def _columns(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        return np.asarray(self.x, np.float64), np.asarray(self.y, np.float64)

    def __call__(self, scores: Scores) -> Scores:
        """f32[n] on this scale → f32[n] on the re-ranker's; keeps the order; NaN stays NaN."""
        x, y = self._columns
        at = np.clip(np.searchsorted(x, scores), 1, len(x) - 1)
        slope = (y[at] - y[at - 1]) / (x[at] - x[at - 1])
        return np.asarray(y[at - 1] + slope * (scores - x[at - 1]), np.float32)


class Calibration(Strict):
    """Earlier scores → the re-ranker's scale, fitted by `pack` on at least 200 sample requests.

    typical_retrieval_score: the median over what retrieval finds; stands in where the tower failed.
    """

    retrieval: Knots
    preranking: Knots
    typical_retrieval_score: float
    n_requests: int = Field(ge=1)


class LossCurve(Strict):
    """Loss by what re-ranking missed: piecewise linear in weights · (share missing in each band), constant beyond."""

    weights: tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...]
    x: tuple[float, ...] = Field(min_length=2)
    y: tuple[Annotated[float, Field(ge=0, le=1)], ...]

    @model_validator(mode="after")
    def _rises(self) -> "LossCurve":
        is_rising = len(self.x) == len(self.y) and rises(self.x) and bool(np.all(np.diff(self.y) >= 0))
        require(is_rising, "loss curves must be as many x as y, x strictly rising, y never falling", ValueError)
        return self


class LossCurves(Strict):
    """A curve for each of some shares of a stage's width, rising, the last for all of it."""

    shares: tuple[Annotated[float, Field(ge=0, le=1)], ...]
    curves: tuple[LossCurve, ...] = Field(min_length=2)


class LossTable(Strict):
    """What degraded answers lose of NDCG@k, measured by `pack`; control/loss.py reads it.

    edges: band b of the received order is the positions from edges[b] up to edges[b + 1].
    retrieval: by the share of the width that was searched. preranking: by the share that was pre-ranked.
    popular: the latter where retrieval failed. nameless: the loss when finding out who asks was late, or null.
    n_requests: all that were sampled; popular and nameless come from up to 400 of them.
    """

    k: int = Field(ge=1)
    n_requests: int = Field(ge=1)
    edges: tuple[int, ...]
    retrieval: LossCurves
    preranking: LossCurves
    popular: LossCurves
    nameless: float | None = Field(ge=0, le=1)

    @model_validator(mode="after")
    def _fits(self) -> "LossTable":
        require(self.edges[:1] == (0,) and rises(self.edges), "loss edges must rise strictly from 0", ValueError)
        for family in (self.retrieval, self.preranking, self.popular):
            is_rising = len(family.shares) == len(family.curves) and rises(family.shares)
            require(is_rising, "loss shares must rise strictly, one a curve", ValueError)
            n_weights = {len(curve.weights) for curve in family.curves}
            require(n_weights == {len(self.edges) - 1}, "loss weights must be one a band", ValueError)
        return self


class Golden(Strict):
    """A request in wire form and what it must give, to 1e-4 of score."""

    request: dict[str, Any]
    items: tuple[int | str, ...]
    scores: tuple[float, ...]


class Manifest(Strict):
    """manifest.json. `offline_metrics` is whatever the trainer measured; shown, never interpreted."""

    format_version: Literal[1]
    name: str = Field(min_length=1, max_length=100)
    version: str = Field(min_length=1, max_length=100)
    created: str
    files: dict[str, FileEntry]
    retrievers: tuple[Retriever] = Field(description="format 1 has exactly one")
    funnel: FunnelConfig
    features: FeatureSchema
    calibration: Calibration
    loss: LossTable | None = None
    offline_metrics: dict[str, Any] = Field(default_factory=dict)
    golden: tuple[Golden, ...] = ()


# --------------------------------------------------------------------------- reading and verification


def read_manifest(path: Path, digest: str | None = None) -> tuple[Manifest, str]:
    """The manifest and its SHA-256. Raises BundleError."""
    with opening(MANIFEST, *UNREADABLE):
        require(path.is_dir(), f"{path}: no such directory")
        file = path / MANIFEST
        require(file.is_file() and not file.is_symlink(), f"{MANIFEST}: missing in {path}, or not a plain file")
        size = file.stat().st_size
        require(size <= MANIFEST_BYTES, f"{MANIFEST}: has {size} bytes; allowed are {MANIFEST_BYTES}")
        raw = file.read_bytes()
    found = hashlib.sha256(raw).hexdigest()
    require(not digest or digest == found, f"{MANIFEST}: its SHA-256 is {found}, expected {digest}")
    try:
        return Manifest.model_validate_json(raw), found
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the document"
        raise BundleError(f"{MANIFEST}: {where}: {first['msg']}") from e


def verify_files(path: Path, manifest: Manifest) -> None:
    """Every file is listed, plain, of the stated size and SHA-256; nothing else is there."""
    for name in manifest.files:
        leaves = PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name
        require(not leaves, f"{MANIFEST}: the file name {name!r} leaves the bundle's directory")
    present = set(_walk(path))
    for name in sorted(set(manifest.files) ^ (present - {MANIFEST})):
        require(name in present, f"{name}: listed in the manifest but missing")
        require(name in manifest.files, f"{name}: not listed in the manifest")
    for name, entry in sorted(manifest.files.items()):
        with opening(name, *UNREADABLE):
            size = (path / name).stat().st_size
            require(size == entry.size, f"{name}: has {size} bytes, the manifest says {entry.size}")
            require(sha256(path / name) == entry.sha256, f"{name}: its SHA-256 is not the manifest's; it was changed")


def _walk(path: Path) -> Iterator[str]:
    """The names of all files, none of them opened: to open a FIFO could take for ever."""
    folders = [path]
    for folder in folders:  # grows
        with opening(folder.relative_to(path).as_posix(), *UNREADABLE):
            for file in folder.iterdir():
                name = file.relative_to(path).as_posix()
                require(not file.is_symlink(), f"{name}: is a link; a bundle has none")
                require(file.is_file() or file.is_dir(), f"{name}: is neither a file nor a directory")
                if file.is_dir():
                    folders.append(file)
                else:
                    yield name


def sha256(file: Path) -> str:
    """Hex digest of a file, read in blocks."""
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


@contextmanager
def opening(name: str, why: str, faults: tuple[type[Exception], ...] = (Exception,)) -> Iterator[None]:
    """A file that the system or a library can't open is a refused bundle. Raises BundleError that names it.

    Args:
        faults: what counts as that; by default all, since neither numpy's nor onnxruntime's exceptions have a root.
    """
    try:
        yield
    except faults as e:
        first_line, _, _ = (getattr(e, "strerror", None) or str(e)).partition("\n")
        raise BundleError(f"{name}: {why} ({first_line or type(e).__name__})") from e
