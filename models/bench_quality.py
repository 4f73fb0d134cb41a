"""`make bench-quality`: fits, measures and prints the quality table of MovieLens-100k; non-zero under a bar.

Two protocols (split.py) over the whole catalogue, the funnel being the real one: trained models are exported,
packed and ranked by app.funnel with widths 500 → 100. The baselines are fitted on the same rows and asked with
the same histories. Nothing is tuned here, and nothing that was tuned has seen a test event.

    rolling next event    models of the first 80 % of the time line; events of the last 20 %, 20 a person
    leave one out         15 fits: 5 shufflings of ties x 3 model seeds; the last event of each person

What is printed: figure, bar, value, 95 % interval (bootstrap over people), and at the end one line of JSON. It is over
250 lines because the protocols, their bars and the table are read together or not believed.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.pool import Pool
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from models import baselines, evaluate, metrics
from models.clean import Catalogue, clean
from models.datasets import movielens
from models.metrics import MISSED, Estimate
from models.split import Queries, Timeline, before, cuts, leave_one_out, rolling, timeline

if TYPE_CHECKING:
    from models.train import Fitted, Head  # torch takes seconds to import

TIE_SEEDS, MODEL_SEEDS = 5, 3
DEPTH = 100  # of the rankings that are compared: what re-ranking sees
SURVIVAL_QUERIES = 1_000
Ranks = NDArray[np.int64]


@dataclass(slots=True)
class Table:
    """The figures in the order they were measured."""

    rows: list[tuple[str, str, Estimate, bool]] = field(default_factory=list)

    def add(self, figure: str, value: Estimate, bar: str = "", is_met: bool = True) -> None:
        """A row; without a bar it only informs."""
        self.rows.append((figure, bar, value, is_met))

    def print(self) -> bool:
        """The table in Markdown and one line of JSON. Returns whether every bar is met."""
        print("\n| figure | bar | value | 95 % interval | met |\n|---|---|---|---|---|")
        for figure, bar, v, is_met in self.rows:
            met = ("yes" if is_met else "NO") if bar else ""
            print(f"| {figure} | {bar} | {v.value:.4f} | {v.low:.4f} to {v.high:.4f} | {met} |")
        figures = {figure: [v.value, v.low, v.high] for figure, _, v, _ in self.rows}
        missed = [figure for figure, _, _, is_met in self.rows if not is_met]
        print(json.dumps({"bench": "quality", "figures": figures, "missed": missed}))
        return not missed


@dataclass(frozen=True, slots=True)
class FunnelRanks:
    """The place of each query's target [Q] in the lists of the funnel, the linear stage and the towers.

    p, happened f64[Q, m]: the re-ranker's scores of what reached it, and whether the person came to it later.
    """

    funnel: Ranks
    linear: Ranks
    towers: Ranks
    p: NDArray[np.float64]
    happened: NDArray[np.float64]


# ------------------------------------------------------------------------------- fitting and asking


def make_bundle(fitted: "Fitted", head: "Head", about: "About", out: Path) -> Path:
    """Export the models with this head, and pack."""
    from models.export import write_folder
    from models.pack import pack

    people = np.unique(about.line.person)
    write_folder(out / "artefacts", fitted, head, about.catalogue, about.tuning, about.fit_events, people)
    pack(out / "artefacts" / "pack.toml", out / "bundle", say=_quiet)
    return out / "bundle"


def make_head(about: "About") -> "Head":
    """The linear stage and the calibration, fitted on the tuning queries with models that don't know them."""
    from models.train import fit, fit_head

    fitted = fit(about.line, about.head_events, about.catalogue, 0, _quiet)
    return fit_head(fitted, about.tuning, _quiet)


def make_models(about: "About", seed: int) -> "Fitted":
    """The towers and the re-ranker that are measured."""
    from models.train import fit

    return fit(about.line, about.fit_events, about.catalogue, seed, _quiet)


@dataclass(frozen=True, slots=True)
class About:
    """A protocol on one time line: what is fitted on, what tunes the head, and what is asked."""

    line: Timeline
    catalogue: Catalogue
    fit_events: Ranks
    head_events: Ranks
    tuning: Queries
    queries: Queries


def rolling_next_event(data: Path) -> About:
    """Fit on 80 % of the time line, head on 60 to 80 % by models of the first 60 %, ask in the last 20 %."""
    from models.train import HEAD_QUERIES_A_PERSON

    line, catalogue = time_line(data, ties=0)
    tune_from, test_from = cuts(line.time)
    return About(
        line,
        catalogue,
        fit_events=before(line, test_from),
        head_events=before(line, tune_from),
        tuning=rolling(line, tune_from, test_from, 0, HEAD_QUERIES_A_PERSON),
        queries=rolling(line, test_from, int(line.time.max()) + 1, seed=0),
    )


def last_event(data: Path, ties: int) -> About:
    """Fit without the last event of each person, head on the second-last by models without either."""
    line, catalogue = time_line(data, ties)
    fit_events, queries = leave_one_out(line)
    head_events, tuning = leave_one_out(line, back=2)
    return About(line, catalogue, fit_events, head_events, tuning, queries)


def time_line(data: Path, ties: int) -> tuple[Timeline, Catalogue]:
    """The ratings in time, with this shuffling of ties. One thread a process: the same figures every time."""
    import torch

    torch.set_num_threads(1)
    ratings = movielens.load(data)
    catalogue = clean(ratings)
    return timeline(ratings.person, ratings.item, ratings.time, len(catalogue), ties), catalogue


def run_funnel(bundle: Path, queries: Queries) -> FunnelRanks:
    """Ask the bundle's real funnel each query, by the history alone: the person is unknown to it."""
    from app.bundle import load

    generation = load(bundle)
    ids = generation.ids.external(np.arange(generation.n_items))
    keep = generation.manifest.funnel.rerank
    columns: list[list[object]] = [[], [], [], [], []]
    requests = [
        {
            "user": {"history": [ids[row] for row in queries.history(q)]},
            "exclude": [ids[row] for row in queries.seen(q)],
            "k": DEPTH,
        }
        for q in range(len(queries))
    ]
    resolved = evaluate.resolve(generation, requests)
    coarse = evaluate.prerank(generation, resolved)
    rankings = evaluate.run_funnel(generation, resolved)
    for q, ((_, scored), ranking) in enumerate(zip(coarse, rankings, strict=True)):
        rows, target = scored.candidates.rows, int(queries.target[q])
        by_linear = scored.top(len(scored)).candidates.rows
        columns[0].append(metrics.rank_of(ranking.rows, target))
        columns[1].append(metrics.rank_of(by_linear, target))
        columns[2].append(metrics.rank_of(rows, target))
        reached = ranking.rows[:keep]
        columns[3].append(ranking.scores[:keep])
        columns[4].append(np.isin(reached, queries.later(q)))
    funnel, linear, towers, p, happened = (np.array(column) for column in columns)
    return FunnelRanks(funnel, linear, towers, p.astype(float), happened.astype(float))


def baseline_ranks(scorer: baselines.Scorer, queries: Queries) -> Ranks:
    """The place of each target when the scorer orders everything that isn't seen."""
    ranks = np.full(len(queries), MISSED)
    for q in range(len(queries)):
        scores = scorer(queries.history(q)).astype(np.float32)
        scores[queries.seen(q)] = -np.inf
        ranks[q] = metrics.rank_in(scores, int(queries.target[q]))
    return ranks


def _quiet(_: str) -> None:
    pass


# ------------------------------------------------------------------------------ rolling next event


def rolling_head(data: Path) -> "Head":
    """In a process of its own."""
    return make_head(rolling_next_event(data))


def rolling_models(data: Path) -> "Fitted":
    """In a process of its own."""
    return make_models(rolling_next_event(data), seed=0)


def rolling_protocol(data: Path, pool: Pool, table: Table) -> None:
    """The online service's protocol, with what survives and the calibration."""
    about = rolling_next_event(data)
    queries = about.queries
    _say(f"rolling: {len(queries)} queries of {len(np.unique(queries.person))} people; fitting")
    head, models = pool.apply_async(rolling_head, (data,)), pool.apply_async(rolling_models, (data,))
    with tempfile.TemporaryDirectory() as folder:
        bundle = make_bundle(models.get(), head.get(), about, Path(folder))
        _say("rolling: asking the funnel and the baselines")
        asked = run_funnel(bundle, queries)
        add_survival(table, bundle, queries)
    add_calibration(table, queries.person, asked)
    has = baselines.interactions(
        about.line.person[about.fit_events], about.line.item[about.fit_events], about.line.n_items
    )
    scorers: dict[str, baselines.Scorer] = {
        "popularity": baselines.fit_popularity(has),
        "ItemKNN": baselines.fit_item_knn(has),
        "EASE": baselines.fit_ease(has),
        "iALS": baselines.fit_ials(has),
    }
    ranks = {name: baseline_ranks(scorer, queries) for name, scorer in scorers.items()}
    ranks |= {"two-tower alone": asked.towers, "linear alone": asked.linear, "funnel": asked.funnel}
    add_ranks(table, "rolling", queries.person, ranks)
    for name in ("EASE", "ItemKNN", "linear alone"):
        gain = metrics.over_people(queries.person, metrics.ndcg(asked.funnel) - metrics.ndcg(ranks[name]))
        table.add(f"rolling: NDCG@10, funnel - {name}", gain, "interval above 0", gain.low > 0)


def add_ranks(table: Table, protocol: str, person: Ranks, ranks: dict[str, Ranks]) -> None:
    """HR@10 and NDCG@10 of each."""
    for name, found in ranks.items():
        table.add(f"{protocol}: HR@10, {name}", metrics.over_people(person, metrics.hit(found)))
        table.add(f"{protocol}: NDCG@10, {name}", metrics.over_people(person, metrics.ndcg(found)))


def add_survival(table: Table, bundle: Path, queries: Queries) -> None:
    """The share of the re-ranker's own ten best, over all unseen items, that reach it."""
    from app.bundle import load

    generation = load(bundle)
    ids = generation.ids.external(np.arange(generation.n_items))
    drawn = np.sort(np.random.default_rng(0).permutation(len(queries))[:SURVIVAL_QUERIES])
    some = queries.take(drawn)
    requests = [{"user": {"history": [ids[row] for row in some.history(q)]}} for q in range(len(some))]
    resolved = evaluate.resolve(generation, requests)
    shares = np.array([evaluate.survival(generation, [query]) for query in resolved])
    value = metrics.over_people(some.person, shares)
    table.add("share of the re-ranker's top 10 that survives", value, ">= .90", value.value >= 0.90)


def add_calibration(table: Table, person: Ranks, asked: FunnelRanks) -> None:
    """ECE of the re-ranker's score as P(later), on what reached it, 15 bins of equal mass."""
    m = asked.p.shape[1]
    value = metrics.calibration_over_people(np.repeat(person, m), asked.p.ravel(), asked.happened.ravel())
    table.add("calibration of the re-ranker: ECE", value, "<= .01", value.value <= 0.01)


# ----------------------------------------------------------------------------------- leave one out


@dataclass(frozen=True, slots=True)
class LeftOut:
    """One fit's measures for each person, and those of the baselines of its shuffling."""

    person: Ranks
    ranks: dict[str, Ranks]


def head_of(job: tuple[Path, int]) -> "Head":
    """The head of one shuffling; in a process of its own."""
    return make_head(last_event(*job))


def leave_out(job: tuple[Path, int, int, "Head"]) -> LeftOut:
    """One shuffling of ties and one model seed; in a process of its own."""
    data, ties, seed, head = job
    about = last_event(data, ties)
    line, queries = about.line, about.queries
    with tempfile.TemporaryDirectory() as folder:
        asked = run_funnel(make_bundle(make_models(about, seed), head, about, Path(folder)), queries)
    has = baselines.interactions(line.person[about.fit_events], line.item[about.fit_events], line.n_items)
    ranks = {
        "popularity": baseline_ranks(baselines.fit_popularity(has), queries),
        "EASE": baseline_ranks(baselines.fit_ease(has), queries),
        "iALS": baseline_ranks(baselines.fit_ials(has, seed=seed), queries),
        "two-tower alone": asked.towers,
        "linear alone": asked.linear,
        "funnel": asked.funnel,
    }
    return LeftOut(queries.person, ranks)


def leave_one_out_protocol(data: Path, n_ties: int, n_seeds: int, pool: Pool, table: Table) -> None:
    """One head a shuffling, then all fits, as many at a time as there are cores."""
    started, done = time.monotonic(), []
    _say(f"leave one out: {n_ties} heads, then {n_ties * n_seeds} fits")
    heads = pool.map(head_of, [(data, ties) for ties in range(n_ties)], chunksize=1)
    jobs = [(data, ties, seed, heads[ties]) for ties in range(n_ties) for seed in range(n_seeds)]
    for result in pool.imap(leave_out, jobs):
        done.append(result)
        hits = metrics.hit(result.ranks["funnel"]).mean()
        minutes = (time.monotonic() - started) / 60
        _say(f"leave one out: fit {len(done)} of {len(jobs)}, HR@10 {hits:.4f}, {minutes:.1f} min")
    person = done[0].person
    for name in done[0].ranks:
        for figure, measure in (("HR@10", metrics.hit), ("NDCG@10", metrics.ndcg)):
            values = mean_over(done, name, measure)
            table.add(f"leave one out: {figure}, {name}", metrics.over_people(person, values))
    for name in ("EASE", "iALS"):
        for figure, measure in (("HR@10", metrics.hit), ("NDCG@10", metrics.ndcg)):
            difference = mean_over(done, "funnel", measure) - mean_over(done, name, measure)
            gain = metrics.over_people(person, difference)
            is_met = gain.value >= 0 and gain.low > -0.01
            row = f"leave one out: {figure}, funnel - {name}"
            table.add(row, gain, ">= 0, low end > -.01", is_met)


def mean_over(
    done: Sequence[LeftOut], name: str, measure: Callable[[Ranks], NDArray[np.float64]]
) -> NDArray[np.float64]:
    """f64[P]: each person's measure, mean over the fits (people come in the same order in each)."""
    return np.mean([measure(one.ranks[name]) for one in done], axis=0)


# --------------------------------------------------------------------------------------------- main


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m models.bench_quality")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--ties", type=int, default=TIE_SEEDS, help="shufflings of ties")
    parser.add_argument("--seeds", type=int, default=MODEL_SEEDS, help="model seeds for each")
    parsed = parser.parse_args()
    movielens.fetch(parsed.data)
    table = Table()
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        rolling_protocol(parsed.data, pool, table)
        leave_one_out_protocol(parsed.data, parsed.ties, parsed.seeds, pool, table)
    return 0 if table.print() else 1


if __name__ == "__main__":
    sys.exit(main())
