"""The packed format in readable PyTorch; csrc/packed.h draws it, and the tests hold both to each other.

    weight[n, k] = scale[n, g] * (code[n, k] - zero[n, g]),    g = k // group_size

Codes are unsigned, the lowest k in the lowest bits of a byte, rows filled with 0 up to 32 codes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .scheme import BLOCK, padded


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [N, K] -> uint8 [N, padded(K) * bits / 8]."""
    full = F.pad(codes, (0, -codes.shape[1] % BLOCK))
    fields = full.unflatten(1, (-1, 8 // bits)) << _shifts(bits, codes.device)
    return fields.sum(-1, dtype=torch.uint8)


def unpack(qweight: Tensor, bits: int, k: int) -> Tensor:
    """The inverse: uint8 codes [N, k]."""
    fields = qweight.unsqueeze(-1) >> _shifts(bits, qweight.device)
    return (fields & (2**bits - 1)).flatten(1)[:, :k].contiguous()


def dequantize(qweight: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, k: int) -> Tensor:
    """fp32 weights [N, k]. `group_size` 0 is the whole row, `zeros` None the symmetric grid."""
    zeros = torch.tensor([(2**bits - 1) / 2], device=scales.device) if zeros is None else zeros
    return values(unpack(qweight, bits, k), scales, zeros, group_size)


def values(codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int) -> Tensor:
    """fp32 weights of codes [N, k]."""
    scale, zero = (spread(t.float(), group_size, codes.shape[1]) for t in (scales, zeros))
    return scale * (codes.float() - zero)


def weight_rows(weight: Tensor) -> Tensor:
    """[N, K] of a weight; a convolution's K runs over (row, column, input channel)."""
    return weight if weight.dim() == 2 else weight.permute(0, 2, 3, 1).flatten(1)


def weight_from_rows(rows: Tensor, weight_shape: tuple[int, ...]) -> Tensor:
    """The inverse of `weight_rows`."""
    if len(weight_shape) == 2:
        return rows
    n, channels, height, width = weight_shape
    return rows.view(n, height, width, channels).permute(0, 3, 1, 2).contiguous()


def spread(per_group: Tensor, group_size: int, k: int) -> Tensor:
    """A value for each of `k` weights from one for each group, or one for all."""
    if per_group.numel() == 1:
        return per_group.flatten()
    return per_group.repeat_interleave(group_size or padded(k), -1)[..., :k]


def _shifts(bits: int, device: torch.device) -> Tensor:
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=device)
