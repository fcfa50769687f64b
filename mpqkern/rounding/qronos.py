"""Qronos: the first weight makes up for what the layers before have done, all others for what rounding has done.

Zhang et al. 2025 (arXiv 2505.11695). Each weight is rounded where, all others as they are, the float layer's output
comes nearest; then those still free are solved for by least squares. After the first such solve a weight's best place
is where it is, so that from the second one on this is GPTQ. What differs from GPTQ on the weights V that fit Y best is
the first one: it is rounded with the others at their float values, not at those of V.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..scheme import Scheme
from .gptq import GPTQ, gptq, rank
from .grid import Grid, better
from .statistics import Statistics


@dataclass(frozen=True, kw_only=True)
class Qronos(GPTQ):
    """Qronos, with the options of `GPTQ`."""

    name: ClassVar[str] = "qronos"

    def codes(self, rows: Tensor, scheme: Scheme, statistics: Statistics, damp: float) -> tuple[Grid, Tensor]:
        wanted, h = statistics.target(rows, damp)
        grid = Grid.fit(wanted, scheme, self.grid, h)
        codes = qronos(rows, wanted, h, grid, order=self.order)
        return grid, better(wanted, h, grid, [codes, grid.nearest(wanted), grid.nearest(rows)])


def qronos(rows: Tensor, wanted: Tensor, h: Tensor, grid: Grid, *, order: bool = True) -> Tensor:
    """fp64 codes [N, K] for weights [N, K]; `wanted` are those that on Y come nearest to them, `h` is [G, K, K]."""
    groups, k = h.shape[:2]
    first = rank(h)[:, 0] if order else torch.zeros(groups, dtype=torch.long)
    one = F.one_hot(first, k).double()[:, :, None]  # [G, K, 1]: picks the first column
    w, v = (t.double().unflatten(0, (groups, -1)) for t in (rows, wanted))
    place = w @ one + (v - w) @ (h @ one) / (one.mT @ h @ one)
    value = grid.values(grid.nearest((w + (place - w @ one) * one.mT).flatten(0, 1))).unflatten(0, (groups, -1)) @ one
    spread = torch.cholesky_solve(one, torch.linalg.cholesky(h))  # the best answer of all columns to a change of it
    v = v + (value - v @ one) * (spread / (one.mT @ spread)).mT
    # As the first weight is a point of the grid by now, nothing of it is passed on.
    return gptq(v.flatten(0, 1), h, grid, order=order)
