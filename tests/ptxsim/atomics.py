"""Reads and writes that no other thread comes between."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from .block import Block, opcode, space_of
from .program import DTYPES, Instruction

JOIN: dict[str, Callable[..., NDArray]] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
}


@opcode("atom", "red")
def atomic(b: Block, x: Instruction, m: NDArray) -> None:
    """Threads in turn, in their order."""
    join, dtype = next((JOIN[p] for p in x.parts if p in JOIN), None), np.dtype(DTYPES[x.type])
    if join is None or dtype.kind == "f":
        x.fail("an atomic operation that tests/ptxsim does not know")
    address, operand = x.args[-2:]
    given, old = b.value(operand, x.type), np.zeros(b.count, dtype)
    for t in np.nonzero(m)[0]:
        alone = b.t == t
        for _, buffer, at in b.touch(x, space_of(x), b.address(address), dtype.itemsize, alone, True):
            place = buffer[at[0] : at[0] + dtype.itemsize].view(dtype)
            old[t] = place[0]
            place[0] = join(place[0], given[t])
    if x.parts[0] == "atom":
        b.put(x.args[0], old, m)
