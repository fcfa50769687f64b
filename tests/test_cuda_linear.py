"""`linear` on CUDA against fp64: interpreted (tests/ptxsim) where there is nvcc, and on a GPU where there is one. The
same cases for both."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpqkern import packed, plain
from mpqkern.scheme import padded

from . import ptxsim
from .reference import fragments
from .test_cuda import random_grid, read_only, weight
from .test_packed import BITS, codes_for

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
            x.shape[0],
            KINDS[y.dtype],
            x.shape[1],
            array(case.bias) if bias else None,
            partial=writable(unwritten((splits, *y.shape), torch.float32)) if splits > 1 else None,
            splits=splits,
            per_split=per_split,
        )

    def run(self, task: ptxsim.Task, *call: object) -> None:
        self.library.call(str(call[0]), task, *call[1:], None)
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


@pytest.fixture(scope="module")
def library() -> ptxsim.Library:
    path = ptxsim.build()
    if path is None:
        pytest.skip("no nvcc on PATH to compile the kernels with")
    return ptxsim.Library(path)


@pytest.fixture
def kernels(library: ptxsim.Library) -> Interpreted:
    return Interpreted(library)


def near(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """Frobenius, relative: the rounding of results is the largest error by far."""
    bar = {torch.float16: 6e-4, torch.bfloat16: 5e-3, torch.float32: 2e-6}[dtype]
    error = float((got.double() - want).norm() / want.norm().clamp(min=1e-30))
    assert error <= bar, error


# ---- the layout


@pytest.mark.parametrize("bits", BITS)
def test_fragments(kernels: Interpreted, bits: int) -> None:
    for n, k in ((1, 1), (16, 128), (17, 33), (45, 160)):
        codes = codes_for(n, k, bits, n + k)
        q = packed.pack(codes, bits)
        got = kernels.to_fragments(q, bits)
        assert np.array_equal(got.numpy(), fragments.of_codes(codes.numpy(), bits).ravel()), (n, k)
        assert torch.equal(kernels.from_fragments(got, n, padded(k), bits), q), (n, k)


# ---- few tokens


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bits", BITS)
def test_few(kernels: Interpreted, bits: int, dtype: torch.dtype) -> None:
    shapes = [(1, 1, 1, 0), (3, 40, 96, 32), (8, 17, 130, 64), (9, 16, 256, 96), (16, 33, 300, 128), (5, 130, 72, 0)]
    for i, (m, n, k, group) in enumerate(shapes):
        case = Case(n, k, bits, group, ZEROS[i % 3], torch.float32 if i % 2 else torch.float16)
        x = torch.randn(m, k).to(dtype)
        near(kernels.few(case, x), case.exact(x), dtype)


# ---- any number of tokens

# m, n, k, group, columns, splits: around tiles of 128 rows, 32 to 128 tokens, steps of 64 and 128 codes
MANY = [
    (1, 1, 1, 0, 32, 1),
    (17, 40, 96, 32, 32, 1),
    (33, 129, 130, 64, 64, 2),
    (5, 16, 264, 96, 64, 2),
    (66, 33, 256, 128, 128, 1),
    (40, 130, 200, 0, 128, 3),
]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bits", BITS)
def test_many(kernels: Interpreted, bits: int, dtype: torch.dtype) -> None:
    for i, (m, n, k, group, columns, splits) in enumerate(MANY):
        case = Case(n, k, bits, group, ZEROS[i % 3], torch.float32 if i % 2 else torch.float16)
        x = torch.randn(m, k).to(dtype)
        near(kernels.many(case, x, columns, splits), case.exact(x), dtype)


# ---- 8-bit activations


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("bits", BITS)
def test_int8(kernels: Interpreted, bits: int, dtype: torch.dtype) -> None:
    for i, (m, n, k, group, columns, splits) in enumerate(MANY):
        case = Case(n, k, bits, group, ZEROS[i % 3], torch.float32 if i % 2 else torch.float16)
        x = torch.randn(m, k).to(dtype)
        groups = case.scales.shape[1]
        fixed = [None, torch.tensor([0.02]), torch.rand(groups) * 0.02 + 0.01][i % 3]
        near(kernels.int8(case, x, columns, splits, fixed), case.rounded(x, fixed), dtype)
