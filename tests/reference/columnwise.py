"""Rounding column by column with the inputs themselves, a row of X and Y a position: slow and as the papers put it."""

from __future__ import annotations

import torch
from torch import Tensor

from mpqkern import Scheme
from mpqkern.rounding.grid import Codes, Grid, damage
from mpqkern.rounding.method import Rounding
from mpqkern.rounding.statistics import Statistics


def gpfq(rows: Tensor, x: Tensor, y: Tensor, grid: Grid) -> Tensor:
    """The recurrence with the error u [M, N] of each output (Zhang, Zhou and Saab 2022)."""
    codes, u = torch.zeros_like(rows), torch.zeros(len(x), len(rows), dtype=torch.float64)
    for t in range(rows.shape[1]):
        u = u + torch.outer(x[:, t], rows[:, t])
        length = y[:, t] @ y[:, t]
        codes[:, t] = nearest(grid, t, y[:, t] @ u / length if length > 0 else rows[:, t])
        u = u - torch.outer(y[:, t], grid.values(codes)[:, t])
    return codes


def qronos(rows: Tensor, x: Tensor, y: Tensor, grid: Grid, order: list[int]) -> Tensor:
    """Each weight where the error is least with all others as they are; those left by least squares (Zhang et al.)."""
    codes, w = torch.zeros_like(rows), rows.clone()  # of w, what is done holds its value
    for i, t in enumerate(order):
        rest, free = [s for s in range(len(order)) if s != t], order[i + 1 :]
        missing = x @ rows.T - y[:, rest] @ w[:, rest].T
        codes[:, t] = nearest(grid, t, y[:, t] @ missing / (y[:, t] @ y[:, t]))
        w[:, t] = grid.values(codes)[:, t]
        done = order[: i + 1]
        if free:
            w[:, free] = torch.linalg.lstsq(y[:, free], x @ rows.T - y[:, done] @ w[:, done].T).solution.T
    return codes


def nearest(grid: Grid, t: int, weights: Tensor) -> Tensor:
    """Codes [N] of weights [N] in column t."""
    return grid.nearest(weights[:, None].expand(-1, grid.k))[:, t]


def noisy(x: Tensor, y: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """With as many rows more as there are columns: what damping stands for."""
    more = (damp * y.square().sum(0).mean()).sqrt() * torch.eye(y.shape[1], dtype=torch.float64)
    return torch.cat([x, more]), torch.cat([y, more])


def inputs(groups: int, m: int, k: int) -> tuple[Tensor, Tensor]:
    """X and Y [G, M, K] of correlated columns; Y strays from X."""
    x = (torch.randn(groups, m, k) @ (torch.eye(k) + torch.rand(k, k) / k**0.5)).relu().double()
    return x, x + 0.2 * torch.randn_like(x)


def statistics(x: Tensor, y: Tensor) -> Statistics:
    return Statistics(y.mT @ y, y.mT @ x, y.sum(1), x.sum(1), y.shape[1])


def ladder(n: int, k: int, scheme: Scheme) -> Grid:
    """Points one apart: -1.5, -0.5, 0.5 and 1.5 for 2 bits."""
    top = 2**scheme.bits - 1
    return Grid(torch.ones(n, scheme.groups(k)), torch.tensor([top / 2]), scheme, k)


def check_never_worse(method: Rounding, scheme: Scheme) -> Codes:
    """Than the nearest points of the same grid, in any row, for the error of the output; a layer of two groups."""
    rows, (x, y) = torch.randn(12, 40), inputs(2, 60, 40)
    codes = method.round(rows, scheme, statistics(x, y))
    grid = Grid(codes.scales, codes.zeros, scheme, 40)
    wanted, h = statistics(x, y).target(rows, 0.01)
    ours, nearest = (damage(rows=wanted, values=v, h=h) for v in (codes.values(), grid.values(grid.nearest(rows))))
    assert (ours <= nearest * (1 + 1e-6)).all()
    assert codes.codes.max() <= grid.top and ours.sum() < 0.7 * nearest.sum()
    return codes


def check_groups(method: Rounding, scheme: Scheme) -> None:
    """A layer of three groups is three layers."""
    rows, (x, y) = torch.randn(12, 40), inputs(3, 60, 40)
    codes = method.round(rows, scheme, statistics(x, y))
    for part, theirs, a, b in zip(rows.split(4), codes.values().split(4), x.split(1), y.split(1), strict=True):
        assert torch.equal(method.round(part, scheme, statistics(a, b)).values(), theirs)
