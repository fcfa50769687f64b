"""A packed weight as an argument of launchers."""

from __future__ import annotations

import ctypes as c
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .memory import Global


class Layout(c.Structure):  # mpq::Packed of csrc/packed.h
    _fields_ = (
        ("codes", c.c_void_p),
        ("scales", c.c_void_p),
        ("zeros", c.c_void_p),
        ("half", c.c_bool),
        ("zero_each", c.c_bool),
        ("bits", c.c_int),
        ("n", c.c_int64),
        ("k", c.c_int64),
        ("kp", c.c_int64),
        ("group", c.c_int64),
        ("groups", c.c_int64),
    )


@dataclass
class Packed:
    codes: NDArray
    scales: NDArray
    zeros: NDArray | None
    bits: int
    group_size: int  # 0: the whole row
    k: int

    def place(self, memory: Global) -> Layout:
        kp = self.codes.shape[1] * 8 // self.bits
        return Layout(
            codes=memory.place(self.codes),
            scales=memory.place(self.scales),
            zeros=None if self.zeros is None else memory.place(self.zeros),
            half=self.scales.dtype == np.float16,
            zero_each=self.zeros is not None and self.zeros.size != 1,
            bits=self.bits,
            n=self.codes.shape[0],
            k=self.k,
            kp=kp,
            group=self.group_size or kp,
            groups=self.scales.shape[1],
        )
