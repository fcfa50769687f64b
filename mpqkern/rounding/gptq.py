"""GPTQ: column by column to the nearest point, each error passed on to the columns that are still free.

Frantar et al. 2023 (arXiv 2210.17323). With H the second moments of the inputs and U upper triangular, H^-1 = U'U,
rounding column t by an error e is best made up for by W[:, t+1:] -= e / U[t, t] * U[t, t+1:].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..numbers import check_flag
from ..scheme import Scheme
from .damping import Damped
from .grid import Grid, better
from .statistics import Statistics

BLOCK = 128  # columns whose errors are passed on together


@dataclass(frozen=True, kw_only=True)
class GPTQ(Damped):
    """GPTQ, with the options of `Damped` and

    order  columns of large inputs first; the grid stays, so the packed layout does not know
    """

    name: ClassVar[str] = "gptq"

    order: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag("order", self.order)

    def codes(self, rows: Tensor, scheme: Scheme, statistics: Statistics, damp: float) -> tuple[Grid, Tensor]:
        wanted, h = statistics.target(rows, damp)
        grid = Grid.fit(wanted, scheme, self.grid, h)
        codes = gptq(wanted, h, grid, order=self.order)
        return grid, better(wanted, h, grid, [codes, grid.nearest(wanted), grid.nearest(rows)])


def gptq(rows: Tensor, h: Tensor, grid: Grid, *, order: bool = True) -> Tensor:
    """fp64 codes [N, K] for weights [N, K] with the positive definite `h` [G, K, K]."""
    groups, k = h.shape[:2]
    w, scale = (t.unflatten(0, (groups, -1)) for t in (rows.double(), grid.scale))
    zero = grid.zero.unflatten(0, (groups, -1)) if grid.zero.dim() == 2 else grid.zero.expand(w.shape)
    if order:
        to = rank(h)
        w, scale, zero = (t.gather(2, to[:, None].expand(t.shape)) for t in (w, scale, zero))
        h = h.gather(1, to[:, :, None].expand(h.shape)).gather(2, to[:, None].expand(h.shape))
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    w, codes = w.clone(), torch.empty_like(w)
    for start in range(0, k, BLOCK):
        end = min(start + BLOCK, k)
        errors = torch.empty_like(w[..., start:end])
        for t in range(start, end):
            codes[..., t] = grid.column_codes(w[..., t], scale[..., t], zero[..., t])
            value = scale[..., t] * (codes[..., t] - zero[..., t])
            error = (w[..., t] - value) / u[:, None, t, t]
            w[..., t + 1 : end] -= error[..., None] * u[:, None, t, t + 1 : end]
            errors[..., t - start] = error
        w[..., end:] -= errors @ u[:, start:end, end:]
    if order:
        codes = torch.empty_like(codes).scatter_(2, to[:, None].expand(codes.shape), codes)
    return codes.flatten(0, 1)


def rank(h: Tensor) -> Tensor:
    """[G, K]: columns of large inputs first."""
    return h.diagonal(dim1=1, dim2=2).argsort(descending=True, stable=True)
