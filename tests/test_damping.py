"""With few inputs the damping is the one that holds on inputs left out."""

import pytest
import torch
from torch import nn

import mpqkern as mq
from mpqkern import Scheme
from mpqkern.measuring.task import Task
from mpqkern.rounding import GPFQ, GPTQ, Qronos
from mpqkern.rounding.damping import DAMPINGS, ENOUGH, damping
from mpqkern.rounding.layerwise import collect
from mpqkern.rounding.statistics import Statistics
from mpqkern.rounding.twin import Twin


def drawn(rows: int, k: int, noise: float, *, fold: int | None = None, seed: int = 0) -> Statistics:
    """Inputs of K independent columns, and what they have become in a rounded model."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(1, rows, k, generator=draw)
    found = Statistics.of(nn.Linear(k, 1), products=True, sums=True)
    found.split()
    found.add(x + noise * torch.randn(1, rows, k, generator=draw), x, fold)
    return found


def test_halves_add_up():
    found = drawn(21, 5, 0.3)
    (a, b), (c, d) = found.folds()
    assert a is d and b is c and (a.count, b.count) == (11, 10)
    for name in ("h", "g", "y", "x"):
        torch.testing.assert_close(getattr(a, name) + getattr(b, name), getattr(found, name))
        assert not torch.allclose(getattr(a, name), getattr(b, name))
    assert (drawn(21, 5, 0.3, fold=0).half.count, drawn(21, 5, 0.3, fold=1).half.count) == (21, 0)


def test_halves_of_inputs_that_are_alike():
    found = Statistics.of(nn.Linear(4, 1))
    found.split()
    found.add(torch.randn(1, 9, 4))
    assert all(part.g is part.h for part, _ in found.folds())


def test_excess_is_the_error_of_the_outputs_but_for_a_constant():
    draw = torch.Generator().manual_seed(0)
    y, x = (torch.randn(30, 6, generator=draw).double() for _ in range(2))
    w, q, p = (torch.randn(4, 6, generator=draw).double() for _ in range(3))
    found = Statistics.of(nn.Linear(6, 4), products=True)
    found.add(y[None], x[None])
    true = [float((x @ w.T - y @ v.T).square().sum()) for v in (q, p)]
    assert found.excess(w, q) - found.excess(w, p) == pytest.approx(true[0] - true[1])


def test_few_inputs_ask_for_more_damping_than_many():
    w = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))

    def fitted(rows: torch.Tensor, seen: Statistics, damp: float) -> torch.Tensor:
        return seen.target(rows, damp)[0]

    few, many = (damping(w, drawn(n, 64, 1.0), fitted) for n in (80, 4000))
    assert few > many


@pytest.mark.parametrize("method", [GPTQ, GPFQ, Qronos])
def test_weights_hold_on_new_inputs(method):
    """64 inputs for 64 columns: nearly always better on others than the least damping is."""
    wins = 0
    for seed in range(6):
        w = torch.randn(16, 64, generator=torch.Generator().manual_seed(seed))
        seen, other = drawn(64, 64, 0.5, seed=seed), drawn(4000, 64, 0.5, seed=100 + seed)
        errors = [other.excess(w, m.round(w, Scheme(4), seen).values()) for m in (method(), method(damp=DAMPINGS[0]))]
        wins += errors[0] < errors[1]
    assert wins >= 5


def test_halves_are_kept_only_where_inputs_are_few():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    for rows, kept in ((ENOUGH * 8 // 2 - 1, True), (ENOUGH * 8 // 2, False)):
        batches = [torch.randn(rows, 8) for _ in range(2)]
        found = collect(Task(model, batches), [1], Twin(), memory=2**20, seed=0)[1]
        assert (found.half is not None) == kept
        if kept:
            assert found.half.count == rows  # the first batch


def test_a_damping_that_is_asked_for_is_taken(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mpqkern.rounding.damping.damping", lambda *_: pytest.fail("asked"))
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(9, 8)
    mq.calibrate(model, {"*": 2}, x, rounding=GPTQ(damp=0.5))
