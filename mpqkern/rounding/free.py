"""MinMax and MSE: each weight to the nearest point of its grid; nothing but the weights is looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import plain
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
    """The grid spans that part of a group's range which has the least squared error of the weights."""

    name: ClassVar[str] = "mse"
