"""The hidden truth of a made-up world: what a person likes at a moment, and so what is clicked.

    logit P(click | person, moment, item) = LEVEL + AFFINITY · t·z                    t: the taste at this moment
                                          + (told + LEANING · tanh(A t)) · x          x: the features told apart
                                          + INTERPLAY · tanh(B t) · tanh(C z)         z: the item's latent vector
                                          - STINGY · softplus(price - purse(t))

Histories and clicks follow it; what is trained sees clicks, features and noisy content, never these vectors. The first
three lines are sums of products, which two towers can learn; the last is none, and needs the deep model.
Of a bundle of this world it can be said how good an answer is (`judge`), not only how near to its own re-ranker's.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.bundle import Generation
from app.flow import best_first
from models import evaluate
from models.metrics import Estimate, ndcg_loss, over_people
from models.pack_config import PackError
from models.stand_ins import MOMENT, TOLD_APART, real

Array = NDArray[Any]
Floats = NDArray[np.float32]

LATENT = 24
TOLD = np.array(list(TOLD_APART.values()), np.float32)
LEVEL, AFFINITY, LEANING, INTERPLAY, STINGY = -6.0, 6.0, 0.5, 0.8, 0.7
N_INTERPLAYS = 4
PRICE = list(TOLD_APART).index("price")
MOVED = 0.5  # how far a moment moves a taste, whose length is 1
BLOCK = 262_144  # items judged at a time


@dataclass(frozen=True, slots=True)
class Truth:
    """moves f32[moment, L] · leaning f32[L, 4] · asks, has f32[L, 4] · purse f32[L]"""

    moves: Floats
    leaning: Floats
    asks: Floats
    has: Floats
    purse: Floats

    @staticmethod
    def drawn(rng: np.random.Generator) -> "Truth":
        def normal(*shape: int) -> Floats:
            return rng.standard_normal(shape, np.float32)

        told, spread = len(TOLD), np.float32(2.0)  # tastes have length 1, products with them then about this spread
        return Truth(
            MOVED * normal(MOMENT, LATENT) / np.float32(np.sqrt(MOMENT * LATENT)),
            spread * normal(LATENT, told),
            spread * normal(LATENT, N_INTERPLAYS),
            spread * normal(LATENT, N_INTERPLAYS),
            spread * normal(LATENT),
        )

    def moved(self, taste: Floats, moment: Floats) -> Floats:
        """Tastes f32[..., L] at moments f32[..., 8]: again of length 1; the nobody in particular's stays 0."""
        t = taste + moment @ self.moves * np.linalg.norm(taste, axis=-1, keepdims=True)
        return np.asarray(t / np.maximum(np.linalg.norm(t, axis=-1, keepdims=True), 1e-6), np.float32)

    def logits(self, taste: Floats, latent: Floats, told: Floats) -> Floats:
        """f32[..., e, c] of tastes [..., e, L] for items: latent [..., c, L], told [..., c, 4]."""
        t, z, x = taste, np.swapaxes(latent, -1, -2), np.swapaxes(told, -1, -2)
        weights = TOLD + LEANING * np.tanh(t @ self.leaning)
        interplay = np.tanh(t @ self.asks) @ np.tanh(np.swapaxes(self.has, 0, 1) @ z)
        dear = x[..., PRICE, :][..., None, :] - (t @ self.purse)[..., None]
        logits = LEVEL + AFFINITY * (t @ z) + weights @ x + INTERPLAY * interplay - STINGY * np.logaddexp(0, dear)
        return np.asarray(logits, np.float32)

    def save(self, file: Path, taste: Floats, latent: Array, price: Array) -> None:
        """With the tastes f32[U, L] of people by id, from 1, and the items' latent vectors and prices by row."""
        columns = {name: getattr(self, name) for name in self.__slots__}
        np.savez(file, taste=taste, latent=latent, price=price, **columns)


def probability(logits: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-logits)), np.float32)


# --------------------------------------------------------------------------------------------- judging


@dataclass(frozen=True, slots=True)
class Judged:
    """NDCG@k against the truth, mean over requests with its 95 % interval, of an order at each stage.

    An item gains the probability that it is clicked; the ideal is the best k of the whole catalogue, by that.
    """

    k: int
    n_requests: int
    retrieval: Estimate
    preranking: Estimate
    funnel: Estimate
    rescored: Estimate  # the re-ranker's order of all that retrieval found


def judge(generation: Generation, requests: Sequence[evaluate.Request], file: Path) -> Judged:
    """How good the funnel's answers are, on those requests that name a person. Raises PackError."""
    stored = _stored(file)
    truth = Truth(*(stored[name] for name in Truth.__slots__))
    prices = generation.tables.get("price")
    if prices is None or not np.array_equal(stored["price"], prices):
        raise PackError(f"{file.name}: is about another world than the bundle's")
    n_people = len(stored["taste"])
    asked = [r for r in requests if _person(r) in range(1, n_people + 1) and "moment" in r.get("context", {})]
    if not asked:
        raise PackError("no request names a person by number and has a moment")
    queries, k = evaluate.resolve(generation, asked), generation.manifest.funnel.k
    lost: dict[str, list[float]] = {name: [] for name in ("retrieval", "preranking", "funnel", "rescored")}
    rankings = evaluate.run_funnel(generation, queries)
    for request, ranking, s in zip(asked, rankings, evaluate.score_through(generation, queries), strict=True):
        person, moment = _person(request) - 1, np.asarray(request["context"]["moment"], np.float32)
        taste = truth.moved(stored["taste"][person], moment)
        gain = np.concatenate(list(_gains(truth, taste, stored["latent"], generation.tables["features"])))
        rows = s.candidates.rows
        orders = {
            "retrieval": rows,
            "preranking": rows[best_first(s.preranking, rows)],
            "funnel": ranking.rows,
            "rescored": rows[best_first(s.reranking, rows)],
        }
        unseen = gain.copy()
        unseen[s.query.person.history] = 0
        ideal = -np.sort(-np.partition(unseen, -k)[-k:].astype(np.float64))
        for name, order in orders.items():
            shown = np.zeros(k)
            shown[: len(order)] = gain[order[:k]]
            lost[name].append(float(ndcg_loss(shown, ideal)))
    people = np.array([_person(request) for request in asked])
    return Judged(k, len(asked), **{name: over_people(people, 1 - np.array(values)) for name, values in lost.items()})


def _stored(file: Path) -> dict[str, Array]:
    """Raises PackError for what isn't a file of `Truth.save`."""
    try:
        with np.load(file, allow_pickle=False) as held:
            return {name: held[name] for name in (*Truth.__slots__, "taste", "latent", "price")}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise PackError(f"{file}: no truth of a made-up world ({str(e) or type(e).__name__})") from e


def _person(request: evaluate.Request) -> int:
    """The number that the request names a person by; 0 if none."""
    named = request.get("user", {}).get("id")
    return named if isinstance(named, int) else 0


def _gains(truth: Truth, taste: Floats, latent: Array, features: Array) -> Iterator[Floats]:
    for start in range(0, len(latent), BLOCK):
        part = slice(start, start + BLOCK)
        told = real(features[part, : len(TOLD)])
        yield probability(truth.logits(taste[None], np.asarray(latent[part], np.float32), told))[0]


def report(generation: Generation, requests: Path, file: Path, most: int) -> None:
    """Print what `judge` finds on at most so many of the requests. Raises PackError."""
    asked = evaluate.read_requests(requests)
    chosen = [asked[at] for at in evaluate.spread(len(asked), most)]
    judged = judge(generation, chosen, file)
    print(f"  NDCG@{judged.k} against the truth, {judged.n_requests} requests (95 % interval over people):")
    for name in ("retrieval", "preranking", "funnel", "rescored"):
        print(f"    {name:<11} {getattr(judged, name)}")
