"""Matrix products of a warpgroup: four warps, which go on while their registers and shared memory are read."""

from __future__ import annotations

import re
from collections import defaultdict

import numpy as np
from numpy.typing import NDArray

from .block import Block, opcode
from .program import U32, Instruction

LANE = np.arange(32)
GROUP, IN_GROUP = LANE // 4, LANE % 4
PITCH = {0: 16, 1: 128, 2: 64, 3: 32}  # a descriptor's mode -> bytes from row to row of eight


class Products:
    """What a block's products hold. Numbers of groups count each warpgroup's commits."""

    def __init__(self, b: Block) -> None:
        self.b = b
        none = lambda: np.full(b.count, -1)  # noqa: E731
        self.written_by: defaultdict[str, NDArray] = defaultdict(none)  # register -> group, by thread; -1: by none
        self.read_by: defaultdict[str, NDArray] = defaultdict(none)
        self.unfenced = np.ones(b.count, bool)  # no wgmma.fence yet
        self.touched: defaultdict[str, NDArray] = defaultdict(self.unfenced.copy)  # since wgmma.fence
        warpgroups = -(-b.count // 128)
        self.group, self.done = np.zeros(warpgroups, int), np.full(warpgroups, -1)  # the open one, and the last done
        b.shared.products = np.zeros((warpgroups, len(b.shared.data)), np.int16)
        self.places: list[dict[int, list[NDArray]]] = [defaultdict(list) for _ in range(warpgroups)]

    def of(self, x: Instruction, m: NDArray) -> list[int]:
        """The warpgroups that run an instruction, all of each."""
        if self.b.count % 128 and m[self.b.count // 128 * 128 :].any():
            x.fail("fewer than four warps")
        groups = m[: self.b.count // 128 * 128].reshape(-1, 128)
        if (groups.any(1) & ~groups.all(1)).any():
            x.fail("a warpgroup has diverged here")
        return list(np.nonzero(groups.any(1))[0])

    def check(self, x: Instruction, m: NDArray, reads: list[str], writes: list[str]) -> None:
        """An instruction other than a product comes by these registers. A move of one is no use of it."""
        moved = x.parts[0] == "mov" and len(reads) == 1
        for name in reads:
            if not moved and (self.written_by[name][m] >= 0).any():
                x.fail(f"reads {name} while a wgmma may still write it: no wgmma.wait_group since")
        for name in writes:
            if (self.written_by[name][m] >= 0).any() or (self.read_by[name][m] >= 0).any():
                x.fail(f"writes {name} while a wgmma may still use it: no wgmma.wait_group since")
            self.touched[name][m] = self.touched[reads[0]][m] if moved else True
            if moved:
                self.written_by[name][m] = self.written_by[reads[0]][m]

    def fence(self, groups: list[int]) -> None:
        for g in groups:
            for state in (self.unfenced, *self.touched.values()):
                state[128 * g : 128 * g + 128] = False

    def wait(self, groups: list[int], flying: int) -> None:
        for g in groups:
            self.done[g] = max(self.done[g], self.group[g] - 1 - flying)
            mine = slice(128 * g, 128 * g + 128)
            for state in (*self.written_by.values(), *self.read_by.values()):
                part = state[mine]
                part[part <= self.done[g]] = -1
            for group in [n for n in self.places[g] if n <= self.done[g]]:
                for places in self.places[g].pop(group):
                    self.b.shared.products[g, places] -= 1
                    self.note(g, places)

    def note(self, g: int, places: NDArray) -> None:
        """Shared memory has been read, up to now."""
        shared = self.b.shared
        shared.reader[places], shared.read_epoch[places] = -2, shared.epoch
        if shared.order is not None:
            for warp in range(4 * g, 4 * g + 4):
                shared.order.record(places, np.full(len(places), 32 * warp), False)

    def multiply(self, x: Instruction, g: int, d: list[str], a: list[str], places: NDArray) -> None:
        """Checks and takes what a product uses. places [columns, 16, 2]: bytes of B."""
        mine = slice(128 * g, 128 * g + 128)
        for name in (*d, *a):
            if self.touched[name][mine].any():
                x.fail(f"{name} was written, and no wgmma.fence since")
        for name in a:
            if (self.written_by[name][mine] >= 0).any():
                x.fail(f"reads {name} while a wgmma may still write it: no wgmma.wait_group since")
            self.read_by[name][mine] = self.group[g]
        for name in d:
            self.written_by[name][mine] = self.group[g]
        flat, shared = places.ravel(), self.b.shared
        if (flat < 0).any() or (flat >= len(shared.data)).any():
            x.fail(f"B reaches out of shared memory: bytes {flat.min()} to {flat.max()} of {len(shared.data)}")
        if shared.generic[flat].any():
            x.fail(
                f"shared byte {flat[shared.generic[flat]][0]} was written by a thread, and no fence.proxy.async since"
            )
        for warp in range(4 * g, 4 * g + 4):
            shared.check(x, np.full(len(flat) // 2, 32 * warp), flat[::2], 2, False)
        shared.products[g, flat] += 1
        self.places[g][int(self.group[g])].append(flat)

    def at_exit(self) -> bool:
        return any(self.places)


def places_of(x: Instruction, descriptor: int, columns: int) -> NDArray:
    """Bytes of B [columns, 16 of k, 2] in shared memory, k-major, where a descriptor says they are."""
    start, leading, stride = ((descriptor >> bit & 0x3FFF) << 4 for bit in (0, 16, 32))
    mode = descriptor >> 62
    if descriptor & ~(0x3FFF | 0x3FFF << 16 | 0x3FFF << 32 | 3 << 62):
        x.fail(f"the descriptor {descriptor:#x} has bits set that tests/ptxsim does not know")
    n, k = np.arange(columns)[:, None], np.arange(16)
    deep = k // 8 * (leading if mode == 0 else 16)
    at = start + n // 8 * stride + n % 8 * PITCH[mode] + deep + k % 8 * 2
    wide = {0: 0, 1: 7, 2: 3, 3: 1}[mode]
    at = at ^ (at >> 7 & wide) << 4
    return at[:, :, None] + np.arange(2)


@opcode("wgmma")
def products(b: Block, x: Instruction, m: NDArray) -> None:
    if b.products is None:
        b.products = Products(b)
    state, how = b.products, x.parts[1]
    groups = state.of(x, m)
    if how == "fence":
        state.fence(groups)
    elif how == "commit_group":
        state.group[groups] += 1
    elif how == "wait_group":
        state.wait(groups, int(x.args[0]))
    elif how == "mma_async":
        shape = re.fullmatch(r"m64n(\d+)k16", x.parts[4])
        kind = x.parts[6]
        d, a, descriptor, add, *how = x.args
        if not shape or kind not in ("f16", "bf16") or x.parts[5] != "f32" or a[0] != "{" or how != ["1", "1", "0"]:
            x.fail("a shape, type or mode that tests/ptxsim does not know")
        for g in groups:
            _multiply(b, x, g, b.names(d), b.names(a), descriptor, add, int(shape[1]), kind)
    else:
        x.fail("an instruction that tests/ptxsim does not know")


def _multiply(
    b: Block, x: Instruction, g: int, d: list[str], a: list[str], descriptor: str, add: str, columns: int, kind: str
) -> None:
    mine = slice(128 * g, 128 * g + 128)
    given, adds = b.value(descriptor, "u64")[mine], b.value(add, "pred")[mine]
    if (given != given[0]).any() or (adds != adds[0]).any():
        x.fail("threads of a warpgroup disagree about the descriptor, or whether to add")
    if len(d) != columns // 2 or len(a) != 4:
        x.fail(f"{len(d)} and {len(a)} registers; wanted {columns // 2} and 4")
    places = places_of(x, int(given[0]), columns)
    b.products.multiply(x, g, d, a, places)

    def floats(bits: NDArray) -> NDArray:
        if kind == "f16":
            return bits.view(np.float16).astype(np.float32)
        return (bits.view(np.uint16).astype(U32) << U32(16)).view(np.float32)

    left = np.zeros((4, 16, 16), np.float32)  # warp, row, k
    for r, name in enumerate(a):
        pair = floats(np.ascontiguousarray(b.register(name)[mine])).reshape(4, 32, 2)
        for o in range(2):
            left[:, GROUP + 8 * (r & 1), 2 * IN_GROUP + o + 8 * (r >> 1)] = pair[:, :, o]
    right = floats(np.ascontiguousarray(b.shared.data[places])).reshape(columns, 16)
    product = left @ right.T
    for i, name in enumerate(d):
        register = b.register(name)[mine].view(np.float32)
        value = product[:, GROUP + 8 * (i // 2 % 2), i // 4 * 8 + 2 * IN_GROUP + i % 2].reshape(-1)
        register[:] = register + value if adds[0] else value


@opcode("fence")
def fence(b: Block, x: Instruction, m: NDArray) -> None:
    if x.parts[1:3] != ["proxy", "async"]:
        x.fail("a fence that tests/ptxsim does not know")
    b.shared.generic &= ~np.isin(b.shared.writer, np.nonzero(m)[0])
