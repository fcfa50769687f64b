"""quantize and probe_errors on CUDA: interpreted (tests/ptxsim) where there is nvcc, and on a GPU where there is one.
The same cases for both."""

from __future__ import annotations

import ctypes as c
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from mpqkern import ops, plain
from mpqkern.scheme import padded

from . import ptxsim
from .test_cuda import needs_built, needs_gpu, read_only
from .test_packed import BITS

WIDTHS = [1, 2, 3, 4, 5, 6, 7, 8]
FRACTIONS = torch.tensor([1.0, 0.55, 0.2])


class Numbers:
    """Numbers in the host's memory, as an argument of launchers."""

    def __init__(self, numbers: list[int]) -> None:
        self.numbers = numbers

    def place(self, memory: ptxsim.Global) -> c.Array:
        return (c.c_int64 * len(self.numbers))(*self.numbers)


class Interpreted:
    """The launchers, on arrays of exactly the sizes that they may touch."""

    def __init__(self, library: ptxsim.Library) -> None:
        self.library = library

    def quantize(
        self, w: Tensor, bits: int, group: int, symmetric: bool, search: str = "minmax", dtype: str = "float16"
    ) -> tuple[Tensor, ...]:
        (n, k), type = w.shape, getattr(torch, dtype)
        groups, bad = -(-padded(k) // group) if group else 1, np.array([n])
        q, errors = unwritten((n, padded(k) * bits // 8), torch.uint8), unwritten((n, groups), torch.float32)
        scales, zeros = unwritten((n, groups), type), unwritten((1,) if symmetric else (n, groups), type)
        how = (bits, symmetric, search == "mse", dtype == "float16")
        out = (q, scales, zeros, errors)
        arrays = [t.numpy() for t in out]
        self.library.call("mpq_quantize", read_only(w), n, k, group or padded(k), *how, *arrays, bad, None)
        check(bad[0], n)
        return out

    def probe_errors(
        self, w: Tensor, bits: list[int], group: int, symmetric: bool, fractions: Tensor, dtype: str = "float16"
    ) -> Tensor:
        (n, k), count = w.shape, len(fractions)
        groups, bad = -(-padded(k) // group) if group else 1, np.array([n])
        out = unwritten((len(bits), n, groups, count), torch.float32)
        tried = (Numbers(bits), len(bits), read_only(fractions), count, symmetric, dtype == "float16")
        self.library.call("mpq_probe_errors", read_only(w), n, k, group or padded(k), *tried, out.numpy(), bad, None)
        check(bad[0], n)
        return out


class OnGpu:
    """The ops, on CUDA tensors."""

    def __getattr__(self, op: str) -> Callable[..., Tensor]:
        def call(*args: object) -> Tensor:
            moved = torch.utils._pytree.tree_map_only(Tensor, Tensor.cuda, args)
            return torch.utils._pytree.tree_map_only(Tensor, Tensor.cpu, getattr(torch.ops.mpqkern, op)(*moved))

        return call


def unwritten(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.full((math.prod(shape) * dtype.itemsize,), 0xA5, dtype=torch.uint8).view(dtype).reshape(shape)


def check(bad: int, n: int) -> None:
    if bad < n:
        raise RuntimeError(f"row {bad} of weight is not finite")


@pytest.fixture(params=["interpreted", pytest.param("gpu", marks=needs_gpu)])
def cuda(request: pytest.FixtureRequest) -> Iterator[Interpreted | OnGpu]:
    yield OnGpu() if request.param == "gpu" else Interpreted(request.getfixturevalue("library"))


@pytest.fixture
def cpu() -> Iterator[object]:
    """The ops of the CPU: the scalar kernels, which are there on every processor, or plain PyTorch."""
    if ops.why_plain is not None:
        pytest.skip(f"no compiled kernels: {ops.why_plain}")
    ops.isa("scalar")
    yield torch.ops.mpqkern
    ops.isa("best")


def assert_equal(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for name, a, b in zip(("codes", "scales", "zeros", "errors"), got, want, strict=True):
        assert torch.equal(a, b), f"{name}: {(a != b).sum()} of {a.numel()} differ"


# ---- quantize: codes, grids and errors to the bit


# a word of codes, a block of 32, a warp's span of 256, two warps, and more spans than warps
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_minmax(cuda: Interpreted | OnGpu, cpu: object, bits: int, symmetric: bool) -> None:
    for n, k, group in ((3, 1, 0), (2, 33, 32), (2, 150, 64), (1, 300, 0), (1, 9 * 256 + 5, 0)):
        w = torch.randn(n, k) * torch.logspace(-3, 3, n).unsqueeze(1)
        for dtype in ("float16", "float32"):
            args = (w, bits, group, symmetric, "minmax", dtype)
            assert_equal(cuda.quantize(*args), cpu.quantize(*args))


@pytest.mark.parametrize("bits,symmetric", [(2, True), (4, False), (8, True)])
def test_mse(cuda: Interpreted | OnGpu, cpu: object, bits: int, symmetric: bool) -> None:
    w = torch.randn(2, 290)
    w[:, 7] *= 5  # an outlier, worth clipping at few bits
    for group in (0, 256):
        got, want = (x.quantize(w, bits, group, symmetric, "mse") for x in (cuda, cpu))
        assert_equal(got, want)
    if bits == 2:
        assert not torch.equal(got[1], cpu.quantize(w, bits, group, symmetric)[1])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_weights_next_to_half_a_code(cuda: Interpreted | OnGpu, cpu: object, bits: int, symmetric: bool) -> None:
    """A product with 1 / scale would put some of them on the other side."""
    w = torch.rand(4, 300) * 2 - 1
    w[:, 0], w[:, 1] = torch.rand(4) + 1, -torch.rand(4) - 1  # they set the range
    _, scale, zero, _ = plain.quantize(w, bits, 0, symmetric, "minmax", "float32")
    half = torch.randint(0, 2**bits - 1, (4, 298)) + 0.5
    w[:, 2:] = (half.double() - zero.double().view(-1, 1)).mul(scale.double()).float().clamp(-1, 1)
    args = (bits, 0, symmetric, "minmax", "float32")
    assert_equal(cuda.quantize(w, *args), cpu.quantize(w, *args))


def test_special_rows(cuda: Interpreted | OnGpu, cpu: object) -> None:
    w = torch.zeros(5, 40)
    w[1], w[2] = 3.0, -2.0
    w[3, 5] = 1e-30  # below what fp16 can scale
    w[4] = torch.arange(40) * 2.0**-24  # a scale below fp16's normal numbers
    for symmetric in (True, False):
        for dtype in ("float16", "float32"):
            args = (w, 4, 32, symmetric, "minmax", dtype)
            assert_equal(cuda.quantize(*args), cpu.quantize(*args))
    equal = torch.tensor([[5.0, 1.0, 3.0, 1.0]]) * 2.0**-24  # as far off with scales of 1 and 2 units: the first wins
    args = (equal, 2, 32, False, "mse")
    assert cuda.quantize(*args)[1] == 2 * 2.0**-24
    assert_equal(cuda.quantize(*args), cpu.quantize(*args))
    tiny = torch.randn(1, 32) * 2.0**-110  # no product with 1 / scale
    args = (tiny, 4, 32, False, "minmax", "float32")
    assert_equal(cuda.quantize(*args), cpu.quantize(*args))


def test_blocks_take_groups_in_turn(library: ptxsim.Library, cpu: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "most_blocks", 1)
    w = torch.randn(2, 300)  # a span for each of two warps
    args = (w, 4, 0, False, "mse")
    assert_equal(Interpreted(library).quantize(*args), cpu.quantize(*args))
    args = (w, [2, 3], 0, True, torch.linspace(0.1, 1, 40))
    assert torch.equal(Interpreted(library).probe_errors(*args), cpu.probe_errors(*args))
    w[0, 3] = torch.nan
    with pytest.raises(RuntimeError, match="row 0"):
        Interpreted(library).probe_errors(w, [2], 0, True, FRACTIONS)


@pytest.mark.parametrize("value,place", [(torch.nan, 3), (torch.inf, 39), (-torch.inf, 33)])
def test_weights_that_are_not_finite(cuda: Interpreted | OnGpu, value: float, place: int) -> None:
    w = torch.randn(5, 40)
    w[3, place] = value
    w[4, 0] = torch.inf
    with pytest.raises(RuntimeError, match="row 3 of weight is not finite"):
        cuda.quantize(w, 4, 32, True)
    with pytest.raises(RuntimeError, match="row 3 of weight is not finite"):
        cuda.probe_errors(w, [4], 32, True, FRACTIONS)


def test_scales_too_large_for_fp16(cuda: Interpreted | OnGpu) -> None:
    w = torch.randn(3, 40)
    w[1, 38] = 1e5
    assert cuda.probe_errors(w, [8], 0, True, FRACTIONS).isfinite().all()  # a scale of 784 fits
    with pytest.raises(RuntimeError, match="row 1"):
        cuda.probe_errors(w, [8, 1], 0, True, FRACTIONS)  # one of 200000 does not
    with pytest.raises(RuntimeError, match="row 1"):
        cuda.quantize(w * 100, 4, 32, True)
    assert cuda.quantize(w * 100, 4, 32, True, "minmax", "float32")[3].isfinite().all()


def test_no_rows(cuda: Interpreted | OnGpu, cpu: object) -> None:
    for symmetric in (True, False):
        assert_equal(*(x.quantize(torch.empty(0, 40), 4, 32, symmetric) for x in (cuda, cpu)))
    assert cuda.probe_errors(torch.empty(0, 40), [2, 8], 32, True, FRACTIONS).shape == (2, 0, 2, 3)
    assert cuda.probe_errors(torch.ones(1, 40), [], 0, True, FRACTIONS).shape == (0, 1, 1, 3)
    assert cuda.probe_errors(torch.ones(1, 40), [2], 0, True, FRACTIONS[:0]).shape == (1, 1, 1, 0)


# ---- probe_errors: to the bit


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("n,k,group", [(2, 7, 0), (2, 33, 32), (1, 300, 0), (1, 9 * 256 + 5, 0)])
def test_errors(cuda: Interpreted | OnGpu, cpu: object, n: int, k: int, group: int, symmetric: bool) -> None:
    w = torch.randn(n, k) * torch.logspace(-3, 3, n).unsqueeze(1)
    for dtype in ("float16", "float32"):
        args = (w, WIDTHS[k % 2 :: 2], group, symmetric, FRACTIONS, dtype)
        assert torch.equal(cuda.probe_errors(*args), cpu.probe_errors(*args))


def test_more_grids_and_widths_than_a_block_and_a_launch_take(cuda: Interpreted | OnGpu, cpu: object) -> None:
    w = torch.randn(1, 40)
    for widths, count in ((WIDTHS * 2 + [3, 5], 2), ([4, 2], 70)):
        args = (w, widths, 32, False, torch.linspace(0.1, 1, count))
        assert torch.equal(cuda.probe_errors(*args), cpu.probe_errors(*args))


# ---- bindings


@needs_built
@pytest.mark.parametrize(
    "op,args,error",
    [
        ("quantize", (torch.ones(2, 5), 3, 0, True), "bits=3; wanted 2, 4 or 8"),
        ("quantize", (torch.ones(2, 5), 4, 0, True, "best"), "search='best'; wanted 'minmax' or 'mse'"),
        ("quantize", (torch.ones(2, 5), 4, 33, True), "group_size=33; wanted a multiple of 32"),
        ("quantize", (torch.ones(2, 5), 4, 0, True), "weight is on cpu; wanted cuda"),
        ("probe_errors", (torch.ones(2, 5), [9], 0, True, FRACTIONS), r"bits holds 9; wanted 1\.\.8"),
        ("probe_errors", (torch.ones(2, 5), [4], 0, True, FRACTIONS), "weight is on cpu; wanted cuda"),
        ("gram", ([torch.ones(1025, 1)],), r"wanted 1\.\.1024 samples"),
        ("gram", ([torch.ones(3, 1)],), r"features\[0\] is on cpu; wanted cuda"),
        ("orthogonality", ([torch.ones(3, 5)], True, True), "wanted at least 4 with debiased=True"),
        ("orthogonality", ([torch.ones(3, 5)],), r"features\[0\] is on cpu; wanted cuda"),
    ],
)
def test_the_ops_check_their_arguments(op: str, args: tuple[object, ...], error: str) -> None:
    """The CUDA kernels of the ops, reached past the dispatcher."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises(RuntimeError, match=f"mpqkern::{op}: .*{error}"):
        getattr(torch.ops.mpqkern, op).default.redispatch(keys, *args)
