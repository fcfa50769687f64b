"""The CUDA kernels against mpqkern.packed: interpreted (tests/ptxsim) where there is nvcc, and on a GPU where
there is one. The same cases for both, to the bit."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpqkern import capabilities, ops, packed
from mpqkern.scheme import padded

from . import ptxsim
from .test_packed import BITS, codes_for

ROOT = Path(__file__).resolve().parent.parent
# around the block of 32 codes, the 8 rows of a CUDA block, and group boundaries
SHAPES = ((1, 1), (1, 31), (31, 33), (32, 32), (33, 130), (45, 64), (64, 1), (130, 45))
GROUPS = (32, 64, 128, 0)
BUILT = capabilities()["cuda_built"]
needs_gpu = pytest.mark.skipif(not (torch.cuda.is_available() and BUILT), reason="needs a GPU and CUDA kernels")
needs_built = pytest.mark.skipif(not BUILT, reason="this mpqkern was built without CUDA kernels")


class Interpreted:
    """The launchers, on arrays of exactly the sizes that they may touch."""

    def __init__(self, library: ptxsim.Library) -> None:
        self.library = library

    def pack(self, codes: Tensor, bits: int) -> Tensor:
        n, k = codes.shape
        out = unwritten((n, padded(k) * bits // 8), np.uint8)
        self.library.call("mpq_pack", read_only(codes), n, k, bits, out, None)
        return torch.from_numpy(out)

    def unpack(self, qweight: Tensor, bits: int, k: int) -> Tensor:
        out = unwritten((len(qweight), k), np.uint8)
        self.library.call("mpq_unpack", read_only(qweight), len(qweight), k, bits, out, None)
        return torch.from_numpy(out)

    def dequantize(
        self, qweight: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group: int, k: int
    ) -> Tensor:
        out = unwritten((len(qweight), k), np.float32)
        self.library.call("mpq_dequantize", weight(qweight, scales, zeros, bits, group, k), out, None)
        return torch.from_numpy(out)


class OnGpu:
    """The ops, on CUDA tensors."""

    def __getattr__(self, op: str) -> Callable[..., Tensor]:
        def call(*args: object) -> Tensor:
            moved = [a.cuda() if isinstance(a, Tensor) else a for a in args]
            return getattr(torch.ops.mpqkern, op)(*moved).cpu()

        return call


def read_only(t: Tensor) -> NDArray:
    array = t.numpy().copy()
    array.flags.writeable = False
    return array


def unwritten(shape: tuple[int, int], dtype: type) -> NDArray:
    return np.full(shape[0] * shape[1] * np.dtype(dtype).itemsize, 0xA5, np.uint8).view(dtype).reshape(shape)


def weight(q: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group: int, k: int) -> ptxsim.Packed:
    z = None if zeros is None else read_only(zeros)
    return ptxsim.Packed(read_only(q), read_only(scales), z, bits, group, k)


def random_grid(n: int, k: int, group: int, kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    groups = -(-padded(k) // group) if group else 1
    shape = {"mid": None, "one": (1,), "each": (n, groups)}[kind]
    zeros = None if shape is None else (torch.rand(shape) * 3).to(dtype)
    return torch.randn(n, groups).to(dtype), zeros


@pytest.fixture(params=["interpreted", pytest.param("gpu", marks=needs_gpu)])
def cuda(request: pytest.FixtureRequest) -> Iterator[Interpreted | OnGpu]:
    yield OnGpu() if request.param == "gpu" else Interpreted(request.getfixturevalue("library"))


# ---- results


@pytest.mark.parametrize("bits", BITS)
def test_pack_and_unpack(cuda: Interpreted | OnGpu, bits: int) -> None:
    for n, k in SHAPES:
        codes = codes_for(n, k, bits, n + k)
        want = packed.pack(codes, bits)
        assert torch.equal(cuda.pack(codes, bits), want), (n, k)
        assert torch.equal(cuda.unpack(want, bits, k), codes), (n, k)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("zeros", ["mid", "one", "each"])
@pytest.mark.parametrize("bits", BITS)
def test_dequantize(cuda: Interpreted | OnGpu, bits: int, zeros: str, dtype: torch.dtype) -> None:
    for i, (n, k) in enumerate(SHAPES):
        for group in GROUPS if k > 64 else (GROUPS[i % 2], 0):
            q = packed.pack(codes_for(n, k, bits, n + k), bits)
            scales, z = random_grid(n, k, group, zeros, dtype)
            got = cuda.dequantize(q, scales, z, bits, group, k)
            assert torch.equal(got, packed.dequantize(q, scales, z, bits, group, k)), (n, k, group)


@pytest.mark.parametrize("n,k", [(1, 2 * 2048 + 33), (2 * 4096 + 9, 1)])
def test_more_than_one_grid_covers(cuda: Interpreted | OnGpu, n: int, k: int) -> None:
    """Threads stride to what lies beyond the grid's 2048 columns and 4096 rows."""
    codes = codes_for(n, k, 8)
    q = packed.pack(codes, 8)
    assert torch.equal(cuda.pack(codes, 8), q)
    assert torch.equal(cuda.unpack(q, 8, k), codes)
    scales, z = random_grid(n, k, 32, "each", torch.float16)
    assert torch.equal(cuda.dequantize(q, scales, z, 8, 32, k), packed.dequantize(q, scales, z, 8, 32, k))


def test_no_rows(cuda: Interpreted | OnGpu) -> None:
    assert cuda.pack(torch.empty(0, 45, dtype=torch.uint8), 4).shape == (0, 32)
    q, scales = torch.empty(0, 32, dtype=torch.uint8), torch.empty(0, 1)
    assert cuda.unpack(q, 4, 45).shape == (0, 45)
    assert cuda.dequantize(q, scales, None, 4, 0, 45).shape == (0, 45)


@pytest.mark.parametrize("bits", [2, 4])
def test_pack_drops_the_high_bits_of_codes_that_are_too_large(cuda: Interpreted | OnGpu, bits: int) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(4, 64)
    assert torch.equal(cuda.pack(codes, bits), packed.pack(codes & (2**bits - 1), bits))


# ---- what the interpreter sees


def short(array: NDArray) -> NDArray:
    return array.reshape(-1)[:-1].copy()


def test_an_array_too_short_is_an_error(library: ptxsim.Library) -> None:
    """So every other test here also shows that nothing outside the arrays is read or written."""
    n, k, bits = 9, 45, 4
    codes = codes_for(n, k, bits)
    q, (scales, zeros) = packed.pack(codes, bits), random_grid(n, k, 32, "each", torch.float16)
    w, out = weight(q, scales, zeros, bits, 32, k), unwritten((n, k), np.float32)
    with pytest.raises(ptxsim.PtxError, match=r"weight\.cu:\d+: st.*writes 1 bytes out of bounds.*an array of 287"):
        library.call("mpq_pack", read_only(codes), n, k, bits, short(q.numpy()), None)
    with pytest.raises(ptxsim.PtxError, match="reads 1 bytes out of bounds"):
        library.call("mpq_pack", short(codes.numpy()), n, k, bits, q.numpy(), None)
    with pytest.raises(ptxsim.PtxError, match="writes 4 bytes out of bounds"):
        library.call("mpq_dequantize", w, short(out), None)
    w.zeros = zeros.numpy()[:-1].copy()
    with pytest.raises(ptxsim.PtxError, match="reads 2 bytes out of bounds"):
        library.call("mpq_dequantize", w, out, None)
    with pytest.raises(ptxsim.PtxError, match="should only read"):
        library.call("mpq_pack", codes.numpy(), n, k, bits, read_only(q), None)
    with pytest.raises(ptxsim.PtxError, match="mpq_pack returned 1"):
        library.call("mpq_pack", codes.numpy(), n, k, 3, q.numpy(), None)


def test_stores_are_coalesced(library: ptxsim.Library) -> None:
    """No more 32-byte sectors than the bytes fill."""
    n, k, bits = 8, 256, 4
    codes = codes_for(n, k, bits)
    q, (scales, zeros) = packed.pack(codes, bits), random_grid(n, k, 64, "each", torch.float16)
    for call in (
        ("mpq_pack", codes.numpy(), n, k, bits, q.numpy()),
        ("mpq_unpack", q.numpy(), n, k, bits, codes.numpy()),
        ("mpq_dequantize", weight(q, scales, zeros, bits, 64, k), unwritten((n, k), np.float32)),
    ):
        sectors = library.call(*call, None).sectors
        stores = [total for (_, op), total in sectors.items() if op.startswith("st.")]
        assert stores and all(actual == ideal for actual, ideal in stores), sectors


HEAD = """
.visible .entry k(.param .u64 k_param_0)
{
  .reg .pred %p<3>;
  .reg .b32 %r<9>;
  .reg .b64 %rd<4>;
  .shared .align 4 .b8 s[256];
  ld.param.u64 %rd1, [k_param_0];
  mov.u32 %r1, %tid.x;
  shl.b32 %r2, %r1, 2;
  mov.u32 %r3, s;
  add.s32 %r4, %r3, %r2;
"""


@pytest.mark.parametrize(
    "body,error",
    [
        ("frob.b32 %r5, %r1;", "frob.b32: an instruction that"),
        ("add.sat.s32 %r5, %r1, %r1;", "add.sat.s32: a modifier that"),
        ("ld.shared.u32 %r5, [%r4];", "nobody wrote"),
        ("st.shared.u32 [%r4+4], %r1;", "shared address out of bounds"),
        ("st.shared.u32 [%r3], %r1;", "race on shared byte 0"),
        ("st.shared.u32 [%r4], %r1; xor.b32 %r6, %r4, 4; ld.shared.u32 %r5, [%r6];", "race on shared byte 4"),
        ("st.global.u32 [%rd1+1], %r1;", "not aligned to 4 bytes"),
        ("setp.lt.u32 %p1, %r1, 5; @%p1 bar.sync 0;", "disagree about a barrier"),
        ("$L: bra $L;", "still running"),
        # and nothing to say about the same with a barrier
        ("st.shared.u32 [%r4], %r1; bar.sync 0; xor.b32 %r6, %r4, 4; ld.shared.u32 %r5, [%r6];", None),
    ],
)
def test_the_interpreter_finds(body: str, error: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ptxsim.block, "LIMIT", 1000)
    kernel = ptxsim.program.parse(f"{HEAD}{body}\nret;\n}}")["k"]
    memory = ptxsim.Global()
    address = memory.place(np.zeros(64, np.uint32)).to_bytes(8, "little")
    one = (1, 1, 1)
    block = ptxsim.block.Block(kernel, memory, [address], (0, 0, 0), (64, 1, 1), one, 0, ptxsim.Traffic())
    if error is None:
        block.run()
        assert (block.register("%r5") == np.arange(64) ^ 1).all()
    else:
        with pytest.raises(ptxsim.PtxError, match=error):
            block.run()


# ---- the build


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc on PATH")
def test_a_kernel_that_spills_does_not_build(tmp_path: Path) -> None:
    """With the options that CMakeLists.txt gives; so what is built holds no spills."""
    options = re.search(r"-Xptxas=[-\w,]+", (ROOT / "CMakeLists.txt").read_text())
    assert options is not None
    source = tmp_path / "spill.cu"
    source.write_text(
        "__global__ void __launch_bounds__(1024, 2) k(float* p) { float v[128];\n"
        "#pragma unroll\n for (int i = 0; i < 128; ++i) v[i] = p[i * 1024];\n __syncthreads();\n"
        "#pragma unroll\n for (int i = 0; i < 128; ++i) p[i * 999] = v[i] * v[127 - i]; }"
    )
    command = ["nvcc", "-arch=sm_80", options[0], "-cubin", "-o", tmp_path / "spill.cubin", source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "spill" in done.stderr


@needs_built
@pytest.mark.skipif(not shutil.which("readelf"), reason="needs readelf")
def test_the_library_needs_nothing_of_cuda() -> None:
    library = next(p for p in torch.ops.loaded_libraries if Path(p).name == "_C.so")
    listed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", listed)
    assert "libtorch_cpu.so" in needed and not [n for n in needed if "cuda" in n or "nv" in n]


@needs_built
@pytest.mark.parametrize(
    "op,args,error",
    [
        ("pack", (torch.zeros(2, 5, dtype=torch.uint8), 3), "bits=3; wanted 2, 4 or 8"),
        ("unpack", (torch.zeros(2, 5, dtype=torch.uint8), 4, 64), r"qweight is uint8 \[2, 5\]; wanted uint8 \[N, 32\]"),
        ("dequantize", (torch.zeros(2, 32, dtype=torch.uint8), torch.zeros(2, 1), None, 4, 0, 64), "qweight is on cpu"),
    ],
)
def test_the_ops_check_their_arguments(op: str, args: tuple[object, ...], error: str) -> None:
    """The CUDA kernels of the ops, reached past the dispatcher."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises(RuntimeError, match=error):
        getattr(torch.ops.mpqkern, op).default.redispatch(keys, *args)


@needs_built
def test_which_ops_have_cuda_kernels() -> None:
    assert [op for op in ops.SCHEMAS if ops.has_kernel(op, "cuda")] == [
        *("pack", "unpack", "dequantize", "quantize", "linear", "fragments", "linear_fragments"),
        *("conv2d", "gram", "orthogonality", "probe_errors"),
    ]


# ---- only on a GPU


@needs_gpu
def test_on_a_stream_of_its_own_and_strided() -> None:
    codes = torch.randint(0, 16, (300, 2 * 1000), dtype=torch.uint8)
    want = packed.pack(codes[:, ::2], 4)
    with torch.cuda.stream(torch.cuda.Stream()):
        q = torch.ops.mpqkern.pack(codes.cuda()[:, ::2], 4)
        got = torch.ops.mpqkern.unpack(q, 4, 1000)
        assert torch.equal(q.cpu(), want) and torch.equal(got.cpu(), codes[:, ::2])


@needs_gpu
def test_tensors_on_two_devices_are_an_error() -> None:
    q, scales = torch.zeros(2, 32, dtype=torch.uint8), torch.zeros(2, 1)
    with pytest.raises(RuntimeError, match=r"scales is on cpu; wanted cuda:\d+, where qweight is"):
        torch.ops.mpqkern.dequantize(q.cuda(), scales, None, 4, 0, 64)


@needs_gpu
def test_ops_without_a_kernel_are_served() -> None:
    w, x = torch.randn(40, 96), torch.randn(5, 96)
    q, scales, zeros, _ = torch.ops.mpqkern.quantize(w.cuda(), 4, 32, False)
    for got, want in zip((q, scales, zeros), torch.ops.mpqkern.quantize(w, 4, 32, False), strict=False):
        assert torch.equal(got.cpu(), want)
    y = torch.ops.mpqkern.linear(x.cuda(), q, scales, zeros, None, 4, 32)
    want = torch.ops.mpqkern.linear(x, q.cpu(), scales.cpu(), zeros.cpu(), None, 4, 32)
    torch.testing.assert_close(y.cpu(), want, rtol=1e-2, atol=1e-2)
