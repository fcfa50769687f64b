"""gram and orthogonality on CUDA: interpreted (tests/ptxsim) where there is nvcc, and on a GPU where there is one. The
same cases for both."""

from __future__ import annotations

import ctypes as c
from collections.abc import Iterator
from itertools import groupby

import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import ptxsim, reference
from .test_cuda import needs_gpu, read_only
from .test_cuda_analysis import OnGpu, unwritten

HALVES = [torch.float16, torch.bfloat16]
TYPES = [torch.float32, *HALVES]  # in the order of launchers' numbers


def samples(x: Tensor) -> tuple[NDArray, int, int]:
    """What the launcher takes of a feature whose samples are dense: memory, columns and stride."""
    n, columns = len(x), x[0].numel()
    flat = x.as_strided(((n - 1) * x.stride(0) + columns if columns else 0,), (1,))
    return read_only(flat.view(torch.int16) if x.dtype == torch.bfloat16 else flat), columns, x.stride(0)


class Layout(c.Structure):  # mpq::GramFeature
    _fields_ = (("x", c.c_void_p), ("columns", c.c_int64), ("stride", c.c_int64))


class Features:
    """Features as an argument of launchers."""

    def __init__(self, samples: list[tuple[NDArray, int, int]]) -> None:
        self.samples = samples

    def place(self, memory: ptxsim.Global) -> c.Array:
        return (Layout * len(self.samples))(*((memory.place(x), *sizes) for x, *sizes in self.samples))


class Interpreted:
    """The launchers, on arrays of exactly the sizes that they may touch."""

    def __init__(self, library: ptxsim.Library, slices: int | None = None) -> None:
        self.library, self.slices = library, slices

    def gram(self, features: list[Tensor], center: bool = True) -> Tensor:
        n, out = len(features[0]), []
        for dtype, same in groupby(features, lambda x: x.dtype):
            list_ = Features([samples(x) for x in same])
            count, asked = len(list_.samples), self.slices or 0
            size = self.library.lib.mpq_gram_workspace(
                c.byref(list_.place(ptxsim.Global())), *map(c.c_int64, (count, n, asked))
            )
            workspace, k = unwritten((size,), torch.float64), unwritten((count, n, n), torch.float64)
            how = (count, TYPES.index(dtype), n, center, asked)
            self.cost = self.library.call("mpq_gram", list_, *how, workspace.numpy(), k.numpy(), None)
            out.append(k)
        return torch.cat(out)

    def orthogonality(self, features: list[Tensor], center: bool = True, debiased: bool = False) -> Tensor:
        k, count = self.gram(features, center or debiased), len(features)
        inner, out = (unwritten((count, count), torch.float64) for _ in range(2))
        arrays = (k.numpy(), count, k.shape[1], debiased, inner.numpy(), out.numpy())
        self.library.call("mpq_orthogonality", *arrays, None)
        return out


@pytest.fixture(params=["interpreted", pytest.param("gpu", marks=needs_gpu)])
def cuda(request: pytest.FixtureRequest) -> Iterator[Interpreted | OnGpu]:
    yield OnGpu() if request.param == "gpu" else Interpreted(request.getfixturevalue("library"))


def assert_gram(cuda: Interpreted | OnGpu, features: list[Tensor], center: bool) -> None:
    got = cuda.gram(features, center)
    assert got.shape == (len(features), len(features[0]), len(features[0]))
    for k, x in zip(got, features, strict=True):
        of = reference.gram if x.dtype == torch.float32 else reference.gram_of_halves
        reference.assert_within(k, *of(x, center), torch.float64)
        assert torch.equal(k, k.T)


# Tiles of 32 and of 64 samples, one and several; chunks of 32 columns, fp32 sums and slices of 512.
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("n,columns", [(1, 1), (3, 33), (31, 1030), (32, 32), (33, 513), (64, 31), (130, 70)])
def test_shapes(cuda: Interpreted | OnGpu, n: int, columns: int, center: bool) -> None:
    assert_gram(cuda, [torch.randn(n, columns) + 3], center)


# Chunks of 64 columns, rows that start on 16 bytes and rows that do not.
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("n,columns", [(1, 1), (3, 65), (17, 8), (32, 136), (33, 79), (65, 24)])
def test_halves(cuda: Interpreted | OnGpu, n: int, columns: int, dtype: torch.dtype) -> None:
    x = torch.randn(n, columns).to(dtype)
    assert_gram(cuda, [x], False)
    assert_gram(cuda, [x, x.relu(), x + 20], True)


@pytest.mark.parametrize("dtype", HALVES)
def test_halves_are_exact_where_fp32_sums_are(cuda: Interpreted | OnGpu, dtype: torch.dtype) -> None:
    x = torch.randint(-128, 128, (40, 600)).to(dtype)
    assert torch.equal(cuda.gram([x], False)[0], x.double() @ x.double().T)


@pytest.mark.parametrize("dtype", HALVES)
def test_which_kernel_makes_a_matrix(library: ptxsim.Library, dtype: torch.dtype) -> None:
    """Tensor cores; fp32 too where centring leaves one sample too little, or something that is not finite."""
    x = torch.randn(4, 40)
    one = x.clone()
    one[2] = x.mean(0) + 0.01 * x[2]
    strange = x.clone()
    strange[1, 7] = torch.inf
    for f, again in ((x, False), (x.relu(), False), (x + 20, True), (one, True), (strange, True), (0 * x, False)):
        kernels = Interpreted(library)
        for center in (True, False):
            kernels.gram([f.to(dtype)], center)
            assert any(op.startswith("mma") for op in kernels.cost.instructions)
            assert ("fma.rn.f32" in kernels.cost.instructions) == (again and center), (f, center)
        kernels.gram([f], True)
        assert not any(op.startswith("mma") for op in kernels.cost.instructions)


def test_features_in_one_launch_are_as_alone(cuda: Interpreted | OnGpu) -> None:
    """To the bit; also where centring leaves only some of them too little."""
    few = [torch.randn(3, k) + shift for k, shift in ((40, 0), (530, 20), (0, 0), (7, 0))]
    for features in ([x.half() for x in few], [*few[1:], few[0].bfloat16(), few[1].bfloat16()]):
        assert torch.equal(cuda.gram(features), torch.cat([cuda.gram([x]) for x in features]))


def test_more_features_than_a_launch_takes(cuda: Interpreted | OnGpu) -> None:
    features = [torch.randint(-9, 9, (2, 1 + i % 3)).half() for i in range(33)]
    assert torch.equal(cuda.gram(features, False), torch.stack([x.double() @ x.double().T for x in features]))


def test_launches_share_64_mib(library: ptxsim.Library) -> None:
    def workspace(count: int, columns: int) -> int:
        features = (Layout * count)(*(((None, columns, columns),) * count))
        return library.lib.mpq_gram_workspace(c.byref(features), *map(c.c_int64, (count, 64, 0)))

    one = workspace(1, 1 << 20) - 16
    assert one == 512 * 64 * 64
    assert [workspace(n, 1 << 20) for n in (3, 4, 5, 9)] == [n * one + 16 for n in (3, 4, 4, 4)]
    assert [workspace(n, 512) for n in (31, 32, 33)] == [n * 64 * 64 + 16 for n in (31, 32, 32)]


@pytest.mark.parametrize("dtype", TYPES)
def test_slices_of_several_sums(library: ptxsim.Library, dtype: torch.dtype) -> None:
    x = torch.randn(5, 1050).to(dtype)
    for slices in (1, 2):
        assert_gram(Interpreted(library, slices), [x], True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_blocks_take_tiles_and_slices_in_turn(
    library: ptxsim.Library, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = [torch.randn(65, 40).to(dtype)]
    want = Interpreted(library).orthogonality([features[0][:9], features[0][9:18]], True, True)
    monkeypatch.setattr(library, "most_blocks", 2)
    assert_gram(Interpreted(library), features, True)
    assert torch.equal(Interpreted(library).orthogonality([features[0][:9], features[0][9:18]], True, True), want)


@pytest.mark.parametrize("center", [True, False])
def test_element_types(cuda: Interpreted | OnGpu, center: bool) -> None:
    features = [(torch.randn(n, 3, 23) + offset).to(t) for t in TYPES for n, offset in ((6, 0), (6, 100))]
    assert_gram(cuda, features, center)


def test_layouts(cuda: Interpreted | OnGpu) -> None:
    """Every order of dense samples is the same feature, and samples may lie apart."""
    x, wide = torch.randn(6, 5, 3, 4), torch.randn(12, 60)
    last = x.contiguous(memory_format=torch.channels_last)
    got = cuda.gram([x, last, wide[::2]])
    assert torch.allclose(got[0], got[1], rtol=1e-5, atol=1e-5)
    assert_gram(cuda, [x, last, wide[::2], torch.randn(6)], True)


def test_no_columns_and_constant_features(cuda: Interpreted | OnGpu) -> None:
    constant = torch.full((7, 1), 0.1) * torch.rand(1, 90)
    assert not cuda.gram([torch.empty(7, 0), constant]).any()
    assert not cuda.gram([constant.half(), constant.bfloat16()]).any()
    x = torch.randint(-8, 9, (10, 60)).float()
    assert torch.allclose(cuda.gram([x + 2.0**15]), cuda.gram([x]), rtol=1e-12)
    x = x.half()
    assert torch.allclose(cuda.gram([x + 1024]), cuda.gram([x]), rtol=1e-12)


@pytest.mark.parametrize("dtype", TYPES)
def test_nan_and_infinity_show(cuda: Interpreted | OnGpu, dtype: torch.dtype) -> None:
    for value in (torch.nan, torch.inf):
        x = torch.randn(5, 40).to(dtype)
        x[2, 33] = value
        assert not cuda.gram([x])[0].isfinite().any()
        k = cuda.gram([x], False)[0]
        assert not k[2].isfinite().any() and k[:2, :2].isfinite().all() and k[3:, 3:].isfinite().all()
        for debiased in (True, False):
            m = cuda.orthogonality([x, torch.randn(5, 4)], True, debiased)
            assert m[0].isnan().all() and m[1, 1] == 1


# ---- orthogonality


@pytest.mark.parametrize("center,debiased", [(True, False), (False, False), (True, True)])
def test_orthogonality(cuda: Interpreted | OnGpu, center: bool, debiased: bool) -> None:
    base = torch.randn(12, 30)
    features = [torch.randn(12, p).relu() for p in (1, 100)] + [base, base @ torch.randn(30, 40), base.relu()]
    grams = [reference.gram(x, center or debiased)[0] for x in features]
    inner = torch.tensor([[reference.hsic(a, b, debiased) for b in grams] for a in grams], dtype=torch.float64)
    want = inner / (inner.diag().sqrt().unsqueeze(1) * inner.diag().sqrt())
    got = cuda.orthogonality(features, center, debiased)
    assert got.dtype == torch.float64 and torch.allclose(got, want, rtol=0, atol=1e-5)
    assert torch.equal(got, got.T) and (got.diagonal() == 1).all()


@pytest.mark.parametrize("n,debiased", [(40, True), (6, False)])
def test_features_that_hold_nothing_are_orthogonal_to_all(cuda: Interpreted | OnGpu, n: int, debiased: bool) -> None:
    nothing = [torch.zeros(n, 5), torch.full((n, 3), 0.1), torch.empty(n, 0)]
    # all pairs of samples equally far apart: unbiased, that is nothing
    alike = [torch.eye(n), 0.1 * torch.eye(n), torch.eye(n) / 3 + 1] if debiased else []
    m = cuda.orthogonality([*nothing, *alike, torch.randn(n, 40)], True, debiased)
    assert torch.equal(m, torch.eye(len(m), dtype=torch.float64))
