"""Training: ratings in, a folder of arrays and ONNX graphs out, ready for `python -m models pack`.

    events before 60 % ──▶ towers, re-ranker ──▶ scores on 60–80 % ──▶ linear stage, calibration ─┐
    events before 80 % ──▶ towers, re-ranker ─────────────────────────────────────────────────────┴▶ folder

The linear stage and the calibration learn from scores on people's later events, which the first fit hasn't
seen; the second fit has the same scale and takes its place. Nothing here looks at the last 20 %.
The same seed gives the same folder. What is written, and for whom, is in export.py.
"""

import multiprocessing
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from models.calibration import Calibration, fit_calibration
from models.clean import Catalogue, clean
from models.datasets import movielens
from models.deep import LENGTH, Deep, fit_deep, score_rows
from models.encoder import Show
from models.linear import PreRanker, features_of, fit_linear, logistic_regression
from models.split import Queries, Rows, Timeline, before, cuts, recent, rolling, timeline
from models.two_tower import TwoTower, fit_two_tower

RETRIEVE, RERANK = 500, 100  # widths of the funnel
DAY_S = 86_400
RECENT_DAYS = (7, 30, 90)
SUCCESSION_D = 32
SUCCESSION_WINDOW = 10  # items back that count as "shortly before"
HEAD_QUERIES_A_PERSON = 20  # as the service is measured: people weigh in the calibration as they do there
Tables = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Fitted:
    """The two learned models of one fit and the item tables that go with them."""

    towers: TwoTower
    deep: Deep
    tables: Tables


@dataclass(frozen=True, slots=True)
class Head:
    """What is fitted on the scores of the learned models: the linear stage and the calibration."""

    linear: PreRanker
    calibration: Calibration


@dataclass(frozen=True, slots=True)
class Scores:
    """What the learned models say of queries: retrieved rows i64[Q, m], retrieval scores and logits f32[Q, m]."""

    rows: NDArray[np.int64]
    found: NDArray[np.float32]
    logits: NDArray[np.float32]


def print_now(text: str) -> None:
    """Print without waiting for the line's turn, also when the output is a pipe."""
    print(text, flush=True)


def train(
    data_dir: Path,
    out_dir: Path,
    *,
    seed: int = 0,
    people: int | None = None,
    epochs: int | None = None,
    show: Show = print_now,
) -> Path:
    """Fetch, fit and write the demo's models. `people` and `epochs` make it small for trials.

    The two rows of the drawing run at the same time, in processes of their own; `show` is called in them, so it
    has to be a function of a module. Expect two to three minutes on 2 cores.
    """
    from models.export import write_folder  # it imports what is defined here

    started = time.monotonic()
    movielens.fetch(data_dir)
    ratings = movielens.load(data_dir, people)
    catalogue = clean(ratings)
    line = timeline(ratings.person, ratings.item, ratings.time, len(catalogue), seed)
    tune_from, test_from = cuts(line.time)
    show(f"{len(line)} ratings, {len(catalogue)} films; fit 60 %, tune 20 %, the last 20 % untouched")
    tuning = rolling(line, tune_from, test_from, seed, HEAD_QUERIES_A_PERSON)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        learning = pool.submit(head_alone, line, before(line, tune_from), catalogue, seed, show, epochs, tuning)
        fitting = pool.submit(fit_alone, line, before(line, test_from), catalogue, seed, show, epochs)
        head, final = learning.result(), fitting.result()
    torch.set_num_threads(1)
    write_folder(out_dir, final, head, catalogue, tuning, before(line, test_from), ratings.person_ids)
    show(f"trained in {time.monotonic() - started:.0f} s: {out_dir}")
    return out_dir


def fit(line: Timeline, events: Rows, catalogue: Catalogue, seed: int, show: Show, epochs: int | None = None) -> Fitted:
    """Towers and re-ranker, fitted on these events and nothing else."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a twentieth of the time, for what is written over
    statics = item_statics(line, events, catalogue)
    towers = fit_two_tower(line, events, catalogue.content, seed, show, epochs)
    deep = fit_deep(line, events, catalogue.content, statics["static"], seed, show, epochs)
    with torch.no_grad():
        learned = {
            "embedding": towers.embeddings().numpy(),
            "history_vector": towers.history_vectors().numpy(),
            "deep_item": deep.item_vectors().numpy(),
            "deep_history": deep.history_vectors().numpy(),
        }
    return Fitted(towers, deep, statics | learned)


def fit_alone(line: Timeline, events: Rows, catalogue: Catalogue, seed: int, show: Show, epochs: int | None) -> Fitted:
    """`fit` in a process of its own, on one thread.

    Two processes of one thread keep two cores busy; one of two threads waits at every step for the slower
    of them, and on a machine with other work took twenty times as long.
    """
    torch.set_num_threads(1)
    share = f"{len(events) / len(line):.0%}"
    return fit(line, events, catalogue, seed, partial(_say_whose, show, share), epochs)


def head_alone(
    line: Timeline, events: Rows, catalogue: Catalogue, seed: int, show: Show, epochs: int | None, queries: Queries
) -> Head:
    """`fit_alone` and `fit_head` on what it fitted: the learned models of the first fit serve nothing else."""
    return fit_head(fit_alone(line, events, catalogue, seed, show, epochs), queries, show)


def _say_whose(show: Show, share: str, text: str) -> None:
    show(f"[{share}] {text}")


def item_statics(line: Timeline, events: Rows, catalogue: Catalogue) -> Tables:
    """What is counted, not learned, of each item, from these events only.

    log_popularity, recent_popularity (30 days), decade f32[N]; genres, year; succession f32[N, 32]; static
    f32[N, s]: popularity over four spans and decade, each standardised, and genres.
    """
    counts = [np.bincount(line.item[events], minlength=line.n_items)]
    end = line.time[events].max()
    for days in RECENT_DAYS:
        recently = events[line.time[events] > end - days * DAY_S]
        counts.append(np.bincount(line.item[recently], minlength=line.n_items))
    logs = np.log1p(np.stack(counts, axis=1))
    columns = np.column_stack([logs, catalogue.decade])
    columns = (columns - columns.mean(axis=0)) / (columns.std(axis=0) + 1e-6)
    genres = catalogue.content[:, : len(catalogue.genre_names)]
    return {
        "log_popularity": logs[:, 0].astype(np.float32),
        "recent_popularity": logs[:, 2].astype(np.float32),
        "decade": catalogue.decade,
        "year": catalogue.year,
        "genres": catalogue.genres,
        "succession": succession(line, events),
        "static": np.concatenate([columns, genres], axis=1).astype(np.float32),
    }


def succession(line: Timeline, events: Rows) -> NDArray[np.float32]:
    """f32[N, 32]: inner products approximate how much more often than by chance two items come close in time.

    The best positive semi-definite approximation of max(0, log(n_ij n / (n_i n_j))), n_ij the pairs at most 10
    items apart, of a person, counted in both directions.
    """
    pairs = np.zeros((line.n_items, line.n_items))
    for column in recent(line, events, SUCCESSION_WINDOW).T:
        known = column >= 0
        np.add.at(pairs, (column[known], line.item[events][known]), 1.0)
    pairs = pairs + pairs.T
    ones = pairs.sum(axis=1)
    expected = np.outer(ones, ones) / max(ones.sum(), 1.0)
    lift = np.log(np.maximum((pairs + 1.0) / (expected + 1.0), 1.0))  # + 1: rare pairs count as chance
    values, vectors = np.linalg.eigh(lift)
    kept = np.argsort(-values)[:SUCCESSION_D]
    return (vectors[:, kept] * np.sqrt(np.maximum(values[kept], 0.0))).astype(np.float32)


def score_queries(fitted: Fitted, queries: Queries, width: int = RETRIEVE, batch: int = 64) -> Scores:
    """The first `width` unseen rows of each query by retrieval score, with the re-ranker's logits."""
    histories = torch.from_numpy(recent(queries.timeline, queries.events, LENGTH))
    width = min(width, queries.timeline.n_items)
    embeddings = torch.from_numpy(fitted.tables["embedding"])
    tables = torch.from_numpy(fitted.tables["deep_history"]), torch.from_numpy(fitted.tables["deep_item"])
    parts: list[tuple[torch.Tensor, ...]] = []
    with torch.no_grad():
        for start in range(0, len(queries), batch):
            some = histories[start : start + batch]
            users = fitted.towers.users(some)
            found = users @ embeddings.T
            for q in range(len(some)):
                found[q, torch.from_numpy(queries.seen(start + q))] = -1e8
            found, rows = torch.topk(found, width, dim=1)
            parts.append((rows, found, score_rows(fitted.deep, tables, some, rows)))
    rows, found, logits = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
    return Scores(rows, found, logits)


def fit_head(fitted: Fitted, queries: Queries, show: Show) -> Head:
    """The linear stage on what retrieval gives it, then the calibration on what the linear stage lets through."""
    started = time.monotonic()
    scores = score_queries(fitted, queries)
    happened = np.stack([np.isin(scores.rows[q], queries.later(q)) for q in range(len(queries))])
    lengths = [len(queries.history(q)) for q in range(len(queries))]
    counts = np.minimum(lengths, LENGTH).astype(np.float32)[:, None] + np.zeros_like(scores.found)
    features = features_of_queries(fitted.tables, queries, scores)
    taught = teach(scores.logits.ravel(), counts.ravel(), happened.ravel())
    linear = fit_linear(features, taught, happened.ravel().astype(float))
    coarse = linear.logits(features).reshape(scores.found.shape)
    kept = np.argsort(-coarse, axis=1, kind="stable")[:, :RERANK]
    columns = [np.take_along_axis(x, kept, axis=1).ravel() for x in (scores.logits, counts, happened)]
    calibration = fit_calibration(*(torch.from_numpy(column.astype(np.float32)) for column in columns))
    show(f"linear stage and calibration from {len(queries)} queries  {time.monotonic() - started:.1f} s")
    return Head(linear, calibration)


def teach(logits: NDArray[Any], counts: NDArray[Any], happened: NDArray[Any]) -> NDArray[np.float64]:
    """The re-ranker's probabilities by a first, logistic calibration: what the linear stage imitates."""
    x = np.column_stack([logits, np.log1p(counts)]).astype(float)
    weights, bias = logistic_regression(x, happened.astype(float))
    return np.asarray(1.0 / (1.0 + np.exp(-(x @ weights + bias))))


def features_of_queries(tables: Mapping[str, NDArray[Any]], queries: Queries, scores: Scores) -> NDArray[np.float32]:
    """f32[Q * m, F]: the linear stage's features of all retrieved rows, query by query."""
    return np.concatenate(
        [features_of(tables, queries.history(q), scores.rows[q], scores.found[q]) for q in range(len(queries))]
    )
