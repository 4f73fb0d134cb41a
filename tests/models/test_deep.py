"""The re-ranker and what follows it: rows alone, hard negatives, calibration and the linear stage."""

import numpy as np
import torch

from models import calibration, deep, linear


def tiny() -> deep.Deep:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    content, static = rng.normal(size=(40, 5)), rng.normal(size=(40, 3))
    model = deep.Deep(content.astype(np.float32), static.astype(np.float32)).eval()
    torch.nn.init.normal_(model.mlp[-1].weight)
    return model


def test_a_row_scores_the_same_in_any_company() -> None:
    model = tiny()
    tables = model.history_vectors(), model.item_vectors()
    history = torch.full((1, deep.LENGTH), -1)
    history[0, :3] = torch.tensor([5, 2, 9])
    together = deep.score_rows(model, tables, history, torch.tensor([[1, 7, 30, 12]]))
    alone = [deep.score_rows(model, tables, history, torch.tensor([[c]])) for c in (1, 7, 30, 12)]
    torch.testing.assert_close(together, torch.cat(alone, dim=1), rtol=1e-5, atol=1e-5)


def test_attention_weighs_what_was_last_more() -> None:
    assert bool((tiny().age[:, 0] > tiny().age[:, -1]).all())


def test_negatives_are_unseen_and_not_the_target() -> None:
    n = deep.NEGATIVES + 20
    seen = torch.zeros(2, n, dtype=torch.bool)
    seen[:, :15] = True
    targets = torch.tensor([20, 21])
    drawn = deep.hard_negatives(torch.randn(2, n), seen, targets, torch.Generator().manual_seed(0))
    assert drawn[:, 0].tolist() == [20, 21]
    assert drawn.shape == (2, 1 + deep.NEGATIVES)
    for row, target in zip(drawn[:, 1:].tolist(), [20, 21], strict=True):
        assert min(row) >= 15
        assert target not in row
        assert len(set(row)) == deep.NEGATIVES


def test_calibration_finds_the_planted_probability_and_keeps_the_order() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(-5.0, 2.0, 40_000).astype(np.float32)
    counts = rng.integers(0, 100, 40_000).astype(np.float32)
    p = 1 / (1 + np.exp(-(0.8 * logits + 2.0 + 0.3 * np.log1p(counts))))
    happened = (rng.uniform(size=p.size) < p).astype(np.float32)
    model = calibration.fit_calibration(*(torch.from_numpy(x) for x in (logits, counts, happened)))
    with torch.no_grad():
        got = torch.sigmoid(model.log_odds(torch.from_numpy(logits), torch.from_numpy(counts))).numpy()
        line = model(torch.linspace(-20, 10, 200), torch.ones(1, 5)).numpy()
    assert np.abs(got - p).mean() < 0.01
    assert (np.diff(line) > 0).all()


def test_the_linear_stage_keeps_its_teacher_order_at_the_level_of_the_events() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(20_000, len(linear.NAMES))).astype(np.float32)
    taught = 1 / (1 + np.exp(-(features @ np.arange(1, 13) / 6 - 1.0)))
    happened = (rng.uniform(size=len(taught)) < taught / 4).astype(float)  # the teacher is four times too high
    fitted = linear.fit_linear(features, taught, happened)
    ratio = fitted.weights / np.arange(1, 13)
    np.testing.assert_allclose(ratio, ratio.mean(), rtol=0.02)
    p = 1 / (1 + np.exp(-fitted.logits(features)))
    assert abs(p.mean() - happened.mean()) < 1e-3


def test_logistic_regression_recovers_shares() -> None:
    x = np.array([[0.0], [1.0]] * 50)
    weights, bias = linear.logistic_regression(x, np.array([0.2, 0.6] * 50), ridge=0.0)
    np.testing.assert_allclose(bias, np.log(0.2 / 0.8), rtol=1e-6)
    np.testing.assert_allclose(weights[0] + bias, np.log(0.6 / 0.4), rtol=1e-6)
