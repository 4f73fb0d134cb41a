"""The towers: the sign of the log Q correction, the mask of accidental hits, an empty history."""

import numpy as np
import pytest
import torch

from models import split, two_tower
from models.encoder import HistoryEncoder


def quiet(_: str) -> None:
    pass


def test_the_loss_subtracts_log_q() -> None:
    users, items = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.eye(2)
    log_q = torch.log(torch.tensor([0.8, 0.2]))
    none = torch.full((2, 1), -1)
    loss = two_tower.in_batch_loss(users, items, torch.tensor([0, 1]), none, log_q)
    logits = np.array([[1 - np.log(0.8), -np.log(0.2)], [-np.log(0.8), 1 - np.log(0.2)]])
    expected = np.mean(np.log(np.exp(logits).sum(axis=1)) - logits.diagonal())
    np.testing.assert_allclose(float(loss), expected, rtol=1e-6)


@pytest.mark.parametrize(("is_corrected", "slope"), [(True, 1.0), (False, 0.0)])
def test_only_with_the_correction_scores_follow_what_is_likely(is_corrected: bool, slope: float) -> None:
    # One kind of person and 200 items with planted shares: scores must be their log, up to a constant.
    shares = np.geomspace(1.0, 10.0, 200) / np.geomspace(1.0, 10.0, 200).sum()
    generator = torch.Generator().manual_seed(0)
    items = torch.zeros(200, 1, requires_grad=True)
    log_q = torch.from_numpy(np.log(shares).astype(np.float32)) * is_corrected
    users, none = torch.ones(128, 1), torch.full((128, 1), -1)
    optimiser = torch.optim.Adam([items], lr=0.02)
    for _ in range(600):
        targets = torch.multinomial(torch.from_numpy(shares), 128, replacement=True, generator=generator)
        loss = two_tower.in_batch_loss(users, items, targets, none, log_q)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    learned = items.detach().numpy()[:, 0]
    assert np.polyfit(np.log(shares), learned, 1)[0] == pytest.approx(slope, abs=0.25)


def test_accidental_hits_are_masked_but_never_the_own_target() -> None:
    targets = torch.tensor([0, 1, 0])
    histories = torch.tensor([[1, -1], [-1, -1], [2, 3]])
    expected = [
        [False, True, True],  # has item 1 already; the third row has the same target
        [False, False, False],
        [True, False, False],
    ]
    assert two_tower.accidental_hits(targets, histories, n_items=4).tolist() == expected


def test_both_paths_of_the_encoder_agree() -> None:
    torch.manual_seed(0)
    encoder = HistoryEncoder(8, length=30, dropout=0.5).eval()
    table, rows = torch.randn(40, 8), torch.randint(0, 40, (3, 30))
    rows[0], rows[1, 5:] = -1, -1
    mask = (rows >= 0).float()
    gathered = encoder(table[rows.clamp(min=0)] * mask[..., None], mask)
    torch.testing.assert_close(encoder.from_table(table, rows), gathered, rtol=1e-5, atol=1e-5)


def test_an_empty_history_gets_what_is_popular() -> None:
    # 30 people who all start with item 0, then one of many others.
    person = np.repeat(np.arange(30), 2)
    item = np.stack([np.zeros(30, np.int64), 1 + np.arange(30) % 9], axis=1).ravel()
    line = split.timeline(person, item, np.tile([1, 2], 30), 10, seed=0)
    torch.set_num_threads(1)
    model = two_tower.fit_two_tower(line, np.tile(np.arange(60), 40), np.eye(10, dtype=np.float32), 0, quiet, epochs=30)
    with torch.no_grad():
        scores = model.users(torch.full((1, two_tower.LENGTH), -1)) @ model.embeddings().T
    assert int(scores.argmax()) == 0
