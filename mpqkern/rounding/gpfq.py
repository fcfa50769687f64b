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
from ..numbers import check_flag, check_number
from ..scheme import Scheme
from .damping import Damped
from .gptq import BLOCK
from .grid import Codes, Grid, better
from .statistics import Statistics

SPARSE = (None, "soft", "hard")
Choose = Callable[[Tensor, Tensor, Tensor], Tensor]  # of weights, their scales and zeros: codes


@dataclass(frozen=True, kw_only=True)
class GPFQ(Damped):
    """GPFQ, with the options of `Damped` and

    radius      instead of `grid` one range for the layer, as in the paper: this often the mean over rows of a
                percentile of |w|. A symmetric grid ends there, an asymmetric one starts there and has a point at 0
    percentile  that one; 100 is the largest |w|
    sparse      "soft" or "hard": before rounding, what is less than `strength` steps of the grid becomes 0, and with
                "soft" all else comes as much nearer to 0. Zeros of the grid become whole, so that 0 is on it
    stochastic  to one of the two neighbours, by chance, so that the mean is right; `seed` picks

    Only where it is neither sparse nor stochastic, a row for which the nearest points are better keeps those.
    """

    name: ClassVar[str] = "gpfq"

    radius: float | None = None
    percentile: float = 100.0
    sparse: str | None = None
    strength: float = 1.0
    stochastic: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("radius", self.radius, "a number above 0, or None", lambda v: v > 0, optional=True)
        check_number("percentile", self.percentile, "a number above 0, at most 100", lambda v: 0 < v <= 100)
        if self.sparse not in SPARSE:
            raise ValueError(f"sparse={self.sparse!r}; wanted None, 'soft' or 'hard'")
        check_number("strength", self.strength, "a number of at least 0", lambda v: v >= 0)
        check_number("seed", self.seed, "a whole number", whole=True)
        check_flag("stochastic", self.stochastic)

    def round(self, rows: Tensor, scheme: Scheme, statistics: Statistics | None = None) -> Codes:
        if self.sparse and scheme.symmetric:
            raise ValueError(f"sparse={self.sparse!r} with {scheme!r}, whose grid has no 0; wanted symmetric=False")
        return super().round(rows, scheme, statistics)

    def codes(self, rows: Tensor, scheme: Scheme, statistics: Statistics, damp: float) -> tuple[Grid, Tensor]:
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
