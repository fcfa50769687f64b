"""Registers torch.ops.mpqkern.*: the compiled kernels where they load, plain PyTorch everywhere else.

Importing this never fails. CPU tensors meet the compiled kernels; every other device, and the CPU when the
compiled part is missing, is served by mpqkern.plain, on GPUs here and there by mpqkern.stacked.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import plain, stacked
from .checks import (
    FLOATS,
    check_codes,
    check_conv,
    check_features,
    check_linear,
    check_packed,
    check_probe_conv,
    check_probe_errors,
    check_probe_linear,
    check_quantize,
)
from .scheme import padded

# csrc/ops.cpp defines the same; needed here only when that is missing.
SCHEMAS = {
    "pack": "(Tensor codes, int bits) -> Tensor",
    "unpack": "(Tensor qweight, int bits, int k) -> Tensor",
    "dequantize": "(Tensor qweight, Tensor scales, Tensor? zeros, int bits, int group_size, int k) -> Tensor",
    "quantize": "(Tensor weight, int bits, int group_size, bool symmetric, "
    'str search="minmax", str scale_dtype="float16") -> (Tensor, Tensor, Tensor, Tensor)',
    "linear": "(Tensor x, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? bias, "
    "int bits, int group_size, int? act_bits=None, Tensor? act_scale=None) -> Tensor",
    "fragments": "(Tensor qweight, int bits, int k) -> Tensor",
    "linear_fragments": "(Tensor x, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? bias, "
    "int bits, int group_size, int? act_bits, Tensor? act_scale, Tensor fragments) -> Tensor",
    "conv2d": "(Tensor x, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? bias, "
    "int bits, int group_size, int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups, "
    "int? act_bits=None, Tensor? act_scale=None) -> Tensor",
    "conv2d_fragments": "(Tensor x, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? bias, "
    "int bits, int group_size, int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups, "
    "int? act_bits, Tensor? act_scale, Tensor fragments) -> Tensor",
    "linear_activated": "(Tensor x, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? bias, "
    "int bits, int group_size, int? act_bits, Tensor? act_scale, Tensor? fragments, str activation) -> Tensor",
    "conv2d_activated": "(Tensor x, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? bias, "
    "int bits, int group_size, int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups, "
    "int? act_bits, Tensor? act_scale, Tensor? fragments, str activation) -> Tensor",
    "conv2d_bytes": "(Tensor x, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? bias, "
    "int bits, int group_size, int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups, "
    "Tensor act_scale, Tensor? fragments, str? activation, Tensor? out_scale) -> Tensor",
    "gram": "(Tensor[] features, bool center=True) -> Tensor",
    "orthogonality": "(Tensor[] features, bool center=True, bool debiased=False) -> Tensor",
    "probe_errors": "(Tensor weight, int[] bits, int group_size, bool symmetric, Tensor fractions, "
    'str scale_dtype="float16") -> Tensor',
    "probe_linear": "(Tensor x, Tensor weights, Tensor? bias=None) -> Tensor",
    "probe_conv2d": "(Tensor x, Tensor weights, Tensor? bias, int[] stride, int[] padding, int[] dilation, "
    "int groups) -> Tensor",
}
PANEL = 32  # weight rows that fragments have side by side on a CPU: kPanel of csrc/cpu/kernels.h
ISAS = ("plain", "scalar", "avx2", "avxvnni", "avx512")  # what MPQKERN_ISA may ask for, slowest first


def _load() -> str | None:
    """Loads the compiled part; the reason when there is none."""
    wanted = os.environ.get("MPQKERN_ISA", "")
    if wanted and wanted not in ISAS:
        warnings.warn(f"MPQKERN_ISA={wanted!r}; wanted one of {', '.join(ISAS)}; using the best", stacklevel=3)
    if wanted == "plain":
        return "MPQKERN_ISA=plain"
    path = Path(os.environ.get("MPQKERN_LIBRARY") or Path(__file__).with_name("_C.so"))
    reason = None if path.is_file() else f"{path} does not exist"
    if reason is None:
        try:
            torch.ops.load_library(path)
        except OSError as error:
            reason = f"{path} does not load with torch {torch.__version__}: {error}"
    if reason is not None:
        warnings.warn(
            f"mpqkern runs without its compiled kernels, slowly: {reason}. To build them, in a checkout, "
            "with torch >= 2.11 and a C++ compiler installed: pip install --no-build-isolation .",
            stacklevel=3,
        )
    return reason


# None when the compiled kernels are in use, else why not.
why_plain: str | None = _load()

_library = torch.library.Library("mpqkern", "FRAGMENT")
for _name, _schema in SCHEMAS.items():
    if why_plain is not None:
        _library.define(_name + _schema)
    _library.impl(_name, getattr(plain, _name), "CompositeExplicitAutograd")

STACKED = ("probe_linear", "probe_conv2d")  # whose products cuBLAS and cuDNN do best
for _name in STACKED:
    _library.impl(_name, getattr(stacked, _name), "CUDA")


def isa(want: str = "") -> str:
    """The instruction set that CPU kernels use; `want` changes it first ("best" undoes that)."""
    if why_plain is not None:
        return "plain"
    return torch.ops.mpqkern.isa(want)


def has_kernel(op: str, device: str) -> bool:
    """Whether the loaded library has one of its own; mpqkern.plain, registered for all devices, is not one."""
    registered = torch._C._dispatch_has_kernel_for_dispatch_key(f"mpqkern::{op}", device.upper())
    return registered and not (op in STACKED and device == "cuda")


class LinearPlan(NamedTuple):
    """Which CUDA kernel serves a `linear`."""

    kernel: (
        str  # "dense": dequantize and torch's product; "few" tokens; "many", "many_int8"; "warpgroup": Hopper's many
    )
    columns: int  # tokens of a block of threads
    splits: int  # of k, added up in order


def linear_plan(
    arch: int,
    m: int,
    n: int,
    k: int,
    bits: int,
    *,
    group_size: int = 0,
    dtype: torch.dtype = torch.float16,
    act_bits: int | None = None,
) -> LinearPlan:
    """The kernel for m rows of activations and a weight [n, k] on a GPU of compute capability arch / 10; the same that
    the op takes there, and it depends on nothing else. A build without 90a takes on 90 what is for 89.

    >>> linear_plan(90, 1, 4096, 4096, 4) if why_plain is None else LinearPlan("few", 8, 8)
    LinearPlan(kernel='few', columns=8, splits=8)
    """
    if why_plain is not None:
        return LinearPlan("dense", 0, 1)
    name = str(dtype).removeprefix("torch.")
    return LinearPlan(*torch.ops.mpqkern.linear_plan(arch, m, n, k, bits, group_size, name, act_bits))


# ---- fake kernels: shapes and types without data, with any of the sizes symbolic ------------------


def _groups(k: int, group_size: int) -> int:
    return (padded(k) + group_size - 1) // group_size if group_size else 1


@torch.library.register_fake("mpqkern::pack")
def _(codes: Tensor, bits: int) -> Tensor:
    check_codes(codes, bits)
    return codes.new_empty(codes.shape[0], padded(codes.shape[1]) * bits // 8)


@torch.library.register_fake("mpqkern::unpack")
def _(qweight: Tensor, bits: int, k: int) -> Tensor:
    check_packed("unpack", qweight, None, None, bits, 0, k)
    return qweight.new_empty(qweight.shape[0], k)


@torch.library.register_fake("mpqkern::dequantize")
def _(qweight: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, k: int) -> Tensor:
    check_packed("dequantize", qweight, scales, zeros, bits, group_size, k)
    return qweight.new_empty(qweight.shape[0], k, dtype=torch.float32)


@torch.library.register_fake("mpqkern::quantize")
def _(weight, bits, group_size, symmetric, search="minmax", scale_dtype="float16"):  # type: ignore[no-untyped-def]
    check_quantize(weight, bits, group_size, search, scale_dtype)
    n, kp = weight.shape[0], padded(weight.shape[1])
    groups = _groups(weight.shape[1], group_size)
    dtype = getattr(torch, scale_dtype)
    return (
        weight.new_empty(n, kp * bits // 8, dtype=torch.uint8),
        weight.new_empty(n, groups, dtype=dtype),
        weight.new_empty(*((1,) if symmetric else (n, groups)), dtype=dtype),
        weight.new_empty(n, groups, dtype=torch.float32),
    )


@torch.library.register_fake("mpqkern::linear")
def _(x, qweight, scales, zeros, bias, bits, group_size, act_bits=None, act_scale=None):  # type: ignore[no-untyped-def]
    check_linear(x, qweight, scales, zeros, bias, bits, group_size, act_bits, act_scale)
    return x.new_empty(*x.shape[:-1], qweight.shape[0])


@torch.library.register_fake("mpqkern::fragments")
def _(qweight: Tensor, bits: int, k: int) -> Tensor:
    check_packed("fragments", qweight, None, None, bits, 0, k)
    n, kp = qweight.shape[0], padded(k)
    if qweight.is_cuda and has_kernel("fragments", "cuda"):  # csrc/cuda/fragments.h
        depth = 256 // bits
        words = (n + 15) // 16 * ((kp + depth - 1) // depth) * 128
    else:
        words = (n + PANEL - 1) // PANEL * PANEL * (kp * bits // 32)
    return qweight.new_empty(words, dtype=torch.int32)


@torch.library.register_fake("mpqkern::linear_fragments")
def _(x, qweight, scales, zeros, bias, bits, group_size, act_bits, act_scale, fragments):  # type: ignore[no-untyped-def]
    check_linear(x, qweight, scales, zeros, bias, bits, group_size, act_bits, act_scale)
    return x.new_empty(*x.shape[:-1], qweight.shape[0])


@torch.library.register_fake("mpqkern::conv2d")
def _(x, qweight, scales, zeros, bias, bits, group_size, *how):  # type: ignore[no-untyped-def]
    height, width = check_conv(x, qweight, scales, zeros, bias, bits, group_size, *how, *[None] * (7 - len(how)))
    return _images(x, x.shape[0], qweight.shape[0], height, width)


@torch.library.register_fake("mpqkern::conv2d_fragments")
def _(x, qweight, scales, zeros, bias, bits, group_size, *how):  # type: ignore[no-untyped-def]
    height, width = check_conv(x, qweight, scales, zeros, bias, bits, group_size, *how[:-1])
    return _images(x, x.shape[0], qweight.shape[0], height, width)


@torch.library.register_fake("mpqkern::linear_activated")
def _(x, qweight, scales, zeros, bias, bits, group_size, act_bits, act_scale, fragments, activation):  # type: ignore[no-untyped-def]
    plain.check_activation("linear_activated", activation)
    check_linear(x, qweight, scales, zeros, bias, bits, group_size, act_bits, act_scale)
    return x.new_empty(*x.shape[:-1], qweight.shape[0])


@torch.library.register_fake("mpqkern::conv2d_activated")
def _(x, qweight, scales, zeros, bias, bits, group_size, *how):  # type: ignore[no-untyped-def]
    plain.check_activation("conv2d_activated", how[-1])
    height, width = check_conv(x, qweight, scales, zeros, bias, bits, group_size, *how[:-2])
    return _images(x, x.shape[0], qweight.shape[0], height, width)


@torch.library.register_fake("mpqkern::conv2d_bytes")
def _(x, qweight, scales, zeros, bias, bits, group_size, *how):  # type: ignore[no-untyped-def]
    *sizes, act_scale, _, activation, out_scale = how
    plain.check_bytes(x, activation, out_scale)
    images = x
    if x.dtype == torch.int8:
        images = torch.empty(x.shape, device=x.device, memory_format=torch.channels_last)
    y = _images(images, x.shape[0], qweight.shape[0],
                *check_conv(images, qweight, scales, zeros, bias, bits, group_size, *sizes, 8, act_scale))  # fmt: skip
    if out_scale is None:
        return y
    return torch.empty_like(y, dtype=torch.int8, memory_format=torch.channels_last)


def _images(x: Tensor, *shape: int) -> Tensor:
    form = torch.channels_last if plain.is_channels_last(x) else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=form)


@torch.library.register_fake("mpqkern::gram")
def _(features: list[Tensor], center: bool = True) -> Tensor:
    check_features("gram", features)
    n = features[0].shape[0]
    return features[0].new_empty(len(features), n, n, dtype=torch.float64)


@torch.library.register_fake("mpqkern::orthogonality")
def _(features: list[Tensor], center: bool = True, debiased: bool = False) -> Tensor:
    check_features("orthogonality", features, debiased)
    return features[0].new_empty(len(features), len(features), dtype=torch.float64)


@torch.library.register_fake("mpqkern::probe_errors")
def _(weight, bits, group_size, symmetric, fractions, scale_dtype="float16"):  # type: ignore[no-untyped-def]
    check_probe_errors(weight, bits, group_size, fractions, scale_dtype)
    groups = _groups(weight.shape[1], group_size)
    return weight.new_empty(len(bits), weight.shape[0], groups, fractions.shape[0], dtype=torch.float32)


@torch.library.register_fake("mpqkern::probe_linear")
def _(x: Tensor, weights: Tensor, bias: Tensor | None = None) -> Tensor:
    check_probe_linear(x, weights, bias)
    return x.new_empty(weights.shape[0], *x.shape[:-1], weights.shape[1])


@torch.library.register_fake("mpqkern::probe_conv2d")
def _(x, weights, bias, stride, padding, dilation, groups):  # type: ignore[no-untyped-def]
    plane = check_probe_conv(x, weights, bias, stride, padding, dilation, groups)
    variants, batch, n = weights.shape[0], x.shape[0], weights.shape[1]
    return _images(x, variants * batch, n, *plane).view(variants, batch, n, *plane)


# ---- autocast: activations take the autocast type, weights keep their scales as they are -----------


def _register_autocast(name: str, device: str, key: str) -> None:
    op = getattr(torch.ops.mpqkern, name).default
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast(x: Tensor, *args: Any) -> Tensor:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(x.to(torch.get_autocast_dtype(device)) if x.dtype in FLOATS else x, *args)

    _library.impl(name, cast, key)


for _name in ("linear", "linear_fragments", "linear_activated", "conv2d", "conv2d_fragments", "conv2d_activated"):
    _register_autocast(_name, "cpu", "AutocastCPU")
    _register_autocast(_name, "cuda", "AutocastCUDA")
