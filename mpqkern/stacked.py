"""probe_linear and probe_conv2d on GPUs: the variants of a weight in one product of torch's, so that x is read once.

No kernel of ours: products of float weights are what cuBLAS and cuDNN do best. What is left to decide is their
precision. Differences of results matter here, often small ones, so fp32 convolutions are never left to TF32, which
cuDNN is allowed by default; fp32 matrix products take it only where `torch.backends.cuda.matmul` was told so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_probe_conv, check_probe_linear
from .plain import is_channels_last


def probe_linear(x: Tensor, weights: Tensor, bias: Tensor | None = None) -> Tensor:
    check_probe_linear(x, weights, bias)
    rows = x.reshape(-1, x.shape[-1])
    many = rows.expand(len(weights), *rows.shape)  # without a copy: cuBLAS takes a step of 0 between variants
    if bias is None:
        y = torch.bmm(many, weights.mT)
    else:
        start = bias.to(x.dtype).expand(*many.shape[:2], -1)
        y = torch.baddbmm(start, many, weights.mT)
    return y.view(len(weights), *x.shape[:-1], weights.shape[1])


def probe_conv2d(
    x: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    plane = check_probe_conv(x, weights, bias, stride, padding, dilation, groups)
    variants, n = weights.shape[:2]
    form = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    shape = (variants * len(x), n, *plane)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=form)
    images = out.view(variants, len(x), n, *plane)
    if not out.numel():
        return images
    # a group's rows: those of one variant after those of another
    stacked = weights.unflatten(1, (groups, -1)).transpose(0, 1).flatten(0, 2)
    if bias is not None:
        bias = bias.to(x.dtype).view(groups, 1, -1).expand(-1, variants, -1).reshape(-1)
    # not benchmarked, deterministic, without TF32
    how = (stride, padding, dilation, False, [0, 0], groups, False, True, torch.backends.cudnn.enabled, False)
    y = torch.ops.aten._convolution(x, stacked, bias, *how)
    images.unflatten(2, (groups, -1)).copy_(y.unflatten(1, (groups, variants, -1)).permute(2, 0, 1, 3, 4, 5))
    return images
