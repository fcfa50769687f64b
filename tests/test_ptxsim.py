"""The interpreter of PTX: each instruction of a whole warp, and those whose results are easy to get wrong, against
NumPy on random operands."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from . import ptxsim

LANE = np.arange(32)
G, C = LANE // 4, LANE % 4
ALL = "0xffffffff"


def run(
    body: str, threads: int = 32, registers: dict[str, NDArray] | None = None, *arrays: NDArray
) -> ptxsim.block.Block:
    """Runs `body` in one block; %r100.. hold what `registers` gives, %rd1.. the addresses of `arrays`."""
    names = [f"k_param_{i}" for i in range(len(arrays))]
    text = (
        f".shared .align 16 .b8 s[4096];\n.visible .entry k({', '.join(f'.param .u64 {n}' for n in names)})\n{{\n"
        ".reg .pred %p<9>;\n.reg .b16 %rs<9>;\n.reg .b32 %r<200>;\n.reg .f32 %f<99>;\n.reg .b64 %rd<9>;\n"
        + "".join(f"ld.param.u64 %rd{i + 1}, [{n}];\n" for i, n in enumerate(names))
        + f"mov.u32 %r1, %tid.x;\nmov.u32 %r2, s;\n{body}\nret;\n}}"
    )
    memory = ptxsim.Global()
    addresses = [memory.place(a).to_bytes(8, "little") for a in arrays]
    kernel = ptxsim.program.parse(text)["k"]
    one = (1, 1, 1)
    block = ptxsim.block.Block(kernel, memory, addresses, (0, 0, 0), (threads, 1, 1), one, 0, ptxsim.Traffic())
    for name, value in (registers or {}).items():
        block.register(name)[:] = value.view(block.register(name).dtype)
    block.run()
    return block


def words(seed: int, count: int = 32) -> NDArray:
    return np.random.default_rng(seed).integers(0, 1 << 32, count, np.uint32)


# ---- matrices: every element of every fragment stands where the PTX manual's tables say


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_mma_of_16_bits(kind: str) -> None:
    rng = np.random.default_rng(1)
    left, right = rng.integers(-8, 9, (16, 16)).astype(np.float32), rng.integers(-8, 9, (16, 8)).astype(np.float32)
    start = rng.integers(-8, 9, (16, 8)).astype(np.float32)

    def bits(v: NDArray) -> NDArray:
        t = torch.from_numpy(v).to({"f16": torch.float16, "bf16": torch.bfloat16}[kind])
        return t.view(torch.int16).numpy().view(np.uint16).astype(np.uint32)

    def pair(low: NDArray, high: NDArray) -> NDArray:
        return bits(low) | bits(high) << np.uint32(16)

    given = {}
    for r in range(4):
        row, k = G + 8 * (r % 2), 2 * C + 8 * (r // 2)
        given[f"%r10{r}"] = pair(left[row, k], left[row, k + 1])
        given[f"%f{r}"] = start[G + 8 * (r // 2), 2 * C + r % 2]
    for r in range(2):
        k = 2 * C + 8 * r
        given[f"%r11{r}"] = pair(right[k, G], right[k + 1, G])
    b = run(
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{%f0,%f1,%f2,%f3}}, {{%r100,%r101,%r102,%r103}}, "
        "{%r110,%r111}, {%f0,%f1,%f2,%f3};",
        registers=given,
    )
    want = left @ right + start
    for r in range(4):
        assert np.array_equal(b.register(f"%f{r}").view(np.float32), want[G + 8 * (r // 2), 2 * C + r % 2])


def test_mma_takes_subnormal_fp16_as_they_are() -> None:
    given = {f"%r10{r}": np.full(32, 0x00030003, np.uint32) for r in range(4)}
    given |= {f"%r11{r}": np.full(32, 0x3C003C00, np.uint32) for r in range(2)}
    given |= {f"%f{r}": np.zeros(32, np.float32) for r in range(4)}
    b = run(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%f0,%f1,%f2,%f3}, {%r100,%r101,%r102,%r103}, "
        "{%r110,%r111}, {%f0,%f1,%f2,%f3};",
        registers=given,
    )
    assert (b.register("%f0").view(np.float32) == 48 * 2.0**-24).all()


@pytest.mark.parametrize("unsigned", [False, True])
def test_mma_of_bytes(unsigned: bool) -> None:
    rng = np.random.default_rng(2)
    left = rng.integers(0, 256, (16, 32)) if unsigned else rng.integers(-128, 128, (16, 32))
    right, start = rng.integers(-128, 128, (32, 8)), rng.integers(-1000, 1000, (16, 8))

    def quad(v: NDArray) -> NDArray:
        return np.ascontiguousarray(v.astype(np.int64).astype(np.uint8)).view(np.uint32).ravel()

    given, four = {}, np.arange(4)
    for r in range(4):
        row, k = G + 8 * (r % 2), 4 * C + 16 * (r // 2)
        given[f"%r10{r}"] = quad(left[row[:, None], k[:, None] + four])
        given[f"%r12{r}"] = start[G + 8 * (r // 2), 2 * C + r % 2].astype(np.int32)
    for r in range(2):
        given[f"%r11{r}"] = quad(right[(4 * C + 16 * r)[:, None] + four, G[:, None]])
    b = run(
        f"mma.sync.aligned.m16n8k32.row.col.s32.{'u8' if unsigned else 's8'}.s8.s32 {{%r120,%r121,%r122,%r123}}, "
        "{%r100,%r101,%r102,%r103}, {%r110,%r111}, {%r120,%r121,%r122,%r123};",
        registers=given,
    )
    want = left @ right + start
    for r in range(4):
        assert np.array_equal(b.register(f"%r12{r}").view(np.int32), want[G + 8 * (r // 2), 2 * C + r % 2])


@pytest.mark.parametrize("trans", [False, True])
def test_ldmatrix(trans: bool) -> None:
    source = words(3, 128)  # four matrices of 8 rows of 16 bytes, in order
    b = run(
        "shl.b32 %r3, %r1, 4;\nadd.s32 %r4, %r2, %r3;\n"
        + "st.shared.v4.u32 [%r4], {%r100,%r101,%r102,%r103};\nbar.sync 0;\n"
        + f"ldmatrix.sync.aligned.m8n8.x4{'.trans' * trans}.shared.b16 {{%r20,%r21,%r22,%r23}}, [%r4];",
        registers={f"%r10{i}": source.reshape(32, 4)[:, i].copy() for i in range(4)},
    )
    matrices = source.view(np.uint16).reshape(4, 8, 8)
    for i in range(4):
        m = matrices[i].T if trans else matrices[i]
        want = m[G, 2 * C].astype(np.uint32) | m[G, 2 * C + 1].astype(np.uint32) << np.uint32(16)
        assert np.array_equal(b.register(f"%r2{i}"), want)


# ---- other instructions of a warp


@pytest.mark.parametrize(
    "how,by,source",
    [
        ("bfly", 5, LANE ^ 5),
        ("down", 3, np.where(LANE + 3 < 32, LANE + 3, LANE)),
        ("up", 3, np.where(LANE >= 3, LANE - 3, LANE)),
        ("idx", 7, np.full(32, 7)),
    ],
)
def test_shfl(how: str, by: int, source: NDArray) -> None:
    v, clamp = words(4, 64), 0 if how == "up" else 31
    b = run(f"shfl.sync.{how}.b32 %r3, %r100, {by}, {clamp}, {ALL};", 64, {"%r100": v})
    assert np.array_equal(b.register("%r3").reshape(2, 32), v.reshape(2, 32)[:, source])


def test_vote() -> None:
    v = np.stack([words(5), np.zeros(32, np.uint32), np.ones(32, np.uint32)]) & np.uint32(1)
    b = run(
        f"setp.ne.s32 %p1, %r100, 0;\nvote.sync.ballot.b32 %r3, %p1, {ALL};\nvote.sync.ballot.b32 %r4, !%p1, {ALL};\n"
        f"vote.sync.any.pred %p2, %p1, {ALL};\nvote.sync.all.pred %p3, %p1, {ALL};\n"
        f"vote.sync.uni.pred %p4, %p1, {ALL};\nbar.warp.sync {ALL};",
        96,
        {"%r100": v.ravel()},
    )
    ballot = (v.astype(np.uint64) << LANE.astype(np.uint64)).sum(1).astype(np.uint32)
    for name, want in (
        ("%r3", ballot),
        ("%r4", ~ballot),
        ("%p2", np.array([True, False, True])),
        ("%p3", np.array([False, False, True])),
        ("%p4", np.array([False, True, True])),
    ):
        assert np.array_equal(b.register(name), np.repeat(want, 32)), name


def test_cp_async() -> None:
    """Bytes past the count to read are 0, and nothing has landed before its group is waited for."""
    source, out = words(6, 128), np.zeros(128, np.uint32)
    copies = "".join(
        f"cp.async.cg.shared.global [%r4+{512 * i}], [%rd3], 16, {valid};\ncp.async.commit_group;\n"
        for i, valid in enumerate((16, 8, 0))
    )
    begin = "shl.b32 %r3, %r1, 4;\nadd.s32 %r4, %r2, %r3;\ncvt.u64.u32 %rd4, %r3;\nadd.s64 %rd3, %rd1, %rd4;\n"
    read = "ld.shared.v4.u32 {%r20,%r21,%r22,%r23}, [%r4];\nld.shared.v4.u32 {%r24,%r25,%r26,%r27}, [%r4+512];\n"
    b = run(begin + copies + "cp.async.wait_group 1;\n" + read + "cp.async.wait_all;", 32, None, source, out)
    for i in range(4):
        whole = source.reshape(32, 4)[:, i]
        assert np.array_equal(b.register(f"%r2{i}"), whole)
        assert np.array_equal(b.register(f"%r2{4 + i}"), whole if i < 2 else np.zeros(32))
    with pytest.raises(ptxsim.PtxError, match=r"while a cp\.async to it is in flight"):
        run(begin + copies + "cp.async.wait_group 2;\n" + read, 32, None, source, out)
    with pytest.raises(ptxsim.PtxError, match=r"exit with a cp\.async in flight"):
        run(begin + copies + "cp.async.wait_group 1;\n", 32, None, source, out)


@pytest.mark.parametrize("size", [4, 8])
def test_cp_async_of_less_than_16_bytes(size: int) -> None:
    source, out = words(8, 128), np.zeros(128, np.uint32)
    begin = "shl.b32 %r3, %r1, 4;\nadd.s32 %r4, %r2, %r3;\ncvt.u64.u32 %rd4, %r3;\nadd.s64 %rd3, %rd1, %rd4;\n"
    copies = (
        f"cp.async.ca.shared.global [%r4], [%rd3], {size}, {size};\n"
        f"cp.async.ca.shared.global [%r4+512], [%rd3], {size}, 0;\ncp.async.wait_all;\n"
    )
    last = size - 4
    read = f"ld.shared.u32 %r20, [%r4+{last}];\nld.shared.u32 %r21, [%r4+{512 + last}];\n"
    b = run(begin + copies + read, 32, None, source, out)
    assert np.array_equal(b.register("%r20"), source.reshape(32, 4)[:, last // 4])
    assert not b.register("%r21").any()
    with pytest.raises(ptxsim.PtxError, match="nobody wrote"):
        run(begin + copies + f"ld.shared.u32 %r20, [%r4+{size}];", 32, None, source, out)


@pytest.mark.parametrize(
    "op",
    [
        f"shfl.sync.bfly.b32 %r3, %r1, 1, 31, {ALL};",
        f"vote.sync.any.pred %p2, %p1, {ALL};",
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r20,%r21,%r22,%r23}, [%r2];",
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r20,%r21,%r22,%r23}, {%r20,%r21,%r22,%r23}, {%r20,%r21}, "
        "{%r20,%r21,%r22,%r23};",
    ],
)
def test_half_a_warp_is_an_error(op: str) -> None:
    with pytest.raises(ptxsim.PtxError, match="a warp has diverged here"):
        run(f"setp.lt.u32 %p1, %r1, 16;\n@%p1 {op}")


@pytest.mark.parametrize(
    "op",
    [
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f0,%f1,%f2,%f3}, {%r1,%r1,%r1,%r1}, {%r1,%r1}, "
        "{%f0,%f1,%f2,%f3};",
        f"vote.sync.most.pred %p2, %p1, {ALL};",
        "vote.sync.any.pred %p2, %p1, 1;",
        "cp.async.bulk.wait_group 0;",
        "cvt.f16.bf16 %rs1, %rs2;",
        "fma.rn.f64 %rd1, %rd1, %rd1, %rd1;",
        "bfi.b64 %rd1, %rd1, %rd1, 1, 1;",
    ],
)
def test_what_is_not_known_stops_with_its_name(op: str) -> None:
    with pytest.raises(
        ptxsim.PtxError, match=op.split(" ")[0].replace(".", r"\.") + ".*that tests/ptxsim does not know"
    ):
        run(op)


# ---- each thread for itself


def test_bfi() -> None:
    a, into = words(7), words(8)
    got = run("bfi.b32 %r3, %r100, %r101, 4, 12;", registers={"%r100": a, "%r101": into}).register("%r3")
    field = np.uint32(0xFFF0)
    assert np.array_equal(got, into & ~field | a << np.uint32(4) & field)


def test_fma_of_bf16_pairs() -> None:
    """Subnormals and all."""
    bits = [words(s) for s in (9, 10, 11)]
    bits[0][:8] &= 0x007F007F
    a, b, c = (torch.from_numpy(v.view(np.int16)).view(torch.bfloat16).double() for v in bits)
    want = (a * b + c).float().bfloat16()
    given = {f"%r10{i}": v for i, v in enumerate(bits)}
    got = run("fma.rn.bf16x2 %r3, %r100, %r101, %r102;", registers=given).register("%r3")
    torch.testing.assert_close(
        torch.from_numpy(got.view(np.int16)).view(torch.bfloat16), want, rtol=0, atol=0, equal_nan=True
    )


def test_conversions_of_bf16() -> None:
    v = np.concatenate([words(12, 28), np.array([0x3F808000, 0x3F818000, 0x7F800000, 0x7F7FFFFF], np.uint32)])
    want = torch.from_numpy(v.view(np.float32)).bfloat16()
    b = run("cvt.rn.bf16.f32 %rs1, %f1;\ncvt.f32.bf16 %f2, %rs1;", registers={"%f1": v})
    got = torch.from_numpy(b.register("%rs1").view(np.int16)).view(torch.bfloat16)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    back = torch.from_numpy(b.register("%f2").view(np.float32))
    torch.testing.assert_close(back, want.float(), rtol=0, atol=0, equal_nan=True)


# ---- what a kernel is given


def test_parameters_are_read_through_their_address_too() -> None:
    source = words(13, 4)
    b = run(
        "mov.b64 %rd4, k_param_1;\nld.param.u64 %rd5, [%rd4+0];\nld.global.u32 %r3, [%rd5+8];",
        32,
        None,
        words(1),
        source,
    )
    assert (b.register("%r3") == source[2]).all()


def test_a_kernel_has_no_other_kernels_shared_memory() -> None:
    def entry(name: str, variable: str) -> str:
        return f".visible .entry {name}()\n{{\n.reg .b32 %r<3>;\nmov.u32 %r1, {variable};\nret;\n}}\n"

    declared = ".shared .align 16 .b8 first[64];\n.shared .align 16 .b8 first_more[32];\n"
    kernels = ptxsim.program.parse(declared + entry("a", "first") + entry("b", "first_more"))
    assert kernels["a"].shared == {"first": (64, 16)} and kernels["b"].shared == {"first_more": (32, 16)}
