"""One block of threads: registers, control flow, loads and stores."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .memory import SHARED, Global, Shared, Traffic
from .program import DTYPES, U32, U64, Instruction, Kernel, PtxError

LIMIT = 5_000_000  # instructions of one block: a loop that never ends must not hang the tests

Dim = tuple[int, int, int]
Run = Callable[["Block", Instruction, NDArray], None]
RUN: dict[str, Run] = {}  # first part of an opcode -> how it runs


def opcode(*names: str) -> Callable[[Run], Run]:
    def register(run: Run) -> Run:
        RUN.update(dict.fromkeys(names, run))
        return run

    return register


class Block:
    """All threads together, one array element each; the threads with the lowest program counter go first, so
    that branches meet again."""

    def __init__(
        self,
        kernel: Kernel,
        memory: Global,
        args: list[bytes],
        at: Dim,
        block: Dim,
        grid: Dim,
        dynamic: int,
        cost: Traffic,
    ) -> None:
        self.kernel, self.memory, self.cost = kernel, memory, cost
        count = self.count = block[0] * block[1] * block[2]
        if count % 32:
            raise PtxError(f"a block of {count} threads; wanted a multiple of 32")
        self.t = t = np.arange(count, dtype=U32)
        self.all = np.ones(count, bool)  # compared by identity: the mask of all threads
        self.special = {"%laneid": t % 32, "%warpid": t // 32}
        tid = (t % block[0], t // block[0] % block[1], t // (block[0] * block[1]))
        for axis, name in enumerate("xyz"):
            self.special[f"%tid.{name}"] = tid[axis]
            for key, value in (("ntid", block), ("nctaid", grid), ("ctaid", at)):
                self.special[f"%{key}.{name}"] = np.full(count, value[axis], U32)
        self.params, self.param_at = b"", {}  # all parameters in a row, and where each begins
        for (name, _), value in zip(kernel.params, args, strict=True):
            self.param_at[name] = len(self.params)
            self.params += value
        self.registers: dict[str, NDArray] = {}
        self.constants: dict[tuple[str, str], NDArray] = {}
        end, self.symbols = 0, {}
        for name, (size, align) in sorted(kernel.shared.items(), key=lambda item: item[1][0] == 0):  # dynamic: last
            self.symbols[name] = end = -(-end // align) * align
            end += size
        self.shared = Shared(end + dynamic)
        # cp.async, by group: [threads, destination, source, bytes to read, bytes to write]
        self.open_copies: list[list] = []
        self.copies: list[list[list]] = []
        self.mbarriers: dict[int, Any] = {}  # by address (mbarrier.py)
        self.asleep = np.full(count, -1, np.int64)  # the mbarrier that a thread waits for
        self.products: Any = None  # of a kernel that has any (warpgroup.py)
        self.steps = 0

    # ---- operands

    def register(self, name: str) -> NDArray:
        found = self.registers.get(name)
        if found is None:
            types = self.kernel.registers
            kind = types.get(name) or types[name.rstrip("0123456789")]
            width = np.dtype(DTYPES[kind]).itemsize
            dtype = bool if kind == "pred" else f"u{width}"
            found = self.registers[name] = np.zeros(self.count, dtype)
        return found

    def value(self, arg: str, kind: str) -> NDArray:
        """A register, special register, shared variable's or parameter's address, or number, seen as `kind`."""
        dtype = np.dtype(DTYPES[kind])
        if arg in self.special or arg[0] == "%" or arg in self.kernel.registers:
            v = self.special[arg] if arg in self.special else self.register(arg)
            if kind == "pred":
                return v
            return (v if v.dtype.itemsize == dtype.itemsize else v.astype(f"u{dtype.itemsize}")).view(dtype)
        found = self.constants.get((arg, kind))
        if found is None:
            if arg in self.symbols:
                x = np.array(self.symbols[arg], U64).astype(dtype)
            elif arg in self.param_at:
                x = np.array(self.param_at[arg], U64).astype(dtype)
            elif arg[:2] in ("0f", "0F"):
                x = np.array(int(arg[2:], 16), U32).view(np.float32).astype(dtype)
            elif arg[:2] in ("0d", "0D"):
                x = np.array(int(arg[2:], 16), U64).view(np.float64).astype(dtype)
            else:
                bits = np.array(int(arg.rstrip("U"), 0) & (1 << 64) - 1, U64)
                x = bits.astype(bool if kind == "pred" else f"u{dtype.itemsize}").view(dtype)
            found = self.constants[arg, kind] = np.full(self.count, x)
        return found

    def put(self, name: str, v: NDArray, mask: NDArray) -> None:
        """Writes a register; a wider one is filled by the sign of signed values."""
        r = self.register(name)
        if r.dtype != bool:
            if v.dtype.itemsize != r.dtype.itemsize:
                v = v.astype(f"{'i' if v.dtype.kind == 'i' else 'u'}{r.dtype.itemsize}")
            v = v.view(r.dtype)
        if mask is self.all:
            r[:] = v
        else:
            np.copyto(r, v, where=mask)

    @staticmethod
    def names(arg: str) -> list[str]:
        return [n.strip() for n in arg.strip("{} ").split(",")]

    # ---- control

    def run(self) -> None:
        code, cost = self.kernel.code, self.cost.instructions
        pc, done, waiting = np.zeros(self.count, np.int64), np.zeros(self.count, bool), np.zeros(self.count, bool)
        of_products = self.kernel.registers_of_products
        while not done.all():
            ready = ~(done | waiting | (self.asleep >= 0))
            if not ready.any():
                if (self.asleep >= 0).any():
                    self.land()
                    continue
                waiting[:] = False  # all are at the barrier
                self.shared.epoch += 1
                continue
            at = int(pc[ready].min())
            mask = self.whole(ready & (pc == at))
            while True:
                x = code[at]
                self.steps += 1
                cost[x.op] += 1
                if self.steps > LIMIT:
                    x.fail(f"still running after {LIMIT} instructions")
                m = mask
                if x.guard:
                    truth = self.register(x.guard)
                    m = self.whole(mask & (~truth if x.negated else truth))
                if self.products is not None and at in of_products:
                    self.products.check(x, m, *of_products[at])
                if self.shared.order is not None:
                    self.shared.order.now = self.steps
                at += 1
                first = x.parts[0]
                if first in ("bra", "ret", "exit") or (first in ("bar", "barrier") and "warp" not in x.parts):
                    pc[mask] = at
                    if first == "bra":
                        pc[m] = self.kernel.labels[x.args[-1]]
                    elif first in ("ret", "exit"):
                        done |= m
                    else:
                        if (m != mask).any() or self.splits_a_warp(mask | done):
                            x.fail("threads of one warp disagree about a barrier")
                        waiting |= m
                    break
                run = RUN.get(first)
                if run is None:
                    x.fail("an instruction that tests/ptxsim does not know")
                if m.any():
                    run(self, x, m)
                if x.ends_run:
                    pc[mask] = at
                    break
        if any(c[0].any() for group in [*self.copies, self.open_copies] for c in group):
            raise PtxError("exit with a cp.async in flight")
        if any(barrier.copies for barrier in self.mbarriers.values()):
            raise PtxError("exit with a cp.async.bulk in flight")
        if self.products is not None and self.products.at_exit():
            raise PtxError("exit with a wgmma in flight")

    def land(self) -> None:
        """All that still run wait for mbarriers: only copies can move them."""
        waited = [self.mbarriers[at] for at in np.unique(self.asleep[self.asleep >= 0])]
        if not any([barrier.land(self) for barrier in waited]):
            one = waited[0]
            raise PtxError(
                f"all threads wait: phase {one.phase} of the mbarrier at shared byte {one.at} lacks {one.pending} "
                f"arrivals and {one.bytes} bytes"
            )

    def whole(self, mask: NDArray) -> NDArray:
        return self.all if mask.all() else mask

    def splits_a_warp(self, mask: NDArray) -> bool:
        w = mask.reshape(-1, 32)
        return bool((w.any(1) & ~w.all(1)).any())

    def need_whole_warps(self, x: Instruction, mask: NDArray) -> None:
        if self.splits_a_warp(mask):
            x.fail("a warp has diverged here")

    # ---- memory

    def address(self, arg: str) -> NDArray:
        base, _, offset = arg.strip("[] ").partition("+")
        base = base.strip()
        v = np.full(self.count, self.symbols[base]) if base in self.symbols else self.register(base)
        return v.astype(np.int64) + int(offset or 0)

    def touch(
        self, x: Instruction, space: str, at: NDArray, size: int, mask: NDArray, write: bool
    ) -> Iterator[tuple[NDArray, NDArray, NDArray]]:
        """Checks an access and counts it; (threads, buffer, offsets) for each buffer."""
        threads = np.nonzero(mask)[0]
        at = at[threads]
        if (at % size).any():
            x.fail(f"thread {threads[at % size != 0][0]}: the address is not aligned to {size} bytes")
        generic = at >= SHARED
        if space == "generic" and generic.any():
            if not generic.all():
                x.fail("one access to both shared and global memory")
            space, at = "shared", at - SHARED
        if space == "shared":
            self.cost.count_banks(x, threads, at, size)
            self.shared.check(x, threads, at, size, write)
            yield threads, self.shared.data, at
        else:
            self.cost.count_sectors(x, threads, at, size)
            yield from self.memory.pieces(x, threads, at, size, write)


def space_of(x: Instruction) -> str:
    spaces = [p.split("::")[0] for p in x.parts[1:] if re.match(r"(shared|global|local|const)\b", p)]
    if spaces and spaces[0] in ("local", "const"):
        x.fail(f"{spaces[0]} memory, which tests/ptxsim does not know")
    return spaces[0] if spaces else "generic"


def vector_of(x: Instruction) -> int:
    return 4 if "v4" in x.parts else 2 if "v2" in x.parts else 1


@opcode("ld", "ldu")
def load(b: Block, x: Instruction, m: NDArray) -> None:
    dtype, count = np.dtype(DTYPES[x.type]), vector_of(x)
    if "param" in x.parts:
        name, _, offset = x.args[1].strip("[] ").partition("+")
        at = b.param_at[name] if name in b.param_at else int(b.register(name)[m][0])
        v = np.frombuffer(b.params, dtype, count, at + int(offset or 0))
        out = np.broadcast_to(v, (b.count, count))
    else:
        size = dtype.itemsize * count
        out = np.zeros((b.count, count), dtype)
        for threads, buffer, at in b.touch(x, space_of(x), b.address(x.args[1]), size, m, False):
            out[threads] = buffer[at[:, None] + np.arange(size)].view(dtype)
    for i, name in enumerate(b.names(x.args[0])):
        b.put(name, np.ascontiguousarray(out[:, i]), m)


@opcode("st")
def store(b: Block, x: Instruction, m: NDArray) -> None:
    size = np.dtype(DTYPES[x.type]).itemsize * vector_of(x)
    v = np.stack([b.value(name, x.type) for name in b.names(x.args[1])], 1)
    for threads, buffer, at in b.touch(x, space_of(x), b.address(x.args[0]), size, m, True):
        buffer[at[:, None] + np.arange(size)] = v[threads].view(np.uint8).reshape(len(threads), size)


@opcode("cvta")
def convert_address(b: Block, x: Instruction, m: NDArray) -> None:
    v = b.value(x.args[1], "u64")
    if space_of(x) == "shared":
        v = v - U64(SHARED) if "to" in x.parts else v + U64(SHARED)
    b.put(x.args[0], v, m)


@opcode("mov")
def move(b: Block, x: Instruction, m: NDArray) -> None:
    to, source = x.args
    if source[0] == "{":  # several registers into one
        names = b.names(source)
        v = np.stack([b.value(n, f"b{8 * np.dtype(DTYPES[x.type]).itemsize // len(names)}") for n in names], 1)
        b.put(to, v.view(DTYPES[x.type]).reshape(-1), m)
    elif to[0] == "{":
        names, v = b.names(to), np.ascontiguousarray(b.value(source, x.type))
        parts = v.view(f"u{v.dtype.itemsize // len(names)}").reshape(b.count, len(names))
        for i, name in enumerate(names):
            b.put(name, np.ascontiguousarray(parts[:, i]), m)
    else:
        b.put(to, b.value(source, x.type), m)
