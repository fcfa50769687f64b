"""Packed models as ONNX files, the codes byte for byte as they are stored.

    to_onnx(model, (x,), "model.onnx")                  # linear layers as com.microsoft.MatMulNBits: ONNX Runtime
    to_onnx(model, (x,), "model.onnx", standard=True)   # operators of the ONNX standard only

A packed row is a MatMulNBits row already: codes without sign, the lowest first. Only the zero differs: MatMulNBits
takes 2^(bits-1) when it is given none, and leaves its fast kernels when it is given halves. So the rest is added:

    sum_k x[k] s (q[k] - z)  =  sum_k x[k] s (q[k] - 2^(bits-1))  +  (sum_k x[k]) s (2^(bits-1) - z)

for each group, a product with one number a group and row. Convolutions have no such operator: their weights are
unpacked by shifts and masks, which runtimes fold to float weights when they load the file.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx  # noqa: F401  # with onnxscript what torch.onnx.export needs: missing, they are named here
import onnxscript  # noqa: F401
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import packed, plain
from ..files import require_place
from ..nn import PackedModule
from ..scheme import padded

LONGEST_BLOCK = 256  # codes that share a scale in MatMulNBits; a power of two from 16 on


def to_onnx(
    model: nn.Module,
    example: tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = None,
    standard: bool = False,
    **options: Any,
) -> int:
    """Writes `model`, traced on the arguments `example` and `kwargs`; returns the bytes of the file.

    `dynamic_shapes` is that of `torch.export.export`; without it every size is as in the example. `standard=True`
    keeps to ONNX's own operators: any runtime takes the file, but computes with float weights. Further `options`
    (`input_names`, `opset_version`, ...) go to `torch.onnx.export`.

    >>> import tempfile, mpqkern
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
    >>> _ = mpqkern.swap_(model, {"*": 4})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     to_onnx(model, (torch.zeros(1, 64),), f"{folder}/model.onnx") < 64 * 64 * 4
    True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={type(model).__name__}; wanted an nn.Module")
    if not isinstance(example, tuple):
        raise TypeError(f"example={type(example).__name__}; wanted a tuple of the model's arguments")
    if not any(isinstance(module, PackedModule) for module in model.modules()):
        raise ValueError("model has no packed layer; wanted one that mpqkern.swap_ has packed")
    if model.training:
        raise ValueError("model is in training mode; wanted model.eval()")
    require_place(Path(path))  # tracing takes a while
    graphs = {
        torch.ops.mpqkern.linear.default: _standard_linear if standard else _linear,
        torch.ops.mpqkern.conv2d.default: _conv2d,
        torch.ops.mpqkern.linear_activated.default: _activated(_standard_linear if standard else _linear),
        torch.ops.mpqkern.conv2d_activated.default: _activated(_conv2d),
        torch.ops.mpqkern.dequantize.default: _dequantized,  # of models that read a layer's weight
    }
    traced = torch.export.export(model, example, kwargs, dynamic_shapes=dynamic_shapes).run_decompositions(graphs)
    options = {"optimize": False, "verbose": False} | options  # optimizing would unpack small weights in the file
    program = torch.onnx.export(traced, dynamo=True, **options)
    for node in program.model.graph:  # stack traces, which can be larger than the weights
        node.metadata_props.clear()
    program.save(path)
    return Path(path).stat().st_size


def _activated(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def both(*args: Any) -> Tensor:
        *args, _fragments, activation = args
        return plain.ACTIVATIONS[activation](product(*args))

    return both


def _linear(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    act_bits: int | None = None,
    act_scale: Tensor | None = None,
) -> Tensor:
    rows = (x if act_bits is None else plain.rounded_rows(x, group_size, act_scale)).float()
    (n, row_bytes), k = qweight.shape, x.shape[-1]
    group = group_size or padded(k)
    block = min(LONGEST_BLOCK, group & -group)  # the largest power of two in a group
    blocks = -(-padded(k) // block)
    y = torch.onnx.ops.symbolic(
        "com.microsoft::MatMulNBits",
        (
            rows,
            F.pad(qweight, (0, blocks * block * bits // 8 - row_bytes)).view(n, blocks, -1),
            scales.float().repeat_interleave(group // block, 1)[:, :blocks],
        ),
        {"K": k, "N": n, "bits": bits, "block_size": block},
        dtype=torch.float32,
        shape=(*x.shape[:-1], n),
        version=1,
    )
    sums = F.pad(rows, (0, -k % group)).unflatten(-1, (-1, group)).sum(-1)
    return _finished(y + sums @ (scales.float() * (2.0 ** (bits - 1) - zeros.float())).T, bias, x.dtype)


def _standard_linear(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    act_bits: int | None = None,
    act_scale: Tensor | None = None,
) -> Tensor:
    rows = (x if act_bits is None else plain.rounded_rows(x, group_size, act_scale)).float()
    weight = _dequantized(qweight, scales, zeros, bits, group_size, x.shape[-1])
    return _finished(rows @ weight.T, bias, x.dtype)


def _conv2d(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor,
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
    images = (x if act_bits is None else plain.rounded_images(x, act_scale)).float()
    shape = (qweight.shape[0], x.shape[1] // groups, *kernel_size)
    rows = _dequantized(qweight, scales, zeros, bits, group_size, shape[1] * shape[2] * shape[3])
    weight = packed.weight_from_rows(rows, shape)
    # Without a bias exporters write one that runtimes cannot fold, nor then batch norms; zeros of a constant they can.
    shift = scales[:, 0].float() * 0 if bias is None else bias.float()
    return F.conv2d(images, weight, shift, stride, padding, dilation, groups).to(x.dtype)


def _dequantized(qweight: Tensor, scales: Tensor, zeros: Tensor, bits: int, group_size: int, k: int) -> Tensor:
    """As `packed.dequantize`, with quotients of floats in place of shifts of bytes, which exporters get wrong."""
    powers = 2.0 ** torch.arange(0, 8, bits)
    fields = (qweight.float().unsqueeze(-1) / powers).floor()
    codes = fields - 2**bits * (fields / 2**bits).floor()
    return packed.values(codes.flatten(1)[:, :k], scales, zeros, group_size)


def _finished(y: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (y if bias is None else y + bias.float()).to(dtype)
