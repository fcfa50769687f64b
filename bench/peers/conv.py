"""Convolutions as torch, ONNX Runtime and OpenVINO compute them, and as mpqkern does: float in, float out.

Others' 8-bit ones round inputs, and torch's and ONNX Runtime's outputs as well, on grids fixed beforehand; here those
that span just what occurs. Ours find a scale for each sample, or take a fixed one, too. Nobody else has 2 or 4 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpqkern import PackedConv2d, Scheme

from . import Built, Peer, graphs, grid, spread_out
from .linear import quantized

LAST = torch.channels_last


@dataclass(frozen=True)
class Shape:
    """What the weight does not tell; called, the float convolution."""

    stride: int
    padding: int
    groups: int

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, None, self.stride, self.padding, 1, self.groups)


def packed(
    weight: Tensor, x: Tensor, copies: int, *, shape: Shape, scheme: Scheme, last: bool, fixed: bool = False
) -> Built:
    n, channels, height, width = weight.shape
    conv = nn.Conv2d(
        channels * shape.groups, n, (height, width), shape.stride, shape.padding, groups=shape.groups, bias=False
    )
    conv.weight.data.copy_(weight)
    made = [PackedConv2d.from_float(conv, scheme) for _ in range(copies)]
    for one in made if fixed else ():
        one.act_scale = x.abs().amax().view(1) / 127
    x = x.contiguous(memory_format=LAST) if last else x
    return Built(lambda i: made[i % copies](x), made[0].dequantize().reshape(weight.shape))


def torch_float(weight: Tensor, x: Tensor, copies: int, *, shape: Shape, last: bool) -> Built:
    order = LAST if last else torch.contiguous_format
    held, x = [weight.clone(memory_format=order) for _ in range(copies)], x.contiguous(memory_format=order)
    return Built(lambda i: shape(x, held[i % copies]), weight)


def torch_int8(weight: Tensor, x: Tensor, copies: int, *, shape: Shape, engine: str) -> Built:
    pairs = [[shape.stride] * 2, [shape.padding] * 2, [1, 1], shape.groups]
    codes, held = quantized(weight, lambda w: torch.ops.quantized.conv2d_prepack(w, None, *pairs), engine, copies)
    (scale, zero), (out_scale, out_zero) = span(x), span(shape(x, weight))
    x = x.contiguous(memory_format=LAST)

    def call(i: int) -> Tensor:
        rounded = torch.quantize_per_tensor(x, scale, zero, torch.quint8)
        return torch.ops.quantized.conv2d(rounded, held[i % copies], out_scale, out_zero).dequantize()

    return Built(call, codes.dequantize())


def onnx_float(weight: Tensor, x: Tensor, copies: int, *, shape: Shape) -> Built:
    from onnx import helper

    def nodes(i: int):  # type: ignore[no-untyped-def]
        own = {f"w{i}": graphs.told_apart(weight.numpy(), i)}
        return [helper.make_node("Conv", ["x", *own], [f"y{i}"], **onnx_shape(shape, weight))], own

    return Built(graphs.onnx_runtime(nodes, {}, x, shape(x, weight).shape, copies), weight, copies)


def onnx_int8(weight: Tensor, x: Tensor, copies: int, *, shape: Shape) -> Built:
    """QuantizeLinear, QLinearConv, DequantizeLinear; each copy has a rounding of its own, one grid for all inputs."""
    from onnx import helper

    codes, scales = grid(weight, 8)
    result = shape(x, weight)
    (scale, zero), (out_scale, out_zero) = span(x), span(result)
    constants = {"sw": scales.view(-1).numpy(), "zw": np.zeros(len(weight), np.int8),
                 "so": np.float32(out_scale), "zo": np.uint8(out_zero)}  # fmt: skip

    def nodes(i: int):  # type: ignore[no-untyped-def]
        # scales a rounding error apart: one QuantizeLinear for all would otherwise do
        grid_of_x = {f"sx{i}": np.float32(scale * (1 + i * 2e-7)), f"zx{i}": np.uint8(zero)}
        made = [
            helper.make_node("QuantizeLinear", ["x", *grid_of_x], [f"q{i}"]),
            helper.make_node("QLinearConv", [f"q{i}", *grid_of_x, f"w{i}", "sw", "zw", "so", "zo"], [f"r{i}"],
                             **onnx_shape(shape, weight)),
            helper.make_node("DequantizeLinear", [f"r{i}", "so", "zo"], [f"y{i}"]),
        ]  # fmt: skip
        return made, grid_of_x | {f"w{i}": graphs.told_apart(codes.numpy(), i)}

    call = graphs.onnx_runtime(nodes, constants, x, result.shape, copies)
    return Built(call, spread_out(codes, scales), copies)


def openvino(weight: Tensor, x: Tensor, copies: int, *, shape: Shape, int8: bool = False) -> Built:
    from openvino import opset13

    codes, scales = grid(weight, 8)
    (scale, zero), (n, channels, height, width) = span(x), weight.shape
    ends = [opset13.constant(np.float32(scale * (code - zero))) for code in (0, 255)]
    how = [[shape.stride] * 2, [shape.padding] * 2, [shape.padding] * 2, [1, 1]]
    grouped = (shape.groups, n // shape.groups, channels, height, width)

    def result(parameter, i: int):  # type: ignore[no-untyped-def]
        data = graphs.told_apart((codes if int8 else weight).numpy(), i)
        given = data.reshape(grouped if shape.groups > 1 else data.shape)
        made = opset13.constant(given)
        if int8:
            wide = scales.numpy().reshape(*given.shape[: 1 + (shape.groups > 1)], *[1] * 3)
            made = opset13.multiply(opset13.convert(made, "f32"), opset13.constant(wide))
            parameter = opset13.fake_quantize(parameter, *ends, *ends, 256)
        product = opset13.group_convolution if shape.groups > 1 else opset13.convolution
        return product(parameter, made, *how)

    values = spread_out(codes, scales) if int8 else weight
    return Built(graphs.openvino(result, x, copies), values, copies)


def span(values: Tensor) -> tuple[float, int]:
    """Scale and zero of the 8-bit grid from the least to the largest value, and 0."""
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    scale = (high - low) / 255 or 1.0
    return scale, round(-low / scale)


def onnx_shape(shape: Shape, weight: Tensor) -> dict[str, object]:
    height, width = weight.shape[2:]
    return {
        "kernel_shape": [height, width], "pads": [shape.padding] * 4, "strides": [shape.stride] * 2,
        "group": shape.groups,
    }  # fmt: skip


def layer(
    batch: int, channels: int, n: int, size: int, kernel: int, stride: int, groups: int
) -> tuple[Shape, Tensor, Tensor]:
    """A convolution with padding of half its kernel, a weight and an input for it."""
    inner = channels // groups
    weight = torch.randn(n, inner, kernel, kernel) / (inner * kernel**2) ** 0.5
    return Shape(stride, kernel // 2, groups), weight, torch.randn(batch, channels, size, size)


def racers(shape: Shape, schemes: list[Scheme]) -> list[Peer]:
    """torch's first, ours in both orders of memory, then others'."""

    def of(name: str, bits: int, make: Callable[..., Built], **more: object) -> Peer:
        return Peer(name, bits, "int8" if bits == 8 else "fp32", partial(make, shape=shape, **more))

    found = [of("float", 32, torch_float, last=False), of("float channels_last", 32, torch_float, last=True)]
    for scheme, fixed in [(s, fixed) for s in schemes for fixed in ((False, True) if s.act_bits else (False,))]:
        for last in (False, True):
            make = partial(packed, shape=shape, scheme=scheme, last=last, fixed=fixed)
            name = f"{scheme}{' fixed' if fixed else ''}{' channels_last' if last else ''}"
            kind = "int8" if scheme.act_bits else "fp32"
            found.append(Peer(name, scheme.bits, kind, make, scheme.group_size or 0, 2, ours=True))
    return [
        *found,
        of("ORT fp32 Conv", 32, onnx_float),
        of("ORT QLinearConv", 8, onnx_int8),
        of("torch int8 x86", 8, torch_int8, engine="x86"),
        of("torch int8 onednn", 8, torch_int8, engine="onednn"),
        of("OpenVINO fp32", 32, openvino),
        of("OpenVINO int8", 8, openvino, int8=True),
    ]
