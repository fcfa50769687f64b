"""Instructions of a whole warp, and asynchronous copies."""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from .block import Block, opcode
from .mbarrier import copy_bulk
from .program import DTYPES, U32, Instruction

LANE = np.arange(32)


@opcode("shfl")
def shuffle(b: Block, x: Instruction, m: NDArray) -> None:
    b.need_whole_warps(x, m)
    v = b.value(x.args[1], "b32").reshape(-1, 32)
    by = b.value(x.args[2], "u32").reshape(-1, 32).astype(int)
    source = {"bfly": LANE ^ by, "down": LANE + by, "up": LANE - by, "idx": by}[x.parts[2]]
    inside = (source >= 0) & (source < 32)
    b.put(x.args[0].split("|")[0], np.take_along_axis(v, np.where(inside, source, LANE), 1).ravel(), m)


@opcode("bar", "barrier")  # those of a warp: the others are Block.run's
def meet(b: Block, x: Instruction, m: NDArray) -> None:
    """Orders nothing here but what a lane's arrival at an mbarrier tells: to the search for races, threads of one warp
    are like any others."""
    b.need_whole_warps(x, m)
    if b.shared.order is not None:
        b.shared.order.meet(m)


@opcode("vote")
def vote(b: Block, x: Instruction, m: NDArray) -> None:
    b.need_whole_warps(x, m)
    if x.parts[1] != "sync" or (b.value(x.args[-1], "u32") != U32(0xFFFFFFFF)).any():
        x.fail("a vote of less than a warp, that tests/ptxsim does not know")
    v = b.value(x.args[1].lstrip("!"), "pred").reshape(-1, 32)
    v = ~v if x.args[1][0] == "!" else v
    how = x.parts[2]
    if how == "ballot":
        b.put(x.args[0], np.repeat((v.astype(np.uint64) << LANE.astype(np.uint64)).sum(1).astype(U32), 32), m)
    elif how in ("all", "any", "uni"):
        one = {"all": v.all(1), "any": v.any(1), "uni": v.all(1) | ~v.any(1)}[how]
        b.put(x.args[0], np.repeat(one, 32), m)
    else:
        x.fail("a vote that tests/ptxsim does not know")


@opcode("cp")
def copy_async(b: Block, x: Instruction, m: NDArray) -> None:
    form = ".".join(x.parts[:3])
    if form == "cp.async.bulk":
        copy_bulk(b, x, m)
    elif form == "cp.async.commit_group":
        b.copies.append(b.open_copies)
        b.open_copies = []
    elif form in ("cp.async.wait_group", "cp.async.wait_all"):
        if form.endswith("all"):
            b.copies.append(b.open_copies)
            b.open_copies = []
        keep = int(x.args[0]) if x.args else 0
        for group in b.copies[: len(b.copies) - keep]:
            for c in group:
                _complete(b, x, c, m)
        # a group that other threads still have to wait for stays
        b.copies = [g for i, g in enumerate(b.copies) if i >= len(b.copies) - keep or any(c[0].any() for c in g)]
    elif x.parts[1] == "async" and len(x.args) >= 3:
        size = int(x.args[2])
        given = b.value(x.args[3], "u32").astype(np.int64) if len(x.args) > 3 else np.full(b.count, size)
        to, source = b.address(x.args[0]), b.address(x.args[1])
        if (m & (given > 0)).any():  # checks the source now
            list(b.touch(x, "global", source, size, m & (given > 0), False))
        for threads, _, at in b.touch(x, "shared", to, size, m, True):
            b.shared.in_flight[at[:, None] + np.arange(size)] = threads[:, None]
        b.open_copies.append([m.copy(), to, source, given, size])
    else:
        x.fail("an instruction that tests/ptxsim does not know")


def _complete(b: Block, x: Instruction, copy: list, m: NDArray) -> None:
    mask, to, source, given, size = copy
    threads = np.nonzero(mask & m)[0]
    if not len(threads):
        return
    data = np.zeros((b.count, size), np.uint8)
    reads = threads[given[threads] > 0]
    for some, buffer, at in b.memory.pieces(x, reads, source[reads], size, False):
        data[some] = buffer[at[:, None] + np.arange(size)]
    data[np.arange(size) >= given[:, None]] = 0
    places = to[threads][:, None] + np.arange(size)
    b.shared.in_flight[places] = -1
    b.shared.data[places] = data[threads]
    b.shared.wrote(places, threads[:, None])
    copy[0] = mask & ~m


@opcode("ldmatrix")
def load_matrix(b: Block, x: Instruction, m: NDArray) -> None:
    b.need_whole_warps(x, m)
    count = int(next(p[1:] for p in x.parts if re.fullmatch(r"x[124]", p)))
    rows = np.zeros((b.count, 16), np.uint8)
    for threads, buffer, at in b.touch(x, "shared", b.address(x.args[1]), 16, m & (b.t % 32 < 8 * count), False):
        rows[threads] = buffer[at[:, None] + np.arange(16)]
    matrices = rows.view(np.uint16).reshape(-1, 4, 8, 8)  # warp, matrix, row, column
    if "trans" in x.parts:
        matrices = matrices.swapaxes(2, 3)
    for i, name in enumerate(b.names(x.args[0])):
        b.put(name, np.ascontiguousarray(matrices[:, i]).view(U32).reshape(-1), m)


def _fragment(b: Block, names: list[str], dtype: type) -> NDArray:
    """Registers of a fragment as [warp, lane, register, element]."""
    v = np.stack([b.register(n) for n in names], 1)
    return v.view(dtype).reshape(-1, 32, len(names), 4 // np.dtype(dtype).itemsize)


@opcode("mma")
def multiply_matrices(b: Block, x: Instruction, m: NDArray) -> None:
    b.need_whole_warps(x, m)
    shape, kind = x.parts[3], x.parts[7]
    d, a, c, e = (b.names(o) for o in x.args)
    if shape == "m16n8k16" and kind == "f16":
        left, right = (_fragment(b, o, np.float16).astype(np.float32) for o in (a, c))
    elif shape == "m16n8k16" and kind == "bf16":
        left, right = ((_fragment(b, o, np.uint16).astype(U32) << U32(16)).view(np.float32) for o in (a, c))
    elif shape == "m16n8k32" and kind in ("s8", "u8"):
        left = _fragment(b, a, DTYPES[kind]).astype(np.int64)
        right = _fragment(b, c, DTYPES[x.parts[8]]).astype(np.int64)
    else:
        x.fail("a shape or type that tests/ptxsim does not know")
    each, depth = left.shape[3], 8 * left.shape[3]
    warps, group, lane = len(left), LANE // 4, LANE % 4
    full_left = np.zeros((warps, 16, depth), left.dtype)
    full_right = np.zeros((warps, depth, 8), right.dtype)
    for i in range(each):
        for r in range(4):
            full_left[:, group + 8 * (r & 1), each * lane + i + depth // 2 * (r >> 1)] = left[:, :, r, i]
        for r in range(2):
            full_right[:, each * lane + i + depth // 2 * r, group] = right[:, :, r, i]
    product = np.matmul(full_left, full_right)
    out = np.float32 if left.dtype == np.float32 else np.int32
    results = [
        b.register(e[r]).view(out) + product[:, group + 8 * (r >> 1), 2 * lane + (r & 1)].reshape(-1).astype(out)
        for r in range(4)
    ]
    for name, v in zip(d, results, strict=True):  # after all are computed: d may be e
        b.put(name, v, m)
