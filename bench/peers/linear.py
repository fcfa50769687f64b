"""Linear layers as torch, ONNX Runtime, OpenVINO and ggml compute them, and as mpqkern does."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mpqkern import PackedLinear, Scheme
from mpqkern.nn.linear import packed_linear

from . import Built, Peer, ggml, graphs, grid, spread_out

aten = torch.ops.aten


def packed(weight: Tensor, x: Tensor, copies: int, *, scheme: Scheme, first: bool = False) -> Built:
    """mpqkern's own; `first`: dequantized, and then torch's float product."""
    layer = torch.nn.utils.skip_init(torch.nn.Linear, weight.shape[1], weight.shape[0], bias=False)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    packed = PackedLinear.from_float(layer, scheme)
    made = [copy.deepcopy(packed) for _ in range(copies)]
    held = [(*one.arguments(), one.fragments) for one in made]

    def linear(i: int) -> Tensor:
        return packed_linear(x, *held[i % copies])

    def dequantized(i: int) -> Tensor:
        return F.linear(x, made[i % copies].dequantize().to(x.dtype))

    return Built(dequantized if first else linear, made[0].dequantize())


def ours(scheme: Scheme, *, first: bool = False) -> Peer:
    name = f"{scheme} dequantized first" if first else str(scheme)
    kind = "int8" if scheme.act_bits else "fp32"
    make = partial(packed, scheme=scheme, first=first)
    return Peer(name, scheme.bits, kind, make, scheme.group_size or 0, 2, ours=not first)


def torch_float(weight: Tensor, x: Tensor, copies: int) -> Built:
    held = [weight.clone() for _ in range(copies)]
    return Built(lambda i: F.linear(x, held[i % copies]), held[0])


def torch_int4pack(weight: Tensor, x: Tensor, copies: int, *, group: int) -> Built:
    codes, scales = grid(weight, 4, group)
    scales = scales.bfloat16()
    made = aten._convert_weight_to_int4pack_for_cpu((codes + 8).int(), 1)
    pairs = torch.stack([scales.t(), torch.zeros_like(scales.t())], -1).contiguous()  # a scale and what to add
    held, x = [(made.clone(), pairs.clone()) for _ in range(copies)], x.bfloat16()

    def call(i: int) -> Tensor:
        codes, scales = held[i % copies]
        return aten._weight_int4pack_mm_for_cpu(x, codes, group, scales)

    return Built(call, spread_out(codes, scales))


def torch_int8pack(weight: Tensor, x: Tensor, copies: int) -> Built:
    codes, scales = grid(weight, 8)
    scales = scales.bfloat16()
    held, x = [(codes.clone(), scales.view(-1).clone()) for _ in range(copies)], x.bfloat16()
    return Built(lambda i: aten._weight_int8pack_mm(x, *held[i % copies]), spread_out(codes, scales))


def torch_dynamic(weight: Tensor, x: Tensor, copies: int, *, engine: str) -> Built:
    codes, held = quantized(weight, lambda w: torch.ops.quantized.linear_prepack(w, None), engine, copies)
    # reduce_range: activations of 7 bits, as torch.ao's modules ask for
    return Built(lambda i: torch.ops.quantized.linear_dynamic(x, held[i % copies], True), codes.dequantize())


def quantized(weight: Tensor, pack: Callable[[Tensor], object], engine: str, copies: int) -> tuple[Tensor, list]:  # type: ignore[type-arg]
    """torch's own quantized tensor, a scale a row, and copies of what `pack` makes of it for an engine."""
    if engine not in torch.backends.quantized.supported_engines:
        raise NotImplementedError(f"torch has no engine {engine!r} here")
    before, scales = torch.backends.quantized.engine, weight.flatten(1).abs().amax(1).double() / 127.5
    with warnings.catch_warnings():  # these tensors are deprecated; their kernels are still what torch offers
        warnings.simplefilter("ignore")
        codes = torch.quantize_per_channel(weight, scales, torch.zeros(len(weight), dtype=torch.long), 0, torch.qint8)
        try:
            torch.backends.quantized.engine = engine  # packing asks for it, the product goes by what is packed
            return codes, [pack(codes) for _ in range(copies)]
        finally:
            torch.backends.quantized.engine = before


def onnx_float(weight: Tensor, x: Tensor, copies: int) -> Built:
    from onnx import helper

    across = np.ascontiguousarray(weight.t().numpy())

    def nodes(i: int):  # type: ignore[no-untyped-def]
        return [helper.make_node("MatMul", ["x", f"w{i}"], [f"y{i}"])], {f"w{i}": graphs.told_apart(across, i)}

    shape = len(x), len(weight)
    return Built(graphs.onnx_runtime(nodes, {}, x, shape, copies), weight, copies)


def onnx_bits(weight: Tensor, x: Tensor, copies: int, *, bits: int, group: int) -> Built:
    """MatMulNBits with 8-bit activations (accuracy_level 4)."""
    from onnx import helper

    (n, k), (codes, scales) = weight.shape, grid(weight, bits, group)
    blob = fields(codes, bits).reshape(n, k // group, -1)
    how = {"K": k, "N": n, "bits": bits, "block_size": group, "accuracy_level": 4, "domain": "com.microsoft"}

    def nodes(i: int):  # type: ignore[no-untyped-def]
        own = {f"w{i}": graphs.told_apart(blob, i), f"s{i}": scales.numpy()}
        return [helper.make_node("MatMulNBits", ["x", *own], [f"y{i}"], **how)], own

    return Built(graphs.onnx_runtime(nodes, {}, x, (len(x), n), copies), spread_out(codes, scales), copies)


def onnx_dynamic(weight: Tensor, x: Tensor, copies: int) -> Built:
    from onnx import helper

    codes, scales = grid(weight, 8)
    across = np.ascontiguousarray(codes.t().numpy())

    def nodes(i: int):  # type: ignore[no-untyped-def]
        own = {f"w{i}": graphs.told_apart(across, i), f"s{i}": scales.view(-1).numpy()}
        return [helper.make_node("DynamicQuantizeMatMul", ["x", *own], [f"y{i}"], domain="com.microsoft")], own

    call = graphs.onnx_runtime(nodes, {}, x, (len(x), len(weight)), copies)
    return Built(call, spread_out(codes, scales), copies)


def openvino_bits(weight: Tensor, x: Tensor, copies: int, *, bits: int, group: int) -> Built:
    """Weight compression as its tools write it: (codes - zero) * scale, fp16, in front of a float product.

    Processors with instructions for 8-bit products are then given 8-bit activations, others float ones.
    """
    import openvino
    from openvino import opset13

    (n, k), (codes, scales) = weight.shape, grid(weight, bits, group)
    scales = scales.half()
    kind = {8: openvino.Type.i8, 4: openvino.Type.u4, 2: openvino.Type.u2}[bits]
    blob = codes.numpy().view(np.uint8) if bits == 8 else fields(codes, bits)
    zero = np.full(1, sum(2 ** (bits - 1 + at) for at in range(0, 8, bits)), np.uint8)  # a byte of middle codes

    def constant(data: np.ndarray, shape: list[int]):  # type: ignore[no-untyped-def]
        tensor = openvino.Tensor(kind, openvino.Shape(shape))
        tensor.data.reshape(-1).view(np.uint8)[:] = data.reshape(-1)
        return opset13.convert(opset13.constant(tensor), "f16")

    def result(parameter, i: int):  # type: ignore[no-untyped-def]
        made = constant(graphs.told_apart(blob, i), [n, k // group, group])
        if bits < 8:
            made = opset13.subtract(made, constant(zero, [1, 1, 1]))
        made = opset13.multiply(made, opset13.constant(scales.numpy()[..., None]))
        made = opset13.reshape(made, opset13.constant(np.array([n, k])), False)
        return opset13.matmul(parameter, opset13.convert(made, "f32"), False, True)

    return Built(graphs.openvino(result, x, copies), spread_out(codes, scales), copies)


def fields(codes: Tensor, bits: int) -> np.ndarray:
    """Codes from -2**(bits-1) as unsigned fields of bytes [N, K * bits / 8], the first lowest."""
    raised = (codes.short() + 2 ** (bits - 1)).numpy().astype(np.uint8)
    parts = raised.reshape(len(raised), -1, 8 // bits)
    return np.bitwise_or.reduce(parts << np.arange(0, 8, bits, dtype=np.uint8), axis=2)


FLOAT = Peer("float", 32, "fp32", torch_float)
PEERS = [
    Peer("ORT fp32 MatMul", 32, "fp32", onnx_float),
    Peer("torch int4pack g128 bf16", 4, "fp32", partial(torch_int4pack, group=128), 128, 4),
    Peer("torch int8pack bf16", 8, "fp32", torch_int8pack, 0, 2),
    Peer("torch dynamic int8 x86", 8, "int8", partial(torch_dynamic, engine="x86")),
    Peer("torch dynamic int8 onednn", 8, "int8", partial(torch_dynamic, engine="onednn")),
    *(
        Peer(f"ORT MatMulNBits {b} g{g}", b, "int8", partial(onnx_bits, bits=b, group=g), g)
        for b in (2, 4, 8)
        for g in (128, 32)
    ),
    Peer("ORT DynamicQuantizeMatMul", 8, "int8", onnx_dynamic),
    *(
        Peer(f"OpenVINO {kind} g128", b, "int8", partial(openvino_bits, bits=b, group=128), 128, 2)
        for kind, b in (("u2", 2), ("u4", 4), ("i8", 8))
    ),
    *(
        Peer(f"ggml {kind}", b, "int8", partial(ggml.product, kind=kind), g, scale)
        for kind, (_, b, g, scale) in ggml.KINDS.items()
    ),
]
