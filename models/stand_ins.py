"""The graphs of a made-up world's models, and stand-ins for trained weights that need no training.

    user = e / |e|,  e = b + 0.3 W2 tanh(W1 [b, moment]),  b = (sum of the history + popular) / (items in it + 1)
    p    = logistic(MLP [user, item, user * item, features]),  3 d + 32 - 512 - 256 - 128 - 1

What is trained (taught.py) has the same graphs. Here the re-ranker's layers are random but for two things: every unit
of the first also sees the inner product user · item, and the last layer is fitted by ridge regression to a taste that
is written down here (`taste`). What the random layers make of that taste is the truth for the pre-ranker, which is
fitted on what the re-ranker says of retrieved candidates. Where arrays and people come from is made_up.py.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper, parser

from models.linear import logistic_regression

Floats = NDArray[np.float32]

HISTORY, MOMENT, FEATURES = 50, 8, 32  # items of a history, numbers of a context and of an item that models read
STEP = 0.04  # of features in eight bits, which then reach to 5.08 either way
HIDDEN = (512, 256, 128)  # of the re-ranker, unless the world is asked for others
TOWER_HIDDEN = 128
CONTEXT_PULL = 0.3  # how far the tower's network moves a person, whose own embedding has length 1 or so
SPREAD, MEAN = 1.5, -2.0  # of the logits over retrieved candidates: scores from .01 to .9
RIDGE = 1e-3

# Its name in pack.toml → how strongly the taste follows it. The first columns of `features` are these, standardised.
TOLD_APART = {"log_popularity": 0.6, "quality": 0.6, "year": 0.25, "price": -0.3}

TOWER = """
<ir_version: 10, opset_import: ["": 17]>
user_tower (float[1,{length},{d}] history, float[1,{length}] mask, float[1,{moment}] moment) => (float[1,{d}] user)
<int64[1] one = {{1}}, int64[1] two = {{2}}, float unit = {{1}}>
{{
  weights = Unsqueeze(mask, two)
  seen = Mul(history, weights)
  total = ReduceSum<keepdims=0>(seen, one)
  with_popular = Add(total, popular)
  count = ReduceSum<keepdims=1>(mask, one)
  counted = Add(count, unit)
  mean = Div(with_popular, counted)
  known = Concat<axis=1>(mean, moment)
  inner = Gemm(known, w1, b1)
  bent = Tanh(inner)
  pull = Gemm(bent, w2, b2)
  sum = Add(mean, pull)
  length = ReduceL2<axes=[1], keepdims=1>(sum)
  user = Div(sum, length)
}}
"""

# `user` is wanted row by row, as exporters write it; pack sends it once and expands it. Features in eight bits come as
# integers, of which one is worth a step.
RE_RANKER = """
<ir_version: 10, opset_import: ["": 17]>
re_ranker (float[n,{d}] user, float[n,{d}] item, {type}[n,{features}] features) => (float[n,1] p)
{{
{scaled}  cross = Mul(user, item)
  x = Concat<axis=1>(user, item, cross, {read})
  a1 = Gemm(x, w1, b1)
  h1 = Relu(a1)
  a2 = Gemm(h1, w2, b2)
  h2 = Relu(a2)
  a3 = Gemm(h2, w3, b3)
  h3 = Relu(a3)
  logit = Gemm(h3, w4, b4)
  p = Sigmoid(logit)
}}
"""

SCALED = """  whole = Cast<to=1>(features)
  step = Constant<value_float={step}>()
  scaled = Mul(whole, step)
"""


@dataclass(frozen=True, slots=True)
class Found:
    """Retrieved candidates of many requests, in columns of equal length n.

    user, item f32[n, d]; features f32[n, 32], `real`; named f32[n, F], the features of `pre_ranker_names` as the
    service has them.
    """

    user: Floats
    item: Floats
    features: Floats
    named: Floats

    @property
    def affinity(self) -> Floats:
        """user · item, f32[n]."""
        return np.asarray(np.einsum("nd,nd->n", self.user, self.item))


def user_tower(popular: Floats, rng: np.random.Generator) -> onnx.ModelProto:
    """The graph at the top. popular f32[d]: the embedding that stands for somebody nothing is known of."""
    d = len(popular)
    return user_tower_of(
        {
            "popular": popular[None],
            "w1": np.concatenate([_normal(rng, d, TOWER_HIDDEN), 0.35 * _normal(rng, MOMENT, TOWER_HIDDEN)]),
            "b1": 0.1 * _normal(rng, TOWER_HIDDEN),
            "w2": CONTEXT_PULL * _normal(rng, TOWER_HIDDEN, d) / math.sqrt(0.5 * TOWER_HIDDEN * d),
            "b2": np.zeros(d),
        }
    )


def user_tower_of(weights: dict[str, NDArray[Any]]) -> onnx.ModelProto:
    """The graph at the top: popular [1, d], w1 [d + moment, hidden], b1, w2 [hidden, d], b2."""
    return _with_weights(TOWER.format(length=HISTORY, d=weights["popular"].shape[1], moment=MOMENT), weights)


def pre_ranker_names(features: type[np.generic]) -> tuple[str, ...]:
    """What the pre-ranker reads. Where features are small, their own columns: four tables less to be in memory."""
    told = [f"features.{j}" for j in range(len(TOLD_APART))] if features is np.int8 else list(TOLD_APART)
    return "retrieval_score", *(f"item.{name}" for name in told), "history_log_count"


def stored(features: Floats, dtype: type[np.generic]) -> NDArray[Any]:
    """Features as a table of this type holds them; i8: in steps."""
    if dtype is np.int8:
        return np.clip(np.rint(features / STEP), -127, 127).astype(np.int8)
    return features.astype(dtype)


def real(features: NDArray[Any]) -> Floats:
    """The features that a table holds."""
    return np.asarray(features, np.float32) * np.float32(STEP if features.dtype == np.int8 else 1)


def re_ranker_of(weights: dict[str, NDArray[Any]], d: int, features: type[np.generic]) -> onnx.ModelProto:
    """The graph at the top: w1 to w4, [in, out] each, with b1 to b4. features: the type of their table."""
    way = {"type": "float", "scaled": "", "read": "features"}
    if features is np.int8:
        way = {"type": "int64", "scaled": SCALED.format(step=STEP), "read": "scaled"}
    return _with_weights(RE_RANKER.format(d=d, features=FEATURES, **way), weights)


def re_ranker(
    found: Found, rng: np.random.Generator, hidden_layers: tuple[int, ...], features: type[np.generic]
) -> onnx.ModelProto:
    """The graph at the top, its last layer fitted on these candidates. hidden_layers: units of each, three."""
    weights = _first_layer(found, rng, hidden_layers[0])
    hidden = _activations(found, weights)
    for layer, (n_in, n_out) in enumerate(pairwise(hidden_layers), 2):
        w = _normal(rng, n_in, n_out) * math.sqrt(2 / n_in)
        b = -(hidden @ w).mean(axis=0)  # half of the rows on either side of each unit's bend
        weights |= {f"w{layer}": w, f"b{layer}": b}
        hidden = np.maximum(hidden @ w + b, 0)
    w, b = _ridge(hidden, taste(found, rng))
    logits = hidden @ w + b
    stretch = SPREAD / logits.std()
    weights |= {"w4": (stretch * w)[:, None], "b4": np.array([stretch * (b - logits.mean()) + MEAN])}
    return re_ranker_of(weights, found.user.shape[1], features)


def taste(found: Found, rng: np.random.Generator) -> Floats:
    """What people like, f32[n]: affinity, the features told apart, all others, and two interplays.

    The pre-ranker has the first two and can't have the rest: it isn't told the other features, and no linear model
    has quality that matters to some people and not to others, or popularity that matters by price.
    """
    n_told = len(TOLD_APART)
    told, others = found.features[:, :n_told], found.features[:, n_told:]
    hidden_taste = others @ _normal(rng, others.shape[1])
    leaning = found.user @ _normal(rng, found.user.shape[1])
    liking = _standard(found.affinity) + told @ np.array(list(TOLD_APART.values()))
    return np.asarray(
        liking
        + 0.7 * _standard(hidden_taste)
        + 1.2 * np.tanh(_standard(leaning)) * told[:, 1]
        + 0.8 * np.tanh(told[:, 0]) * np.tanh(told[:, 3]),
        np.float32,
    )


def pre_ranker(found: Found, scores: Floats) -> tuple[NDArray[np.float64], float]:
    """Weights [F] and bias of the linear model that comes nearest to the re-ranker's scores f32[n]."""
    mean, spread = found.named.mean(axis=0, dtype=float), found.named.std(axis=0, dtype=float) + 1e-6
    weights, bias = logistic_regression((found.named - mean) / spread, scores.astype(float))
    return weights / spread, float(bias - mean @ (weights / spread))


def _first_layer(found: Found, rng: np.random.Generator, units: int) -> dict[str, NDArray[Any]]:
    """Units that each see the affinity, standardised over the candidates, and a random mix of everything."""
    d = found.user.shape[1]
    sees = _normal(rng, units) / found.affinity.std()
    w = np.concatenate(
        [
            0.5 * _normal(rng, d, units),
            0.5 * _normal(rng, d, units),
            sees + 0.5 * math.sqrt(d) * _normal(rng, d, units),
            _normal(rng, FEATURES, units) / math.sqrt(FEATURES / 4),
        ]
    )
    return {"w1": w, "b1": 0.5 * _normal(rng, units) - sees * found.affinity.mean()}


def _activations(found: Found, weights: dict[str, NDArray[Any]]) -> Floats:
    x = np.concatenate([found.user, found.item, found.user * found.item, found.features], axis=1)
    return np.asarray(np.maximum(x @ weights["w1"] + weights["b1"], 0))


def _ridge(x: Floats, y: Floats) -> tuple[NDArray[np.float64], float]:
    """Weights and bias that minimise mean (x w + b - y)^2 + RIDGE · mean variance of x · |w|^2."""
    centred = (x - x.mean(axis=0)).astype(float)
    gram = centred.T @ centred
    penalty = RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram))
    w = np.linalg.solve(gram + penalty, centred.T @ (y - y.mean()))
    return w, float(y.mean() - x.mean(axis=0) @ w)


def _standard(x: Floats) -> Floats:
    return np.asarray((x - x.mean()) / (x.std() + 1e-9), np.float32)


def _normal(rng: np.random.Generator, *shape: int) -> Floats:
    return rng.standard_normal(shape, np.float32)


def _with_weights(text: str, weights: dict[str, NDArray[Any]]) -> onnx.ModelProto:
    model = parser.parse_model(text)
    model.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(w, np.float32), name) for name, w in weights.items()
    )
    onnx.checker.check_model(model)
    return model
