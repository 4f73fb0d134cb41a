"""A made-up world of any size, on disk: items, people, what they chose, and requests, all after one hidden truth.

    clusters ─▶ items: latent vector ─▶ content, features, attributes
             └▶ people: taste ─▶ history, later choices ─▶ requests            (what is liked: truth.py)

Items stand in clusters of Zipf sizes, popularity is Zipf's again; a person's taste lies between one to three clusters,
and the history is what was chosen, by the truth, of what such a person comes across. Everything is drawn in blocks
straight to disk, so memory holds a few numbers an item. The same world and seed give the same files. Ids don't depend
on the seed: bundles of two seeds answer the same requests, about different worlds. It is over 250 lines because items,
people and requests are one world, drawn from one seed.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from app.bundle import NO_ROW
from models.stand_ins import FEATURES, HISTORY, MOMENT, TOLD_APART, real, stored
from models.truth import LATENT, Truth

Array = NDArray[Any]
Floats = NDArray[np.float32]
Rows = NDArray[np.int64]
Say = Callable[[str], None]

RETRIEVE, RERANK, K = 2_000, 500, 20  # widths; a small catalogue has a tenth of it, and a quarter of that
N_NEWCOMERS = 20  # one request in so many is from somebody nothing is known of
MOST_PEOPLE = 100_000
POPULAR = 10_000  # rows of the fallback list
SMALL_TYPES = 4_000_000  # items, from which on tables are f16: what matters then is memory
LEAST_TYPES = 20_000_000  # from which on features are i8: 3 GB less at a hundred million, beside 12 of embeddings

BLOCK = 262_144  # items drawn at a time: 64 MB at d = 64
PEOPLE_BLOCK = 1_024
MOST_CLUSTERS, PER_CLUSTER = 1_000, 100  # clusters; fewer when a cluster would have fewer items than this
CLUSTER_ZIPF, POPULARITY_ZIPF, PEOPLE_ZIPF = 0.8, 0.9, 0.8  # exponents
N_CATEGORIES = 40
SPREAD = 0.5  # length of what an item differs from its cluster's centre by, whose length is 1
BLURRED = 0.1  # spread of what is added to each number of an item's content: what can't be known of it
CONTENT = 32  # numbers of an item's content, which the item tower reads and no other model
MIXED = (0.6, 0.3, 0.1)  # of a person's clusters
MET = 160  # items that a person comes across: the history is the best of them, choices come from the rest
LEAST_CHOICES, MOST_CHOICES_EACH = 20_000, 25


@dataclass(frozen=True)
class World:
    """How large, of which seed, and where its source folder is."""

    n: int
    d: int
    seed: int
    folder: Path
    hidden: tuple[int, ...]

    def rng(self, *stream: int | str) -> np.random.Generator:
        """A generator of its own for each thing that is drawn."""
        return np.random.default_rng([self.seed, *b" ".join(str(s).encode() for s in stream)])

    @cached_property
    def truth(self) -> Truth:
        return Truth.drawn(self.rng("truth"))

    @cached_property
    def n_people(self) -> int:
        return min(MOST_PEOPLE, self.n // 10)

    @cached_property
    def n_clusters(self) -> int:
        return min(MOST_CLUSTERS, self.n // PER_CLUSTER)

    @cached_property
    def centres(self) -> Floats:
        return unit(self.rng("centres").standard_normal((self.n_clusters, LATENT)))

    @property
    def table_type(self) -> type[np.floating[Any]]:
        return np.float32 if self.n < SMALL_TYPES else np.float16

    @property
    def features_type(self) -> type[np.generic]:
        return self.table_type if self.n < LEAST_TYPES else np.int8

    @cached_property
    def widths(self) -> tuple[int, int]:
        """Retrieval's and re-ranking's."""
        retrieve = min(RETRIEVE, self.n // 10)
        return retrieve, min(RERANK, retrieve // 4)

    def save(self, name: str, array: Array) -> Array:
        """Write an array into the source folder. Returns it."""
        np.save(self.folder / f"{name}.npy", array)
        return array

    def create(self, name: str, dtype: type[np.generic], *shape: int) -> Array:
        """An array in the source folder, to be filled."""
        return open_memmap(self.folder / f"{name}.npy", "w+", dtype, shape)

    def open(self, name: str) -> Array:
        """A view of an array that was written."""
        return np.asarray(np.load(self.folder / f"{name}.npy", mmap_mode="r"))

    def blocks(self) -> list[slice]:
        """The items, some at a time."""
        return [slice(start, min(start + BLOCK, self.n)) for start in range(0, self.n, BLOCK)]


@dataclass(frozen=True, slots=True)
class Choices:
    """What people chose later, in columns: person i64[c] by row, moment f32[c, 8], item i64[c]."""

    person: Rows
    moment: Floats
    item: Rows


def draw(world: World, say: Say) -> Choices:
    """Write items and people. Returns what the people chose after their histories."""
    cluster = draw_items(world, say)
    choices = draw_people(world, cluster, say)
    say(f"people: {world.n_people:,}, with histories of 1 to {HISTORY} items and {len(choices.item):,} later choices")
    return choices


def unit(x: Array) -> Floats:
    return np.asarray(x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-9), np.float32)


def zipf(n: int, exponent: float) -> NDArray[np.float64]:
    """Probabilities [n] that fall with the rank to this power."""
    weights = (1.0 + np.arange(n)) ** -exponent
    return np.asarray(weights / weights.sum())


# ------------------------------------------------------------------------------------------- items


def draw_items(world: World, say: Say) -> NDArray[np.int16]:
    """Write everything of the items but their embeddings. Returns the cluster of each, i16[N]."""
    n, rng = world.n, world.rng("items")
    rank = rng.permutation(n)  # 0 is the most popular
    popularity = -POPULARITY_ZIPF * np.log1p(rank)
    popularity -= popularity.mean()
    world.save("log_popularity", popularity.astype(np.float32))
    world.save("popular", np.argsort(rank)[:POPULAR])
    world.save("item_ids", 1_000_000 + np.random.default_rng(n).permutation(n))
    shapes = {"latent": LATENT, "content": CONTENT, "features": FEATURES}
    types = {"latent": np.float16, "content": np.float16, "features": world.features_type}
    wide = {name: world.create(name, types[name], n, width) for name, width in shapes.items()}
    narrow = {"quality": np.float32, "price": np.float32, "year": np.int16, "cluster": np.int16}
    columns: dict[str, Array] = {column: np.empty(n, dtype) for column, dtype in narrow.items()}
    drawn_block = _block_drawer(world)
    for number, part in enumerate(world.blocks()):
        drawn = drawn_block(number, popularity[part])
        for name, values in (wide | columns).items():
            values[part] = drawn[name]
        say(f"items: {part.stop:,} of {n:,}")
    cluster = columns.pop("cluster")
    for column, values in columns.items():
        world.save(column, values)
    world.save("category", cluster % N_CATEGORIES)
    vocab = {f"category-{number:02d}": number for number in range(N_CATEGORIES)}
    (world.folder / "category.json").write_text(json.dumps(vocab))
    return cluster


def _block_drawer(world: World) -> Callable[[int, NDArray[np.float64]], dict[str, Array]]:
    """A function of a block's number and its items' log popularities → its arrays, by name.

    An item is its cluster's centre plus noise whose spread falls by the dimension, in axes turned at random: the world
    has fewer dimensions than it seems. Features that aren't told apart are bent views of it, content is a blurred one.
    """
    rng = world.rng("clusters")
    falling = 1 / np.sqrt(1 + np.arange(LATENT))
    turn = (
        np.linalg.qr(rng.standard_normal((LATENT, LATENT)))[0] * (SPREAD * falling / np.linalg.norm(falling))[:, None]
    )
    views = 2.0 * rng.standard_normal((LATENT, FEATURES - len(TOLD_APART)), np.float32)
    mixing = rng.standard_normal((LATENT, CONTENT), np.float32) / np.float32(np.sqrt(LATENT))
    share = zipf(world.n_clusters, CLUSTER_ZIPF)

    def drawn(number: int, popularity: NDArray[np.float64]) -> dict[str, Array]:
        rng, n = world.rng("block", number), len(popularity)
        cluster = rng.choice(world.n_clusters, n, p=share)
        latent = unit(world.centres[cluster] + rng.standard_normal((n, LATENT), np.float32) @ turn)
        quality, age, log_price = rng.standard_normal(n), rng.exponential(8, n), rng.standard_normal(n)
        year = np.maximum(2026 - age.astype(int), 1980)
        others = np.tanh(latent @ views + rng.standard_normal((n, views.shape[1]), np.float32))
        told = np.column_stack([np.clip(popularity, -4, 4), quality, (year - 2018.5) / 8, log_price])
        return {
            "cluster": cluster,
            "latent": latent,
            "content": latent @ mixing + BLURRED * rng.standard_normal((n, CONTENT), np.float32),
            "features": stored(np.concatenate([told, others], axis=1), world.features_type),
            "quality": quality,
            "price": np.round(np.exp(3 + 0.6 * log_price), 2),
            "year": year,
        }

    return drawn


# ------------------------------------------------------------------------------- people and requests


def draw_people(world: World, cluster: NDArray[np.int16], say: Say) -> Choices:
    """user_ids i64[U] from 1, user_history i32[U, 50] and taste f32[U, L]; what they chose afterwards.

    A person comes across popular items of three clusters. Which are chosen, now and later, the truth says: keys are
    logits plus Gumbel noise, so that the best m are m draws without replacement by what they are liked.
    """
    by_popularity = np.lexsort((-world.open("log_popularity"), cluster)).astype(np.int32)
    sizes = np.bincount(cluster, minlength=world.n_clusters)
    first = np.cumsum(sizes) - sizes
    latent, features = world.open("latent"), world.open("features")
    n_each = int(np.clip(np.ceil(LEAST_CHOICES / world.n_people), 1, MOST_CHOICES_EACH))
    history = np.full((world.n_people, HISTORY), NO_ROW, np.int32)
    taste, chosen = np.empty((world.n_people, LATENT), np.float32), list[tuple[Array, ...]]()
    for start in range(0, world.n_people, PEOPLE_BLOCK):
        people = np.arange(start, min(start + PEOPLE_BLOCK, world.n_people))
        rng, n = world.rng("people", start), len(people)
        mine = rng.choice(world.n_clusters, (n, len(MIXED)), p=sizes / world.n)
        blend = np.einsum("m,nml->nl", np.array(MIXED), world.centres[mine])
        taste[people] = unit(blend + 0.3 * unit(rng.standard_normal((n, LATENT))))
        of = np.take_along_axis(mine, rng.choice(len(MIXED), (n, MET), p=MIXED), axis=1)
        met = np.sort(by_popularity[first[of] + (rng.random((n, MET)) ** 2.5 * sizes[of]).astype(np.int64)], axis=1)
        z, told = np.asarray(latent[met], np.float32), real(features[met, : len(TOLD_APART)])
        again = np.concatenate([np.zeros((n, 1), np.bool_), met[:, 1:] == met[:, :-1]], axis=1)

        logits = world.truth.logits(taste[people, None], z, told)
        at = _chosen(logits, again, HISTORY, rng)[:, 0]
        length = np.minimum(1 + rng.exponential(20, n), HISTORY).astype(int)
        length = np.minimum(length, (~again).sum(axis=1) - 1)[:, None]
        is_in = np.arange(HISTORY) < length
        history[people] = np.where(is_in, np.take_along_axis(met, at, axis=1), NO_ROW)
        np.put_along_axis(again, np.where(is_in, at, at[:, :1]), True, axis=1)
        moment = rng.standard_normal((n, n_each, MOMENT), np.float32)
        logits = world.truth.logits(world.truth.moved(taste[people, None], moment), z, told)
        later = _chosen(logits, again, 1, rng)[..., 0]
        chosen.append(
            (np.repeat(people, n_each), moment.reshape(-1, MOMENT), np.take_along_axis(met, later, 1).ravel())
        )
        if start % (16 * PEOPLE_BLOCK) == 0:
            say(f"people: {people[-1] + 1:,} of {world.n_people:,}")
    world.save("user_history", history)
    world.save("user_ids", 1 + np.arange(world.n_people))
    world.save("taste", taste)
    person, moment, item = (np.concatenate(column) for column in zip(*chosen, strict=True))
    return Choices(person, moment, item.astype(np.int64))


def _chosen(logits: Floats, is_taken: Array, m: int, rng: np.random.Generator) -> Array:
    """Positions [n, e, m] of what is chosen by logits [n, e, c]; is_taken: bool[n, c], what can't be."""
    keys = np.where(is_taken[:, None], -np.inf, logits + rng.gumbel(size=logits.shape))
    return np.argsort(-keys, axis=-1)[..., :m]


def write_requests(world: World, stream: str, count: int, file: Path, *, is_history_sent: bool) -> None:
    """Requests in wire form, a line each: people by Zipf, random moments; a few newcomers.

    Who comes often is the same in every stream: a dozen people make a tenth of all requests, and what is measured on
    one stream is to hold for another.

    Args:
        is_history_sent: every other request sends the history instead of naming the person.
    """
    rng, ids, histories = world.rng(stream), world.open("item_ids"), world.open("user_history")
    often = world.rng("who comes often").permutation(world.n_people)
    people = often[rng.choice(world.n_people, count, p=zipf(world.n_people, PEOPLE_ZIPF))]
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
