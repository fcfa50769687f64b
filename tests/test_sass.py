"""What ptxas makes of the CUDA kernels: no spills, no local memory, no warnings, wide loads, tensor cores, and no more
registers and shared memory than docs/cuda-kernels.md says. No GPU is needed, but nvcc is."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from . import ptxsim, sass
from .sass.table import PAGE, budgets, rows, title, up

pytestmark = pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc on PATH to compile the kernels with")


@pytest.fixture(scope="module")
def built() -> Path:
    path = ptxsim.build()
    assert path is not None
    return path


@pytest.mark.parametrize("arch", sass.ARCHS)
def test_kernels_have_no_faults(built: Path, arch: str) -> None:
    done = sass.assemble(sass.modules(built), (arch,))
    assert [fault for one in done for fault in sass.faults(one)] == []
    assert sum(len(one.kernels) for one in done) > 100


def test_every_demand_is_made_of_some_kernel(built: Path) -> None:
    made = sass.assemble(sass.modules(built), ("sm_90a",))
    names = [title(one.text, name) for one in made for name in one.kernels]
    for demand in sass.DEMANDS:
        assert any(demand.meets(name, "sm_90a") for name in names), demand


def test_budgets(library: ptxsim.Library) -> None:
    """`python -m tests.sass` writes the page anew."""
    found, allowed = rows(library), budgets(PAGE.read_text())
    assert set(found) == set(allowed)
    for name, row in found.items():
        budget = allowed[name]
        assert row.shared <= budget.shared and row.dynamic <= budget.dynamic, name
        for arch, registers in row.registers.items():
            assert registers <= up(budget.registers[arch], 8), (name, arch)
            assert not row.threads or row.blocks(arch) >= 1, (name, arch)


# ---- what checks find


BAD = """
extern "C" __global__ void __launch_bounds__(1024, 2) spilled(float* p) {
  float v[128];
#pragma unroll
  for (int i = 0; i < 128; ++i) v[i] = p[i * 1024];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 128; ++i) p[i * 999] = v[i] * v[127 - i];
}
extern "C" __global__ void local(float* p, int at) {
  float v[64];
  for (int i = 0; i < 64; ++i) v[i] = p[i] * i;
  for (int i = 0; i < 64; ++i) v[(at + i * i) % 64] += p[i];
  p[0] = v[at];
}
"""


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> str:
    source = tmp_path_factory.mktemp("bad") / "bad.cu"
    source.write_text(BAD)
    command = ["nvcc", "-arch=compute_80", "-lineinfo", "-ptx", "-o", source.with_suffix(".ptx"), source]
    subprocess.run(command, check=True)
    return source.with_suffix(".ptx").read_text()


def faults_of(text: str, arch: str) -> list[str]:
    (done,) = sass.assemble([text], (arch,))
    return sass.faults(done)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_spills_and_local_memory_are_found(bad: str, arch: str) -> None:
    found = "\n".join(faults_of(bad, arch))
    assert re.search(rf"^bad: spilled on {arch}: \d+ bytes of spills; wanted none", found, re.M)
    assert re.search(rf"^bad: local on {arch}: 256 bytes of stack or local memory; wanted none", found, re.M)
    assert re.search(rf"^{arch}: ptxas warning : Registers are spilled", found, re.M)


def module_of(built: Path, name: str) -> str:
    return min((text for text in sass.modules(built) if name in text), key=len)


WIDE = r"(ld\.\S*)\.v4(\.\w+)\s*\{([^}]*)\},\s*\[([^]+]*)(?:\+(\d+))?\];"


def narrow(found: re.Match[str]) -> str:
    """Four loads in the place of one."""
    load, kind, registers, base, at = found.groups()
    load = load.replace("ld.shared", "ld.volatile.shared")  # or ptxas joins them again
    parts = enumerate(registers.split(","))
    return "".join(f"{load}{kind} {r}, [{base}+{int(at or 0) + 4 * i}];\n" for i, r in parts)


PRODUCTS = r"mma\.sync[^;]*;"
MISSING = {
    "HMMA of few": ("10few_kernel", PRODUCTS, "", "HMMA"),
    "HMMA of many": ("11many_kernel6kernelILi4E6__half", PRODUCTS, "", "HMMA"),
    "IMMA": ("11many_kernel6kernelILi8ENS_4Int8", PRODUCTS, "", "IMMA"),
    "wide loads": ("10few_kernel", WIDE, narrow, "LDG of 128 bits"),
    "wide reads of shared memory": ("5tiles", WIDE, narrow, "LDS of 128 bits"),
    "wide copies": (
        *("11many_kernel6kernelILi4E6__half", r"cp\.async\.cg([^;]*), 16,", r"cp.async.ca\1, 8,"),
        "LDGSTS of 128 bits",
    ),
}


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90a"])
@pytest.mark.parametrize("missing", MISSING)
def test_missing_instructions_are_found(built: Path, missing: str, arch: str) -> None:
    kernel, there, instead, what = MISSING[missing]
    text, count = re.subn(there, instead, module_of(built, kernel))
    assert count
    assert any(re.search(rf"{arch}: \d+ {what}; wanted at least", fault) for fault in faults_of(text, arch))


def test_warpgroup_products() -> None:
    """A kernel of that name without any, and with some that wait for each other."""
    probe = sass.PROBES["HGMMA"][0][0][0]
    named = probe.text(3, "sm_90a").replace("probe", "warpgroup")
    text = '.file 1 "some.cu"\n'.join(re.split(r"(?<=address_size 64\n)", named))
    assert faults_of(text, "sm_90a") == []
    assert "some: warpgroup on sm_90a: 1 HGMMA; wanted at least 2" in faults_of(
        re.sub(r"wgmma\.mma_async[^;]*;", "", text), "sm_90a"
    )
    found = faults_of(text.replace("wgmma.commit_group", "add.f32 %f0, %f0, %f1;\nwgmma.commit_group"), "sm_90a")
    assert any("(C75" in fault for fault in found), found
