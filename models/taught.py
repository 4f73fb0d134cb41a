"""Towers and re-ranker of a made-up world, trained on what its people chose and clicked.

    choices ─▶ two towers, in-batch softmax with log Q ─▶ user_tower.onnx, embedding.npy
    what the towers find for some people ─▶ shown, clicked by the truth ─▶ re_ranker.onnx

The graphs are those of stand_ins.py, with weights that were learned. Nothing sees the hidden vectors: the towers have
the items' blurred content and people's choices, the re-ranker has clicks. One thread, so that the same
world gives the same weights.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from models.encoder import Schedule, Show, descend
from models.made_up import CONTENT, Choices, World
from models.stand_ins import MOMENT, TOWER_HIDDEN, Found, re_ranker_of, user_tower_of
from models.two_tower import MASKED

Array = NDArray[Any]
Floats = NDArray[np.float32]

ITEM_HIDDEN = 128
TOWERS = Schedule(epochs=4, batch=512, rate=3e-3, weight_decay=0.01)
LEAST_STEPS = 250  # of the towers: in a small world a pass over the choices is over at once
RE_RANKER = Schedule(epochs=4, batch=1024, rate=2e-3, weight_decay=0.02)
SHARPNESS = 8.0  # of the softmax over products of embeddings, at first; it is learned
POPULARITY_BINS = 50  # in which it is counted how often an item is a target: most are so never or once


class Towers(nn.Module):
    """The item tower over content; the user tower over the embeddings of a history, and the moment.

    Features are the later stages': with them in it, what is good to everybody would lie in the way of what is near.
    """

    def __init__(self, d: int) -> None:
        super().__init__()
        self.item = nn.Sequential(nn.Linear(CONTENT, ITEM_HIDDEN), nn.ReLU(), nn.Linear(ITEM_HIDDEN, d))
        self.item_skip = nn.Linear(CONTENT, d, bias=False)
        self.popular = nn.Parameter(0.1 * torch.randn(1, d))
        self.inner, self.pull = nn.Linear(d + MOMENT, TOWER_HIDDEN), nn.Linear(TOWER_HIDDEN, d)
        self.log_sharpness = nn.Parameter(torch.tensor(SHARPNESS).log())

    def items(self, known: Tensor) -> Tensor:
        """[..., d]"""
        return self.item(known) + self.item_skip(known)

    def users(self, history: Tensor, mask: Tensor, moment: Tensor) -> Tensor:
        """[B, d] of length 1, for the embeddings of histories [B, L, d]; as stand_ins.TOWER."""
        total = (history * mask[..., None]).sum(1) + self.popular
        mean = total / (mask.sum(1, keepdim=True) + 1)
        return F.normalize(mean + self.pull(torch.tanh(self.inner(torch.cat([mean, moment], 1)))), dim=1)


def fit_towers(world: World, choices: Choices, say: Show) -> onnx.ModelProto:
    """Train both; write embedding.npy. Returns the graph of the user tower."""
    torch.manual_seed(world.seed)
    torch.set_num_threads(1)
    model, content = Towers(world.d), world.open("content")
    histories, log_q = world.open("user_history"), _log_share(world, choices)

    def known(rows: Array) -> Tensor:
        return torch.from_numpy(content[rows].astype(np.float32))

    def loss_of(batch: Tensor) -> Tensor:
        at = batch.numpy()
        history, targets = histories[choices.person[at]], choices.item[at]
        seen, back = np.unique(np.maximum(history, 0), return_inverse=True)
        mask = torch.from_numpy((history >= 0).astype(np.float32))
        embedded = model.items(known(seen))[torch.from_numpy(back.reshape(history.shape))]
        users = model.users(embedded, mask, torch.from_numpy(choices.moment[at]))
        logits = model.log_sharpness.exp() * users @ model.items(known(targets)).T
        is_no_negative = (targets[None] == targets[:, None]) & ~np.eye(len(at), dtype=np.bool_)
        logits = logits - torch.from_numpy(log_q[targets])
        return F.cross_entropy(logits.masked_fill(torch.from_numpy(is_no_negative), MASKED), torch.arange(len(at)))

    passes = max(TOWERS.epochs, -(-LEAST_STEPS * TOWERS.batch // len(choices.item)))
    schedule = replace(TOWERS, epochs=passes)
    descend("towers", list(model.parameters()), schedule, len(choices.item), loss_of, world.seed, say)
    embedding = world.create("embedding", world.table_type, world.n, world.d)
    with torch.no_grad():
        some = world.rng("some").choice(world.n, min(world.n, 10_000), replace=False)
        length = float(model.items(known(some)).norm(dim=1).mean())
        for part in world.blocks():
            embedding[part] = model.items(known(np.arange(part.start, part.stop))).numpy() / length
    # Embeddings have length 1 or so, whatever was learned: the tower's first product makes up for it.
    inner = model.inner.weight.detach().numpy().T.copy()
    inner[: world.d] *= length
    weights = {
        "popular": model.popular.detach().numpy() / length,
        "w1": inner,
        "b1": model.inner.bias.detach().numpy(),
        "w2": model.pull.weight.detach().numpy().T / length,
        "b2": model.pull.bias.detach().numpy() / length,
    }
    return user_tower_of(weights)


def _log_share(world: World, choices: Choices) -> Floats:
    """log Q f32[N]: of all choices, the share that an item of such a popularity has."""
    popularity = world.open("log_popularity")
    edges = np.quantile(popularity, np.linspace(0, 1, POPULARITY_BINS + 1)[1:-1])
    of = np.searchsorted(edges, popularity)
    chosen = np.bincount(of[choices.item], minlength=POPULARITY_BINS) + 0.5
    share = chosen / np.bincount(of, minlength=POPULARITY_BINS) / len(choices.item)
    return np.log(share).astype(np.float32)[of]


@dataclass(frozen=True, slots=True)
class _Layers:
    """The re-ranker's layers, over inputs divided by their spread."""

    spread: Floats
    stack: nn.Sequential

    def weights(self) -> dict[str, Array]:
        layers = [layer for layer in self.stack if isinstance(layer, nn.Linear)]
        weights = {}
        for number, layer in enumerate(layers, 1):
            weights |= {f"w{number}": layer.weight.detach().numpy().T, f"b{number}": layer.bias.detach().numpy()}
        return weights | {"w1": weights["w1"] / self.spread[:, None]}


def fit_re_ranker(world: World, found: Found, clicked: Floats, say: Show) -> onnx.ModelProto:
    """The graph, trained by logistic loss on the share of times f32[n] that each candidate was clicked."""
    torch.manual_seed(world.seed)
    x = np.concatenate([found.user, found.item, found.user * found.item, found.features], axis=1)
    layers = _Layers(x.std(axis=0) + 1e-6, _stack(x.shape[1], world.hidden))
    inputs, targets = torch.from_numpy(x / layers.spread), torch.from_numpy(clicked)
    with torch.no_grad():
        layers.stack[-1].bias += torch.logit(targets.mean())

    def loss_of(rows: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(layers.stack(inputs[rows])[:, 0], targets[rows])

    descend("re-ranker", list(layers.stack.parameters()), RE_RANKER, len(x), loss_of, world.seed, say)
    return re_ranker_of(layers.weights(), world.d, world.features_type)


def _stack(width: int, hidden: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for units in hidden:
        layers += [nn.Linear(width, units), nn.ReLU()]
        width = units
    last = nn.Linear(width, 1)
    nn.init.zeros_(last.weight)
    return nn.Sequential(*layers, last)
