"""Grid: the values that each weight of a matrix may take; Codes: which of them it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from .. import packed, plain
from ..checks import check_finite
from ..scheme import PACKABLE_BITS, Scheme

SEARCHES = ("minmax", "mse", "output")
TENSORS = ("codes", "scales", "zeros", "shift", "act_scale")  # of `Codes`
# Parts of the full range that the search by output errors tries.
FRACTIONS = torch.linspace(1, 0.3, 29, dtype=torch.float64).float()


@dataclass(frozen=True)
class Codes:
    """A rounded weight as it is stored, before packing. `shift`, if any, is to be added to the layer's bias;
    `act_scale`, if any, rounds its inputs rather than their own maxima."""

    codes: Tensor  # uint8 [N, K]
    scales: Tensor  # [N, groups] of the scheme's type
    zeros: Tensor  # [1] or [N, groups], the same type
    group_size: int  # 0: the whole row
    shift: Tensor | None = None  # fp32 [N]
    act_scale: Tensor | None = None  # fp32 [1]

    def fits(self, rows: int, k: int, scheme: Scheme) -> bool:
        """Whether these can be codes of a weight [rows, k] under `scheme`."""
        groups = scheme.groups(k)
        shapes = [(self.codes, (rows, k)), (self.scales, (rows, groups)), (self.shift, (rows,)), (self.act_scale, (1,))]
        return (
            all(t is None or t.shape == shape for t, shape in shapes)
            and self.zeros.shape in ((1,), (rows, groups))
            and self.codes.dtype == torch.uint8
            and self.scales.dtype == self.zeros.dtype == getattr(torch, scheme.scale_dtype)
            and (not self.codes.numel() or int(self.codes.max()) < 2**scheme.bits)
            and all(bool(t.isfinite().all()) for t, _ in shapes if t is not None)
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """What there is of it, for a bank."""
        found = {name: getattr(self, name) for name in TENSORS}
        return {name: t.cpu().numpy() for name, t in found.items() if t is not None}

    @classmethod
    def read(cls, arrays: Mapping[str, np.ndarray], rows: int, k: int, scheme: Scheme) -> Codes | None:
        """`arrays` again, if they can be codes of a weight [rows, k] under `scheme`."""
        if not {"codes", "scales", "zeros"} <= arrays.keys() <= set(TENSORS):
            return None
        found = {name: torch.from_numpy(a) for name, a in arrays.items()}
        codes = cls(**found, group_size=scheme.group_size or 0)
        return codes if codes.fits(rows, k, scheme) else None

    def values(self) -> Tensor:
        """fp32 [N, K]: what the packed layer computes with."""
        return packed.values(self.codes, self.scales, self.zeros, self.group_size)


@dataclass(frozen=True)
class Grid:
    """value = scale * (code - zero) with codes 0..top; one scale for each group of a row."""

    scales: Tensor
    zeros: Tensor
    scheme: Scheme
    k: int

    @classmethod
    def fit(cls, rows: Tensor, scheme: Scheme, search: str = "minmax", h: Tensor | None = None) -> Grid:
        """For the weights `rows` [N, K]: their full range, or the part of it with the least error.

        "mse" counts errors of the weights, for each group by itself. "output" counts those of the layer's outputs:
        with the second moments of its inputs `h` [G, K, K] they are e h e' for a row's errors e; all groups of a
        row shrink alike.
        """
        if search == "output":
            if h is None:
                raise ValueError("search='output' needs the second moments of the inputs; wanted h=")
            return cls._by_output(rows, scheme, h)
        args = (rows.float().contiguous(), scheme.bits, scheme.group_size or 0, scheme.symmetric, search)
        if scheme.bits in PACKABLE_BITS:
            _, scales, zeros, _ = torch.ops.mpqkern.quantize(*args, scheme.scale_dtype)
        else:
            _, scales, zeros, _ = plain.fit(*args, scheme.scale_dtype)
        return cls(scales, zeros, scheme, rows.shape[1])

    @classmethod
    def _by_output(cls, rows: Tensor, scheme: Scheme, h: Tensor) -> Grid:
        ranges = plain.Ranges(rows, scheme.group_size or 0, scheme.symmetric, scheme.scale_dtype)
        grids = [cls._at(ranges, fraction, scheme, rows.shape[1]) for fraction in FRACTIONS]
        errors = torch.stack([damage(rows, grid.values(grid.nearest(rows)), h) for grid in grids])
        best = errors.argmin(0)  # NaN counts as least: what no grid holds is seen in the scales
        scales = torch.stack([grid.scales for grid in grids])[best, torch.arange(len(rows))]
        check_finite("quantize", rows, scales, scheme.scale_dtype)
        if scheme.symmetric:
            return cls(scales, grids[0].zeros, scheme, rows.shape[1])
        zeros = torch.stack([grid.zeros for grid in grids])[best, torch.arange(len(rows))]
        return cls(scales, zeros, scheme, rows.shape[1])

    @classmethod
    def _at(cls, ranges: plain.Ranges, fraction: Tensor, scheme: Scheme, k: int) -> Grid:
        scale, zero = (t.squeeze(-1).to(ranges.dtype) for t in ranges.fit(fraction, scheme.bits))
        return cls(scale, zero[:1, :1].flatten() if scheme.symmetric else zero, scheme, k)

    @property
    def top(self) -> int:
        return 2**self.scheme.bits - 1

    @property
    def group_size(self) -> int:
        return self.scheme.group_size or 0

    @cached_property
    def scale(self) -> Tensor:
        """fp64 [N, K]: of each weight."""
        return packed.spread(self.scales.double(), self.group_size, self.k).expand(len(self.scales), self.k)

    @cached_property
    def zero(self) -> Tensor:
        """fp64 [N, K] or [1]."""
        return packed.spread(self.zeros.double(), self.group_size, self.k)

    def nearest(self, rows: Tensor) -> Tensor:
        """fp64 codes [N, K] of weights [N, K]."""
        return self.column_codes(rows.double(), self.scale, self.zero)

    def column_codes(self, weights: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The same for any weights with the scale and zero of each."""
        return (torch.where(scale > 0, weights / scale, 0) + zero).clamp(0, self.top).round()

    def values(self, codes: Tensor) -> Tensor:
        """fp64 [N, K]."""
        return self.scale * (codes - self.zero)

    def chosen(self, codes: Tensor) -> Codes:
        return Codes(codes.to(torch.uint8), self.scales, self.zeros, self.group_size)


def damage(rows: Tensor, values: Tensor, h: Tensor) -> Tensor:
    """fp64 [N]: e h e' for each row's errors e, the squared error of its output, summed over all inputs.

    `h` is [G, K, K]; row n meets the inputs of group n // (N / G).
    """
    e = (values.double() - rows.double()).unflatten(0, (len(h), -1))
    return ((e @ h) * e).sum(-1).flatten()


def better(rows: Tensor, h: Tensor, grid: Grid, candidates: Sequence[Tensor]) -> Tensor:
    """Of several code matrices [N, K], each row from the one that damages its output least; the first of equals."""
    errors = torch.stack([damage(rows, grid.values(codes), h) for codes in candidates])
    return torch.stack(list(candidates))[errors.argmin(0), torch.arange(len(rows))]
