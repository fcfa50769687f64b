"""nn.Conv2d on a packed weight."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops, plain
from ..scheme import Scheme
from .module import PackedModule


class PackedConv2d(PackedModule):
    """`nn.Conv2d` whose weight stays packed; takes every stride, padding, dilation and group that it does.

    >>> conv = torch.nn.Conv2d(8, 8, 3, padding="same", groups=8)
    >>> PackedConv2d.from_float(conv, Scheme(8))(torch.randn(1, 8, 5, 5)).shape
    torch.Size([1, 8, 5, 5])
    """

    _fragments_op = "conv2d_fragments"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        scheme: Scheme,
        *,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] | str = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = (out_channels, in_channels // groups, *kernel_size)
        super().__init__(scheme, shape, bias=bias, device=device, dtype=dtype)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.dilation = kernel_size, stride, dilation
        self.padding, self.padding_mode = padding, padding_mode
        self._op_padding, self._pad_before = _split_padding(kernel_size, padding, dilation, padding_mode)

    @classmethod
    def empty_like(cls, layer: nn.Conv2d, scheme: Scheme) -> PackedConv2d:
        return cls(
            layer.in_channels,
            layer.out_channels,
            scheme=scheme,
            bias=layer.bias is not None,
            device=layer.weight.device,
            dtype=layer.weight.dtype,
            **_geometry(layer),
        )

    def empty_float(self) -> nn.Conv2d:
        return nn.utils.skip_init(
            nn.Conv2d,
            self.in_channels,
            self.out_channels,
            bias=self.bias is not None,
            device=self.qweight.device,
            dtype=self.dtype,
            **_geometry(self),
        )

    def forward(self, input: Tensor, activation: str | None = None, out_scale: Tensor | None = None) -> Tensor:
        weight, bias, act_scale = self._held()
        sizes = (self.kernel_size, self.stride, self._op_padding, self.dilation, self.groups)
        how = (self.scheme.bits, self.group_size, *sizes, self.scheme.act_bits, act_scale)
        pad = (self._pad_before, "constant" if self.padding_mode == "zeros" else self.padding_mode)
        fragments = self._fragments_for(input)
        return packed_conv2d(input, weight, bias, how, pad, self.in_channels, fragments, activation, out_scale)

    @property
    def takes_fragments(self) -> bool:
        if 1 < self.groups == self.in_channels:  # depthwise, which has a way of its own
            return False
        whole = self.groups == 1 or self.out_channels // self.groups % ops.PANEL == 0  # panels hold rows of one group
        return whole and super().takes_fragments

    def rounded_input(self, x: Tensor) -> Tensor:
        batch = x if x.dim() == 4 else x.unsqueeze(0)
        if x.dtype == torch.int8:
            return plain.from_bytes(batch, self.act_scale.double()).view(x.shape)
        return plain.rounded_images(batch, self.act_scale).view(x.shape)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        for name, default in (("padding", (0, 0)), ("dilation", (1, 1)), ("groups", 1), ("padding_mode", "zeros")):
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        return f"{text}, bias={self.bias is not None}, {self._scheme_repr()}"


@torch.fx.wrap  # symbolic tracing keeps the call whole
def packed_conv2d(
    input: Tensor,
    weight: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None,
    how: tuple[Any, ...],
    pad: tuple[tuple[int, int, int, int] | None, str],
    in_channels: int,
    fragments: Tensor | None = None,
    activation: str | None = None,
    out_scale: Tensor | None = None,
) -> Tensor:
    """The op, with what it leaves to its caller: samples without a batch, and padding other than zeros."""
    if input.dim() not in (3, 4) or input.shape[-3] != in_channels:  # the op sees only the padded width
        raise ValueError(f"input is {list(input.shape)}; wanted [batch, in_channels={in_channels}, height, width]")
    if input.dtype == torch.int8:
        input = _taken(input, bias, how[-1], pad[0] is not None)
    x = input if pad[0] is None else F.pad(input, pad[0], mode=pad[1])
    images = x if x.dim() == 4 else x.unsqueeze(0)
    if activation is not None:
        plain.check_activation("conv2d_activated", activation)
    if out_scale is not None and not hands_on_bytes(x, bias, how[-1]):
        out_scale = None
    if x.dtype == torch.int8 or out_scale is not None:
        *sizes, _, act_scale = how
        y = torch.ops.mpqkern.conv2d_bytes(images, *weight, bias, *sizes, act_scale, fragments, activation, out_scale)
    elif activation is not None:
        y = torch.ops.mpqkern.conv2d_activated(images, *weight, bias, *how, fragments, activation)
    elif fragments is None:
        y = torch.ops.mpqkern.conv2d(images, *weight, bias, *how)
    else:
        y = torch.ops.mpqkern.conv2d_fragments(images, *weight, bias, *how, fragments)
    return y if x.dim() == 4 else y.squeeze(0)


def _taken(q: Tensor, bias: Tensor | None, scale: Tensor | None, padded: bool) -> Tensor:
    """Integers as they are, or the floats that they stand for where the op cannot take them."""
    if scale is None:
        raise ValueError("input is int8, and the layer has no act_scale; wanted floats")
    if q.dim() == 4 and not padded and not _learns(bias):
        return q
    return plain.from_bytes(q if q.dim() == 4 else q.unsqueeze(0), scale).view(q.shape)


def hands_on_bytes(x: Tensor, bias: Tensor | None, act_scale: Tensor | None) -> bool:
    """Whether a convolution of `x` that could give the next one integers does: where there is a kernel for that, in the
    order of memory that it takes, and where nobody wants gradients, another type or a program for elsewhere."""
    if act_scale is None or x.dtype not in (torch.float32, torch.int8) or x.dim() != 4:
        return False
    if not x.is_cpu or ops.why_plain is not None or torch.is_autocast_enabled("cpu"):
        return False
    if torch.jit.is_tracing() or torch.compiler.is_exporting() or _learns(x, bias):
        return False
    try:
        return plain.is_channels_last(x)
    except RuntimeError:  # under vmap nobody knows
        return False


def _learns(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _geometry(layer: nn.Conv2d | PackedConv2d) -> dict[str, Any]:
    names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return {name: getattr(layer, name) for name in names}


def _split_padding(
    kernel: tuple[int, int], padding: tuple[int, int] | str, dilation: tuple[int, int], mode: str
) -> tuple[tuple[int, int], tuple[int, int, int, int] | None]:
    """What the op pads (zeros, both sides alike) and what F.pad must pad before it, if anything."""
    if padding == "valid":
        padding = (0, 0)
    if padding == "same":  # an odd total puts the extra one at the bottom and at the right
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        low, high = [t // 2 for t in total], [t - t // 2 for t in total]
    else:
        low = high = list(padding)
    if mode == "zeros" and low == high:
        return (low[0], low[1]), None
    return (0, 0), (low[1], high[1], low[0], high[0])
