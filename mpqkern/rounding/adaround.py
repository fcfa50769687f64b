"""Softened: weights between two neighbouring points of their grid, to be moved by gradients and to end on one of them.

Nagel et al. 2020 (arXiv 2004.10568): code = low + h, h = clip(1.2 sigmoid(v) - 0.1, 0, 1), so that both ends are
reached; in the end it is rounded up where v >= 0.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .. import packed
from .grid import Codes

STRETCH, SHIFT = 1.2, 0.1
# A weight that another way of rounding has moved away from starts next to the middle, on the side of its code.
REACH = 0.49
# Where h is cut off it has no slope; everything starts so far from there.
MARGIN = 0.01


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

    def values(self, h: Tensor) -> Tensor:
        """fp32 [N, K]; where `h` is 0 or 1, to the bit what the packed layer computes with."""
        return self.scale * (self.low + h - self.zero)

    @torch.no_grad()
    def hard(self) -> Tensor:
        return (self.v >= 0).float()

    def chosen(self, hard: Tensor) -> Codes:
        return replace(self.start, codes=(self.low + hard).to(torch.uint8).to(self.start.codes.device))


def indecision(h: Tensor, beta: float) -> Tensor:
    """0 where all of `h` is 0 or 1, and up to its size between; the larger `beta`, the less next to the middle."""
    return (1 - (2 * h - 1).abs().pow(beta)).sum()
