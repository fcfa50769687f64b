"""What a layer's inputs are like: second moments of what it meets in the float model and in the rounded one.

With Y the inputs in the rounded model and X those in the float model, a row a position, all that layer-wise rounding
has to know is H = Y'Y and G = Y'X: the squared error of the output is tr(W X'X W') - 2 tr(Q G W') + tr(Q H Q').
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POSITIONS = 64  # of an image's outputs, picked at random: neighbours, and a fixed lattice even more so, are alike
CHUNK = 1 << 16  # rows multiplied at once


@dataclass
class Statistics:
    """Sums over the inputs of a layer, on the CPU; a convolution with G groups has a matrix for each, else G is 1."""

    h: Tensor  # fp64 [G, K, K], Y'Y
    g: Tensor  # fp64 [G, K, K], Y'X; the same tensor as `h` where both models' inputs are alike
    y: Tensor  # fp64 [G, K], sum of Y
    x: Tensor  # fp64 [G, K], sum of X
    count: int = 0  # rows
    half: Statistics | None = None  # the same of about half of the rows, where `split` has been asked for

    @classmethod
    def of(cls, module: nn.Module, *, products: bool = False, sums: bool = False) -> Statistics:
        """Empty ones for a layer; whether to tell X from Y in products and in sums."""
        groups, k = shape_of(module)
        h, y = torch.zeros(groups, k, k, dtype=torch.float64), torch.zeros(groups, k, dtype=torch.float64)
        return cls(h, torch.zeros_like(h) if products else h, y, torch.zeros_like(y) if sums else y)

    def split(self) -> None:
        """From now on half of the rows are counted apart as well."""
        self.half = replace(self, h=torch.zeros_like(self.h), y=torch.zeros_like(self.y), count=0)
        self.half.g = self.half.h if self.g is self.h else torch.zeros_like(self.g)
        self.half.x = self.half.y if self.x is self.y else torch.zeros_like(self.x)

    def folds(self) -> list[tuple[Statistics, Statistics]]:
        """Each half, with the other one to try it on."""
        assert self.half is not None
        rest = Statistics(*(getattr(self, n) - getattr(self.half, n) for n in ("h", "g", "y", "x", "count")))
        if self.g is self.h:
            rest.g = rest.h
        return [(self.half, rest), (rest, self.half)]

    def add(self, y: Tensor, x: Tensor | None = None, fold: int | None = None) -> None:
        """Rows [G, M, K]; without `x` it is the same as `y`. Of two folds the first is `half`; None: rows of both."""
        if self.half is not None and fold != 1:
            most = y.shape[1] if fold == 0 else (y.shape[1] + 1) // 2
            self.half.add(y[:, :most], None if x is None else x[:, :most])
        self.count += y.shape[1]
        for start in range(0, y.shape[1], CHUNK):
            rows = y[:, start : start + CHUNK].double()
            self.h += (rows.mT @ rows).cpu()
            self.y += rows.sum(1).cpu()
            others = rows if x is None else x[:, start : start + CHUNK].double()
            if self.g is not self.h:
                self.g += (rows.mT @ others).cpu()
            if self.x is not self.y:
                self.x += others.sum(1).cpu()

    def damped(self, damp: float) -> tuple[Tensor, Tensor]:
        """G and H with `damp` times H's mean diagonal added to their diagonals.

        That is what appending so much noise to the inputs does; what never varies keeps its weight.
        """
        lift = damp * self.h.diagonal(dim1=1, dim2=2).mean(1)
        lift = torch.where(lift > 0, lift, 1.0)[:, None, None] * torch.eye(self.h.shape[-1], dtype=torch.float64)
        h = self.h + lift
        return h if self.g is self.h else self.g + lift, h

    def target(self, rows: Tensor, damp: float) -> tuple[Tensor, Tensor]:
        """The weights [N, K] that on Y come nearest to `rows` on X, and the damped H."""
        g, h = self.damped(damp)
        if g is h:
            return rows.double(), h
        w = rows.double().unflatten(0, (len(h), -1))
        wanted = torch.cholesky_solve(g @ w.mT, torch.linalg.cholesky(h))
        return wanted.mT.flatten(0, 1), h

    def excess(self, rows: Tensor, values: Tensor) -> float:
        """The squared error of all outputs with `values` for the weights `rows`, less a number that both halves of
        the inputs have to themselves: tr(Q H Q') - 2 tr(Q G W')."""
        w, q = (t.double().unflatten(0, (len(self.h), -1)) for t in (rows, values))
        return float(((q @ self.h - 2 * w @ self.g.mT) * q).sum())


def shape_of(module: nn.Module) -> tuple[int, int]:
    """Groups, and the length of a row."""
    return getattr(module, "groups", 1), module.weight[0].numel()


def bytes_of(module: nn.Module) -> int:
    """Of a layer's statistics."""
    groups, k = shape_of(module)
    return 4 * 8 * groups * k * k  # H and G, of all rows and of half of them


def input_rows(module: nn.Module, x: Tensor, draw: torch.Generator) -> Tensor:
    """[G, M, K]: what the rows of a layer's weight are multiplied with, in the order of the packed format.

    All rows of a linear layer's input; for a convolution the patches under `POSITIONS` of each image's outputs.
    """
    if isinstance(module, nn.Linear):
        return x.reshape(1, -1, x.shape[-1]).clone()  # the model may write into it later on
    image = x if x.dim() == 4 else x.unsqueeze(0)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    image = F.pad(image, module._reversed_padding_repeated_twice, mode=mode).permute(0, 2, 3, 1)
    batch, *size = image.shape[:3]
    taps = [torch.arange(k) * d for k, d in zip(module.kernel_size, module.dilation, strict=True)]
    places = [(n - int(t[-1]) - 1) // s + 1 for n, t, s in zip(size, taps, module.stride, strict=True)]
    count = min(POSITIONS, places[0] * places[1])
    picked = torch.rand(batch, places[0] * places[1], generator=draw).topk(count, 1).indices.to(x.device)
    top, left = picked // places[1] * module.stride[0], picked % places[1] * module.stride[1]
    rows = (top[..., None] + taps[0].to(x.device))[..., :, None]
    columns = (left[..., None] + taps[1].to(x.device))[..., None, :]
    patches = image[torch.arange(batch, device=x.device)[:, None, None, None], rows, columns]  # [B, P, kh, kw, C]
    split = patches.unflatten(-1, (module.groups, -1)).permute(4, 0, 1, 2, 3, 5)
    return split.flatten(3).flatten(1, 2)
