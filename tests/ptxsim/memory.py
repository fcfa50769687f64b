"""Memory that checks every access: bounds, alignment, who wrote a byte, and who else is at it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .order import Order
from .program import Instruction

SHARED = 1 << 60  # generic addresses of shared memory start here
GAP = 1 << 32  # between arrays, so that no stray address meets another array


@dataclass
class Traffic:
    """What a launch cost, in warps' instructions and memory transactions: [actual, ideal] by (line, op)."""

    instructions: Counter[str] = field(default_factory=Counter)  # a block's, by opcode
    banks: defaultdict[tuple[str, str], list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0]))
    sectors: defaultdict[tuple[str, str], list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0]))

    def count_banks(self, x: Instruction, threads: NDArray, at: NDArray, size: int) -> None:
        """A warp's access goes in phases of 128 bytes; each further word of a bank costs a wavefront."""
        per_phase = 128 // size if size > 4 else 32
        total = self.banks[x.where, x.op]
        for phase in np.unique(threads // per_phase):
            mine = at[threads // per_phase == phase]
            words = np.unique((mine[:, None] // 4 + np.arange(max(1, size // 4))).ravel())
            total[0] += int(np.bincount(words % 32).max())
            total[1] += 1

    def count_sectors(self, x: Instruction, threads: NDArray, at: NDArray, size: int) -> None:
        """Sectors of 32 bytes that a warp touches, and how few could hold its bytes."""
        total = self.sectors[x.where, x.op]
        for warp in np.unique(threads // 32):
            mine = np.unique(at[threads // 32 == warp])
            total[0] += len(np.unique(mine // 32))
            total[1] += -(-len(mine) * size // 32)


class Global:
    """The arrays that a launch may touch, each at an address of its own; an array that NumPy calls
    read-only is so here too."""

    def __init__(self) -> None:
        self.buffers: list[NDArray] = []

    def place(self, array: NDArray) -> int:
        """The address of `array`, for the launcher."""
        if not array.flags.c_contiguous:
            raise ValueError(f"array has strides {array.strides}; wanted it contiguous")
        self.buffers.append(array.reshape(-1).view(np.uint8))
        return GAP * len(self.buffers)

    def pieces(
        self, x: Instruction, threads: NDArray, at: NDArray, size: int, write: bool
    ) -> Iterator[tuple[NDArray, NDArray, NDArray]]:
        """(threads, buffer, offsets) for each array that is touched."""
        index, offset = at // GAP - 1, at % GAP
        for i in np.unique(index):
            mine = index == i
            if not 0 <= i < len(self.buffers):
                x.fail(f"thread {threads[mine][0]}: {int(at[mine][0]):#x} is no address of global memory")
            buffer = self.buffers[i]
            over = offset[mine] + size > len(buffer)
            if over.any():
                x.fail(
                    f"thread {threads[mine][over][0]} {'writes' if write else 'reads'} {size} bytes out of bounds, "
                    f"{offset[mine][over][0]} bytes into an array of {len(buffer)}"
                )
            if write and not buffer.flags.writeable:
                x.fail(f"thread {threads[mine][0]} writes to an array that it should only read")
            yield threads[mine], buffer, offset[mine]


class Shared:
    """A block's shared memory. Accesses of two threads with no barrier between them, one a write, are a race."""

    def __init__(self, size: int) -> None:
        self.data = np.full(size, 0xFF, np.uint8)
        self.written = np.zeros(size, bool)
        self.in_flight = np.full(size, -1, np.int32)  # the thread whose cp.async to this byte is not complete
        self.writer, self.write_epoch = np.full(size, -1, np.int32), np.full(size, -1, np.int32)
        self.reader, self.read_epoch = np.full(size, -1, np.int32), np.full(size, -1, np.int32)
        self.epoch = 0  # counts barriers
        self.generic = np.zeros(size, bool)  # written by a thread itself, not yet fenced for copies and products
        self.products: NDArray | None = None  # how many of each warpgroup's may still read a byte
        self.order: Order | None = None  # once there are mbarriers

    def check(self, x: Instruction, threads: NDArray, at: NDArray, size: int, write: bool) -> None:
        if (at < 0).any() or (at + size > len(self.data)).any():
            x.fail(f"shared address out of bounds: {int(at.max())} + {size} > {len(self.data)}")
        b = (at[:, None] + np.arange(size)).ravel()
        t = np.repeat(threads, size)
        if (flying := self.in_flight[b] >= 0).any():
            x.fail(
                f"thread {t[flying][0]} touches shared byte {b[flying][0]} while a cp.async to it is in flight "
                f"(thread {self.in_flight[b][flying][0]})"
            )
        if not write and not self.written[b].all():
            fresh = ~self.written[b]
            x.fail(f"thread {t[fresh][0]} reads shared byte {b[fresh][0]} that nobody wrote")
        if write and self.products is not None and (busy := self.products[:, b].any(0)).any():
            x.fail(f"thread {t[busy][0]} writes shared byte {b[busy][0]} while a wgmma may still read it")
        bad = (self.write_epoch[b] == self.epoch) & (self.writer[b] != t)
        if self.order is not None and bad.any():
            bad &= ~self.order.after_write(b, t, self.writer[b])
        if write:
            late = (self.read_epoch[b] == self.epoch) & (self.reader[b] != t)
            if self.order is not None and late.any():
                late &= ~self.order.after_reads(b, t)
            bad |= late
        if bad.any():
            x.fail(
                f"race on shared byte {b[bad][0]}: thread {t[bad][0]} {'writes' if write else 'reads'}, no barrier "
                f"since thread {self.writer[b][bad][0]} wrote or {self.reader[b][bad][0]} read"
            )
        if write:
            _, first, times = np.unique(b, return_index=True, return_counts=True)
            if (twice := times > 1).any():
                x.fail(f"race on shared byte {b[first[twice][0]]}: {times[twice][0]} threads write it at a time")
            self.wrote(b, t)
        else:
            others = (self.read_epoch[b] == self.epoch) & (self.reader[b] != t)
            self.reader[b], self.read_epoch[b] = np.where(others, -2, t), self.epoch  # -2: several threads
            if self.order is not None:
                self.order.record(b, t, False)

    def wrote(self, b: NDArray, t: NDArray, generic: bool = True) -> None:
        self.writer[b], self.write_epoch[b], self.written[b], self.generic[b] = t, self.epoch, True, generic
        if self.order is not None:
            self.order.record(b, t, True)
