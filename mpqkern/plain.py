"""Every op in plain PyTorch: what runs without the compiled part and on devices that have no kernels yet.

Same results as the kernels: integers and the codes of min-max exactly, floats up to the order and precision of their
sums (rounding errors are summed in fp64 here, which the MSE search may notice where two ranges are as good).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import packed
from .checks import (
    check,
    check_code_values,
    check_codes,
    check_conv,
    check_features,
    check_finite,
    check_linear,
    check_packed,
    check_probe_conv,
    check_probe_errors,
    check_probe_linear,
    check_quantize,
)
from .scheme import padded

# The MSE search tries 1, 0.98, ... 0.2 of the full range.
FRACTIONS = 41
FRACTION_STEP = 0.02


def pack(codes: Tensor, bits: int) -> Tensor:
    check_codes(codes, bits)
    check_code_values(codes, bits)
    return packed.pack(codes, bits)


def unpack(qweight: Tensor, bits: int, k: int) -> Tensor:
    check_packed("unpack", qweight, None, None, bits, 0, k)
    return packed.unpack(qweight, bits, k)


def dequantize(qweight: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, k: int) -> Tensor:
    check_packed("dequantize", qweight, scales, zeros, bits, group_size, k)
    return packed.dequantize(qweight, scales, zeros, bits, group_size, k)


class Ranges:
    """The groups of a weight, and the grids that cover a fraction of each one's range."""

    def __init__(self, weight: Tensor, group_size: int, symmetric: bool, scale_dtype: str) -> None:
        k = weight.shape[1]
        size = group_size or padded(k)
        self.symmetric, self.dtype = symmetric, getattr(torch, scale_dtype)
        # [N, groups, size]; the filling is 0, which every range holds, and is left out of the errors
        self.w = F.pad(weight.float(), (0, -k % size)).unflatten(1, (-1, size))
        real = F.pad(torch.ones(k, dtype=torch.bool, device=weight.device), (0, -k % size))
        self.real = real.unflatten(0, (-1, size))
        self.lo, self.hi = self.w.amin(-1, keepdim=True).clamp(max=0), self.w.amax(-1, keepdim=True).clamp(min=0)

    def fit(self, fraction: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """Scales and zeros, already rounded to their type."""
        top = float(2**bits - 1)
        if self.symmetric:
            scale = (torch.maximum(self.hi, -self.lo) * fraction / (top / 2)).to(self.dtype).float()
            return scale, torch.full_like(scale, top / 2)
        scale = ((self.hi - self.lo) * fraction / top).to(self.dtype).float()
        zero = torch.where(scale > 0, (-self.lo * fraction / scale).clamp(0, top), 0)
        return scale, zero.to(self.dtype).float()

    def codes(self, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
        return (torch.where(scale > 0, self.w / scale, 0) + zero).clamp(0, float(2**bits - 1)).round()

    def error(self, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
        difference = self.w.double() - scale.double() * (self.codes(scale, zero, bits).double() - zero.double())
        return (difference.square() * self.real).sum(-1, keepdim=True)


def quantize(
    weight: Tensor, bits: int, group_size: int, symmetric: bool, search: str = "minmax", scale_dtype: str = "float16"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_quantize(weight, bits, group_size, search, scale_dtype)
    codes, scale, zeros, error = fit(weight, bits, group_size, symmetric, search, scale_dtype)
    return packed.pack(codes, bits), scale, zeros, error


def fit(
    weight: Tensor, bits: int, group_size: int, symmetric: bool, search: str = "minmax", scale_dtype: str = "float16"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes [N, K], scales, zeros and squared errors; also at widths that do not pack."""
    groups = Ranges(weight, group_size, symmetric, scale_dtype)
    one = torch.ones((), device=weight.device)
    scale, zero = groups.fit(one, bits)
    check_finite("quantize", weight, scale, scale_dtype)
    error = groups.error(scale, zero, bits)
    if search == "mse":
        for i in range(1, FRACTIONS):
            s, z = groups.fit(one - one * i * FRACTION_STEP, bits)
            e = groups.error(s, z, bits)
            better = e < error
            scale, zero, error = (torch.where(better, a, b) for a, b in ((s, scale), (z, zero), (e, error)))
    codes = groups.codes(scale, zero, bits).flatten(1)[:, : weight.shape[1]].to(torch.uint8)
    scales, zeros = scale.squeeze(-1).to(groups.dtype), zero.squeeze(-1).to(groups.dtype)
    if symmetric:
        zeros = torch.full((1,), (2**bits - 1) / 2, dtype=groups.dtype, device=weight.device)
    return codes, scales, zeros, error.squeeze(-1).float()


def quantize_activations(
    x: Tensor, group_size: int, bits: int = 8, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """fp32 [..., K] -> integers in -127..127 (as fp32; at other widths up to 2^(bits-1) - 1), scales [..., groups].

    `scale`, [1] or [groups], takes the place of each group's own maximum / 127; what lies beyond it saturates.
    A group that holds an infinity or NaN gets the scale NaN, so that it shows in every result.
    """
    k = x.shape[-1]
    size = group_size or k
    grouped = F.pad(x, (0, -k % size)).unflatten(-1, (-(-k // size), size))
    top = grouped.abs().amax(-1, keepdim=True)
    most = max(2 ** (bits - 1) - 1, 1)
    known = top / most if scale is None else scale.unsqueeze(-1)
    scale = torch.where(top.isfinite(), known, torch.nan)
    q = torch.where(scale > 0, grouped / scale, 0).clamp(-most, most).round()
    return q.flatten(-2)[..., :k], scale.squeeze(-1)


def rounded_rows(x: Tensor, group_size: int, scale: Tensor | None = None) -> Tensor:
    """fp64 [..., K]: what `linear` with act_bits=8 multiplies, a scale a row and group unless `scale` gives it."""
    q, scale = quantize_activations(x.float(), group_size, scale=scale)
    return q.double() * packed.spread(scale.double(), group_size, x.shape[-1])


def rounded_images(x: Tensor, scale: Tensor | None = None) -> Tensor:
    """fp64 [batch, ...]: what `conv2d` with act_bits=8 multiplies, one scale a sample unless `scale` gives it."""
    q, scale = quantize_activations(x.float().flatten(1), 0, scale=scale)
    return (q.double() * scale.double()).view(x.shape)


def linear(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    act_bits: int | None = None,
    act_scale: Tensor | None = None,
) -> Tensor:
    check_linear(x, qweight, scales, zeros, bias, bits, group_size, act_bits, act_scale)
    w = packed.dequantize(qweight, scales, zeros, bits, group_size, x.shape[-1])
    if act_bits is None:
        return F.linear(x, w.to(x.dtype), None if bias is None else bias.to(x.dtype))
    y = rounded_rows(x, group_size, act_scale) @ w.double().T
    return (y if bias is None else y + bias.double()).to(x.dtype)


def fragments(qweight: Tensor, bits: int, k: int) -> Tensor:
    """int32 [words]: the codes as csrc/cpu/drivers.h lays them out, the words of 32 rows side by side."""
    check_packed("fragments", qweight, None, None, bits, 0, k)
    n, words = len(qweight), qweight.clone(memory_format=torch.contiguous_format).view(torch.int32)
    rows = torch.arange(-(-n // 32) * 32, device=qweight.device).clamp(max=n - 1)
    return words[rows].unflatten(0, (-1, 32)).transpose(1, 2).reshape(-1)


def linear_fragments(x: Tensor, qweight: Tensor, *how: Any) -> Tensor:
    """`linear`, which here has no use for the fragments that come last."""
    return torch.ops.mpqkern.linear(x, qweight, *how[:-1])


def conv2d_fragments(x: Tensor, qweight: Tensor, *how: Any) -> Tensor:
    """`conv2d`, as above."""
    return torch.ops.mpqkern.conv2d(x, qweight, *how[:-1])


ACTIVATIONS = {"relu": F.relu, "relu6": F.relu6, "silu": F.silu, "gelu": F.gelu}


def check_activation(op: str, activation: object) -> None:
    check(op, "activation", repr(activation), activation in ACTIVATIONS, "'relu', 'relu6', 'silu' or 'gelu'")


def linear_activated(x: Tensor, qweight: Tensor, *how: Any) -> Tensor:
    """`linear`, or `linear_fragments` where there are any, and then the activation."""
    *how, fragments, activation = how
    check_activation("linear_activated", activation)
    ops = torch.ops.mpqkern
    y = ops.linear(x, qweight, *how) if fragments is None else ops.linear_fragments(x, qweight, *how, fragments)
    return ACTIVATIONS[activation](y)


def conv2d_activated(x: Tensor, qweight: Tensor, *how: Any) -> Tensor:
    """`conv2d`, as above."""
    *how, fragments, activation = how
    check_activation("conv2d_activated", activation)
    ops = torch.ops.mpqkern
    y = ops.conv2d(x, qweight, *how) if fragments is None else ops.conv2d_fragments(x, qweight, *how, fragments)
    return ACTIVATIONS[activation](y)


def conv2d(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    act_bits: int | None = None,
    act_scale: Tensor | None = None,
) -> Tensor:
    sizes = (kernel_size, stride, padding, dilation, groups)
    check_conv(x, qweight, scales, zeros, bias, bits, group_size, *sizes, act_bits, act_scale)
    shape = (qweight.shape[0], x.shape[1] // groups, *kernel_size)
    k = shape[1] * shape[2] * shape[3]
    w = packed.weight_from_rows(packed.dequantize(qweight, scales, zeros, bits, group_size, k), shape)
    form = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    if act_bits is None:
        y = F.conv2d(x, w.to(x.dtype), None if bias is None else bias.to(x.dtype), stride, padding, dilation, groups)
    else:
        image = rounded_images(x, act_scale)
        y = F.conv2d(image, w.double(), None, stride, padding, dilation, groups)
        y = (y if bias is None else y + bias.double().view(-1, 1, 1)).to(x.dtype)
    return y.contiguous(memory_format=form)


SPOILED = -128  # all over a sample of int8 that is not finite, of which its first one tells


def check_bytes(x: Tensor, activation: str | None, out_scale: Tensor | None) -> None:
    op, good = "conv2d_bytes", x.dtype in (torch.int8, torch.float32) and x.dim() == 4
    shape = f"{x.dtype} {list(x.shape)}".replace("torch.", "")
    check(op, "x", shape, good, "int8 or float32 [batch, channels, height, width]")
    if activation is not None:
        check_activation(op, activation)
    if out_scale is not None:
        shape = f"{out_scale.dtype} {list(out_scale.shape)}".replace("torch.", "")
        check(op, "out_scale", shape, out_scale.dtype == torch.float32 and out_scale.shape == (1,), "float32 [1]")


def from_bytes(x: Tensor, scale: Tensor) -> Tensor:
    """What a convolution's int8 input stands for."""
    spoiled = (x.flatten(1)[:, :1] == SPOILED).view(-1, 1, 1, 1)
    return torch.where(spoiled, torch.nan, x.to(scale.dtype) * scale)


def conv2d_bytes(x: Tensor, qweight: Tensor, *how: Any) -> Tensor:
    """`conv2d` with act_bits=8 from floats or from integers that are rounded by `act_scale` already, to floats or, with
    `out_scale`, to such integers, channels last, for the next one."""
    *how, act_scale, _fragments, activation, out_scale = how
    check_bytes(x, activation, out_scale)
    images = from_bytes(x, act_scale).contiguous(memory_format=torch.channels_last) if x.dtype == torch.int8 else x
    y = torch.ops.mpqkern.conv2d(images, qweight, *how, 8, act_scale)
    if activation is not None:
        y = ACTIVATIONS[activation](y)
    if out_scale is None:
        return y
    q = torch.where(out_scale > 0, y / out_scale, 0).round().clamp(-127, 127)
    q = torch.where(y.isfinite().flatten(1).all(1).view(-1, 1, 1, 1), q, SPOILED).to(torch.int8)
    return q.contiguous(memory_format=torch.channels_last)


def is_channels_last(x: Tensor) -> bool:
    """Whether `conv2d` answers in channels-last order."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


# ---- what looks at a model before it is packed -----------------------------------------------------


def gram(features: list[Tensor], center: bool = True) -> Tensor:
    check_features("gram", features)
    grams = []
    for feature in features:
        f = feature.flatten(1).double() if feature.dim() > 1 else feature.double().unsqueeze(1)
        if center:  # from the first sample on, so that what never changes contributes exactly nothing
            f = f - f[:1]
            f = f - f.mean(0)
        grams.append(_symmetric(f @ f.T))
    return torch.stack(grams)


def orthogonality(features: list[Tensor], center: bool = True, debiased: bool = False) -> Tensor:
    check_features("orthogonality", features, debiased)
    k = gram(features, center or debiased)
    if debiased:
        k = u_centred(k)
    inner = _symmetric(k.flatten(1) @ k.flatten(1).T)
    norm = inner.diagonal().sqrt()
    both = norm.unsqueeze(1) * norm
    m = torch.where(both == 0, 0, inner / both)
    return m.diagonal_scatter(torch.where(norm.isfinite(), 1.0, torch.nan).to(m))


def _symmetric(k: Tensor) -> Tensor:
    """To the last bit, which a matrix product does not promise."""
    return k.tril() + k.tril(-1).mT


def u_centred(k: Tensor) -> Tensor:
    """Zero diagonals and row sums; all zero where only fp32's rounding of the diagonal is left."""
    n = k.shape[-1]
    others = 1 - torch.eye(n, dtype=k.dtype, device=k.device)
    noise = k.diagonal(dim1=1, dim2=2).amax(1) * 2.0**-24
    k = k * others
    rows = k.sum(2, keepdim=True) / (n - 2)
    k = (k - rows - rows.mT + k.sum((1, 2), keepdim=True) / ((n - 1) * (n - 2))) * others
    return torch.where(k.abs().amax((1, 2), keepdim=True) <= noise.view(-1, 1, 1), 0, k)


def probe_errors(
    weight: Tensor, bits: list[int], group_size: int, symmetric: bool, fractions: Tensor, scale_dtype: str = "float16"
) -> Tensor:
    check_probe_errors(weight, bits, group_size, fractions, scale_dtype)
    outside = fractions[~((fractions > 0) & (fractions <= 1))]
    if len(outside):
        check("probe_errors", "fractions", f"...{float(outside[0])}...", False, "above 0, at most 1")
    groups = Ranges(weight, group_size, symmetric, scale_dtype)
    out = weight.new_empty(len(bits), *groups.lo.shape[:2], len(fractions), dtype=torch.float32)
    for b, width in enumerate(bits):
        for f, fraction in enumerate(fractions):
            scale, zero = groups.fit(fraction, width)
            check_finite("probe_errors", weight, scale, scale_dtype)
            out[b, ..., f] = groups.error(scale, zero, width).squeeze(-1)
    return out


def probe_linear(x: Tensor, weights: Tensor, bias: Tensor | None = None) -> Tensor:
    check_probe_linear(x, weights, bias)
    b = None if bias is None else bias.to(x.dtype)
    return _stack([F.linear(x, w, b) for w in weights], (*x.shape[:-1], weights.shape[1]), x)


def probe_conv2d(
    x: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    height, width = check_probe_conv(x, weights, bias, stride, padding, dilation, groups)
    b = None if bias is None else bias.to(x.dtype)
    form = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    images = [F.conv2d(x, w, b, stride, padding, dilation, groups).contiguous(memory_format=form) for w in weights]
    return _stack(images, (x.shape[0], weights.shape[1], height, width), x)


def _stack(results: list[Tensor], shape: tuple[int, ...], like: Tensor) -> Tensor:
    """[V, *shape], each of the results in its own order of dimensions."""
    if not results:
        return like.new_empty(0, *shape)
    if results[0].dim() == 4 and is_channels_last(results[0]):
        return torch.stack([r.movedim(1, -1) for r in results]).movedim(-1, 2)
    return torch.stack(results)
