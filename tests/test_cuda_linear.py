"""`linear` on CUDA against fp64: interpreted (tests/ptxsim) where there is nvcc, and on a GPU where there is one. The
same cases for both."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from mpqkern import packed, plain
from mpqkern.scheme import padded

from . import ptxsim
from .cuda_linear import HALVES, ZEROS, Case, Interpreted, Kernels, OnGpu, near, unwritten
from .reference import fragments
from .test_cuda import needs_gpu
from .test_packed import BITS, codes_for


@pytest.fixture(params=["interpreted", pytest.param("gpu", marks=needs_gpu)])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return OnGpu() if request.param == "gpu" else Interpreted(request.getfixturevalue("library"))


@pytest.fixture
def interpreted(library: ptxsim.Library) -> Interpreted:
    return Interpreted(library)


# ---- the layout

LAYOUTS = ((1, 1), (16, 128), (17, 33), (45, 160))


@pytest.mark.parametrize("bits", BITS)
def test_fragments(kernels: Kernels, bits: int) -> None:
    for n, k in LAYOUTS:
        codes = codes_for(n, k, bits, n + k)
        q, want = packed.pack(codes, bits), fragments.of_codes(codes.numpy(), bits).ravel()
        assert np.array_equal(kernels.to_fragments(q, bits).numpy(), want), (n, k)


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


@pytest.mark.parametrize("bits", BITS)
def test_few_over_a_long_row(kernels: Kernels, bits: int) -> None:
    """More k's than shared memory takes at a time, and splits that end amid groups and batches of loads."""
    for k, group, splits in ((1100, 0, 1), (2100, 160, 3)):
        case = Case(16, k, bits, group, "each")
        x = torch.randn(2, k).half()
        near(kernels.few(case, x, splits), case.exact(x), torch.float16)


def test_no_tokens_and_no_rows(kernels: Kernels) -> None:
    for m, n in ((0, 5), (2, 0)):
        case, x = Case(5, 64, 4, 32, "each"), torch.randn(m, 64).half()
        case.n = n
        for name in ("codes", "q", "scales", "zeros", "bias"):
            setattr(case, name, getattr(case, name)[:n])
        for y in (kernels.few(case, x), kernels.many(case, x, 32), kernels.int8(case, x, 32)):
            assert y.shape == (m, n)


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
        assert any(name.startswith(op) for _, name in cost.banks), (op, cost.banks)
        assert all(actual == ideal for actual, ideal in cost.banks.values()), cost.banks
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


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(24))
def test_any_shape(kernels: Kernels, seed: int) -> None:
    draw = random.Random(seed)
    bits, dtype, m = BITS[seed % 3], HALVES[seed // 3 % 2], draw.randint(1, 33)
    k = draw.randint(1, 400)
    case = Case(
        draw.randint(1, 150),
        k,
        bits,
        32 * draw.randint(0, 6),
        draw.choice(ZEROS),
        draw.choice((torch.float16, torch.float32)),
    )
    x, columns = torch.randn(m, k).to(dtype), draw.choice((32, 64, 128))
    splits = draw.randint(1, min(4, -(-padded(k) // 128)))
    near(kernels.many(case, x, columns, splits), case.exact(x), dtype)
    near(kernels.int8(case, x, columns, splits), case.rounded(x, None), dtype)
    near(kernels.few(case, x[:16], splits), case.exact(x[:16]), dtype)
