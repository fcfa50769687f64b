"""A task of the convolution kernels as an argument of launchers."""

from __future__ import annotations

import ctypes as c
from dataclasses import dataclass

from numpy.typing import NDArray

from .memory import Global
from .packed import Layout, Packed

Pair = tuple[int, int]


class ConvLayout(c.Structure):  # mpq::ConvTask of csrc/cuda/conv.h
    _fields_ = (
        ("weight", Layout),
        ("x", c.c_void_p),
        ("act_scales", c.c_void_p),
        ("bias", c.c_void_p),
        ("y", c.c_void_p),
        *((name, c.c_int64) for name in ("batch", "in_channels", "height", "width")),
        *((name, c.c_int64) for name in ("out_height", "out_width", "groups")),
        *((name, c.c_int64 * 2) for name in ("kernel", "stride", "padding", "dilation")),
        *((name, c.c_int64 * 4) for name in ("x_stride", "y_stride")),
        ("type", c.c_int),
    )


@dataclass
class Conv:
    weight: Packed
    x: NDArray
    bias: NDArray | None
    y: NDArray
    x_shape: tuple[int, ...]  # batch, channels, height, width, as strides are
    y_shape: tuple[int, ...]
    x_stride: tuple[int, ...]
    y_stride: tuple[int, ...]
    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    type: int
    act_scales: NDArray | None = None

    def place(self, memory: Global) -> ConvLayout:
        pairs = {name: (c.c_int64 * 2)(*getattr(self, name)) for name in ("kernel", "stride", "padding", "dilation")}
        strides = {name: (c.c_int64 * 4)(*getattr(self, name)) for name in ("x_stride", "y_stride")}
        return ConvLayout(
            weight=self.weight.place(memory),
            x=memory.place(self.x),
            act_scales=None if self.act_scales is None else memory.place(self.act_scales),
            bias=None if self.bias is None else memory.place(self.bias),
            y=memory.place(self.y),
            **dict(zip(("batch", "in_channels", "height", "width"), self.x_shape, strict=True)),
            out_height=self.y_shape[2],
            out_width=self.y_shape[3],
            groups=self.groups,
            type=self.type,
            **pairs,
            **strides,
        )
