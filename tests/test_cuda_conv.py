"""conv2d on CUDA: interpreted (tests/ptxsim) where there is nvcc, and on a GPU where there is one. The same cases for
both."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mpqkern import packed, plain

from . import ptxsim, reference
from .test_conv import CASES, images
from .test_cuda import needs_built, needs_gpu, random_grid, read_only, weight
from .test_cuda_analysis import OnGpu, unwritten
from .test_cuda_gram import TYPES
from .test_packed import BITS, codes_for

DEPTHWISE = [
    *[case for case in CASES if case[0] == case[2] > 1],
    (35, 35, 35, (3, 3), (1, 1), (1, 1), (1, 1), 5, 9),  # more than a strip of channels
    (3, 3, 3, (3, 3), (2, 2), (1, 1), (1, 1), 33, 65),  # more than a block of pixels
    (2, 2, 2, (7, 11), (1, 2), (3, 5), (1, 1), 9, 12),  # more taps than are held
]
DENSE = [case for case in CASES if not case[0] == case[2] > 1 and case[8] < 40]


class Case:
    """A packed weight and a bias, and what a convolution with them must make of images."""

    def __init__(self, case: tuple, bits: int, group: int, zeros: str = "each", dtype: torch.dtype = torch.float16):
        cin, n, self.groups, self.kernel, *how, _, _ = case
        self.stride, self.padding, self.dilation = how
        self.shape, self.bits, self.group = (n, cin // self.groups, *self.kernel), bits, group
        self.k = k = self.shape[1] * self.kernel[0] * self.kernel[1]
        self.scales, self.zeros = random_grid(n, k, group, zeros, dtype)
        self.q, self.bias = packed.pack(codes_for(n, k, bits, n + k), bits), torch.randn(n)
        self.how = {"stride": how[0], "padding": how[1], "dilation": how[2], "groups": self.groups}

        self.refresh()

    def refresh(self) -> None:
        """After a change of codes, scales or zeros."""
        rows = packed.dequantize(self.q, self.scales, self.zeros, self.bits, self.group, self.k)
        self.w = packed.weight_from_rows(rows, self.shape)

    def sizes(self) -> tuple:
        return self.kernel, self.stride, self.padding, self.dilation, self.groups

    def check(self, got: Tensor, x: Tensor, extra: float = 2) -> None:
        """Sums in fp32, and `extra` roundings a product: two make a weight."""
        want = reference.conv(x, self.w, self.bias, **self.how)
        size = reference.conv(x.abs(), self.w.abs(), None if self.bias is None else self.bias.abs(), **self.how)
        reference.assert_within(got, want, (6 * self.k**0.5 + extra) * reference.U * size, got.dtype)


def memory(t: Tensor) -> Tensor:
    """From a tensor's first element to its last."""
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    flat = t.as_strided((last + 1 if t.numel() else 0,), (1,))
    return flat.view(torch.int16) if t.dtype == torch.bfloat16 else flat


class Interpreted:
    """The launchers, on arrays of exactly the sizes that they may touch."""

    def __init__(self, library: ptxsim.Library) -> None:
        self.library = library

    def conv2d(self, launcher: str, case: Case, x: Tensor) -> Tensor:
        form = torch.channels_last if plain.is_channels_last(x) else torch.contiguous_format
        return self.launch(launcher, case, x, form, x.dtype)

    def launch(
        self,
        launcher: str,
        case: Case,
        x: Tensor,
        form: torch.memory_format,
        dtype: torch.dtype,
        act_scales: Tensor | None = None,
    ) -> Tensor:
        """y of a type and an order of its own."""
        shape = torch.nn.functional.conv2d(x.float(), case.w, None, **case.how).shape
        flat = unwritten((shape.numel(),), dtype)
        y = flat.as_strided(shape, torch.empty(shape).contiguous(memory_format=form).stride())
        task = ptxsim.Conv(
            weight(case.q, case.scales, case.zeros, case.bits, case.group, case.k),
            read_only(memory(x)),
            None if case.bias is None else read_only(case.bias),
            memory(y).numpy(),
            *(x.shape, y.shape, x.stride(), y.stride()),
            *case.sizes(),
            TYPES.index(dtype),
            None if act_scales is None else read_only(act_scales),
        )
        self.library.call(launcher, task, None)
        return y

    def depthwise(self, case: Case, x: Tensor) -> Tensor:
        return self.conv2d("mpq_conv_depthwise", case, x)

    def tiles(self, case: Case, x: Tensor) -> Tensor:
        return self.conv2d("mpq_conv_tiles", case, x)

    def halves(self, case: Case, x: Tensor) -> Tensor:
        return self.conv2d("mpq_conv_halves", case, x)


class OpsOnGpu:
    """The op, which chooses a kernel by itself."""

    def conv2d(self, case: Case, x: Tensor) -> Tensor:
        return OnGpu().conv2d(x, case.q, case.scales, case.zeros, case.bias, case.bits, case.group, *case.sizes())

    depthwise = tiles = halves = conv2d


@pytest.fixture(params=["interpreted", pytest.param("gpu", marks=needs_gpu)])
def cuda(request: pytest.FixtureRequest) -> Iterator[Interpreted | OpsOnGpu]:
    yield OpsOnGpu() if request.param == "gpu" else Interpreted(request.getfixturevalue("library"))


@pytest.fixture
def interpreted(library: ptxsim.Library) -> Interpreted:
    return Interpreted(library)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", DEPTHWISE)
def test_depthwise(cuda: Interpreted | OpsOnGpu, shape: tuple, bits: int) -> None:
    case = Case(shape, bits, 32 if bits == 4 else 0, ("mid", "one", "each")[bits // 4])
    for x in images(shape, 2):
        got = cuda.depthwise(case, x)
        case.check(got, x)
        assert plain.is_channels_last(got) == plain.is_channels_last(x)


@pytest.mark.parametrize("i,shape", list(enumerate(DENSE)))
def test_tiles(cuda: Interpreted | OpsOnGpu, i: int, shape: tuple) -> None:
    case = Case(shape, BITS[i % 3], (32, 64, 0)[i % 3], ("mid", "one", "each")[i % 3])
    for x in images(shape, 2 if shape[7] < 10 else 1):
        got = cuda.tiles(case, x)
        case.check(got, x)
        assert plain.is_channels_last(got) == plain.is_channels_last(x)


@pytest.mark.parametrize("bits", BITS)
def test_more_channels_and_groups_of_weights_than_a_tile_has(cuda: Interpreted | OpsOnGpu, bits: int) -> None:
    case = Case((72, 140, 2, (1, 1), (1, 1), (0, 0), (1, 1), 2, 3), bits, 32, "each", torch.float32)
    case.check(cuda.tiles(case, x := torch.randn(2, 72, 2, 3)), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_depthwise_of_halves(cuda: Interpreted | OpsOnGpu, dtype: torch.dtype) -> None:
    case = Case(DEPTHWISE[0], 4, 0)
    for x in images(DEPTHWISE[0], 1)[:2]:
        case.check(cuda.depthwise(case, x.to(dtype)), x.to(dtype))


@pytest.mark.parametrize("i,shape", list(enumerate(DENSE)))
def test_halves(cuda: Interpreted | OpsOnGpu, i: int, shape: tuple) -> None:
    """Weights are rounded to the type of activations."""
    dtype = TYPES[1 + i % 2]
    case = Case(shape, BITS[i % 3], (32, 64, 0)[i % 3], ("mid", "one", "each")[i % 3])
    for x in images(shape, 2 if shape[7] < 10 else 1):
        got = cuda.halves(case, x.to(dtype) if x.is_contiguous() else same_strides(x, dtype))
        case.check(got, x.to(dtype), torch.finfo(dtype).eps / 2 / reference.U)


def same_strides(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype) also where elements do not lie side by side."""
    out = torch.zeros(memory(x).shape, dtype=dtype).as_strided(x.shape, x.stride())
    return out.copy_(x)


def test_without_bias_and_without_images(cuda: Interpreted | OpsOnGpu) -> None:
    for shape, way, dtype in (
        (DEPTHWISE[0], cuda.depthwise, torch.float32),
        (DENSE[0], cuda.tiles, torch.float32),
        (DENSE[0], cuda.halves, torch.float16),
    ):
        case = Case(shape, 8, 0)
        case.bias = None
        assert not way(case, torch.empty(0, shape[0], 7, 7, dtype=dtype)).numel()
        x = torch.randn(1, shape[0], 3, 3).to(dtype)
        case.check(way(case, x), x, torch.finfo(dtype).eps / reference.U)


def test_blocks_take_tiles_in_turn(library: ptxsim.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "most_blocks", 2)
    cases = [(DEPTHWISE[-2], "mpq_conv_depthwise"), (DEPTHWISE[-3], "mpq_conv_depthwise"), (DENSE[8], "mpq_conv_tiles")]
    for shape, launcher in cases:
        case = Case(shape, 2, 32)
        for x in images(shape, 2)[:2]:
            case.check(Interpreted(library).conv2d(launcher, case, x), x)


def test_tiles_are_read_without_bank_conflicts(interpreted: Interpreted) -> None:
    case = Case(DENSE[0], 4, 0)
    for x in images(DENSE[0], 1)[:2]:
        for launcher, dtype, read in (
            ("mpq_conv_tiles", torch.float32, "ld.shared.v4.f32"),
            ("mpq_conv_halves", torch.float16, "ldmatrix.sync.aligned.m8n8.x4.shared.b16"),
        ):
            interpreted.conv2d(launcher, case, x.to(dtype))
            banks = interpreted.library.cost.banks
            reads = [total for (_, op), total in banks.items() if op == read]
            assert reads and all(actual == ideal for actual, ideal in reads), banks


# ---- bindings


@needs_built
def test_the_op_checks_its_arguments() -> None:
    """The CUDA kernel of the op, reached past the dispatcher."""
    keys, case = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), Case(DENSE[0], 4, 0)
    for x, sizes, act_bits, error in (
        (torch.randn(1, 3, 9, 10), case.sizes(), 4, "act_bits=4; wanted None or 8"),
        (torch.randn(3, 9, 10), case.sizes(), None, r"x is float32 \[3, 9, 10\]"),
        (torch.randn(1, 3, 9, 10), (*case.sizes()[:-1], 2), None, "groups=2; wanted a divisor of x's 3 channels"),
        (torch.randn(1, 3, 9, 10), case.sizes(), None, "x is on cpu; wanted cuda"),
    ):
        args = (x, case.q, case.scales, case.zeros, case.bias, case.bits, case.group, *sizes, act_bits)
        with pytest.raises(RuntimeError, match=f"mpqkern::conv2d: .*{error}"):
            torch.ops.mpqkern.conv2d.default.redispatch(keys, *args, None)


@needs_gpu
def test_large_images_on_a_gpu() -> None:
    """Where torch multiplies."""
    shape = (3, 8, 1, (3, 3), (1, 1), (1, 1), (1, 1), 40, 40)
    case = Case(shape, 4, 0)
    for x in images(shape, 2):
        half = x.to(torch.float16)
        got = OnGpu().conv2d(half, case.q, case.scales, case.zeros, case.bias, case.bits, case.group, *case.sizes())
        case.check(got, half, torch.finfo(torch.float16).eps / reference.U)
