"""The hidden truth: tastes that moments move, and logits by its formula. What is judged by it: test_synthesize.py."""

import numpy as np
import pytest

from models import truth
from models.stand_ins import MOMENT
from models.truth import LATENT, TOLD, Truth

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def drawn() -> Truth:
    return Truth.drawn(np.random.default_rng(1))


def tastes(*shape: int) -> np.ndarray:
    t = RNG.standard_normal((*shape, LATENT)).astype(np.float32)
    return t / np.linalg.norm(t, axis=-1, keepdims=True)


def test_a_moment_moves_a_taste_and_keeps_its_length(drawn: Truth) -> None:
    taste, moment = tastes(5), RNG.standard_normal((5, MOMENT)).astype(np.float32)
    moved = drawn.moved(taste, moment)
    np.testing.assert_allclose(np.linalg.norm(moved, axis=1), 1, rtol=1e-5)
    along = (moved * taste).sum(axis=1)
    assert np.all((along > 0.3) & (along < 0.9999))
    np.testing.assert_allclose(drawn.moved(taste, 0 * moment), taste, atol=1e-6)


def test_the_logits_are_those_of_the_formula(drawn: Truth) -> None:
    taste, latent, told = tastes(2, 3), tastes(2, 4), RNG.standard_normal((2, 4, len(TOLD))).astype(np.float32)
    found = drawn.logits(taste, latent, told)
    assert found.shape == (2, 3, 4)
    for n, e, c in np.ndindex(found.shape):
        t, z, x = taste[n, e], latent[n, c], told[n, c]
        liking = (TOLD + truth.LEANING * np.tanh(drawn.leaning.T @ t)) @ x
        interplay = np.tanh(drawn.asks.T @ t) @ np.tanh(drawn.has.T @ z)
        dear = np.log1p(np.exp(x[truth.PRICE] - drawn.purse @ t))
        expected = truth.LEVEL + truth.AFFINITY * t @ z + liking + truth.INTERPLAY * interplay - truth.STINGY * dear
        assert found[n, e, c] == pytest.approx(expected, abs=1e-4)
