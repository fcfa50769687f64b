"""Argument checks of the ops, for the fake kernels and the plain path; csrc/ops.cpp has the compiled ones."""

from __future__ import annotations

import torch
from torch import Tensor

from .scheme import BLOCK, PACKABLE_BITS, padded

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def check(op: str, argument: str, value: object, good: bool, wanted: str) -> None:
    if not good:
        raise ValueError(f"mpqkern::{op}: {argument}={value}; wanted {wanted}")


def check_codes(codes: Tensor, bits: int) -> None:
    _bits("pack", bits)
    _tensor(
        "pack",
        "codes",
        codes,
        codes.dtype == torch.uint8 and codes.dim() == 2 and codes.shape[1] > 0,
        "uint8 [N, K], K at least 1",
    )


def check_code_values(codes: Tensor, bits: int) -> None:
    top = int(codes.max()) if codes.numel() else 0
    check("pack", "codes", f"...{top}...", top < 2**bits, f"0..{2**bits - 1} at bits={bits}")


def check_packed(
    op: str, qweight: Tensor, scales: Tensor | None, zeros: Tensor | None, bits: int, group_size: int, k: int
) -> None:
    _bits(op, bits)
    _group(op, group_size)
    check(op, "k", k, k > 0, "at least 1")
    width = padded(k) * bits // 8
    _tensor(
        op,
        "qweight",
        qweight,
        qweight.dtype == torch.uint8 and qweight.dim() == 2 and qweight.shape[1] == width,
        f"uint8 [N, {width}] for k={k} at bits={bits}",
    )
    if scales is None:
        return
    shape = (qweight.shape[0], -(-padded(k) // (group_size or padded(k))))
    _tensor(
        op,
        "scales",
        scales,
        scales.dtype in (torch.float16, torch.float32) and scales.shape == shape,
        f"float16 or float32 {list(shape)} for k={k}, group_size={group_size}",
    )
    if zeros is not None:
        _tensor(
            op,
            "zeros",
            zeros,
            zeros.dtype == scales.dtype and (zeros.numel() == 1 or zeros.shape == shape),
            f"{scales.dtype} [1] or {list(shape)}",
        )


def check_quantize(weight: Tensor, bits: int, group_size: int, search: str, scale_dtype: str) -> None:
    _bits("quantize", bits)
    _float_weight("quantize", weight, group_size, scale_dtype)
    check("quantize", "search", repr(search), search in ("minmax", "mse"), "'minmax' or 'mse'")


def check_probe_errors(weight: Tensor, bits: list[int], group_size: int, fractions: Tensor, scale_dtype: str) -> None:
    op = "probe_errors"
    _float_weight(op, weight, group_size, scale_dtype)
    for b in bits:
        check(op, "bits", list(bits), 1 <= b <= 8, "1..8")
    _tensor(op, "fractions", fractions, fractions.dim() == 1 and fractions.dtype == torch.float32, "float32 [F]")


def check_finite(op: str, weight: Tensor, scale: Tensor, scale_dtype: str) -> None:
    bad = ~(weight.isfinite().all(1) & scale.isfinite().flatten(1).all(1))
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"mpqkern::{op}: row {row} of weight is not finite or too large for {scale_dtype} scales; "
            "wanted finite weights"
            + (" (scale_dtype='float32' allows larger ones)" if scale_dtype == "float16" else "")
        )


def check_linear(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    act_bits: int | None,
    act_scale: Tensor | None,
) -> None:
    _tensor("linear", "x", x, x.dtype in FLOATS and x.dim() >= 1, "float32, float16 or bfloat16 [..., K]")
    check_packed("linear", qweight, scales, zeros, bits, group_size, x.shape[-1])
    _bias("linear", bias, qweight.shape[0])
    _activations("linear", act_bits, act_scale, scales.shape[1])


def check_conv(
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
    act_bits: int | None,
    act_scale: Tensor | None,
) -> tuple[int, int]:
    """Checks everything and returns the size of the result's plane."""
    op = "conv2d"
    _geometry(op, x, kernel_size, stride, padding, dilation, groups)
    check_packed(op, qweight, scales, zeros, bits, group_size, kernel_size[0] * kernel_size[1] * (x.shape[1] // groups))
    check(op, "groups", groups, qweight.shape[0] % groups == 0, f"a divisor of qweight's {qweight.shape[0]} rows")
    _bias(op, bias, qweight.shape[0])
    _activations(op, act_bits, act_scale, 1)
    return _plane(op, x, kernel_size, stride, padding, dilation)


def check_probe_linear(x: Tensor, weights: Tensor, bias: Tensor | None) -> None:
    op = "probe_linear"
    good = x.dtype in FLOATS and x.dim() >= 1 and x.shape[-1] > 0
    _tensor(op, "x", x, good, "float32, float16 or bfloat16 [..., K], K at least 1")
    good = weights.dtype == x.dtype and weights.dim() == 3 and weights.shape[2] == x.shape[-1]
    _tensor(op, "weights", weights, good, f"{x.dtype} [V, N, {x.shape[-1]}]")
    _bias(op, bias, weights.shape[1])


def check_probe_conv(
    x: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> tuple[int, int]:
    """Checks everything and returns the size of the result's plane."""
    op = "probe_conv2d"
    good = weights.dtype == x.dtype and weights.dim() == 5
    _tensor(op, "weights", weights, good, f"{x.dtype} [V, N, channels of a group, height, width]")
    kernel_size = list(weights.shape[3:])
    _geometry(op, x, kernel_size, stride, padding, dilation, groups)
    check(op, "groups", groups, weights.shape[1] % groups == 0, f"a divisor of weights' {weights.shape[1]} rows")
    channels = x.shape[1] // groups
    _tensor(op, "weights", weights, weights.shape[2] == channels, f"{channels} channels in dimension 2")
    _bias(op, bias, weights.shape[1])
    return _plane(op, x, kernel_size, stride, padding, dilation)


def check_features(op: str, features: list[Tensor], debiased: bool = False) -> None:
    check(op, "features", "[]", len(features) > 0, "at least one tensor")
    n = features[0].shape[0] if features[0].dim() else 0
    _tensor(op, "features[0]", features[0], 1 <= n <= 1024, "1..1024 samples in dimension 0")
    for i, x in enumerate(features):
        good = x.dtype in FLOATS and x.dim() > 0 and x.shape[0] == n
        _tensor(op, f"features[{i}]", x, good, f"float32, float16 or bfloat16 [{n}, ...]")
        check(op, f"features[{i}].device", x.device, x.device == features[0].device, f"{features[0].device}")
    check(op, "features' samples", n, not debiased or n >= 4, "at least 4 with debiased=True")


def _geometry(
    op: str, x: Tensor, kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> None:
    _tensor(
        op, "x", x, x.dtype in FLOATS and x.dim() == 4, "float32, float16 or bfloat16 [batch, channels, height, width]"
    )
    for name, pair, least in (
        ("kernel_size", kernel_size, 1),
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        check(op, name, list(pair), len(pair) == 2 and min(pair) >= least, f"2 numbers of at least {least}")
    check(
        op,
        "groups",
        groups,
        groups >= 1 and x.shape[1] > 0 and x.shape[1] % groups == 0,
        f"a divisor of x's {x.shape[1]} channels",
    )


def _plane(
    op: str, x: Tensor, kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> tuple[int, int]:
    height, width = (
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    )
    check(op, "x", list(x.shape), x.shape[2] > 0 and x.shape[3] > 0, "height and width of at least 1")
    check(op, "x", list(x.shape), height > 0 and width > 0, "height and width, padded, no smaller than the kernel")
    return height, width


def _bits(op: str, bits: int) -> None:
    check(op, "bits", bits, bits in PACKABLE_BITS, "2, 4 or 8")


def _group(op: str, group_size: int) -> None:
    check(
        op,
        "group_size",
        group_size,
        group_size >= 0 and group_size % BLOCK == 0,
        "a multiple of 32, or 0 for the whole row",
    )


def _float_weight(op: str, weight: Tensor, group_size: int, scale_dtype: str) -> None:
    _group(op, group_size)
    good = weight.dtype in FLOATS and weight.dim() == 2 and weight.shape[1] > 0
    _tensor(op, "weight", weight, good, "float32, float16 or bfloat16 [N, K], K at least 1")
    check(op, "scale_dtype", repr(scale_dtype), scale_dtype in ("float16", "float32"), "'float16' or 'float32'")


def _activations(op: str, act_bits: int | None, act_scale: Tensor | None, groups: int) -> None:
    check(op, "act_bits", act_bits, act_bits in (None, 8), "None or 8")
    if act_scale is None:
        return
    check(op, "act_bits", "None with an act_scale", act_bits == 8, "8")
    good = act_scale.dtype == torch.float32 and act_scale.dim() == 1 and act_scale.shape[0] in (1, groups)
    _tensor(op, "act_scale", act_scale, good, "float32 [1]" + (f" or [{groups}]" if groups > 1 else ""))


def _bias(op: str, bias: Tensor | None, n: int) -> None:
    if bias is not None:
        _tensor(
            op, "bias", bias, bias.dtype.is_floating_point and bias.dim() == 1 and bias.shape[0] == n, f"floats [{n}]"
        )


def _tensor(op: str, name: str, t: Tensor, good: bool, wanted: str) -> None:
    if not good:
        raise ValueError(f"mpqkern::{op}: {name} is {t.dtype} {list(t.shape)}; wanted {wanted}".replace("torch.", ""))
