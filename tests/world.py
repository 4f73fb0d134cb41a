"""The tiny world: 50 items in 5 groups of 10, 8 dimensions, 5 users; every right answer is arithmetic.

Item i stands in group g = i // 10 at place j = i % 10. Its embedding is (10 - j) / 10 in dimension g and
-i / 1000 in dimension 5, so that no two items tie. The user tower adds up the last 5 items of the history in the
first 5 dimensions and puts 1 in dimension 5. So a person who has seen item 20 likes 21, 22, 23, … best,
and a person nothing is known of gets 0, 1, 2, …

    retrieval score   user · item
    pre-rank score    logistic(2 · retrieval score - 0.5 · log(1 + history) + 0.1 · bid)
    re-rank score     user · item + 0.5 · (last of the history · item) + 0.1 · √bid
                      + freshness · (year - 1950) / 100 + age / 1000 + occupation / 1000

`freshness` is a field of the query, `bid` one of the candidate (a negative one makes the score NaN), `age` and
`occupation` are the user's. Year is 1950 + i. Popular are the items from the last to the first.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from app.control.deadline import Deadline
from app.flow import Query, Ranking
from app.funnel import Funnel

N, D, GROUPS, READ = 50, 8, 5, 5  # items, dimensions, groups, items of the history that models read
RETRIEVE, RERANK, K = 40, 32, 5
ITEM_IDS = 1000 + np.arange(N) * 7 % N  # another order than the rows
USER_IDS = ("ann", "bob", "cho", "dee", "eve")
HISTORIES = ((0,), (10,), (20,), (30,), (40, 41))  # rows, oldest first
AGES = (20.0, 30.0, 40.0, 50.0, 60.0)
OCCUPATIONS = {"artist": 1, "pilot": 2}
GENRE_NAMES = ("drama", "comedy", "action", "horror", "romance", "short", "long", "silent")
GENRES = {name: number for number, name in enumerate(GENRE_NAMES)}

ROW = np.arange(N)
YEAR = (1950 + ROW).astype(np.float32)
GENRE = np.stack([ROW // 10, np.where(ROW % 2 == 0, 5 + ROW % 3, -1)], axis=1).astype(np.int16)
TITLE = np.array([f"Item {i:02d}" for i in range(N)])
POPULAR = ROW[::-1].copy()


def _embeddings() -> NDArray[np.float32]:
    e = np.zeros((N, D), np.float32)
    e[ROW, ROW // 10] = (10 - ROW % 10) / 10
    e[:, GROUPS] = -ROW / 1000
    return e


EMBEDDING = _embeddings()


# -------------------------------------------------------------------------------------- right answers


def item_id(row: int) -> int:
    return int(ITEM_IDS[row])


def user_embedding(history: tuple[int, ...]) -> NDArray[np.float64]:
    user = np.zeros(D)
    user[:GROUPS] = EMBEDDING[list(history[-READ:]), :GROUPS].astype(float).sum(axis=0)
    user[GROUPS] = 1
    return user


def retrieval_scores(history: tuple[int, ...] = ()) -> NDArray[np.float64]:
    """f64[N]"""
    return EMBEDDING.astype(float) @ user_embedding(history)


def prerank_scores(history: tuple[int, ...] = (), bid: Any = 0.0) -> NDArray[np.float64]:
    """f64[N]"""
    logits = 2 * retrieval_scores(history) - 0.5 * np.log1p(len(history)) + 0.1 * np.asarray(bid)
    return 1 / (1 + np.exp(-logits))


def rerank_scores(
    history: tuple[int, ...] = (), *, freshness: float = 0, age: float = 0, occupation: int = 0, bid: Any = 0.0
) -> NDArray[np.float64]:
    """f64[N]"""
    last = EMBEDDING[history[-1]].astype(float) if history else np.zeros(D)
    scores = retrieval_scores(history) + 0.5 * EMBEDDING.astype(float) @ last + 0.1 * np.sqrt(bid)
    return scores + freshness * (YEAR - 1950.0) / 100 + age / 1000 + occupation / 1000


def best(scores: NDArray[np.float64], k: int, but: tuple[int, ...] = ()) -> list[int]:
    """The k best rows, best first, without those in `but`."""
    return [r for r in np.argsort(-scores, kind="stable").tolist() if r not in but][:k]


# --------------------------------------------------------------------------- a folder of arrays and graphs


def write_source(folder: Path, *, are_ids_text: bool = False, n_samples: int = 200) -> Path:
    """What a team brings: arrays, two graphs, sample requests, pack.toml. Returns the configuration's path."""
    folder.mkdir(parents=True, exist_ok=True)
    width = max(len(h) for h in HISTORIES)
    arrays = {
        "item_ids": np.array([f"item-{i}" for i in ITEM_IDS]) if are_ids_text else ITEM_IDS,
        "item_embeddings": EMBEDDING,
        "year": YEAR,
        "genres": GENRE,
        "title": TITLE,
        "user_ids": np.arange(1, 6) if are_ids_text else np.array(USER_IDS),
        "user_history": np.array([h + (-1,) * (width - len(h)) for h in HISTORIES], np.int32),
        "age": np.array(AGES, np.float32),
        "occupation": np.array([1, 2, 1, 2, 1]),
        "popular": POPULAR,
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    names, weights = PRE_RANKER
    np.savez(folder / "pre_ranker.npz", names=np.array(names), weights=np.array(weights, "f4"), bias=np.float32(0))
    onnx.save(user_tower(), folder / "user_tower.onnx")
    onnx.save(re_ranker(), folder / "re_ranker.onnx")
    (folder / "genres.json").write_text(json.dumps(GENRES))
    (folder / "occupation.json").write_text(json.dumps(OCCUPATIONS))
    ids = arrays["item_ids"].tolist()
    samples = [sample(number, ids) for number in range(n_samples)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    (folder / "pack.toml").write_text(PACK_TOML)
    return folder / "pack.toml"


def sample(number: int, ids: list[Any]) -> dict[str, Any]:
    """A sample request: histories of 0 to 5 items, walking through the catalogue."""
    history = [ids[(number * 11 + step * 3) % N] for step in range(number % 6)]
    return {"user": {"history": history, "features": {"age": number % 60}}, "k": K}


PRE_RANKER = (("retrieval_score", "history_log_count", "candidate.bid"), (2.0, -0.5, 0.1))

PACK_TOML = f"""
name = "tiny"
version = "1"
popular = "popular.npy"
samples = "samples.jsonl"

[items]
ids = "item_ids.npy"
embeddings = "item_embeddings.npy"
[items.tables]
year = "year.npy"
genres = "genres.npy"
title = "title.npy"
[items.vocab]
genres = "genres.json"

[users]
ids = "user_ids.npy"
history = "user_history.npy"
[users.tables]
age = "age.npy"
occupation = "occupation.npy"
[users.vocab]
occupation = "occupation.json"

[user_tower]
file = "user_tower.onnx"
inputs = [{{name = "history", source = "history", table = "embedding", length = {READ}, mask = "mask"}}]

[re_ranker]
file = "re_ranker.onnx"
inputs = [
  {{name = "user", source = "user_embedding"}},
  {{name = "item", source = "item_embedding"}},
  {{name = "history", source = "history", table = "embedding", length = {READ}}},
  {{name = "year", source = "item_table", table = "year"}},
  {{name = "bid", source = "candidate", field = "bid"}},
  {{name = "freshness", source = "request", field = "freshness"}},
  {{name = "age", source = "user_table", field = "age"}},
  {{name = "occupation", source = "user_table", field = "occupation", dtype = "int64"}},
]

[pre_ranker]
weights = "pre_ranker.npz"

[funnel]
retrieve = {RETRIEVE}
rerank = {RERANK}
k = {K}
timeout_ms = 100
exclude_history = true
"""


def user_tower() -> onnx.ModelProto:
    """history f32[1, 5, 8], mask f32[1, 5] → user f32[1, 8]"""
    shape = [1.0] * GROUPS + [0.0] * (D - GROUPS)
    nodes = [
        helper.make_node("Unsqueeze", ["mask", "two"], ["mask3"]),
        helper.make_node("Mul", ["history", "mask3"], ["seen"]),
        helper.make_node("ReduceSum", ["seen", "one"], ["total"], keepdims=0),
        helper.make_node("Mul", ["total", "groups"], ["liked"]),
        helper.make_node("Add", ["liked", "always"], ["user"]),
    ]
    return _model(
        nodes,
        inputs={"history": (1, READ, D), "mask": (1, READ)},
        output=("user", (1, D)),
        constants={
            "two": np.array([2]),
            "one": np.array([1]),
            "groups": np.array([shape], np.float32),
            "always": np.eye(D, dtype=np.float32)[[GROUPS]],
        },
    )


def re_ranker() -> onnx.ModelProto:
    """The formula at the top, one score a row."""
    nodes = [
        helper.make_node("Mul", ["user", "item"], ["u_i"]),
        helper.make_node("ReduceSum", ["u_i", "one"], ["affinity"], keepdims=0),
        helper.make_node("Gather", ["history", "zero"], ["last"], axis=1),
        helper.make_node("Mul", ["last", "item"], ["l_i"]),
        helper.make_node("ReduceSum", ["l_i", "one"], ["alike"], keepdims=0),
        helper.make_node("Mul", ["alike", "half"], ["alike_part"]),
        helper.make_node("Squeeze", ["bid", "one"], ["bid1"]),
        helper.make_node("Sqrt", ["bid1"], ["root"]),
        helper.make_node("Mul", ["root", "tenth"], ["bid_part"]),
        helper.make_node("Sub", ["year", "origin"], ["years"]),
        helper.make_node("Squeeze", ["freshness", "one"], ["freshness1"]),
        helper.make_node("Mul", ["years", "freshness1"], ["fresh"]),
        helper.make_node("Mul", ["fresh", "hundredth"], ["fresh_part"]),
        helper.make_node("Cast", ["occupation"], ["occupation_f"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["age", "occupation_f"], ["person"]),
        helper.make_node("Squeeze", ["person", "one"], ["person1"]),
        helper.make_node("Mul", ["person1", "thousandth"], ["person_part"]),
        helper.make_node("Sum", ["affinity", "alike_part", "bid_part", "fresh_part", "person_part"], ["score"]),
    ]
    return _model(
        nodes,
        inputs={
            "user": (1, D),
            "item": ("n", D),
            "history": (1, READ, D),
            "year": ("n",),
            "bid": ("n", 1),
            "freshness": (1, 1),
            "age": (1, 1),
            "occupation": (1, 1),
        },
        output=("score", ("n",)),
        constants={
            "one": np.array([1]),
            "zero": np.array(0),
            "half": np.float32(0.5),
            "tenth": np.float32(0.1),
            "hundredth": np.float32(0.01),
            "thousandth": np.float32(0.001),
            "origin": np.float32(1950),
        },
    )


def _model(
    nodes: list[Any], inputs: dict[str, tuple[Any, ...]], output: tuple[str, tuple[Any, ...]], constants: dict[str, Any]
) -> onnx.ModelProto:
    types = {"occupation": TensorProto.INT64}
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(n, types.get(n, TensorProto.FLOAT), s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(output[0], TensorProto.FLOAT, output[1])],
        [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


async def rank_by(deadline: Deadline, funnel: Funnel, query: Query) -> Ranking:
    """The funnel's answer to a query that is resolved already."""
    _, ranking = await funnel.rank(lambda is_late: query, deadline)
    return ranking
