"""Retrieval: a user tower over the history and an item tower over id and content; their inner product.

Trained with the softmax over the batch's own targets, corrected for how often each item is in a batch:

    loss = -log softmax_j(u_b · v_j - log Q(j)) at j = b,   Q(j) = share of the fitted events with item j

without which the towers learn log p(j|u) - log Q(j), that is, to avoid what is popular (FACTS: recall@10
.616 with the correction, .388 without). Accidental hits are masked: other rows of the same item, and items
that the person already has. The towers write the item table "embedding" and read "history_vector".

Source: X. Yi et al., Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations, 2019.
"""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from models.encoder import HistoryEncoder, Schedule, Show, descend, uniform_vectors
from models.split import Rows, Timeline, recent

D = 64
LENGTH = 50  # items of a history that the user tower reads
DROPOUT = 0.4  # tuned on the 60–80 % interval: .2 gives .001 less NDCG@10
SCHEDULE = Schedule(epochs=7, batch=1024, rate=4e-3)
MASKED = -1e4


class TwoTower(nn.Module):
    """Item vectors for the history and for the candidates: id vector + a linear map of the content."""

    content: Tensor

    def __init__(self, content: NDArray[np.float32]) -> None:
        super().__init__()
        n, width = content.shape
        self.register_buffer("content", torch.from_numpy(content))
        self.history_id = uniform_vectors(n, D)
        self.history_content = nn.Linear(width, D, bias=False)
        self.item_id = uniform_vectors(n, D)
        self.item_content = nn.Linear(width, D, bias=False)
        self.user_tower = HistoryEncoder(D, LENGTH, DROPOUT)
        self.dropout = nn.Dropout(DROPOUT)

    def history_vectors(self) -> Tensor:
        """[N, d]: what the user tower reads of each item."""
        return self.history_id + self.history_content(self.content)

    def embeddings(self) -> Tensor:
        """[N, d]: the item tower."""
        return self.item_id + self.item_content(self.content)

    def users(self, rows: Tensor) -> Tensor:
        """[B, d] for histories as row numbers [B, length], newest first, -1 for none."""
        return self.user_tower.from_table(self.dropout(self.history_vectors()), rows[:, :LENGTH])


def fit_two_tower(
    line: Timeline, events: Rows, content: NDArray[np.float32], seed: int, show: Show, epochs: int | None = None
) -> TwoTower:
    """The towers, fitted on these events (the target of each; its history is what came before)."""
    torch.manual_seed(seed)
    model = TwoTower(content).train()
    histories = torch.from_numpy(recent(line, events, LENGTH))
    targets = torch.from_numpy(line.item[events])
    log_q = torch.from_numpy(log_frequency(line.item[events], line.n_items))

    def loss_of(rows: Tensor) -> Tensor:
        users = model.users(histories[rows])
        return in_batch_loss(users, model.embeddings(), targets[rows], histories[rows], log_q)

    schedule = SCHEDULE if epochs is None else Schedule(epochs, SCHEDULE.batch, SCHEDULE.rate)
    descend("two towers", list(model.parameters()), schedule, len(events), loss_of, seed, show)
    return model.eval()


def log_frequency(items: Rows, n_items: int) -> NDArray[np.float32]:
    """log Q f32[N]; an item that is never a target is never in a batch, so its value doesn't matter."""
    counts = np.bincount(items, minlength=n_items)
    return np.log(np.maximum(counts, 0.5) / len(items)).astype(np.float32)


def in_batch_loss(users: Tensor, items: Tensor, targets: Tensor, histories: Tensor, log_q: Tensor) -> Tensor:
    """The corrected softmax loss of a batch: users [B, d], the whole item table, targets [B], histories [B, L]."""
    logits = users @ items[targets].T - log_q[targets][None, :]
    return F.cross_entropy(
        logits.masked_fill(accidental_hits(targets, histories, len(items)), MASKED), torch.arange(len(targets))
    )


def accidental_hits(targets: Tensor, histories: Tensor, n_items: int) -> Tensor:
    """bool [B, B]: column c is no negative for row b: the same item, or one in b's history; never b's own."""
    owned = torch.zeros(len(targets), n_items + 1, dtype=torch.bool)
    owned.scatter_(1, torch.where(histories >= 0, histories, n_items), True)
    hits = owned[:, targets] | (targets[None, :] == targets[:, None])
    return hits & ~torch.eye(len(targets), dtype=torch.bool)
