"""The interpreter of PTX on Hopper's instructions: products of warpgroups, mbarriers, bulk copies. What they compute,
against NumPy, and what it must not let pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from . import ptxsim
from .test_ptxsim import ALL, run, words

T = np.arange(128)
COLUMNS = 24  # of B
D = ",".join(f"%f{i}" for i in range(COLUMNS // 2))
FILL = "shl.b32 %r3, %r1, 5;\nadd.s32 %r4, %r2, %r3;\nst.shared.v4.u32 [%r4], {%r100,%r101,%r102,%r103};\n" \
       "st.shared.v4.u32 [%r4+16], {%r104,%r105,%r106,%r107};\n"  # fmt: skip
SEEN = "fence.proxy.async.shared::cta;\nbar.sync 0;\n"
FENCE, COMMIT = "wgmma.fence.sync.aligned;\n", "wgmma.commit_group.sync.aligned;\n"
WAIT = "wgmma.wait_group.sync.aligned 0;\n"


def product(kind: str = "f16", add: int = 1, more: str = "1, 1, 0", source: str = "%rd5") -> str:
    return (
        f"setp.ne.b32 %p1, {add}, 0;\nwgmma.mma_async.sync.aligned.m64n{COLUMNS}k16.f32.{kind}.{kind} {{{D}}}, "
        f"{{%r110,%r111,%r112,%r113}}, {source}, %p1, {more};\n"
    )


def halves(v: NDArray, kind: str) -> NDArray:
    """Bits."""
    t = torch.from_numpy(v.astype(np.float32)).to({"f16": torch.float16, "bf16": torch.bfloat16}[kind])
    return t.view(torch.int16).numpy().view(np.uint16)


def descriptor(start: int, leading: int, stride: int, mode: int) -> int:
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | mode << 62


# mode, where B starts, from k = 0 to k = 8, from column 0 to column 8; the start is inside a swizzled row in two
LAYOUTS = ((0, 128, 1024, 128), (0, 512, 128, 256), (1, 64, 16, 1024), (2, 32, 16, 512), (3, 0, 16, 256))


def place(layout: tuple[int, int, int, int], n: NDArray, k: NDArray) -> NDArray:
    """Of B's column n and k: rows of 16, 128, 64 or 32 bytes, whose 16-byte chunks change places in a pattern that
    repeats after 1024, 512 or 256 bytes."""
    mode, start, leading, stride = layout
    if mode == 0:
        return start + k // 8 * leading + n // 8 * stride + n % 8 * 16 + k % 8 * 2
    chunk = start // 16 + k // 8
    moved = chunk ^ {1: n % 8, 2: n // 2 % 4, 3: n // 4 % 2}[mode]
    return n // 8 * stride + n % 8 * {1: 128, 2: 64, 3: 32}[mode] + moved * 16 + k % 8 * 2


def operands(kind: str, layout: tuple[int, int, int, int]) -> tuple[dict[str, NDArray], NDArray, NDArray]:
    """Registers that hold A, an image of shared memory with B, D and the descriptor; A B, and D before."""
    rng = np.random.default_rng(3)
    left, right = rng.integers(-8, 9, (64, 16)), rng.integers(-8, 9, (16, COLUMNS))
    start = rng.integers(-8, 9, (64, COLUMNS)).astype(np.float32)
    image = halves(rng.integers(-8, 9, 2048), kind)
    n, k = np.meshgrid(np.arange(COLUMNS), np.arange(16))
    image[place(layout, n, k) // 2] = halves(right, kind)
    pieces = image.view(np.uint32).reshape(128, 8)
    given = {f"%r10{i}": pieces[:, i].copy() for i in range(8)}
    g, c, warp = T % 32 // 4, T % 4, T // 32
    for r in range(4):
        row, at = 16 * warp + g + 8 * (r % 2), 2 * c + 8 * (r // 2)
        pair = [halves(left[row, at + o], kind).astype(np.uint32) for o in range(2)]
        given[f"%r11{r}"] = pair[0] | pair[1] << np.uint32(16)
    for i in range(COLUMNS // 2):
        given[f"%f{i}"] = start[16 * warp + g + 8 * (i // 2 % 2), i // 4 * 8 + 2 * c + i % 2]
    given["%rd5"] = np.full(128, descriptor(layout[1], layout[2], layout[3], layout[0]), np.uint64)
    return given, (left @ right).astype(np.float32), start


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_wgmma(kind: str, layout: tuple[int, int, int, int]) -> None:
    given, ab, start = operands(kind, layout)
    for add in (0, 1):
        b = run(FILL + SEEN + FENCE + product(kind, add) + product(kind) + COMMIT + WAIT, 128, given)
        want = 2 * ab + add * start
        for i in range(COLUMNS // 2):
            row, column = 16 * (T // 32) + T % 32 // 4 + 8 * (i // 2 % 2), i // 4 * 8 + 2 * (T % 4) + i % 2
            assert np.array_equal(b.register(f"%f{i}").view(np.float32), want[row, column])


def test_two_warpgroups() -> None:
    """Each for itself, on the same B; and a fifth warp that has no part in it."""
    given, ab, _ = operands("f16", LAYOUTS[0])
    both = {name: np.concatenate([v, v, v[:32]]) for name, v in given.items()}
    fill = "setp.lt.u32 %p2, %r1, 128;\n@!%p2 bra FILLED;\n" + FILL + "FILLED:\n"
    work = "setp.ge.u32 %p3, %r1, 256;\n@%p3 bra OUT;\n" + FENCE + product(add=0) + COMMIT + WAIT + "OUT:\n"
    b = run(fill + SEEN + work, 288, both)
    got = b.register("%f0").view(np.float32)
    for g in (0, 128):
        assert np.array_equal(got[g : g + 128], ab[16 * (T // 32) + T % 32 // 4, 2 * (T % 4)])
    assert np.array_equal(got[256:], both["%f0"][256:])


READ = "add.f32 %f50, %f3, %f3;\n"
LATE = "setp.eq.u32 %p2, %r1, 40;\n@%p2 st.shared.u32 [%r2+128], %r1;\n"  # of one thread, to B
FIRST = FILL + SEEN + FENCE + product() + COMMIT


@pytest.mark.parametrize(
    "body, error",
    [
        (FIRST + READ + WAIT, r"add\.f32: reads %f3 while a wgmma may still write it: no wgmma\.wait_group since"),
        (FIRST + "mov.f32 %f50, %f3;\nadd.f32 %f51, %f50, %f50;\n" + WAIT, "add.*reads %f50 while a wgmma"),
        (FIRST + FENCE + product() + COMMIT + WAIT.replace(" 0", " 1") + READ, "reads %f3 while a wgmma"),
        (FIRST + "mov.f32 %f3, 0f00000000;\n" + WAIT, "writes %f3 while a wgmma may still use it"),
        (FIRST + "mov.u32 %r112, 0;\n" + WAIT, "writes %r112 while a wgmma may still use it"),
        (FIRST + "st.shared.u32 [%r4], %r1;\n" + WAIT, r"writes shared byte \d+ while a wgmma may still read it"),
        (FIRST + "bar.sync 0;\n" + WAIT + LATE, r"st\.shared.*race on shared byte 128"),
        (FILL + SEEN + product() + COMMIT + WAIT, r"%f0 was written, and no wgmma\.fence since"),
        (FIRST + WAIT + "mov.u32 %r112, 0;\n" + product() + COMMIT + WAIT, "%r112 was written, and no wgmma"),
        (FIRST + WAIT + "mov.f32 %f3, %f50;\n" + product() + COMMIT + WAIT, "%f3 was written, and no wgmma"),
        (FILL + "bar.sync 0;\n" + FENCE + product(), r"was written by a thread, and no fence\.proxy\.async since"),
        (FILL + "fence.proxy.async;\n" + FENCE + product(), "wgmma.*race on shared byte"),
        ("setp.lt.u32 %p2, %r1, 96;\n@%p2 " + FENCE, "wgmma.fence.*a warpgroup has diverged here"),
        (FIRST, "exit with a wgmma in flight"),
        (FILL + SEEN + FENCE + product() + WAIT, "exit with a wgmma in flight"),
        (FILL + SEEN + "add.s64 %rd5, %rd5, 250;\n" + FENCE + product(), "B reaches out of shared memory"),
        (FILL + SEEN + "cvt.u64.u32 %rd6, %r1;\nadd.s64 %rd5, %rd5, %rd6;\n" + FENCE + product(), "disagree about"),
        (FILL + SEEN + FENCE + product(more="1, -1, 0"), "a shape, type or mode that tests/ptxsim does not know"),
        (FILL + SEEN + FENCE + product("tf32"), "a shape, type or mode that tests/ptxsim does not know"),
    ],
)  # fmt: skip
def test_wgmma_must_be_ordered(body: str, error: str) -> None:
    with pytest.raises(ptxsim.PtxError, match=error):
        run(body, 128, operands("f16", LAYOUTS[0])[0])


def test_what_is_ordered_passes() -> None:
    """A move is no use: nvcc writes some that never reach the hardware. One group may fly while another is made."""
    other = product().replace("%r11", "%r12")
    ready = "mov.u32 %r120, 1;\nmov.u32 %r121, 1;\nmov.u32 %r122, 1;\nmov.u32 %r123, 1;\n"
    given = operands("f16", LAYOUTS[0])[0]
    begun = FIRST + ready + FENCE + other + COMMIT + WAIT.replace(" 0", " 1")
    b = run(begun + "mov.u32 %r112, 0;\nmov.f32 %f50, %f3;\n" + WAIT + READ.replace("%f3", "%f50"), 128, given)
    assert np.array_equal(b.register("%f50").view(np.float32), 2 * b.register("%f3").view(np.float32))


# ---- mbarriers and bulk copies: warp 1 copies for warp 0, which gives each buffer back

BARRIERS = "setp.ne.u32 %p1, %r1, 0;\n@%p1 bra MADE;\nmbarrier.init.shared::cta.b64 [%r2+4000], 1;\n" \
           "mbarrier.init.shared::cta.b64 [%r2+4008], 1;\nfence.proxy.async;\nMADE:\nbar.sync 0;\n" \
           "setp.ge.u32 %p2, %r1, 32;\n@%p2 bra COPY;\n"  # fmt: skip
OVER = "bra OUT;\nCOPY:\nsetp.ne.u32 %p1, %r1, 32;\n@%p1 bra OUT;\n"


def wait(barrier: int, parity: int, name: str) -> str:
    return f"{name}:\nmbarrier.try_wait.parity.shared::cta.b64 %p3, [%r2+{barrier}], {parity};\n@!%p3 bra {name};\n"


def copy(source: int, size: int = 256, expect: int = 256) -> str:
    return (
        f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2+4000], {expect};\nadd.s64 %rd3, %rd1, {source};\n"
        f"cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%rd3], {size}, [%r2+4000];\n"
    )


def read(register: str) -> str:
    return f"shl.b32 %r3, %r1, 3;\nadd.s32 %r4, %r2, %r3;\nld.shared.u32 {register}, [%r4];\n"


BACK = f"bar.warp.sync {ALL};\n@!%p1 mbarrier.arrive.shared::cta.b64 _, [%r2+4008];\n"
TAKE = wait(4000, 0, "A") + read("%r20") + BACK + wait(4000, 1, "B") + read("%r21")
GIVE = copy(0) + wait(4008, 0, "C") + copy(256) + "OUT:\n"


def test_mbarrier_and_bulk_copies() -> None:
    source = words(5, 128)
    b = run(BARRIERS + TAKE + OVER + GIVE, 64, None, source)
    for name, half in (("%r20", source[:64]), ("%r21", source[64:])):
        assert np.array_equal(b.register(name)[:32], half[::2])


@pytest.mark.parametrize(
    "body, error",
    [
        (BARRIERS + TAKE + OVER + copy(0) + "ld.shared.u32 %r20, [%r2];\nOUT:\n", r"while a cp\.async to it is in"),
        (BARRIERS + TAKE + OVER + copy(0) + copy(256) + "OUT:\n", "1 arrivals at a barrier that waits for 0"),
        (BARRIERS + TAKE + OVER + GIVE.replace("4008", "4000"), "cp.async.bulk.*race on shared byte"),
        (BARRIERS + TAKE.replace(BACK, BACK[BACK.index("@") :]) + OVER + GIVE, "cp.async.bulk.*race on shared byte"),
        (BARRIERS + TAKE.replace(BACK, "") + OVER + GIVE, "all threads wait: .* lacks 1 arrivals and 0 bytes"),
        (BARRIERS + TAKE + OVER + GIVE.replace("], 256;", "], 272;"), "all threads wait: .* 0 arrivals and 16 bytes"),
        (BARRIERS + TAKE + OVER + copy(0, 250) + "OUT:\n", "250 bytes .* wanted multiples of 16"),
        (BARRIERS + TAKE + OVER + copy(8) + "OUT:\n", "256 bytes from .* wanted multiples of 16"),
        (BARRIERS + TAKE + OVER + copy(384) + "OUT:\n", "out of bounds"),
        (BARRIERS.replace("fence.proxy.async;\n", "") + TAKE + OVER + GIVE, "is not there for copies: no fence.proxy"),
        (BARRIERS.replace("bar.sync 0;", "") + TAKE + OVER + GIVE, "mbarrier.*race on shared byte"),
        (BARRIERS + BACK.replace("@!%p1 ", "") + OVER + "OUT:\n", "32 arrivals at a barrier that waits for 1"),
        (BARRIERS + OVER + copy(0) + "OUT:\n", r"exit with a cp\.async\.bulk in flight"),
        ("mbarrier.arrive.shared::cta.b64 _, [%r2+4000];", "is no mbarrier that was initialized"),
        ("mbarrier.inval.shared::cta.b64 [%r2];", "that tests/ptxsim does not know"),
        ("fence.acq_rel.gpu;", "that tests/ptxsim does not know"),
    ],
)  # fmt: skip
def test_copies_must_be_waited_for(body: str, error: str) -> None:
    with pytest.raises(ptxsim.PtxError, match=error):
        run(body, 64, None, words(5, 128))
