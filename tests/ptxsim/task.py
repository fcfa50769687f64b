"""A task of the matrix kernels as an argument of launchers."""

from __future__ import annotations

import ctypes as c
from dataclasses import dataclass

from numpy.typing import NDArray

from .memory import Global
from .packed import Layout, Packed

TYPES = ("f32", "f16", "bf16", "int8")  # mpq::Type of csrc/cuda/linear.h, in its order


class TaskLayout(c.Structure):  # mpq::LinearTask
    _fields_ = (
        ("weight", Layout),
        ("fragments", c.c_void_p),
        ("x", c.c_void_p),
        ("x_ld", c.c_int64),
        ("sums", c.c_void_p),
        ("sums_ld", c.c_int64),
        ("bias", c.c_void_p),
        ("y", c.c_void_p),
        ("partial", c.c_void_p),
        ("m", c.c_int64),
        ("type", c.c_int),
        ("splits", c.c_int),
        ("per_split", c.c_int64),
    )


@dataclass
class Task:
    weight: Packed
    fragments: NDArray
    x: NDArray
    y: NDArray
    m: int
    type: int
    x_ld: int
    bias: NDArray | None = None
    sums: NDArray | None = None
    partial: NDArray | None = None
    splits: int = 1
    per_split: int = 0

    def place(self, memory: Global) -> TaskLayout:
        def at(array: NDArray | None) -> int | None:
            return None if array is None else memory.place(array)

        weight = self.weight.place(memory)
        weight.codes = None  # these kernels take the fragments
        return TaskLayout(
            weight=weight,
            fragments=at(self.fragments),
            x=at(self.x),
            x_ld=self.x_ld,
            sums=at(self.sums),
            sums_ld=0 if self.sums is None else self.sums.shape[-1],
            bias=at(self.bias),
            y=at(self.y),
            partial=at(self.partial),
            m=self.m,
            type=self.type,
            splits=self.splits,
            per_split=self.per_split,
        )
