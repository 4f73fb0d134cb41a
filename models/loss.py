"""The loss of a degraded answer, measured: sample requests run, then every way to lose a part simulated.

    each request through every stage, whole ─▶ scores ─▶ mean loss in each situation ─▶ curves ─▶ LossTable
                                                          (share retrieved, share pre-ranked, positions re-ranked)

It owns what can happen to an answer and its simulation. Stages are run by evaluate.py, a curve is fitted by
loss_curve.py, and how the table is read for an answer is app/control/loss.py, which the check here calls too. It is
over 250 lines because each way to lose a part stands beside the simulation of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from app.bundle import Generation
from app.control.carrying import to_request_scale
from app.control.loss import at_share, loss_of_shares, missing_shares
from app.manifest import LossCurve, LossCurves, LossTable
from models import evaluate, metrics
from models.evaluate import ScoredThrough
from models.loss_curve import fit_curve

Floats = NDArray[np.float64]
Scores = NDArray[np.float32]
Mask = NDArray[np.bool_]

MOST_ROWS = 8_000_000  # candidates of all samples together, each re-ranked: 40 s at 5 µs a row, 10 s of narrow searches
FEWEST_REQUESTS = 200
MOST_OTHERWISE = 400  # requests scored as well where retrieval fails, and where nobody says who asks
RETRIEVED = (0.02, 0.05, 0.1, 0.17, 0.3, 0.5, 0.75, 1.0)  # shares with a curve of their own
HELD_OUT = tuple(np.linspace(0.08, 0.98, 10).tolist())  # of the check
PRERANKED = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0)
POPULAR_PRERANKED = (0.0, 1.0)
N_BANDS = 10
N_MASKS, N_MASKS_WHOLE = 30, 60  # of each kind for each curve, and for the one of the normal order
MOST_SHARDS = 8
MOST_AT_ONCE = 1_000_000  # scores simulated in one piece, 4 MB
SEED = 30


@dataclass(frozen=True, slots=True)
class Found:
    """What retrieval found for one request, in its order, scored by every stage on the re-ranker's scale.

    found, coarse: f32[n], scores of retrieval and pre-ranking as they are carried. fine: f32[n], the re-ranker's own.
    gains: f64[n], what each is worth by its place in the full funnel's answer. narrower: by share of the width, the
    places in `found` of what a search for so many finds, i32, in its order; elsewhere it finds the first.
    """

    found: Scores
    coarse: Scores
    fine: Scores
    gains: Floats
    narrower: Mapping[float, NDArray[np.int32]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sample:
    """One request: as it is, where retrieval fails, and where nobody says who asks.

    popular, nameless: None where it wasn't scored like that; the second also where it names nobody.
    ideal: f64[k], the gains of the full funnel's answer; 0 where it has no more items.
    """

    whole: Found
    popular: Found | None
    nameless: Found | None
    ideal: Floats


@dataclass(frozen=True, slots=True)
class Widths:
    """Of the funnel, in candidates: scored by re-ranking, handed on to it, shown."""

    rerank: int
    keep: int
    k: int

    @property
    def edges(self) -> tuple[int, ...]:
        """Of the bands of received positions: growing geometrically, the first of 4 positions or more."""
        rising = np.geomspace(min(max(4, self.rerank / 128), self.rerank), self.rerank, N_BANDS)
        return (0, *np.unique(np.round(rising)).astype(int).tolist())


@dataclass(frozen=True, slots=True)
class Situation:
    """Something that happens. scored: bool[m, rerank], the positions re-ranked in each of m variants."""

    scored: Mask
    retrieved: float = 1.0
    preranked: float = 1.0
    way: Literal["whole", "popular", "nameless"] = "whole"


def measure(generation: Generation, requests: Sequence[evaluate.Request]) -> LossTable:
    """The table, from all of the requests. Raises PackError."""
    return fit_table(*score_samples(generation, requests))


def check(generation: Generation, requests: Sequence[evaluate.Request]) -> list[str]:
    """Lines of text: what a table fitted on one half of the requests expects, and what the other half lost."""
    widths, samples = score_samples(generation, requests, (*RETRIEVED, *HELD_OUT))
    if len(samples) < 2:
        return []
    table, others = fit_table(widths, samples[::2]), samples[1::2]
    lines, errors = [], [0.0]
    for cause, situations in held_out(widths.rerank).items():
        covered, expected, lost, error = (
            np.concatenate(column)
            for column in zip(*(_compare(table, s, others, widths) for s in situations), strict=True)
        )
        if len(lost):
            fifths = np.array_split(np.argsort(covered, kind="stable"), min(5, len(covered)))
            cells = [f"{covered[f].mean():.2f}: {expected[f].mean():.3f}/{lost[f].mean():.3f}" for f in fifths]
            lines.append(f"  {cause:<36} {'  '.join(cells)}")
            errors.append(error.max())
    head = f"share re-ranked: expected/measured loss of NDCG@{widths.k}, on {len(others)} requests held out"
    return [f"{head} (standard error up to {max(errors):.3f})", *lines]


def _compare(
    table: LossTable, situation: Situation, samples: Sequence[Sample], widths: Widths
) -> tuple[Floats, Floats, Floats, Floats]:
    """Coverage, expected and measured loss, the latter's standard error: f64[m], means over the samples that can."""
    lost, missing = simulate(samples, situation, widths)
    if not len(lost):
        return lost, lost, lost, lost
    expected = [[expect(table, situation, one) for one in of_sample] for of_sample in missing.tolist()]
    error = lost.std(axis=0) / np.sqrt(len(lost))
    return situation.scored.mean(axis=1), np.mean(expected, axis=0), lost.mean(axis=0), error


def expect(table: LossTable, situation: Situation, missing: Sequence[float]) -> float:
    """What the table says, as for an answer that misses these shares of the bands."""
    if situation.way == "popular":
        return at_share(table.popular, situation.preranked, missing)
    loss = loss_of_shares(table, situation.retrieved, situation.preranked, missing)
    return loss if situation.way == "whole" else 1 - (1 - loss) * (1 - (table.nameless or 0.0))


# ------------------------------------------------------------------------------------------- the samples


def n_samples(generation: Generation, requests: Sequence[evaluate.Request]) -> int:
    """How many of the requests are scored."""
    most = MOST_ROWS // generation.manifest.funnel.retrieve
    return int(np.clip(most, min(FEWEST_REQUESTS, len(requests)), len(requests)))


def score_samples(
    generation: Generation, requests: Sequence[evaluate.Request], shares: Sequence[float] = RETRIEVED
) -> tuple[Widths, list[Sample]]:
    """Requests evenly spread over those given, scored through. Raises PackError.

    shares: of retrieval's width, for which each is searched as well.
    """
    funnel, n = generation.manifest.funnel, n_samples(generation, requests)
    widths = Widths(funnel.rerank, max(funnel.rerank, funnel.k), funnel.k)
    chosen = [requests[at] for at in np.linspace(0, len(requests) - 1, n).astype(int)]
    queries = evaluate.resolve(generation, chosen)
    is_other = (np.random.default_rng(SEED).permutation(n) < MOST_OTHERWISE).tolist()
    is_nameless = [other and _is_named(request) for other, request in zip(is_other, chosen, strict=True)]
    without = evaluate.resolve(generation, [_without_name(request) for request in compress(chosen, is_nameless)])
    nameless = evaluate.score_through(generation, without)
    popular = evaluate.score_through(generation, list(compress(queries, is_other)), is_popular=True)
    ways = zip(
        evaluate.score_through(generation, queries),
        (next(popular) if other else None for other in is_other),
        (next(nameless) if other else None for other in is_nameless),
        strict=True,
    )
    return widths, [_sample(generation, widths, shares, *way) for way in ways]


def _is_named(request: evaluate.Request) -> bool:
    return (request.get("user") or {}).get("id") is not None


def _without_name(request: evaluate.Request) -> evaluate.Request:
    return request | {"user": {key: value for key, value in request["user"].items() if key != "id"}}


def _sample(
    generation: Generation,
    widths: Widths,
    shares: Sequence[float],
    whole: ScoredThrough,
    popular: ScoredThrough | None,
    nameless: ScoredThrough | None,
) -> Sample:
    """Each way of retrieving, with the gains of the full funnel's answer."""
    rows, ideal = whole.candidates.rows, metrics.place_gains(widths.k)
    everything = Situation(np.ones((1, widths.rerank), np.bool_))
    full = _received(replace(_found(generation, whole, {}), gains=rows.astype(np.float64)), everything, widths)
    best = full.gains[_shown(full.fine[None], full.coarse[None], everything.scored, widths.k)[0, 0]]
    ideal[len(best) :] = 0
    gain = dict(zip(best.tolist(), ideal.tolist(), strict=False))
    others = [None if way is None else _found(generation, way, gain) for way in (popular, nameless)]
    found = replace(_found(generation, whole, gain), narrower=evaluate.narrower(generation, whole, shares))
    return Sample(found, others[0], others[1], ideal)


def _found(generation: Generation, through: ScoredThrough, gain: Mapping[int, float]) -> Found:
    calibration, candidates = generation.manifest.calibration, through.candidates
    return Found(
        found=calibration.retrieval(candidates.retrieval_scores),
        coarse=calibration.preranking(through.preranking),
        fine=through.reranking,
        gains=np.array([gain.get(row, 0.0) for row in candidates.rows.tolist()]),
    )


# ------------------------------------------------------------------------------------------ the simulation


def simulate(samples: Sequence[Sample], situation: Situation, widths: Widths) -> tuple[Floats, Floats]:
    """f64[q, m], the loss of each answer; f64[q, m, bands], what re-ranking missed for it.

    q: the samples that the situation can happen to.
    """
    ways = [(getattr(sample, situation.way), sample.ideal) for sample in samples]
    received = [_received(way, situation, widths) for way, _ in ways if way is not None]
    ideal = np.array([ideal for way, ideal in ways if way is not None])
    n_variants, edges = len(situation.scored), widths.edges
    lost, missing = (np.empty((len(received), n_variants, *more)) for more in ((), (len(edges) - 1,)))
    lengths = np.array([len(given.fine) for given in received])
    for n in np.unique(lengths).tolist():
        alike, scored = np.flatnonzero(lengths == n), situation.scored[:, :n]
        missing[alike] = missing_shares(edges, ~scored)
        for at in np.array_split(alike, -(-len(alike) * n_variants * max(n, 1) // MOST_AT_ONCE)):
            carried, fine, gains = (
                np.array([getattr(received[i], name) for i in at]) for name in ("coarse", "fine", "gains")
            )
            shown = _shown(fine, carried, scored, widths.k)
            lost[at] = metrics.ndcg_loss(np.take_along_axis(gains[:, None], shown, -1), ideal[at, None])
    return lost, missing


def _received(given: Found, situation: Situation, widths: Widths) -> Found:
    """What re-ranking receives, best first; `coarse` are the scores that it comes with."""
    first = np.arange(np.ceil(situation.retrieved * len(given.found)), dtype=np.int32)
    at = given.narrower.get(situation.retrieved, first)
    is_preranked = np.arange(len(at)) < np.ceil(situation.preranked * len(at))
    carried = np.where(is_preranked, given.coarse[at], given.found[at])
    order = np.argsort(-_sinking(carried), kind="stable")[: widths.keep]
    at = at[order]
    return Found(given.found[at], carried[order], given.fine[at], given.gains[at])


def _shown(fine: Scores, carried: Scores, scored: Mask, k: int) -> NDArray[np.intp]:
    """i64[q, m, min(k, n)]: positions of the k best of each answer, best first.

    fine, carried: f32[q, n]. scored: bool[m, any], which positions were re-ranked in each variant; those from n on are
    nobody's.
    """
    scored = scored[:, : fine.shape[1]]
    is_fresh = np.zeros((len(scored), fine.shape[1]), np.bool_)
    is_fresh[:, : scored.shape[1]] = scored
    fine, carried = fine[:, None], carried[:, None]
    scores = _sinking(np.where(is_fresh, fine, to_request_scale(carried, fine, is_fresh)))
    k = min(k, scores.shape[-1])
    some = np.argpartition(-scores, max(k - 1, 0), axis=-1)[..., :k] if k else np.empty((*scores.shape[:2], 0), np.intp)
    best = np.argsort(-np.take_along_axis(scores, some, -1), axis=-1, kind="stable")
    return np.take_along_axis(some, best, -1)


def _sinking(scores: Scores) -> Scores:
    return np.where(np.isfinite(scores), scores, np.float32(-np.inf))


# ------------------------------------------------------------------------------------------- what happens


def random_masks(width: int, n: int, rng: np.random.Generator) -> dict[str, Mask]:
    """What re-ranking gets done, by cause, bool[n, width]: its first positions, whole shards, parts of shards."""
    narrowed = np.arange(width) < width * rng.random((n, 1)) ** 2  # many of the first few, where each counts most
    lost, cut = (np.stack([draw(width, rng) for _ in range(n)]) for draw in (_without_shards, _with_cut_shards))
    mixed = rng.permutation(narrowed) & np.where(rng.random((n, 1)) < 0.5, rng.permutation(lost), cut)
    return {"narrowed": narrowed, "shards lost": lost, "shards cut": cut, "narrowed, and shards lost": mixed}


def _without_shards(width: int, rng: np.random.Generator) -> Mask:
    n_shards = rng.integers(2, MOST_SHARDS + 1)
    lost = rng.permutation(n_shards)[: rng.integers(1, n_shards + 1)]
    return np.asarray(~np.isin(np.arange(width) % n_shards, lost))


def _with_cut_shards(width: int, rng: np.random.Generator) -> Mask:
    """Each shard scores a beginning of its own positions; about half of the shards all of them."""
    n_shards = rng.integers(1, MOST_SHARDS + 1)
    reached = np.where(rng.random(n_shards) < 0.5, 1.0, rng.random(n_shards))
    return np.asarray(np.arange(width) < reached[np.arange(width) % n_shards] * width)


def held_out(width: int) -> dict[str, list[Situation]]:
    """The situations of the check by cause, with other masks and other shares than those of the fit."""
    rng = np.random.default_rng(SEED + 1)
    masks, whole = random_masks(width, 40, rng), np.ones((1, width), np.bool_)
    lost, shares = masks["shards lost"], HELD_OUT
    narrow = [np.arange(width)[None] < share * width for share in shares]
    return {
        **{f"re-ranking {cause}": [Situation(mask)] for cause, mask in masks.items()},
        "pre-ranking partial": [Situation(whole, preranked=share) for share in shares],
        "pre-ranking failed": [Situation(whole, preranked=0.0)],
        "pre-ranking failed, shards lost": [Situation(lost, preranked=0.0)],
        "retrieval narrowed": [Situation(whole, retrieved=share) for share in shares],
        "retrieval, re-ranking narrowed": [Situation(n, share) for n, share in zip(narrow, shares, strict=True)],
        "retrieval and pre-ranking narrowed": [Situation(whole, share, 1 - share / 2) for share in shares],
        "all narrowed": [Situation(n, share, 1 - share / 2) for n, share in zip(narrow, shares, strict=True)],
        "retrieval narrowed, shards lost": [Situation(lost, retrieved=share) for share in shares[::3]],
        "retrieval failed": [Situation(whole, way="popular")],
        "retrieval failed, shards lost": [Situation(lost, way="popular")],
        "who asks late": [Situation(whole, way="nameless")],
    }


# ----------------------------------------------------------------------------------------------- the fit


def fit_table(widths: Widths, samples: Sequence[Sample]) -> LossTable:
    """The curves of least squares over the samples' mean losses."""
    rng = np.random.default_rng(SEED)
    ends = np.array([[True], [False]]) & np.ones(widths.rerank, np.bool_)
    many, few = (
        np.concatenate([ends, *random_masks(widths.rerank, n, rng).values()]) for n in (N_MASKS_WHOLE, N_MASKS)
    )

    def curve(masks: Mask = few, **situation: Any) -> LossCurve:
        lost, missing = simulate(samples, Situation(masks, **situation), widths)
        return fit_curve(missing.mean(axis=0), lost.mean(axis=0))

    nameless, _ = simulate(samples, Situation(ends[:1], way="nameless"), widths)
    whole = curve(many)
    return LossTable(
        k=widths.k,
        n_requests=len(samples),
        edges=widths.edges,
        retrieval=LossCurves(shares=RETRIEVED, curves=(*(curve(retrieved=r) for r in RETRIEVED[:-1]), whole)),
        preranking=LossCurves(shares=PRERANKED, curves=(*(curve(preranked=p) for p in PRERANKED[:-1]), whole)),
        popular=LossCurves(
            shares=POPULAR_PRERANKED, curves=tuple(curve(way="popular", preranked=p) for p in POPULAR_PRERANKED)
        ),
        nameless=float(nameless.mean()) if len(nameless) else None,
    )
