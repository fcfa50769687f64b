"""`linear` on CUDA against fp64: interpreted (tests/ptxsim) where there is nvcc, and on a GPU where there is one. The
same cases for both."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mpqkern import PackedLinear, Scheme, ops, packed, plain
from mpqkern.scheme import padded

from . import ptxsim
from .reference import fragments
from .test_cuda import ROOT, needs_built, needs_gpu, random_grid, read_only, weight
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

    def int8(
        self, case: Case, x: Tensor, columns: int, splits: int = 1, act_scale: Tensor | None = None, bias: bool = True
    ) -> Tensor:
        return self.linear(case, x, bias, 8, act_scale)

    def linear(self, case: Case, x: Tensor, bias: bool, *act: object) -> Tensor:
        args = (x, *case.packed(), case.bias if bias else None, case.bits, case.group, *act)
        return torch.ops.mpqkern.linear(*(a.cuda() if isinstance(a, Tensor) else a for a in args)).cpu()


Kernels = Interpreted | OnGpu


@pytest.fixture(scope="module")
def library() -> ptxsim.Library:
    path = ptxsim.build()
    if path is None:
        pytest.skip("no nvcc on PATH to compile the kernels with")
    return ptxsim.Library(path)


@pytest.fixture(params=["interpreted", pytest.param("gpu", marks=needs_gpu)])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return OnGpu() if request.param == "gpu" else Interpreted(request.getfixturevalue("library"))


@pytest.fixture
def interpreted(library: ptxsim.Library) -> Interpreted:
    return Interpreted(library)


def near(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """Frobenius, relative: the rounding of results is the largest error by far."""
    bar = {torch.float16: 6e-4, torch.bfloat16: 5e-3, torch.float32: 2e-6}[dtype]
    error = float((got.double() - want).norm() / want.norm().clamp(min=1e-30))
    assert error <= bar, error


# ---- the layout

LAYOUTS = ((1, 1), (16, 128), (17, 33), (45, 160))


@pytest.mark.parametrize("bits", BITS)
def test_fragments(kernels: Kernels, bits: int) -> None:
    for n, k in LAYOUTS:
        codes = codes_for(n, k, bits, n + k)
        q, want = packed.pack(codes, bits), fragments.of_codes(codes.numpy(), bits).ravel()
        assert np.array_equal(kernels.to_fragments(q, bits).numpy(), want), (n, k)
        assert np.array_equal(plain.fragments(q, bits, k).numpy(), want), (n, k)


@pytest.mark.parametrize("bits", BITS)
def test_fragments_and_back(interpreted: Interpreted, bits: int) -> None:
    for n, k in LAYOUTS:
        q = packed.pack(codes_for(n, k, bits, n + k), bits)
        assert torch.equal(interpreted.from_fragments(interpreted.to_fragments(q, bits), n, padded(k), bits), q), (n, k)


# ---- few tokens


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bits", BITS)
def test_few(kernels: Kernels, bits: int, dtype: torch.dtype) -> None:
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
def test_many(kernels: Kernels, bits: int, dtype: torch.dtype) -> None:
    for i, (m, n, k, group, columns, splits) in enumerate(MANY):
        case = Case(n, k, bits, group, ZEROS[i % 3], torch.float32 if i % 2 else torch.float16)
        x = torch.randn(m, k).to(dtype)
        near(kernels.many(case, x, columns, splits), case.exact(x), dtype)


# ---- 8-bit activations


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("bits", BITS)
def test_int8(kernels: Kernels, bits: int, dtype: torch.dtype) -> None:
    for i, (m, n, k, group, columns, splits) in enumerate(MANY):
        case = Case(n, k, bits, group, ZEROS[i % 3], torch.float32 if i % 2 else torch.float16)
        x = torch.randn(m, k).to(dtype)
        groups = case.scales.shape[1]
        fixed = [None, torch.tensor([0.02]), torch.rand(groups) * 0.02 + 0.01][i % 3]
        near(kernels.int8(case, x, columns, splits, fixed), case.rounded(x, fixed), dtype)


def test_integer_products_are_exact(kernels: Kernels) -> None:
    """Whole numbers come out whole: no activation passes through a float that could round it."""
    for bits in BITS:
        case = Case(33, 300, bits, 96, "one", torch.float32)
        case.scales.fill_(1)
        case.zeros = torch.tensor([1.0])
        x = torch.randint(-127, 128, (9, 300)).float()
        got = kernels.int8(case, x, 32, 2, torch.ones(1), bias=False)
        assert torch.equal(got, (x.long() @ (case.codes.long() - 1).T).float()), bits


@pytest.mark.slow
def test_integer_sums_longer_than_int32_holds(kernels: Kernels) -> None:
    k = 2**16 + 2**12
    case = Case(1, k, 8, 0, "one", torch.float32)
    case.codes = torch.full((1, k), 255, dtype=torch.uint8)
    case.q, case.scales, case.zeros = packed.pack(case.codes, 8), torch.ones(1, 1), torch.zeros(1)
    got = kernels.int8(case, torch.full((1, k), 127.0), 32, 1, torch.ones(1), bias=False)
    assert float(got) == np.float32(255 * 127 * k)


def test_rounded_activations(interpreted: Interpreted) -> None:
    """The very integers and scales that every other path rounds to, in the order that the fragments want."""
    case = Case(1, 200, 4, 96, "mid")
    x = torch.randn(5, 200)
    x[1] = 0
    x[2, 100] = torch.inf
    q, sums = interpreted.round_rows(case, x, None)
    want, scales = plain.quantize_activations(x, 96)
    place = [16 * (k // 8 % 2) + 4 * (k // 2 % 4) + 2 * (k % 2) + k // 16 % 2 for k in range(32)]
    got = q.view(5, -1, 32)[:, :, place].flatten(1)
    assert torch.equal(got[:, :200].float(), want) and not got[:, 200:].any()
    units = F.pad(want, (0, 24)).view(5, 7, 32).sum(2).T
    assert torch.equal(sums[0, :7, :5], units) and not sums[0, 7:].any() and not sums[:, :, 5:].any()
    torch.testing.assert_close(sums[1, :7, :5], scales[:, [0, 0, 0, 1, 1, 1, 2]].T, rtol=0, atol=0, equal_nan=True)


# ---- hard numbers


@pytest.mark.parametrize("dtype", HALVES)
def test_hard_activations_and_grids(kernels: Kernels, dtype: torch.dtype) -> None:
    """Zeros at both ends, scales that span 2^12, activations that are shifted, one-sided, huge in one place, tiny."""
    m, n, k, group = 8, 18, 128, 64
    for bits in BITS:
        case = Case(n, k, bits, group, "each")
        case.zeros[:, 0], case.zeros[:, 1] = 0, 2**bits - 1
        case.scales[:] = (2.0 ** torch.linspace(-12, 0, n)).view(n, 1).half()
        x = torch.randn(m, k)
        x[1] += 10
        x[2] = x[2].relu()
        x[3, 5] *= 100
        x[4] *= 2.0**-20
        x[5] = 1
        x = x.to(dtype)
        for got in (kernels.few(case, x), kernels.many(case, x, 32)):
            near(got, case.exact(x), dtype)
            for row in (1, 2, 3, 5):
                near(got[row], case.exact(x)[row], dtype)


def test_a_number_that_is_none_stays_in_its_row(kernels: Kernels) -> None:
    case = Case(20, 96, 4, 32, "each")
    x = torch.randn(6, 96).half()
    x[2, 40] = torch.inf
    others = [0, 1, 3, 4, 5]
    for got in (kernels.few(case, x), kernels.many(case, x, 32), kernels.int8(case, x, 32)):
        assert not got[2].isfinite().any() and got[others].isfinite().all()
    near(kernels.few(case, x)[others], case.exact(x)[others], torch.float16)


@pytest.mark.parametrize("bits", BITS)
def test_sums_before_they_are_rounded(interpreted: Interpreted, bits: int) -> None:
    """The parts of a split, which are fp32: nothing but fp32 sums lies between them and the exact product."""
    case = Case(16, 512, bits, 64, "each")
    x = torch.randn(8, 512).half()
    for call in (lambda: interpreted.few(case, x, 2, bias=False), lambda: interpreted.many(case, x, 32, 2, bias=False)):
        call()
        near(torch.from_numpy(interpreted.partial).double().sum(0), case.exact(x, bias=False), torch.float32)


# ---- what the interpreter counts


@pytest.mark.parametrize("bits", BITS)
def test_wide_loads_without_conflicts(interpreted: Interpreted, bits: int) -> None:
    case = Case(128, 256, bits, 128, "mid")
    interpreted.few(case, torch.randn(8, 256).half())
    few = interpreted.cost
    interpreted.many(case, torch.randn(64, 256).half(), 64)
    many = interpreted.cost
    interpreted.int8(case, torch.randn(64, 256), 64)
    for cost, op in ((few, "ld.shared.v4"), (many, "ldmatrix"), (many, "ld.shared.v4"), (interpreted.cost, "ldmatrix")):
        banks = [total for (_, name), total in cost.banks.items() if name.startswith(op)]
        assert banks and all(actual == ideal for actual, ideal in banks), (op, cost.banks)
    for cost, op in ((few, "ld.global.nc.L1::no_allocate.v4"), (many, "cp.async")):
        sectors = [total for (_, name), total in cost.sectors.items() if name.startswith(op)]
        assert sectors and all(actual == ideal for actual, ideal in sectors), (op, cost.sectors)


def test_arrays_too_short_are_errors(interpreted: Interpreted) -> None:
    """So every other test here also shows that nothing outside the arrays is read or written."""
    case = Case(17, 130, 4, 64, "each")
    x = torch.randn(3, 130).half()

    def call(**short: NDArray) -> None:
        task = interpreted.task(case, x, unwritten((3, 17), torch.float16), 1, 3, True)
        for name, value in short.items():
            setattr(task, name, value)
        interpreted.library.call("mpq_few", task, None)

    whole = interpreted.task(case, x, unwritten((3, 17), torch.float16), 1, 3, True)
    call()
    for name in ("x", "fragments", "bias", "y"):
        with pytest.raises(ptxsim.PtxError, match="out of bounds"):
            call(**{name: getattr(whole, name).reshape(-1)[:-1].copy()})


# ---- the choice of a kernel


@needs_built
def test_linear_plan() -> None:
    def plan(m: int, n: int = 4096, k: int = 4096, bits: int = 4, arch: int = 80, **how: object) -> ops.LinearPlan:
        return ops.linear_plan(arch, m, n, k, bits, **how)

    assert [plan(m).kernel for m in (0, 1, 16, 17, 2047, 2048)] == ["dense", "few", "few", "many", "many", "dense"]
    assert [plan(m, arch=90).kernel for m in (16, 17, 511, 512)] == ["few", "many", "many", "dense"]
    assert [plan(m).columns for m in (1, 8, 9, 16, 17, 32, 33, 64, 65)] == [8, 8, 16, 16, 32, 32, 64, 64, 128]
    assert plan(100, group_size=96).columns == 64  # groups that end inside a step
    assert plan(5, dtype=torch.float32).kernel == "dense"
    assert plan(5, dtype=torch.float32, act_bits=8).kernel == plan(5000, act_bits=8).kernel == "many_int8"
    assert plan(7, dtype=torch.bfloat16) == plan(7)
    assert plan(1).splits == 6 and plan(1, arch=90).splits == 8 and plan(1, n=1 << 20).splits == 1
    for m, n, k, bits in ((1, 64, 32, 2), (1, 1, 1, 8), (40, 50, 70, 4), (3, 4096, 100_000, 2)):
        assert 1 <= plan(m, n, k, bits).splits <= 16
    with pytest.raises(RuntimeError, match="arch=75; wanted 80 or more"):
        plan(1, arch=75)


@needs_built
def test_the_op_checks_its_arguments() -> None:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    case = Case(4, 64, 4, 0, "mid")
    args = (torch.randn(2, 64), *case.packed(), None, 4, 0)
    with pytest.raises(RuntimeError, match="x is on cpu; wanted cuda"):
        torch.ops.mpqkern.linear.default.redispatch(keys, *args, None, None)
    with pytest.raises(RuntimeError, match="act_bits=4; wanted None or 8"):
        torch.ops.mpqkern.linear.default.redispatch(keys, *args, 4, None)


# ---- modules


def test_linear_fragments_is_linear_where_there_is_no_use_for_them() -> None:
    case = Case(20, 70, 4, 32, "each")
    x = torch.randn(3, 70, requires_grad=True)
    args = (*case.packed(), case.bias, 4, 32, None, None)
    f = torch.ops.mpqkern.fragments(case.q, 4, 70)
    want = torch.ops.mpqkern.linear(x, *args)
    got = torch.ops.mpqkern.linear_fragments(x, *args, f)
    assert torch.equal(got, want)
    slope = torch.randn(3, 20)
    assert torch.equal(*(torch.autograd.grad(y, x, slope)[0] for y in (got, want)))


def test_modules_keep_fragments_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they do on a GPU."""
    monkeypatch.setattr(PackedLinear, "takes_fragments", property(lambda self: True))
    layer = PackedLinear.from_float(torch.nn.Linear(70, 20), Scheme(4, group_size=32))

    def current() -> bool:
        return torch.equal(layer.fragments, plain.fragments(layer.qweight, 4, 70))

    assert (
        current() and "fragments" not in layer.state_dict() and torch.equal(layer(torch.eye(70)), layer(torch.eye(70)))
    )
    other = PackedLinear.from_float(torch.nn.Linear(70, 20), Scheme(4, group_size=32))
    before = layer.fragments
    layer.load_state_dict(other.state_dict())
    assert current() and not torch.equal(layer.fragments, before)
    layer.half()
    assert current()
    layer.pack_(torch.randn(20, 70))
    assert current()
    monkeypatch.undo()
    layer.float()
    assert layer.fragments is None


@needs_gpu
@pytest.mark.parametrize("dtype", HALVES)
def test_modules_on_a_gpu(dtype: torch.dtype) -> None:
    layer = PackedLinear.from_float(torch.nn.Linear(256, 96), Scheme(4, group_size=64)).to(dtype)
    x = torch.randn(5, 256).to(dtype)
    want = layer.to_float().double()(x.double())
    on_gpu = layer.cuda()
    assert on_gpu.fragments is not None
    near(on_gpu(x.cuda()).cpu(), want, dtype)
    assert on_gpu.cpu().fragments is None


# ---- what nvcc makes of it


def test_matrix_instructions_and_wide_loads(library: ptxsim.Library) -> None:
    expected = {"few_kernel": "ld.global.nc.L1::no_allocate.v4.u32", "many_kernel": "cp.async.cg.shared.global"}
    seen = 0
    for name, kernel in library.kernels.items():
        family = next((f for f in expected if f in name), None)
        used = {x.op for x in kernel.code}
        assert not any(".local" in op for op in used), name
        if family is None:
            continue
        kind = "s32.u8.s8" if "Int8" in name else "f32.bf16.bf16" if "bfloat16" in name else "f32.f16.f16"
        assert any(op.startswith("mma.sync") and kind in op for op in used), name
        assert expected[family] in used and not any(op.startswith(("atom", "red.")) for op in used), name
        seen += 1
    assert seen == 65  # few: 8 + 8 + 4, many: 5 each of 9


SOURCES = sorted(p.name for p in (ROOT / "csrc" / "cuda").glob("*.cu"))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc on PATH")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("source", SOURCES)
def test_registers_suffice(source: str, arch: str, tmp_path: Path) -> None:
    """No kernel keeps anything in local memory: no spills, no arrays, no stack."""
    command = ["nvcc", f"-arch={arch}", "-std=c++17", "-O3", "-Xptxas=-v", "-cubin", "-o", tmp_path / "out.cubin"]
    done = subprocess.run([*command, ROOT / "csrc" / "cuda" / source], capture_output=True, text=True, check=True)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert all(frame == ("0", "0", "0") for frame in frames), done.stderr
    assert frames or source == "linear.cu"  # which holds no kernel
