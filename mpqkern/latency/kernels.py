"""Kernels by themselves: packed linear layers of given shapes against torch's float ones and against memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import ops
from ..ledger import table
from ..nn import PackedLinear
from ..nn.linear import packed_linear
from ..scheme import Scheme
from .turns import copies, measure, read_bandwidth

ROOFLINE_BYTES = 2**27  # read for the bandwidth: twice what weights rotate through


@dataclass(frozen=True)
class Cell:
    """One kernel on one shape. Bytes are those of the weight: the only ones that are not in a cache."""

    n: int
    k: int
    m: int
    scheme: str  # "float": torch's own product in fp32
    us: float
    spread: float  # median absolute deviation / median
    bytes: int
    of_float: float  # times as fast as torch
    of_memory: float  # bytes / time, as a share of the bandwidth

    @property
    def gigabytes(self) -> float:
        """A second."""
        return self.bytes / self.us / 1e3


@dataclass(frozen=True)
class Bench:
    """Printed, a table."""

    cells: tuple[Cell, ...]
    bandwidth: float  # bytes a second
    isa: str
    threads: int

    def to_dict(self) -> dict[str, Any]:
        rows = [vars(cell) | {"gigabytes": cell.gigabytes} for cell in self.cells]
        return {"isa": self.isa, "threads": self.threads, "bandwidth": self.bandwidth, "cells": rows}

    def __str__(self) -> str:
        lines = [("N x K", "M", "scheme", "us", "+-", "x float", "GB/s", "of memory")]
        for c in self.cells:
            speed = (f"{c.of_float:.2f}", f"{c.gigabytes:.1f}", f"{c.of_memory:.0%}")
            lines.append((f"{c.n}x{c.k}", str(c.m), c.scheme, f"{c.us:.1f}", f"{c.spread:.0%}", *speed))
        head = f"{self.isa}, {self.threads} thread(s); memory reads {self.bandwidth / 1e9:.1f} GB/s"
        return f"{head}\n{table(lines, left=(0, 2))}"


def bench_linear(
    shapes: Sequence[tuple[int, int]], *, m: Sequence[int] = (1,), bits: Sequence[Scheme | int] = (2, 4, 8), **how: Any
) -> Bench:
    """Times `M` rows of fp32 activations on weights [N, K] packed by each scheme; `how` goes to `measure`.

    >>> found = bench_linear([(64, 64)], bits=(4,), rounds=1, min_seconds=0)
    >>> [cell.scheme for cell in found.cells], found.cells[1].bytes
    (['float', 'w4'], 2178)
    """
    schemes = [Scheme(b) if isinstance(b, int) else b for b in bits]
    for scheme in schemes:
        scheme.require_packable()
    bandwidth, cells = read_bandwidth(ROOFLINE_BYTES), []
    for n, k in shapes:
        for rows in m:
            with torch.inference_mode():
                times = measure(_calls(n, k, rows, schemes), **how)
            sizes = {"float": 4 * n * k} | {str(s): s.bytes((n, k)) for s in schemes}
            for name, t in times.items():
                speed = times["float"].seconds / t.seconds, sizes[name] / t.seconds / bandwidth
                cells.append(Cell(n, k, rows, name, t.seconds * 1e6, t.spread, sizes[name], *speed))
    return Bench(tuple(cells), bandwidth, ops.isa(), torch.get_num_threads())


def _calls(n: int, k: int, m: int, schemes: Sequence[Scheme]) -> dict[str, Callable[[int], object]]:
    """Copies hold the same numbers: it is their addresses that matter."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(n, k, generator=generator) / k**0.5, torch.randn(m, k, generator=generator)
    floats = [weight.clone() for _ in range(copies(4 * n * k))]
    calls: dict[str, Callable[[int], object]] = {"float": lambda i: F.linear(x, floats[i % len(floats)])}
    layer = nn.utils.skip_init(nn.Linear, k, n, bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    for s in schemes:
        made = PackedLinear.from_float(layer, s)
        packed = [copy.deepcopy(made) for _ in range(copies(s.bytes((n, k))))]
        calls[str(s)] = partial(_packed, x, [(*p.arguments(), p.fragments) for p in packed])
    return calls


def _packed(x: torch.Tensor, packed: Sequence[tuple[Any, ...]], i: int) -> torch.Tensor:
    """What a module calls."""
    return packed_linear(x, *packed[i % len(packed)])
