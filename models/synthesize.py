"""A made-up world of any size, packed: a bundle on which deadlines bite, and requests to load it with.

    items ─▶ people ─▶ sample requests ─▶ exact search ─▶ stand-in models ─▶ pack ─▶ bundle, requests.jsonl

Items stand in clusters of Zipf sizes, people's histories in one to three clusters, popularity is Zipf's again. The
models are stand_ins.py's. Embeddings and features are drawn in blocks straight to disk, so memory holds a few numbers
an item. The same command gives the same files (it keeps numpy to one thread: on two, products differ in the last
digit). Ids don't depend on the seed: bundles of two seeds answer the same requests, about different worlds. It is over
250 lines because items, people and requests are one world, drawn from one seed.

Embeddings are stored as f32: gathering 8,000 rows of a million × 64 and multiplying takes 0.6 ms, from f16 1.6 ms
(np.take, one thread, AVX-512, 2026-11): numpy widens f16 more slowly than memory delivers the other half.
"""

import json
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from app.bundle import NO_ROW, open_session, run_model
from app.features import Inputs, ModelInput, Tables, named_features, request_inputs
from app.flow import Candidates, Person
from models import index, stand_ins
from models.pack import check_target, pack
from models.pack_config import PackError
from models.stand_ins import FEATURES, HISTORY, MOMENT, PRE_RANKER, Found

Floats = NDArray[np.float32]
Rows = NDArray[np.int64]
Say = Callable[[str], None]

FEWEST_ITEMS = 1_000
RETRIEVE, RERANK, K = 2_000, 500, 20  # widths; a small catalogue has a tenth of it, and a quarter of that
RECALL = 0.90
N_SAMPLES = 400  # pack wants 200 or more
N_REQUESTS = 5_000
N_NEWCOMERS = 20  # one request in so many is from somebody nothing is known of
N_TAUGHT = 64  # candidates of a sample request that the stand-in models are fitted on
MOST_PEOPLE = 100_000
POPULAR = 10_000  # rows of the fallback list

BLOCK = 262_144  # items drawn at a time: 64 MB at d = 64
MOST_CLUSTERS, PER_CLUSTER = 1_000, 100  # clusters; fewer when a cluster would have fewer items than this
CLUSTER_ZIPF, POPULARITY_ZIPF, PEOPLE_ZIPF = 0.8, 0.9, 0.8  # exponents
N_CATEGORIES = 40
SPREAD = 0.7  # length of what an item differs from its cluster's centre by, whose length is 1

PACK = """name = "{name}"
version = "{seed}"
samples = "samples.jsonl"
popular = "popular.npy"

[items]
ids = "item_ids.npy"
embeddings = "embedding.npy"
[items.tables]
features = "features.npy"
log_popularity = "log_popularity.npy"
quality = "quality.npy"
category = "category.npy"
price = "price.npy"
year = "year.npy"
[items.vocab]
category = "category.json"

[users]
ids = "user_ids.npy"
history = "user_history.npy"

[user_tower]
file = "user_tower.onnx"
inputs = [
  {{name = "history", source = "history", table = "embedding", length = {history}, mask = "mask"}},
  {{name = "moment", source = "context", field = "moment", shape = [{moment}]}},
]

[re_ranker]
file = "re_ranker.onnx"
inputs = [
  {{name = "user", source = "user_embedding"}},
  {{name = "item", source = "item_embedding"}},
  {{name = "features", source = "item_table", table = "features"}},
]

[pre_ranker]
weights = "pre_ranker.npz"

[funnel]
retrieve = {retrieve}
rerank = {rerank}
k = {k}
timeout_ms = 100
exclude_history = true
"""


@dataclass(frozen=True)
class World:
    """How large, of which seed, and where its source folder is."""

    n: int
    d: int
    seed: int
    folder: Path
    hidden: tuple[int, ...] = stand_ins.HIDDEN

    def rng(self, *stream: int | str) -> np.random.Generator:
        """A generator of its own for each thing that is drawn."""
        return np.random.default_rng([self.seed, *b" ".join(str(s).encode() for s in stream)])

    @cached_property
    def n_people(self) -> int:
        return min(MOST_PEOPLE, self.n // 10)

    @cached_property
    def n_clusters(self) -> int:
        return min(MOST_CLUSTERS, self.n // PER_CLUSTER)

    @cached_property
    def widths(self) -> tuple[int, int]:
        """Retrieval's and re-ranking's."""
        retrieve = min(RETRIEVE, self.n // 10)
        return retrieve, min(RERANK, retrieve // 4)

    def save(self, name: str, array: NDArray[Any]) -> NDArray[Any]:
        """Write an array into the source folder. Returns it."""
        np.save(self.folder / f"{name}.npy", array)
        return array

    def open(self, name: str) -> NDArray[Any]:
        """A memory map of an array that was written."""
        return np.load(self.folder / f"{name}.npy", mmap_mode="r")  # type: ignore[no-any-return]


def synthesize(
    out: Path,
    n_items: int,
    *,
    d: int,
    seed: int,
    name: str,
    force: bool,
    hidden: tuple[int, ...] = stand_ins.HIDDEN,
    say: Say = print,
) -> Path:
    """Make the bundle `out` and, beside it, <out>.requests.jsonl. Returns `out`. Raises PackError.

    hidden: units of the re-ranker's hidden layers.
    """
    if len(hidden) != len(stand_ins.HIDDEN) or min(hidden) < 1:
        raise PackError(f"--hidden: is {hidden}; allowed are {len(stand_ins.HIDDEN)} numbers of units")
    if n_items < FEWEST_ITEMS or d < 2:
        raise PackError(f"--items, --dim: are {n_items:,}, {d}; allowed are {FEWEST_ITEMS:,} and 2, or more")
    check_target(out, force)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.source.", dir=out.parent) as folder:
        world = World(n_items, d, seed, Path(folder), hidden)
        cluster = draw_items(world, say)
        draw_people(world, cluster)
        say(f"people: {world.n_people:,}, with histories of 1 to {HISTORY} items")
        write_requests(world, "samples", N_SAMPLES, world.folder / "samples.jsonl", is_history_sent=True)
        retrieve, rerank = world.widths
        text = PACK.format(name=name, seed=seed, history=HISTORY, moment=MOMENT, retrieve=retrieve, rerank=rerank, k=K)
        (world.folder / "pack.toml").write_text(text)
        make_models(world, say)
        pack(world.folder / "pack.toml", out, recall=RECALL, may_hoist=False, force=force, say=say)
        requests = out.with_name(f"{out.name}.requests.jsonl")
        write_requests(world, "requests", N_REQUESTS, requests, is_history_sent=False)
        say(f"requests: {N_REQUESTS:,} in {requests}")
    return out


# ------------------------------------------------------------------------------------------- items


def draw_items(world: World, say: Say) -> NDArray[np.int16]:
    """Write everything of the items. Returns the cluster of each, i16[N]."""
    n, rng = world.n, world.rng("items")
    rank = rng.permutation(n)  # 0 is the most popular
    popularity = -POPULARITY_ZIPF * np.log1p(rank)
    popularity -= popularity.mean()
    world.save("log_popularity", popularity.astype(np.float32))
    world.save("popular", np.argsort(rank)[:POPULAR])
    world.save("item_ids", 1_000_000 + np.random.default_rng(n).permutation(n))
    embedding = open_memmap(world.folder / "embedding.npy", "w+", np.float32, (n, world.d))
    features = open_memmap(world.folder / "features.npy", "w+", np.float32, (n, FEATURES))
    cluster = np.empty(n, np.int16)
    types = {"quality": np.float32, "price": np.float32, "year": np.int16}
    columns: dict[str, NDArray[Any]] = {column: np.empty(n, dtype) for column, dtype in types.items()}
    draw = _block_drawer(world)
    for number, start in enumerate(range(0, n, BLOCK)):
        part = slice(start, min(start + BLOCK, n))
        drawn = draw(number, popularity[part])
        cluster[part], embedding[part], features[part] = drawn["cluster"], drawn["embedding"], drawn["features"]
        for column, values in columns.items():
            values[part] = drawn[column]
        say(f"items: {part.stop:,} of {n:,}")
    embedding.flush()
    features.flush()
    for column, values in columns.items():
        world.save(column, values)
    world.save("category", cluster % N_CATEGORIES)
    vocab = {f"category-{number:02d}": number for number in range(N_CATEGORIES)}
    (world.folder / "category.json").write_text(json.dumps(vocab))
    return cluster


def _block_drawer(world: World) -> Callable[[int, NDArray[np.float64]], dict[str, NDArray[Any]]]:
    """A function of a block's number and its items' log popularities → its arrays, by name.

    An item is its cluster's centre plus noise whose spread falls by the dimension, in axes turned at random: as
    learned embeddings, the world has fewer dimensions than it seems.
    """
    d, rng = world.d, world.rng("clusters")
    centres = _unit(rng.standard_normal((world.n_clusters, d)))
    falling = 1 / np.sqrt(1 + np.arange(d))
    turn = np.linalg.qr(rng.standard_normal((d, d)))[0] * (SPREAD * falling / np.linalg.norm(falling))[:, None]
    turn = turn.astype(np.float32)
    loadings = rng.standard_normal((world.n_clusters, FEATURES - len(stand_ins.TOLD_APART)))
    share = zipf(world.n_clusters, CLUSTER_ZIPF)

    def draw(number: int, popularity: NDArray[np.float64]) -> dict[str, NDArray[Any]]:
        rng, n = world.rng("block", number), len(popularity)
        cluster = rng.choice(world.n_clusters, n, p=share)
        length = 1 + 0.03 * np.clip(popularity, -3, 3)[:, None]  # the popular are a little longer
        noise = rng.standard_normal((n, d), np.float32) @ turn
        quality, age, log_price = rng.standard_normal(n), rng.exponential(8, n), rng.standard_normal(n)
        year = np.maximum(2026 - age.astype(int), 1980)
        others = np.tanh(loadings[cluster] + rng.standard_normal((n, loadings.shape[1])))
        told = np.column_stack([np.clip(popularity, -4, 4), quality, (year - 2018.5) / 8, log_price])
        return {
            "cluster": cluster,
            "embedding": _unit(centres[cluster] + noise) * length,
            "features": np.concatenate([told, others], axis=1),
            "quality": quality,
            "price": np.round(np.exp(3 + 0.6 * log_price), 2),
            "year": year,
        }

    return draw


def zipf(n: int, exponent: float) -> NDArray[np.float64]:
    """Probabilities [n] that fall with the rank to this power."""
    weights = (1.0 + np.arange(n)) ** -exponent
    return np.asarray(weights / weights.sum())


def _unit(x: NDArray[Any]) -> Floats:
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), np.float32)


# ------------------------------------------------------------------------------- people and requests


def draw_people(world: World, cluster: NDArray[np.int16]) -> None:
    """user_ids i64[U] from 1 and user_history i32[U, 50]: items of one to three clusters, the popular ones rather."""
    rng, shape = world.rng("people"), (world.n_people, HISTORY)
    by_popularity = np.lexsort((-world.open("log_popularity"), cluster)).astype(np.int32)
    sizes = np.bincount(cluster, minlength=world.n_clusters)
    first = np.cumsum(sizes) - sizes
    mine = rng.choice(world.n_clusters, (world.n_people, 3), p=sizes / world.n)
    which = np.searchsorted([0.6, 0.9], rng.random(shape))  # six in ten items are of the first cluster
    of = np.take_along_axis(mine, which, axis=1)
    place = (rng.random(shape) ** 2.5 * sizes[of]).astype(np.int64)
    history = by_popularity[first[of] + place]
    length = np.minimum(1 + rng.exponential(20, world.n_people), HISTORY).astype(int)
    history[np.arange(HISTORY) >= length[:, None]] = NO_ROW
    world.save("user_history", history)
    world.save("user_ids", 1 + np.arange(world.n_people))


def write_requests(world: World, stream: str, count: int, file: Path, *, is_history_sent: bool) -> None:
    """Requests in wire form, a line each: people by Zipf, random moments; a few newcomers.

    Args:
        is_history_sent: every other request sends the history instead of naming the person.
    """
    rng, ids, histories = world.rng(stream), world.open("item_ids"), world.open("user_history")
    people = rng.permutation(world.n_people)[rng.choice(world.n_people, count, p=zipf(world.n_people, PEOPLE_ZIPF))]
    moments = np.round(rng.standard_normal((count, MOMENT)), 3).tolist()
    with file.open("w") as lines:
        for number, (person, moment) in enumerate(zip(people.tolist(), moments, strict=True)):
            history = histories[person]
            user: dict[str, Any] = {"id": person + 1}
            if number % N_NEWCOMERS == N_NEWCOMERS - 1:
                user = {}
            elif is_history_sent and number % 2:
                user = {"history": ids[history[history != NO_ROW]].tolist()}
            lines.write(json.dumps({"user": user, "context": {"moment": moment}, "k": K}) + "\n")


# ------------------------------------------------------------------------------------------- models


def make_models(world: World, say: Say) -> None:
    """Write the graphs and the linear weights, fitted on what exact search finds for the sample requests."""
    rng, embedding = world.rng("models"), world.open("embedding")
    popular = np.asarray(embedding[world.open("popular")[:100]]).mean(axis=0)
    tower = stand_ins.user_tower(popular, rng)
    onnx.save(tower, world.folder / "user_tower.onnx")
    people = list(_sample_people(world))
    users = _embed(world, tower, people)
    say(f"models: {world.widths[0]:,} of {world.n:,} items for each of {len(users)} sample requests, exactly")
    found = _found(world, people, users, index.search_exactly(embedding, users, world.widths[0]))
    re_ranker = stand_ins.re_ranker(found, rng, world.hidden)
    onnx.save(re_ranker, world.folder / "re_ranker.onnx")
    session = open_session(re_ranker.SerializeToString(), "re_ranker.onnx")
    feeds = {"user": found.user, "item": found.item, "features": found.features}
    scores = np.asarray(run_model(session, feeds), np.float32).reshape(-1)
    weights, bias = stand_ins.pre_ranker(found, scores)
    np.savez(
        world.folder / "pre_ranker.npz",
        names=np.array(PRE_RANKER),
        weights=weights.astype(np.float32),
        bias=np.float32(bias),
    )
    low, middle, high = np.quantile(scores, [0.05, 0.5, 0.95])
    say(f"models: scores {low:.3f}, {middle:.3f}, {high:.3f} at 5, 50 and 95 % of {len(scores):,} candidates")


def _sample_people(world: World) -> Iterator[Person]:
    """Who the sample requests are from, as the service would resolve them."""
    ids, histories = world.open("item_ids"), world.open("user_history")
    order = np.argsort(ids)
    for line in (world.folder / "samples.jsonl").read_text().splitlines():
        request = json.loads(line)
        user = request["user"]
        stored = histories[user["id"] - 1] if "id" in user else []
        history = order[np.searchsorted(ids, user["history"], sorter=order)] if "history" in user else stored
        history = np.asarray(history, np.int64)
        moment = np.array([request["context"]["moment"]], np.float32)
        yield Person(history[history != NO_ROW], {"context.moment": moment})


def _embed(world: World, tower: onnx.ModelProto, people: list[Person]) -> Floats:
    session = open_session(tower.SerializeToString(), "user_tower.onnx")
    config = tomllib.loads((world.folder / "pack.toml").read_text())
    inputs = [ModelInput.model_validate(i) for i in config["user_tower"]["inputs"]]
    tables = {"embedding": world.open("embedding")}
    return np.concatenate([run_model(session, request_inputs(inputs, tables, person)) for person in people])


def _found(world: World, people: list[Person], users: Floats, exact: Rows) -> Found:
    """Some of each person's candidates, drawn evenly."""
    rng = world.rng("taught")
    tables: Tables = {name: world.open(name) for name in ("embedding", "features", *stand_ins.TOLD_APART)}
    parts = []
    for person, user, candidates in zip(people, users, exact, strict=True):
        rows = np.sort(rng.choice(candidates, min(N_TAUGHT, len(candidates)), replace=False))
        item = np.asarray(tables["embedding"][rows])
        given = Candidates(rows, item @ user, np.ones(len(rows), np.uint32), user)
        named = named_features(PRE_RANKER, Inputs(tables, person, given, {}))
        parts.append((np.tile(user, (len(rows), 1)), item, np.asarray(tables["features"][rows]), named))
    return Found(*(np.concatenate(column) for column in zip(*parts, strict=True)))
