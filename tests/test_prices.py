"""Prices of cross-layer answers: those of the LP around the answer, and the plain ones where no layers interact."""

from __future__ import annotations

import numpy as np
import pytest

from mpqkern.scheme import Layer
from mpqkern.solve import Assignment, Budget, Scores, solve

BITS = [2, 3, 4, 8]
SIZES = [100, 60, 350, 80, 20, 240]
LAYERS = [Layer(f"l{i}", "linear", (n, 1), n, 7 * n % 97) for i, n in enumerate(SIZES)]


def scores(seed: int, coupling: float) -> Scores:
    rng = np.random.default_rng(seed)
    unary = rng.lognormal(0, 1, (len(SIZES), 1)) * 3.0 ** (2 - np.array(BITS)) * rng.uniform(0.8, 1.2, (len(SIZES), 4))
    half = coupling * rng.standard_normal((6, 4, 6, 4)) * 2.0 ** (2 - np.array(BITS))
    half[range(6), :, range(6), :] = 0
    return Scores(LAYERS, BITS, unary, half + half.transpose(2, 3, 0, 1))


def choice(answer: Assignment) -> np.ndarray:
    return np.array([BITS.index(b) for b in answer.bits.values()])


BUDGETS = (Budget(avg_bits=3.6), Budget(gbops=6e-5), Budget(limit=9, rows=np.tile([0, 1, 2, 3], (6, 1))))


@pytest.mark.parametrize("budgets", [1, 2, 3])
def test_without_interactions_prices_are_the_linear_ones(budgets: int) -> None:
    found = []
    for seed in range(8):
        apart = scores(seed, 0.0)
        plain = solve(Scores(LAYERS, BITS, apart.unary), *BUDGETS[:budgets])
        got = solve(apart, *BUDGETS[:budgets])
        assert got.schemes == plain.schemes and got.prices == pytest.approx(plain.prices, rel=1e-6, abs=1e-12)
        found += list(got.prices.values())
    assert min(found) >= 0 and np.count_nonzero(found) > 6


@pytest.mark.parametrize("budgets", [1, 2])
def test_prices_are_the_best_multipliers_of_single_changes(budgets: int) -> None:
    """Costs of single changes, taken from the scores themselves; no other prices give a higher Lagrangian bound."""
    rng = np.random.default_rng(0)
    for seed in range(10):
        coupled = scores(seed, 0.3)
        answer = solve(coupled, *BUDGETS[:budgets])
        x = choice(answer)
        change = np.array([[coupled.cost(_with(x, i, b)) - answer.objective for b in range(4)] for i in range(6)])
        rows = np.array([budget.row(LAYERS, coupled.schemes).values for budget in BUDGETS[:budgets]], dtype=float)
        caps = np.array([budget.row(LAYERS, coupled.schemes).cap for budget in BUDGETS[:budgets]], dtype=float)
        per = np.array([float(budget.row(LAYERS, coupled.schemes).per) for budget in BUDGETS[:budgets]])
        price = np.array(list(answer.prices.values())) / per

        def bound(p: np.ndarray, change=change, rows=rows, caps=caps) -> float:
            return float((change + np.tensordot(p, rows, 1)).min(axis=1).sum() - p @ caps)

        assert (price >= 0).all()
        best = bound(price)
        others = [price * rng.uniform(0.5, 1.5, budgets) for _ in range(50)] + [0 * price, 0.99 * price, 1.01 * price]
        assert all(bound(other) <= best + 1e-9 for other in others)


def _with(x: np.ndarray, layer: int, scheme: int) -> np.ndarray:
    changed = x.copy()
    changed[layer] = scheme
    return changed


def test_what_cannot_be_exceeded_costs_nothing_and_no_price_is_negative() -> None:
    for seed in range(10):
        coupled = scores(seed, 1.0)
        assert solve(coupled, Budget(avg_bits=8)).prices == {"avg_bits": 0.0}
        assert solve(coupled).prices == {}
        assert all(price >= 0 for price in solve(coupled, *BUDGETS, ties=[["l0", "l3"]]).prices.values())


def test_with_projected_scores_prices_are_theirs() -> None:
    coupled = scores(3, 0.5)
    raw, clipped = (solve(coupled, BUDGETS[0], psd=psd) for psd in ("none", "clip"))
    assert 0 < clipped.prices["avg_bits"] != raw.prices["avg_bits"]
    assert "price " in str(clipped)
