"""conv2d with 8-bit activations on CUDA: sums of integers, and results as the CPU's, to the bit. Interpreted
(tests/ptxsim) where there is nvcc, and on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mpqkern import ops, packed, plain

from . import ptxsim, reference
from .test_conv import CASES, images
from .test_cuda import needs_gpu, read_only
from .test_cuda_analysis import OnGpu, unwritten
from .test_cuda_conv import DEPTHWISE, Case, memory, same_strides
from .test_cuda_conv import Interpreted as Launchers
from .test_cuda_gram import TYPES
from .test_packed import BITS

DENSE = [case for case in CASES if case not in DEPTHWISE and case[8] < 40]
# 16 channels at a time: one step, several, taps that begin inside a step, groups of channels
PIECES = [
    (16, 9, 1, (1, 1), (1, 1), (0, 0), (1, 1), 3, 5),
    (48, 70, 1, (3, 2), (2, 1), (1, 1), (1, 2), 6, 7),
    (64, 10, 2, (2, 2), (1, 2), (1, 0), (2, 1), 5, 6),
    (16, 4, 1, (3, 3), (1, 1), (4, 4), (1, 1), 1, 2),  # more padding than image
]
# three spans of 8 bits, in pieces and in bytes
DEEP = [(128, 5, 1, (3, 3), (1, 1), (1, 1), (1, 1), 2, 3), (123, 5, 1, (3, 3), (1, 1), (1, 1), (1, 1), 3, 2)]


def one_channel_each(case: Case, x: Tensor) -> bool:
    """Whether that has a kernel of its own."""
    return 1 < x.shape[1] == case.groups and case.scales.shape[1] == 1 and case.k <= 256


class Interpreted:
    """The launchers that the op calls one after the other."""

    def __init__(self, library: ptxsim.Library) -> None:
        self.library = library

    def rounded(self, x: Tensor, fixed: Tensor | None = None, last: bool = False) -> tuple[Tensor, Tensor]:
        """int8 in x's order or channels last, and scales."""
        form = torch.channels_last if last or plain.is_channels_last(x) else torch.contiguous_format
        batch, channels, pixels = *x.shape[:2], x[0, 0].numel() if len(x) else 0
        flat, scales = unwritten((x.numel(),), torch.int8), unwritten((batch,), torch.float32)
        most = torch.zeros(batch, dtype=torch.int32)
        given = (None if fixed is None else read_only(fixed), most.numpy(), flat.numpy(), scales.numpy())
        turn = last and not plain.is_channels_last(x)
        args = (read_only(memory(x)), TYPES.index(x.dtype), batch, channels, pixels, turn)
        self.library.call("mpq_round_images", *args, *given, None)
        return flat.as_strided(x.shape, torch.empty(x.shape).contiguous(memory_format=form).stride()), scales

    def conv2d(self, case: Case, x: Tensor, fixed: Tensor | None = None) -> Tensor:
        dense = x if plain.is_channels_last(x) else x.contiguous()
        depthwise = one_channel_each(case, x)
        q, scales = self.rounded(dense, fixed, last=not depthwise)
        form = torch.channels_last if plain.is_channels_last(x) else torch.contiguous_format
        launcher = "mpq_conv_depthwise" if depthwise else "mpq_conv_bytes"
        if not depthwise:  # whose steps no dimension of size 1 may hide
            channels, height, width = q.shape[1:]
            q = q.as_strided(q.shape, (height * width * channels, 1, width * channels, channels))
        return Launchers(self.library).launch(launcher, case, q, form, x.dtype, scales)


class OpsOnGpu:
    """The op, which chooses a kernel by itself."""

    def conv2d(self, case: Case, x: Tensor, fixed: Tensor | None = None) -> Tensor:
        args = (case.q, case.scales, case.zeros, case.bias, case.bits, case.group, *case.sizes(), 8, fixed)
        return OnGpu().conv2d(x, *args)


Kernels = Interpreted | OpsOnGpu


@pytest.fixture(params=["interpreted", pytest.param("gpu", marks=needs_gpu)])
def cuda(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    yield OpsOnGpu() if request.param == "gpu" else Interpreted(request.getfixturevalue("library"))


@pytest.fixture
def interpreted(library: ptxsim.Library) -> Interpreted:
    return Interpreted(library)


def check(case: Case, x: Tensor, got: Tensor, fixed: Tensor | None = None) -> None:
    """To the bit as on the CPU, where that has vectors, and where its depthwise sums need no fp64; and near the exact
    results in any case."""
    image = plain.rounded_images(x, fixed)
    want = reference.conv(image, case.w, case.bias, **case.how)
    size = reference.conv(image.abs(), case.w.abs(), None if case.bias is None else case.bias.abs(), **case.how)
    reference.assert_within(got, want, (case.scales.shape[1] + 6) * 8 * reference.U * size, got.dtype)
    assert plain.is_channels_last(got) == plain.is_channels_last(x) or got.numel() == len(got) * got.shape[1]
    halves = case.zeros is None or bool((2 * case.zeros == (2 * case.zeros).round()).all())
    if ops.isa().startswith("avx") and (halves or not one_channel_each(case, x)):
        args = (case.q, case.scales, case.zeros, case.bias, case.bits, case.group, *case.sizes(), 8, fixed)
        assert torch.equal(got, torch.ops.mpqkern.conv2d(x, *args))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("i,shape", list(enumerate(DENSE + PIECES)))
def test_bytes(cuda: Kernels, i: int, shape: tuple, bits: int) -> None:
    which = (i + bits // 4) % 3
    case = Case(shape, bits, (32, 96, 0)[which], ("mid", "one", "each")[which])
    for x in images(shape, 2)[i % 3 :: 2] if shape[7] < 10 else images(shape, 1)[:1]:
        check(case, x, cuda.conv2d(case, x))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("i,shape", list(enumerate(DEPTHWISE)))
def test_depthwise(cuda: Kernels, i: int, shape: tuple, bits: int) -> None:
    """Whole halves as zeros are summed without rounding on the CPU, others are not; several groups are no one span."""
    case = Case(shape, bits, 0, ("mid", "one")[i % 2])
    if case.zeros is not None:
        case.zeros = torch.tensor([2**bits - 0.5], dtype=case.scales.dtype)
    case.refresh()
    for x in images(shape, 2):
        check(case, x, cuda.conv2d(case, x))


@pytest.mark.parametrize("shape", [DEPTHWISE[-1], (5, 5, 5, (6, 6), (2, 2), (1, 1), (1, 1), 9, 8)])
def test_depthwise_in_several_spans(cuda: Kernels, shape: tuple) -> None:
    case = Case(shape, 4, 32, "each")
    for x in images(shape, 1)[:2]:
        check(case, x, cuda.conv2d(case, x))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [0, 32, 96, 1024])
@pytest.mark.parametrize("zero", ["lowest", "highest"])
def test_extremes(cuda: Kernels, bits: int, group: int, zero: str) -> None:
    """The largest codes and activations of one sign: sums at the bounds of their spans, exact."""
    top, shape = 2**bits - 1, DEEP[zero == "highest"]
    case = Case(shape, bits, group, "each")
    case.q = packed.pack(torch.full((shape[1], case.k), top, dtype=torch.uint8), bits)
    case.q[0] = 0
    case.scales.fill_(0.5)
    case.zeros.fill_(0 if zero == "lowest" else top)
    case.refresh()
    x = torch.full((2, shape[0], *shape[7:]), 3.0)
    x[1] = -x[1]
    check(case, x, cuda.conv2d(case, x))


@pytest.mark.parametrize("shape", DEEP)
def test_several_spans(cuda: Kernels, shape: tuple) -> None:
    case = Case(shape, 8, 0, "each")
    check(case, x := images(shape, 2)[1], cuda.conv2d(case, x))


def test_whole_numbers_are_exact(cuda: Kernels) -> None:
    """Scales of 1 leave nothing to round: integers in, integers out, the same ones as in plain PyTorch."""
    for shape, bits in ((PIECES[1], 8), (DENSE[0], 4), (PIECES[2], 2), (DEPTHWISE[0], 8)):
        case = Case(shape, bits, 0, "each", torch.float32)
        case.scales.fill_(1)
        case.zeros = torch.randint(0, 2**bits, case.zeros.shape).float()
        case.bias.round_()
        case.refresh()
        x, one = torch.randint(-127, 128, (2, shape[0], *shape[7:])).float(), torch.ones(1)
        want = torch.nn.functional.conv2d(x.double(), case.w.double(), case.bias.double(), **case.how)
        assert torch.equal(cuda.conv2d(case, x, one).double(), want)


@pytest.mark.parametrize("dtype", TYPES)
def test_types_and_fixed_scales(cuda: Kernels, dtype: torch.dtype) -> None:
    """Values beyond a fixed scale saturate."""
    for shape in (DENSE[0], PIECES[0], DEPTHWISE[0]):
        case = Case(shape, 4, 0)
        for x in images(shape, 2)[:2]:
            for fixed in (None, torch.tensor([0.01])):
                half = same_strides(x, dtype)
                check(case, half, cuda.conv2d(case, half, fixed), fixed)


def test_samples_that_are_not_finite_spoil_themselves_only(cuda: Kernels) -> None:
    for shape in (DENSE[0], PIECES[0], DEPTHWISE[0]):
        case = Case(shape, 8, 0)
        x = torch.randn(4, shape[0], 4, 5)
        x[1, 0, 0, 0], x[2, 1, 3, 4], x[3] = torch.nan, -torch.inf, 0
        got = cuda.conv2d(case, x)
        assert got[1:3].isnan().all()
        check(case, x[[0, 3]], got[[0, 3]])


def test_without_bias_and_without_images(cuda: Kernels) -> None:
    for shape in (DENSE[0], PIECES[0], DEPTHWISE[0]):
        case = Case(shape, 8, 0)
        case.bias = None
        assert not cuda.conv2d(case, torch.empty(0, shape[0], 7, 7)).numel()
        x = torch.randn(1, shape[0], 3, 3)
        check(case, x, cuda.conv2d(case, x))


# ---- what only the interpreter tells


@pytest.mark.parametrize("dtype", TYPES)
def test_rounded_activations(interpreted: Interpreted, dtype: torch.dtype) -> None:
    """To the bit, in both orders of memory."""
    x = torch.randn(5, 70, 9, 10).to(dtype)
    x[1] = 0
    x[2] *= 1000
    x[3, 0, 0, 0], x[4, 2, 8, 9] = torch.nan, -torch.inf
    for fixed in (None, torch.tensor([0.01])):
        q, scale = plain.quantize_activations(x.float().flatten(1), 0, scale=fixed)
        for image, last in ((x, False), (x, True), (x.contiguous(memory_format=torch.channels_last), True)):
            got, scales = interpreted.rounded(image, fixed, last)
            assert torch.equal(got.flatten(1), q.to(torch.int8).view(5, -1))
            torch.testing.assert_close(scales, scale[:, 0], rtol=0, atol=0, equal_nan=True)


def test_blocks_take_tiles_in_turn(library: ptxsim.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "most_blocks", 2)
    for shape in (PIECES[1], DENSE[4], DEPTHWISE[-2]):
        case = Case(shape, 2, 0)
        x = images(shape, 3)[0]
        check(case, x, Interpreted(library).conv2d(case, x))


@pytest.mark.parametrize("shape", [PIECES[1], DENSE[0]])
def test_shared_memory_is_read_and_written_without_bank_conflicts(interpreted: Interpreted, shape: tuple) -> None:
    for bits in BITS:
        case = Case(shape, bits, 0)
        interpreted.conv2d(case, images(shape, 1)[1])
        banks = interpreted.library.cost.banks
        wide = [total for (_, op), total in banks.items() if "ldmatrix" in op or op == "st.shared.v4.u32"]
        assert len(wide) >= 2 and all(actual == ideal for actual, ideal in wide), banks


def test_tensor_cores_multiply(library: ptxsim.Library) -> None:
    kernels = {name: kernel for name, kernel in library.kernels.items() if "conv_bytes" in name}
    assert len(kernels) == 6
    for name, kernel in kernels.items():
        used = {x.op for x in kernel.code}
        assert any(op.startswith("mma.sync") and "s32.u8.s8" in op for op in used), name
        assert ("cp.async.cg.shared.global" in used) == ("ByPieces" in name), name
        assert not any(".local" in op or op.startswith(("atom", "red.")) for op in used), name
