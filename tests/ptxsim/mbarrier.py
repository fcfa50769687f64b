"""Barriers in shared memory that count arrivals and bytes, and bulk copies, which tell them of theirs. A copy lands as
late as it can: when nothing else is left to run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .block import Block, opcode
from .order import Order
from .program import Instruction


@dataclass
class MBarrier:
    at: int
    count: int  # arrivals that a phase waits for
    pending: int
    shown: NDArray  # what arrivals tell (Order.shown)
    told: NDArray  # of it, what those who wait for the phase before learn
    bytes: int = 0  # expected, less those that came
    phase: int = 0
    copies: list[tuple[int, int, NDArray]] = field(default_factory=list)  # thread, destination, bytes

    def arrive(self, b: Block, x: Instruction, mask: NDArray) -> None:
        arrivals = int(mask.sum())
        if arrivals > self.pending:
            x.fail(f"{arrivals} arrivals at a barrier that waits for {self.pending}")
        self.pending -= arrivals
        self.shown = np.maximum(self.shown, order_of(b).shown(mask))
        self.close(b)

    def close(self, b: Block) -> None:
        """Ends the phase if nothing is left to wait for."""
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending, self.told = self.phase + 1, self.count, self.shown.copy()
            b.asleep[b.asleep == self.at] = -1

    def land(self, b: Block) -> bool:
        """All copies that are under way; False if there are none."""
        landed, self.copies = self.copies, []
        for thread, to, data in landed:
            places = np.arange(to, to + len(data))
            b.shared.in_flight[places] = -1
            b.shared.data[places] = data
            b.shared.wrote(places, np.full(len(data), thread), generic=False)
            self.bytes -= len(data)
            self.shown[thread // 32] = max(self.shown[thread // 32], order_of(b).now)
        self.close(b)
        return bool(landed)


def order_of(b: Block) -> Order:
    if b.shared.order is None:
        b.shared.order = Order(b.count // 32, len(b.shared.data), b.steps)
    return b.shared.order


def barriers(b: Block, x: Instruction, address: NDArray, m: NDArray) -> Iterator[tuple[MBarrier, NDArray]]:
    """Each barrier that is meant, and by whom."""
    for at in np.unique(address[m]):
        mine = m & (address == at)
        if at not in b.mbarriers:
            x.fail(f"shared byte {at} is no mbarrier that was initialized")
        b.shared.check(x, np.nonzero(mine)[0], np.full(mine.sum(), at), 8, False)
        yield b.mbarriers[at], mine


@opcode("mbarrier")
def mbarrier(b: Block, x: Instruction, m: NDArray) -> None:
    how = x.parts[1]
    if how == "init":
        address, count = b.address(x.args[0]), b.value(x.args[1], "u32")
        list(b.touch(x, "shared", address, 8, m, True))
        order = order_of(b)
        for t in np.nonzero(m)[0]:
            at, wanted = int(address[t]), int(count[t])
            nothing = np.full(len(order.seen), -1)
            b.mbarriers[at] = MBarrier(at, wanted, wanted, nothing, nothing)
    elif how == "arrive":
        if x.args[0] != "_" or not set(x.parts[2:]) <= {"expect_tx", "shared", "shared::cta", "b64"}:
            x.fail("an arrival that tests/ptxsim does not know")
        for barrier, mine in barriers(b, x, b.address(x.args[1]), m):
            if "expect_tx" in x.parts:
                barrier.bytes += int(b.value(x.args[2], "u32")[mine].sum())
            barrier.arrive(b, x, mine)
    elif how in ("try_wait", "test_wait") and "parity" in x.parts:
        parity, over = b.value(x.args[2], "u32"), np.zeros(b.count, bool)
        for barrier, mine in barriers(b, x, b.address(x.args[1]), m):
            over |= mine & (barrier.phase % 2 != parity)
            order_of(b).learn(mine & over, barrier.told)
            b.asleep[mine & ~over] = barrier.at
        b.put(x.args[0], over, m)
    else:
        x.fail("an instruction that tests/ptxsim does not know")


def copy_bulk(b: Block, x: Instruction, m: NDArray) -> None:
    if x.op != "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes":
        x.fail("an instruction that tests/ptxsim does not know")
    to, source, size = b.address(x.args[0]), b.address(x.args[1]), b.value(x.args[2], "u32")
    for barrier, mine in barriers(b, x, b.address(x.args[3]), m):
        if b.shared.generic[barrier.at]:
            x.fail(f"the mbarrier at shared byte {barrier.at} is not there for copies: no fence.proxy.async since")
        for t in np.nonzero(mine)[0]:
            count = int(size[t])
            if count % 16 or to[t] % 16 or source[t] % 16:
                x.fail(f"thread {t}: {count} bytes from {source[t]:#x} to {to[t]}; wanted multiples of 16")
            one, data = np.array([t]), np.empty(0, np.uint8)
            b.cost.count_sectors(x, one, source[t : t + 1], count)
            for _, buffer, at in b.memory.pieces(x, one, source[t : t + 1], count, False):
                data = buffer[at[0] : at[0] + count].copy()
            b.shared.check(x, one, to[t : t + 1], count, True)
            b.shared.in_flight[to[t] : to[t] + count] = t
            barrier.copies.append((int(t), int(to[t]), data))
