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
from .damping import check_damp, damping
from .grid import SEARCHES, Codes, Grid, better
from .method import Rounding
from .statistics import Statistics

BLOCK = 128  # columns whose errors are passed on together


@dataclass(frozen=True, kw_only=True)
class GPTQ(Rounding):
    """GPTQ towards the float layer's output on the float model's inputs.

    damp      of H's mean diagonal is added to its diagonal; None: 0.01, or where inputs are few, what does best on
              inputs left out
    order     columns of large inputs first; the grid stays, so the packed layout does not know
    grid      of the weights to round: "minmax", "mse", or "output" (the range with the least error of the output)
    mismatch  False aims at the float layer's output on the inputs that it will meet instead
    """

    name: ClassVar[str] = "gptq"
    needs: ClassVar[str] = "inputs"

    damp: float | None = None
    order: bool = True
    grid: str = "output"
    mismatch: bool = True

    def __post_init__(self) -> None:
        check_damp(self.damp)
        if self.grid not in SEARCHES:
            raise ValueError(f"grid={self.grid!r}; wanted 'minmax', 'mse' or 'output'")
        for name in ("order", "mismatch"):
            check_flag(name, getattr(self, name))

    def round(self, rows: Tensor, scheme: Scheme, statistics: Statistics | None = None) -> Codes:
        if statistics is None:
            raise ValueError(f"statistics=None; wanted those of the layer's inputs, which {self.name!r} needs")

        def attempt(some: Tensor, seen: Statistics, damp: float) -> Tensor:
            grid, codes = self.codes(some, scheme, seen, damp)
            return grid.values(codes)

        grid, codes = self.codes(rows, scheme, statistics, self.damp or damping(rows, statistics, attempt))
        return grid.chosen(codes)

    def codes(self, rows: Tensor, scheme: Scheme, statistics: Statistics, damp: float) -> tuple[Grid, Tensor]:
        """A grid and fp64 codes on it, for a damping that is settled."""
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
