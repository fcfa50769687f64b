"""HQQ: grids that forgive a few large errors of the weights; found without any data.

Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models". Wanted is the grid with the least
sum of |w - value|^p, p < 1, over a group. The errors are split into a sparse part e, which is to hold what does not
fit, and the rest r - e, which the grid is fitted to by least squares:

    codes = nearest(w)                       on the grid as it is
    e = shrink(w - value)                    sign(r) max(0, |r| - |r|^(p - 1) / beta), approximately the prox of |r|^p
    zero = mean(codes - (w - e) / scale)     asymmetric; the scale stays that of min-max, as in the paper
    scale = <w - e, c> / <c, c>              symmetric, with c = codes - zero: there the zero is fixed

and beta grows from step to step, so that less and less is shrunk away. Errors are counted in steps of the grid, which
makes beta mean the same whatever the size of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import plain
from ..numbers import check_number
from ..scheme import Scheme
from .grid import Codes, Grid
from .method import Rounding
from .statistics import Statistics


@dataclass(frozen=True, kw_only=True)
class HQQ(Rounding):
    """Half-quadratic splitting from the min-max grid on; each group keeps the best grid that it came by.

    p       of |error|^p, above 0 and at most 1
    beta    the weight of the quadratic part at first
    growth  its factor from one step to the next
    steps   at most
    stop    a group is done after so many steps in a row that made it no better

    >>> rows = torch.tensor([[0.5, -0.5, 0.5, -0.5, 1.5, 1.7]])
    >>> HQQ().round(rows, Scheme(2)).values()  # min-max: +-0.5669 and 1.7007
    tensor([[ 0.5273, -0.5273,  0.5273, -0.5273,  1.5820,  1.5820]])
    """

    name: ClassVar[str] = "hqq"

    p: float = 0.7
    beta: float = 10.0
    growth: float = 1.01
    steps: int = 20
    stop: int = 5

    def __post_init__(self) -> None:
        check_number("p", self.p, "a number above 0, at most 1", lambda v: 0 < v <= 1)
        check_number("beta", self.beta, "a number above 0", lambda v: v > 0)
        check_number("growth", self.growth, "a number of at least 1", lambda v: v >= 1)
        for name in ("steps", "stop"):
            check_number(name, getattr(self, name), "a whole number, at least 1", lambda v: v > 0, whole=True)

    def round(self, rows: Tensor, scheme: Scheme, statistics: Statistics | None = None) -> Codes:
        first = Grid.fit(rows, scheme)
        groups = plain.Ranges(rows, scheme.group_size or 0, scheme.symmetric, scheme.scale_dtype)
        scale = first.scales.float()[..., None]  # [N, groups, 1]
        zero = first.zeros.float().view(-1, *first.zeros.shape[1:], 1).expand(scale.shape)
        kept, best = (scale, zero), self._error(groups, scale, zero, scheme.bits)
        idle = torch.zeros_like(best)  # steps since a group was last better: none looks at what others do
        for step in range(self.steps):
            scale, zero = self._refit(groups, scale, zero, scheme, self.beta * self.growth**step)
            error = self._error(groups, scale, zero, scheme.bits)
            wins = (error < best) & (idle < self.stop)
            best = torch.where(wins, error, best)
            kept = torch.where(wins, scale, kept[0]), torch.where(wins, zero, kept[1])
            idle = torch.where(wins, 0, idle + 1)
            if (idle >= self.stop).all():
                break
        scales, zeros = (t.squeeze(-1).to(groups.dtype) for t in kept)
        grid = Grid(scales, first.zeros if scheme.symmetric else zeros, scheme, rows.shape[1])
        return grid.chosen(groups.codes(*kept, scheme.bits).flatten(1)[:, : rows.shape[1]])

    def _refit(
        self, groups: plain.Ranges, scale: Tensor, zero: Tensor, scheme: Scheme, beta: float
    ) -> tuple[Tensor, Tensor]:
        """The next scale and zero, rounded to the type that they are stored in."""
        steps = groups.w / scale  # NaN for a group of zeros: no better, so that it keeps its grid
        c = groups.codes(scale, zero, scheme.bits)
        r = steps - (c - zero)
        aim = steps - r.sign() * (r.abs() - r.abs().pow(self.p - 1) / beta).clamp(min=0)
        if scheme.symmetric:
            c = (c - zero) * groups.real
            scale = scale * (aim * c).sum(-1, keepdim=True) / c.square().sum(-1, keepdim=True)
        else:
            zero = ((c - aim) * groups.real).sum(-1, keepdim=True) / groups.real.sum(-1, keepdim=True)
            zero = zero.clamp(0, 2**scheme.bits - 1)
        return scale.to(groups.dtype).float(), zero.to(groups.dtype).float()

    def _error(self, groups: plain.Ranges, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
        """fp64 [N, groups, 1]."""
        off = groups.w.double() - scale.double() * (groups.codes(scale, zero, bits).double() - zero.double())
        return (off.abs().pow(self.p) * groups.real).sum(-1, keepdim=True)
