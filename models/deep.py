"""Re-ranking: how likely is this candidate next, and is it among what the person comes to later?

    logit(c) = e_c · g(history)                       a long view: 200 items, through the history encoder
             + o_c · attention(c over the history)    DIN: what of the last 50 items matters for c, and how late
             + MLP(attention, o_c, g, static features of c)
             - level(g)                               the same for all of a request's candidates

Every row is scored by itself, whatever else is in the batch. Fitted in two passes: the long view by softmax
over all items, then the rest on top of it, with the long view and the tables fixed, by softmax over the target
and 63 hard negatives. (All of it free again in the second pass, or the retrieval score and the user embedding
as inputs, costs .002 to .006 of NDCG@10 on the tuning interval: both fit the fitted events too well.)
The level learns log sum exp over all items, so that a logit means log P(next), comparable between requests and
between fits (without it, a calibration doesn't carry over from one fit to the next); the ranking doesn't
depend on it. `calibration` turns the logit into P(later).

Source: G. Zhou et al., Deep Interest Network for Click-Through Rate Prediction, KDD 2018; attention here is
a scaled product with a learned weight of age, and a null item, so that nothing has to be attended to.
"""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from models.encoder import HistoryEncoder, Schedule, Show, descend, uniform_vectors
from models.split import Rows, Timeline, recent, seen_matrix
from models.two_tower import MASKED

D = 128  # tuned on the 60–80 % interval: 64 gives .004 less NDCG@10
D_HEAD = 32
HEADS = 2
LENGTH = 200  # items that the long view reads
ATTENDED = 50  # of them, the most recent that candidates attend to
DROPOUT = 0.4
NEGATIVES = 63
HARDNESS = 0.7  # negatives are drawn without replacement in proportion to exp(0.7 * the long view's logit)
NORMALISE = 0.1  # weight of (log sum exp over all items)^2, in units of the loss
LONG_VIEW = Schedule(epochs=5, batch=512, rate=3e-3, weight_decay=0.02)
WHOLE = Schedule(epochs=1, batch=64, rate=3e-3)
WHOLE_ROWS = 16_000  # events of the second pass, drawn from all


class Deep(nn.Module):
    """The logit of each candidate. Tables: history_id and item_id [N, d] learned, static [N, s] given."""

    static: Tensor
    content: Tensor

    def __init__(self, content: NDArray[np.float32], static: NDArray[np.float32]) -> None:
        super().__init__()
        n, width = content.shape
        self.register_buffer("content", torch.from_numpy(content))
        self.register_buffer("static", torch.from_numpy(static))
        self.history_id = uniform_vectors(n, D)
        self.history_content = nn.Linear(width, D, bias=False)
        self.item_id = uniform_vectors(n, D)
        self.item_content = nn.Linear(width, D, bias=False)
        self.dropout = nn.Dropout(DROPOUT)
        self.long_view = HistoryEncoder(D, LENGTH, DROPOUT)
        heads = D_HEAD * HEADS
        self.query, self.key = nn.Linear(D, heads), nn.Linear(D, heads)
        self.value, self.output = nn.Linear(D, heads), nn.Linear(D, heads)
        slopes = torch.linspace(0.1, 0.01, HEADS)[:, None]
        self.age = nn.Parameter(-slopes * torch.arange(ATTENDED).float())
        self.match = nn.Parameter(torch.zeros(HEADS))
        self.user = nn.Linear(D, D_HEAD)
        self.mlp = nn.Sequential(
            nn.Linear(3 * heads + D_HEAD + static.shape[1], 96), nn.ReLU(), nn.Dropout(0.3),
            nn.Linear(96, 48), nn.ReLU(), nn.Linear(48, 1),
        )  # fmt: skip
        nn.init.zeros_(self.mlp[-1].weight)
        self.level = nn.Sequential(nn.Linear(D, 32), nn.ReLU(), nn.Linear(32, 1))

    def history_vectors(self) -> Tensor:
        """[N, d]: the item table "deep_history"."""
        return self.history_id + self.history_content(self.content)

    def item_vectors(self) -> Tensor:
        """[N, d]: the item table "deep_item"."""
        return self.item_id + self.item_content(self.content)

    def forward(self, g: Tensor, history: Tensor, mask: Tensor, item: Tensor, static: Tensor) -> Tensor:
        """Logits [B, C].

        g [B, d] the long view; history [B, L, d] and mask [B, L] newest first; item [B, C, d]; static [B, C, s].
        """
        batch, n = item.shape[0], item.shape[1]
        pooled = self.attend(history[:, :ATTENDED], mask[:, :ATTENDED], item)
        output = self.output(item)
        matched = pooled * output
        who = self.user(g)[:, None].expand(batch, n, D_HEAD)
        wide = torch.cat([pooled, output, matched, who, static], dim=2)
        by_head = matched.view(batch, n, HEADS, D_HEAD).sum(3)
        long = torch.matmul(item, g[:, :, None]).squeeze(2)
        return long + torch.matmul(by_head, self.match) + self.mlp(wide).squeeze(2) - self.level(g)

    def attend(self, history: Tensor, mask: Tensor, item: Tensor) -> Tensor:
        """[B, C, heads * d_head]: for each candidate the attended history; the null item has weight 1."""
        batch, n, length = item.shape[0], item.shape[1], history.shape[1]
        query = self.query(item).view(batch, n, HEADS, D_HEAD).transpose(1, 2)
        key = self.key(history).view(batch, length, HEADS, D_HEAD).permute(0, 2, 3, 1)
        value = self.value(history).view(batch, length, HEADS, D_HEAD).transpose(1, 2)
        logits = torch.matmul(query, key) / D_HEAD**0.5 + self.age[None, :, None, :]
        weights = torch.exp(logits.clamp(max=10.0)) * mask[:, None, None, :]
        weights = weights / (1.0 + weights.sum(3, keepdim=True))
        return torch.matmul(weights, value).transpose(1, 2).reshape(batch, n, HEADS * D_HEAD)


def fit_deep(
    line: Timeline,
    events: Rows,
    content: NDArray[np.float32],
    static: NDArray[np.float32],
    seed: int,
    show: Show,
    epochs: int | None = None,
) -> Deep:
    """The re-ranker, fitted on these events. content [N, C] goes into the tables, static [N, s] into the MLP."""
    torch.manual_seed(seed)
    model = Deep(content, static).train()
    _fit_long_view(model, line, events, seed, show, epochs)
    _fit_whole(model, line, events, seed, show)
    return model.eval()


def _fit_long_view(model: Deep, line: Timeline, events: Rows, seed: int, show: Show, epochs: int | None) -> None:
    histories = torch.from_numpy(recent(line, events, LENGTH))
    targets = torch.from_numpy(line.item[events])

    def loss_of(rows: Tensor) -> Tensor:
        g = model.long_view.from_table(model.dropout(model.history_vectors()), histories[rows])
        logits = g @ model.item_vectors().T
        owned = torch.zeros(len(rows), line.n_items + 1, dtype=torch.bool)
        owned.scatter_(1, torch.where(histories[rows] >= 0, histories[rows], line.n_items), True)
        logits = logits.masked_fill(owned[:, :-1], MASKED)
        log_z = torch.logsumexp(logits, dim=1)
        chosen = logits.gather(1, targets[rows][:, None]).squeeze(1)
        return (log_z - chosen).mean()

    schedule = LONG_VIEW if epochs is None else Schedule(epochs, LONG_VIEW.batch, LONG_VIEW.rate)
    descend("re-ranker, long", list(model.parameters()), schedule, len(events), loss_of, seed, show)


def _fit_whole(model: Deep, line: Timeline, events: Rows, seed: int, show: Show) -> None:
    fixed = ("history_", "item_", "long_view.")
    parameters = [p for name, p in model.named_parameters() if not name.startswith(fixed)]
    events = np.random.default_rng(seed).permutation(events)[:WHOLE_ROWS]
    noise = torch.Generator().manual_seed(seed)
    histories = torch.from_numpy(recent(line, events, LENGTH))
    targets = torch.from_numpy(line.item[events])
    with torch.no_grad():
        tables = model.history_vectors(), model.item_vectors()
        some = model.long_view.from_table(tables[0], histories[:512]) @ tables[1].T
        model.level[-1].bias += torch.logsumexp(some, dim=1).mean()

    def loss_of(rows: Tensor) -> Tensor:
        some = histories[rows]
        with torch.no_grad():
            first = model.long_view.from_table(tables[0], some) @ tables[1].T
            seen = torch.from_numpy(seen_matrix(line, events[rows.numpy()])) > 0
            candidates = hard_negatives(first, seen, targets[rows], noise)
        logits = score_rows(model, tables, some, candidates)
        log_z = torch.logsumexp(first.masked_fill(seen, MASKED), dim=1)
        # Undo what drawing by exp(HARDNESS * first) makes more likely, as log Q does for batches.
        first = first.gather(1, candidates)
        corrected = logits - HARDNESS * first
        drift = torch.logsumexp(corrected, dim=1) - torch.logsumexp((1.0 - HARDNESS) * first, dim=1)
        chosen = F.cross_entropy(corrected, torch.zeros(len(rows), dtype=torch.long))
        return chosen + NORMALISE * ((log_z + drift) ** 2).mean()

    descend("re-ranker, whole", parameters, WHOLE, len(events), loss_of, seed, show)


def hard_negatives(first: Tensor, seen: Tensor, targets: Tensor, noise: torch.Generator) -> Tensor:
    """[B, 1 + NEGATIVES]: the target first, then unseen items drawn without replacement (Gumbel top-k)."""
    gumbel = -torch.log(-torch.log(torch.rand(first.shape, generator=noise).clamp(1e-9, 1 - 1e-7)))
    keys = (HARDNESS * first + gumbel).masked_fill(seen, -1e8).scatter(1, targets[:, None], -1e9)
    drawn = torch.topk(keys, NEGATIVES, dim=1).indices
    return torch.cat([targets[:, None], drawn], dim=1)


def score_rows(model: Deep, tables: tuple[Tensor, Tensor], histories: Tensor, candidates: Tensor) -> Tensor:
    """Logits [B, C] for histories as rows [B, LENGTH] (-1 for none) and candidates as rows [B, C].

    tables: the history vectors and the item vectors, each [N, d].
    """
    history_vectors, item_vectors = tables
    history_vectors, item_vectors = model.dropout(history_vectors), model.dropout(item_vectors)
    g = model.long_view.from_table(history_vectors, histories)
    near = histories[:, :ATTENDED]
    mask = (near >= 0).float()
    vectors = history_vectors[near.clamp(min=0)] * mask[..., None]
    return model(g, vectors, mask, item_vectors[candidates], model.static[candidates])
