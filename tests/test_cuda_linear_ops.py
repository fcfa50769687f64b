"""Around the CUDA kernels of `linear`: the choice between them, the ops, modules, and what nvcc makes of them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from mpqkern import PackedLinear, Scheme, ops

from . import ptxsim
from .cuda_linear import HALVES, Case, near
from .test_cuda import ROOT, needs_built, needs_gpu

# ---- the choice of a kernel


@needs_built
def test_linear_plan() -> None:
    def plan(m: int, n: int = 4096, k: int = 4096, bits: int = 4, arch: int = 80, **how: object) -> ops.LinearPlan:
        return ops.linear_plan(arch, m, n, k, bits, **how)

    assert [plan(m).kernel for m in (0, 1, 16, 17, 2047, 2048)] == ["dense", "few", "few", "many", "many", "dense"]
    assert [plan(m, arch=100).kernel for m in (16, 17, 511, 512)] == ["few", "many", "many", "dense"]
    assert [plan(m, arch=90).kernel for m in (16, 17, 64, 65)] == ["few", "many", "many", "warpgroup"]
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
    """No kernel keeps anything in local memory: no spills, no arrays, no stack. No wgmma waits for the one before it
    because ptxas could not tell that it need not."""
    command = ["nvcc", f"-arch={arch}", "-std=c++17", "-O3", "-Xptxas=-v", "-cubin", "-o", tmp_path / "out.cubin"]
    done = subprocess.run([*command, ROOT / "csrc" / "cuda" / source], capture_output=True, text=True, check=True)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert all(frame == ("0", "0", "0") for frame in frames), done.stderr
    assert frames or source == "linear.cu"  # which holds no kernel
    assert "wgmma" not in done.stderr, done.stderr
