"""The C++ built in other ways: under sanitizers, with AVX-512 emulated, and what its objects may export."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SIMDE = Path("/usr/include/simde/x86/avx512.h").is_file()
CXX = os.environ.get("CXX", "g++")
needs_compiler = pytest.mark.skipif(
    not (shutil.which("cmake") or (Path(sys.executable).parent / "cmake").is_file()) or not shutil.which(CXX),
    reason=f"needs cmake and {CXX}",
)


@pytest.fixture(scope="module")
def sanitized() -> Path:
    """_C.so under AddressSanitizer and UBSan, AVX-512 through SIMDe where that is installed."""
    build = ROOT / "build" / "sanitized"
    tools = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    settings = {
        "MPQKERN_TORCH": Path(torch.__file__).parent,
        "MPQKERN_CUDA": "OFF",
        "MPQKERN_SANITIZE": "address,undefined",
        "MPQKERN_SIMDE": "ON" if SIMDE else "OFF",
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": build / "out",
        "CMAKE_BUILD_TYPE": "None",
    }
    define = [f"-D{k}={v}" for k, v in settings.items()]
    for command in (["cmake", "-G", "Ninja", "-S", ROOT, "-B", build, *define], ["cmake", "--build", build]):
        done = subprocess.run(command, env=tools, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return build / "out" / "_C.so"


@needs_compiler
@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
@pytest.mark.slow
@pytest.mark.parametrize("archs,has", [("80;90-real", False), ("90a-real;90-virtual", True)])
def test_only_a_build_for_90a_multiplies_by_warpgroups(archs: str, has: bool, tmp_path: Path) -> None:
    """Others have empty kernels of theirs, which `linear` must not take on Hopper."""
    tools = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    settings = (f"-DMPQKERN_TORCH={Path(torch.__file__).parent}", "-DMPQKERN_CUDA=ON", f"-DMPQKERN_CUDA_ARCHS={archs}")
    command = ["cmake", "-G", "Ninja", "-S", ROOT, "-B", tmp_path, *settings]
    done = subprocess.run(command, env=tools, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (f"MPQKERN_CUDA_ARCHS='{archs}' has no 90a" in done.stdout) != has
    assert ("-DMPQ_WARPGROUPS" in (tmp_path / "build.ninja").read_text()) == has


def runtime(name: str) -> str:
    return subprocess.run([CXX, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()


def run_sanitized(library: Path, *command: str, isa: str = "", log: Path) -> subprocess.CompletedProcess[str]:
    env = os.environ | {
        "MPQKERN_LIBRARY": str(library),
        "MPQKERN_ISA": isa,
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')}",
        "ASAN_OPTIONS": f"detect_leaks=0,log_path={log}/asan",  # pytest's capture would swallow the report
        "UBSAN_OPTIONS": f"halt_on_error=1,print_stacktrace=1,log_path={log}/ubsan",
    }
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, check=False)


@needs_compiler
@pytest.mark.slow
def test_kernels_under_sanitizers_and_emulation(sanitized: Path, tmp_path: Path) -> None:
    """A reduced run of the kernel tests: those marked `sanitize`, on every instruction set."""
    done = run_sanitized(
        sanitized,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-m",
        "sanitize",
        "-k",
        "not plain",
        "--hypothesis-seed=0",
        "tests/test_packed.py",
        "tests/test_quantize.py",
        "tests/test_linear.py",
        "tests/test_linear_a8.py",
        "tests/test_conv.py",
        "tests/test_conv_paths.py",
        "tests/test_activated.py",
        "tests/test_conv_bytes.py",
        "tests/test_depthwise_bytes.py",
        "tests/test_static_activations.py",
        "tests/test_gram.py",
        "tests/test_probe_errors.py",
        "tests/test_probe_products.py",
        log=tmp_path,
    )
    reports = "".join(p.read_text()[:4000] for p in tmp_path.iterdir())
    assert done.returncode == 0 and not reports, done.stdout[-3000:] + reports
    assert " passed" in done.stdout
    if SIMDE:
        assert "has no avx" not in done.stdout


@needs_compiler
@pytest.mark.slow
def test_the_sanitizer_sees_a_planted_overflow(sanitized: Path, tmp_path: Path) -> None:
    """Scales one group short, past the checks of the op: the kernels must be caught reading on."""
    code = """
import ctypes, os, torch, mpqkern
real = torch.zeros(4 * 64, dtype=torch.uint8)
view = real.as_strided((4, 64), (64, 1))
short = torch.empty(4 * 64 - 32, dtype=torch.uint8)
q = torch.empty(0, dtype=torch.uint8).set_(short.untyped_storage(), 0, (3, 64), (64, 1))
torch.ops.mpqkern.unpack(q, 8, 64)
short.untyped_storage().resize_(1)
torch.ops.mpqkern.unpack(q, 8, 64)
print("not seen")
"""
    done = run_sanitized(sanitized, "-c", code, log=tmp_path)
    reports = "".join(p.read_text() for p in tmp_path.iterdir())
    assert "not seen" not in done.stdout and "AddressSanitizer" in reports + done.stderr
    assert "unpack" in reports + done.stderr


@needs_compiler
@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm")
@pytest.mark.parametrize(
    "isa,flags",
    [
        ("avx2", "-mavx2 -mfma -mf16c"),
        ("avxvnni", "-mavx2 -mfma -mf16c -mavxvnni"),
        ("avx512", "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mfma -mf16c"),
    ],
)
def test_isa_files_export_their_table_and_nothing_weak(isa: str, flags: str, tmp_path: Path) -> None:
    """A weak symbol from such a file could be linked into the path of a processor that lacks the instructions."""
    if os.uname().machine != "x86_64":
        pytest.skip("x86-64 only")
    out = tmp_path / "isa.o"
    source = ROOT / "csrc" / "cpu" / f"isa_{isa}.cpp"
    subprocess.run([CXX, "-std=c++20", "-O1", "-w", *flags.split(), "-c", source, "-o", out], check=True)
    symbols = subprocess.run(["nm", "-C", out], capture_output=True, text=True, check=True).stdout.splitlines()
    exported = [line.split(maxsplit=2)[-1] for line in symbols if " T " in line or " D " in line or " R " in line]
    assert exported == [f"mpq::{isa}_kernels"]
    assert not [line for line in symbols if any(f" {kind} " in line for kind in "WVu")]
