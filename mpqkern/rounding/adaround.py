"""Softened: weights between two neighbouring points of their grid. Search: gradients decide on which each one ends.

Nagel et al. 2020 (arXiv 2004.10568): code = low + h, h = clip(1.2 sigmoid(v) - 0.1, 0, 1), so that both ends are
reached. A term that grows pulls every h to 0 or 1; in the end a code is rounded up where v >= 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import packed
from .examples import Example, Given
from .grid import Codes

if TYPE_CHECKING:
    from .reconstruct import AdaRound

STRETCH, SHIFT = 1.2, 0.1
# A weight that another way of rounding has moved away from starts next to the middle, on the side of its code.
REACH = 0.49
# Where h is cut off it has no slope; everything starts so far from there.
MARGIN = 0.01
CHECKS = 20  # times that the hardened weights are tried on all examples
BETA = (20.0, 2.0)  # exponent of the pull towards the grid, at its start and its end

Rows = dict[int, Tensor]  # by layer, [N, K]
Runner = Callable[[Example, Given, Rows], Tensor]


class Softened:
    """Starts as near to the float weights [N, K] as hardening to the very codes of `start` allows."""

    def __init__(self, rows: Tensor, start: Codes, bits: int) -> None:
        self.start = start
        k, top = rows.shape[1], float(2**bits - 1)
        self.scale, self.zero = (
            packed.spread(t.to(rows.device).float(), start.group_size, k) for t in (start.scales, start.zeros)
        )
        code = start.codes.to(rows.device).float()
        place = torch.where(self.scale > 0, rows / self.scale, 0) + self.zero
        place = place.clamp(code - REACH, code + REACH).clamp(0, top)
        self.low = place.floor().clamp(max=top - 1)
        h = (place - self.low).clamp(MARGIN, 1 - MARGIN)
        self.v = torch.logit((h + SHIFT) / STRETCH).requires_grad_()

    def h(self) -> Tensor:
        return (STRETCH * torch.sigmoid(self.v) - SHIFT).clamp(0, 1)

    def hard(self) -> Tensor:
        return (self.v.detach() >= 0).float()

    def values(self, h: Tensor) -> Tensor:
        """fp32 [N, K]; where `h` is 0 or 1, to the bit what the packed layer computes with."""
        return self.scale * (self.low + h - self.zero)

    def chosen(self, hard: Tensor) -> Codes:
        return replace(self.start, codes=(self.low + hard).to(torch.uint8).to(self.start.codes.device))


def indecision(h: Tensor, beta: float) -> Tensor:
    """0 where all of `h` is 0 or 1, and up to its size between; the larger `beta`, the flatter around the middle."""
    return (1 - (2 * h - 1).abs().pow(beta)).sum()


class Search:
    """Looks for the roundings of some layers with the least squared error of a part's outputs."""

    def __init__(
        self,
        method: AdaRound,
        soft: dict[int, Softened],
        examples: Sequence[Example],
        runner: Runner,
        draw: torch.Generator,
    ) -> None:
        self.method, self.soft, self.examples, self.runner, self.draw = method, soft, examples, runner, draw
        self.ends = torch.tensor([e.size for e in examples]).cumsum(0)  # of each example's samples among all

    def best(self) -> tuple[Rows, float]:
        """The best h of 0 and 1 that was met, and its error as a part of the start's: at most 1."""
        method, variables = self.method, [s.v for s in self.soft.values()]
        best = {layer: s.hard() for layer, s in self.soft.items()}
        first = least = self.error(best)
        if not first > 0:
            return best, 1.0
        adam = torch.optim.Adam(variables, lr=method.rate)
        warm, every, idle = method.warmup * method.iterations, max(1, method.iterations // CHECKS), 0
        for step in range(1, method.iterations + 1):
            gradients = self.gradients(first, (step - warm) / max(method.iterations - warm, 1))
            for v, gradient in zip(variables, gradients, strict=True):
                v.grad = gradient
            adam.step()
            if step < method.iterations and step % every:
                continue
            hard = {layer: s.hard() for layer, s in self.soft.items()}
            error = self.error(hard)
            idle = 0 if error < least or step <= warm else idle + 1
            if error < least:
                best, least = hard, error
            if idle == method.patience:
                break
        return best, least / first

    def gradients(self, unit: float, progress: float) -> tuple[Tensor, ...]:
        """Of the error over some samples, in multiples of `unit`, and of the pull, which sets in at progress 0."""
        with torch.enable_grad():
            h = {layer: s.h() for layer, s in self.soft.items()}
            loss = self.sampled({layer: s.values(h[layer]) for layer, s in self.soft.items()}) / unit
            if progress > 0:
                beta = BETA[0] + (BETA[1] - BETA[0]) * progress
                count = sum(one.numel() for one in h.values())
                loss = loss + self.method.lam / count * sum(indecision(one, beta) for one in h.values())
            return torch.autograd.grad(loss, [s.v for s in self.soft.values()])

    def error(self, hard: Rows) -> float:
        """Mean squared error over all examples."""
        rows = {layer: s.values(hard[layer]) for layer, s in self.soft.items()}
        sums = [float(self._squared(e, *e.piece(None, 0, self.draw), rows).double().sum()) for e in self.examples]
        return sum(sums) / sum(e.wanted.numel() for e in self.examples)

    def sampled(self, rows: Rows) -> Tensor:
        """The same over a few samples."""
        sums, count = [], 0
        for example, picked in self.picked():
            given, wanted = example.piece(picked, self.method.drop, self.draw)
            sums.append(self._squared(example, given, wanted, rows).sum())
            count += wanted.numel()
        return torch.stack(sums).sum() / count

    def picked(self) -> Iterator[tuple[Example, Tensor | None]]:
        """Some samples (None: all) of one example, or of several where one has too few."""
        count = int(self.ends[-1])
        left = min(self.method.batch, count)
        while left > 0:
            place = torch.randint(count, (1,), generator=self.draw)
            example = self.examples[int(torch.searchsorted(self.ends, place, right=True))]
            if example.whole:
                yield example, None
                left -= example.size
            else:
                some = torch.randperm(example.size, generator=self.draw)[:left]
                yield example, some.to(example.wanted.device)
                left -= len(some)

    def _squared(self, example: Example, given: Given, wanted: Tensor, rows: Rows) -> Tensor:
        return (self.runner(example, given, rows).float() - wanted.float()).square()
