"""MinMax and MSE: each weight to the nearest point of its grid; nothing but the weights is looked at."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import plain
from ..checks import check_finite
from ..scheme import PACKABLE_BITS, Scheme
from .grid import Codes
from .method import Rounding
from .statistics import Statistics


@dataclass(frozen=True, kw_only=True)
class MinMax(Rounding):
    """The grid spans all weights of a group.

    >>> MinMax().round(torch.tensor([[-1.5, 0.4, 1.5]]), Scheme(2)).values()
    tensor([[-1.5000,  0.5000,  1.5000]])
    """

    name: ClassVar[str] = "minmax"

    @property
    def fused(self) -> bool:
        """Whether one kernel finds the grid, rounds and packs."""
        return True

    def round(self, rows: Tensor, scheme: Scheme, statistics: Statistics | None = None) -> Codes:
        args = (rows.contiguous(), scheme.bits, scheme.group_size or 0, scheme.symmetric, self.name, scheme.scale_dtype)
        if scheme.bits in PACKABLE_BITS:
            qweight, scales, zeros, _ = torch.ops.mpqkern.quantize(*args)
            codes = torch.ops.mpqkern.unpack(qweight, scheme.bits, rows.shape[1])
        else:
            codes, scales, zeros, _ = plain.fit(*args)
        return Codes(codes, scales, zeros, scheme.group_size or 0)


@dataclass(frozen=True, kw_only=True)
class MSE(MinMax):
    """The grid spans that part of a group's range which has the least error of the weights: the sum of |error|**p.

    With p = 2 one fused kernel searches and rounds. BRECQ (Li et al. 2021, arXiv 2102.05426) starts from p = 2.4.
    """

    name: ClassVar[str] = "mse"

    p: float = 2.0

    def __post_init__(self) -> None:
        if isinstance(self.p, bool) or not isinstance(self.p, (int, float)) or not 0 < self.p < math.inf:
            raise ValueError(f"p={self.p!r}; wanted a number above 0")

    @property
    def fused(self) -> bool:
        return self.p == 2

    def round(self, rows: Tensor, scheme: Scheme, statistics: Statistics | None = None) -> Codes:
        if self.fused:
            return super().round(rows, scheme, statistics)
        groups = plain.Ranges(rows, scheme.group_size or 0, scheme.symmetric, scheme.scale_dtype)
        best: tuple[Tensor, ...] | None = None
        for i in range(plain.FRACTIONS):
            scale, zero = groups.fit(torch.tensor(1 - i * plain.FRACTION_STEP), scheme.bits)
            check_finite(self.name, rows, scale, scheme.scale_dtype)
            off = (groups.w - scale * (groups.codes(scale, zero, scheme.bits) - zero)).double().abs()
            error = (off**self.p * groups.real).sum(-1, keepdim=True)
            new = error, scale, zero
            best = (
                new if best is None else tuple(torch.where(error < best[0], *ab) for ab in zip(new, best, strict=True))
            )
        _, scale, zero = best
        zeros = zero.squeeze(-1) if not scheme.symmetric else torch.full((1,), (2**scheme.bits - 1) / 2)
        codes = groups.codes(scale, zero, scheme.bits).flatten(1)[:, : rows.shape[1]].to(torch.uint8)
        return Codes(codes, scale.squeeze(-1).to(groups.dtype), zeros.to(groups.dtype), scheme.group_size or 0)
