"""Rounding column by column with the inputs themselves, a row of X and Y a position: slow and as the papers put it."""

from __future__ import annotations

import torch
from torch import Tensor

from mpqkern.rounding.grid import Grid


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
