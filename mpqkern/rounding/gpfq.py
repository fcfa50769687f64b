"""GPFQ: weight by weight, each rounded where it best cancels the error of the output that those before it have left.

Lybrand and Saab 2021; Zhang, Zhou and Saab 2022 (arXiv 2201.11113). With columns x_t of the float model's inputs and
y_t of the rounded one's, u_0 = 0 and for t = 1, 2, ...

    v = <y_t, u + w_t x_t> / |y_t|^2,    q_t = a point of the grid for v,    u += w_t x_t - q_t y_t

For data like Gaussians the error |u|^2 of a neuron with K weights falls as log(K) / K beside that of its output.
Inner products of the columns are all that this needs: with H = Y'Y and G = Y'X

    v = (sum_{s <= t} w_s G[t, s] - sum_{s < t} q_s H[t, s]) / H[t, t]
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import check_finite
from ..numbers import check_number
from ..scheme import Scheme
from .damping import check_damp, damping
from .gptq import BLOCK
from .grid import SEARCHES, Codes, Grid, better
from .method import Rounding
from .statistics import Statistics

SPARSE = (None, "soft", "hard")
Choose = Callable[[Tensor, Tensor, Tensor], Tensor]  # of weights, their scales and zeros: codes


@dataclass(frozen=True, kw_only=True)
class GPFQ(Rounding):
    """GPFQ towards the float layer's output on the float model's inputs.

    damp        of H's mean diagonal is added to the diagonals of H and G; None: as `GPTQ` has it
    grid        of each row by itself: "minmax", "mse", or "output" (the range with the least error of the output)
    radius      instead of `grid` one range for the layer, as in the paper: this often the mean over rows of a
                percentile of |w|. A symmetric grid ends there, an asymmetric one starts there and has a point at 0
    percentile  that one; 100 is the largest |w|
    sparse      "soft" or "hard": before rounding, what is less than `strength` steps of the grid becomes 0, and with
                "soft" all else comes as much nearer to 0. Zeros of the grid become whole, so that 0 is on it
    stochastic  to one of the two neighbours, by chance, so that the mean is right; `seed` picks
    mismatch    False aims at the float layer's output on the inputs that it will meet instead

    Only where it is neither sparse nor stochastic, a row for which the nearest points are better keeps those.
    """

    name: ClassVar[str] = "gpfq"
    needs: ClassVar[str] = "inputs"

    damp: float | None = None
    grid: str = "output"
    radius: float | None = None
    percentile: float = 100.0
    sparse: str | None = None
    strength: float = 1.0
    stochastic: bool = False
    seed: int = 0
    mismatch: bool = True

    def __post_init__(self) -> None:
        check_damp(self.damp)
        if self.grid not in SEARCHES:
            raise ValueError(f"grid={self.grid!r}; wanted 'minmax', 'mse' or 'output'")
        check_number("radius", self.radius, "a number above 0, or None", lambda v: v > 0, optional=True)
        check_number("percentile", self.percentile, "a number above 0, at most 100", lambda v: 0 < v <= 100)
        if self.sparse not in SPARSE:
            raise ValueError(f"sparse={self.sparse!r}; wanted None, 'soft' or 'hard'")
        check_number("strength", self.strength, "a number, at least 0", lambda v: v >= 0)
        check_number("seed", self.seed, "a whole number", whole=True)

    def round(self, rows: Tensor, scheme: Scheme, statistics: Statistics | None = None) -> Codes:
        assert statistics is not None
        if self.sparse and scheme.symmetric:
            raise ValueError(f"sparse={self.sparse!r} with {scheme!r}, whose grid has no 0; wanted symmetric=False")

        def attempt(some: Tensor, seen: Statistics, damp: float) -> Tensor:
            grid, codes = self.codes(some, scheme, seen, damp)
            return grid.values(codes)

        grid, codes = self.codes(rows, scheme, statistics, self.damp or damping(rows, statistics, attempt))
        return grid.chosen(codes)

    def codes(self, rows: Tensor, scheme: Scheme, statistics: Statistics, damp: float) -> tuple[Grid, Tensor]:
        """A grid and fp64 codes on it, for a damping that is settled."""
        g, h = statistics.damped(damp)
        wanted, _ = statistics.target(rows, damp)
        grid = Grid.fit(wanted, scheme, self.grid, h) if self.radius is None else self._paper_grid(rows, scheme)
        if self.sparse:
            grid = replace(grid, zeros=grid.zeros.round())
        codes = gpfq(rows, g, h, grid, self._choose(grid))
        if self.sparse or self.stochastic:
            return grid, codes
        return grid, better(wanted, h, grid, [codes, grid.nearest(wanted), grid.nearest(rows)])

    def _paper_grid(self, rows: Tensor, scheme: Scheme) -> Grid:
        half = (2**scheme.bits - 1) / 2 if scheme.symmetric else 2.0 ** (scheme.bits - 1)
        place = math.ceil(self.percentile / 100 * rows.shape[1])
        step = self.radius * rows.abs().kthvalue(place, dim=1).values.mean() / half
        shape = len(rows), scheme.groups(rows.shape[1])
        scales = step.to(getattr(torch, scheme.scale_dtype)).expand(shape).contiguous()
        check_finite("gpfq", rows, scales, scheme.scale_dtype)
        return Grid(scales, scales.new_full((1,) if scheme.symmetric else shape, half), scheme, rows.shape[1])

    def _choose(self, grid: Grid) -> Choose:
        draw = torch.Generator().manual_seed(self.seed)

        def choose(weights: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
            if self.sparse:
                least = self.strength * scale
                rest = weights - weights.sign() * least if self.sparse == "soft" else weights
                weights = torch.where(weights.abs() > least, rest, 0)
            if not self.stochastic:
                return grid.column_codes(weights, scale, zero)
            place = (torch.where(scale > 0, weights / scale, 0) + zero).clamp(0, grid.top)
            return place.floor() + (torch.rand(place.shape, dtype=place.dtype, generator=draw) < place.frac())

        return choose


def gpfq(rows: Tensor, g: Tensor, h: Tensor, grid: Grid, choose: Choose | None = None) -> Tensor:
    """fp64 codes [N, K] for weights [N, K] with G and H, each [groups, K, K]; where H[t, t] is 0 the nearest ones."""
    choose = choose or grid.column_codes
    groups, k = h.shape[:2]
    w, scale = (t.unflatten(0, (groups, -1)) for t in (rows.double(), grid.scale))
    zero = grid.zero.unflatten(0, (groups, -1)) if grid.zero.dim() == 2 else grid.zero.expand(w.shape)
    length = h.diagonal(dim1=1, dim2=2)[:, None]  # of y_t, squared
    left = w @ g.tril().mT  # to be made up for along each y_t: less by q_s H[t, s] for each s that is done
    codes = torch.empty_like(w)
    for start in range(0, k, BLOCK):
        end = min(start + BLOCK, k)
        values = torch.empty_like(w[..., start:end])
        for t in range(start, end):
            v = torch.where(length[..., t] > 0, left[..., t] / length[..., t], w[..., t])
            codes[..., t] = choose(v, scale[..., t], zero[..., t])
            values[..., t - start] = value = scale[..., t] * (codes[..., t] - zero[..., t])
            left[..., t + 1 : end] -= value[..., None] * h[:, None, t, t + 1 : end]
        left[..., end:] -= values @ h[:, start:end, end:]
    return codes.flatten(0, 1)
