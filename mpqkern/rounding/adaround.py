"""Softened: weights between two neighbouring points of their grid. Search: gradients decide on which each one ends,
and with which fixed scales inputs are rounded, if that is asked for.

Nagel et al. 2020 (arXiv 2004.10568): code = low + h, h = clip(1.2 sigmoid(v) - 0.1, 0, 1), so that both ends are
reached. A term that grows pulls every h to 0 or 1; in the end a code is rounded up where v >= 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import packed
from ..held import sound_backward
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
ACT_RATE = 1e-3  # length of a step of a scale's logarithm, at the start; it falls to 0 along a cosine

Rows = dict[int, Tensor]  # by layer, [N, K]
Scales = dict[int, Tensor]  # by layer, fp32 [1]: of its inputs; those of a layer without are rounded by their maxima
Runner = Callable[[Example, Given, Rows, Scales], Tensor]


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
    """Looks for the roundings of some layers with the least squared error of a part's outputs.

    Those of inputs follow fixed scales that are learned from `scales` on, if any are given. What is kept in the end
    has all of these or none: wherever weights are tried, it is with both.
    """

    def __init__(
        self,
        method: AdaRound,
        soft: dict[int, Softened],
        examples: Sequence[Example],
        runner: Runner,
        draw: torch.Generator,
        scales: Scales | None = None,
    ) -> None:
        self.method, self.soft, self.examples, self.runner, self.draw = method, soft, examples, runner, draw
        self.logs = {layer: scale.log().requires_grad_() for layer, scale in (scales or {}).items()}
        self.modules = {module for e in examples for module in e.chain}
        self.ends = torch.tensor([e.size for e in examples]).cumsum(0)  # of each example's samples among all

    def best(self) -> tuple[Rows, Scales, float]:
        """The best h of 0 and 1 that was met, with its scales, and its error as a part of the start's: at most 1."""
        method = self.method
        first, best, scales = self.tried()
        if not first > 0:
            return best, scales, 1.0
        least, variables = first, self.variables()
        weights, logs = variables[: len(self.soft)], variables[len(self.soft) :]
        adam = torch.optim.Adam([{"params": weights, "lr": method.rate}, {"params": logs}])
        warm, every, idle = method.warmup * method.iterations, max(1, method.iterations // CHECKS), 0
        for step in range(1, method.iterations + 1):
            adam.param_groups[1]["lr"] = ACT_RATE * (1 + math.cos(math.pi * step / method.iterations)) / 2
            gradients = self.gradients(first, (step - warm) / max(method.iterations - warm, 1))
            for v, gradient in zip(variables, gradients, strict=True):
                v.grad = gradient
            adam.step()
            if step < method.iterations and step % every:
                continue
            error, hard, by = self.tried()
            idle = 0 if error < least or step <= warm else idle + 1
            if error < least:
                best, scales, least = hard, by, error
            if idle == method.patience:
                break
        return best, scales, least / first

    def variables(self) -> list[Tensor]:
        return [*(s.v for s in self.soft.values()), *self.logs.values()]

    def scales(self) -> Scales:
        return {layer: log.exp() for layer, log in self.logs.items()}

    def tried(self) -> tuple[float, Rows, Scales]:
        """The error of the hardened weights, these, and the scales where they do better than the inputs' own maxima."""
        hard = {layer: s.hard() for layer, s in self.soft.items()}
        error, by = self.error(hard, {}), self.scales()
        fixed = self.error(hard, by) if by else error
        return (fixed, hard, by) if fixed < error else (error, hard, {})

    def gradients(self, unit: float, progress: float) -> tuple[Tensor, ...]:
        """Of the error over some samples, in multiples of `unit`, and of the pull, which sets in at progress 0."""
        with torch.enable_grad():
            h = {layer: s.h() for layer, s in self.soft.items()}
            rows = {layer: s.values(h[layer]) for layer, s in self.soft.items()}
            loss = self.sampled(rows, self.scales()) / unit
            if progress > 0:
                beta = BETA[0] + (BETA[1] - BETA[0]) * progress
                count = sum(one.numel() for one in h.values())
                loss = loss + self.method.lam / count * sum(indecision(one, beta) for one in h.values())
            # not every sample has to come by every layer
            with sound_backward(*self.modules):
                return torch.autograd.grad(loss, self.variables(), materialize_grads=True)

    def error(self, hard: Rows, scales: Scales) -> float:
        """Mean squared error over all examples."""
        rows = {layer: s.values(hard[layer]) for layer, s in self.soft.items()}
        pieces = ((e, *e.piece(None, 0, self.draw)) for e in self.examples)
        sums = [float(self._squared(*piece, rows, scales).double().sum()) for piece in pieces]
        return sum(sums) / sum(e.wanted.numel() for e in self.examples)

    def sampled(self, rows: Rows, scales: Scales) -> Tensor:
        """The same over a few samples."""
        sums, count = [], 0
        for example, picked in self.picked():
            given, wanted = example.piece(picked, self.method.drop, self.draw)
            sums.append(self._squared(example, given, wanted, rows, scales).sum())
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

    def _squared(self, example: Example, given: Given, wanted: Tensor, rows: Rows, scales: Scales) -> Tensor:
        return (self.runner(example, given, rows, scales).float() - wanted.float()).square()
