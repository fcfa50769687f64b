"""`linear` by Hopper's warpgroups against fp64: the PTX for sm_90a interpreted, and on a GPU that has them. The same
cases for both."""

from __future__ import annotations

import random

import pytest
import torch

from mpqkern import ops
from mpqkern.scheme import padded

from . import ptxsim
from .cuda_linear import HALVES, ZEROS, Case, Interpreted, Kernels, OnGpu, near
from .test_cuda import needs_built, needs_gpu
from .test_cuda_linear import MANY
from .test_packed import BITS


@pytest.fixture(params=["interpreted", pytest.param("gpu", marks=needs_gpu)])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return OnGpu() if request.param == "gpu" else Interpreted(request.getfixturevalue("library"))


@pytest.fixture
def interpreted(library: ptxsim.Library) -> Interpreted:
    return Interpreted(library)


# ---- activations


@pytest.mark.parametrize("dtype", HALVES)
def test_arranged_activations(interpreted: Interpreted, dtype: torch.dtype) -> None:
    """Where each stands, zeros around them, and their sums: of groups, or of splits of 17 steps; by one warp, and by
    eight."""
    for m, k, group, bits in ((70, 96, 64, 4), (3, 133, 0, 8), (65, 200, 96, 2), (9, 2600, 0, 4), (5, 2600, 1088, 4)):
        case = Case(1, k, bits, group, "mid")
        x = torch.randn(m, k).to(dtype)
        rows, sums = interpreted.arrange(case, x, 64, 17)
        blocks, pieces = rows.shape[:2]
        deep = torch.zeros(blocks * 64, pieces * 8, dtype=dtype)
        deep[:m, :k] = x
        assert torch.equal(rows, deep.view(blocks, 64, pieces, 8).transpose(1, 2)), (m, k)
        unit = group or 17 * interpreted.step(case, False)
        for u in range(len(sums)):
            end = (u + 1) * unit if u < len(sums) - 1 else None
            torch.testing.assert_close(sums[u].double(), deep[:, u * unit : end].double().sum(1), rtol=0, atol=2e-5)


# ---- products


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bits", BITS)
def test_warpgroup(kernels: Kernels, bits: int, dtype: torch.dtype) -> None:
    """Ends of tokens, rows and k in and at the ends of 64 and 128 tokens, 128 rows, steps of 64 and 128 codes."""
    for i, (m, n, k, group, columns, splits) in enumerate(
        [*MANY, (128, 128, 128, 64, 128, 1), (129, 16, 64, 32, 64, 1)]
    ):
        case = Case(n, k, bits, group, ZEROS[i % 3], torch.float32 if i % 2 else torch.float16)
        x = torch.randn(m, k).to(dtype)
        near(kernels.warpgroup(case, x, max(columns, 64), splits), case.exact(x), dtype)


@pytest.mark.parametrize("bits", BITS)
def test_a_ring_of_stages_goes_round(kernels: Kernels, bits: int) -> None:
    """More steps than stages, so that each is given back and filled again; one group, many, and groups that end in
    steps; splits of whole groups."""
    step = 128 if bits == 2 else 64
    for k, group, splits in ((9 * step + 30, 0, 1), (18 * step, 3 * step, 2), (9 * step + 30, 96, 1)):
        case = Case(20, k, bits, group, "each")
        x = torch.randn(66, k).half()
        near(kernels.warpgroup(case, x, 128, splits), case.exact(x), torch.float16)


@pytest.mark.parametrize("dtype", HALVES)
def test_hard_numbers(kernels: Kernels, dtype: torch.dtype) -> None:
    """Zeros at both ends, scales that span 2^12; activations that are shifted, one-sided, huge in one place, tiny."""
    m, n, k, group = 66, 18, 128, 64
    for bits in BITS:
        case = Case(n, k, bits, group, "each")
        case.zeros[:, 0], case.zeros[:, 1] = 0, 2**bits - 1
        case.scales[:] = (2.0 ** torch.linspace(-12, 0, n)).view(n, 1).half()
        x = torch.randn(m, k)
        x[1] += 10
        x[2] = x[2].relu()
        x[3, 7] *= 100
        x[4] *= 1e-5
        x = x.to(dtype)
        got, want = kernels.warpgroup(case, x, 64, bias=False).double(), case.exact(x, bias=False)
        bar = {torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
        assert ((got - want).norm(dim=1) <= bar * want.norm(dim=1) + 1e-6).all(), bits


def test_whole_numbers_come_out_whole(kernels: Kernels) -> None:
    for bits in BITS:
        case = Case(33, 300, bits, 96, "one", torch.float32)
        case.scales.fill_(1)
        case.zeros = torch.tensor([1.0])
        x = torch.randint(-1, 2, (66, 300)).bfloat16()
        got = kernels.warpgroup(case, x, 128, 2, bias=False)
        assert torch.equal(got, (x.long() @ (case.codes.long() - 1).T).bfloat16()), bits


def test_no_bias_and_again(interpreted: Interpreted) -> None:
    """Twice the same, to the bit: sums are added in one order."""
    case, x = Case(24, 256, 4, 64, "each"), torch.randn(65, 256).half()
    first = interpreted.warpgroup(case, x, 128, 2, bias=False)
    near(first, case.exact(x, bias=False), torch.float16)
    assert torch.equal(first, interpreted.warpgroup(case, x, 128, 2, bias=False))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(24))
def test_any_shape(kernels: Kernels, seed: int) -> None:
    draw = random.Random(seed)
    bits, dtype, k = BITS[seed % 3], HALVES[seed // 3 % 2], draw.randint(1, 700)
    zeros, scales = draw.choice(ZEROS), draw.choice((torch.float16, torch.float32))
    case = Case(draw.randint(1, 150), k, bits, 32 * draw.randint(0, 6), zeros, scales)
    x = torch.randn(draw.randint(65, 140), k).to(dtype)
    splits = draw.randint(1, min(4, -(-padded(k) // 128)))
    near(kernels.warpgroup(case, x, draw.choice((64, 128)), splits), case.exact(x), dtype)


# ---- what the launchers refuse, and what is chosen


def test_launchers_check(interpreted: Interpreted, monkeypatch: pytest.MonkeyPatch) -> None:
    library, case, x = interpreted.library, Case(4, 256, 4, 128, "mid"), torch.randn(65, 256).half()
    with pytest.raises(ptxsim.PtxError, match="mpq_warpgroup returned 1; wanted 0"):
        interpreted.warpgroup(case, x, 32)
    task = interpreted.task(case, x, torch.empty(65, 4).half(), 4, 4, False)  # splits that end inside groups
    with pytest.raises(ptxsim.PtxError, match="mpq_warpgroup returned 1; wanted 0"):
        library.call("mpq_warpgroup", task, 64, None)
    for kernel in library.kernels.values():  # what a GPU without warpgroups gets holds nothing
        monkeypatch.setattr(kernel, "shared", {})
    with pytest.raises(ptxsim.PtxError, match="mpq_warpgroup returned 209; wanted 0"):  # no kernel image for the device
        interpreted.warpgroup(case, x, 64)


@needs_built
def test_plan() -> None:
    def plan(m: int, n: int = 4096, k: int = 4096, bits: int = 4, arch: int = 90, **how: object) -> ops.LinearPlan:
        return ops.linear_plan(arch, m, n, k, bits, **how)

    assert [plan(m).kernel for m in (64, 65, 2047, 2048)] == ["many", "warpgroup", "warpgroup", "dense"]
    assert [plan(m).columns for m in (65, 128, 129, 192, 193, 256, 257)] == [128, 128, 64, 64, 128, 128, 128]
    for arch in (80, 86, 89, 100, 120):
        assert plan(100, arch=arch).kernel == "many"
    assert plan(100, act_bits=8).kernel == "many_int8" and plan(100, dtype=torch.float32).kernel == "dense"
    assert plan(100, dtype=torch.bfloat16) == plan(100)
    assert plan(100).splits == 4 and plan(2000, n=1 << 14).splits == 1
    # splits are whole groups: 64 steps of 64 codes are 4 groups, or 22 of 192 codes
    assert plan(100, group_size=1024).splits == 4 and plan(100, group_size=2048).splits == 2
    assert plan(100, k=4224, group_size=192).splits == 4


# ---- what nvcc makes of it


def test_instructions(library: ptxsim.Library) -> None:
    kernels = {name: kernel for name, kernel in library.kernels.items() if "warpgroup_kernel" in name}
    assert len(kernels) == 24
    for name, kernel in kernels.items():
        used = {x.op for x in kernel.code}
        kind = "bf16" if "bfloat16" in name else "f16"
        assert any(
            op.startswith("wgmma.mma_async.sync.aligned.m64n") and op.endswith(f"f32.{kind}.{kind}") for op in used
        )
        assert not any(op.startswith(("atom", "red.")) or ".local" in op for op in used), name
