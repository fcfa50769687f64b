"""The two ways in which tests run the CUDA kernels of `linear`: interpreted, and on a GPU."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpqkern import packed, plain
from mpqkern.scheme import padded

from . import ptxsim
from .reference import fragments
from .test_cuda import random_grid, read_only, weight
from .test_packed import codes_for

HALVES = (torch.float16, torch.bfloat16)
KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # mpq::Type
ZEROS = ("mid", "one", "each")


def array(t: Tensor) -> NDArray:
    """What the tensor holds, for reading; bf16 as its bits."""
    return read_only(t.contiguous().view(torch.int16) if t.dtype == torch.bfloat16 else t)


def unwritten(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.full((int(np.prod(shape)) * dtype.itemsize,), 0xA5, dtype=torch.uint8).view(dtype).reshape(shape)


def writable(t: Tensor) -> NDArray:
    return (t.view(torch.int16) if t.dtype == torch.bfloat16 else t).numpy()


class Case:
    """A weight of random codes and a bias, with what `linear` must make of it."""

    def __init__(self, n: int, k: int, bits: int, group: int, zeros: str, scale_dtype: torch.dtype = torch.float16):
        torch.manual_seed(n * 1000 + k)
        self.n, self.k, self.bits, self.group = n, k, bits, group
        self.codes = codes_for(n, k, bits, n + k)
        self.q = packed.pack(self.codes, bits)
        self.scales, self.zeros = random_grid(n, k, group, zeros, scale_dtype)
        self.bias = torch.randn(n)

    def packed(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.q, self.scales, self.zeros

    def exact(self, x: Tensor, bias: bool = True) -> Tensor:
        w = packed.dequantize(*self.packed(), self.bits, self.group, self.k).double()
        return x.double() @ w.T + (self.bias.double() if bias else 0)

    def rounded(self, x: Tensor, act_scale: Tensor | None, bias: bool = True) -> Tensor:
        w = packed.dequantize(*self.packed(), self.bits, self.group, self.k).double()
        return plain.rounded_rows(x, self.group, act_scale) @ w.T + (self.bias.double() if bias else 0)


class Interpreted:
    """The launchers, on arrays of exactly the sizes that they may touch."""

    def __init__(self, library: ptxsim.Library) -> None:
        self.library = library

    def to_fragments(self, q: Tensor, bits: int) -> Tensor:
        n, kp = q.shape[0], q.shape[1] * 8 // bits
        out = unwritten((fragments.words(n, kp, bits),), torch.int32)
        self.library.call("mpq_to_fragments", read_only(q), n, kp, bits, writable(out), None)
        return out

    def from_fragments(self, f: Tensor, n: int, kp: int, bits: int) -> Tensor:
        out = unwritten((n, kp * bits // 8), torch.uint8)
        self.library.call("mpq_from_fragments", read_only(f), n, kp, bits, writable(out), None)
        return out

    def task(self, case: Case, x: Tensor, y: Tensor, splits: int, length: int, bias: bool) -> ptxsim.Task:
        """`length`: tiles or steps along k, to be split."""
        per_split = -(-length // splits)
        splits = -(-length // per_split)
        return ptxsim.Task(
            weight(*case.packed(), case.bits, case.group, case.k),
            read_only(torch.from_numpy(fragments.of_codes(case.codes.numpy(), case.bits))),
            array(x),
            writable(y),
            y.shape[0],
            KINDS[y.dtype],
            x.shape[1],
            array(case.bias) if bias else None,
            partial=writable(unwritten((splits, *y.shape), torch.float32)) if splits > 1 else None,
            splits=splits,
            per_split=per_split,
        )

    def run(self, task: ptxsim.Task, *call: object) -> None:
        self.cost = self.library.call(str(call[0]), task, *call[1:], None)
        self.partial = task.partial
        if task.splits > 1:
            self.library.call("mpq_join", task, None)

    def few(self, case: Case, x: Tensor, splits: int = 1, bias: bool = True) -> Tensor:
        y = unwritten((x.shape[0], case.n), x.dtype)
        self.run(self.task(case, x, y, splits, -(-padded(case.k) * case.bits // 256), bias), "mpq_few")
        return y

    def many(self, case: Case, x: Tensor, columns: int, splits: int = 1, bias: bool = True) -> Tensor:
        m, k = x.shape
        y, unit, ld = unwritten((m, case.n), x.dtype), self.unit(case, False), -(-m // 4) * 4
        sums = unwritten((self.units(case, unit), ld), torch.float32)
        rows = x if k % 8 == 0 else unwritten((m, -(-k // 8) * 8), x.dtype)
        copy = None if rows is x else writable(rows)
        self.library.call(
            "mpq_row_sums", array(x), KINDS[x.dtype], m, k, unit, writable(sums), ld, copy, rows.shape[1], None
        )
        task = self.task(case, rows, y, splits, -(-padded(k) // self.step(case, False)), bias)
        task.sums = read_only(sums)
        self.run(task, "mpq_many", columns, 0)
        return y

    def arrange(self, case: Case, x: Tensor, columns: int, per_split: int) -> tuple[Tensor, Tensor]:
        """[blocks, pieces, columns, 8] and fp32 [units, tokens]."""
        m, k = x.shape
        step, ld = self.step(case, False), -(-m // columns) * columns
        steps, groups = -(-padded(k) // step), case.scales.shape[1]
        unit, units = (per_split * step, -(-steps // per_split)) if groups == 1 else (case.group, groups)
        rows = unwritten((ld // columns, steps * step // 8, columns, 8), x.dtype)
        sums = unwritten((units, ld), torch.float32)
        call = ("mpq_arrange", array(x), KINDS[x.dtype], m, k, unit, units, steps * step // 8, columns)
        self.library.call(*call, writable(sums), ld, writable(rows), None)
        return rows, sums

    def warpgroup(self, case: Case, x: Tensor, columns: int, splits: int = 1, bias: bool = True) -> Tensor:
        """`splits` at most: they are whole groups."""
        y, step = unwritten((x.shape[0], case.n), x.dtype), self.step(case, False)
        steps, groups = -(-padded(case.k) // step), case.scales.shape[1]
        chunk = 1 if groups == 1 else math.lcm(case.group, step) // step
        per_split = math.ceil(steps / splits / chunk) * chunk
        rows, sums = self.arrange(case, x, columns, per_split)
        task = self.task(case, rows, y, -(-steps // per_split), steps, bias)
        task.per_split, task.sums = per_split, read_only(sums)
        self.run(task, "mpq_warpgroup", columns)
        return y

    def round_rows(self, case: Case, x: Tensor, act_scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """int8 [M, 128s] and fp32 [sums or scales, units, tokens]."""
        m, unit, ld = x.shape[0], self.unit(case, True), -(-x.shape[0] // 4) * 4
        q = unwritten((m, -(-case.k // 128) * 128), torch.int8)
        sums = unwritten((2, self.units(case, unit), ld), torch.float32)
        fixed, each = (None, 0) if act_scale is None else (array(act_scale), int(act_scale.numel() > 1))
        w = weight(*case.packed(), case.bits, case.group, case.k)
        call = ("mpq_round_rows", array(x), KINDS[x.dtype], w, m, fixed, each, unit)
        self.library.call(*call, writable(q), writable(sums), ld, None)
        return q, sums

    def int8(
        self, case: Case, x: Tensor, columns: int, splits: int = 1, act_scale: Tensor | None = None, bias: bool = True
    ) -> Tensor:
        q, sums = self.round_rows(case, x, act_scale)
        y = unwritten((x.shape[0], case.n), x.dtype)
        task = self.task(case, q, y, splits, -(-padded(case.k) // 128), bias)
        task.sums = read_only(sums)
        self.run(task, "mpq_many", columns, 1)
        return y

    @staticmethod
    def step(case: Case, int8: bool) -> int:
        return 128 if int8 or case.bits == 2 else 64

    def unit(self, case: Case, int8: bool) -> int:
        step = self.step(case, int8)
        return 32 if case.group and case.group < padded(case.k) and case.group % step else step

    @staticmethod
    def units(case: Case, unit: int) -> int:
        return -(-padded(case.k) // 128) * 4 if unit == 32 else -(-padded(case.k) // unit)


class OnGpu:
    """The ops, on CUDA tensors; which kernel runs is theirs to choose."""

    def to_fragments(self, q: Tensor, bits: int) -> Tensor:
        return torch.ops.mpqkern.fragments(q.cuda(), bits, q.shape[1] * 8 // bits).cpu()

    def few(self, case: Case, x: Tensor, splits: int = 1, bias: bool = True) -> Tensor:
        return self.linear(case, x, bias)

    def many(self, case: Case, x: Tensor, columns: int, splits: int = 1, bias: bool = True) -> Tensor:
        return self.linear(case, x, bias)

    def warpgroup(self, case: Case, x: Tensor, columns: int, splits: int = 1, bias: bool = True) -> Tensor:
        return self.linear(case, x, bias)

    def int8(
        self, case: Case, x: Tensor, columns: int, splits: int = 1, act_scale: Tensor | None = None, bias: bool = True
    ) -> Tensor:
        return self.linear(case, x, bias, 8, act_scale)

    def linear(self, case: Case, x: Tensor, bias: bool, *act: object) -> Tensor:
        args = (x, *case.packed(), case.bias if bias else None, case.bits, case.group, *act)
        return torch.ops.mpqkern.linear(*(a.cuda() if isinstance(a, Tensor) else a for a in args)).cpu()


Kernels = Interpreted | OnGpu


def near(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """Frobenius, relative: the rounding of results is the largest error by far."""
    bar = {torch.float16: 6e-4, torch.bfloat16: 5e-3, torch.float32: 2e-6}[dtype]
    error = float((got.double() - want).norm() / want.norm().clamp(min=1e-30))
    assert error <= bar, error
