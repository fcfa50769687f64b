"""Gradients of the ops, with respect to activations and bias; packed weights are constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import (
    ops,  # noqa: F401  # they are registered there
    plain,
)

BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # of gradients and what the activation was applied to
    "relu": lambda grad, y: torch.ops.aten.threshold_backward(grad, y, 0),
    "relu6": lambda grad, y: torch.ops.aten.hardtanh_backward(grad, y, 0, 6),
    "silu": lambda grad, y: grad * (s := torch.sigmoid(y)) * (1 + y * (1 - s)),  # aten's has no second derivative
    "gelu": torch.ops.aten.gelu_backward,
}


def _only_activations(ctx: Any, op: str) -> None:
    x, bias = 0, 4
    if any(needed for i, needed in enumerate(ctx.needs_input_grad) if i not in (x, bias)):
        raise RuntimeError(
            f"mpqkern::{op} has no gradient with respect to scales, zeros or act_scale; "
            "wanted them without requires_grad"
        )


def _keep(
    ctx: Any, inputs: tuple[Any, ...], how: tuple[Any, ...], act_scale: Tensor | None, activation: str | None
) -> None:
    """For the backward pass; x only where some of it may have saturated, or where results are made once more to see
    what the activation was applied to: `how` is what their op takes between bias and act_scale."""
    x, qweight, scales, zeros, bias = inputs[:5]
    ctx.activation, ctx.how, ctx.bias_dtype = activation, how, None if bias is None else bias.dtype
    kept = x if act_scale is not None or ctx.activation else None
    ctx.save_for_backward(qweight, scales, zeros, act_scale, kept, bias if ctx.activation else None)


def _before_activation(ctx: Any, op: Any, grad: Tensor) -> Tensor:
    if ctx.activation is None:
        return grad
    qweight, scales, zeros, act_scale, x, bias = ctx.saved_tensors
    return BACKWARD[ctx.activation](grad, op(x, qweight, scales, zeros, bias, *ctx.how, act_scale))


def _straight_through(grad: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    """Rounding counts as the identity, saturation as the constant that it is: a value whose nearest step lies within
    -127..127 hands its gradient on, one beyond gets none. With maxima for scales nothing lies beyond."""
    return grad.masked_fill((x.float() / scale).abs() >= 127.5, 0)


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor, activation: str | None = None) -> None:
    x, bits, group_size, act_bits, act_scale = inputs[0], *inputs[5:9]
    _only_activations(ctx, "linear")
    _keep(ctx, inputs, (bits, group_size, act_bits), act_scale, activation)
    ctx.weight = (bits, group_size, x.shape[-1])


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    qweight, scales, zeros, act_scale, x, _ = ctx.saved_tensors
    grad = _before_activation(ctx, torch.ops.mpqkern.linear, grad)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        w = torch.ops.mpqkern.dequantize(qweight, scales, zeros, *ctx.weight)
        grad_x = grad @ w.to(grad.dtype)
        if act_scale is not None:
            grad_x = _straight_through(grad_x, x, plain.packed.spread(act_scale, *ctx.weight[1:]))
    if ctx.needs_input_grad[4]:
        grad_bias = grad.flatten(0, -2).sum(0).to(ctx.bias_dtype) if grad.dim() > 1 else grad.to(ctx.bias_dtype)
    return (grad_x, None, None, None, grad_bias, *[None] * 4)


def _linear_fragments_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_linear_backward(ctx, grad), None)


def _linear_activated_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _linear_setup(ctx, inputs, output, inputs[-1])


def _linear_activated_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_linear_backward(ctx, grad), None, None)


def _conv_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor, activation: str | None = None) -> None:
    x, qweight, bits, group_size, *sizes, act_bits, act_scale = *inputs[:2], *inputs[5:14]
    kernel_size, stride, padding, dilation, groups = sizes
    _only_activations(ctx, "conv2d")
    _keep(ctx, inputs, (bits, group_size, *sizes, act_bits), act_scale, activation)
    ctx.shape = (qweight.shape[0], x.shape[1] // groups, *kernel_size)
    ctx.weight = (bits, group_size, kernel_size[0] * kernel_size[1] * (x.shape[1] // groups))
    ctx.x_shape = x.shape
    ctx.geometry = (list(stride), list(padding), list(dilation), groups)


def _conv_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    qweight, scales, zeros, act_scale, x, _ = ctx.saved_tensors
    grad = _before_activation(ctx, torch.ops.mpqkern.conv2d, grad)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        rows = torch.ops.mpqkern.dequantize(qweight, scales, zeros, *ctx.weight)
        w = plain.packed.weight_from_rows(rows, ctx.shape).to(grad.dtype)
        grad_x = torch.nn.grad.conv2d_input(ctx.x_shape, w, grad, *ctx.geometry)
        if act_scale is not None:
            grad_x = _straight_through(grad_x, x, act_scale)
    if ctx.needs_input_grad[4]:
        grad_bias = grad.sum((0, 2, 3)).to(ctx.bias_dtype)
    return (grad_x, None, None, None, grad_bias, *[None] * 9)


def _conv_fragments_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_conv_backward(ctx, grad), None)


def _conv_activated_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _conv_setup(ctx, inputs, output, inputs[-1])


def _conv_activated_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_conv_backward(ctx, grad), None, None)


for _name, _backward, _setup in (
    ("linear", _linear_backward, _linear_setup),
    ("linear_fragments", _linear_fragments_backward, _linear_setup),
    ("linear_activated", _linear_activated_backward, _linear_activated_setup),
    ("conv2d", _conv_backward, _conv_setup),
    ("conv2d_fragments", _conv_fragments_backward, _conv_setup),
    ("conv2d_activated", _conv_activated_backward, _conv_activated_setup),
):
    torch.library.register_autograd(f"mpqkern::{_name}", _backward, setup_context=_setup)
