"""Other libraries' linear layers of few bits on a GPU: torch, gemlite (Triton), Humming (compiled at run time).

All but torch are optional (`pip install gemlite humming-kernels`). Nothing here has met a GPU yet: what fails is left
out by the caller, and the reason said. gemlite tunes itself at its first call of a size, which takes a while.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from . import grid, spread_out

GROUP = 128
Forward = Callable[[Tensor], Tensor]
Copies = Callable[[float], int]  # how many to make of so many bytes


@dataclass(frozen=True)
class Made:
    """Copies of one layer: call `forwards[i]`; `weight` in fp32 is what they hold, `bytes` are those of one copy."""

    forwards: list[Forward]
    weight: Tensor
    bytes: int


def int4pack(layer: nn.Linear, copies: Copies) -> Made:
    """torch's own kernel for 4 bits, bfloat16 only: codes in tiles, and pairs of a scale and what to add."""
    codes, scales = grid(layer.weight.float(), 4, GROUP)
    scales, wide = scales.bfloat16(), (codes + 8).to(torch.uint8)
    tiles = torch.ops.aten._convert_weight_to_int4pack(wide[:, ::2] << 4 | wide[:, 1::2], 8)
    pairs = torch.stack([scales.t(), torch.zeros_like(scales.t())], -1).contiguous()
    held = [(tiles.clone(), pairs.clone()) for _ in range(copies(tiles.nbytes + pairs.nbytes))]

    def forward(x: Tensor, tiles: Tensor, pairs: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm(x, tiles, GROUP, pairs)

    return Made([lambda x, h=h: forward(x, *h) for h in held], weight_of(codes, scales), tiles.nbytes + pairs.nbytes)


def gemlite(layer: nn.Linear, copies: Copies, *, bits: int) -> Made:
    from gemlite import DType, GemLiteLinear  # type: ignore[import-not-found]

    (n, k), dtype = layer.weight.shape, layer.weight.dtype
    kind = {torch.float16: DType.FP16, torch.bfloat16: DType.BF16}[dtype]
    codes, scales = grid(layer.weight.float(), bits, GROUP)
    scales, middle = scales.to(dtype), 2 ** (bits - 1)
    size = n * k * bits // 8 + 2 * scales.nbytes

    def one() -> Forward:
        made = GemLiteLinear(bits, GROUP, k, n, input_dtype=kind, output_dtype=kind)
        made.pack((codes.short() + middle).to(torch.uint8), scales.clone(), torch.full_like(scales, middle), None)
        return made

    return Made([one() for _ in range(copies(size))], weight_of(codes, scales), size)


def humming(layer: nn.Linear, copies: Copies, *, bits: int) -> Made:
    """Rounds by itself; `weight` is what it was given, so its error has that of rounding in it."""
    from humming.layer import HummingLayer  # type: ignore[import-not-found]

    (n, k), dtype = layer.weight.shape, layer.weight.dtype
    made = HummingLayer(n, k, {"dtype": f"uint{bits}", "group_size": GROUP}, torch_dtype=dtype).to(layer.weight.device)
    made.load_from_unquantized(layer.weight.data)
    made.transform()
    size = n * k * bits // 8 + n * k // GROUP * layer.weight.element_size()
    return Made([copy.deepcopy(made) for _ in range(copies(size))], layer.weight.float(), size)


def weight_of(codes: Tensor, scales: Tensor) -> Tensor:
    return spread_out(codes, scales).float()


# By name: the bits, and what makes it.
LINEAR: dict[str, tuple[int, Callable[[nn.Linear, Copies], Made]]] = {"torch int4pack": (4, int4pack)}
for _bits in (2, 4, 8):
    LINEAR[f"gemlite {_bits}"] = _bits, partial(gemlite, bits=_bits)
    LINEAR[f"humming {_bits}"] = _bits, partial(humming, bits=_bits)
